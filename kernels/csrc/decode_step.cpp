#include "decode_step.h"

#include <algorithm>
#include <cmath>

#include "buffer.h"
#include "team.h"

namespace dar::decode {
namespace {

constexpr int64_t UNIT = 16;           // outputs of a thread come in multiples: a cache line of fp32
constexpr int64_t ROWS_BYTES = 393216; // of prepared rows at a time: they stay in a second-level cache
constexpr int64_t LEAST_ROWS = 16;

template <typename T> Buffer<T> zeros(int64_t n) {
    Buffer<T> buffer = make_buffer<T>(n);
    std::fill_n(buffer.get(), n, T{});
    return buffer;
}

uint16_t to_bf16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof(bits));
    if (std::isnan(x))
        return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    __builtin_memcpy(&y, &bits, sizeof(y));
    return y;
}

// What all threads share while a call lasts; each has `Own` besides.
class Run {
  public:
    Run(const Model &model, const Pages &pages, const Batch &batch, int threads, Isa isa)
        : m_(model), pages_(pages), batch_(batch), kernels_(choose_kernels(isa)), R_(batch.rows()),
          wide_(padded(std::max({m_.D, m_.F, m_.heads * m_.head_dim}))), group_(m_.heads / m_.kv_heads),
          length_(padded(*std::max_element(batch.positions, batch.positions + batch.B) + batch.steps)),
          x_(zeros<float>(R_ * padded(m_.D))), qkv_(zeros<float>(R_ * padded(m_.layers[0].qkv.O))),
          mixed_(zeros<float>(R_ * padded(m_.heads * m_.head_dim))), gate_(zeros<float>(R_ * padded(m_.F))),
          up_(zeros<float>(R_ * padded(m_.F))) {
        if (batch.logits == nullptr)
            logits_ = make_buffer<float>(R_ * m_.V);
        for (int worker = 0; worker < threads; ++worker)
            own_.emplace_back(*this);
    }

    void work(Team &team, int worker) {
        Own &own = own_[static_cast<size_t>(worker)];
        for (auto [row, last] = team.share(R_, 1, worker); row < last; ++row)
            first_input(row);
        team.wait();
        for (int64_t step = 0; step < batch_.steps; ++step) {
            for (size_t layer = 0; layer < m_.layers.size(); ++layer)
                work_layer(team, worker, own, layer, step);
            float *logits = batch_.logits != nullptr ? batch_.logits : logits_.get();
            if (!all_forced(step)) {
                products(team, worker, own, x_.get(), m_.D, m_.norm, {{&m_.head, logits, m_.V}}, false);
                team.wait();
            }
            if (batch_.logits != nullptr)
                return;
            for (auto [b, last] = team.share(batch_.B, 1, worker); b < last; ++b)
                next_input(b, step, own);
            team.wait();
        }
    }

  private:
    struct Own {
        explicit Own(const Run &run)
            : normed(zeros<float>(run.wide_)), rows(make_buffer<char>(rows_bytes(run))),
              scales(make_buffer<float>(run.R_)), q(zeros<float>(run.group_ * padded(run.m_.head_dim))),
              scores(make_buffer<float>(run.group_ * run.length_)),
              sample(make_buffer<float>(sample_scratch(run.m_.V))) {}

        static int64_t rows_bytes(const Run &run) {
            const int64_t row = run.wide_ * static_cast<int64_t>(sizeof(float));
            return row * std::min(run.R_, std::max(LEAST_ROWS, ROWS_BYTES / row));
        }

        Buffer<float> normed; // a row
        Buffer<char> rows;    // prepared for products
        Buffer<float> scales; // of those
        Buffer<float> q, scores, sample;
    };

    struct Product {
        const Weights *w;
        float *out;
        int64_t stride;
    };

