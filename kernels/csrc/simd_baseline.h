// Four lanes in the language of GCC and Clang: SSE2 on x86, NEON on Arm, loops elsewhere.
#pragma once

#include <cstdint>

namespace dar {
namespace {

struct Baseline {
    typedef float Float __attribute__((vector_size(16)));
    typedef int32_t Int __attribute__((vector_size(16)));
    typedef uint32_t Unsigned __attribute__((vector_size(16)));
    using Mask = Int;
    static constexpr int LANES = 4;
    static constexpr int TILE_ROWS = 2;

    static Float set(float x) { return Float{x, x, x, x}; }
    static Int set(int32_t x) { return Int{x, x, x, x}; }
    static Float load(const float *p) {
        Float x;
        __builtin_memcpy(&x, p, sizeof(x));
        return x;
    }
    static Float load(const uint16_t *p) { // bf16
        return as_float(reinterpret_cast<Int>(Unsigned{p[0], p[1], p[2], p[3]} << 16));
    }
    static Float load(const int8_t *p) { return convert(Int{p[0], p[1], p[2], p[3]}); }
    static void store(float *p, Float x) { __builtin_memcpy(p, &x, sizeof(x)); }
    static void store(int32_t *p, Int x) { __builtin_memcpy(p, &x, sizeof(x)); }
    static Float add(Float a, Float b) { return a + b; }
    static Float sub(Float a, Float b) { return a - b; }
    static Float mul(Float a, Float b) { return a * b; }
    static Float div(Float a, Float b) { return a / b; }
    static Float fma(Float a, Float b, Float c) { return a * b + c; }
    static Float max(Float a, Float b) { return a > b ? a : b; } // b where either is NaN
    static Float min(Float a, Float b) { return a < b ? a : b; }
    static Mask greater(Float a, Float b) { return a > b; }
    static Mask greater(Int a, Int b) { return a > b; }
    static Mask at_least(Float a, Float b) { return a >= b; }
    static bool any(Mask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
    static Float select(Mask m, Float a, Float b) { return m ? a : b; }
    static Int select(Mask m, Int a, Int b) { return m ? a : b; }
    static float sum(Float x) { return (x[0] + x[2]) + (x[1] + x[3]); }
    static float largest(Float x) {
        const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
        return a > b ? a : b;
    }
    static int32_t largest(Int x) {
        const int32_t a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
        return a > b ? a : b;
    }

    // y[i] = sum of x[i].
    static void sum4(const Float *x, float *y) {
        for (int i = 0; i < 4; ++i)
            y[i] = sum(x[i]);
    }

    // Unsigned inside: an overflow that wraps is meant.
    static Int add(Int a, Int b) { return reinterpret_cast<Int>(unsign(a) + unsign(b)); }
    static Int sub(Int a, Int b) { return reinterpret_cast<Int>(unsign(a) - unsign(b)); }
    static Int bit_and(Int a, Int b) { return a & b; }
    static Int bit_xor(Int a, Int b) { return a ^ b; }
    template <int N> static Int left(Int x) { return reinterpret_cast<Int>(unsign(x) << N); }
    template <int N> static Int right(Int x) { return reinterpret_cast<Int>(unsign(x) >> N); }
    template <int N> static Int right_signed(Int x) { return x >> N; }
    static Float as_float(Int x) { return reinterpret_cast<Float>(x); }
    static Int as_int(Float x) { return reinterpret_cast<Int>(x); }
    static Int round(Float x) { // ties to even, as the wider sets; any number where it does not fit
        Int y;
        for (int i = 0; i < 4; ++i)
            y[i] = x[i] > -2e9F && x[i] < 2e9F ? static_cast<int32_t>(__builtin_rintf(x[i])) : INT32_MIN;
        return y;
    }
    static Float convert(Int x) { return __builtin_convertvector(x, Float); }
    static Int count() { return Int{0, 1, 2, 3}; }

    static void multiply(Int x, uint32_t factor, Int &high, Int &low) {
        for (int i = 0; i < 4; ++i) {
            const uint64_t product = static_cast<uint64_t>(static_cast<uint32_t>(x[i])) * factor;
            low[i] = static_cast<int32_t>(static_cast<uint32_t>(product));
            high[i] = static_cast<int32_t>(static_cast<uint32_t>(product >> 32));
        }
    }

    // Lane l of x[j] becomes element 4 l + j of x[0], x[1], x[2], x[3] in a row.
    static void interleave4(Int *x) {
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < i; ++j) {
                const int32_t t = x[i][j];
                x[i][j] = x[j][i];
                x[j][i] = t;
            }
    }

  private:
    static Unsigned unsign(Int x) { return reinterpret_cast<Unsigned>(x); }
};

} // namespace
} // namespace dar
