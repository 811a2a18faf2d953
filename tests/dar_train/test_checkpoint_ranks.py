"""States of several ranks: saved on two, resumed on one or four; where one fails, all say so."""

from multiprocessing import get_context
from pathlib import Path
from typing import Any

import checkpoint_ranks
import pytest

PATIENCE = 120  # seconds
WARM = ["dar_train.checkpoints", "torch.distributed.fsdp", "torch._dynamo"]  # imported once


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "run" / "states"


def on_ranks(world: int, work: str, tmp_path: Path, *args: Any) -> None:
    context = get_context("forkserver")
    context.set_forkserver_preload(WARM)
    meeting = tmp_path / f"meeting-{len(list(tmp_path.iterdir()))}"
    meeting.mkdir()
    ranks = [
        context.Process(
            target=checkpoint_ranks.in_group,
            args=(getattr(checkpoint_ranks, work), rank, world, meeting / "store", *args),
        )
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(PATIENCE)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [0] * world


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_shards_of_two_ranks_resume_on_one_and_on_four(tmp_path, folder, asynchronous) -> None:
    on_ranks(2, "save", tmp_path, "fsdp", folder, asynchronous)
    files = {file.name for file in (folder / "step-00000002").glob("model.*")}
    assert files == {"model.0.safetensors", "model.1.safetensors"}
    on_ranks(1, "load", tmp_path, "plain", folder, 2)
    on_ranks(4, "load", tmp_path, "fsdp", folder, 1)
    on_ranks(2, "load", tmp_path, "ddp", folder, 4)
    on_ranks(2, "load", tmp_path, "fsdp", folder, 2)


def test_replicas_share_the_writing(tmp_path, folder) -> None:
    on_ranks(2, "save", tmp_path, "ddp", folder, False)
    sizes = [
        sum(
            file.stat().st_size for file in (folder / "step-00000002").glob(f"*.{rank}.safetensors")
        )
        for rank in (0, 1)
    ]
    assert max(sizes) < 1.5 * min(sizes)
    on_ranks(4, "load", tmp_path, "fsdp", folder, 2)
    on_ranks(1, "load", tmp_path, "plain", folder, 4)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_where_one_rank_fails_all_say_so(tmp_path, folder, asynchronous) -> None:
    on_ranks(2, "fail", tmp_path, folder, asynchronous)


def test_ranks_refuse_and_fall_back_together(tmp_path, folder) -> None:
    on_ranks(2, "disagree", tmp_path, folder)


def test_a_rank_that_is_gone(tmp_path, folder) -> None:
    on_ranks(2, "die", tmp_path, folder)
