// The row functions of modulate.h in plain loops that GCC and Clang vectorise; each file that includes this is compiled
// with flags of its own, so nothing here may come from the C++ library (see vq_nearest_kernel.h).
#pragma once

#include "modulate.h"
#include "simd_math.h"

namespace dar {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));

struct Moments {
    float mean, rstd;
};

// Sum of x - mean, or of its square, in 16 parts: as exact whatever the compiler makes of the loop.
template <bool SQUARE> inline float sum_of(const float *x, int64_t D, float mean) {
    constexpr int VECTORS = 16 / LANES;
    Vector part[VECTORS] = {};
    int64_t d = 0;
    for (; d + 16 <= D; d += 16)
        for (int j = 0; j < VECTORS; ++j) {
            const Vector v = *reinterpret_cast<const Vector *>(x + d + LANES * j) - mean;
            part[j] += SQUARE ? v * v : v;
        }
    float sum = 0;
    for (; d < D; ++d)
        sum += SQUARE ? (x[d] - mean) * (x[d] - mean) : x[d] - mean;
    for (int j = 1; j < VECTORS; ++j)
        part[0] += part[j];
    for (int i = 0; i < LANES; ++i)
        sum += part[0][i];
    return sum;
}

inline Moments moments(const float *x, int64_t D, float eps) {
    const float size = static_cast<float>(D), mean = sum_of<false>(x, D, 0) / size;
    return {mean, 1 / __builtin_sqrtf(sum_of<true>(x, D, mean) / size + eps)};
}

template <typename T> void modulate_row(const Modulate<T> &op, int64_t b, int64_t n, float *row) {
    const int64_t D = op.size.D;
    const T *x = op.x.row(b, n);
    if (op.gate) {
        const T *y = op.y.row(b, n), *gate = op.gate.row(b, n);
        T *residual = op.residual.row(b, n);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) {
            store(&residual[d], load(x[d]) + load(gate[d]) * load(y[d]));
            row[d] = load(residual[d]); // what the next reader of the residual will see
        }
    } else {
#pragma omp simd
        for (int64_t d = 0; d < D; ++d)
            row[d] = load(x[d]);
    }
    const Moments m = moments(row, D, op.eps);
    T *out = op.modulated.row(b, n);
    if (op.scale) {
        const T *scale = op.scale.row(b, n), *shift = op.shift.row(b, n);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d)
            store(&out[d], (row[d] - m.mean) * m.rstd * (1 + load(scale[d])) + load(shift[d]));
    } else {
#pragma omp simd
        for (int64_t d = 0; d < D; ++d)
            store(&out[d], (row[d] - m.mean) * m.rstd);
    }
}

template <typename T> void bias_silu_row(const BiasSilu<T> &op, int64_t b, int64_t n) {
    const T *x = op.x.row(b, n), *bias = op.bias.row(b, n);
    T *out = op.out.row(b, n);
#pragma omp simd
    for (int64_t d = 0; d < op.size.D; ++d) {
        const float sum = load(x[d]) + load(bias[d]);
        const float v = sum < -88.0F ? -88.0F : sum; // silu is below 1e-36 there, and exp_approx at its end
        store(&out[d], v / (1 + exp_approx(-v)));
    }
}

// The normed and rotated head in `head`; `expanded` holds cos and ±sin for each of Dh channels, one after the other.
// WIDTH is Dh where it is known when compiling, else 0.
template <int WIDTH, typename T>
inline void norm_rope_head(const HeadNormRope<T> &op, const T *x, const float *expanded, float *swapped, float *head) {
    const int64_t Dh = WIDTH ? WIDTH : op.head_dim;
#pragma omp simd
    for (int64_t d = 0; d < Dh; ++d)
        head[d] = load(x[d]);
    const Moments m = moments(head, Dh, op.eps);
#pragma omp simd
    for (int64_t d = 0; d < Dh; ++d)
        head[d] = ((head[d] - m.mean) * m.rstd * load(op.weight[d]) + load(op.bias[d])) * op.factor;
    if (!op.cos)
        return;
    for (int64_t i = 0; i < Dh / 2; ++i) {
        swapped[2 * i] = head[2 * i + 1];
        swapped[2 * i + 1] = head[2 * i];
    }
#pragma omp simd
    for (int64_t d = 0; d < Dh; ++d)
        head[d] = head[d] * expanded[d] + swapped[d] * expanded[Dh + d];
}

