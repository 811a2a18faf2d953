// A decoder's weights from Python: checked, kept alive, and described to C++ where they lie.
#pragma once

#include <string>
#include <vector>

#include "bind_check.h"
#include "decode_step.h"

namespace dar {

class DecoderModel {
  public:
    static constexpr const char *WHO = "decode_step";

    // layers: attention_norm, qkv, proj, mlp_norm, gate, up, down of each. scales: none, or for int8 those of qkv,
    // proj, gate, up, down of each layer, and last that of the head.
    DecoderModel(
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
    );

  protected:
    // Throws std::invalid_argument: "decode_step: expected ...".
    [[noreturn]] static void fail(const std::string &expected);

    decode::Model m_{};

  private:
    const float *floats(const Tensor &x, const char *name, std::initializer_list<int64_t> shape);
    decode::Weights weights(const Tensor &x, const char *name, int64_t O, int64_t K, const Tensor *scale);
    void add_layer(const std::vector<Tensor> &tensors, const std::vector<Tensor> *scales);
    // Sums of the rows of int8 weights, and large pages of memory for all.
    void finish(decode::Weights &w);

    std::vector<Tensor> kept_;
    std::vector<std::vector<int32_t>> sums_;
};

} // namespace dar
