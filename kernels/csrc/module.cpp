// dar_kernels._native: the CPU ops for Python. Tensors come in through DLPack, without a copy and without torch.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "isa.h"

NB_MODULE(_native, module) {
    module.doc() = "CPU ops of dar_kernels in C++.";
    module.def("isa_supported", &dar::isa_supported, "Instruction sets that run here, the fastest first.");
    dar::bind_attention(module);
    dar::bind_attention_train(module);
    dar::bind_decode_step(module);
    dar::bind_guided_sample(module);
    dar::bind_modulate(module);
    dar::bind_train_rows(module);
    dar::bind_vq_nearest(module);
#ifdef _OPENMP
    module.attr("threading") = "OpenMP";
#else
    module.attr("threading") = "std::thread";
#endif
}
