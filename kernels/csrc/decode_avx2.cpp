#include "decode_sample.h"
#include "simd_avx2.h"

const dar::decode::Kernels &dar::decode::kernels_avx2() {
    static constexpr Kernels KERNELS = wide_kernels<Avx2>();
    return KERNELS;
}
