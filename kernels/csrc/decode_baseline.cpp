#include "decode_sample.h"
#include "simd_baseline.h"

const dar::decode::Kernels &dar::decode::kernels_baseline() {
    static constexpr Kernels KERNELS = wide_kernels<Baseline>();
    return KERNELS;
}
