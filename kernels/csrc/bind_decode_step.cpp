#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "bind.h"
#include "bind_check.h"
#include "decode_step.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace dar::decode;
using dar::expect;
using dar::size;
using dar::Tensor;

namespace {

constexpr const char *WHO = "decode_step";
constexpr int64_t LARGEST = 1 << 24; // of every size: products of a few of them stay far within 64 bits

[[noreturn]] void fail(const std::string &message) { throw std::invalid_argument(WHO + (": expected " + message)); }

// The model, with the tensors that it reads in place.
class Decoder {
  public:
    Decoder(
        const std::vector<std::vector<Tensor>> &layers,
        const std::vector<std::vector<Tensor>> &scales,
        const Tensor &norm,
        const Tensor &head,
        const Tensor &embedding,
        const Tensor &cos,
        const Tensor &sin,
        int64_t heads,
        int64_t kv_heads,
        float eps
    ) {
        m_.heads = heads;
        m_.kv_heads = kv_heads;
        m_.eps = eps;
        if (heads < 1 || heads > LARGEST || kv_heads < 1 || kv_heads > heads || heads % kv_heads != 0)
            fail(
                "heads >= 1 and kv_heads dividing them, got " + std::to_string(heads) + " and " +
                std::to_string(kv_heads)
            );
        if (!(eps >= 0 && eps < 1))
            fail("eps in [0, 1), got " + std::to_string(eps));
        m_.cos = floats(cos, "cos", {-1, -1});
        m_.N = size(cos, 0);
        m_.head_dim = 2 * size(cos, 1);
        m_.sin = floats(sin, "sin", {m_.N, m_.head_dim / 2});
        m_.norm = floats(norm, "norm", {-1});
        m_.D = size(norm, 0);
        if (head.ndim() != 2 || layers.empty() || layers[0].size() != 7 || layers[0][4].ndim() != 2)
            fail("layers of 7 tensors and head [V, D]");
        m_.V = size(head, 0);
        m_.F = size(layers[0][4], 0);
        for (const int64_t n : {m_.D, m_.F, m_.V, m_.N, m_.head_dim, m_.heads * m_.head_dim})
            if (n < 1 || n > LARGEST)
                fail("sizes in [1, 2^24], got " + std::to_string(n));
        const bool scaled = !scales.empty();
        if (scaled && scales.size() != layers.size() + 1)
            fail("scales of every layer and of the head");
        for (size_t i = 0; i < layers.size(); ++i)
            add_layer(layers[i], scaled ? &scales[i] : nullptr);
        if (scaled && scales.back().size() != 1)
            fail("one scale tensor of the head");
        m_.head = weights(head, "head", m_.V, m_.D, scaled ? &scales.back()[0] : nullptr);
        m_.embedding = weights(embedding, "token_embedding", m_.V, m_.D, nullptr);
        for (Weights *w : quantised())
            sum_rows(*w);
    }

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
        bool guided,
        int threads,
        const std::string &isa) const {
        Batch batch{};
        batch.codes = expect<int64_t>(codes, WHO, "codes", {-1, -1});
        batch.B = size(codes, 0);
        batch.steps = size(codes, 1);
        batch.guided = guided;
        const int64_t B = batch.B, n = batch.steps;
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
        set_input(batch, x);
        const Pages pages = set_pages(batch, keys, values, table, positions);
        launch(pages, batch, threads, isa);
    }

  private:
    const float *floats(const Tensor &x, const char *name, std::initializer_list<int64_t> shape) {
        kept_.push_back(x);
        return expect<float>(x, WHO, name, shape);
    }

    Weights weights(const Tensor &x, const char *name, int64_t O, int64_t K, const Tensor *scale) {
        kept_.push_back(x);
        if (scale != nullptr)
            return {Kind::int8, expect<int8_t>(x, WHO, name, {O, K}), O, K, floats(*scale, "scale", {O}), nullptr};
        if (dar::is_type<uint16_t>(x))
            return {Kind::bf16, expect<uint16_t>(x, WHO, name, {O, K}), O, K, nullptr, nullptr};
        return {Kind::fp32, expect<float>(x, WHO, name, {O, K}), O, K, nullptr, nullptr};
    }

    void add_layer(const std::vector<Tensor> &t, const std::vector<Tensor> *scales) {
        if (t.size() != 7 || (scales != nullptr && scales->size() != 5))
            fail("layers of 7 tensors and 5 scales");
        const auto scale = [&](size_t i) { return scales == nullptr ? nullptr : &(*scales)[i]; };
        const int64_t HD = m_.heads * m_.head_dim;
        Layer layer{};
        layer.attention_norm = floats(t[0], "attention_norm", {m_.D});
        layer.qkv = weights(t[1], "qkv", (m_.heads + 2 * m_.kv_heads) * m_.head_dim, m_.D, scale(0));
        layer.proj = weights(t[2], "proj", m_.D, HD, scale(1));
        layer.mlp_norm = floats(t[3], "mlp_norm", {m_.D});
        layer.gate = weights(t[4], "gate", m_.F, m_.D, scale(2));
        layer.up = weights(t[5], "up", m_.F, m_.D, scale(3));
        layer.down = weights(t[6], "down", m_.D, m_.F, scale(4));
        if (layer.gate.kind != layer.up.kind)
            fail("gate and up of one dtype");
        m_.layers.push_back(layer);
    }

    std::vector<Weights *> quantised() {
        std::vector<Weights *> all{&m_.head};
        for (Layer &layer : m_.layers)
            for (Weights *w : {&layer.qkv, &layer.proj, &layer.gate, &layer.up, &layer.down})
                all.push_back(w);
        all.erase(std::remove_if(all.begin(), all.end(), [](Weights *w) { return w->kind != Kind::int8; }), all.end());
        return all;
    }

    void sum_rows(Weights &w) {
        std::vector<int32_t> &sums = sums_.emplace_back(static_cast<size_t>(w.O), 0);
        for (int64_t o = 0; o < w.O; ++o)
            for (int64_t k = 0; k < w.K; ++k)
                sums[static_cast<size_t>(o)] += static_cast<const int8_t *>(w.data)[o * w.K + k];
        w.sums = sums.data();
    }

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
            const int64_t position = batch.positions[r % batch.B];
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

    Model m_{};
    std::vector<Tensor> kept_;
    std::vector<std::vector<int32_t>> sums_;
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
            "guided"_a,
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
