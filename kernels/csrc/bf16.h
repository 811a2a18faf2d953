// bfloat16 in memory, and its way from and to fp32; in each file that includes this with that file's own flags.
#pragma once

#include <cstdint>

namespace dar {

struct Bf16 {
    uint16_t bits;
};

namespace {

inline float load(float x) { return x; }
inline float load(Bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline void store(float *out, float x) { *out = x; }
inline void store(Bf16 *out, float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40; // rounding could carry a NaN into infinity
    out->bits = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded);
}

} // namespace
} // namespace dar
