"""Official configurations and ours, both ways; what a file does not say is read off its shapes.

A prior's shapes give all but its heads (those of the preset of that size, else 64 wide); a
tokenizer's all but N, K, S, the schedule and the image size (then those of v1).
"""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from dar_fast.checkpoint.errors import CheckpointError
from dar_fast.config import PRIORS, PixelDiTConfig, PriorConfig, TokenizerConfig

T = TypeVar("T")
HEAD_DIM = 64
REPA_GRID = 16
REPA_LAYER = 8  # official default
_PRIOR_MARKS = {"n_layer", "n_head"}
_TOKENIZER_MARKS = {"num_all_queries", "vq_codebook_size", "diff_decoder"}
_SUPPORTED: dict[str, tuple[Any, ...]] = {  # official options of which only one form is built
    "multiple_of": (256,), "ffn_dim_multiplier": (None,), "cls_token_num": (1,),
    "model_type": ("c2i",), "query_low_rank": (True,), "vq_enable": (True,), "in_dim": (3,),
    "out_dim": (3,), "mlp_head": (False,), "share_time_encoding": (False,),
}  # fmt: skip


def find_official(value: object, kind: str, depth: int = 6) -> dict[str, Any] | None:
    """The official configuration of a prior or tokenizer somewhere inside a plain value."""
    if not isinstance(value, dict) or not depth:
        return None
    if value.keys() & (_PRIOR_MARKS if kind == "prior" else _TOKENIZER_MARKS):
        return value
    for inner in value.values():
        found = find_official(inner, kind, depth - 1)
        if found is not None:
            return found
    return None


def _check_supported(official: Mapping[str, Any]) -> None:
    for key, allowed in _SUPPORTED.items():
        if key in official and official[key] not in allowed:
            raise CheckpointError(f"config: expected {key} {allowed[0]!r}, got {official[key]!r}")


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    rest = (name[len(prefix) :].split(".", 1)[0] for name in state if name.startswith(prefix))
    return 1 + max((int(i) for i in rest if i.isascii() and i.isdigit()), default=-1)


def _shape(state: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"missing tensor {name}")
    shape = tuple(state[name].shape)
    if len(shape) < dims or 0 in shape:
        raise CheckpointError(f"{name}: expected {dims} dimensions, got shape {list(shape)}")
    return shape


