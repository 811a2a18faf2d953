#include "attention.h"
#include "attention_tiles.h"
#include "modulate_kernel.h"

namespace dar {
namespace {

constexpr int64_t HALF = ATTENTION_KEYS / 2; // keys of one product: 4 vectors

inline uint32_t pair(Bf16 low, Bf16 high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; }

inline void normed_head(const HeadNormRope<Bf16> &op, int64_t b, int64_t n, int64_t h, float *scratch, Bf16 *out) {
    const int64_t Dh = op.head_dim;
    float *head = scratch + 3 * Dh;
    expand_tables(op, n, scratch);
    norm_rope_head(op, op.x.row(b, n) + h * Dh, scratch, scratch + 2 * Dh, head);
    for (int64_t d = 0; d < Dh; ++d)
        store(&out[d], head[d]);
}

// Scores of 4 queries over 64 keys, times log2(e).
inline void scores(const uint32_t *queries, const uint32_t *keys, int64_t pairs, __m512 (&sum)[ROWS][4]) {
    clear<4>(sum);
    products<4>(queries, pairs, keys, HALF, pairs, sum);
}

// One block of keys' scores to weights relative to the new maximum; the old sum and output shrink by `rescale`.
inline void softmax_row(__m512 (&score)[8], float *top, float *sum, float *rescale, uint32_t *weights, int64_t valid) {
    if (valid < ATTENTION_KEYS)
        for (int j = 0; j < 8; ++j)
            score[j] = _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), first_lanes(valid - 16 * j), score[j]);
    __m512 high = score[0];
    for (int j = 1; j < 8; ++j)
        high = _mm512_max_ps(high, score[j]);
    const float reduced = _mm512_reduce_max_ps(high);
    const float now = reduced > *top ? reduced : *top;
    const __m512 shift = _mm512_set1_ps(now);
    *rescale = _mm512_cvtss_f32(exp2_approx(_mm512_set1_ps(*top - now)));
    *top = now;
    __m512 total = _mm512_setzero_ps();
    for (int j = 0; j < 8; j += 2) {
        const __m512 low = exp2_approx(_mm512_sub_ps(score[j], shift));
        const __m512 next = exp2_approx(_mm512_sub_ps(score[j + 1], shift));
        total = _mm512_add_ps(total, _mm512_add_ps(low, next));
        _mm512_store_si512(weights + 8 * j, as_words(_mm512_cvtne2ps_pbh(next, low)));
    }
    *sum = *sum * *rescale + _mm512_reduce_add_ps(total);
}

// output = output * rescale + weights @ values for 4 queries; V vectors of 16 channels.
template <int V>
inline void
weigh(const uint32_t *weights, const uint32_t *values, const float *rescale, float *output, int64_t stride) {
    __m512 sum[ROWS][V];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            sum[r][v] = _mm512_mul_ps(_mm512_load_ps(output + r * stride + 16 * v), _mm512_set1_ps(rescale[r]));
    products<V>(weights, HALF, values, 16 * V, HALF, sum);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            _mm512_store_ps(output + r * stride + 16 * v, sum[r][v]);
}

template <int V> void block(const Attention &op, int64_t b, int64_t h, int64_t first, const AttentionScratch &scratch) {
    constexpr int64_t Dh = 16 * V, PAIRS = Dh / 2, QUERIES = ATTENTION_QUERIES;
    const int64_t N = op.q.size.N;
    const int64_t count = N - first < QUERIES ? N - first : QUERIES;
    float *output = scratch.rows + 4 * Dh;
    float *top = output + QUERIES * Dh, *sum = top + QUERIES, *rescale = sum + QUERIES;
    for (int64_t i = 0; i < QUERIES; ++i) {
        uint32_t *query = scratch.queries + i * PAIRS;
        if (i < count)
            normed_head(op.q, b, first + i, h, scratch.rows, reinterpret_cast<Bf16 *>(query));
        else
            __builtin_memset(query, 0, PAIRS * sizeof(uint32_t));
        top[i] = -__builtin_inff();
        sum[i] = 0;
    }
    __builtin_memset(output, 0, QUERIES * Dh * sizeof(float));
    const int64_t tiles = (count + ROWS - 1) / ROWS;
    for (int64_t start = 0; start < N; start += ATTENTION_KEYS) {
        const uint32_t *keys = scratch.keys + start * PAIRS;
        for (int64_t t = 0; t < tiles; ++t) {
            __m512 low[ROWS][4], high[ROWS][4];
            const uint32_t *queries = scratch.queries + t * ROWS * PAIRS;
            alignas(64) float kept[ROWS][HALF];
            scores(queries, keys, PAIRS, low);
            for (int r = 0; r < ROWS; ++r)
                for (int j = 0; j < 4; ++j)
                    _mm512_store_ps(&kept[r][16 * j], low[r][j]);
            scores(queries, keys + HALF * PAIRS, PAIRS, high);
            for (int r = 0; r < ROWS; ++r) {
                const int64_t i = t * ROWS + r;
                __m512 score[8];
                for (int j = 0; j < 4; ++j) {
                    score[j] = _mm512_load_ps(&kept[r][16 * j]);
                    score[4 + j] = high[r][j];
                }
                softmax_row(score, &top[i], &sum[i], &rescale[i], scratch.weights + i * HALF, N - start);
            }
        }
        for (int64_t t = 0; t < tiles; ++t)
            weigh<V>(
                scratch.weights + t * ROWS * HALF,
                scratch.values + start / 2 * Dh,
                rescale + t * ROWS,
                output + t * ROWS * Dh,
                Dh
            );
    }
    for (int64_t i = 0; i < count; ++i) {
        Bf16 *out = op.out.row(b, first + i) + h * Dh;
        const float scale = 1 / sum[i];
        for (int64_t d = 0; d < Dh; ++d)
            store(&out[d], output[i * Dh + d] * scale);
    }
}

} // namespace

void attention_pack(const Attention &op, int64_t b, int64_t h, const AttentionScratch &scratch) {
    const int64_t N = op.k.size.N, Dh = op.k.head_dim, pairs = Dh / 2;
    const int64_t padded = (N + ATTENTION_KEYS - 1) / ATTENTION_KEYS * ATTENTION_KEYS;
    alignas(64) Bf16 head[64];
    for (int64_t n = 0; n < padded; ++n) {
        uint32_t *key = scratch.keys + n / HALF * HALF * pairs + n % HALF;
        if (n < N)
            normed_head(op.k, b, n, h, scratch.rows, head);
        for (int64_t p = 0; p < pairs; ++p)
            key[p * HALF] = n < N ? pair(head[2 * p], head[2 * p + 1]) : 0;
    }
    for (int64_t n = 0; n < padded; n += 2) {
        const Bf16 *even = op.v.row(b, n) + h * Dh, *odd = op.v.row(b, n + 1) + h * Dh;
        uint32_t *value = scratch.values + n / 2 * Dh;
        for (int64_t d = 0; d < Dh; ++d)
            value[d] = n + 1 < N ? pair(even[d], odd[d]) : n < N ? pair(even[d], Bf16{0}) : 0;
    }
}

void attention_block(const Attention &op, int64_t b, int64_t h, int64_t first, const AttentionScratch &scratch) {
    const auto run = op.q.head_dim == 64 ? block<4> : op.q.head_dim == 32 ? block<2> : block<1>;
    run(op, b, h, first, scratch);
}

} // namespace dar
