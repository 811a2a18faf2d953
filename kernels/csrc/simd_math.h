// exp in plain arithmetic, so that loops around it vectorise; nothing here comes from the C++ library.
#pragma once

#include <cstdint>

namespace dar {
namespace {

// e^x to 2 units in the last place for x in [-87, 88]; 0.0f-like 1.6e-38 below, 1.7e38 above, NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its series to degree 7, then n into the exponent.
inline float exp_approx(float x) {
    const float low = x < -87.0F ? -87.0F : x;
    const float in = low > 88.0F ? 88.0F : low;
    constexpr float MAGIC = 12582912.0F; // 1.5 * 2^23: adding it rounds to an integer
    const float shifted = in * 1.44269504088896341F + MAGIC;
    const float n = shifted - MAGIC;
    const float r = (in - n * 0.693145751953125F) - n * 1.42860682030941723e-6F;
    float p = 1.98412698e-4F;
    p = p * r + 1.38888889e-3F;
    p = p * r + 8.33333333e-3F;
    p = p * r + 4.16666667e-2F;
    p = p * r + 1.66666667e-1F;
    p = p * r + 0.5F;
    p = p * r + 1.0F;
    p = p * r + 1.0F;
    uint32_t bits;
    __builtin_memcpy(&bits, &shifted, 4);
    const uint32_t scale = (bits + 127U - 0x4B400000U) << 23;
    float power;
    __builtin_memcpy(&power, &scale, 4);
    return p * power;
}

} // namespace
} // namespace dar
