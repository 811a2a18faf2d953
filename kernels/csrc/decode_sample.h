// A code from a row of logits: guidance and temperature, and the Gumbel-max draw with counter-based noise.
// Philox4x32-10 (Salmon et al., 2011): four codes a counter, the seed is the key, the position the second word.
#pragma once

#include "decode_rows.h"

namespace dar::decode {
namespace {

constexpr float LARGEST_NOISE = 16.7F; // -log(-log(1 - 2^-24)) is 16.64

template <typename V>
float guide(const float *cond, const float *uncond, float scale, float temperature, int64_t V_, float *out) {
    using F = typename V::Float;
    const F s = V::set(scale), t = V::set(temperature), lowest = V::set(-__builtin_inff());
    F top = lowest;
    for (int64_t i = 0; i < V_; i += V::LANES) {
        const bool whole = i + V::LANES <= V_;
        F x = whole ? V::load(cond + i) : load_part<V>(cond + i, V_ - i);
        if (uncond != nullptr) {
            const F u = whole ? V::load(uncond + i) : load_part<V>(uncond + i, V_ - i);
            x = V::add(u, V::mul(s, V::sub(x, u)));
        }
        // The zero makes one number of the two zeros; a maximum gives its second operand where one is NaN.
        x = V::max(V::add(V::div(x, t), V::set(0.0F)), lowest);
        x = V::min(x, V::set(3.40282347e38F));
        if (whole) {
            V::store(out + i, x);
            top = V::max(x, top);
        } else {
            float part[V::LANES];
            V::store(part, x);
            for (int64_t k = i; k < V_; ++k) {
                out[k] = part[k - i];
                top = V::max(V::set(out[k]), top);
            }
        }
    }
    return V::largest(top);
}

template <typename V> void exp_minus(const float *x, float max, int64_t V_, float *out) {
    for (int64_t i = 0; i < V_; i += V::LANES) {
        const bool whole = i + V::LANES <= V_;
        const typename V::Float in = whole ? V::load(x + i) : load_part<V>(x + i, V_ - i);
        const typename V::Float y = exponential<V>(V::sub(in, V::set(max)));
        if (whole) {
            V::store(out + i, y);
        } else {
            float part[V::LANES];
            V::store(part, y);
            for (int64_t k = i; k < V_; ++k)
                out[k] = part[k - i];
        }
    }
}

constexpr float LOGARITHM[] = {
    -1.1514610310e-1F,
    1.1676998740e-1F,
    -1.2420140846e-1F,
    1.4249322787e-1F,
    -1.6668057665e-1F,
    2.0000714765e-1F,
    -2.4999993993e-1F,
    3.3333331174e-1F
};

// ln x of positive normal numbers, to about 1 unit in the last place; the series of the Cephes library.
template <typename V> typename V::Float logarithm(typename V::Float x) {
    using F = typename V::Float;
    using I = typename V::Int;
    const I bits = V::as_int(x);
    const I e = V::template right_signed<23>(V::sub(bits, V::set(0x3F3504F3))); // 0.7071: x = f 2^e, f in [0.71, 1.41)
    const F n = V::convert(e);
    const F f = V::sub(V::as_float(V::sub(bits, V::template left<23>(e))), V::set(1.0F));
    const F square = V::mul(f, f);
    F p = V::set(7.0376836292e-2F);
    for (const float c : LOGARITHM)
        p = V::fma(p, f, V::set(c));
    F y = V::mul(V::mul(p, f), square);
    y = V::fma(n, V::set(-2.12194440e-4F), y);
    y = V::fma(square, V::set(-0.5F), y);
    return V::fma(n, V::set(0.693359375F), V::add(f, y));
}

// Gumbel noise of 32 random bits: -log(-log u), u the middle of one of 2^23 cells of (0, 1).
template <typename V> typename V::Float gumbel(typename V::Int bits) {
    const typename V::Float cell = V::convert(V::template right<9>(bits));
    const typename V::Float u = V::mul(V::add(cell, V::set(0.5F)), V::set(1.1920929e-7F));
    const typename V::Float zero = V::set(0.0F);
    return V::sub(zero, logarithm<V>(V::sub(zero, logarithm<V>(u))));
}

// The random bits of 4 * LANES codes from counter `first` on, in the order of the codes.
template <typename V> void philox(uint32_t first, Stream stream, typename V::Int *x) {
    using I = typename V::Int;
    x[0] = V::add(V::count(), V::set(static_cast<int32_t>(first)));
    x[1] = V::set(static_cast<int32_t>(stream.position));
    x[2] = x[3] = V::set(0); // stream 0 of a seed: the codes
    uint32_t k0 = static_cast<uint32_t>(stream.seed), k1 = static_cast<uint32_t>(stream.seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9U, k1 += 0xBB67AE85U) {
        I high0, low0, high1, low1;
        V::multiply(x[0], 0xD2511F53U, high0, low0);
        V::multiply(x[2], 0xCD9E8D57U, high1, low1);
        x[0] = V::bit_xor(V::bit_xor(high1, x[1]), V::set(static_cast<int32_t>(k0)));
        x[2] = V::bit_xor(V::bit_xor(high0, x[3]), V::set(static_cast<int32_t>(k1)));
        x[1] = low1;
        x[3] = low0;
    }
    V::interleave4(x);
}

template <typename V> int64_t draw(const float *x, int64_t V_, float least, Stream stream) {
    using F = typename V::Float;
    using I = typename V::Int;
    constexpr int64_t BLOCK = 4 * V::LANES; // codes of one call of philox
    const F lowest = V::set(-__builtin_inff());
    F best = lowest;
    I code = V::set(0);
    float limit = least; // no code below it can win
    for (int64_t first = 0; first < V_; first += BLOCK) {
        float part[BLOCK];
        const float *from = x + first;
        if (V_ - first < BLOCK) {
            for (int64_t i = 0; i < BLOCK; ++i)
                part[i] = first + i < V_ ? from[i] : -__builtin_inff();
            from = part;
        }
        F logits[4];
        for (int m = 0; m < 4; ++m)
            logits[m] = V::load(from + m * V::LANES);
        const F top = V::max(V::max(logits[0], logits[1]), V::max(logits[2], logits[3]));
        if (!V::any(V::at_least(top, V::set(limit))))
            continue;
        I bits[4];
        philox<V>(static_cast<uint32_t>(first / 4), stream, bits);
        for (int m = 0; m < 4; ++m) {
            F score = V::add(logits[m], gumbel<V>(bits[m]));
            score = V::select(V::at_least(logits[m], V::set(least)), score, lowest);
            const I index = V::add(V::count(), V::set(static_cast<int32_t>(first + m * V::LANES)));
            const typename V::Mask greater = V::greater(score, best);
            best = V::select(greater, score, best);
            code = V::select(greater, index, code);
        }
        const float bound = V::largest(best) - LARGEST_NOISE;
        limit = bound > least ? bound : least;
    }
    const float won = V::largest(best);
    float scores[V::LANES];
    int32_t codes[V::LANES];
    V::store(scores, best);
    V::store(codes, code);
    int32_t lowest_code = INT32_MAX;
    for (int i = 0; i < V::LANES; ++i)
        if (scores[i] >= won && codes[i] < lowest_code)
            lowest_code = codes[i];
    return lowest_code;
}

template <typename V> constexpr Kernels wide_kernels() {
    return {
        {linear<Wide<V, float>>(), linear<Wide<V, uint16_t>>(), linear<Wide<V, int8_t>>()},
        rms_norm<V>,
        swiglu<V>,
        {attend<V, float>, attend<V, uint16_t>},
        guide<V>,
        exp_minus<V>,
        draw<V>,
    };
}

} // namespace
} // namespace dar::decode
