// Steps of a Llama decoder in one call: embed a code, every layer, the head, a guided draw, and again.
//
// Memory bound: every weight is read once a step, for all rows of the batch. A step of prior L reads 327M weights.
#pragma once

#include <vector>

#include "guided_sample.h"

namespace dar::decode {

struct Layer {
    const float *attention_norm, *mlp_norm; // [D]
    Weights qkv, proj;                      // [(H + 2 Hkv) Dh, D], [D, H Dh]
    Weights gate, up, down;                 // [F, D], [F, D], [D, F]
};

struct Model {
    std::vector<Layer> layers;
    const float *norm;       // [D]
    Weights head, embedding; // [V, D]; the embedding is fp32 or bf16
    const float *cos, *sin;  // [N, Dh / 2]
    int64_t D, F, V, N, heads, kv_heads, head_dim;
    float eps;
};

// [layers, count, Hkv, 32, Dh] each.
struct Pages {
    Kind kind;
    void *keys, *values;
    int64_t count;
};

// B requests in R rows: row b < B is the conditional one of request b, each row from B on is the
// unconditional one of some request.
struct Batch {
    int64_t B;
    std::vector<int64_t> request; // [R], of each row
    const int64_t *uncond;        // [B], the unconditional row of each request, -1: unguided; or null: all are
    const float *inputs;          // [R, D] of the first step, or null
    const int64_t *input_codes;   // [B], where `inputs` is null
    const int32_t *table;         // [R, max_pages]
    int64_t max_pages;
    const int64_t *positions; // [B], of the first input
    int64_t steps;
    const float *guidance;            // [B, steps]
    const float *temperature, *top_p; // [B]
    const int32_t *top_k;             // [B]
    const int64_t *seeds;             // [B]
    const int64_t *forced;            // [B, steps], -1 where a code is to be drawn; or null
    int64_t *codes;                   // [B, steps], or null:
    float *logits;                    // [R, V] of the only step, nothing is drawn

    int64_t rows() const { return static_cast<int64_t>(request.size()); }
    int64_t uncond_row(int64_t b) const { return uncond == nullptr ? -1 : uncond[b]; }
};

// All arguments have been checked; see bind_decode_step.cpp.
void decode(const Model &model, const Pages &pages, const Batch &batch, int threads, Isa isa);

} // namespace dar::decode
