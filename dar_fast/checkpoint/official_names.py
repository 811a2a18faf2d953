"""The one map between official names and ours: official = ours, `{i}` a layer. REFERENCE §2, §3.

1 x 1 convolutions are linear layers here; officially they are stored as [O, I, 1, 1].
"""

import re

from torch import Tensor

from dar_fast.checkpoint.errors import CheckpointError
from dar_fast.config import PriorConfig, TokenizerConfig

PRIOR = {
    "cls_embedding.embedding_table.weight": "class_embedding.weight",
    "tok_embeddings.weight": "token_embedding.weight",
    "norm.weight": "norm.weight",
    "output.weight": "head.weight",
}
PRIOR_LAYER = {
    "layers.{i}.attention.wqkv.weight": "layers.{i}.attention.qkv.weight",
    "layers.{i}.attention.wo.weight": "layers.{i}.attention.proj.weight",
    "layers.{i}.feed_forward.w1.weight": "layers.{i}.mlp.gate.weight",
    "layers.{i}.feed_forward.w3.weight": "layers.{i}.mlp.up.weight",
    "layers.{i}.feed_forward.w2.weight": "layers.{i}.mlp.down.weight",
    "layers.{i}.attention_norm.weight": "layers.{i}.attention_norm.weight",
    "layers.{i}.ffn_norm.weight": "layers.{i}.mlp_norm.weight",
}


def _both(pairs: dict[str, str]) -> dict[str, str]:
    """Weight and bias of every module."""
    return {f"{a}.{p}": f"{b}.{p}" for a, b in pairs.items() for p in ("weight", "bias")}


def _attention(official: str, ours: str) -> dict[str, str]:
    parts = ("q", "k", "v", "proj", "q_norm", "k_norm")
    return _both({f"{official}.{part}": f"{ours}.{part}" for part in parts})


def _gated_block(official: str, ours: str) -> dict[str, str]:
    modules = ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
    return (
        {f"{official}.{gate}": f"{ours}.{gate}" for gate in ("gate1", "gate2")}
        | _both({f"{official}.{part}": f"{ours}.{part}" for part in modules})
        | _attention(f"{official}.attention", f"{ours}.attention")
    )


_NET = "diff_decoder.net"
TOKENIZER = {
    "query_embedding.weight": "encoder.query_embedding.weight",
    "quantize.embedding.weight": "quantizer.codebook",
    "quant_in_conv.weight": "quantizer.proj_in.weight",
    "quant_out_conv.weight": "quantizer.proj_out.weight",
    "decoder_embedding.weight": "token_decoder.position_embedding.weight",
    **_both(
        {
            "patchify": "encoder.patchify",
            "query_linear": "encoder.query_linear",
            f"{_NET}.cond_mlp": "pixel_dit.cond_mlp",
            f"{_NET}.conv_in": "pixel_dit.conv_in",
            f"{_NET}.conv_out": "pixel_dit.conv_out",
        }
    ),
}
ENCODER_LAYER = _gated_block("encoder_layers.{i}", "encoder.layers.{i}")
DECODER_LAYER = _gated_block("decoder_layers.{i}", "token_decoder.layers.{i}")
DIT_BLOCK = {
    **_attention(_NET + ".blocks.{i}.attention", "pixel_dit.blocks.{i}.attention"),
    **_attention(_NET + ".blocks.{i}.cross_attn", "pixel_dit.blocks.{i}.cross_attention"),
    **_both(
        {
            f"{_NET}.blocks.{{i}}.{official}": f"pixel_dit.blocks.{{i}}.{ours}"
            for official, ours in (
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
                ("adaLN_modulation.1", "modulation"),
                ("time_embed.mlp.0", "time_embed.0"),
                ("time_embed.mlp.2", "time_embed.2"),
                ("cond_embed.0", "cond_embed.0"),
                ("cond_embed.2", "cond_embed.2"),
            )
        }
    ),
}
REPA = _both({f"{_NET}.repa_out.{i}": f"pixel_dit.repa_out.{i}" for i in (0, 2, 4)})
CONVOLUTIONS = {  # 1 x 1
    "quant_in_conv.weight", "quant_out_conv.weight", f"{_NET}.conv_in.weight",
    f"{_NET}.conv_out.weight",
}  # fmt: skip
# Training state, and tables that a model computes for itself.
IGNORED = re.compile(r"(^|\.)(codebook_used|freqs_cis|wavelets)$")
PREFIXES = ("_orig_mod.", "module.")  # of torch.compile and DistributedDataParallel


def _layers(table: dict[str, str], depth: int) -> dict[str, str]:
    return {
        official.replace("{i}", str(i)): ours.replace("{i}", str(i))
        for i in range(depth)
        for official, ours in table.items()
    }


def names(config: PriorConfig | TokenizerConfig) -> dict[str, str]:
    """Official name to our name, for every tensor of a model."""
    if isinstance(config, PriorConfig):
        return PRIOR | _layers(PRIOR_LAYER, config.depth)
    return (
        TOKENIZER
        | _layers(ENCODER_LAYER, config.encoder_depth)
        | _layers(DECODER_LAYER, config.decoder_depth)
        | _layers(DIT_BLOCK, config.dit.depth)
        | (REPA if config.dit.repa_layer is not None else {})
    )


def bare_name(name: str) -> str:
    """A name without the prefixes of wrappers."""
    while name.startswith(PREFIXES):
        name = name.removeprefix("_orig_mod.").removeprefix("module.")
    return name.replace("._orig_mod.", ".")


def official_shape(name: str, tensor: Tensor) -> Tensor:
    """Our tensor in the shape that is stored under the official `name`."""
    return tensor[:, :, None, None] if name in CONVOLUTIONS else tensor


def our_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An official tensor in our shape. Convolutions may also come squeezed or flattened.

    Raises:
        CheckpointError: where it is another tensor.
    """
    if tuple(tensor.shape) == shape:
        return tensor
    convolution = name in CONVOLUTIONS or name == "patchify.weight"
    if convolution and tensor.shape[:1] == shape[:1] and tensor.numel() == _count(shape):
        return tensor.reshape(shape)
    raise CheckpointError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


__all__ = ["IGNORED", "bare_name", "names", "official_shape", "our_shape"]
