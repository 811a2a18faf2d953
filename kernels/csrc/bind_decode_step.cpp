#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "bind.h"
#include "bind_decoder_model.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace dar::decode;
using dar::expect;
using dar::size;
using dar::Tensor;

namespace {

class Decoder : public dar::DecoderModel {
  public:
    using dar::DecoderModel::DecoderModel;

    void
    run(const Tensor &x,
        const Tensor &keys,
        const Tensor &values,
        const Tensor &table,
        const Tensor &positions,
        const Tensor &seeds,
        const Tensor &guidance,
        const Tensor &temperature,
        const Tensor &top_k,
        const Tensor &top_p,
        const std::optional<Tensor> &forced,
        const Tensor &codes,
        const std::optional<Tensor> &uncond,
        int threads,
        const std::string &isa) const {
        Batch batch{};
        batch.codes = expect<int64_t>(codes, WHO, "codes", {-1, -1});
        batch.B = size(codes, 0);
        batch.steps = size(codes, 1);
        const int64_t B = batch.B, n = batch.steps;
        if (uncond.has_value())
            batch.uncond = expect<int64_t>(*uncond, WHO, "uncond", {B});
        set_rows(batch);
        set_input(batch, x);
        batch.guidance = expect<float>(guidance, WHO, "guidance", {B, n});
        batch.temperature = expect<float>(temperature, WHO, "temperature", {B});
        batch.top_k = expect<int32_t>(top_k, WHO, "top_k", {B});
        batch.top_p = expect<float>(top_p, WHO, "top_p", {B});
        batch.seeds = expect<int64_t>(seeds, WHO, "seeds", {B});
        if (forced.has_value()) {
            batch.forced = expect<int64_t>(*forced, WHO, "forced", {B, n});
            check_codes(batch.forced, B * n, -1, "forced");
        }
        const Pages pages = set_pages(batch, keys, values, table, positions);
        for (int64_t i = 0; i < B * n; ++i) {
            const int64_t b = i / n;
            dar::check_sampling(
                {batch.guidance[i],
                 batch.temperature[b],
                 batch.top_k[b],
                 batch.top_p[b],
                 batch.seeds[b],
                 batch.positions[b]},
                WHO
            );
        }
        launch(pages, batch, threads, isa);
    }

    void logits(
        const Tensor &x,
        const Tensor &keys,
        const Tensor &values,
        const Tensor &table,
        const Tensor &positions,
        const Tensor &out,
        int threads,
        const std::string &isa
    ) const {
        Batch batch{};
        batch.logits = expect<float>(out, WHO, "out", {-1, m_.V});
        batch.B = size(out, 0);
        batch.steps = 1;
        set_rows(batch);
        set_input(batch, x);
        const Pages pages = set_pages(batch, keys, values, table, positions);
        launch(pages, batch, threads, isa);
    }

  private:
    static void check_codes(const int64_t *codes, int64_t n, int64_t least, const char *name, int64_t V) {
        for (int64_t i = 0; i < n; ++i)
            if (codes[i] < least || codes[i] >= V)
                fail(
                    std::string(name) + " in [" + std::to_string(least) + ", " + std::to_string(V) + "), got " +
                    std::to_string(codes[i])
                );
    }
    void check_codes(const int64_t *codes, int64_t n, int64_t least, const char *name) const {
        check_codes(codes, n, least, name, m_.V);
    }

    // As many unconditional rows as there are guided requests, each of one of them.
    static void set_rows(Batch &batch) {
        const int64_t B = batch.B;
        const int64_t unguided = batch.uncond == nullptr ? B : std::count(batch.uncond, batch.uncond + B, -1);
        const int64_t R = 2 * B - unguided;
        batch.request.assign(static_cast<size_t>(R), -1);
        std::iota(batch.request.begin(), batch.request.begin() + B, 0);
        for (int64_t b = 0; b < B; ++b) {
            const int64_t row = batch.uncond_row(b);
            if (row == -1)
                continue;
            const std::string range = "uncond -1 or in [" + std::to_string(B) + ", " + std::to_string(R) + ")";
            if (row < B || row >= R)
                fail(range + " for " + std::to_string(R - B) + " guided requests, got " + std::to_string(row));
            int64_t &request = batch.request[static_cast<size_t>(row)];
            if (request >= 0)
                fail(range + " with a row for each guided request, got " + std::to_string(row) + " twice");
            request = b;
        }
    }

    void set_input(Batch &batch, const Tensor &x) const {
        if (!dar::is_type<int64_t>(x)) {
            batch.inputs = expect<float>(x, WHO, "x", {batch.rows(), m_.D});
            return;
        }
        batch.input_codes = expect<int64_t>(x, WHO, "x", {batch.B});
        check_codes(batch.input_codes, batch.B, 0, "codes of x");
    }

