// Large pages of memory for what is read from end to end, so that fewer addresses are looked up: a step of prior L in
// bf16 took 12.2 ms with them and 14.1 ms without, on two cores of a Zen 4.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace dar {

// Asks Linux (6.1 and later) to back [data, data + bytes) with pages of 2 MiB. The contents and addresses stay; where
// it cannot be done nothing changes.
inline void prefer_huge_pages(const void *data, size_t bytes) {
#ifdef __linux__
    constexpr uintptr_t SIZE = 2U << 20;
    constexpr int COLLAPSE = 25; // MADV_COLLAPSE, which older headers lack
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
    for (uintptr_t page = begin / SIZE * SIZE; bytes >= SIZE / 2 && page < end; page += SIZE)
        static_cast<void>(madvise(reinterpret_cast<void *>(page), SIZE, COLLAPSE));
#else
    static_cast<void>(data);
    static_cast<void>(bytes);
#endif
}

} // namespace dar
