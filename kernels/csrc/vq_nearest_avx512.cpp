#include <immintrin.h>

#include "vq_nearest_kernel.h"

namespace dar::vq {
namespace {

struct Avx512 {
    using Float = __m512;
    using Int = __m512i;
    static constexpr int LANES = 16;
    static Float load(const float *p) { return _mm512_load_ps(p); }
    static Int load(const int32_t *p) { return _mm512_load_si512(p); }
    static void store(float *p, Float x) { _mm512_store_ps(p, x); }
    static void store(int32_t *p, Int x) { _mm512_store_si512(p, x); }
    static Float broadcast(float x) { return _mm512_set1_ps(x); }
    static Float lowest() { return broadcast(-__builtin_inff()); }
    static Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
    static Float maximum(Float a, Float b) { return _mm512_max_ps(a, b); }
    static void keep_greater(Float x, int32_t k, Float &top, Int &where) {
        where = _mm512_mask_mov_epi32(where, _mm512_cmp_ps_mask(x, top, _CMP_GT_OQ), _mm512_set1_epi32(k));
        top = maximum(x, top);
    }
};

} // namespace

Kernel kernel_avx512() { return kernel<Avx512>(); }

} // namespace dar::vq
