"""Requests of any kind in one native call: each as if it were alone, to the bit."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from decoders import ODD, PLAIN, Shape, clone, make_pages, make_settings, make_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dar_kernels import native
from dar_kernels.decode_step import NativeDecoder
from dar_kernels.decoder_weights import DecoderPages, DecoderWeights

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="needs dar_kernels._native")


class Mix(NamedTuple):
    """What `run` takes of B requests, some of them guided, some with given codes."""

    weights: DecoderWeights
    x: Tensor
    pages: DecoderPages
    table: Tensor
    positions: Tensor
    uncond: Tensor
    forced: Tensor

    def rows(self, b: int) -> Tensor:
        """Of request b in x and table."""
        return torch.tensor([b, *(row for row in [int(self.uncond[b])] if row >= 0)])


def make_mix(guided: list[bool], n: int, seed: int, shape: Shape = ODD) -> Mix:
    """Null rows in random order; a third of the requests without given codes, others with some."""
    generator = torch.Generator().manual_seed(seed)
    B, nulls = len(guided), sum(guided)
    weights = make_weights(shape, seed=seed)
    uncond = torch.full((B,), -1)
    uncond[torch.tensor(guided)] = B + torch.randperm(nulls, generator=generator)
    pages, table = make_pages(weights, B + nulls, torch.float32, seed)
    known = torch.randint(-n // 2, n + 1, (B, 1), generator=generator)
    codes = torch.randint(shape.V, (B, n), generator=generator)
    return Mix(
        weights,
        torch.randn(B + nulls, shape.D, generator=generator),
        pages,
        table,
        torch.randint(0, shape.N - n, (B,), generator=generator),
        uncond,
        torch.where(torch.arange(n) < known, codes, -1),
    )


@settings(max_examples=25, deadline=None)
@given(
    guided=st.lists(st.booleans(), min_size=1, max_size=9), n=st.integers(1, 5),
    seed=st.integers(0, 99), int8=st.booleans(), shape=st.sampled_from([ODD, PLAIN]),
    codes_as_x=st.booleans(),
)  # fmt: skip
def test_a_mix_is_its_requests_one_by_one(guided, n, seed, int8, shape, codes_as_x):
    """Guided or not, at positions, with settings and given codes of their own: codes and pages."""
    B = len(guided)
    mix, options = make_mix(guided, n, seed, shape), make_settings(B, n, seed)
    weights, x, pages, table, positions, uncond, forced = mix
    decoder = NativeDecoder(weights.quantize(torch.int8) if int8 else weights)
    if codes_as_x:
        x = torch.arange(B) * 5 % shape.V
    after = clone(pages)
    together = decoder.run(
        x, after, table, positions, steps=n, uncond=uncond, forced=forced, threads=2,
        **options._asdict(),
    )  # fmt: skip
    assert 0 <= together.min() <= together.max() < shape.V
    assert torch.equal(together[forced >= 0], forced[forced >= 0])
    for b in range(B):
        rows, own = mix.rows(b), clone(pages)
        alone = decoder.run(
            x[b : b + 1] if codes_as_x else x[rows], own, table[rows], positions[b : b + 1],
            steps=n, uncond=torch.tensor([1]) if guided[b] else None, forced=forced[b : b + 1],
            threads=1, **options.rows(slice(b, b + 1))._asdict(),
        )  # fmt: skip
        assert torch.equal(alone[0], together[b])
        written = table[rows].flatten().long()
        for whole, part in zip(after[:2], own[:2], strict=True):
            assert torch.equal(whole[:, written], part[:, written])


def test_a_null_row_counts_only_above_scale_one():
    """A request whose scales are at most 1 draws the same codes with and without a null row."""
    B, n = 3, 6
    weights, x, pages, table, positions, uncond, _ = make_mix([True] * B, n, 4)
    options = make_settings(B, n)
    options = options._replace(guidance=options.guidance.clamp_max(1))
    options.guidance[1] = 3
    runs = {}
    for guided in ((0, 1, 2), (1,), ()):
        rows = torch.tensor([*range(B), *(int(uncond[b]) for b in guided)])
        own = torch.full((B,), -1)
        own[list(guided)] = torch.arange(B, len(rows))
        runs[guided] = NativeDecoder(weights).run(
            x[rows], clone(pages), table[rows], positions, steps=n, uncond=own,
            **options._asdict(),
        )  # fmt: skip
    assert torch.equal(runs[0, 1, 2], runs[1,])
    assert torch.equal(runs[1,][[0, 2]], runs[()][[0, 2]])
    assert not torch.equal(runs[1,][1], runs[()][1])


def resident() -> int:
    """Bytes of mapped files that this process has touched."""
    (line,) = (x for x in Path("/proc/self/status").read_text().split("\n") if "RssFile" in x)
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_step_with_all_codes_given_does_not_read_the_head(tmp_path):
    """Seen by the pages of a mapped file that holds the head: a drawn code touches all of them."""
    V, D = 2**17, 32
    shape = Shape(layers=1, D=D, heads=2, kv_heads=1, F=32, V=8)
    mix = make_mix([True, False, True], 4, 0, shape)
    head = torch.from_file(str(tmp_path / "head"), shared=True, size=V * D).view(V, D)
    decoder = NativeDecoder(mix.weights._replace(head=head, token_embedding=torch.zeros(V, D)))
    forced = torch.arange(12).view(3, 4)
    options = make_settings(3, 4)
    touched = []
    for codes_given in (forced, torch.where(forced == 6, -1, forced)):
        before = resident()
        codes = decoder.run(
            mix.x, clone(mix.pages), mix.table, mix.positions, steps=4, uncond=mix.uncond,
            forced=codes_given, **options._asdict(),
        )  # fmt: skip
        touched.append(resident() - before)
        assert torch.equal(codes[codes_given >= 0], codes_given[codes_given >= 0])
    size = head.numel() * head.itemsize
    assert touched[0] < size / 8
    assert touched[1] > size / 2
