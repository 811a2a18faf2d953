#include "train_rows_kernel.h"

namespace dar {

template <> TrainRowsKernel<float> train_rows_baseline<float>() { return train_rows_kernel<float>(); }
template <> TrainRowsKernel<Bf16> train_rows_baseline<Bf16>() { return train_rows_kernel<Bf16>(); }

} // namespace dar
