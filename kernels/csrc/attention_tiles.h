// Tiles of bf16 products with AVX-512 BF16, and what lays operands out for them. Included only by files that are
// compiled for it, each with a copy of its own.
//
// A product adds A B to C: A [rows, pairs] words of two bf16 each, read one word at a time; B [pairs, columns] words,
// read in vectors of 16 columns; C fp32. The two of a pair are neighbours in the dimension that is summed over.
#pragma once

#include <immintrin.h>

#include "bf16.h"

namespace dar {
namespace {

constexpr int ROWS = 4; // rows of a tile: with 4 vectors, 16 accumulators hide the latency of a product
constexpr float LOG2E = 1.44269504088896341F, LN2 = 0.693147180559945309F;

inline __m512bh as_bf16(__m512i x) { return reinterpret_cast<__m512bh>(x); }
inline __m512i as_words(__m512bh x) { return reinterpret_cast<__m512i>(x); }
inline __mmask16 first_lanes(int64_t n) {
    return n >= 16 ? 0xFFFF : n <= 0 ? 0 : static_cast<__mmask16>((1U << n) - 1);
}

// 2^x for x <= 126, 1e-38 at least, NaN for NaN: results are rounded to bf16 afterwards, so degree 4 (4e-5) is ample.
// The integer part reaches the exponent by an integer addition, which has ports of its own.
inline __m512 exp2_approx(__m512 x) {
    const __m512 magic = _mm512_set1_ps(12582912.0F);
    x = _mm512_max_ps(_mm512_set1_ps(-126.0F), x); // the second operand where one is NaN
    const __m512 shifted = _mm512_add_ps(x, magic);
    const __m512 r = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
    __m512 p = _mm512_set1_ps(9.61812911e-3F);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55041087e-2F));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40226507e-1F));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93147181e-1F));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0F));
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), n));
}

// To 2e-7: x = m 2^n with m in [3/4, 3/2), log m by the series of artanh((m - 1) / (m + 1)).
inline __m512 log2_approx(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0F);
    const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    __m512 n = _mm512_getexp_ps(x);
    n = _mm512_mask_add_ps(n, _mm512_cmp_ps_mask(m, one, _CMP_LT_OQ), n, one);
    const __m512 t = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one));
    const __m512 square = _mm512_mul_ps(t, t);
    __m512 p = _mm512_set1_ps(2 * LOG2E / 9);
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2 * LOG2E / 7));
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2 * LOG2E / 5));
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2 * LOG2E / 3));
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2 * LOG2E));
    return _mm512_fmadd_ps(p, t, n);
}

template <int V> inline void clear(__m512 (&sum)[ROWS][V]) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            sum[r][v] = _mm512_setzero_ps();
}

// sum += A B: rows of A `a_stride` words apart, rows of B `b_stride`.
template <int V>
inline void products(
    const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, int64_t pairs, __m512 (&sum)[ROWS][V]
) {
    for (int64_t p = 0; p < pairs; ++p) {
        __m512i column[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            column[v] = _mm512_load_si512(b + p * b_stride + 16 * v);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const __m512i word = _mm512_set1_epi32(static_cast<int>(a[r * a_stride + p]));
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v)
                sum[r][v] = _mm512_dpbf16_ps(sum[r][v], as_bf16(word), as_bf16(column[v]));
        }
    }
}

// What is added up: C += A B, or C = A B, for 4 rows.
struct Product {
    const uint32_t *a;
    int64_t a_stride;
    const uint32_t *b;
    int64_t b_stride, pairs;
    float *c;
    int64_t c_stride;
    bool fresh;
};

template <int V> inline void add_columns(const Product &x, int64_t column) {
    __m512 sum[ROWS][V];
    if (x.fresh)
        clear<V>(sum);
    else
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v)
                sum[r][v] = _mm512_load_ps(x.c + r * x.c_stride + column + 16 * v);
    products<V>(x.a, x.a_stride, x.b + column, x.b_stride, x.pairs, sum);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            _mm512_store_ps(x.c + r * x.c_stride + column + 16 * v, sum[r][v]);
}

// `columns` is a multiple of 16.
inline void add_products(const Product &x, int64_t columns) {
    int64_t column = 0;
    for (; columns - column >= 64; column += 64)
        add_columns<4>(x, column);
    if (columns - column == 48)
        add_columns<3>(x, column);
    else if (columns - column == 32)
        add_columns<2>(x, column);
    else if (columns - column == 16)
        add_columns<1>(x, column);
}

