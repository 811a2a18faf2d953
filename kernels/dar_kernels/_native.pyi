from collections.abc import Sequence

from torch import Tensor

threading: str  # "OpenMP" or "std::thread"

def isa_supported() -> list[str]: ...
def vq_nearest(z: Tensor, codebook: Tensor, codes: Tensor, threads: int, isa: str = "") -> None: ...
def attention_supported(head_dim: int) -> bool: ...
def attention(
    q: object,
    k: object,
    v: object,
    q_weight: object,
    q_bias: object,
    k_weight: object,
    k_bias: object,
    cos: object,
    sin: object,
    out: object,
    eps: float,
    threads: int,
) -> None: ...
def attention_train_supported(head_dim: int) -> bool: ...
def attention_train(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    prefix: int,
    threads: int,
) -> None: ...
def attention_train_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    prefix: int,
    threads: int,
) -> None: ...
def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    factors: Tensor | None,
    losses: Tensor,
    lse: Tensor,
    threads: int,
    isa: str = "",
) -> None: ...
def dropout(x: Tensor, out: Tensor, key: int, p: float, threads: int, isa: str = "") -> None: ...
def modulate(
    x: object,
    y: object,
    gate: object,
    shift: object,
    scale: object,
    residual: object,
    modulated: object,
    eps: float,
    threads: int,
    isa: str = "",
) -> None: ...
def bias_silu(x: object, bias: object, out: object, threads: int, isa: str = "") -> None: ...
def key_weights(
    q: object,
    weight: object,
    bias: object,
    cos: object,
    sin: object,
    keys: object,
    out: object,
    eps: float,
    threads: int,
    isa: str = "",
) -> None: ...
def guided_sample(
    logits: Tensor,
    uncond: Tensor,
    seeds: Tensor,
    positions: Tensor,
    guidance: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    codes: Tensor,
    threads: int,
    isa: str = "",
) -> None: ...

class Decoder:
    def __init__(
        self,
        layers: Sequence[Sequence[Tensor]],
        scales: Sequence[Sequence[Tensor]],
        norm: Tensor,
        head: Tensor,
        token_embedding: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        kv_heads: int,
        eps: float,
    ) -> None: ...
    def run(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        block_table: Tensor,
        positions: Tensor,
        seeds: Tensor,
        guidance: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        forced: Tensor | None,
        codes: Tensor,
        uncond: Tensor | None,
        threads: int,
        isa: str = "",
    ) -> None: ...
    def logits(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        block_table: Tensor,
        positions: Tensor,
        out: Tensor,
        threads: int,
        isa: str = "",
    ) -> None: ...
