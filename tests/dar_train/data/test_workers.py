"""Processes that read: the same stream as without, across restarts, and deaths that are told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from data_helpers import Settings, folder, ranks

from dar_train.data import ReadingError, picture_batches
from dar_train.data import feeds as feeds_module
from dar_train.data import loading as loading_module

SIZE = 12


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(loading_module, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(feeds_module, "PIECE", 2)
    folder(tmp_path)
    (tmp_path / "a" / "003.png").write_bytes(b"damaged")
    return tmp_path


def batches_of(place, workers, rank=0, world=1, **changes):
    recipe = Settings(place, workers=workers)
    how = {"crop": True, "flip": True} | changes
    return picture_batches(recipe, SIZE, ranks(rank, world), **how)


def test_saved_with_two_ranks_and_workers_resumed_alone_and_back(place) -> None:
    alone = batches_of(place, 0)
    expected = [alone.next() for _ in range(7)]
    torch.manual_seed(0)
    drawn = torch.rand(2)
    torch.manual_seed(0)
    both = [batches_of(place, 2, rank, 2) for rank in range(2)]
    for k in range(3):
        parts = [batches.next() for batches in both]
        for name, tensor in expected[k]._asdict().items():
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), tensor)
    assert torch.equal(torch.rand(2), drawn)
    state = both[0].state_dict()
    assert state == both[1].state_dict()
    found = [line for batches in both for line in batches.skipped()]
    assert set(found) <= set(alone.skipped())
    for batches in both:
        batches.close()
    resumed = batches_of(place, 0)
    resumed.load_state_dict(state)
    for k in (3, 4):
        assert torch.equal(resumed.next().images, expected[k].images)
    back = batches_of(place, 1)
    back.load_state_dict(resumed.state_dict())
    for k in (5, 6):
        assert torch.equal(back.next().images, expected[k].images)
    back.close()


def test_a_killed_worker_is_named_and_nothing_is_lost(place) -> None:
    alone = batches_of(place, 0)
    expected = [alone.next() for _ in range(40)]
    batches = batches_of(place, 2)
    first = batches.next()
    assert torch.equal(first.images, expected[0].images)
    victim = batches._feed._pieces._workers[1]
    os.kill(victim.pid, signal.SIGINT)  # as from a terminal: left to the run itself
    os.kill(victim.pid, signal.SIGTERM)
    time.sleep(0.2)
    assert victim.is_alive()
    os.kill(victim.pid, signal.SIGKILL)
    got = 1
    with pytest.raises(ReadingError, match=rf"worker 1 \(process {victim.pid}\) ended by SIGKILL"):
        for k in range(1, 40):  # what it had read already still comes
            assert torch.equal(batches.next().images, expected[k].images)
            got += 1
    assert batches.state_dict()["position"] == 6 * got
    assert torch.equal(batches.next().images, expected[got].images)
    batches.close()


def test_labels_and_damage_come_out_of_workers_as_they_are(place, monkeypatch) -> None:
    for file in place.rglob("*.png"):
        file.write_bytes(b"damaged")
    batches = batches_of(place, 1)
    with pytest.raises(ReadingError, match=r"^data: expected a readable picture among 100 in a r"):
        batches.next()
    assert len(batches.skipped()) == 18
    batches.close()


LEAVES = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from data_helpers import Settings, ranks
from dar_train.data import loading, picture_batches
loading.RESIDENT_BYTES = 0
if __name__ == "__main__":
    recipe = Settings(Path(sys.argv[1]), workers=1)
    kept = picture_batches(recipe, 12, ranks(), crop=True, flip=True)
    kept.next()
    sys.exit(f"workers {kept._feed._pieces._workers[0].pid}")  # without closing anything
"""


@pytest.mark.slow  # as long as GRACE
def test_a_process_that_leaves_without_closing_ends_and_so_do_its_workers(place) -> None:
    script = place / "leaves.py"
    script.write_text(LEAVES)
    command = [sys.executable, script, place, Path(__file__).parent]
    left = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert left.returncode == 1, left.stderr
    worker = int(left.stderr.split("workers ")[1])
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()
