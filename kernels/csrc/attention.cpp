#include "attention.h"

#include <algorithm>
#include <stdexcept>

#include "buffer.h"
#include "parallel.h"

namespace dar {

bool attention_supported(int64_t head_dim) {
#if DAR_X86
    __builtin_cpu_init();
    return (head_dim == 16 || head_dim == 32 || head_dim == 64) && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#else
    return head_dim < 0;
#endif
}

void attention(const Attention &op, int threads) {
    const int64_t B = op.q.size.B, N = op.q.size.N, Dh = op.q.head_dim, H = op.q.size.D / Dh;
    if (!attention_supported(Dh))
        throw std::invalid_argument("attention: expected AVX-512 BF16 and a head width of 16, 32 or 64");
#if DAR_X86
    const int64_t padded = (N + ATTENTION_KEYS - 1) / ATTENTION_KEYS * ATTENTION_KEYS;
    const int64_t blocks = (N + ATTENTION_QUERIES - 1) / ATTENTION_QUERIES;
    // A head is one piece of work, unless there are too few to keep every thread busy: then its keys are packed again.
    const int64_t parts = std::clamp<int64_t>(2 * threads / std::max<int64_t>(B * H, 1), 1, blocks);
    const int64_t items = B * H * parts;
    const int workers = static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(items, 1)));
    const int64_t words = padded * Dh + ATTENTION_QUERIES * (Dh / 2 + ATTENTION_KEYS / 2);
    const int64_t floats = 4 * Dh + ATTENTION_QUERIES * (Dh + 3) + 32;
    const Buffer<uint32_t> integers = make_buffer<uint32_t>(workers * words);
    const Buffer<float> reals = make_buffer<float>(workers * floats);
    parallel_for(items, workers, [&](int64_t item, int worker) {
        uint32_t *own = integers.get() + worker * words;
        AttentionScratch scratch{};
        scratch.keys = own;
        scratch.values = own + padded * Dh / 2;
        scratch.queries = own + padded * Dh;
        scratch.weights = scratch.queries + ATTENTION_QUERIES * Dh / 2;
        scratch.rows = reals.get() + worker * floats;
        const int64_t part = item % parts, h = item / parts % H, b = item / parts / H;
        attention_pack(op, b, h, scratch);
        for (int64_t k = blocks * part / parts; k < blocks * (part + 1) / parts; ++k)
            attention_block(op, b, h, k * ATTENTION_QUERIES, scratch);
    });
#endif
}

} // namespace dar
