#include "bind.h"
#include "bind_rows.h"
#include "train_rows.h"

using namespace nb::literals;

namespace dar {
namespace {

template <typename T> using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename T> using Flat = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
void bound_cross_entropy_rows(
    const Matrix<T> &logits,
    const Flat<const int64_t> &targets,
    const std::optional<Flat<const float>> &factors,
    const Flat<float> &losses,
    const Flat<float> &lse,
    int threads,
    const std::string &isa
) {
    constexpr const char *OP = "cross_entropy_rows";
    const auto M = static_cast<int64_t>(logits.shape(0)), V = static_cast<int64_t>(logits.shape(1));
    if (V < 1)
        reject(OP, "at least one logit a row");
    const size_t given = factors ? factors->shape(0) : logits.shape(0);
    for (const size_t size : {targets.shape(0), given, losses.shape(0), lse.shape(0)})
        if (static_cast<int64_t>(size) != M)
            reject(OP, "targets, factors, losses and lse [" + std::to_string(M) + "]");
    const float *factor = factors ? factors->data() : nullptr;
    const CrossEntropyRows<T> op{M, V, logits.data(), targets.data(), factor, losses.data(), lse.data()};
    const Isa chosen = choose_isa(isa, Isa::avx512_vnni);
    checked_threads(OP, threads);
    const nb::gil_scoped_release unlocked;
    cross_entropy_rows(op, threads, chosen);
}

template <typename T>
void bound_dropout(
    const Flat<const T> &x, const Flat<T> &out, uint64_t key, double p, int threads, const std::string &isa
) {
    constexpr const char *OP = "dropout";
    if (x.shape(0) != out.shape(0))
        reject(OP, "out [" + std::to_string(x.shape(0)) + "]");
    if (!(p >= 0 && p < 1))
        reject(OP, "p in [0, 1)");
    const Dropout<T> op{
        static_cast<int64_t>(x.shape(0)),
        x.data(),
        out.data(),
        key,
        static_cast<uint32_t>(p * 4294967296.0),
        static_cast<float>(1 / (1 - p)),
    };
    const Isa chosen = choose_isa(isa, Isa::avx512_vnni);
    checked_threads(OP, threads);
    const nb::gil_scoped_release unlocked;
    dropout(op, threads, chosen);
}

template <typename T> void define(nb::module_ &module) {
    module.def(
        "cross_entropy_rows",
        &bound_cross_entropy_rows<T>,
        "logits"_a.noconvert(),
        "targets"_a.noconvert(),
        "factors"_a.noconvert().none(),
        "losses"_a.noconvert(),
        "lse"_a.noconvert(),
        "threads"_a,
        "isa"_a = ""
    );
    module.def(
        "dropout", &bound_dropout<T>, "x"_a.noconvert(), "out"_a.noconvert(), "key"_a, "p"_a, "threads"_a, "isa"_a = ""
    );
}

} // namespace

void bind_train_rows(nb::module_ &module) {
    define<float>(module);
    define<Bf16>(module);
}

} // namespace dar
