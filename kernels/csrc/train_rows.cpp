#include "train_rows.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"

namespace dar {
namespace {

constexpr int64_t STRETCH = 1 << 16; // numbers of one piece of work; a key of its own each

template <typename T> TrainRowsKernel<T> choose([[maybe_unused]] Isa isa) {
#if DAR_X86
    if (isa >= Isa::avx512_vnni) // for the byte and word instructions that come with it
        return train_rows_avx512<T>();
    if (isa >= Isa::avx2)
        return train_rows_avx2<T>();
#endif
    return train_rows_baseline<T>();
}

// splitmix64: keys of neighbouring stretches share nothing.
uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15ULL;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
    return x ^ (x >> 31);
}

} // namespace

template <typename T> void cross_entropy_rows(const CrossEntropyRows<T> &op, int threads, Isa isa) {
    const TrainRowsKernel<T> kernel = choose<T>(isa);
    parallel_for(op.M, threads, [&](int64_t m, int) {
        T *row = op.logits + m * op.V;
        const MaxSum found = kernel.max_sum(row, op.V);
        const float lse = found.max + std::log(found.sum);
        const int64_t target = op.targets[m];
        const bool inside = target >= 0 && target < op.V;
        const float picked = inside ? load(row[target]) : std::nanf("");
        op.lse[m] = lse;
        op.losses[m] = lse - picked;
        if (op.factors == nullptr)
            return;
        const float factor = op.factors[m];
        kernel.softmax_times(row, op.V, lse, factor);
        if (inside) // from the logit, not from the rounded gradient
            store(&row[target], factor * (std::exp(picked - lse) - 1));
    });
}

template <typename T> void dropout(const Dropout<T> &op, int threads, Isa isa) {
    const TrainRowsKernel<T> kernel = choose<T>(isa);
    const int64_t pieces = (op.size + STRETCH - 1) / STRETCH;
    parallel_for(pieces, threads, [&](int64_t i, int) {
        const int64_t start = i * STRETCH, size = std::min(STRETCH, op.size - start);
        const uint64_t key = mix(op.key ^ mix(static_cast<uint64_t>(i)));
        const auto low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
        kernel.dropout(op.x + start, op.out + start, size, low, high, op.threshold, op.scale);
    });
}

template void cross_entropy_rows(const CrossEntropyRows<float> &, int, Isa);
template void cross_entropy_rows(const CrossEntropyRows<Bf16> &, int, Isa);
template void dropout(const Dropout<float> &, int, Isa);
template void dropout(const Dropout<Bf16> &, int, Isa);

} // namespace dar
