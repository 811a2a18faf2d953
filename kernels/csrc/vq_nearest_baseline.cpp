#include "vq_nearest_kernel.h"

namespace dar::vq {
namespace {

// Vectors of four in the language of GCC and Clang: SSE2 on x86, NEON on Arm, loops elsewhere.
struct Baseline {
    typedef float Float __attribute__((vector_size(16), may_alias));
    typedef int32_t Int __attribute__((vector_size(16), may_alias));
    static constexpr int LANES = 4;
    static Float load(const float *p) { return *reinterpret_cast<const Float *>(p); }
    static Int load(const int32_t *p) { return *reinterpret_cast<const Int *>(p); }
    static void store(float *p, Float x) { *reinterpret_cast<Float *>(p) = x; }
    static void store(int32_t *p, Int x) { *reinterpret_cast<Int *>(p) = x; }
    static Float broadcast(float x) { return Float{x, x, x, x}; }
    static Float lowest() { return broadcast(-__builtin_inff()); }
    static Float multiply_add(Float a, Float b, Float c) { return a * b + c; }
    static float multiply_add(float a, float b, float c) { return a * b + c; }
    static Float maximum(Float a, Float b) { return a > b ? a : b; }
    static void keep_greater(Float x, int32_t k, Float &top, Int &where) {
        where = x > top ? Int{k, k, k, k} : where;
        top = maximum(x, top);
    }
};

} // namespace

Kernel kernel_baseline() { return kernel<Baseline>(); }

} // namespace dar::vq
