// Backward, keys in rows: P^T = exp(K Q^T / sqrt(Dh) - lse), dV = P^T dO, dS^T = P^T (V dO^T - delta),
// dK = dS^T Q / sqrt(Dh), dQ^T = K^T dS^T / sqrt(Dh), with delta = the row sums of dO O. A block of weights and of dS
// stays in cache, in bf16; gradients are summed in fp32.
#include "attention_tiles.h"
#include "attention_train.h"

namespace dar {
namespace {

constexpr int64_t KEYS = 128, QUERIES = 128; // a block
constexpr int64_t LANES = 32;                // queries of a tile: 8 accumulators of scores, 8 of V dO^T
constexpr int64_t WIDE = 64;                 // queries of a tile of dQ^T
constexpr int64_t WORDS = QUERIES / 2;

float scale_of(const AttentionTrain &op) { return 1 / __builtin_sqrtf(static_cast<float>(op.Dh)); }
int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Scratch {
    int64_t Nq, Nk;                 // padded
    uint32_t *q_lanes, *dout_lanes; // [Nq / 32, Dh / 2, 32]
    uint32_t *q_pairs, *dout_pairs; // [Nq / 2, Dh]
    uint32_t *k_plain, *v_plain;    // [Nk, Dh / 2]
    uint32_t *k_channels;           // [Dh, Nk / 2]
    uint32_t *weights, *dscores;    // [KEYS, QUERIES / 2]: pairs of queries
    uint32_t *dscores_lanes;        // [QUERIES / 64, KEYS / 2, 64]: pairs of keys, queries in the order of `place`
    float *dk, *dv;                 // [Nk, Dh]
    float *dq;                      // [Nq / 64, Dh, 64]: of one part and head
    float *lse, *delta;             // [Nq]; the first in powers of two

    Scratch(const AttentionTrain &op, uint32_t *own) : dq(nullptr) {
        Nq = round_up(op.Nq, WIDE);
        Nk = round_up(op.Nk, 32);
        const auto take = [&own](int64_t words) {
            uint32_t *start = own;
            own += words;
            return start;
        };
        const auto floats = [&take](int64_t words) { return reinterpret_cast<float *>(take(words)); };
        const int64_t q_half = Nq * op.Dh / 2, k_half = Nk * op.Dh / 2;
        q_lanes = take(q_half);
        dout_lanes = take(q_half);
        q_pairs = take(q_half);
        dout_pairs = take(q_half);
        k_plain = take(k_half);
        v_plain = take(k_half);
        k_channels = take(k_half);
        weights = take(KEYS * WORDS);
        dscores = take(KEYS * WORDS);
        dscores_lanes = take(KEYS * WORDS);
        dk = floats(2 * k_half);
        dv = floats(2 * k_half);
        lse = floats(Nq);
        delta = floats(Nq);
    }
};

struct Tile {
    const uint32_t *keys, *values;  // of 4 keys
    const uint32_t *queries, *dout; // of 32 queries
    const float *lse, *delta;
    uint32_t *weights, *dscores; // of the 4 keys and 32 queries
    uint32_t *lanes;             // pairs of the 4 keys
    int64_t pairs;               // Dh / 2
    float factor;                // of a score, to powers of two
    int64_t first[ROWS], last;   // the queries that see each key, from the first of these 32
};

// The tile from vector FIRST of its two on; what is before is zero.
template <int FIRST, bool MASKED> void weigh_tile(const Tile &tile) {
    __m512 score[ROWS][2], dweight[ROWS][2];
    clear<2>(score);
    clear<2>(dweight);
    for (int64_t p = 0; p < tile.pairs; ++p) {
        __m512i query[2], dout[2];
#pragma GCC unroll 2
        for (int v = FIRST; v < 2; ++v) {
            query[v] = _mm512_load_si512(tile.queries + p * LANES + 16 * v);
            dout[v] = _mm512_load_si512(tile.dout + p * LANES + 16 * v);
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const __m512i key = _mm512_set1_epi32(static_cast<int>(tile.keys[r * tile.pairs + p]));
            const __m512i value = _mm512_set1_epi32(static_cast<int>(tile.values[r * tile.pairs + p]));
#pragma GCC unroll 2
            for (int v = FIRST; v < 2; ++v) {
                score[r][v] = _mm512_dpbf16_ps(score[r][v], as_bf16(key), as_bf16(query[v]));
                dweight[r][v] = _mm512_dpbf16_ps(dweight[r][v], as_bf16(value), as_bf16(dout[v]));
            }
        }
    }
    const __m512 factor = _mm512_set1_ps(tile.factor);
    __m512i rows[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
        __m512 weight[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        __m512 dscore[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
#pragma GCC unroll 2
        for (int v = FIRST; v < 2; ++v) {
            weight[v] = exp2_approx(_mm512_fmsub_ps(score[r][v], factor, _mm512_load_ps(tile.lse + 16 * v)));
            dscore[v] = _mm512_sub_ps(dweight[r][v], _mm512_load_ps(tile.delta + 16 * v));
            dscore[v] = _mm512_mul_ps(dscore[v], weight[v]);
            if (MASKED) {
                const int inside = first_lanes(tile.last - 16 * v) & ~first_lanes(tile.first[r] - 16 * v);
                weight[v] = _mm512_maskz_mov_ps(static_cast<__mmask16>(inside), weight[v]);
                dscore[v] = _mm512_maskz_mov_ps(static_cast<__mmask16>(inside), dscore[v]);
            }
        }
        rows[r] = as_words(_mm512_cvtne2ps_pbh(dscore[1], dscore[0]));
        _mm512_store_si512(tile.weights + r * WORDS, as_words(_mm512_cvtne2ps_pbh(weight[1], weight[0])));
        _mm512_store_si512(tile.dscores + r * WORDS, rows[r]);
    }
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; r += 2) {
        _mm512_store_si512(tile.lanes + r / 2 * WIDE, _mm512_unpacklo_epi16(rows[r], rows[r + 1]));
        _mm512_store_si512(tile.lanes + r / 2 * WIDE + 16, _mm512_unpackhi_epi16(rows[r], rows[r + 1]));
    }
}

// Which of 32 queries lies where in dQ^T, after unpacking.
int64_t place(int64_t lane) { return lane / 32 * 32 + lane % 16 / 4 * 8 + lane % 32 / 16 * 4 + lane % 4; }

// What the weights of one head are made from.
void load_query_head(const AttentionGradient &op, int64_t b, int64_t h, const Scratch &own) {
    const AttentionTrain &f = op.forward;
    const Rows q{f.q.row(b, h, 0), f.q.row_stride, f.Nq, f.Dh};
    const Rows dout{op.dout.row(b, h, 0), op.dout.row_stride, f.Nq, f.Dh};
    pack_lanes<LANES>(q, own.Nq, own.q_lanes);
    pack_lanes<LANES>(dout, own.Nq, own.dout_lanes);
    pack_pairs(q, own.Nq, own.q_pairs);
    pack_pairs(dout, own.Nq, own.dout_pairs);
    const float *lse = f.lse + (b * f.H + h) * f.Nq;
    for (int64_t i = 0; i < own.Nq; ++i)
        own.lse[i] = i < f.Nq ? lse[i] * LOG2E : 0;
    for (int64_t i = 0; i < own.Nq; i += LANES) {
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        if (i < f.Nq) // lanes for O, then the additions of V dO^T: where one value is all of O, dS is 0 exactly
            pack_lanes<LANES>({f.out.row(b, h, i), f.out.row_stride, f.Nq - i, f.Dh}, LANES, own.weights);
        for (int64_t p = 0; i < f.Nq && p < f.Dh / 2; ++p)
            for (int v = 0; v < 2; ++v) {
                const __m512i out = _mm512_load_si512(own.weights + p * LANES + 16 * v);
                const __m512i dout_word = _mm512_load_si512(own.dout_lanes + i * f.Dh / 2 + p * LANES + 16 * v);
                sum[v] = _mm512_dpbf16_ps(sum[v], as_bf16(out), as_bf16(dout_word));
            }
        for (int v = 0; v < 2; ++v)
            _mm512_store_ps(own.delta + i + 16 * v, sum[v]);
    }
}

// Weights and dS of keys from `start` and queries from `from`.
void weigh_block(const AttentionTrain &op, const Scratch &own, int64_t start, int64_t from, int64_t end, int64_t to) {
    const int64_t pairs = op.Dh / 2;
    const float factor = LOG2E * scale_of(op);
    for (int64_t i = from; i < to; i += LANES) {
        const int64_t wide = (i - from) / WIDE;
        const int64_t seen = op.visible((i / WIDE * WIDE + WIDE < op.Nq ? i / WIDE * WIDE + WIDE : op.Nq) - 1);
        for (int64_t k = start; k < end; k += ROWS) {
            Tile tile{};
            tile.lanes = own.dscores_lanes + (wide * (KEYS / 2) + (k - start) / 2) * WIDE + (i - from) % WIDE;
            if (op.first_query(k) >= i + LANES || i >= op.Nq) {
                if (k < seen) // the other half of the lanes of dQ^T sees them
                    for (int r = 0; r < ROWS / 2; ++r) {
                        _mm512_store_si512(tile.lanes + r * WIDE, _mm512_setzero_si512());
                        _mm512_store_si512(tile.lanes + r * WIDE + 16, _mm512_setzero_si512());
                    }
                continue;
            }
            tile.keys = own.k_plain + k * pairs;
            tile.values = own.v_plain + k * pairs;
            tile.queries = own.q_lanes + i * pairs;
            tile.dout = own.dout_lanes + i * pairs;
            tile.lse = own.lse + i;
            tile.delta = own.delta + i;
            tile.weights = own.weights + (k - start) * WORDS + (i - from) / 2;
            tile.dscores = own.dscores + (k - start) * WORDS + (i - from) / 2;
            tile.pairs = pairs;
            tile.factor = factor;
            for (int r = 0; r < ROWS; ++r)
                tile.first[r] = op.first_query(k + r) - i;
            tile.last = op.Nq - i;
            if (tile.first[0] >= LANES / 2)
                weigh_tile<1, true>(tile);
            else if (tile.first[ROWS - 1] > 0 || tile.last < LANES)
                weigh_tile<0, true>(tile);
            else
                weigh_tile<0, false>(tile);
        }
    }
}

// What a block adds to the gradients; `shared`: an earlier head of q has added to those of k and v.
void add_block(
    const AttentionTrain &op, const Scratch &own, int64_t start, int64_t from, int64_t end, int64_t to, bool shared
) {
    const int64_t Dh = op.Dh;
    for (int pass = 0; pass < 2; ++pass)
        for (int64_t k = start; k < end; k += ROWS) {
            const int64_t first = op.first_query(k) / 16 * 16, i = first > from ? first : from;
            Product x{};
            x.a = (pass == 0 ? own.weights : own.dscores) + (k - start) * WORDS + (i - from) / 2;
            x.a_stride = WORDS;
            x.b = (pass == 0 ? own.dout_pairs : own.q_pairs) + i / 2 * Dh;
            x.b_stride = Dh;
            x.pairs = (to - i) / 2;
            x.c = (pass == 0 ? own.dv : own.dk) + k * Dh;
            x.c_stride = Dh;
            x.fresh = !shared && first >= from;
            if (i < to)
                add_products(x, Dh);
        }
    for (int64_t i = from; i < to; i += WIDE) {
        const int64_t lanes = to - i < WIDE ? to - i : WIDE;
        int64_t seen = op.visible((i + WIDE < op.Nq ? i + WIDE : op.Nq) - 1);
        seen = round_up(seen < end ? seen : end, ROWS) - start;
        Product x{};
        x.a_stride = own.Nk / 2;
        x.b = own.dscores_lanes + (i - from) / WIDE * (KEYS / 2) * WIDE;
        x.b_stride = WIDE;
        x.pairs = seen / 2;
        x.c_stride = WIDE;
        x.fresh = start % PART_KEYS == 0;
        for (int64_t d = 0; d < Dh && seen > 0; d += ROWS) {
            x.a = own.k_channels + d * (own.Nk / 2) + start / 2;
            x.c = own.dq + (i / WIDE * Dh + d) * WIDE;
            add_products(x, lanes);
        }
    }
}

} // namespace

int64_t backward_part_size(const AttentionTrain &op) { return round_up(op.Nq, WIDE) * op.Dh; }

int64_t backward_scratch(const AttentionTrain &op) {
    const int64_t Nq = round_up(op.Nq, WIDE), Nk = round_up(op.Nk, 32);
    return Nq * op.Dh * 2 + Nk * op.Dh * 7 / 2 + 3 * KEYS * WORDS + 2 * Nq;
}

void backward_head(const AttentionGradient &op, int64_t b, int64_t kv, Parts parts, uint32_t *scratch, float *dq) {
    const AttentionTrain &f = op.forward;
    Scratch own(f, scratch);
    const int64_t Dh = f.Dh, group = f.H / f.KV, part_size = backward_part_size(f);
    const int64_t begin = parts.first * PART_KEYS;
    const int64_t stop = parts.last * PART_KEYS < f.Nk ? parts.last * PART_KEYS : f.Nk;
    const int64_t padded = round_up(stop - begin, 32), offset = begin * Dh / 2;
    const Rows k{f.k.row(b, kv, begin), f.k.row_stride, stop - begin, Dh};
    pack_plain(k, padded, own.k_plain + offset);
    pack_pairs_by_channel(k, padded, own.k_channels + begin / 2, own.Nk / 2);
    pack_plain({f.v.row(b, kv, begin), f.v.row_stride, stop - begin, Dh}, padded, own.v_plain + offset);
    if (f.Nq == 0) { // nothing will be added
        __builtin_memset(own.dk, 0, own.Nk * Dh * sizeof(float));
        __builtin_memset(own.dv, 0, own.Nk * Dh * sizeof(float));
    }
    const int64_t keys = round_up(stop, ROWS), queries = round_up(f.Nq, LANES);
    for (int64_t i = 0; i < group; ++i) {
        load_query_head(op, b, kv * group + i, own);
        for (int64_t start = begin; start < keys; start += KEYS) {
            own.dq = dq + (i * parts.all + start / PART_KEYS) * part_size;
            const int64_t end = start + KEYS < keys ? start + KEYS : keys;
            for (int64_t from = f.first_query(start) / QUERIES * QUERIES; from < queries; from += QUERIES) {
                const int64_t to = from + QUERIES < queries ? from + QUERIES : queries;
                weigh_block(f, own, start, from, end, to);
                add_block(f, own, start, from, end, to, i > 0);
            }
        }
    }
    for (int64_t n = begin; n < stop; ++n)
        for (int64_t d = 0; d < Dh; d += 16) {
            store_bf16(op.dk.row(b, kv, n) + d, _mm512_load_ps(own.dk + n * Dh + d), scale_of(f));
            store_bf16(op.dv.row(b, kv, n) + d, _mm512_load_ps(own.dv + n * Dh + d), 1);
        }
}

void backward_queries(const AttentionGradient &op, int64_t b, int64_t kv, int64_t parts, const float *dq) {
    const AttentionTrain &f = op.forward;
    const int64_t group = f.H / f.KV, part_size = backward_part_size(f);
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h, dq += parts * part_size)
        for (int64_t n = 0; n < round_up(f.Nq, LANES); n += 16) {
            const int64_t next = n / WIDE * WIDE + WIDE, seen = f.visible((next < f.Nq ? next : f.Nq) - 1);
            for (int64_t d = 0; d < f.Dh; d += 16) {
                __m512i tile[16];
                for (int64_t j = 0; j < 16; ++j) {
                    const float *first = dq + (n / WIDE * f.Dh + d + j) * WIDE + n % WIDE;
                    __m512 sum = _mm512_load_ps(first);
                    for (int64_t part = 1; part * PART_KEYS < seen; ++part)
                        sum = _mm512_add_ps(sum, _mm512_load_ps(first + part * part_size));
                    tile[j] = _mm512_castps_si512(sum);
                }
                transpose16(tile);
                for (int64_t j = 0; j < 16; ++j)
                    if (place(n + j) < f.Nq)
                        store_bf16(op.dq.row(b, h, place(n + j)) + d, _mm512_castsi512_ps(tile[j]), scale_of(f));
            }
        }
}

} // namespace dar
