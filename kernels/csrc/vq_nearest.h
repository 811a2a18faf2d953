// code[m] = argmax_v  z_m . e_v - |e_v|^2 / 2 over l2-normalised rows: the nearest entry, ties to the lowest v.
//
// Compute bound: 2 M V C FLOPs. Rows lie across the lanes of a vector, entries are broadcast; the running best stays
// in registers, so the [M, V] scores never reach memory.
#pragma once

#include <cstdint>

#include "isa.h"

namespace dar {

// A matrix of floats with strides in elements.
struct Matrix {
    const float *data;
    int64_t rows, columns, row_stride, column_stride;
};

// Writes codes[z.rows]; z.columns == codebook.columns >= 1, codebook.rows >= 1, threads >= 1.
void vq_nearest(const Matrix &z, const Matrix &codebook, int64_t *codes, int threads, Isa isa);

namespace vq {

// Entries are compared in chunks: one maximum an entry, and one comparison a chunk to remember which won. Of 16 lanes
// times 8 channels that leaves 9.2 vector operations an entry, against 11 with the index kept for each.
constexpr int64_t CHUNK = 16;

// The codebook as the kernels read it: normalised, padded to whole chunks with entries that never win.
struct Entries {
    const float *values; // [chunks * CHUNK, C]
    const float *bias;   // [chunks * CHUNK]: -|e|^2 / 2, or -inf
    int64_t C;
};

// What one instruction set does with a panel of `width` rows, laid out [C, width].
struct Kernel {
    int64_t width;
    // Folds chunks [first, last) into the best scores so far and the chunk each came from, both [width].
    void (*scan)(const float *panel, const Entries &entries, int64_t first, int64_t last, float *best, int32_t *chunk);
    // The best entry of row `lane` within a chunk, the first one of equals.
    int64_t (*resolve)(const float *panel, int64_t lane, const Entries &entries, int64_t chunk);
};

Kernel kernel_baseline();
#if DAR_X86
Kernel kernel_avx2();
Kernel kernel_avx512();
#endif

} // namespace vq
} // namespace dar
