#include "modulate_kernel.h"

namespace dar {

template <> ModulateKernel<float> modulate_avx2<float>() { return modulate_kernel<float>(); }
template <> ModulateKernel<Bf16> modulate_avx2<Bf16>() { return modulate_kernel<Bf16>(); }

} // namespace dar
