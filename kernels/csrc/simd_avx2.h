// Eight lanes, with fused multiply-adds. Included only by files that are compiled for AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dar {
namespace {

struct Avx2 {
    using Float = __m256;
    using Int = __m256i;
    using Mask = __m256i;
    static constexpr int LANES = 8;
    static constexpr int TILE_ROWS = 2; // 8 accumulators beside 4 weights, of 16 registers

    static Float set(float x) { return _mm256_set1_ps(x); }
    static Int set(int32_t x) { return _mm256_set1_epi32(x); }
    static Float load(const float *p) { return _mm256_loadu_ps(p); }
    static Float load(const uint16_t *p) { // bf16
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    static Float load(const int8_t *p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
    }
    static void store(float *p, Float x) { _mm256_storeu_ps(p, x); }
    static void store(int32_t *p, Int x) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), x); }
    static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
    static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static Float max(Float a, Float b) { return _mm256_max_ps(a, b); } // b where either is NaN
    static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
    static Mask greater(Float a, Float b) { return as_int(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
    static Mask greater(Int a, Int b) { return _mm256_cmpgt_epi32(a, b); }
    static Mask at_least(Float a, Float b) { return as_int(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
    static bool any(Mask m) { return _mm256_movemask_epi8(m) != 0; }
    static Float select(Mask m, Float a, Float b) { return _mm256_blendv_ps(b, a, as_float(m)); }
    static Int select(Mask m, Int a, Int b) { return _mm256_blendv_epi8(b, a, m); }
    static float sum(Float x) {
        __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_add_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
    }
    static float largest(Float x) {
        __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_max_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
    }
    static int32_t largest(Int x) {
        __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4E));
        return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xB1)));
    }

    // y[i] = sum of x[i].
    static void sum4(const Float *x, float *y) {
        const Float a = _mm256_add_ps(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
        const Float b = _mm256_add_ps(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
        const Float c = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xEE));
        _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1)));
    }

    static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
    static Int sub(Int a, Int b) { return _mm256_sub_epi32(a, b); }
    static Int bit_and(Int a, Int b) { return _mm256_and_si256(a, b); }
    static Int bit_xor(Int a, Int b) { return _mm256_xor_si256(a, b); }
    template <int N> static Int left(Int x) { return _mm256_slli_epi32(x, N); }
    template <int N> static Int right(Int x) { return _mm256_srli_epi32(x, N); }
    template <int N> static Int right_signed(Int x) { return _mm256_srai_epi32(x, N); }
    static Float as_float(Int x) { return _mm256_castsi256_ps(x); }
    static Int as_int(Float x) { return _mm256_castps_si256(x); }
    static Int round(Float x) { return _mm256_cvtps_epi32(x); }
    static Float convert(Int x) { return _mm256_cvtepi32_ps(x); }
    static Int count() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }

    static void multiply(Int x, uint32_t factor, Int &high, Int &low) {
        const Int by = set(static_cast<int32_t>(factor));
        const Int even = _mm256_mul_epu32(x, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), by);
        low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
        high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    }

    // Lane l of x[j] becomes element 4 l + j of x[0], x[1], x[2], x[3] in a row.
    static void interleave4(Int *x) {
        const Int a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
        const Int c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
        const Int p = _mm256_unpacklo_epi64(a, c), q = _mm256_unpackhi_epi64(a, c);
        const Int r = _mm256_unpacklo_epi64(b, d), s = _mm256_unpackhi_epi64(b, d);
        x[0] = _mm256_permute2x128_si256(p, q, 0x20);
        x[1] = _mm256_permute2x128_si256(r, s, 0x20);
        x[2] = _mm256_permute2x128_si256(p, q, 0x31);
        x[3] = _mm256_permute2x128_si256(r, s, 0x31);
    }
};

} // namespace
} // namespace dar
