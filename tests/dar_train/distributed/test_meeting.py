"""How ranks meet: the environment, the device, and errors that say who is missing."""

import pytest
import torch
import torch.distributed as dist

from dar_train.distributed import (
    Ranks,
    RanksError,
    join,
    joined,
    leave,
    lost_rank,
    ranks_of_environment,
)

CPU = torch.device("cpu")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def set_ranks(monkeypatch, rank: object, world: object, local: object = 0) -> None:
    for name, value in zip(NAMES, (rank, world, local), strict=False):
        monkeypatch.setenv(name, str(value))


def test_alone_nothing_meets() -> None:
    with joined("cpu") as ranks:
        assert ranks == Ranks(0, 1, 0, CPU)
        assert ranks.first
        assert not dist.is_initialized()
    leave()


def test_as_torchrun_says(monkeypatch) -> None:
    set_ranks(monkeypatch, 5, 8, 1)
    ranks = ranks_of_environment(CPU)
    assert ranks == Ranks(5, 8, 1, CPU)
    assert not ranks.first


def test_each_rank_has_its_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    set_ranks(monkeypatch, 5, 8, 1)
    assert ranks_of_environment(torch.device("cuda")).device == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device: expected cuda, as each rank has its own, got c"):
        ranks_of_environment(torch.device("cuda", 0))
    set_ranks(monkeypatch, 5, 8, 2)
    with pytest.raises(ValueError, match="LOCAL_RANK: expected one of 2 GPUs, got 2"):
        ranks_of_environment(torch.device("cuda"))
    set_ranks(monkeypatch, 0, 1)
    assert ranks_of_environment(torch.device("cuda", 1)).device == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("rank", "world", "message"),
    [
        (2, 2, "RANK: expected one below WORLD_SIZE 2, got 2"),
        ("x", 2, "RANK: expected an integer >= 0, got 'x'"),
        (0, -1, "WORLD_SIZE: expected an integer >= 0, got '-1'"),
    ],
)
def test_an_environment_that_does_not_fit(rank, world, message, monkeypatch) -> None:
    set_ranks(monkeypatch, rank, world)
    with pytest.raises(ValueError, match=message):
        join("cpu")


def test_bad_timeout() -> None:
    with pytest.raises(ValueError, match="timeout_minutes: expected a positive number, got 0"):
        join("cpu", timeout_minutes=0)


def test_restarts_need_a_store_of_their_own(monkeypatch) -> None:
    set_ranks(monkeypatch, 1, 2)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        join("cpu")


def test_the_others_do_not_come(monkeypatch) -> None:
    set_ranks(monkeypatch, 1, 2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(RanksError, match=r"rank 1 of 2: expected the others at 127\.0\.0\.1:1 wit"):
        join("cpu", timeout_minutes=0.02)
    assert not dist.is_initialized()


def test_ranks_that_a_launcher_made_meet_stay(monkeypatch) -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        set_ranks(monkeypatch, 0, 2)
        with pytest.raises(
            ValueError, match="expected 0 and 1, as the ranks have met, got 0 and 2"
        ):
            join("cpu")
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        with joined("cpu") as ranks:
            assert ranks.world == 2
        assert dist.is_initialized()
    finally:
        leave()
    assert not dist.is_initialized()


GLOO = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3"
LATE = "[gloo/unbound_buffer.cc:78] Timed out waiting 60000ms for recv operation to complete"


@pytest.mark.parametrize("message", [GLOO, LATE])
def test_a_lost_rank_is_named(message) -> None:
    with pytest.raises(RanksError, match="rank 0 of 1: another rank died or did not answer") as got:
        with joined("cpu"):
            raise RuntimeError(message)
    assert message in str(got.value)


def test_other_errors_pass() -> None:
    assert lost_rank(dist.DistNetworkError("x"))
    assert not lost_rank(ValueError(GLOO))
    with pytest.raises(RuntimeError, match="mat1 and mat2"), joined("cpu"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
