// A code from logits: guided = uncond + s (cond - uncond), over the temperature, top-k, top-p, then Gumbel-max with
// noise that is a function of (seed, position, code) alone. The vocabulary is not sorted.
#pragma once

#include "decode_kernels.h"

namespace dar {

// Of one draw.
struct Sampling {
    float guidance;    // the unconditional logits count where it is above 1
    float temperature; // 0: argmax, the lowest index of ties
    int32_t top_k;     // 0: all; ties with the last one stay
    float top_p;       // a code stays while the mass of those above it is <= top_p; 1: all
    int64_t seed, position;
};

// Throws std::invalid_argument that begins with `who` where a value is out of range.
void check_sampling(const Sampling &sampling, const char *who);

constexpr int64_t sample_scratch(int64_t V) { return 2 * decode::padded(V); } // floats

// `uncond` may be null. V < 2^31.
int64_t guided_sample(
    const decode::Kernels &kernels,
    const float *cond,
    const float *uncond,
    int64_t V,
    const Sampling &sampling,
    float *scratch
);

} // namespace dar
