// Forward, queries in rows: scores of 4 queries over 64 keys stay in registers until they are weights in bf16.
// A row's weights are relative to that of its first key, and only where one is more than 2^64 as large is that changed:
// bf16 and fp32 are as exact at any size, and no maximum is awaited between the products.
#include "attention_tiles.h"
#include "attention_train.h"

namespace dar {
namespace {

constexpr int64_t QUERIES = FORWARD_QUERIES;
constexpr int64_t LANES = 64; // keys of a tile of scores
constexpr int64_t KEYS = 128; // keys between two updates of the output, whose weights stay in the first-level cache
constexpr float ROOM = 64;    // powers of two

int64_t padded_keys(const AttentionTrain &op) { return (op.Nk + LANES - 1) / LANES * LANES; }

struct Scratch {
    uint32_t *keys;    // [padded / 64, Dh / 2, 64]
    uint32_t *values;  // [padded / 2, Dh]
    uint32_t *queries; // [QUERIES, Dh / 2]
    uint32_t *weights; // [QUERIES, KEYS / 2]
    float *output;     // [QUERIES, Dh]
    float *sums;       // [QUERIES, 2, 16]: of weights and of rounded weights, in 16 parts each
    float *top;        // [QUERIES]: the score that weighs 1

    Scratch(const AttentionTrain &op, uint32_t *own) {
        const int64_t half = padded_keys(op) * op.Dh / 2;
        keys = own;
        values = keys + half;
        queries = values + half;
        weights = queries + QUERIES * op.Dh / 2;
        output = reinterpret_cast<float *>(weights + QUERIES * KEYS / 2);
        sums = output + QUERIES * op.Dh;
        top = sums + QUERIES * 32;
    }
};

// Queries of a tile, as far as their keys go.
struct Tile {
    float *output, *sums, *top;
    uint32_t *weights;   // of these keys
    int64_t Dh, written; // channels, and those of them that have an output so far
    int64_t earlier;     // words of weights before these that are not in the output yet
    float factor;        // of a score, to powers of two
    bool fresh;          // these keys are the first: there are no sums yet, and no top
    int64_t seen[ROWS];  // how many of these keys each query sees
};

// Makes `now` the score that weighs 1 of row r.
void rescale_row(const Tile &tile, int r, float now) {
    const float before = tile.top[r];
    tile.top[r] = now;
    if (tile.fresh)
        return;
    const __m512 factor = exp2_approx(_mm512_set1_ps((before - now) * tile.factor));
    float *sum = tile.sums + r * 32, *output = tile.output + r * tile.Dh;
    for (int64_t i = 0; i < 32; i += 16)
        _mm512_store_ps(sum + i, _mm512_mul_ps(_mm512_load_ps(sum + i), factor));
    for (int64_t d = 0; d < tile.written; d += 16)
        _mm512_store_ps(output + d, _mm512_mul_ps(_mm512_load_ps(output + d), factor));
    uint32_t *words = tile.weights + r * (KEYS / 2) - tile.earlier;
    for (int64_t i = 0; i < tile.earlier; i += 16) {
        const __m512i both = _mm512_load_si512(words + i), odd = _mm512_set1_epi32(static_cast<int>(0xFFFF0000U));
        const __m512 low = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), factor);
        const __m512 high = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(both, odd)), factor);
        const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded(high)), 16);
        _mm512_store_si512(words + i, _mm512_or_si512(_mm512_cvtepu16_epi32(rounded(low)), upper));
    }
}

template <int V, bool MASKED> inline void weigh_scores(const Tile &tile, __m512 (&score)[ROWS][V]) {
    __mmask16 inside[ROWS][V];
    if (MASKED)
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < V; ++v) {
                inside[r][v] = first_lanes(tile.seen[r] - 16 * v);
                score[r][v] = _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), inside[r][v], score[r][v]);
            }
    if (tile.fresh)
        for (int r = 0; r < ROWS; ++r)
            tile.top[r] = _mm512_cvtss_f32(score[r][0]); // every query sees the first key
    __m512 high[ROWS];
    __mmask16 beyond = 0;
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
        high[r] = score[r][0];
        for (int v = 1; v < V; ++v)
            high[r] = _mm512_max_ps(high[r], score[r][v]);
        const __m512 most = _mm512_set1_ps(tile.top[r] + ROOM / tile.factor);
        beyond |= _mm512_cmp_ps_mask(high[r], most, _CMP_GT_OQ);
    }
    if (__builtin_expect(beyond != 0, 0))
        for (int r = 0; r < ROWS; ++r) {
            const float most = _mm512_reduce_max_ps(high[r]);
            if (most > tile.top[r] + ROOM / tile.factor)
                rescale_row(tile, r, most);
        }
    const __m512 factor = _mm512_set1_ps(tile.factor);
    const __m512i ones = _mm512_set1_epi32(0x3F803F80);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
        const __m512 shift = _mm512_set1_ps(tile.top[r] * tile.factor);
        __m512 weight[4], total = tile.fresh ? _mm512_setzero_ps() : _mm512_load_ps(tile.sums + r * 32);
        for (int v = 0; v < 4; ++v)
            weight[v] = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            weight[v] = exp2_approx(_mm512_fmsub_ps(score[r][v], factor, shift));
            if (MASKED)
                weight[v] = _mm512_maskz_mov_ps(inside[r][v], weight[v]);
            total = _mm512_add_ps(total, weight[v]);
        }
        _mm512_store_ps(tile.sums + r * 32, total);
        uint32_t *words = tile.weights + r * (KEYS / 2);
        __m512 coarse = tile.fresh ? _mm512_setzero_ps() : _mm512_load_ps(tile.sums + r * 32 + 16);
