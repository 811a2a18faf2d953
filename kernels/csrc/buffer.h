// Memory for whole vectors and cache lines, left uninitialised.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace dar {

constexpr std::align_val_t ALIGN{64}; // the widest vector, and a cache line

struct AlignedDelete {
    void operator()(void *p) const { ::operator delete(p, ALIGN); }
};

template <typename T> using Buffer = std::unique_ptr<T[], AlignedDelete>;

template <typename T> Buffer<T> make_buffer(int64_t n) {
    return Buffer<T>(static_cast<T *>(::operator new(static_cast<size_t>(n) * sizeof(T), ALIGN)));
}

} // namespace dar
