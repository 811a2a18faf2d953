#include "decode_int8.h"

const dar::decode::Kernels &dar::decode::kernels_avx512_vnni() {
    static constexpr Kernels KERNELS = [] {
        Kernels kernels = wide_kernels<Avx512>();
        kernels.linear[static_cast<int>(Kind::int8)] = linear<Int8>();
        return kernels;
    }();
    return KERNELS;
}
