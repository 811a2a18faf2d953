// What one instruction set does within a decode step: products of a few rows with a large matrix that streams from
// memory once, and the small operations between them. Sums are in fp32 unless said.
#pragma once

#include <cstdint>

#include "isa.h"

namespace dar::decode {

constexpr int64_t PAGE = 32;   // tokens of a page of keys or values
constexpr int64_t OUTPUTS = 4; // rows of a weight matrix that are read side by side
constexpr int64_t PAD = 64;    // rows of scratch are multiples of this many elements: the longest step of a product

enum class Kind { fp32, bf16, int8 }; // of weights; pages are fp32 or bf16

constexpr int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

// [O, K], row-major and contiguous. int8: value = data * scale[o].
struct Weights {
    Kind kind;
    const void *data;
    int64_t O, K;
    const float *scale;  // [O], or null
    const int32_t *sums; // [O], of the rows: int8 only
};

// Rows that were prepared for products with weights of one kind.
struct Rows {
    char *data;
    int64_t stride; // in bytes
    float *scale;   // a row's, or null
};

// One query group (the query heads that share a key head) of one row of the batch.
struct Attention {
    const float *q;       // [group, padded(head_dim)], scaled, zeros behind head_dim
    const void *keys;     // of page 0 of this layer and key head, [32, head_dim] in each page
    const void *values;   // the same
    const int32_t *table; // pages of this row
    int64_t page_stride;  // elements from a page to the next
    int64_t group, head_dim;
    int64_t length; // keys
    float *scores;  // [group, padded(length)], scratch
    float *out;     // [group, head_dim]
};

// Products with weights of one kind.
struct Linear {
    int64_t bytes_per_element; // of prepared rows
    // Rounds or quantises x [K] into `out` (padded(K) elements) as the products want it, and its scale.
    void (*prepare)(const float *x, int64_t K, void *out, float *scale);
    // out[r, o] = rows[r] . w[o], added to what is there if `add`, for o in [first, last) and r < count.
    // The result of a row and output depends on nothing else.
    void (*products)(
        const Weights &w,
        int64_t first,
        int64_t last,
        const Rows &rows,
        int64_t count,
        float *out,
        int64_t stride,
        bool add
    );
};

// The key of a random stream, and the counters that stay the same for all codes.
struct Stream {
    uint64_t seed;
    uint32_t position;
};

struct Kernels {
    Linear linear[3]; // by Kind
    // out[i] = x[i] / sqrt(mean x^2 + eps) * weight[i]
    void (*rms_norm)(const float *x, const float *weight, int64_t D, float eps, float *out);
    // gate = gate / (1 + exp(-gate)) * up; n a multiple of 16
    void (*swiglu)(float *gate, const float *up, int64_t n);
    void (*attend[2])(const Attention &); // by Kind of the pages
    // out = (uncond + scale (cond - uncond)) / temperature, or cond / temperature where uncond is null; NaN becomes
    // -inf and +inf the largest number. Returns the maximum.
    float (*guide)(const float *cond, const float *uncond, float scale, float temperature, int64_t V, float *out);
    // out = exp(x - max)
    void (*exp_minus)(const float *x, float max, int64_t V, float *out);
    // argmax of x[v] + Gumbel noise of code v, over those with x[v] >= least; the lowest of equals.
    int64_t (*draw)(const float *x, int64_t V, float least, Stream stream);
};

const Kernels &kernels_baseline();
#if DAR_X86
const Kernels &kernels_avx2();
const Kernels &kernels_avx512();
const Kernels &kernels_avx512_vnni();
const Kernels &kernels_avx512_bf16();
#endif

const Kernels &choose_kernels(Isa isa);

} // namespace dar::decode
