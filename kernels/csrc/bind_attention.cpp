#include "attention.h"
#include "bind.h"
#include "bind_rows.h"

using namespace nb::literals;

namespace dar {
namespace {

void bound_attention(
    const Tensor3<Bf16> &q,
    const Tensor3<Bf16> &k,
    const Tensor3<Bf16> &v,
    const Row<Bf16> &q_weight,
    const Row<Bf16> &q_bias,
    const Row<Bf16> &k_weight,
    const Row<Bf16> &k_bias,
    const std::optional<Table> &cos,
    const std::optional<Table> &sin,
    const Out<Bf16> &out,
    float eps,
    int threads
) {
    constexpr const char *OP = "attention";
    Attention op{};
    op.q = heads(OP, q, q_weight, q_bias, cos, sin, eps);
    op.k = heads(OP, k, k_weight, k_bias, cos, sin, eps);
    const Size &size = op.q.size;
    if (op.k.head_dim != op.q.head_dim || op.k.size.B != size.B || op.k.size.N != size.N || op.k.size.D != size.D)
        reject(OP, "k of the shape of q");
    op.v = grid(OP, "v", v, size);
    op.out = output(OP, "out", out, size);
    constexpr float LOG2E = 1.44269504088896341F; // weights are powers of two
    op.q.factor = softmax_scale(op.q.head_dim) * LOG2E;
    checked_threads(OP, threads);
    const nb::gil_scoped_release unlocked;
    attention(op, threads);
}

} // namespace

void bind_attention(nb::module_ &module) {
    module.def("attention_supported", &attention_supported, "head_dim"_a, "Whether `attention` runs here.");
    module.def(
        "attention",
        &bound_attention,
        "q"_a.noconvert(),
        "k"_a.noconvert(),
        "v"_a.noconvert(),
        "q_weight"_a.noconvert(),
        "q_bias"_a.noconvert(),
        "k_weight"_a.noconvert(),
        "k_bias"_a.noconvert(),
        "cos"_a.noconvert().none(),
        "sin"_a.noconvert().none(),
        "out"_a.noconvert(),
        "eps"_a,
        "threads"_a,
        "Attention of bfloat16 [B, N, D] with the norm and rotation of q and k first."
    );
}

} // namespace dar
