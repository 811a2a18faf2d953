#include "decode_int8.h"

namespace dar::decode {
namespace {

// Products of bf16: activations are rounded to it, sums are in fp32.
struct Bf16 {
    using Weight = uint16_t;
    using Vector = __m512i;
    using Sum = __m512;
    static constexpr int64_t STEP = 32, BYTES = 2;
    static constexpr int ROWS = 4, PLANES = 1;

    static Sum zero() { return _mm512_setzero_ps(); }
    static Vector load(const uint16_t *p) { return _mm512_loadu_si512(p); }
    static Vector load_part(const uint16_t *p, int64_t n) { return _mm512_maskz_loadu_epi16((1U << n) - 1, p); }
    static Vector row(const char *p, int) { return _mm512_loadu_si512(p); }
    static Sum add(Sum sum, Vector w, Vector x) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
    }
    static void finish(const Sum *sum, const Sum *, const Weights &, const int64_t *, float, float *y) {
        Avx512::sum4(sum, y);
    }

    static void prepare(const float *x, int64_t K, void *out, float *) {
        uint16_t *y = static_cast<uint16_t *>(out);
        for (int64_t k = 0; k < padded(K); k += 16) {
            const int64_t n = K - k;
            const __mmask16 mask = static_cast<__mmask16>(n >= 16 ? 0xFFFF : n > 0 ? (1U << n) - 1 : 0);
            const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + k));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(y + k), reinterpret_cast<__m256i>(rounded));
        }
    }
};

} // namespace

const Kernels &kernels_avx512_bf16() {
    static constexpr Kernels KERNELS = [] {
        Kernels kernels = wide_kernels<Avx512>();
        kernels.linear[static_cast<int>(Kind::bf16)] = linear<Bf16>();
        kernels.linear[static_cast<int>(Kind::int8)] = linear<Int8>();
        return kernels;
    }();
    return KERNELS;
}

} // namespace dar::decode
