"""The back ends of `attention`: who computes it, and which calls each of them takes.

All take q `[B, H, Nq, Dh]` and k, v `[B, Hkv, Nk, Dh]`; libraries that want tokens before heads get
views. None is imported before it is asked for. Sources: FlashAttention (Dao et al., 2022, 2023,
2026), xformers' memory-efficient attention, cuDNN's through torch.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dar_kernels.attention_flash4 import flash_attention_4
from dar_kernels.attention_native import HEAD_DIMS, attention_native
from dar_kernels.attention_native import missing as native_missing
from dar_kernels.attention_parts import (
    KINDS,
    Kernel,
    Kind,
    Run,
    by_parts,
    corner_by_square,
    is_grouped,
    parts,
    seen,
    width_of,
)  # fmt: skip
from dar_kernels.dispatch import Implementation, capability

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)
DENSE_FROM = (
    0.2  # share of the scores that two calls must save on a CPU: 0.25 gains 10 %, 0.16 none
)
LOWER_RIGHT = 2  # torch's name for causal order from the bottom right corner


class Call(NamedTuple):
    """What a back end's limits are about."""

    head_dim: int
    grouped: bool  # fewer heads of keys and values than of queries
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The calls that a back end takes; `head_dims` None: any width."""

    head_dims: range | tuple[int, ...] | None = None
    kinds: tuple[Kind, ...] = KINDS
    grouped: bool = True

    def __call__(self, call: tuple[int, bool, Kind]) -> str | None:
        """Why it cannot run a `Call`, or None."""
        head_dim, grouped, kind = call
        if self.head_dims is not None and head_dim not in self.head_dims:
            return f"takes head widths {_widths(self.head_dims)}, got {head_dim}"
        if grouped and not self.grouped:
            return "takes as many heads of keys as of queries"
        if kind not in self.kinds:
            return f"takes calls of kind {', '.join(self.kinds)}, got {kind}"
        return None


def _widths(head_dims: range | tuple[int, ...]) -> str:
    if isinstance(head_dims, range):
        return f"{head_dims[0]} to {head_dims[-1]} in steps of {head_dims.step}"
    return ", ".join(map(str, head_dims))


def reference(q: Tensor, k: Tensor, v: Tensor, prefix: int | None) -> Tensor:
    """Two products and a softmax, with a dense mask: what the others are held to."""
    q = q.unflatten(1, (k.shape[1], -1))  # [B, Hkv, H / Hkv, Nq, Dh]
    scores = q @ k[:, :, None].mT * q.shape[-1] ** -0.5
    if prefix is not None:
        mask = seen(q.shape[-2], k.shape[2], prefix, q.device)
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=is_grouped(q, k), **options)


def _all_heads(q: Tensor, x: Tensor) -> Tensor:
    """Keys or values once a head of queries."""
    repeats = q.shape[1] // x.shape[1]
    return x if repeats == 1 else x.repeat_interleave(repeats, 1)


def _masked(q: Tensor, k: Tensor, v: Tensor, prefix: int = 0) -> Tensor:
    """One call under a dense mask: on a CPU, whose kernel has no other way to a corner."""
    return _sdpa(q, k, v, attn_mask=seen(q.shape[2], k.shape[2], prefix, q.device))


def _masked_whole(q: Tensor, k: Tensor, v: Tensor, prefix: int | None) -> Tensor:
    """As a plain loop has it, for comparison: one call under a dense mask, where there is one."""
    return _sdpa(q, k, v) if prefix is None else _masked(q, k, v, prefix)


def _is_corner(q: Tensor, k: Tensor, causal: bool) -> bool:
    return causal and q.shape[2] != k.shape[2]


def flash_op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal from the bottom right by torch's flash kernel on CUDA.

    `is_causal` of this op means that; of the public function it means the top left, and is refused.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)[0]


def efficient_op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by torch's memory-efficient kernel, tokens before heads."""
    return torch.ops.aten._efficient_attention_forward(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        None, None, None, None, None, 0.0, LOWER_RIGHT, True,
    )[0].transpose(1, 2)  # fmt: skip


def _sdpa_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    if _is_corner(q, k, causal):
        return flash_op(q, k, v)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(q, k, v, is_causal=causal)


def _sdpa_efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    k, v = _all_heads(q, k), _all_heads(q, v)
    if _is_corner(q, k, causal):
        return efficient_op(q, k, v)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return _sdpa(q, k, v, is_causal=causal)


@corner_by_square
def _sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v, is_causal=causal)


