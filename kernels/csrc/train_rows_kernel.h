// The row functions of train_rows.h in plain loops that GCC and Clang vectorise (see modulate_kernel.h).
#pragma once

#include "modulate_kernel.h"
#include "train_rows.h"

namespace dar {
namespace {

constexpr int64_t PIECE = 512; // numbers in fp32 at a time: 2 KiB, in the first-level cache

template <typename T> inline void load_piece(const T *x, int64_t n, float *out) {
    for (int64_t i = 0; i < n; ++i)
        out[i] = load(x[i]);
}

// The largest of n numbers in 16 parts; NaN where one is.
inline float largest_of(const float *x, int64_t n, float so_far) {
    float part[16], nan = 0;
    for (float &p : part)
        p = so_far;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; ++j) {
            part[j] = x[i + j] > part[j] ? x[i + j] : part[j];
        }
    for (; i < n; ++i)
        part[0] = x[i] > part[0] ? x[i] : part[0];
    for (i = 0; i < n; ++i)
        nan += x[i] * 0.0F; // an infinite logit has no softmax either
    float top = part[0];
    for (int j = 1; j < 16; ++j)
        top = part[j] > top ? part[j] : top;
    return nan == 0.0F ? top : __builtin_nanf("");
}

inline float sum_exp(const float *x, int64_t n, float max) {
    float part[16] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; ++j)
            part[j] += exp_approx(x[i + j] - max);
    for (; i < n; ++i)
        part[0] += exp_approx(x[i] - max);
    float sum = 0;
    for (const float p : part)
        sum += p;
    return sum;
}

template <typename T> MaxSum max_sum(const T *x, int64_t V) {
    float piece[PIECE];
    float max = -3.402823466e38F;
    for (int64_t start = 0; start < V; start += PIECE) {
        const int64_t n = V - start < PIECE ? V - start : PIECE;
        load_piece(x + start, n, piece);
        max = largest_of(piece, n, max);
        if (max != max)
            return {max, max};
    }
    float sum = 0;
    for (int64_t start = 0; start < V; start += PIECE) {
        const int64_t n = V - start < PIECE ? V - start : PIECE;
        load_piece(x + start, n, piece);
        sum += sum_exp(piece, n, max);
    }
    return {max, sum};
}

template <typename T> void softmax_times(T *x, int64_t V, float lse, float factor) {
    for (int64_t i = 0; i < V; ++i)
        store(&x[i], factor * exp_approx(load(x[i]) - lse));
}

// Murmur3's finaliser: every bit of the index and the key moves every bit of the hash.
inline uint32_t hash(uint32_t x) {
    x ^= x >> 16;
    x *= 0x85EBCA6BU;
    x ^= x >> 13;
    x *= 0xC2B2AE35U;
    return x ^ (x >> 16);
}

template <typename T>
void dropout_piece(const T *x, T *out, int64_t size, uint32_t start, uint32_t key, uint32_t threshold, float scale) {
    for (int64_t i = 0; i < size; ++i) {
        const uint32_t drawn = hash(hash(start + static_cast<uint32_t>(i)) ^ key);
        store(&out[i], drawn >= threshold ? load(x[i]) * scale : 0.0F);
    }
}

template <typename T> TrainRowsKernel<T> train_rows_kernel() {
    return {max_sum<T>, softmax_times<T>, dropout_piece<T>};
}

} // namespace
} // namespace dar
