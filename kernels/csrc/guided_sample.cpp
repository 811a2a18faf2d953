#include "guided_sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace dar {
namespace {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// Unsigned numbers in the order of the floats; there is no NaN and no negative zero.
uint32_t key(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFFU : 0x80000000U);
}

float value(uint32_t key) {
    const uint32_t bits = key ^ ((key >> 31) != 0 ? 0x80000000U : 0xFFFFFFFFU);
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

// The least x[v] for which the weight of all that are greater is <= limit, by a search through the digits of the keys:
// histograms of 11, 11 and 10 bits. weight(v) >= 0; codes below `least` do not count.
template <typename Weight> float threshold(const float *x, int64_t V, float least, double limit, const Weight &weight) {
    constexpr int SHIFTS[] = {21, 10, 0};
    constexpr int64_t SIZES[] = {2048, 2048, 1024};
    double histogram[2048];
    uint32_t found = 0;
    double above = 0;
    for (int digit = 0; digit < 3; ++digit) {
        const int shift = SHIFTS[digit];
        const auto mask = static_cast<uint32_t>(SIZES[digit] - 1);
        std::fill_n(histogram, SIZES[digit], 0.0);
        uint32_t lowest = mask;
        for (int64_t v = 0; v < V; ++v) {
            const uint32_t k = key(x[v]);
            if (x[v] < least || (digit > 0 && k >> SHIFTS[digit - 1] != found))
                continue;
            const uint32_t bucket = k >> shift & mask;
            histogram[bucket] += weight(v);
            lowest = std::min(lowest, bucket);
        }
        uint32_t bucket = mask;
        while (bucket > lowest && above + histogram[bucket] <= limit)
            above += histogram[bucket--];
        found = digit == 0 ? bucket : found << (SHIFTS[digit - 1] - shift) | bucket;
    }
    return value(found);
}

} // namespace

void check_sampling(const Sampling &s, const char *who) {
    const auto fail = [&](const std::string &expected) {
        throw std::invalid_argument(std::string(who) + ": expected " + expected);
    };
    if (!std::isfinite(s.guidance))
        fail("a finite guidance scale, got " + std::to_string(s.guidance));
    if (!std::isfinite(s.temperature) || s.temperature < 0)
        fail("a finite temperature >= 0, got " + std::to_string(s.temperature));
    if (s.top_k < 0)
        fail("top_k >= 0, got " + std::to_string(s.top_k));
    if (!(s.top_p > 0 && s.top_p <= 1))
        fail("top_p in (0, 1], got " + std::to_string(s.top_p));
    if (s.seed < 0)
        fail("seeds in [0, 2^63), got " + std::to_string(s.seed));
    if (s.position < 0 || s.position > INT32_MAX)
        fail("positions in [0, 2^31), got " + std::to_string(s.position));
}

int64_t guided_sample(
    const decode::Kernels &kernels, const float *cond, const float *uncond, int64_t V, const Sampling &s, float *scratch
) {
    float *logits = scratch, *mass = scratch + decode::padded(V);
    if (!(s.guidance > 1))
        uncond = nullptr;
    const float temperature = s.temperature > 0 ? s.temperature : 1.0F;
    const float max = kernels.guide(cond, uncond, s.guidance, temperature, V, logits);
    if (s.temperature <= 0 || max == LOWEST)
        return std::find(logits, logits + V, max) - logits;
    float least = LOWEST;
    if (s.top_k > 0 && s.top_k < V)
        least = threshold(logits, V, least, s.top_k - 1, [](int64_t) { return 1.0; });
    if (s.top_p < 1) {
        kernels.exp_minus(logits, max, V, mass);
        double sum = 0;
        for (int64_t v = 0; v < V; ++v)
            sum += logits[v] >= least ? mass[v] : 0.0F;
        least = threshold(logits, V, least, s.top_p * sum, [&](int64_t v) { return mass[v]; });
    }
    const decode::Stream stream{static_cast<uint64_t>(s.seed), static_cast<uint32_t>(s.position)};
    return kernels.draw(logits, V, least, stream);
}

} // namespace dar
