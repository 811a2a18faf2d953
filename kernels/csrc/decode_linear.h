// Products of a few rows with a matrix that streams from memory: four rows of the matrix side by side, each read once
// for all rows of the batch. P says how weights of one type meet activations:
//   Weight, Vector (STEP weights or activations), Sum; ROWS: rows of the batch at a time; PLANES of activations;
//   load, load_part (zeros behind n), row, add, finish (four sums of the first and of the last plane to four results).
#pragma once

#include "decode_kernels.h"

namespace dar::decode {
namespace {

// n < LANES elements, zeros behind them.
template <typename V, typename T> typename V::Float load_part(const T *p, int64_t n) {
    T part[V::LANES] = {};
    for (int64_t i = 0; i < n; ++i)
        part[i] = p[i];
    return V::load(part);
}

// Weights of any type, converted as they are loaded; activations in fp32.
template <typename V, typename T> struct Wide {
    using Weight = T;
    using Vector = typename V::Float;
    using Sum = typename V::Float;
    static constexpr int64_t STEP = V::LANES, BYTES = sizeof(float);
    static constexpr int ROWS = V::TILE_ROWS, PLANES = 1;

    static Sum zero() { return V::set(0.0F); }
    static Vector load(const T *p) { return V::load(p); }
    static Vector load_part(const T *p, int64_t n) { return dar::decode::load_part<V>(p, n); }
    static Vector row(const char *p, int) { return V::load(reinterpret_cast<const float *>(p)); }
    static Sum add(Sum sum, Vector w, Vector x) { return V::fma(w, x, sum); }
    static void finish(const Sum *sum, const Sum *, const Weights &w, const int64_t *o, float, float *y) {
        V::sum4(sum, y);
        if (w.scale != nullptr)
            for (int i = 0; i < OUTPUTS; ++i)
                y[i] *= w.scale[o[i]];
    }
    static void prepare(const float *x, int64_t K, void *out, float *) {
        float *y = static_cast<float *>(out);
        __builtin_memcpy(y, x, static_cast<size_t>(K) * sizeof(float));
        __builtin_memset(y + K, 0, static_cast<size_t>(padded(K) - K) * sizeof(float));
    }
};

// Four outputs `apart` from each other; those from `count` on repeat the first.
template <typename P> struct Tile {
    const typename P::Weight *w[OUTPUTS];
    int64_t o[OUTPUTS];
    int64_t count;

    Tile(const Weights &weights, int64_t first, int64_t apart, int64_t count) : count(count) {
        for (int64_t i = 0; i < OUTPUTS; ++i) {
            o[i] = first + (i < count ? i * apart : 0);
            w[i] = static_cast<const typename P::Weight *>(weights.data) + o[i] * weights.K;
        }
    }
};

// ROWS rows of the batch, from `row` on.
template <typename P, int ROWS>
inline void multiply(
    const Weights &weights, const Tile<P> &tile, const Rows &rows, int64_t row, float *out, int64_t stride, bool add
) {
    typename P::Sum sum[P::PLANES][ROWS][OUTPUTS];
    for (int plane = 0; plane < P::PLANES; ++plane)
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < OUTPUTS; ++i)
                sum[plane][r][i] = P::zero();
    const char *x = rows.data + row * rows.stride;
    const auto add_step = [&](const typename P::Vector *w) {
        for (int r = 0; r < ROWS; ++r)
            for (int plane = 0; plane < P::PLANES; ++plane) {
                const typename P::Vector values = P::row(x + r * rows.stride, plane);
                for (int i = 0; i < OUTPUTS; ++i)
                    sum[plane][r][i] = P::add(sum[plane][r][i], w[i], values);
            }
        x += P::STEP * P::BYTES;
    };
    int64_t k = 0;
    for (; k + P::STEP <= weights.K; k += P::STEP) {
        typename P::Vector w[OUTPUTS];
        for (int i = 0; i < OUTPUTS; ++i)
            w[i] = P::load(tile.w[i] + k);
        add_step(w);
    }
    if (k < weights.K) {
        typename P::Vector w[OUTPUTS];
        for (int i = 0; i < OUTPUTS; ++i)
            w[i] = P::load_part(tile.w[i] + k, weights.K - k);
        add_step(w);
    }
    for (int r = 0; r < ROWS; ++r) {
        float y[OUTPUTS];
        const float scale = rows.scale == nullptr ? 1.0F : rows.scale[row + r];
        P::finish(sum[0][r], sum[P::PLANES - 1][r], weights, tile.o, scale, y);
        float *to = out + (row + r) * stride;
        for (int64_t i = 0; i < tile.count; ++i)
            to[tile.o[i]] = add ? to[tile.o[i]] + y[i] : y[i];
    }
}

template <typename P>
void multiply_all(
    const Weights &w, const Tile<P> &tile, const Rows &rows, int64_t count, float *out, int64_t stride, bool add
) {
    int64_t r = 0;
    for (; r + P::ROWS <= count; r += P::ROWS)
        multiply<P, P::ROWS>(w, tile, rows, r, out, stride, add);
    if (P::ROWS > 3 && count - r == 3)
        multiply < P, P::ROWS<3 ? 1 : 3>(w, tile, rows, r, out, stride, add);
    else if (P::ROWS > 2 && count - r == 2)
        multiply < P, P::ROWS<2 ? 1 : 2>(w, tile, rows, r, out, stride, add);
    else if (count - r == 1)
        multiply<P, 1>(w, tile, rows, r, out, stride, add);
}

// The four streams lie far apart and each runs on and on, as hardware prefetchers like it: one core of a Zen 4 reads
// 29 GB/s so, 12 GB/s where the four rows are neighbours, and at best 20 GB/s with prefetch instructions.
template <typename P>
void products(
    const Weights &w, int64_t first, int64_t last, const Rows &rows, int64_t count, float *out, int64_t stride, bool add
) {
    const int64_t apart = (last - first) / OUTPUTS;
    for (int64_t o = first; o < first + apart; ++o)
        multiply_all(w, Tile<P>(w, o, apart, OUTPUTS), rows, count, out, stride, add);
    const int64_t rest = first + OUTPUTS * apart;
    if (rest < last)
        multiply_all(w, Tile<P>(w, rest, 1, last - rest), rows, count, out, stride, add);
}

template <typename P> constexpr Linear linear() { return {P::BYTES, P::prepare, products<P>}; }

} // namespace
} // namespace dar::decode
