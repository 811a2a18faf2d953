#include "decode_sample.h"
#include "simd_avx512.h"

const dar::decode::Kernels &dar::decode::kernels_avx512() {
    static constexpr Kernels KERNELS = wide_kernels<Avx512>();
    return KERNELS;
}
