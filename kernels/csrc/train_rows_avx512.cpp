#include "train_rows_kernel.h"

namespace dar {

template <> TrainRowsKernel<float> train_rows_avx512<float>() { return train_rows_kernel<float>(); }
template <> TrainRowsKernel<Bf16> train_rows_avx512<Bf16>() { return train_rows_kernel<Bf16>(); }

} // namespace dar
