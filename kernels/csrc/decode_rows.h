// What happens to rows between the products: norm, SwiGLU, attention over pages.
#pragma once

#include "decode_linear.h"

namespace dar::decode {
namespace {

constexpr float EXPONENTIAL[] = {1.38888889e-3F, 8.33333333e-3F, 4.16666667e-2F, 1.66666667e-1F, 0.5F, 1.0F, 1.0F};

// e^x to about 2 units in the last place; 1e-38 below -87, 1e38 above 88, NaN for NaN.
template <typename V> typename V::Float exponential(typename V::Float x) {
    using F = typename V::Float;
    const F in = V::max(V::set(-87.0F), V::min(V::set(88.0F), x));
    const F whole = V::set(12582912.0F); // 1.5 * 2^23: adding it rounds to an integer
    const F shifted = V::add(V::mul(in, V::set(1.44269504F)), whole);
    const F n = V::sub(shifted, whole);
    const F r = V::fma(n, V::set(-1.42860677e-6F), V::fma(n, V::set(-0.693145752F), in));
    F p = V::set(1.98412698e-4F);
    for (const float c : EXPONENTIAL)
        p = V::fma(p, r, V::set(c));
    const typename V::Int power = V::add(V::as_int(shifted), V::set(127 - 0x4B400000));
    return V::mul(p, V::as_float(V::template left<23>(power)));
}

template <typename V> void rms_norm(const float *x, const float *weight, int64_t D, float eps, float *out) {
    const int64_t whole = D - D % V::LANES;
    typename V::Float sum = V::set(0.0F);
    for (int64_t i = 0; i < whole; i += V::LANES) {
        const typename V::Float part = V::load(x + i);
        sum = V::fma(part, part, sum);
    }
    if (whole < D) {
        const typename V::Float part = load_part<V>(x + whole, D - whole);
        sum = V::fma(part, part, sum);
    }
    const float scale = 1.0F / __builtin_sqrtf(V::sum(sum) / static_cast<float>(D) + eps);
    for (int64_t i = 0; i < whole; i += V::LANES)
        V::store(out + i, V::mul(V::mul(V::load(x + i), V::set(scale)), V::load(weight + i)));
    for (int64_t i = whole; i < D; ++i)
        out[i] = x[i] * scale * weight[i];
}

template <typename V> void swiglu(float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i += V::LANES) {
        const typename V::Float g = V::load(gate + i);
        const typename V::Float e = exponential<V>(V::sub(V::set(0.0F), g));
        V::store(gate + i, V::mul(V::div(g, V::add(V::set(1.0F), e)), V::load(up + i)));
    }
}

// out[0, N * LANES) of one head from `d` on: the sum of the values by their weights.
template <typename V, typename T, int N>
void mix(const Attention &a, const float *weights, float scale, int64_t d, float *out) {
    const int64_t left = a.head_dim - d - (N - 1) * V::LANES; // of the last vector
    typename V::Float sum[N];
    for (int i = 0; i < N; ++i)
        sum[i] = V::set(0.0F);
    for (int64_t first = 0; first < a.length; first += PAGE) {
        const T *page = static_cast<const T *>(a.values) + a.table[first / PAGE] * a.page_stride + d;
        const int64_t count = a.length - first < PAGE ? a.length - first : PAGE;
        for (int64_t k = 0; k < count; ++k) {
            const typename V::Float w = V::set(weights[first + k]);
            const T *row = page + k * a.head_dim;
            for (int i = 0; i + 1 < N; ++i)
                sum[i] = V::fma(w, V::load(row + i * V::LANES), sum[i]);
            const T *tail = row + (N - 1) * V::LANES;
            sum[N - 1] = V::fma(w, left < V::LANES ? load_part<V>(tail, left) : V::load(tail), sum[N - 1]);
        }
    }
    float part[N * V::LANES];
    for (int i = 0; i < N; ++i)
        V::store(part + i * V::LANES, V::mul(sum[i], V::set(scale)));
    const int64_t size = left < V::LANES ? (N - 1) * V::LANES + left : N * V::LANES;
    for (int64_t i = 0; i < size; ++i)
        out[d + i] = part[i];
}

// Weights exp(score - max) in place; one over their sum is returned.
template <typename V> float soften(float *scores, int64_t length) {
    const float lowest = -__builtin_inff();
    for (int64_t i = length; i % V::LANES; ++i)
        scores[i] = lowest;
    typename V::Float top = V::set(lowest), sum = V::set(0.0F);
    for (int64_t i = 0; i < length; i += V::LANES)
        top = V::max(V::load(scores + i), top);
    const typename V::Float max = V::set(V::largest(top));
    for (int64_t i = 0; i < length; i += V::LANES) {
        const typename V::Float score = V::load(scores + i);
        const typename V::Float e = exponential<V>(V::sub(score, max));
        const typename V::Float weight = V::select(V::greater(V::set(-86.0F), V::sub(score, max)), V::set(0.0F), e);
        sum = V::add(sum, weight);
        V::store(scores + i, weight);
    }
    return 1.0F / V::sum(sum);
}

// Pages are too short for hardware prefetchers: 4 KiB in bf16. `KEEP` 3 brings them into the first-level cache, 2 into
// the second.
template <int KEEP, typename T> void prefetch_page(const T *page, const Attention &a) {
    for (int64_t i = 0; i < PAGE * a.head_dim; i += 64 / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(page + i, 0, KEEP);
}

template <typename V, typename T> void attend(const Attention &a) {
    const int64_t columns = padded(a.length), row = padded(a.head_dim) * static_cast<int64_t>(sizeof(float));
    const Rows queries{const_cast<char *>(reinterpret_cast<const char *>(a.q)), row, nullptr};
    for (int64_t first = 0; first < a.length; first += PAGE) {
        const T *page = static_cast<const T *>(a.keys) + a.table[first / PAGE] * a.page_stride;
        const int64_t count = a.length - first < PAGE ? a.length - first : PAGE;
        if (first + PAGE < a.length)
            prefetch_page<3>(static_cast<const T *>(a.keys) + a.table[first / PAGE + 1] * a.page_stride, a);
        prefetch_page<2>(static_cast<const T *>(a.values) + a.table[first / PAGE] * a.page_stride, a);
        const Weights keys{Kind::fp32, page, count, a.head_dim, nullptr, nullptr}; // the kind is T's
        products<Wide<V, T>>(keys, 0, count, queries, a.group, a.scores + first, columns, false);
    }
    for (int64_t h = 0; h < a.group; ++h) {
        float *weights = a.scores + h * columns;
        const float scale = soften<V>(weights, a.length);
        float *out = a.out + h * a.head_dim;
        int64_t d = 0;
        for (; d + 4 * V::LANES <= a.head_dim; d += 4 * V::LANES)
            mix<V, T, 4>(a, weights, scale, d, out);
        for (; d < a.head_dim; d += V::LANES)
            mix<V, T, 1>(a, weights, scale, d, out);
    }
}

} // namespace
} // namespace dar::decode
