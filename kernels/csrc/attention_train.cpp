#include "attention_train.h"

#include <algorithm>
#include <stdexcept>

#include "buffer.h"
#include "parallel.h"

namespace dar {
namespace {

void expect_supported(int64_t head_dim) {
    if (!attention_train_supported(head_dim))
        throw std::invalid_argument("attention_train: expected AVX-512 BF16 and a head width of 16, 32, ... 128");
}

} // namespace

bool attention_train_supported(int64_t head_dim) {
#if DAR_X86
    __builtin_cpu_init();
    return head_dim >= 16 && head_dim <= 128 && head_dim % 16 == 0 && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#else
    return head_dim < 0;
#endif
}

void attention_train([[maybe_unused]] const AttentionTrain &op, [[maybe_unused]] int threads) {
    expect_supported(op.Dh);
#if DAR_X86
    // A head is one piece of work, unless there are too few to keep every thread busy: then its keys are packed again.
    const int64_t heads = op.B * op.H, blocks = (op.Nq + FORWARD_QUERIES - 1) / FORWARD_QUERIES;
    const int64_t parts =
        std::clamp<int64_t>(2 * threads / std::max<int64_t>(heads, 1), 1, std::max<int64_t>(blocks, 1));
    const int64_t items = blocks == 0 ? 0 : heads * parts;
    const int workers = static_cast<int>(std::clamp<int64_t>(items, 1, threads));
    const int64_t words = (forward_scratch(op) + 15) / 16 * 16;
    const Buffer<uint32_t> scratch = make_buffer<uint32_t>(workers * words);
    parallel_for(items, workers, [&](int64_t item, int worker) {
        uint32_t *own = scratch.get() + worker * words;
        const int64_t part = item % parts, h = item / parts % op.H, b = item / parts / op.H;
        forward_pack(op, b, h, own);
        for (int64_t k = blocks * part / parts; k < blocks * (part + 1) / parts; ++k)
            forward_block(op, b, h, k * FORWARD_QUERIES, own);
    });
#endif
}

void attention_train_backward([[maybe_unused]] const AttentionGradient &op, [[maybe_unused]] int threads) {
    expect_supported(op.forward.Dh);
#if DAR_X86
    const AttentionTrain &f = op.forward;
    // As above, but the sum of the parts' dQ is always made in the same order.
    const int64_t heads = f.B * f.KV, parts = (f.Nk + PART_KEYS - 1) / PART_KEYS;
    const bool split = parts > 1 && heads % threads != 0 && heads < 2 * threads;
    const int64_t items = split ? heads * parts : heads;
    const int workers = static_cast<int>(std::clamp<int64_t>(items, 1, threads));
    const int64_t words = (backward_scratch(f) + 15) / 16 * 16, floats = f.H / f.KV * parts * backward_part_size(f);
    const Buffer<uint32_t> scratch = make_buffer<uint32_t>(workers * words);
    const Buffer<float> dq = make_buffer<float>((split ? heads : workers) * floats);
    parallel_for(items, workers, [&](int64_t item, int worker) {
        const int64_t head = split ? item / parts : item, b = head / f.KV, kv = head % f.KV;
        const Parts mine = split ? Parts{item % parts, item % parts + 1, parts} : Parts{0, parts, parts};
        float *own = dq.get() + (split ? head : worker) * floats;
        backward_head(op, b, kv, mine, scratch.get() + worker * words, own);
        if (!split)
            backward_queries(op, b, kv, parts, own);
    });
    if (split)
        parallel_for(heads, workers, [&](int64_t head, int) {
            backward_queries(op, head / f.KV, head % f.KV, parts, dq.get() + head * floats);
        });
#endif
}

} // namespace dar
