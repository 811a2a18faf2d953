#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>

#include "bind.h"
#include "vq_nearest.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Floats = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using Codes = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

dar::Matrix matrix(const Floats &x) {
    const auto size = [&](size_t i) { return static_cast<int64_t>(x.shape(i)); };
    return {x.data(), size(0), size(1), x.stride(0), x.stride(1)};
}

void checked(const Floats &z, const Floats &codebook, const Codes &codes, int threads, const std::string &isa) {
    const dar::Matrix rows = matrix(z), entries = matrix(codebook);
    if (rows.columns < 1 || entries.columns != rows.columns || entries.rows < 1)
        throw std::invalid_argument("vq_nearest: expected z [M, C >= 1] and codebook [V >= 1, C]");
    if (entries.rows > INT32_MAX)
        throw std::invalid_argument("vq_nearest: expected V <= 2147483647");
    if (static_cast<int64_t>(codes.shape(0)) != rows.rows)
        throw std::invalid_argument("vq_nearest: expected codes [M]");
    if (threads < 1)
        throw std::invalid_argument("vq_nearest: expected threads >= 1");
    const dar::Isa chosen = dar::choose_isa(isa);
    const nb::gil_scoped_release unlocked;
    dar::vq_nearest(rows, entries, codes.data(), threads, chosen);
}

} // namespace

void dar::bind_vq_nearest(nb::module_ &module) {
    // Nothing is converted: a copy of `codes` would be filled and lost.
    module.def(
        "vq_nearest",
        &checked,
        "z"_a.noconvert(),
        "codebook"_a.noconvert(),
        "codes"_a.noconvert(),
        "threads"_a,
        "isa"_a = "",
        "Writes the code of each row of float32 z [M, C] into int64 codes [M]."
    );
}
