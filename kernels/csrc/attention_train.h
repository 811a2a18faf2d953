// softmax(q k^T / sqrt(Dh)) v of bf16 and its gradients, head by head. 4 FLOPs a query, key it sees and channel
// forward, 10 backward; scores are made again instead of kept. Needs AVX-512 BF16.
#pragma once

#include "modulate.h"

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

// Words of 32 bits, aligned to 64 bytes, that one worker needs.
int64_t forward_scratch(const AttentionTrain &op);
int64_t backward_scratch(const AttentionGradient &op);

// Lays the keys and values of one head out in the scratch.
void forward_pack(const AttentionTrain &op, int64_t b, int64_t h, uint32_t *scratch);
// Queries [first, first + FORWARD_QUERIES) of that head.
void forward_block(const AttentionTrain &op, int64_t b, int64_t h, int64_t first, uint32_t *scratch);
// All gradients of one head of k and v, and of the heads of q that it serves.
void backward_head(const AttentionGradient &op, int64_t b, int64_t kv, uint32_t *scratch);
#endif

} // namespace dar
