"""Groups of codes on a CPU: one native call draws Q codes of every request.

x, keys and values of a row depend on that row alone, so requests at any position, guided or not,
with settings of their own, share a call. Memory bound: every weight of the prior once a code for
all rows; no operator call within the group.
"""

from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_fast.engine.rows import TokenRow
from dar_fast.models import Prior
from dar_fast.models.decoding import decoder_weights, filter_settings
from dar_kernels.decode_step import NativeDecoder
from dar_kernels.decoder_weights import DecoderPages, DecoderWeights, new_decoder_pages
from dar_kernels.pages import PAGE_SIZE

NO_PAGE = -1


def check_rows(rows: Sequence[TokenRow], codes: Tensor, num_pages: int) -> int:
    """Q of rows that fit codes `[slots, N]` and each other; slots in any number but twice.

    Raises:
        ValueError: where there are none, or one does not fit.
    """
    if not rows:
        raise ValueError("rows: expected at least 1, got none")
    slots, N = codes.shape
    Q = len(rows[0].guidance)
    if len({row.slot for row in rows}) < len(rows):
        raise ValueError(f"rows: expected different slots, got {[row.slot for row in rows]}")
    for row in rows:
        end = row.position + Q
        if len(row.guidance) != Q or Q < 1 or len(row.forced) > Q:
            raise ValueError(
                f"rows: expected {Q} >= 1 scales and at most as many forced codes, "
                f"got {len(row.guidance)} and {len(row.forced)}"
            )
        if not 0 <= row.slot < slots or row.position < 0 or end > N:
            raise ValueError(
                f"rows: expected a slot in [0, {slots}) and {Q} codes within [0, {N}), "
                f"got slot {row.slot} and position {row.position}"
            )
        least, most = -(-end // PAGE_SIZE), -(-N // PAGE_SIZE)
        for pages in (row.pages, row.pages if row.null_pages is None else row.null_pages):
            inside = all(0 <= page < num_pages for page in pages)
            if not least <= len(pages) <= most or not inside:
                raise ValueError(
                    f"rows: expected {least} to {most} pages in [0, {num_pages}), got {pages}"
                )
    return Q


def forced_codes(row: TokenRow) -> list[int]:
    """The codes of a group, -1 where one is to be drawn."""
    return [*row.forced, *[-1] * (len(row.guidance) - len(row.forced))]


class NativeTokens:
    """Draws groups on the CPU; see `TokenRunner`. A request's codes are the same in any batch.

    Args:
        prior: on the CPU; its embeddings are read where they are.
        codes: int64 `[slots, N]`, of the slots; read behind a group and written at its end.
        num_pages: of 32 keys and values a layer.
        weights: of the prior, as they are or quantised to int8; None: as they are.
        page_dtype: fp32 or bf16; None: fp32 where the prior is, else bf16.
        threads: None: those of the calling thread, torch.get_num_threads().

    Raises:
        TypeError, ValueError: where weights or pages cannot be.
        UnavailableError: where the C++ ops were not built, or the weights are fp8.
    """

    def __init__(
        self,
        prior: Prior,
        codes: Tensor,
        num_pages: int,
        *,
        weights: DecoderWeights | None = None,
        page_dtype: torch.dtype | None = None,
        threads: int | None = None,
    ) -> None:
        self.prior, self.codes, self.threads = prior, codes, threads
        weights = decoder_weights(prior) if weights is None else weights
        self.decoder = NativeDecoder(weights)
        if page_dtype is None:
            wide = prior.class_embedding.weight.dtype == torch.float32
            page_dtype = torch.float32 if wide else torch.bfloat16
        self.pages: DecoderPages = new_decoder_pages(weights, num_pages, page_dtype)

    @torch.no_grad()
    def run(self, rows: Sequence[TokenRow]) -> Tensor:
        """Codes int64 `[B, Q]`, which are also in the slots' codes.

        Raises:
            ValueError: where a row does not fit.
        """
        Q = check_rows(rows, self.codes, self.pages.keys.shape[1])
        B, guided = len(rows), [row for row in rows if row.null_pages is not None]
        null_pages = [row.null_pages for row in rows if row.null_pages is not None]
        order = iter(range(B, B + len(guided)))
        uncond = [-1 if row.null_pages is None else next(order) for row in rows]
        lists = [*(row.pages for row in rows), *null_pages]
        width = max(map(len, lists))
        table = [[*pages, *[NO_PAGE] * (width - len(pages))] for pages in lists]
        filters = [filter_settings(row.top_k, row.top_p) for row in rows]
        slots = torch.tensor([row.slot for row in rows])
        positions = torch.tensor([row.position for row in rows])
        forced = None
        if any(row.forced for row in rows):
            forced = torch.tensor([forced_codes(row) for row in rows])
        drawn = self.decoder.run(
            self._inputs(rows, guided), self.pages, torch.tensor(table, dtype=torch.int32),
            positions, steps=Q, seeds=torch.tensor([row.seed for row in rows]),
            guidance=torch.tensor([row.guidance for row in rows], dtype=torch.float32),
            temperature=torch.tensor([row.temperature for row in rows], dtype=torch.float32),
            top_k=torch.tensor([k for k, _ in filters], dtype=torch.int32),
            top_p=torch.tensor([p for _, p in filters], dtype=torch.float32),
            uncond=torch.tensor(uncond), forced=forced, threads=self.threads,
        )  # fmt: skip
        self.codes[slots[:, None], positions[:, None] + torch.arange(Q)] = drawn
        return drawn

    def _inputs(self, rows: Sequence[TokenRow], guided: Sequence[TokenRow]) -> Tensor:
        """The first inputs of the group, fp32 `[R, D]`: the class, or the code before."""
        all_rows = list(chain(rows, guided))
        null = self.prior.config.null_class
        labels = torch.tensor([*(row.label for row in rows), *[null] * len(guided)])
        starts = torch.tensor([row.position for row in all_rows])
        slots = torch.tensor([row.slot for row in all_rows])
        before = self.codes[slots, (starts - 1).clamp_min(0)]
        classes = F.embedding(labels, self.prior.class_embedding.weight)
        tokens = F.embedding(before, self.prior.token_embedding.weight)
        return torch.where((starts == 0)[:, None], classes, tokens).float()

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the first page of each pair to the second, in every layer.

        Raises:
            ValueError: where a page does not exist, or is the target of two pairs.
        """
        self.pages.copy(pairs)


__all__ = ["NativeTokens", "check_rows", "forced_codes"]
