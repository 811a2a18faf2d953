"""Ahead-of-time compilation of the Triton kernels, for chips that need not be there.

An op's module has `variants(shape)`: every kernel it launches for that shape, as it launches it.
Compiling one takes 0.3 to 3 s and no GPU; what it needs of the chip is read from the cubin.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024}  # shared memory a block may have, bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """Sizes of a Llama-like decoder: D, H, Hkv, F and V."""

    dim: int
    heads: int
    kv_heads: int
    hidden_dim: int
    vocab_size: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserShape:
    """Sizes of a DiT over pixel patches with Q condition tokens, and of the codebook before it."""

    dim: int
    head_dim: int
    condition_tokens: int
    patches: int
    patch_size: int
    codebook_size: int
    code_dim: int

    @property
    def heads(self) -> int:
        return self.dim // self.head_dim


Shape = DecoderShape | DenoiserShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One specialisation of one kernel.

    Args:
        kernel: the function under `triton.jit`.
        signature: Triton types of the arguments that are no constants: `{"x_ptr": "*bf16"}`.
        constants: values of the `tl.constexpr` arguments.
        aligned: arguments known to be multiples of 16, as the launch finds them: pointers are
            added by themselves.
        options: `num_warps`, `num_stages` and the like.
        architectures: those it is launched on; others are passed over.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    architectures: tuple[int, ...] = tuple(ARCHITECTURES)

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__).strip("_")

    def key(self) -> str:
        """What tells it from the other variants of its kernel, on one line."""
        types = ",".join(sorted({t.lstrip("*") for t in self.signature.values() if t[0] == "*"}))
        shown = [f"{k}={v}" for k, v in self.constants.items() if v is not None]
        shown += [f"{k}={v}" for k, v in self.options.items()]
        return f"{types} " + " ".join(shown)


class Resources(NamedTuple):
    """What one program needs of the chip."""

    registers: int  # a thread
    stack: int  # bytes a thread, in local memory: spilled registers
    shared: int  # bytes a block


def compile_variant(variant: Variant, architecture: int) -> Resources:
    """Compile for `sm_<architecture>` and read the cubin.

    Raises:
        RuntimeError: where Triton interprets, or has no tool to read the cubin with.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(variant.kernel, "arg_names"):
        raise RuntimeError("aot: expected compiled kernels, got TRITON_INTERPRET=1")
    names = variant.kernel.arg_names
    signature = {n: variant.signature.get(n, "constexpr") for n in names}
    unknown = set(variant.signature) | set(variant.constants)
    unknown -= set(names)
    if unknown:
        raise RuntimeError(f"aot: {variant.name} has no argument {sorted(unknown)}")
    constants = {(names.index(k),): v for k, v in variant.constants.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n in variant.aligned or signature[n].startswith("*")
    }
    source = ASTSource(variant.kernel, signature, constants, aligned)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=dict(variant.options))
    registers, stack = _resource_usage(compiled.asm["cubin"])
    return Resources(registers, stack, int(compiled.metadata.shared))


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        raise RuntimeError(f"aot: expected {tool}, which Triton's wheels for Linux bring")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"aot: expected REG and STACK of cuobjdump, got {text!r}")
    return int(found[1]), int(found[2])
