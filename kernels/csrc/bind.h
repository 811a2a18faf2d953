// What Python sees: each op adds its functions to the module in a file of its own, bind_<op>.cpp, which checks
// arguments (std::invalid_argument becomes ValueError) and releases the interpreter's lock.
#pragma once

#include <nanobind/nanobind.h>

namespace dar {

void bind_attention(nanobind::module_ &module);
void bind_attention_train(nanobind::module_ &module);
void bind_decode_step(nanobind::module_ &module);
void bind_guided_sample(nanobind::module_ &module);
void bind_modulate(nanobind::module_ &module);
void bind_train_rows(nanobind::module_ &module);
void bind_vq_nearest(nanobind::module_ &module);

} // namespace dar
