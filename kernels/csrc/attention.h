// softmax(q k^T / sqrt(Dh)) v with a LayerNorm and a rotation on q and k first: self-attention of the pixel DiT, in
// bf16. 4 N^2 D FLOPs a picture; scores stay in the first-level cache. Needs AVX-512 BF16.
#pragma once

#include "modulate.h"

namespace dar {

struct Attention {
    HeadNormRope<Bf16> q, k; // their `out` is unused; q's factor holds 1 / sqrt(Dh)
    Grid<const Bf16> v;
    Grid<Bf16> out;
};

constexpr int64_t ATTENTION_QUERIES = 32; // a block: 32 rows of scores over 128 keys, 8 KiB in bf16
constexpr int64_t ATTENTION_KEYS = 128;

// What one worker keeps: keys, values and queries of one head, in the order that the products read them.
struct AttentionScratch {
    uint32_t *keys;    // [ceil(N / 128) * 2, Dh / 2, 64]: pairs of channels of 64 keys
    uint32_t *values;  // [ceil(N / 128) * 64, Dh]: pairs of keys
    uint32_t *queries; // [32, Dh / 2]
    float *rows;       // 4 Dh for the norm, then [32, Dh] output, then 3 * 32 of maximum, sum and rescaling
    uint32_t *weights; // [32, 64]
};

// Whether this processor has the instructions, and the head width is 16, 32 or 64.
bool attention_supported(int64_t head_dim);

// Throws std::invalid_argument where it is not supported.
void attention(const Attention &op, int threads);

#if DAR_X86
void attention_pack(const Attention &op, int64_t b, int64_t h, const AttentionScratch &scratch);
// Queries [first, first + 32) of one head, whose keys and values are packed.
void attention_block(const Attention &op, int64_t b, int64_t h, int64_t first, const AttentionScratch &scratch);
#endif

} // namespace dar
