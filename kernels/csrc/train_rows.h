// Row-wise work of a training step: the gradient of a cross-entropy in the place of its logits, and dropout.
// Sums in fp32. Values are fp32 or bf16.
#pragma once

#include <cstdint>

#include "bf16.h"
#include "isa.h"

namespace dar {

// lse[m] = logsumexp(row m), losses[m] = lse[m] - logits[m, target], NaN where the target is not in [0, V). Then, with
// factors, row m becomes factor (softmax - onehot). A row of 16384 stays in cache: it is read and written once.
template <typename T> struct CrossEntropyRows {
    int64_t M, V;
    T *logits; // [M, V], rows contiguous
    const int64_t *targets;
    const float *factors; // null: the logits stay
    float *losses, *lse;
};

// out[i] = x[i] scale where hash(key, i) >= threshold, else 0: the same for the same key, so gradients take it again.
template <typename T> struct Dropout {
    int64_t size;
    const T *x;
    T *out; // may be x
    uint64_t key;
    uint32_t threshold;
    float scale;
};

template <typename T> void cross_entropy_rows(const CrossEntropyRows<T> &op, int threads, Isa isa);
template <typename T> void dropout(const Dropout<T> &op, int threads, Isa isa);

struct MaxSum {
    float max, sum; // sum of exp(x - max)
};

// One instruction set's functions of a row.
template <typename T> struct TrainRowsKernel {
    MaxSum (*max_sum)(const T *x, int64_t V);
    void (*softmax_times)(T *x, int64_t V, float lse, float factor); // x becomes factor exp(x - lse)
    void (*dropout)(const T *x, T *out, int64_t size, uint32_t start, uint32_t key, uint32_t threshold, float scale);
};

template <typename T> TrainRowsKernel<T> train_rows_baseline();
#if DAR_X86
template <typename T> TrainRowsKernel<T> train_rows_avx2();
template <typename T> TrainRowsKernel<T> train_rows_avx512();
#endif

} // namespace dar
