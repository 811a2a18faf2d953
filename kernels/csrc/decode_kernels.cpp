#include "decode_kernels.h"

namespace dar::decode {

const Kernels &choose_kernels(Isa isa) {
    switch (isa) {
#if DAR_X86
    case Isa::avx512_bf16:
        return kernels_avx512_bf16();
    case Isa::avx512_vnni:
        return kernels_avx512_vnni();
    case Isa::avx512:
        return kernels_avx512();
    case Isa::avx2:
        return kernels_avx2();
#endif
    default:
        return kernels_baseline();
    }
}

} // namespace dar::decode