    // This worker's outputs of one product or of two with the same rows, which a norm comes before if there is one.
    void products(
        Team &team,
        int worker,
        Own &own,
        const float *x,
        int64_t K,
        const float *norm,
        std::initializer_list<Product> all,
        bool add
    ) {
        const Linear &linear = kernels_.linear[static_cast<int>(all.begin()->w->kind)];
        const int64_t stride = padded(K) * linear.bytes_per_element;
        const int64_t step = std::max(LEAST_ROWS, ROWS_BYTES / (wide_ * static_cast<int64_t>(sizeof(float))));
        for (int64_t first = 0; first < R_; first += step) {
            const int64_t count = std::min(step, R_ - first);
            // Every thread prepares all rows: that costs less than to wait for one another.
            for (int64_t r = 0; r < count; ++r) {
                const float *row = x + (first + r) * padded(K);
                if (norm != nullptr) {
                    kernels_.rms_norm(row, norm, K, m_.eps, own.normed.get());
                    row = own.normed.get();
                }
                linear.prepare(row, K, own.rows.get() + r * stride, own.scales.get() + r);
            }
            for (const Product &p : all) {
                const auto [begin, end] = team.share(p.w->O, UNIT, worker);
                const Rows rows{own.rows.get(), stride, p.w->kind == Kind::int8 ? own.scales.get() : nullptr};
                linear.products(*p.w, begin, end, rows, count, p.out + first * p.stride, p.stride, add);
            }
        }
    }

    void work_layer(Team &team, int worker, Own &own, size_t index, int64_t step) {
        const Layer &layer = m_.layers[index];
        const int64_t D = m_.D, F = m_.F, HD = m_.heads * m_.head_dim;
        products(
            team, worker, own, x_.get(), D, layer.attention_norm, {{&layer.qkv, qkv_.get(), padded(layer.qkv.O)}}, false
        );
        team.wait();
        for (auto [item, last] = team.share(R_ * m_.kv_heads, 1, worker); item < last; ++item)
            attend(item / m_.kv_heads, item % m_.kv_heads, index, step, own);
        team.wait();
        products(team, worker, own, mixed_.get(), HD, nullptr, {{&layer.proj, x_.get(), padded(D)}}, true);
        team.wait();
        products(
            team,
            worker,
            own,
            x_.get(),
            D,
            layer.mlp_norm,
            {{&layer.gate, gate_.get(), padded(F)}, {&layer.up, up_.get(), padded(F)}},
            false
        );
        const auto [first, last] = team.share(F, UNIT, worker);
        for (int64_t r = 0; r < R_; ++r)
            kernels_.swiglu(
                gate_.get() + r * padded(F) + first,
                up_.get() + r * padded(F) + first,
                (last - first + UNIT - 1) / UNIT * UNIT
            );
        team.wait();
        products(team, worker, own, gate_.get(), F, nullptr, {{&layer.down, x_.get(), padded(D)}}, true);
        team.wait();
    }

    // out = the interleaved pairs of `in` rotated to `position`, times a factor.
    void rotate(const float *in, int64_t position, float factor, float *out) const {
        const float *cos = m_.cos + position * (m_.head_dim / 2), *sin = m_.sin + position * (m_.head_dim / 2);
        for (int64_t i = 0; i < m_.head_dim / 2; ++i) {
            const float even = in[2 * i] * factor, odd = in[2 * i + 1] * factor;
            out[2 * i] = even * cos[i] - odd * sin[i];
            out[2 * i + 1] = even * sin[i] + odd * cos[i];
        }
    }

    void append(void *pages, int64_t offset, const float *x) const {
        if (pages_.kind == Kind::fp32)
            std::copy_n(x, m_.head_dim, static_cast<float *>(pages) + offset);
        else
            std::transform(x, x + m_.head_dim, static_cast<uint16_t *>(pages) + offset, to_bf16);
    }

