#include "bind_decoder_model.h"

#include "huge_pages.h"

namespace dar {

using decode::Kind;
using decode::Layer;
using decode::Weights;

namespace {

constexpr int64_t LARGEST = 1 << 24; // of every size: products of a few of them stay far within 64 bits

} // namespace

void DecoderModel::fail(const std::string &expected) {
    throw std::invalid_argument(std::string(WHO) + ": expected " + expected);
}

DecoderModel::DecoderModel(
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
            "heads >= 1 and kv_heads dividing them, got " + std::to_string(heads) + " and " + std::to_string(kv_heads)
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
    finish(m_.head);
    for (Layer &layer : m_.layers)
        for (Weights *w : {&layer.qkv, &layer.proj, &layer.gate, &layer.up, &layer.down})
            finish(*w);
}

const float *DecoderModel::floats(const Tensor &x, const char *name, std::initializer_list<int64_t> shape) {
    kept_.push_back(x);
    return expect<float>(x, WHO, name, shape);
}

Weights DecoderModel::weights(const Tensor &x, const char *name, int64_t O, int64_t K, const Tensor *scale) {
    kept_.push_back(x);
    if (scale != nullptr)
        return {Kind::int8, expect<int8_t>(x, WHO, name, {O, K}), O, K, floats(*scale, "scale", {O}), nullptr};
    if (is_type<uint16_t>(x))
        return {Kind::bf16, expect<uint16_t>(x, WHO, name, {O, K}), O, K, nullptr, nullptr};
    return {Kind::fp32, expect<float>(x, WHO, name, {O, K}), O, K, nullptr, nullptr};
}

void DecoderModel::add_layer(const std::vector<Tensor> &t, const std::vector<Tensor> *scales) {
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

void DecoderModel::finish(Weights &w) {
    if (w.kind == Kind::int8) {
        std::vector<int32_t> &sums = sums_.emplace_back(static_cast<size_t>(w.O), 0);
        for (int64_t o = 0; o < w.O; ++o)
            for (int64_t k = 0; k < w.K; ++k)
                sums[static_cast<size_t>(o)] += static_cast<const int8_t *>(w.data)[o * w.K + k];
        w.sums = sums.data();
    }
    const int64_t width = w.kind == Kind::fp32 ? 4 : w.kind == Kind::bf16 ? 2 : 1;
    prefer_huge_pages(w.data, static_cast<size_t>(w.O * w.K * width));
}

} // namespace dar
