// Tensors of any kind from Python, checked here so that a wrong one is named: "op: expected x float32 [2, 64], got
// ...".
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace dar {

using Tensor = nanobind::ndarray<nanobind::device::cpu>;

template <typename T> struct DType;
template <> struct DType<float> {
    static constexpr const char *NAME = "float32";
    static constexpr nanobind::dlpack::dtype VALUE{static_cast<uint8_t>(nanobind::dlpack::dtype_code::Float), 32, 1};
};
template <> struct DType<uint16_t> { // how C++ holds it
    static constexpr const char *NAME = "bfloat16";
    static constexpr nanobind::dlpack::dtype VALUE{static_cast<uint8_t>(nanobind::dlpack::dtype_code::Bfloat), 16, 1};
};
template <> struct DType<int8_t> {
    static constexpr const char *NAME = "int8";
    static constexpr nanobind::dlpack::dtype VALUE{static_cast<uint8_t>(nanobind::dlpack::dtype_code::Int), 8, 1};
};
template <> struct DType<int32_t> {
    static constexpr const char *NAME = "int32";
    static constexpr nanobind::dlpack::dtype VALUE{static_cast<uint8_t>(nanobind::dlpack::dtype_code::Int), 32, 1};
};
template <> struct DType<int64_t> {
    static constexpr const char *NAME = "int64";
    static constexpr nanobind::dlpack::dtype VALUE{static_cast<uint8_t>(nanobind::dlpack::dtype_code::Int), 64, 1};
};

template <typename T> bool is_type(const Tensor &x) { return x.dtype() == DType<T>::VALUE; }

inline int64_t size(const Tensor &x, size_t dimension) { return static_cast<int64_t>(x.shape(dimension)); }

// "float32 [2, 64]"; a negative size is any: "[*, 64]".
std::string describe(const Tensor &x);
std::string describe(const char *dtype, std::initializer_list<int64_t> shape);

// Whether the sizes are these (a negative one is any) and the elements lie in a row.
bool has_shape(const Tensor &x, std::initializer_list<int64_t> shape);

// The data, or nanobind::type_error or std::invalid_argument.
template <typename T>
T *expect(const Tensor &x, const char *who, const char *name, std::initializer_list<int64_t> shape) {
    if (is_type<T>(x) && has_shape(x, shape))
        return static_cast<T *>(x.data());
    const std::string message = std::string(who) + ": expected " + name + " " + describe(DType<T>::NAME, shape) +
                                " contiguous, got " + describe(x);
    if (!is_type<T>(x))
        throw nanobind::type_error(message.c_str());
    throw std::invalid_argument(message);
}

} // namespace dar