    // Rotates, appends and attends for one row and key head.
    void attend(int64_t row, int64_t kv_head, size_t layer, int64_t step, Own &own) {
        const int64_t Dh = m_.head_dim, H = m_.heads, Hkv = m_.kv_heads;
        const int64_t position = batch_.positions[batch_.request[static_cast<size_t>(row)]] + step;
        const int32_t *table = batch_.table + row * batch_.max_pages;
        const float *qkv = qkv_.get() + row * padded(m_.layers[layer].qkv.O);
        const int64_t stride = Hkv * PAGE * Dh; // of a page
        const int64_t base = static_cast<int64_t>(layer) * pages_.count * stride + kv_head * PAGE * Dh;
        const int64_t at = base + table[position / PAGE] * stride + position % PAGE * Dh;
        float *scratch = own.normed.get();
        rotate(qkv + (H + kv_head) * Dh, position, 1.0F, scratch);
        append(pages_.keys, at, scratch);
        append(pages_.values, at, qkv + (H + Hkv + kv_head) * Dh);
        const float scale = 1.0F / std::sqrt(static_cast<float>(Dh));
        for (int64_t h = 0; h < group_; ++h)
            rotate(qkv + (kv_head * group_ + h) * Dh, position, scale, own.q.get() + h * padded(Dh));
        const int64_t width = pages_.kind == Kind::fp32 ? 4 : 2;
        const Attention attention{
            own.q.get(),
            static_cast<const char *>(pages_.keys) + base * width,
            static_cast<const char *>(pages_.values) + base * width,
            table,
            stride,
            group_,
            Dh,
            position + 1,
            own.scores.get(),
            mixed_.get() + row * padded(H * Dh) + kv_head * group_ * Dh,
        };
        kernels_.attend[static_cast<int>(pages_.kind)](attention);
    }

    void embed(int64_t code, float *out) const {
        if (m_.embedding.kind == Kind::fp32)
            std::copy_n(static_cast<const float *>(m_.embedding.data) + code * m_.D, m_.D, out);
        else
            std::transform(
                static_cast<const uint16_t *>(m_.embedding.data) + code * m_.D,
                static_cast<const uint16_t *>(m_.embedding.data) + (code + 1) * m_.D,
                out,
                from_bf16
            );
    }

    void first_input(int64_t row) {
        float *out = x_.get() + row * padded(m_.D);
        if (batch_.inputs != nullptr)
            std::copy_n(batch_.inputs + row * m_.D, m_.D, out);
        else
            embed(batch_.input_codes[batch_.request[static_cast<size_t>(row)]], out);
    }

    int64_t forced(int64_t b, int64_t step) const {
        return batch_.forced == nullptr ? -1 : batch_.forced[b * batch_.steps + step];
    }

    bool all_forced(int64_t step) const {
        for (int64_t b = 0; b < batch_.B; ++b)
            if (forced(b, step) < 0)
                return false;
        return true;
    }

    // Draws or takes the code of one request, and embeds it for its one or two rows.
    void next_input(int64_t b, int64_t step, Own &own) {
        const int64_t null_row = batch_.uncond_row(b);
        int64_t code = forced(b, step);
        if (code < 0) {
            const float *cond = logits_.get() + b * m_.V;
            const float *uncond = null_row < 0 ? nullptr : logits_.get() + null_row * m_.V;
            const Sampling sampling{
                batch_.guidance[b * batch_.steps + step],
                batch_.temperature[b],
                batch_.top_k[b],
                batch_.top_p[b],
                batch_.seeds[b],
                batch_.positions[b] + step
            };
            code = guided_sample(kernels_, cond, uncond, m_.V, sampling, own.sample.get());
        }
        batch_.codes[b * batch_.steps + step] = code;
        embed(code, x_.get() + b * padded(m_.D));
        if (null_row >= 0)
            embed(code, x_.get() + null_row * padded(m_.D));
    }

    const Model &m_;
    const Pages &pages_;
    const Batch &batch_;
    const Kernels &kernels_;
    const int64_t R_, wide_, group_, length_;
    Buffer<float> x_, qkv_, mixed_, gate_, up_, logits_; // [R, padded width]; logits [R, V]
    std::vector<Own> own_;
};

} // namespace

void decode(const Model &model, const Pages &pages, const Batch &batch, int threads, Isa isa) {
    if (batch.B == 0 || batch.steps == 0)
        return;
    Run run(model, pages, batch, threads, isa);
    run_team(threads, [&](Team &team, int worker) { run.work(team, worker); });
}

} // namespace dar::decode
