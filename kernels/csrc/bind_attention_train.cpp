#include "attention_train.h"
#include "bind.h"
#include "bind_rows.h"

using namespace nb::literals;

namespace dar {
namespace {

constexpr const char *OP = "attention_train";

using Heads = nb::ndarray<const Bf16, nb::ndim<4>, nb::device::cpu>;
using OutHeads = nb::ndarray<Bf16, nb::ndim<4>, nb::device::cpu>;
using Lse = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// The rows of x, which must be [B, H, N, Dh] with Dh contiguous.
template <typename T, typename Array>
HeadRows<T> rows(const char *name, const Array &x, int64_t B, int64_t H, int64_t N, int64_t Dh) {
    const int64_t wanted[] = {B, H, N, Dh};
    for (size_t i = 0; i < 4; ++i)
        if (static_cast<int64_t>(x.shape(i)) != wanted[i])
            reject(
                OP,
                std::string(name) + " [" + std::to_string(B) + ", " + std::to_string(H) + ", " + std::to_string(N) +
                    ", " + std::to_string(Dh) + "]"
            );
    if (x.stride(3) != 1)
        reject(OP, std::string(name) + " with a contiguous last dimension");
    return {x.data(), x.stride(0), x.stride(1), x.stride(2)};
}

AttentionTrain forward(const Heads &q, const Heads &k, const Heads &v, const Lse &lse, int64_t prefix, int threads) {
    const auto size = [](const Heads &x, size_t i) { return static_cast<int64_t>(x.shape(i)); };
    AttentionTrain op{};
    op.B = size(q, 0);
    op.H = size(q, 1);
    op.Nq = size(q, 2);
    op.Dh = size(q, 3);
    op.KV = size(k, 1);
    op.Nk = size(k, 2);
    op.prefix = prefix;
    if (op.KV < 1 || op.H < 1 || op.H % op.KV != 0 || op.Nq > op.Nk)
        reject(OP, "heads of k that divide those of q, and Nq <= Nk");
    if (prefix < 0)
        reject(OP, "prefix >= 0");
    op.q = rows<const Bf16>("q", q, op.B, op.H, op.Nq, op.Dh);
    op.k = rows<const Bf16>("k", k, op.B, op.KV, op.Nk, op.Dh);
    op.v = rows<const Bf16>("v", v, op.B, op.KV, op.Nk, op.Dh);
    if (static_cast<int64_t>(lse.shape(0)) != op.B || static_cast<int64_t>(lse.shape(1)) != op.H ||
        static_cast<int64_t>(lse.shape(2)) != op.Nq)
        reject(OP, "lse [B, H, Nq]");
    op.lse = lse.data();
    checked_threads(OP, threads);
    return op;
}

void bound_forward(
    const Heads &q, const Heads &k, const Heads &v, const OutHeads &out, const Lse &lse, int64_t prefix, int threads
) {
    AttentionTrain op = forward(q, k, v, lse, prefix, threads);
    op.out = rows<Bf16>("out", out, op.B, op.H, op.Nq, op.Dh);
    const nb::gil_scoped_release unlocked;
    attention_train(op, threads);
}

void bound_backward(
    const Heads &q,
    const Heads &k,
    const Heads &v,
    const OutHeads &out,
    const Lse &lse,
    const Heads &dout,
    const OutHeads &dq,
    const OutHeads &dk,
    const OutHeads &dv,
    int64_t prefix,
    int threads
) {
    AttentionGradient op{};
    AttentionTrain &f = op.forward;
    f = forward(q, k, v, lse, prefix, threads);
    f.out = rows<Bf16>("out", out, f.B, f.H, f.Nq, f.Dh);
    op.dout = rows<const Bf16>("dout", dout, f.B, f.H, f.Nq, f.Dh);
    op.dq = rows<Bf16>("dq", dq, f.B, f.H, f.Nq, f.Dh);
    op.dk = rows<Bf16>("dk", dk, f.B, f.KV, f.Nk, f.Dh);
    op.dv = rows<Bf16>("dv", dv, f.B, f.KV, f.Nk, f.Dh);
    const nb::gil_scoped_release unlocked;
    attention_train_backward(op, threads);
}

} // namespace

void bind_attention_train(nb::module_ &module) {
    module.def(
        "attention_train_supported", &attention_train_supported, "head_dim"_a, "Whether `attention_train` runs here."
    );
    module.def(
        "attention_train",
        &bound_forward,
        "q"_a.noconvert(),
        "k"_a.noconvert(),
        "v"_a.noconvert(),
        "out"_a.noconvert(),
        "lse"_a.noconvert(),
        "prefix"_a,
        "threads"_a,
        "Attention of bfloat16 [B, H, N, Dh], and the logarithms of its sums."
    );
    module.def(
        "attention_train_backward",
        &bound_backward,
        "q"_a.noconvert(),
        "k"_a.noconvert(),
        "v"_a.noconvert(),
        "out"_a.noconvert(),
        "lse"_a.noconvert(),
        "dout"_a.noconvert(),
        "dq"_a.noconvert(),
        "dk"_a.noconvert(),
        "dv"_a.noconvert(),
        "prefix"_a,
        "threads"_a,
        "Gradients of `attention_train`."
    );
}

} // namespace dar
