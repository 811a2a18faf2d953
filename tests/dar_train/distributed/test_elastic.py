"""A rank is killed; torchrun starts all again and the run ends as if nothing had happened."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dar_train.distributed import SHARED_STORE
from dar_train.recipes import TokenizerRecipe
from dar_train.tokenizer_loop import train_tokenizer

SCRIPT = Path(__file__).with_name("dying_rank.py")


def torchrun(restarts: int, recipe: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", str(restarts), str(SCRIPT), str(recipe),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", SHARED_STORE: "1"}
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=400,
    )  # fmt: skip


def losses(run: Path) -> list[float]:
    """Of each step, the last word on it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = {e["step"]: e["loss"] for e in lines if e["kind"] == "train"}
    return [train[step] for step in range(1, 7)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_killed_rank_is_restarted(kind, pictures, model_files, tmp_path) -> None:
    values = {
        "data": str(pictures), "model": model_files["tokenizer"], "steps": 6, "save_steps": 2,
        "log_steps": 1, "batch": 4, "warmup": 1, "lr": 1e-3, "precision": "fp32", "device": "cpu",
        "workers": 0, "eval_pictures": 2, "ema": 0.5, "parallel": kind, "threads": 1,
    }  # fmt: skip
    alone = tmp_path / "alone"
    train_tokenizer(TokenizerRecipe(**values | {"data": pictures, "out": alone}))
    together = tmp_path / "together"
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(values | {"out": str(together)}))

    failed = torchrun(0, recipe)
    assert failed.returncode != 0
    assert "Signal 9 (SIGKILL)" in failed.stdout
    assert not (together / "tokenizer").exists()
    shutil.rmtree(together)

    restarted = torchrun(1, recipe)
    assert restarted.returncode == 0, restarted.stdout
    assert "step 2, " in restarted.stdout  # resumed, not begun anew
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    expected = load_file(alone / "tokenizer" / "model.safetensors")
    got = load_file(together / "tokenizer" / "model.safetensors")
    assert got.keys() == expected.keys()
    difference = torch.stack([(got[n] - expected[n]).float().norm() for n in got]).norm()
    size = torch.stack([tensor.float().norm() for tensor in expected.values()]).norm()
    assert difference < 2**-9 * size  # stored in bf16