#pragma GCC unroll 2
        for (int v = 0; v < V; v += 2) {
            const __m512bh pair = _mm512_cvtne2ps_pbh(weight[v + 1], weight[v]);
            _mm512_store_si512(words + 8 * v, as_words(pair));
            coarse = _mm512_dpbf16_ps(coarse, pair, as_bf16(ones));
        }
        _mm512_store_ps(tile.sums + r * 32 + 16, coarse);
    }
}

template <int V> void score_tile(const Tile &tile, const uint32_t *queries, const uint32_t *keys) {
    __m512 score[ROWS][V];
    clear<V>(score);
    const int64_t pairs = tile.Dh / 2;
    products<V>(queries, pairs, keys, LANES, pairs, score);
    if (tile.seen[0] >= 16 * V) // the first query of a tile sees the fewest keys
        weigh_scores<V, false>(tile, score);
    else
        weigh_scores<V, true>(tile, score);
}

} // namespace

int64_t forward_scratch(const AttentionTrain &op) {
    return padded_keys(op) * op.Dh + QUERIES * (op.Dh / 2 + KEYS / 2 + op.Dh + 32 + 1);
}

void forward_pack(const AttentionTrain &op, int64_t b, int64_t h, uint32_t *scratch) {
    const Scratch own(op, scratch);
    const int64_t kv = h / (op.H / op.KV), padded = padded_keys(op);
    pack_lanes<LANES>({op.k.row(b, kv, 0), op.k.row_stride, op.Nk, op.Dh}, padded, own.keys);
    pack_pairs({op.v.row(b, kv, 0), op.v.row_stride, op.Nk, op.Dh}, padded, own.values);
}

void forward_block(const AttentionTrain &op, int64_t b, int64_t h, int64_t first, uint32_t *scratch) {
    const Scratch own(op, scratch);
    const int64_t Dh = op.Dh, count = op.Nq - first < QUERIES ? op.Nq - first : QUERIES;
    const int64_t tiles = (count + ROWS - 1) / ROWS, rows = tiles * ROWS;
    const float scale = 1 / __builtin_sqrtf(static_cast<float>(Dh));
    pack_plain({op.q.row(b, h, first), op.q.row_stride, count, Dh}, rows, own.queries);
    const int64_t last = op.visible(first + count - 1);
    for (int64_t start = 0; start < last; start += KEYS) {
        for (int64_t k = start; k < start + KEYS && k < last; k += LANES)
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t i = t * ROWS;
                Tile tile{};
                tile.output = own.output + i * Dh;
                tile.sums = own.sums + i * 32;
                tile.top = own.top + i;
                tile.Dh = Dh;
                tile.written = start == 0 ? 0 : Dh;
                tile.earlier = (k - start) / 2;
                tile.weights = own.weights + i * (KEYS / 2) + tile.earlier;
                tile.factor = scale * LOG2E;
                tile.fresh = k == 0;
                for (int r = 0; r < ROWS; ++r) {
                    const int64_t sees = op.visible(first + i + r);
                    tile.seen[r] = (sees < last ? sees : last) - k;
                }
                const int64_t most = tile.seen[ROWS - 1];
                const uint32_t *queries = own.queries + i * Dh / 2, *keys = own.keys + k * Dh / 2;
                if (most > 48)
                    score_tile<4>(tile, queries, keys);
                else if (most > 32)
                    score_tile<3>(tile, queries, keys);
                else if (most > 16)
                    score_tile<2>(tile, queries, keys);
                else if (most > 0)
                    score_tile<1>(tile, queries, keys);
            }
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t i = t * ROWS, sees = op.visible(first + i + ROWS - 1);
            int64_t left = (sees < last ? sees : last) - start;
            if (left <= 0)
                continue;
            left = left < KEYS ? (left + 15) / 16 * 16 : KEYS;
            const Product product{
                own.weights + i * (KEYS / 2),
                KEYS / 2,
                own.values + start / 2 * Dh,
                Dh,
                left / 2,
                own.output + i * Dh,
                Dh,
                start == 0
            };
            add_products(product, Dh);
        }
    }
    alignas(64) float sum[QUERIES] = {};
    for (int64_t i = 0; i < count; ++i) {
        sum[i] = _mm512_reduce_add_ps(_mm512_load_ps(own.sums + i * 32));
        // By the sum of what was weighed with: a weight that outweighs all others then gives its value exactly.
        const float factor = 1 / _mm512_reduce_add_ps(_mm512_load_ps(own.sums + i * 32 + 16));
        Bf16 *out = op.out.row(b, h, first + i);
        for (int64_t d = 0; d < Dh; d += 16)
            store_bf16(out + d, _mm512_load_ps(own.output + i * Dh + d), factor);
    }
    float *lse = op.lse + (b * op.H + h) * op.Nq + first;
    for (int64_t i = 0; i < count; i += 16) {
        const __m512 logarithm = _mm512_mul_ps(log2_approx(_mm512_load_ps(sum + i)), _mm512_set1_ps(LN2));
        const __m512 top = _mm512_mul_ps(_mm512_loadu_ps(own.top + i), _mm512_set1_ps(scale));
        _mm512_mask_storeu_ps(lse + i, first_lanes(count - i), _mm512_add_ps(top, logarithm));
    }
}

} // namespace dar
