// Tensors of bind_modulate.cpp and bind_attention.cpp as the rows that modulate.h works on, checked.
#pragma once

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "modulate.h"

namespace nb = nanobind;

// DLPack's bf16, which C++17 has no type for: DLPack is where Bf16 gets its name.
template <> struct nanobind::detail::dtype_traits<dar::Bf16> {
    static constexpr dlpack::dtype value{static_cast<uint8_t>(dlpack::dtype_code::Bfloat), 16, 1};
    static constexpr auto name = const_name("bfloat16");
};

namespace dar {
namespace {

template <typename T> using Tensor3 = nb::ndarray<const T, nb::ndim<3>, nb::device::cpu>;
template <typename T> using Tensor4 = nb::ndarray<const T, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
template <typename T> using Row = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T> using Out = nb::ndarray<T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

[[noreturn]] inline void reject(const std::string &op, const std::string &expected) {
    throw std::invalid_argument(op + ": expected " + expected);
}

template <typename T> Size size_of(const T &x) {
    return {static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)), static_cast<int64_t>(x.shape(2))};
}

// The rows of x, which must be [B, N, D] with D contiguous; a dimension of size 1 is broadcast.
template <typename T> Grid<const T> grid(const char *op, const char *name, const Tensor3<T> &x, const Size &size) {
    const Size own = size_of(x);
    if ((own.B != size.B && own.B != 1) || (own.N != size.N && own.N != 1) || own.D != size.D)
        reject(
            op,
            std::string(name) + " [" + std::to_string(size.B) + ", " + std::to_string(size.N) + ", " +
                std::to_string(size.D) + "]"
        );
    if (own.D > 1 && x.stride(2) != 1)
        reject(op, std::string(name) + " with a contiguous last dimension");
    return {x.data(), own.B == 1 ? 0 : x.stride(0), own.N == 1 ? 0 : x.stride(1)};
}

template <typename T>
Grid<const T> grid(const char *op, const char *name, const std::optional<Tensor3<T>> &x, const Size &size) {
    return x ? grid(op, name, *x, size) : Grid<const T>{nullptr, 0, 0};
}

template <typename T> Grid<T> output(const char *op, const char *name, const Out<T> &x, const Size &size) {
    const Size own = size_of(x);
    if (own.B != size.B || own.N != size.N || own.D != size.D)
        reject(op, std::string(name) + " of the shape of the result");
    return {x.data(), own.N * own.D, own.D};
}

inline int checked_threads(const char *op, int threads) {
    if (threads < 1)
        reject(op, "threads >= 1");
    return threads;
}

// What a head's norm and rotation read; `out` and `factor` are the caller's.
template <typename T>
HeadNormRope<T> heads(
    const char *op,
    const Tensor3<T> &x,
    const Row<T> &weight,
    const Row<T> &bias,
    const std::optional<Table> &cos,
    const std::optional<Table> &sin,
    float eps
) {
    HeadNormRope<T> norm{};
    norm.size = size_of(x);
    norm.head_dim = static_cast<int64_t>(weight.shape(0));
    norm.x = grid(op, "x", x, norm.size);
    const int64_t Dh = norm.head_dim;
    if (Dh < 2 || Dh % 2 || norm.size.D % Dh || bias.shape(0) != weight.shape(0))
        reject(op, "an even head width that divides D, and a bias as long as the weight");
    norm.weight = weight.data();
    norm.bias = bias.data();
    if (cos.has_value() != sin.has_value())
        reject(op, "cos and sin together or not at all");
    if (cos) {
        for (const Table *table : {&*cos, &*sin})
            if (static_cast<int64_t>(table->shape(0)) != norm.size.N || static_cast<int64_t>(table->shape(1)) != Dh / 2)
                reject(op, "cos and sin [N, Dh / 2]");
        norm.cos = cos->data();
        norm.sin = sin->data();
    }
    norm.eps = eps;
    norm.factor = 1;
    return norm;
}

inline float softmax_scale(int64_t head_dim) { return 1 / __builtin_sqrtf(static_cast<float>(head_dim)); }

} // namespace
} // namespace dar