template <typename T>
inline void norm_rope_head(const HeadNormRope<T> &op, const T *x, const float *expanded, float *swapped, float *head) {
    if (op.head_dim == 64) // the released tokenizers'
        norm_rope_head<64>(op, x, expanded, swapped, head);
    else
        norm_rope_head<0>(op, x, expanded, swapped, head);
}

// Scores of one query over 32 keys `key` [Dh, 32]: in registers, even and odd channels apart to hide latency.
inline void scores_of_32(const float *head, const float *key, int64_t Dh, float *score) {
    constexpr int VECTORS = 32 / LANES;
    Vector even[VECTORS] = {}, odd[VECTORS] = {};
    for (int64_t d = 0; d < Dh; d += 2)
        for (int j = 0; j < VECTORS; ++j) {
            even[j] += head[d] * *reinterpret_cast<const Vector *>(key + d * 32 + LANES * j);
            odd[j] += head[d + 1] * *reinterpret_cast<const Vector *>(key + (d + 1) * 32 + LANES * j);
        }
    for (int j = 0; j < VECTORS; ++j)
        *reinterpret_cast<Vector *>(score + LANES * j) = even[j] + odd[j];
}

template <typename T> inline void expand_tables(const HeadNormRope<T> &op, int64_t n, float *expanded) {
    const int64_t Dh = op.head_dim;
    if (!op.cos)
        return;
    const float *cos = op.cos + n * (Dh / 2), *sin = op.sin + n * (Dh / 2);
    for (int64_t i = 0; i < Dh / 2; ++i) {
        expanded[2 * i] = expanded[2 * i + 1] = cos[i];
        expanded[Dh + 2 * i] = -sin[i];
        expanded[Dh + 2 * i + 1] = sin[i];
    }
}

template <typename T> void transpose(const T *in, int64_t rows, int64_t columns, float *out) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
            out[j * rows + i] = load(in[i * columns + j]);
}

// `keys` are this picture's, transposed: [H, Dh, Q] fp32.
template <typename T>
void key_weights_row(const KeyWeights<T> &op, const float *keys, int64_t b, int64_t n, float *scratch) {
    const int64_t Dh = op.q.head_dim, Q = op.Q;
    float *swapped = scratch + 2 * Dh, *head = scratch + 3 * Dh, *score = scratch + 4 * Dh;
    expand_tables(op.q, n, scratch);
    for (int64_t h = 0; h < op.q.size.D / Dh; ++h) {
        norm_rope_head(op.q, op.q.x.row(b, n) + h * Dh, scratch, swapped, head);
        const float *key = keys + h * Dh * Q;
        if (Q == 32) { // the released tokenizers'
            scores_of_32(head, key, Dh, score);
        } else {
            for (int64_t k = 0; k < Q; ++k)
                score[k] = 0;
            for (int64_t d = 0; d < Dh; ++d)
#pragma omp simd
                for (int64_t k = 0; k < Q; ++k)
                    score[k] += head[d] * key[d * Q + k];
        }
        float top = score[0];
#pragma omp simd reduction(max : top)
        for (int64_t k = 1; k < Q; ++k)
            top = score[k] > top ? score[k] : top;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < Q; ++k) {
            score[k] = exp_approx(score[k] - top);
            sum += score[k];
        }
        const float scale = 1 / sum;
        T *out = op.q.out.row(b, n) + h * Q;
#pragma omp simd
        for (int64_t k = 0; k < Q; ++k)
            store(&out[k], score[k] * scale);
    }
}

template <typename T> ModulateKernel<T> modulate_kernel() {
    return {modulate_row<T>, bias_silu_row<T>, transpose<T>, key_weights_row<T>};
}

} // namespace
} // namespace dar
