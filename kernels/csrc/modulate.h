// Row-wise fusions of the pixel DiT: LayerNorm with what surrounds it, in one pass over a row that stays in cache.
// Sums in fp32. Values are fp32 or bf16 (the upper half of an fp32, rounded to nearest even).
#pragma once

#include <cstdint>

#include "bf16.h"
#include "isa.h"

namespace dar {

// [B, N, D] with the last dimension contiguous; a broadcast dimension has stride 0. Null data: absent.
template <typename T> struct Grid {
    T *data;
    int64_t batch_stride, row_stride;
    T *row(int64_t b, int64_t n) const { return data + b * batch_stride + n * row_stride; }
    explicit operator bool() const { return data != nullptr; }
};

struct Size {
    int64_t B, N, D;
};

// residual = x + gate y (absent gate: x), modulated = LN(residual) (1 + scale) + shift, LN alone where both are absent.
template <typename T> struct Modulate {
    Size size;
    Grid<const T> x, y, gate, shift, scale;
    Grid<T> residual, modulated; // residual may be x, or absent
    float eps;
};

// out = silu(x + bias), bias one row a picture.
template <typename T> struct BiasSilu {
    Size size;
    Grid<const T> x, bias;
    Grid<T> out;
};

// LayerNorm with affine on each head of Dh, then the rotation of interleaved pairs, then a factor.
// x and out are [B, N, H, Dh] with heads contiguous within a row; cos and sin [N, Dh / 2].
template <typename T> struct HeadNormRope {
    Size size; // D = H * Dh
    int64_t head_dim;
    Grid<const T> x;
    const T *weight, *bias;
    const float *cos, *sin; // null: no rotation
    Grid<T> out;
    float eps, factor;
};

// softmax over the Q keys of a picture of the scores of q, head by head: [B, N, H * Q]. Keys [B, H, Q, Dh].
template <typename T> struct KeyWeights {
    HeadNormRope<T> q; // factor holds 1 / sqrt(Dh); its out is the result, H * Q wide
    const T *keys;
    int64_t Q;
};

template <typename T> void modulate(const Modulate<T> &op, int threads, Isa isa);
template <typename T> void bias_silu(const BiasSilu<T> &op, int threads, Isa isa);
template <typename T> void key_weights(const KeyWeights<T> &op, int threads, Isa isa);

// One instruction set's row functions; `scratch` is as many floats as the function's comment says.
template <typename T> struct ModulateKernel {
    void (*modulate)(const Modulate<T> &, int64_t b, int64_t n, float *scratch); // D
    void (*bias_silu)(const BiasSilu<T> &, int64_t b, int64_t n);
    void (*transpose)(const T *in, int64_t rows, int64_t columns, float *out); // [rows, columns] to [columns, rows]
    void (*key_weights)(const KeyWeights<T> &, const float *keys, int64_t b, int64_t n, float *scratch); // 4 Dh + Q
};

template <typename T> ModulateKernel<T> modulate_baseline();
#if DAR_X86
template <typename T> ModulateKernel<T> modulate_avx2();
template <typename T> ModulateKernel<T> modulate_avx512();
#endif

} // namespace dar
