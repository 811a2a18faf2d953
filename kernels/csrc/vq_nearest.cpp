#include "vq_nearest.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "buffer.h"
#include "parallel.h"

namespace dar {
namespace {

using namespace vq;

constexpr double EPS = 1e-12;         // smallest norm divided by, as torch.nn.functional.normalize
constexpr int64_t TILE_FLOATS = 4096; // of the codebook at a time: 16 KiB, half of a first-level cache
constexpr int64_t GROUP = 8;          // panels that share a tile while it is there

// Writes one row over max(norm, EPS) to out[c * stride] and returns -|result|^2 / 2, or zeros and -inf where the row
// is not finite. The norm is taken in double: a row of any finite size neither overflows nor vanishes.
float normalise(const Matrix &x, int64_t row, float *out, int64_t stride) {
    const float *in = x.data + row * x.row_stride;
    double sum = 0;
    for (int64_t c = 0; c < x.columns; ++c)
        sum += static_cast<double>(in[c * x.column_stride]) * in[c * x.column_stride];
    const double norm = std::sqrt(sum);
    const bool finite = std::isfinite(norm);
    const double scale = std::max(norm, EPS);
    for (int64_t c = 0; c < x.columns; ++c)
        out[c * stride] = finite ? static_cast<float>(in[c * x.column_stride] / scale) : 0.0F;
    const double after = norm / scale;
    return finite ? static_cast<float>(-0.5 * after * after) : -std::numeric_limits<float>::infinity();
}

Kernel choose_kernel(Isa isa) {
    switch (isa) {
#if DAR_X86
    case Isa::avx512:
        return kernel_avx512();
    case Isa::avx2:
        return kernel_avx2();
#endif
    default:
        return kernel_baseline();
    }
}

// Rows in panels, with the best score and the chunk it came from: what one worker keeps at hand.
struct Scratch {
    float *panels;  // [GROUP, C, width]
    float *best;    // [GROUP, width]
    int32_t *chunk; // [GROUP, width]
};

// Codes of rows [first, first + count), count <= GROUP * width.
void nearest_group(
    const Kernel &kernel,
    const Matrix &z,
    const Entries &entries,
    int64_t chunks,
    int64_t first,
    int64_t count,
    const Scratch &scratch,
    int64_t *codes
) {
    const int64_t width = kernel.width;
    const int64_t panels = (count + width - 1) / width;
    constexpr float LOWEST = -std::numeric_limits<float>::infinity();
    std::fill_n(scratch.panels, panels * width * z.columns, 0.0F);
    std::fill_n(scratch.best, panels * width, LOWEST);
    std::fill_n(scratch.chunk, panels * width, 0);
    for (int64_t i = 0; i < count; ++i) {
        float *row = scratch.panels + (i / width) * width * z.columns + i % width;
        codes[first + i] = normalise(z, first + i, row, width) == LOWEST ? 0 : -1; // -1: to be found
    }
    const int64_t tile = std::max<int64_t>(1, TILE_FLOATS / (CHUNK * z.columns));
    for (int64_t k = 0; k < chunks; k += tile)
        for (int64_t p = 0; p < panels; ++p)
            kernel.scan(
                scratch.panels + p * width * z.columns,
                entries,
                k,
                std::min(k + tile, chunks),
                scratch.best + p * width,
                scratch.chunk + p * width
            );
    for (int64_t i = 0; i < count; ++i) {
        const float *panel = scratch.panels + (i / width) * width * z.columns;
        if (codes[first + i] < 0)
            codes[first + i] = kernel.resolve(panel, i % width, entries, scratch.chunk[i]);
    }
}

} // namespace

void vq_nearest(const Matrix &z, const Matrix &codebook, int64_t *codes, int threads, Isa isa) {
    const Kernel kernel = choose_kernel(isa);
    const int64_t C = z.columns, V = codebook.rows;
    const int64_t chunks = (V + CHUNK - 1) / CHUNK;

    const Buffer<float> values = make_buffer<float>(chunks * CHUNK * C);
    const Buffer<float> bias = make_buffer<float>(chunks * CHUNK);
    std::fill_n(values.get() + V * C, (chunks * CHUNK - V) * C, 0.0F);
    std::fill_n(bias.get() + V, chunks * CHUNK - V, -std::numeric_limits<float>::infinity());
    parallel_for(chunks, threads, [&](int64_t k, int) {
        for (int64_t v = k * CHUNK; v < std::min((k + 1) * CHUNK, V); ++v)
            bias[static_cast<size_t>(v)] = normalise(codebook, v, values.get() + v * C, 1);
    });
    const Entries entries{values.get(), bias.get(), C};

    // Fewer panels a group where there are not enough rows to keep every thread at work.
    const int64_t panels = (z.rows + kernel.width - 1) / kernel.width;
    const int64_t group = std::clamp<int64_t>((panels + threads - 1) / threads, 1, GROUP);
    const int64_t step = group * kernel.width;
    const int64_t groups = (z.rows + step - 1) / step;
    const int workers = static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(groups, 1)));
    const Buffer<float> rows = make_buffer<float>(workers * step * (C + 1));
    const Buffer<int32_t> chunk = make_buffer<int32_t>(workers * step);
    parallel_for(groups, workers, [&](int64_t g, int worker) {
        float *mine = rows.get() + worker * step * (C + 1);
        const Scratch scratch{mine, mine + step * C, chunk.get() + worker * step};
        const int64_t count = std::min(step, z.rows - g * step);
        nearest_group(kernel, z, entries, chunks, g * step, count, scratch, codes);
    });
}

} // namespace dar
