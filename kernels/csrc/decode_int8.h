// Products of bytes: activations as unsigned 16-bit numbers in two planes of bytes, x = scale (256 high + low - 32768),
// so that they keep all of their accuracy; weights as they are. Sums are exact integers.
#pragma once

#include "decode_sample.h"
#include "simd_avx512.h"

namespace dar::decode {
namespace {

struct Int8 {
    using Weight = int8_t;
    using Vector = __m512i;
    using Sum = __m512i;
    static constexpr int64_t STEP = 64, BYTES = 2; // 64 high bytes, then the 64 low ones
    static constexpr int ROWS = 2, PLANES = 2;     // 16 sums beside 4 weights

    static Sum zero() { return _mm512_setzero_si512(); }
    static Vector load(const int8_t *p) { return _mm512_loadu_si512(p); }
    static Vector load_part(const int8_t *p, int64_t n) { return _mm512_maskz_loadu_epi8((1ULL << n) - 1, p); }
    static Vector row(const char *p, int plane) { return _mm512_loadu_si512(p + 64 * plane); }
    // _mm512_dpbusd_epi32, of which GCC 12 makes two copies of every sum in every turn of the loop.
    static Sum add(Sum sum, Vector w, Vector x) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
        return sum;
    }

    static __m256i sum4(const Sum *x) { // in 64 bits
        const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
        const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
        const __m512i c = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
        const __m512i d = _mm512_add_epi32(c, _mm512_shuffle_i32x4(c, c, 0x4E));
        const __m512i e = _mm512_add_epi32(d, _mm512_shuffle_i32x4(d, d, 0xB1));
        return _mm256_cvtepi32_epi64(_mm512_castsi512_si128(e));
    }

    static void finish(const Sum *high, const Sum *low, const Weights &w, const int64_t *o, float scale, float *y) {
        const __m256i both = _mm256_add_epi64(_mm256_slli_epi64(sum4(high), 8), sum4(low));
        const __m256i offset = _mm256_setr_epi64x(w.sums[o[0]], w.sums[o[1]], w.sums[o[2]], w.sums[o[3]]);
        const __m256i all = _mm256_sub_epi64(both, _mm256_slli_epi64(offset, 15));
        const __m128 scales = _mm_setr_ps(w.scale[o[0]], w.scale[o[1]], w.scale[o[2]], w.scale[o[3]]);
        const __m256d factor = _mm256_mul_pd(_mm256_cvtps_pd(scales), _mm256_set1_pd(scale));
        _mm_storeu_ps(y, _mm256_cvtpd_ps(_mm256_mul_pd(_mm256_cvtepi64_pd(all), factor)));
    }

    static void prepare(const float *x, int64_t K, void *out, float *scale) {
        uint8_t *bytes = static_cast<uint8_t *>(out);
        const auto part = [&](int64_t k) {
            const int64_t n = K - k;
            return n >= 16 ? _mm512_loadu_ps(x + k)
                           : _mm512_maskz_loadu_ps(static_cast<__mmask16>(n > 0 ? (1U << n) - 1 : 0), x + k);
        };
        __m512i top = _mm512_setzero_si512(); // as integers: NaN is above infinity, which is above all numbers
        for (int64_t k = 0; k < K; k += 16)
            top = _mm512_max_epi32(top, _mm512_castps_si512(_mm512_abs_ps(part(k))));
        const int32_t bits = _mm512_reduce_max_epi32(top);
        float max;
        __builtin_memcpy(&max, &bits, sizeof(max));
        *scale = bits < 0x7F800000 ? max / 32767.0F : __builtin_nanf("");
        // Rows below 1e-30 count as zeros: their inverse could overflow.
        const __m512 inverse = _mm512_set1_ps(bits < 0x7F800000 && max >= 1e-30F ? 32767.0F / max : 0.0F);
        for (int64_t k = 0; k < padded(K); k += 16) {
            const __m512i x16 =
                _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(part(k), inverse)), _mm512_set1_epi32(32768));
            uint8_t *at = bytes + k / 64 * 128 + k % 64;
            _mm_storeu_si128(reinterpret_cast<__m128i *>(at), _mm512_cvtepi32_epi8(_mm512_srli_epi32(x16, 8)));
            _mm_storeu_si128(reinterpret_cast<__m128i *>(at + 64), _mm512_cvtepi32_epi8(x16));
        }
    }
};

} // namespace
} // namespace dar::decode
