#include "bind_check.h"

namespace dar {
namespace {

std::string dtype_name(const nanobind::dlpack::dtype &dtype) {
    using Code = nanobind::dlpack::dtype_code;
    const std::string bits = std::to_string(dtype.bits * dtype.lanes);
    switch (static_cast<Code>(dtype.code)) {
    case Code::Int:
        return "int" + bits;
    case Code::UInt:
        return "uint" + bits;
    case Code::Float:
        return "float" + bits;
    case Code::Bfloat:
        return "bfloat" + bits;
    case Code::Complex:
        return "complex" + bits;
    case Code::Bool:
        return "bool";
    default:
        return "another dtype of " + bits + " bits";
    }
}

std::string shape_name(const std::vector<int64_t> &shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i)
        text += (i > 0 ? ", " : "") + (shape[i] < 0 ? std::string("*") : std::to_string(shape[i]));
    return text + "]";
}

} // namespace

bool has_shape(const Tensor &x, std::initializer_list<int64_t> shape) {
    if (x.ndim() != shape.size())
        return false;
    size_t i = 0;
    for (const int64_t n : shape)
        if (n >= 0 && n != size(x, i++))
            return false;
        else if (n < 0)
            ++i;
    int64_t stride = 1;
    for (i = x.ndim(); i-- > 0; stride *= size(x, i)) {
        if (size(x, i) == 0)
            return true;
        if (size(x, i) > 1 && x.stride(i) != stride)
            return false;
    }
    return true;
}

std::string describe(const Tensor &x) {
    std::vector<int64_t> shape;
    bool contiguous = true;
    int64_t stride = 1;
    for (size_t i = x.ndim(); i-- > 0; stride *= size(x, i)) {
        shape.insert(shape.begin(), size(x, i));
        contiguous = contiguous && (size(x, i) <= 1 || x.stride(i) == stride);
    }
    return dtype_name(x.dtype()) + " " + shape_name(shape) + (contiguous ? "" : " with strides");
}

std::string describe(const char *dtype, std::initializer_list<int64_t> shape) {
    return dtype + (" " + shape_name(shape));
}

} // namespace dar
