"""softmax(q k^T / sqrt(Dh)) v, causal from some key on or not at all, by the library one names.

A mask is one number, the prefix p: a query at position i sees the keys before max(p, i + 1). 0 is
causal order; the encoder's is its number of patches. Flash kernels know only "all keys" and causal
order from the bottom right corner; with queries on both sides of p the call is two exact
sub-problems of those kinds (`parts`), and no mask is in memory on CUDA. 4·B·H·Nq·Nk·Dh FLOPs, half
of that in causal order; two and a half times as many again for the gradients.

`RULE` says what runs where nobody names a back end; `dar doctor` shows it.
"""

from torch import Tensor

from dar_kernels import attention_backends as backends
from dar_kernels.attention_backends import Call
from dar_kernels.attention_parts import Run, is_grouped, kind_of, width_of
from dar_kernels.checks import Dim, check_tensor, dtypes_beside, lowered
from dar_kernels.dispatch import Op, needs_grad


def attention_ref(q: Tensor, k: Tensor, v: Tensor, prefix: int | None = None) -> Tensor:
    """The definition, in whatever dtype it is given; in fp64 it is the truth the tests use."""
    return backends.reference(q, k, v, prefix)


# The others have not been measured to be faster on any machine of ours: they wait to be named.
RULE = (
    "the back end that a call, a recipe (attention: NAME) or prefer(NAME, op='attention') names, "
    "or an error; else on the CPU native in bf16, then sdpa; on CUDA sdpa, where torch chooses "
    "among its kernels"
)
OP = Op(name="attention", implementations=backends.IMPLEMENTATIONS)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    prefix: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention of `q` over `k` and `v`.

    Args:
        q: `[B, H, Nq, Dh]`, any strides; fast where the last dimension is contiguous.
        k, v: `[B, Hkv, Nk, Dh]`, Hkv dividing H, in q's dtype (autocast aside).
        prefix: None: every query sees all keys. p >= 0: the queries are the last Nq of Nk
            positions, and the one at position i sees the keys before max(p, i + 1).
        implementation: a back end's name (`OP.implementations`, `dar doctor`), or `torch` for
            `sdpa`; None: as `require` or `prefer` say, else the first that can run.

    Returns:
        `[B, H, Nq, Dh]`. Differentiable.

    Raises:
        TypeError: where an argument is no floating point tensor, or of another dtype than q.
        ValueError: where shapes or devices do not fit, the prefix is negative, or there are more
            queries than keys beside a prefix.
        UnavailableError: where the named back end cannot run here, or not this call.
    """
    _check(q, k, v, prefix)
    q, k, v = lowered(q, k, v)
    call = Call(width_of(q), is_grouped(q, k), kind_of(q.shape[2], k.shape[2], prefix))
    chosen = OP.pick(q.device.type, q.dtype, implementation, needs_grad(q, k, v), tuple(call))
    return _RUN[chosen](q, k, v, prefix)


def attention_is_named() -> bool:
    """Whether `require` names another back end than `native`, which has norms in it as well."""
    return OP.required not in (None, "native")


# What torch.compiler.assume_constant_result sets, without importing the compiler for it.
attention_is_named._dynamo_marked_constant = True  # type: ignore[attr-defined]

_RUN: dict[str, Run] = {i.name: i.run for i in OP.implementations}


def _check(q: Tensor, k: Tensor, v: Tensor, prefix: int | None) -> None:
    op = "attention"
    check_tensor(op, "q", q, ("B", "H", "Nq", "Dh"))
    B, H, Nq, Dh = q.shape
    dtypes = dtypes_beside(q)
    check_tensor(op, "k", k, (B, "Hkv", Dim("Nk"), Dh), dtypes, q.device)
    check_tensor(op, "v", v, k.shape, dtypes, q.device)
    if H % k.shape[1]:
        raise ValueError(f"{op}: expected heads of k that divide {H}, got {k.shape[1]}")
    if prefix is None:
        return
    if isinstance(prefix, bool) or not isinstance(prefix, int):
        raise TypeError(f"{op}: expected prefix an integer or None, got {type(prefix).__name__}")
    if prefix < 0:
        raise ValueError(f"{op}: expected prefix >= 0, got {prefix}")
    if Nq > k.shape[2]:
        raise ValueError(
            f"{op}: expected no more queries than keys beside a prefix, got {Nq} and {k.shape[2]}"
        )


__all__ = ["OP", "RULE", "attention", "attention_is_named", "attention_ref"]
