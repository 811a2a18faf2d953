// Sixteen lanes. Included only by files that are compiled for AVX-512, each with a copy of its own.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dar {
namespace {

struct Avx512 {
    using Float = __m512;
    using Int = __m512i;
    using Mask = __mmask16;
    static constexpr int LANES = 16;
    static constexpr int TILE_ROWS = 4; // 16 accumulators beside 4 weights, of 32 registers

    static Float set(float x) { return _mm512_set1_ps(x); }
    static Int set(int32_t x) { return _mm512_set1_epi32(x); }
    static Float load(const float *p) { return _mm512_loadu_ps(p); }
    static Float load(const uint16_t *p) { // bf16
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
        return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static Float load(const int8_t *p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
    }
    static void store(float *p, Float x) { _mm512_storeu_ps(p, x); }
    static void store(int32_t *p, Int x) { _mm512_storeu_si512(p, x); }
    static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static Float max(Float a, Float b) { return _mm512_max_ps(a, b); } // b where either is NaN
    static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
    static Mask greater(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
    static Mask greater(Int a, Int b) { return _mm512_cmpgt_epi32_mask(a, b); }
    static Mask at_least(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
    static bool any(Mask m) { return m != 0; }
    static Float select(Mask m, Float a, Float b) { return _mm512_mask_blend_ps(m, b, a); }
    static Int select(Mask m, Int a, Int b) { return _mm512_mask_blend_epi32(m, b, a); }
    static float sum(Float x) { return _mm512_reduce_add_ps(x); }
    static float largest(Float x) { return _mm512_reduce_max_ps(x); }
    static int32_t largest(Int x) { return _mm512_reduce_max_epi32(x); }

    // y[i] = sum of x[i]: a transposition of four costs half of four sums.
    static void sum4(const Float *x, float *y) {
        const Float a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
        const Float b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
        const Float c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
        const Float d = _mm512_add_ps(c, _mm512_shuffle_f32x4(c, c, 0x4E));
        const Float e = _mm512_add_ps(d, _mm512_shuffle_f32x4(d, d, 0xB1));
        _mm_storeu_ps(y, _mm512_castps512_ps128(e));
    }

    static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static Int sub(Int a, Int b) { return _mm512_sub_epi32(a, b); }
    static Int bit_and(Int a, Int b) { return _mm512_and_si512(a, b); }
    static Int bit_xor(Int a, Int b) { return _mm512_xor_si512(a, b); }
    template <int N> static Int left(Int x) { return _mm512_slli_epi32(x, N); }
    template <int N> static Int right(Int x) { return _mm512_srli_epi32(x, N); }        // zeros come in
    template <int N> static Int right_signed(Int x) { return _mm512_srai_epi32(x, N); } // the sign comes in
    static Float as_float(Int x) { return _mm512_castsi512_ps(x); }
    static Int as_int(Float x) { return _mm512_castps_si512(x); }
    static Int round(Float x) { return _mm512_cvtps_epi32(x); }
    static Float convert(Int x) { return _mm512_cvtepi32_ps(x); }
    static Int count() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

    // The upper and lower halves of the 64-bit products of unsigned lanes.
    static void multiply(Int x, uint32_t factor, Int &high, Int &low) {
        const Int by = set(static_cast<int32_t>(factor));
        const Int even = _mm512_mul_epu32(x, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), by);
        low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
        high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
    }

    // Lane l of x[j] becomes element 4 l + j of x[0], x[1], x[2], x[3] in a row.
    static void interleave4(Int *x) {
        const Int a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
        const Int c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
        const Int p = _mm512_unpacklo_epi64(a, c), q = _mm512_unpackhi_epi64(a, c);
        const Int r = _mm512_unpacklo_epi64(b, d), s = _mm512_unpackhi_epi64(b, d);
        const Int e = _mm512_shuffle_i32x4(p, q, 0x44), f = _mm512_shuffle_i32x4(r, s, 0x44);
        const Int g = _mm512_shuffle_i32x4(p, q, 0xEE), h = _mm512_shuffle_i32x4(r, s, 0xEE);
        x[0] = _mm512_shuffle_i32x4(e, f, 0x88);
        x[1] = _mm512_shuffle_i32x4(e, f, 0xDD);
        x[2] = _mm512_shuffle_i32x4(g, h, 0x88);
        x[3] = _mm512_shuffle_i32x4(g, h, 0xDD);
    }
};

} // namespace
} // namespace dar