    Pages
    set_pages(Batch &batch, const Tensor &keys, const Tensor &values, const Tensor &table, const Tensor &at) const {
        const int64_t R = batch.rows(), layers = static_cast<int64_t>(m_.layers.size());
        Pages pages{};
        pages.count = keys.ndim() == 5 ? size(keys, 1) : 0;
        const bool half = dar::is_type<uint16_t>(keys);
        pages.kind = half ? Kind::bf16 : Kind::fp32;
        const auto data = [&](const Tensor &x, const char *name) -> void * {
            const std::initializer_list<int64_t> shape = {layers, pages.count, m_.kv_heads, PAGE, m_.head_dim};
            return half ? static_cast<void *>(expect<uint16_t>(x, WHO, name, shape))
                        : expect<float>(x, WHO, name, shape);
        };
        pages.keys = data(keys, "keys");
        pages.values = data(values, "values");
        batch.positions = expect<int64_t>(at, WHO, "positions", {batch.B});
        batch.table = expect<int32_t>(table, WHO, "block_table", {R, -1});
        batch.max_pages = size(table, 1);
        const int64_t end = std::min(m_.N, batch.max_pages * PAGE) - batch.steps;
        std::vector<int32_t> used, written;
        for (int64_t r = 0; r < R; ++r) {
            const int64_t position = batch.positions[batch.request[static_cast<size_t>(r)]];
            if (position < 0 || position > end)
                fail(
                    "positions in [0, " + std::to_string(end) + "]: the tables have " + std::to_string(m_.N) +
                    " rows and block_table " + std::to_string(batch.max_pages) + " pages; got " +
                    std::to_string(position)
                );
            for (int64_t page = 0; page * PAGE < position + batch.steps; ++page) {
                const int32_t entry = batch.table[r * batch.max_pages + page];
                if (entry < 0 || entry >= pages.count)
                    fail("block_table in [0, " + std::to_string(pages.count) + "), got " + std::to_string(entry));
                used.push_back(entry);
                if ((page + 1) * PAGE > position)
                    written.push_back(entry);
            }
        }
        std::sort(used.begin(), used.end());
        for (const int32_t entry : written)
            if (std::upper_bound(used.begin(), used.end(), entry) - std::lower_bound(used.begin(), used.end(), entry) >
                1)
                fail(
                    "block_table with pages of their own for new tokens, got page " + std::to_string(entry) + " twice"
                );
        return pages;
    }

    void launch(const Pages &pages, const Batch &batch, int threads, const std::string &isa) const {
        if (threads < 1)
            fail("threads >= 1, got " + std::to_string(threads));
        const dar::Isa chosen = dar::choose_isa(isa, dar::Isa::avx512_bf16);
        const nb::gil_scoped_release unlocked;
        decode(m_, pages, batch, threads, chosen);
    }
};

} // namespace

void dar::bind_decode_step(nb::module_ &module) {
    nb::class_<Decoder>(module, "Decoder")
        .def(
            nb::init<
                const std::vector<std::vector<Tensor>> &,
                const std::vector<std::vector<Tensor>> &,
                const Tensor &,
                const Tensor &,
                const Tensor &,
                const Tensor &,
                const Tensor &,
                int64_t,
                int64_t,
                float>(),
            "layers"_a,
            "scales"_a,
            "norm"_a,
            "head"_a,
            "token_embedding"_a,
            "cos"_a,
            "sin"_a,
            "heads"_a,
            "kv_heads"_a,
            "eps"_a
        )
        .def(
            "run",
            &Decoder::run,
            "x"_a.noconvert(),
            "keys"_a.noconvert(),
            "values"_a.noconvert(),
            "block_table"_a.noconvert(),
            "positions"_a.noconvert(),
            "seeds"_a.noconvert(),
            "guidance"_a.noconvert(),
            "temperature"_a.noconvert(),
            "top_k"_a.noconvert(),
            "top_p"_a.noconvert(),
            "forced"_a.noconvert().none(),
            "codes"_a.noconvert(),
            "uncond"_a.noconvert().none(),
            "threads"_a,
            "isa"_a = ""
        )
        .def(
            "logits",
            &Decoder::logits,
            "x"_a.noconvert(),
            "keys"_a.noconvert(),
            "values"_a.noconvert(),
            "block_table"_a.noconvert(),
            "positions"_a.noconvert(),
            "out"_a.noconvert(),
            "threads"_a,
            "isa"_a = ""
        );
}
