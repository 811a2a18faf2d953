"""Two processes encode and train as one does."""

import json
import socket
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
from prior_ranks import one_rank
from safetensors.torch import load_file

from dar_fast.config import TokenizerConfig
from dar_fast.models import Tokenizer
from dar_train.export import export_component
from dar_train.prior_loop import train_prior


@pytest.mark.slow
def test_two_ranks_encode_and_train_as_one(prior_recipe, model_files, tmp_path) -> None:
    with open(model_files["tokenizer"]) as file:
        config = TokenizerConfig.from_dict(json.load(file))
    torch.manual_seed(0)
    tokenizer = export_component(Tokenizer(config, 0.1), tmp_path / "tokenizer")
    alone = prior_recipe(
        tokenizer=tokenizer, flip=True, views=1, batch=8, dropout=0.0, workers=0, eval_pictures=2
    )
    assert train_prior(alone)
    together = replace(alone, out=tmp_path / "together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_rank, (2, port, together), nprocs=2)
    for name in ("codes.npy", "labels.npy", "held_out.npy", "manifest.json"):
        written = (together.out / "tokens" / name).read_bytes()
        assert written == (alone.out / "tokens" / name).read_bytes()
    expected, actual = (load_file(r.out / "prior" / "model.safetensors") for r in (alone, together))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0.02, atol=1e-3)  # bf16
    figures = [
        [json.loads(line) for line in (r.out / "metrics.jsonl").read_text().splitlines()]
        for r in (alone, together)
    ]
    assert [line["kind"] for line in figures[1]] == [line["kind"] for line in figures[0]]
    assert figures[1][-1]["cross_entropy"] == pytest.approx(
        figures[0][-1]["cross_entropy"], rel=1e-4
    )
