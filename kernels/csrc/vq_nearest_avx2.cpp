#include <immintrin.h>

#include "vq_nearest_kernel.h"

namespace dar::vq {
namespace {

struct Avx2 {
    using Float = __m256;
    using Int = __m256i;
    static constexpr int LANES = 8;
    static Float load(const float *p) { return _mm256_load_ps(p); }
    static Int load(const int32_t *p) { return _mm256_load_si256(reinterpret_cast<const __m256i *>(p)); }
    static void store(float *p, Float x) { _mm256_store_ps(p, x); }
    static void store(int32_t *p, Int x) { _mm256_store_si256(reinterpret_cast<__m256i *>(p), x); }
    static Float broadcast(float x) { return _mm256_set1_ps(x); }
    static Float lowest() { return broadcast(-__builtin_inff()); }
    static Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
    static Float maximum(Float a, Float b) { return _mm256_max_ps(a, b); }
    static void keep_greater(Float x, int32_t k, Float &top, Int &where) {
        const __m256i greater = _mm256_castps_si256(_mm256_cmp_ps(x, top, _CMP_GT_OQ));
        where = _mm256_blendv_epi8(where, _mm256_set1_epi32(k), greater);
        top = maximum(x, top);
    }
};

} // namespace

Kernel kernel_avx2() { return kernel<Avx2>(); }

} // namespace dar::vq
