#include "bind.h"
#include "bind_rows.h"

using namespace nb::literals;

namespace dar {
namespace {

template <typename T>
void bound_modulate(
    const Tensor3<T> &x,
    const std::optional<Tensor3<T>> &y,
    const std::optional<Tensor3<T>> &gate,
    const std::optional<Tensor3<T>> &shift,
    const std::optional<Tensor3<T>> &scale,
    const std::optional<Out<T>> &residual,
    const Out<T> &modulated,
    float eps,
    int threads,
    const std::string &isa
) {
    constexpr const char *OP = "modulate";
    const Size size = size_of(x);
    if (y.has_value() != gate.has_value() || gate.has_value() != residual.has_value())
        reject(OP, "y, gate and residual together or not at all");
    if (shift.has_value() != scale.has_value())
        reject(OP, "shift and scale together or not at all");
    Modulate<T> op{};
    op.size = size;
    op.x = grid(OP, "x", x, size);
    op.y = grid(OP, "y", y, size);
    op.gate = grid(OP, "gate", gate, size);
    op.shift = grid(OP, "shift", shift, size);
    op.scale = grid(OP, "scale", scale, size);
    if (residual)
        op.residual = output(OP, "residual", *residual, size);
    op.modulated = output(OP, "modulated", modulated, size);
    op.eps = eps;
    const Isa chosen = choose_isa(isa, Isa::avx512_vnni);
    checked_threads(OP, threads);
    const nb::gil_scoped_release unlocked;
    modulate(op, threads, chosen);
}

template <typename T>
void bound_bias_silu(
    const Tensor3<T> &x, const Tensor3<T> &bias, const Out<T> &out, int threads, const std::string &isa
) {
    constexpr const char *OP = "bias_silu";
    const Size size = size_of(x);
    const BiasSilu<T> op{size, grid(OP, "x", x, size), grid(OP, "bias", bias, size), output(OP, "out", out, size)};
    const Isa chosen = choose_isa(isa, Isa::avx512_vnni);
    checked_threads(OP, threads);
    const nb::gil_scoped_release unlocked;
    bias_silu(op, threads, chosen);
}

template <typename T>
void bound_key_weights(
    const Tensor3<T> &q,
    const Row<T> &weight,
    const Row<T> &bias,
    const std::optional<Table> &cos,
    const std::optional<Table> &sin,
    const Tensor4<T> &keys,
    const Out<T> &out,
    float eps,
    int threads,
    const std::string &isa
) {
    constexpr const char *OP = "key_weights";
    KeyWeights<T> op{heads(OP, q, weight, bias, cos, sin, eps), keys.data(), static_cast<int64_t>(keys.shape(2))};
    const Size &size = op.q.size;
    const int64_t Dh = op.q.head_dim, H = size.D / Dh;
    if (static_cast<int64_t>(keys.shape(0)) != size.B || static_cast<int64_t>(keys.shape(1)) != H || op.Q < 1 ||
        static_cast<int64_t>(keys.shape(3)) != Dh)
        reject(OP, "keys [B, H, Q >= 1, Dh]");
    op.q.out = output(OP, "out", out, {size.B, size.N, H * op.Q});
    op.q.factor = softmax_scale(Dh);
    const Isa chosen = choose_isa(isa, Isa::avx512_vnni);
    checked_threads(OP, threads);
    const nb::gil_scoped_release unlocked;
    key_weights(op, threads, chosen);
}

template <typename T> void bind_for(nb::module_ &module) {
    module.def(
        "modulate",
        &bound_modulate<T>,
        "x"_a.noconvert(),
        "y"_a.noconvert().none(),
        "gate"_a.noconvert().none(),
        "shift"_a.noconvert().none(),
        "scale"_a.noconvert().none(),
        "residual"_a.noconvert().none(),
        "modulated"_a.noconvert(),
        "eps"_a,
        "threads"_a,
        "isa"_a = "",
        "residual = x + gate y; modulated = LN(residual) (1 + scale) + shift; rows [B, N, D]."
    );
    module.def(
        "bias_silu",
        &bound_bias_silu<T>,
        "x"_a.noconvert(),
        "bias"_a.noconvert(),
        "out"_a.noconvert(),
        "threads"_a,
        "isa"_a = "",
        "out = silu(x + bias); [B, N, D], bias [B, 1, D]."
    );
    module.def(
        "key_weights",
        &bound_key_weights<T>,
        "q"_a.noconvert(),
        "weight"_a.noconvert(),
        "bias"_a.noconvert(),
        "cos"_a.noconvert().none(),
        "sin"_a.noconvert().none(),
        "keys"_a.noconvert(),
        "out"_a.noconvert(),
        "eps"_a,
        "threads"_a,
        "isa"_a = "",
        "Softmax over the keys [B, H, Q, Dh] for normed and rotated queries, [B, N, H * Q]."
    );
}

} // namespace

void bind_modulate(nb::module_ &module) {
    bind_for<float>(module);
    bind_for<Bf16>(module);
}

} // namespace dar
