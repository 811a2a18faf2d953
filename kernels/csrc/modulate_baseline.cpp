#include "modulate_kernel.h"

namespace dar {

template <> ModulateKernel<float> modulate_baseline<float>() { return modulate_kernel<float>(); }
template <> ModulateKernel<Bf16> modulate_baseline<Bf16>() { return modulate_kernel<Bf16>(); }

} // namespace dar
