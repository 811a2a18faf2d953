// The kernel of vq_nearest over an instruction set V. Each file that includes this is compiled with flags of its own,
// so nothing here may come from the C++ library: an inline function of it, compiled for AVX-512, could be the copy
// that the linker keeps for everyone. The anonymous namespace keeps ours apart.
#pragma once

#include "vq_nearest.h"

namespace dar::vq {
namespace {

constexpr int ROWS = 2;    // vectors of rows in a panel
constexpr int ENTRIES = 4; // entries at a time: 8 accumulators cover the latency of a fused multiply-add

// C is the number of channels where it is known when compiling, else 0.
template <typename V, int C>
void scan(const float *panel, const Entries &entries, int64_t first, int64_t last, float *best, int32_t *chunk) {
    constexpr int64_t WIDTH = ROWS * V::LANES;
    const int64_t channels = C ? C : entries.C;
    typename V::Float top[ROWS];
    typename V::Int where[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        top[r] = V::load(best + r * V::LANES);
        where[r] = V::load(chunk + r * V::LANES);
    }
    for (int64_t k = first; k < last; ++k) {
        typename V::Float high[ROWS];
        for (int r = 0; r < ROWS; ++r)
            high[r] = V::lowest();
        for (int64_t v = k * CHUNK; v < (k + 1) * CHUNK; v += ENTRIES) {
            typename V::Float score[ENTRIES][ROWS];
            for (int e = 0; e < ENTRIES; ++e)
                for (int r = 0; r < ROWS; ++r)
                    score[e][r] = V::broadcast(entries.bias[v + e]);
            for (int64_t c = 0; c < channels; ++c) {
                for (int e = 0; e < ENTRIES; ++e) {
                    const typename V::Float value = V::broadcast(entries.values[(v + e) * channels + c]);
                    for (int r = 0; r < ROWS; ++r)
                        score[e][r] = V::multiply_add(V::load(panel + c * WIDTH + r * V::LANES), value, score[e][r]);
                }
            }
            for (int e = 0; e < ENTRIES; ++e)
                for (int r = 0; r < ROWS; ++r)
                    high[r] = V::maximum(high[r], score[e][r]);
        }
        for (int r = 0; r < ROWS; ++r)
            V::keep_greater(high[r], static_cast<int32_t>(k), top[r], where[r]);
    }
    for (int r = 0; r < ROWS; ++r) {
        V::store(best + r * V::LANES, top[r]);
        V::store(chunk + r * V::LANES, where[r]);
    }
}

template <typename V>
void scan_any(const float *panel, const Entries &entries, int64_t first, int64_t last, float *best, int32_t *chunk) {
    const auto run = entries.C == 8 ? scan<V, 8> : scan<V, 0>; // 8: the released tokenizers'
    run(panel, entries, first, last, best, chunk);
}

// The same operations in the same order as `scan`, so the winner of a chunk has the score that made the chunk win.
template <typename V> int64_t resolve(const float *panel, int64_t lane, const Entries &entries, int64_t chunk) {
    int64_t code = chunk * CHUNK;
    float top = -__builtin_inff();
    for (int64_t v = chunk * CHUNK; v < (chunk + 1) * CHUNK; ++v) {
        float score = entries.bias[v];
        for (int64_t c = 0; c < entries.C; ++c)
            score = V::multiply_add(panel[c * ROWS * V::LANES + lane], entries.values[v * entries.C + c], score);
        if (score > top) {
            top = score;
            code = v;
        }
    }
    return code;
}

template <typename V> Kernel kernel() { return {ROWS * V::LANES, scan_any<V>, resolve<V>}; }

} // namespace
} // namespace dar::vq
