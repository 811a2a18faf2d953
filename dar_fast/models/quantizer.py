"""Vector quantisation: z = W_in x and codebook l2-normalised, code = nearest row, lowest of ties.

vq = mean |e - sg(z)|^2, commit = 0.25 mean |sg(e) - z|^2, straight-through gradient to z.
2 N V C FLOPs a picture. Source: arXiv 2505.23660, §3.1 (codebook of Yu et al., 2022).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_fast.config import TokenizerConfig
from dar_kernels import vq_losses, vq_nearest

COMMITMENT = 0.25


class Quantized(NamedTuple):
    codes: Tensor  # [B, N] int64
    embedding: Tensor  # [B, N, C], the normalised codeword with the straight-through gradient
    vq: Tensor  # [B, N], codebook loss a token
    commit: Tensor  # [B, N], commitment loss a token, weighted


class Quantizer(nn.Module):
    """Rows of the encoder `[B, N, D]` to codes, and codes to rows for the token decoder."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        V, C = config.codebook_size, config.code_dim
        self.proj_in = nn.Linear(config.encoder_dim, C, bias=False)
        self.codebook = nn.Parameter(F.normalize(torch.randn(V, C), dim=-1))
        self.proj_out = nn.Linear(C, config.decoder_dim, bias=False)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Codes `[B, N]` of pre-quantised rows `[B, N, C]`, which need not be normalised."""
        rows = z.detach().flatten(0, 1).to(self.codebook.dtype)  # autocast may have lowered it
        return vq_nearest(rows, self.codebook.detach()).view(z.shape[:2])

    def quantize(self, z: Tensor, noise: Tensor | None = None) -> Quantized:
        """Codes, straight-through embeddings and losses of pre-quantised rows `[B, N, C]`.

        With `noise` `[B, N, C]` nothing is quantised: the rows pass with that noise and no VQ loss,
        for the first steps of a training run, before a codebook is worth having.
        """
        codes = self.nearest(z)
        z = z.to(torch.promote_types(z.dtype, torch.float32))  # autocast may have lowered it
        if noise is not None:
            free = (0 * self.codebook.sum()).float().expand(codes.shape)  # ranks expect a gradient
            return Quantized(codes, F.normalize(F.normalize(z, dim=-1) + noise, dim=-1), free, free)
        losses = vq_losses(z.flatten(0, 1), self.codebook, codes.flatten(), commitment=COMMITMENT)
        return Quantized(
            codes,
            losses.embedding.view(z.shape),
            *(loss.view(codes.shape) for loss in (losses.vq, losses.commit)),
        )

    def embed(self, codes: Tensor) -> Tensor:
        """Rows `[B, n, D]` for the token decoder from codes `[B, n]`."""
        e = F.normalize(F.embedding(codes, self.codebook), dim=-1)
        return self.proj_out(e)
