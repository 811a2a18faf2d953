#include "modulate.h"

#include <algorithm>

#include "buffer.h"
#include "parallel.h"

namespace dar {
namespace {

constexpr int64_t ROWS = 16; // rows of one piece of work: 48 KiB of fp32 at D = 768

template <typename T> ModulateKernel<T> choose([[maybe_unused]] Isa isa) {
#if DAR_X86
    if (isa >= Isa::avx512_vnni) // for the byte and word instructions that come with it
        return modulate_avx512<T>();
    if (isa >= Isa::avx2)
        return modulate_avx2<T>();
#endif
    return modulate_baseline<T>();
}

// Calls row(b, n, scratch) for every row, with `floats` of scratch to each worker.
template <typename Row> void for_rows(const Size &size, int threads, int64_t floats, const Row &row) {
    const int64_t pieces = (size.N + ROWS - 1) / ROWS, items = size.B * pieces;
    const int workers = static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(items, 1)));
    const Buffer<float> scratch = make_buffer<float>(workers * floats);
    parallel_for(items, workers, [&](int64_t item, int worker) {
        const int64_t b = item / pieces, first = item % pieces * ROWS;
        for (int64_t n = first; n < std::min(first + ROWS, size.N); ++n)
            row(b, n, scratch.get() + worker * floats);
    });
}

int64_t whole_vectors(int64_t floats) { return (floats + 15) / 16 * 16; }

} // namespace

template <typename T> void modulate(const Modulate<T> &op, int threads, Isa isa) {
    const ModulateKernel<T> kernel = choose<T>(isa);
    for_rows(op.size, threads, whole_vectors(op.size.D), [&](int64_t b, int64_t n, float *scratch) {
        kernel.modulate(op, b, n, scratch);
    });
}

template <typename T> void bias_silu(const BiasSilu<T> &op, int threads, Isa isa) {
    const ModulateKernel<T> kernel = choose<T>(isa);
    for_rows(op.size, threads, 0, [&](int64_t b, int64_t n, float *) { kernel.bias_silu(op, b, n); });
}

template <typename T> void key_weights(const KeyWeights<T> &op, int threads, Isa isa) {
    const ModulateKernel<T> kernel = choose<T>(isa);
    const int64_t B = op.q.size.B, Dh = op.q.head_dim, H = op.q.size.D / Dh, Q = op.Q;
    const Buffer<float> keys = make_buffer<float>(B * H * Dh * Q);
    parallel_for(B * H, threads, [&](int64_t item, int) {
        kernel.transpose(op.keys + item * Q * Dh, Q, Dh, keys.get() + item * Dh * Q);
    });
    for_rows(op.q.size, threads, whole_vectors(4 * Dh + Q), [&](int64_t b, int64_t n, float *scratch) {
        kernel.key_weights(op, keys.get() + b * H * Dh * Q, b, n, scratch);
    });
}

template void modulate(const Modulate<float> &, int, Isa);
template void modulate(const Modulate<Bf16> &, int, Isa);
template void bias_silu(const BiasSilu<float> &, int, Isa);
template void bias_silu(const BiasSilu<Bf16> &, int, Isa);
template void key_weights(const KeyWeights<float> &, int, Isa);
template void key_weights(const KeyWeights<Bf16> &, int, Isa);

} // namespace dar
