#include <nanobind/stl/string.h>

#include <algorithm>

#include "bind.h"
#include "bind_check.h"
#include "buffer.h"
#include "guided_sample.h"
#include "parallel.h"

namespace nb = nanobind;
using namespace nb::literals;
using dar::expect;
using dar::size;
using dar::Tensor;

namespace {

constexpr const char *WHO = "guided_sample";

void checked(
    const Tensor &logits,
    const Tensor &uncond,
    const Tensor &seeds,
    const Tensor &positions,
    const Tensor &guidance,
    const Tensor &temperature,
    const Tensor &top_k,
    const Tensor &top_p,
    const Tensor &codes,
    int threads,
    const std::string &isa
) {
    const float *cond = expect<float>(logits, WHO, "logits", {-1, -1});
    const int64_t R = size(logits, 0), V = size(logits, 1);
    if (V < 1 || V > INT32_MAX)
        throw std::invalid_argument("guided_sample: expected V in [1, 2^31), got " + std::to_string(V));
    const bool guided = !(uncond.ndim() == 2 && uncond.shape(0) == 0 && uncond.shape(1) == 0);
    const float *other = guided ? expect<float>(uncond, WHO, "uncond", {R, V}) : nullptr;
    const int64_t *seed = expect<int64_t>(seeds, WHO, "seeds", {R});
    const int64_t *position = expect<int64_t>(positions, WHO, "positions", {R});
    const float *scale = expect<float>(guidance, WHO, "guidance", {R});
    const float *heat = expect<float>(temperature, WHO, "temperature", {R});
    const int32_t *k = expect<int32_t>(top_k, WHO, "top_k", {R});
    const float *p = expect<float>(top_p, WHO, "top_p", {R});
    int64_t *out = expect<int64_t>(codes, WHO, "codes", {R});
    if (threads < 1)
        throw std::invalid_argument("guided_sample: expected threads >= 1, got " + std::to_string(threads));
    const auto sampling = [&](int64_t r) { return dar::Sampling{scale[r], heat[r], k[r], p[r], seed[r], position[r]}; };
    for (int64_t r = 0; r < R; ++r)
        dar::check_sampling(sampling(r), WHO);
    const dar::decode::Kernels &kernels = dar::decode::choose_kernels(dar::choose_isa(isa, dar::Isa::avx512_bf16));
    const nb::gil_scoped_release unlocked;
    const int workers = static_cast<int>(std::clamp<int64_t>(R, 1, threads));
    const int64_t each = dar::sample_scratch(V);
    const dar::Buffer<float> scratch = dar::make_buffer<float>(workers * each);
    dar::parallel_for(R, workers, [&](int64_t r, int worker) {
        const float *negative = guided ? other + r * V : nullptr;
        out[r] = dar::guided_sample(kernels, cond + r * V, negative, V, sampling(r), scratch.get() + worker * each);
    });
}

} // namespace

void dar::bind_guided_sample(nb::module_ &module) {
    module.def(
        "guided_sample",
        &checked,
        "logits"_a.noconvert(),
        "uncond"_a.noconvert(),
        "seeds"_a.noconvert(),
        "positions"_a.noconvert(),
        "guidance"_a.noconvert(),
        "temperature"_a.noconvert(),
        "top_k"_a.noconvert(),
        "top_p"_a.noconvert(),
        "codes"_a.noconvert(),
        "threads"_a,
        "isa"_a = "",
        "Writes a code for each row of float32 logits [R, V] into int64 codes [R]; uncond [0, 0] where there is none."
    );
}