def prior_config(official: Mapping[str, Any], state: Mapping[str, Tensor]) -> PriorConfig:
    """Our configuration of an official prior.

    Raises:
        CheckpointError: where the two do not fit or describe a model that is not built here.
    """
    _check_supported(official)
    vocabulary, dim = _shape(state, "tok_embeddings.weight", 2)[:2]
    classes = _shape(state, "cls_embedding.embedding_table.weight", 2)[0] - 1
    dim, depth = official.get("dim", dim), official.get("n_layer", _depth(state, "layers."))
    heads = official.get("n_head")
    if heads is None:
        sizes = {(p.dim, p.depth): p.heads for p in PRIORS.values()}
        heads = sizes.get((dim, depth), max(1, dim // HEAD_DIM))
    kv_heads = official.get("n_kv_head")
    if kv_heads is None:
        rows = _shape(state, "layers.0.attention.wqkv.weight", 2)[0]
        kv_heads = (rows - dim) // 2 // max(1, dim // max(1, heads))
    return _made(
        PriorConfig, dim=dim, depth=depth, heads=heads,
        kv_heads=None if kv_heads == heads else kv_heads,
        vocab_size=official.get("vocab_size", vocabulary),
        num_tokens=official.get("block_size", 256),
        num_classes=official.get("num_classes", classes),
        norm_eps=float(official.get("norm_eps", 1e-5)),
        rope_base=float(official.get("rope_base", 10_000.0)),
    )  # fmt: skip


def tokenizer_config(
    official: Mapping[str, Any], state: Mapping[str, Tensor], image_size: int | None = None
) -> TokenizerConfig:
    """Our configuration of an official tokenizer.

    Args:
        image_size: R, which official configurations do not say. By default 256 as published, or
            with fewer than 256 tokens the smallest that the 16 x 16 alignment head allows.

    Raises:
        CheckpointError: where the two do not fit or describe a model that is not built here.
    """
    net = official.get("diff_decoder") or {}
    if not isinstance(net, Mapping):
        raise CheckpointError(f"config: expected diff_decoder a dict, got {type(net).__name__}")
    _check_supported(official)
    _check_supported(net)
    patchify = _shape(state, "patchify.weight", 2)
    table = _shape(state, "query_embedding.weight", 2)[0]
    tokens = official.get("num_all_queries", min(256, table))
    groups = official.get("num_query_groups", 8)
    if official.get("queries_per_step", tokens // groups) * groups != tokens:
        raise CheckpointError(
            f"config: expected {groups} groups of {tokens} tokens, "
            f"got queries_per_step {official['queries_per_step']}"
        )
    conv_in = _shape(state, "diff_decoder.net.conv_in.weight", 2)
    dit_patch = net.get("patch_size", math.isqrt(conv_in[1] // 3))
    depth = net.get("depth", _depth(state, "diff_decoder.net.blocks."))
    head_dim = _shape(state, "encoder_layers.0.attention.q_norm.weight", 1)[0]
    repa = net.get("repa_layer", min(REPA_LAYER, depth * 2 // 3))
    if "diff_decoder.net.repa_out.0.weight" not in state or (repa is not None and repa < 0):
        repa = None
    codes, code_dim = _shape(state, "quantize.embedding.weight", 2)[:2]
    decoder_dim = _shape(state, "decoder_embedding.weight", 2)[1]
    resolution = image_size or official.get("image_size") or official.get("resolution")
    return _made(
        TokenizerConfig,
        image_size=resolution or (256 if tokens >= 256 else REPA_GRID * dit_patch),
        patch_size=official.get("encoder_patch_size", math.isqrt(math.prod(patchify[1:]) // 3)),
        encoder_dim=official.get("encoder_dim", patchify[0]),
        encoder_depth=official.get("num_encoder_layers", _depth(state, "encoder_layers.")),
        decoder_dim=official.get("decoder_dim", decoder_dim),
        decoder_depth=official.get("num_decoder_layers", _depth(state, "decoder_layers.")),
        head_dim=head_dim,
        code_dim=official.get("vq_dim", code_dim),
        codebook_size=official.get("vq_codebook_size", codes),
        num_tokens=tokens,
        num_groups=groups,
        num_steps=official.get("num_denoising_steps", 8),
        query_table=table,
        dit=_made(
            PixelDiTConfig, dim=net.get("dim", conv_in[0]), depth=depth, patch_size=dit_patch,
            head_dim=head_dim, repa_layer=repa, data_std=float(net.get("data_std", 0.6)),
            time_shift=float(net.get("time_shift", 2.0)),
        ),
    )  # fmt: skip


def _made(cls: type[T], **values: Any) -> T:
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config: {error}") from error


def official_config(config: PriorConfig | TokenizerConfig) -> dict[str, Any]:
    """The official configuration of ours; `image_size` is an addition."""
    if isinstance(config, PriorConfig):
        return {
            "dim": config.dim, "n_layer": config.depth, "n_head": config.heads,
            "n_kv_head": config.kv_heads, "vocab_size": config.vocab_size,
            "block_size": config.num_tokens, "num_classes": config.num_classes,
            "norm_eps": config.norm_eps, "rope_base": config.rope_base,
        }  # fmt: skip
    dit = config.dit
    return {
        "encoder_patch_size": config.patch_size, "num_encoder_layers": config.encoder_depth,
        "num_decoder_layers": config.decoder_depth, "query_low_rank": True,
        "encoder_dim": config.encoder_dim, "decoder_dim": config.decoder_dim,
        "vq_dim": config.code_dim, "vq_codebook_size": config.codebook_size,
        "num_denoising_steps": config.num_steps, "num_query_groups": config.num_groups,
        "num_all_queries": config.num_tokens, "queries_per_step": config.group_size,
        "vq_enable": True, "image_size": config.image_size,
        "diff_decoder": {
            "in_dim": 3, "out_dim": 3, "dim": dit.dim, "cond_dim": config.decoder_dim,
            "patch_size": dit.patch_size, "depth": dit.depth, "data_std": dit.data_std,
            "time_shift": dit.time_shift, "mlp_head": False, "share_time_encoding": False,
            "repa_layer": dit.repa_layer,
        },
    }  # fmt: skip


__all__ = ["find_official", "official_config", "prior_config", "tokenizer_config"]
