// softmax(q k^T / sqrt(Dh)) v of bf16 and its gradients, head by head. 4 FLOPs a query, key it sees and channel
// forward, 10 backward; scores are made again instead of kept. Needs AVX-512 BF16.
#pragma once

#include "bf16.h"

namespace dar {

// [B, H, N, Dh] with the last dimension contiguous.
template <typename T> struct HeadRows {
    T *data;
    int64_t batch_stride, head_stride, row_stride;
    T *row(int64_t b, int64_t h, int64_t n) const { return data + b * batch_stride + h * head_stride + n * row_stride; }
};

struct AttentionTrain {
    int64_t B, H, KV, Nq, Nk, Dh; // KV heads of k and v, each for H / KV heads of q in a row
    int64_t prefix;               // the queries are the last Nq of Nk positions; i sees keys below max(prefix, i + 1)
    HeadRows<const Bf16> q, k, v;
    HeadRows<Bf16> out;
    float *lse; // [B, H, Nq]: logarithm of the softmax's sum

    // How many keys query i sees.
    int64_t visible(int64_t i) const {
        const int64_t own = Nk - Nq + i + 1, most = own > prefix ? own : prefix;
        return most < Nk ? most : Nk;
    }
    // The first query that sees key k; Nq where there is none.
    int64_t first_query(int64_t k) const {
        const int64_t own = k - (Nk - Nq);
        return k >= Nk ? Nq : k < prefix || own < 0 ? 0 : own;
    }
};

struct AttentionGradient {
    AttentionTrain forward;
    HeadRows<const Bf16> dout;
    HeadRows<Bf16> dq, dk, dv;
};

// Whether this processor has the instructions, and the head width is a multiple of 16 up to 128.
bool attention_train_supported(int64_t head_dim);

// Both give the same bits whatever `threads`. They throw std::invalid_argument where it is not supported.
void attention_train(const AttentionTrain &op, int threads);
void attention_train_backward(const AttentionGradient &op, int threads);

#if DAR_X86
constexpr int64_t FORWARD_QUERIES = 64; // a piece of work
constexpr int64_t PART_KEYS = 256;      // a piece of work of the gradients, whose dQ are added up in order

// Words of 32 bits that one worker needs, and floats of the dQ of one part of the keys and one head of q. The memory is
// aligned to 64 bytes.
int64_t forward_scratch(const AttentionTrain &op);
int64_t backward_scratch(const AttentionTrain &op);
int64_t backward_part_size(const AttentionTrain &op);

// Lays the keys and values of one head out in the scratch.
void forward_pack(const AttentionTrain &op, int64_t b, int64_t h, uint32_t *scratch);
// Queries [first, first + FORWARD_QUERIES) of that head.
void forward_block(const AttentionTrain &op, int64_t b, int64_t h, int64_t first, uint32_t *scratch);

// Of the keys of some parts of one head of k and v: dK and dV, and each part's dQ for each head of q that it serves,
// [H / KV, parts, part size].
struct Parts {
    int64_t first, last, all;
};
void backward_head(const AttentionGradient &op, int64_t b, int64_t kv, Parts parts, uint32_t *scratch, float *dq);
// The sum of the parts' dQ, for the heads of q of one head of k.
void backward_queries(const AttentionGradient &op, int64_t b, int64_t kv, int64_t parts, const float *dq);
#endif

} // namespace dar