// Lane j of x[i] and lane i of x[j] change places.
inline void transpose16(__m512i (&x)[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; ++j) {
            y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0x88);
            y[i + j + 4] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0xDD);
        }
    for (int j = 0; j < 8; ++j) {
        x[j] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0x88);
        x[j + 8] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0xDD);
    }
}

// 16 channels of two rows as words: the lower half from `low`. Null: zeros.
inline __m512i paired(const Bf16 *low, const Bf16 *high) {
    __m512i word = _mm512_setzero_si512();
    if (low != nullptr)
        word = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(low)));
    if (high == nullptr)
        return word;
    const __m512i upper = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(high)));
    return _mm512_or_si512(word, _mm512_slli_epi32(upper, 16));
}

// The rows of one head, [N, Dh], Dh a multiple of 16. Each of these writes `padded` rows, zeros from N on.
struct Rows {
    const Bf16 *data;
    int64_t stride, N, Dh;
    const Bf16 *at(int64_t n) const { return n < N ? data + n * stride : nullptr; }
};

// [padded, Dh / 2]: pairs of channels.
inline void pack_plain(const Rows &x, int64_t padded, uint32_t *out) {
    for (int64_t n = 0; n < padded; ++n)
        for (int64_t d = 0; d < x.Dh; d += 16) {
            __m256i words = _mm256_setzero_si256();
            if (n < x.N)
                words = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x.at(n) + d));
            _mm256_store_si256(reinterpret_cast<__m256i *>(out + (n * x.Dh + d) / 2), words);
        }
}

// [padded / LANES, Dh / 2, LANES]: pairs of channels, rows side by side; LANES and padded multiples of 16.
template <int64_t LANES> inline void pack_lanes(const Rows &x, int64_t padded, uint32_t *out) {
    for (int64_t n = 0; n < padded; n += 16)
        for (int64_t d = 0; d < x.Dh; d += 32) {
            const int64_t words = x.Dh - d < 32 ? 8 : 16;
            __m512i tile[16];
            for (int64_t i = 0; i < 16; ++i)
                tile[i] = n + i < x.N ? _mm512_maskz_loadu_epi32(first_lanes(words), x.at(n + i) + d)
                                      : _mm512_setzero_si512();
            transpose16(tile);
            uint32_t *to = out + n / LANES * LANES * (x.Dh / 2) + d / 2 * LANES + n % LANES;
            for (int64_t i = 0; i < words; ++i)
                _mm512_store_si512(to + i * LANES, tile[i]);
        }
}

// [padded / 2, Dh]: pairs of rows; padded even.
inline void pack_pairs(const Rows &x, int64_t padded, uint32_t *out) {
    for (int64_t n = 0; n < padded; n += 2)
        for (int64_t d = 0; d < x.Dh; d += 16) {
            const __m512i word =
                n < x.N ? paired(x.at(n) + d, n + 1 < x.N ? x.at(n + 1) + d : nullptr) : _mm512_setzero_si512();
            _mm512_store_si512(out + n / 2 * x.Dh + d, word);
        }
}

// [Dh, padded / 2]: pairs of rows, the channels `out_stride` words apart; padded a multiple of 32.
inline void pack_pairs_by_channel(const Rows &x, int64_t padded, uint32_t *out, int64_t out_stride) {
    for (int64_t n = 0; n < padded; n += 32)
        for (int64_t d = 0; d < x.Dh; d += 16) {
            __m512i tile[16];
            for (int64_t i = 0; i < 16; ++i) {
                const Bf16 *low = x.at(n + 2 * i), *high = x.at(n + 2 * i + 1);
                tile[i] = low == nullptr ? _mm512_setzero_si512() : paired(low + d, high == nullptr ? high : high + d);
            }
            transpose16(tile);
            for (int64_t i = 0; i < 16; ++i)
                _mm512_store_si512(out + (d + i) * out_stride + n / 2, tile[i]);
        }
}

inline __m256i rounded(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

// 16 floats times `factor`, rounded to bf16.
inline void store_bf16(Bf16 *out, __m512 x, float factor) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), rounded(_mm512_mul_ps(x, _mm512_set1_ps(factor))));
}

} // namespace
} // namespace dar