@corner_by_square
def _sdpa_square(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return _sdpa(q, k, v, is_causal=causal)


def _sdpa_any(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch chooses the kernel; of a corner, the first that has one."""
    if not _is_corner(q, k, causal):
        return _sdpa(q, k, v, is_causal=causal)
    if q.device.type == "cpu":
        return _masked(q, k, v)
    kernels = {"sdpa-flash": _sdpa_flash, "sdpa-efficient": _sdpa_efficient, "": _sdpa_square}
    return kernels[_corner(q.device.type, q.dtype, width_of(q), is_grouped(q, k))](q, k, v, True)


def _corner(device: str, dtype: torch.dtype, head_dim: int, grouped: bool) -> str:
    """Whose kernel takes a corner; empty: nobody's. A constant where torch.compile traces."""
    for name in ("sdpa-flash", "sdpa-efficient"):
        call = Call(head_dim, grouped, "corner")
        if _BY_NAME[name].why_not(device, dtype, named=True, call=call) is None:
            return name
    return ""


# What torch.compiler.assume_constant_result sets, without importing the compiler for it.
_corner._dynamo_marked_constant = True  # type: ignore[attr-defined]


def sdpa(q: Tensor, k: Tensor, v: Tensor, prefix: int | None) -> Tensor:
    """By torch; on a CPU in one call under a dense mask where two would save little."""
    queries, keys = q.shape[2], k.shape[2]
    if q.device.type == "cpu" and prefix is not None and len(parts(queries, keys, prefix)) > 1:
        before = prefix - (keys - queries)
        if before * (keys - prefix) < DENSE_FROM * queries * keys:
            return _masked(q, k, v, prefix)
    return _sdpa_by_parts(q, k, v, prefix)


_sdpa_by_parts: Run = by_parts(_sdpa_any)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from flash_attn import flash_attn_func

    y = flash_attn_func(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        softmax_scale=q.shape[-1] ** -0.5, causal=causal,
    )  # fmt: skip
    return y.transpose(1, 2)


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    y = flash_attention_4(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), q.shape[-1] ** -0.5, causal
    )
    return y.transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask

    k, v = _all_heads(q, k), _all_heads(q, v)  # grouped heads have no backward there
    y = memory_efficient_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_bias=LowerTriangularFromBottomRightMask() if causal else None,
        scale=q.shape[-1] ** -0.5,
    )  # fmt: skip
    return y.transpose(1, 2)


def _on_cuda() -> str | None:
    return None if capability() is not None else "there is no CUDA device"


def _package(module: str, function: str, extra: str) -> Callable[[], str | None]:
    """Why `from module import function` does not work here, or there is no GPU to run it on."""
    install = f"pip install 'dar-fast[{extra}]'"

    @functools.cache
    def missing() -> str | None:
        try:
            getattr(import_module(module), function)
        except ModuleNotFoundError as error:
            if error.name is None or f"{module}.".startswith(f"{error.name}."):
                return f"not installed: {install}"
            return f"does not import ({error}): {install}"  # xformers beside flash-attn-4 alone
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            # of another torch or machine; flash-attn and flash-attn-4 share a name
            return f"does not import ({error}): {install}"
        return _on_cuda()

    return missing


def _library(
    name: str,
    kernel: Kernel,
    missing: Callable[[], str | None],
    dtypes: tuple[torch.dtype, ...] = HALF,
    widest: int = 256,
    capability: tuple[int, int] = (8, 0),
    devices: tuple[str, ...] = ("cuda",),
) -> Implementation[[Tensor, Tensor, Tensor, int | None], Tensor]:
    """A library's kernel, where it is named; rows of it are read 16 bytes at a time."""
    return Implementation(
        name=name, run=by_parts(kernel), devices=devices, dtypes=dtypes, by_default=False,
        capability=capability, limits=Limits(head_dims=range(8, widest + 1, 8)), missing=missing,
    )  # fmt: skip


IMPLEMENTATIONS: tuple[Implementation[[Tensor, Tensor, Tensor, int | None], Tensor], ...] = (
    Implementation(
        name="native", run=attention_native, devices=("cpu",), dtypes=(torch.bfloat16,),
        limits=Limits(head_dims=HEAD_DIMS, kinds=("full", "causal", "corner", "prefix")),
        missing=native_missing,
    ),
    Implementation(name="sdpa", run=sdpa, also=("torch",)),
    _library(
        "flash-attn-4", _flash_attn_4, widest=128, capability=(9, 0),
        missing=_package("flash_attn.cute", "flash_attn_func", "flash-attn-4"),
    ),
    _library("flash-attn", _flash_attn, _package("flash_attn", "flash_attn_func", "flash-attn")),
    _library(
        "xformers", _xformers, _package("xformers.ops", "memory_efficient_attention", "xformers")
    ),
    _library("sdpa-cudnn", _sdpa_cudnn, _on_cuda, widest=128),
    _library("sdpa-flash", _sdpa_flash, _on_cuda),
    _library("sdpa-efficient", _sdpa_efficient, _on_cuda, FLOATS, capability=(5, 0)),
    Implementation(name="sdpa-masked", run=_masked_whole, by_default=False),
    Implementation(name="reference", run=reference, by_default=False),
)  # fmt: skip
_BY_NAME = {i.name: i for i in IMPLEMENTATIONS}
