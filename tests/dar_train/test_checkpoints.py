"""States on disk: what comes back, what stays when something breaks, what is refused."""

import errno
import json
import logging
import os
import resource
import shutil
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from dar_train import checkpoints
from dar_train.checkpoints import (
    CheckpointError,
    Checkpoints,
    TrainState,
    find_intact,
    read_weights,
    shards,
)
from dar_train.distributed import Ranks

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def make_model(width: int = 8) -> nn.Module:
    blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), *blocks)
    model.register_buffer("small", torch.randn(3).bfloat16())
    return model


def make_state(seed: int, kind: str = "adamw", width: int = 8) -> TrainState:
    torch.manual_seed(seed)
    model = make_model(width)
    if kind == "muon":
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        optimizers = [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(vectors, fused=True)]
    else:
        optimizers = [torch.optim.AdamW(model.parameters())]
    extra = {"idle": torch.arange(5, dtype=torch.int32), "seen": torch.tensor(seed)}
    return TrainState(model, make_model(width), optimizers, extra)


def train(state: TrainState, steps: int = 1) -> None:
    for _ in range(steps):
        state.model(torch.randn(6, 4)).square().mean().backward()
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Copies of everything, by names that do not depend on the code under test."""
    found = {f"extra {name}": tensor for name, tensor in state.extra.items()}
    for part, module in (("model", state.model), ("averaged", state.averaged)):
        found |= {f"{part} {name}": tensor for name, tensor in module.state_dict().items()}
    names = {id(p): name for name, p in state.model.named_parameters()}
    for i, optimizer in enumerate(state.optimizers):
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                found[f"optimizer {i} {names[id(parameter)]} {key}"] = value
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "run" / "states"


def saved(
    folder: Path, steps: tuple[int, ...] = (1, 2), **options
) -> tuple[TrainState, Checkpoints]:
    """A folder with states, one optimizer step between two of them."""
    state = make_state(0)
    kept = Checkpoints(folder, ALONE, **options)
    for step in steps:
        train(state)
        kept.save(step, state, {"samples": 10 * step})
    kept.wait()
    return state, kept


# what comes back


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("steps", [0, 3])
def test_everything_comes_back(folder, kind, asynchronous, steps) -> None:
    state = make_state(0, kind)
    train(state, steps)
    writer = Checkpoints(folder, ALONE, asynchronous=asynchronous)
    path = writer.save(steps, state, {"samples": 7, "nested": {"a": [1.5, None]}})
    writer.wait()
    other = make_state(1, kind)
    train(other, 2)
    reader = Checkpoints(folder, ALONE)
    assert reader.find() == path == writer.last
    record = reader.load(path, other)
    assert record | {"samples": 7, "nested": {"a": [1.5, None]}, "step": steps} == record
    assert same(tensors(other), tensors(state))
    assert reader.last == path
    torch.manual_seed(9)
    train(state)
    torch.manual_seed(9)
    train(other)
    assert same(tensors(other), tensors(state))


def test_an_asynchronous_save_holds_the_weights_of_its_call(folder) -> None:
    state = make_state(0)
    writer = Checkpoints(folder, ALONE, asynchronous=True)
    expected = []
    for step in (1, 2, 3):
        train(state)
        expected.append(tensors(state))
        writer.save(step, state, {})
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.fill_(float("nan"))
            for name, parameter in state.model.named_parameters():
                parameter.copy_(expected[-1][f"model {name}"])
        state.extra["idle"].add_(1)
        state.extra["idle"].sub_(1)
    writer.wait()
    for path, tensors_then in zip(sorted(folder.glob("step-*")), expected[1:], strict=True):
        other = make_state(1)
        Checkpoints(folder, ALONE).load(path, other)
        assert same(tensors(other), tensors_then)


def test_tied_and_strided_weights_come_back(folder) -> None:
    def tied(seed: int) -> TrainState:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        strided = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        views = torch.randn(6)
        return TrainState(model, strided, [], {"a": views[:4], "b": views[2:]})

    state, other = tied(0), tied(1)
    writer = Checkpoints(folder, ALONE)
    writer.load(writer.save(1, state, {}), other)
    assert same(tensors(other), tensors(state))


def test_a_compiled_model_reads_the_states_of_a_bare_one(folder) -> None:
    state = make_state(0)
    train(state)
    other = make_state(1)
    for i in (2, 3):
        other.model[i] = torch.compile(other.model[i], backend="eager")
    assert any("_orig_mod" in name for name, _ in other.model.named_parameters())
    writer = Checkpoints(folder, ALONE)
    writer.load(writer.save(1, state, {}), other)
    for mine, theirs in zip(other.model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(
            other.optimizers[0].state[mine]["exp_avg"], state.optimizers[0].state[theirs]["exp_avg"]
        )


def test_files_are_safetensors_and_json_only(folder) -> None:
    kept = saved(folder, (1,))[1]
    names = {file.name for file in kept.last.iterdir()}
    assert names == {
        "model.0.safetensors", "averaged.0.safetensors", "extra.0.safetensors",
        "optimizer-0.0.safetensors", "state.json", "manifest.json",
    }  # fmt: skip
    json.loads((kept.last / "state.json").read_text())
    for file in kept.last.glob("*.safetensors"):
        header = int.from_bytes(file.read_bytes()[:8], "little")
        json.loads(file.read_bytes()[8 : 8 + header])
        assert (
            file.stat().st_mode & 0o777 == kept.last.joinpath("state.json").stat().st_mode & 0o777
        )


@pytest.mark.parametrize("averaged", [False, True])
def test_weights_alone(folder, averaged) -> None:
    state, kept = saved(folder)
    weights = read_weights(kept.last, averaged=averaged)
    module = state.averaged if averaged else state.model
    assert same(weights, dict(module.state_dict()))


def test_without_an_average_the_weights_are_the_trained_ones(folder) -> None:
    state = make_state(0)._replace(averaged=nn.Module())
    kept = Checkpoints(folder, ALONE)
    path = kept.save(1, state, {})
    assert same(read_weights(path), dict(state.model.state_dict()))
    other = make_state(1)._replace(averaged=nn.Module())
    kept.load(path, other)
    assert same(tensors(other), tensors(state))


# which states stay


def test_the_newest_and_the_named_ones_stay(folder) -> None:
    state = make_state(0)
    kept = Checkpoints(folder, ALONE, keep=2)
    for step in range(1, 7):
        pointers = ("latest", "stable") if step == 2 else ("latest",)
        kept.save(step, state, {}, pointers=pointers)
    assert sorted(p.name for p in folder.glob("step-*")) == [
        "step-00000002", "step-00000005", "step-00000006",
    ]  # fmt: skip
    assert kept.find("stable").name == "step-00000002"
    assert kept.find().name == "step-00000006"
    assert kept.find("other") is None


def test_a_named_state_is_never_written_over(folder) -> None:
    state = make_state(0)
    kept = Checkpoints(folder, ALONE)
    first = kept.save(3, state, {"which": 1}, pointers=("stable", "latest"))
    train(state)
    second = kept.save(3, state, {"which": 2})
    assert second.name == "step-00000003.1"
    assert checkpoints.read_record(first)["which"] == 1
    assert checkpoints.read_record(kept.find())["which"] == 2


def test_a_fresh_run_in_an_old_folder_keeps_its_own_states(folder) -> None:
    saved(folder, (100, 200))
    kept = Checkpoints(folder, ALONE)
    for step in (1, 2):
        kept.save(step, make_state(1), {})
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000001", "step-00000002"]


def test_a_state_without_its_pointer_is_replaced(folder) -> None:
    """As a kill between the renaming and the pointer leaves it."""
    state, _ = saved(folder)
    (folder / "latest").write_text("step-00000001\n")
    kept = Checkpoints(folder, ALONE)
    assert kept.find().name == "step-00000001"
    kept.save(2, state, {"again": True})
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000001", "step-00000002"]
    assert checkpoints.read_record(kept.find())["again"]


def test_without_any_pointer_the_newest_state_is_found(folder) -> None:
    _, kept = saved(folder)
    (folder / "latest").unlink()
    assert kept.find() == folder / "step-00000002"
    assert kept.find("stable") is None


def test_left_overs_go_and_foreign_files_stay(folder) -> None:
    saved(folder)
    foreign = [folder / "notes.txt", folder / "step-final" / "x", folder / "0"]
    foreign += [folder / ".step-mine" / "x", folder / "step-00000002" / "evil.pkl"]
    for file in foreign:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"\x80\x04\x95 not for us")
    for name in (".step-00000003.saving", ".step-00000001.dropped", ".step-00000003.1.saving"):
        (folder / name).mkdir()
        (folder / name / "model.0.safetensors").write_bytes(b"half")
    kept = Checkpoints(folder, ALONE, keep=1)
    assert sorted(p.name for p in folder.glob(".step-*")) == [".step-mine"]
    kept.load(kept.find(), make_state(1))
    assert all(file.is_file() for file in foreign)
    kept.save(3, make_state(1), {})
    assert all(file.is_file() for file in foreign[:-1])
    assert kept.find().name == "step-00000003"


# damage


@pytest.fixture(scope="module")
def two_states(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "states"
    saved(folder, (1, 2))
    return folder


FILES = [
    "state.json", "manifest.json", "model.0.safetensors", "averaged.0.safetensors",
    "extra.0.safetensors", "optimizer-0.0.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(two_states, name, where, bit) -> None:
    file = two_states / "step-00000002" / name
    good = file.read_bytes()
    bad = bytearray(good)
    bad[int(where * len(good))] ^= 1 << bit
    file.write_bytes(bad)
    try:
        assert find_intact(two_states) == two_states / "step-00000001"
    finally:
        file.write_bytes(good)
    assert find_intact(two_states) == two_states / "step-00000002"


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_pointer_costs_no_state(two_states, where, bit) -> None:
    good = (two_states / "latest").read_bytes()
    bad = bytearray(good)
    bad[int(where * len(good))] ^= 1 << bit
    (two_states / "latest").write_bytes(bad)
    try:
        assert find_intact(two_states) in set(two_states.glob("step-*"))
    finally:
        (two_states / "latest").write_bytes(good)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "longer", "empty", "missing", "a folder"])
def test_a_damaged_state_is_named_and_the_one_before_taken(folder, caplog, name, how) -> None:
    _, kept = saved(folder)
    file = kept.last / name
    content = file.read_bytes()
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how != "missing":
        file.write_bytes({"truncated": content[:-1], "longer": content + b"\n", "empty": b""}[how])
    reader = Checkpoints(folder, ALONE)
    with caplog.at_level(logging.WARNING, logger="dar_train"):
        assert reader.find() == folder / "step-00000001"
    assert "step-00000002" in caplog.text
    state = make_state(1)
    before = tensors(state)
    with pytest.raises(ValueError, match="checkpoint: expected"):
        reader.load(folder / "step-00000002", state)
    assert same(tensors(state), before)
    kept.save(3, state, {})
    assert reader.find() == folder / "step-00000003"


def test_no_intact_state_is_an_error_that_lists_them(folder) -> None:
    _, kept = saved(folder)
    (folder / "step-00000001" / "model.0.safetensors").unlink()
    (folder / "step-00000002" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"intact state in .*step-00000002.*step-00000001"):
        kept.find()


@pytest.mark.parametrize(
    "text",
    [
        b"../elsewhere\n", b"/etc/passwd", b"step-00000001/../../elsewhere", b"", b"\xff\xfe",
        b"step-1", b"x" * 1000, b"step-00000009\n", b"step-00000001\x00",
    ],
)  # fmt: skip
def test_a_hostile_or_damaged_pointer(folder, caplog, text) -> None:
    _, kept = saved(folder)
    shutil.copytree(folder / "step-00000002", folder.parent / "elsewhere")
    (folder / "latest").write_bytes(text)
    with caplog.at_level(logging.WARNING, logger="dar_train"):
        assert kept.find() == folder / "step-00000002"
    assert "step-00000002" in caplog.text
    (folder / "stable").write_bytes(text)
    if text == b"step-00000009\n":
        assert kept.find("stable") == folder / "step-00000002"
    else:
        with pytest.raises(ValueError, match=r"to name a state|readable"):
            kept.find("stable")
    with pytest.raises(ValueError, match="pointer: expected lower-case"):
        kept.find("../latest")


def test_a_damaged_mark_is_not_replaced_by_a_later_state(folder) -> None:
    state = make_state(0)
    kept = Checkpoints(folder, ALONE, keep=5)
    for step in (1, 2, 3):
        kept.save(step, state, {}, pointers=("latest", "stable") if step == 2 else ("latest",))
    (folder / "step-00000002" / "state.json").unlink()
    assert kept.find("stable") == folder / "step-00000001"
    assert kept.find() == folder / "step-00000003"


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "model.0.pkl", "manifest.json"])
def test_a_manifest_names_no_other_files(folder, name) -> None:
    _, kept = saved(folder, (1,))
    manifest = checkpoints.manifest
    files = manifest.read_manifest(kept.last).files
    (kept.last / "manifest.json").unlink()
    manifest.write_manifest(kept.last, 1, {**files, name: files["state.json"]})
    with pytest.raises(ValueError, match="expected an intact state"):
        kept.find()


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ({"w": [[9, 3], [0, 0]]}, "expected 27 numbers of model/w, got 6"),
        ({"w": [[2, 3], [1, 0]]}, "a slice outside of w"),
        ({"w": [[2, 3], [-1, 0]]}, "a slice outside of w"),
        ({"w": [[2, 3], [0]]}, "dimensions"),
        ({}, "expected a readable"),
        ([], "expected a readable"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, slices, message) -> None:
    file = tmp_path / "model.0.safetensors"
    save_file({"w": torch.zeros(2, 3)}, file, metadata={"slices": json.dumps(slices)})
    with pytest.raises(ValueError, match=message):
        shards.Shards([file])


# other models, other formats


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._replace(model=make_model(9)), r"model/0.weight \[9, 4\] .* got \[8, 4\]"),
        (lambda s: s._replace(averaged=s.averaged.double()), r"averaged/.*float64, got .*float"),
        (lambda s: s._replace(model=s.model[:2]), "expected states of these 1 optimizers"),
        (lambda s: s._replace(averaged=s.averaged[:2]), "of this model, got averaged/"),
        (lambda s: s._replace(averaged=s.averaged.append(nn.Linear(2, 3))),
         r"averaged/4.weight \[3, 2\], got none"),
        (lambda s: s._replace(optimizers=[]), "expected states of these 0 optimizers"),
    ],
)  # fmt: skip
def test_another_model_is_refused_and_unchanged(folder, change, message) -> None:
    _, kept = saved(folder)
    other = make_state(1)
    train(other)
    other = change(other)
    if message.startswith("model"):
        other = other._replace(optimizers=[torch.optim.AdamW(other.model.parameters())])
    with torch.no_grad():
        before = [t.clone() for m in (other.model, other.averaged) for t in m.state_dict().values()]
    with pytest.raises(ValueError, match=message):
        kept.load(kept.find(), other)
    after = [t for m in (other.model, other.averaged) for t in m.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_first_format_is_refused_but_its_weights_are_read(folder) -> None:
    state = folder / "step-00000007"
    state.mkdir(parents=True)
    (state / "state.json").write_text(json.dumps({"format": 1, "step": 7, "ema_updates": 7}))
    save_file({"w": torch.ones(2)}, state / "model.safetensors")
    save_file({"w": torch.zeros(2)}, state / "ema.safetensors")
    (folder / "latest").write_text("step-00000007\n")
    with pytest.raises(ValueError, match=r"format 2, got .*0007 of format 1.*read_weights"):
        Checkpoints(folder, ALONE).find()
    assert torch.equal(read_weights(state)["w"], torch.zeros(2))
    assert torch.equal(read_weights(state, averaged=False)["w"], torch.ones(2))


@pytest.mark.parametrize("averaged", [False, True])
def test_damaged_weights_alone_are_refused(folder, averaged) -> None:
    _, kept = saved(folder)
    file = kept.last / ("averaged.0.safetensors" if averaged else "model.0.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="SHA-256"):
        read_weights(kept.last, averaged=averaged)


# the world's failures


def check_nothing_lost(folder: Path) -> None:
    assert not list(folder.glob(".step-*"))
    reader = Checkpoints(folder, ALONE)
    assert reader.find() == folder / "step-00000002"
    reader.load(folder / "step-00000002", make_state(1))


def test_a_full_disk_is_seen_before_writing(folder, monkeypatch) -> None:
    state, kept = saved(folder)
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"step 3 was not saved: .* has 0.0 MB free.*00002"):
        kept.save(3, state, {})
    check_nothing_lost(folder)


def fail_at(monkeypatch, call: int, function: str) -> None:
    """Let the `call`-th use of an os function say that the disk is full."""
    real, count = getattr(os, function), [0]

    def full(*args, **kwargs):
        count[0] += 1
        if count[0] == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, function, full)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("call", range(1, 9))
def test_a_disk_that_fills_up_while_saving(folder, monkeypatch, call, asynchronous) -> None:
    """At each fsync in turn: of the shards, the record, the manifest, the folder, the pointer."""
    state, kept = saved(folder, asynchronous=asynchronous)
    with monkeypatch.context() as patch:
        fail_at(patch, call, "fsync")
        with pytest.raises(CheckpointError, match=r"3 was not saved: .*No space left.*00002"):
            kept.save(3, state, {})
            kept.wait()
    assert not list(folder.glob(".step-*"))
    reader = Checkpoints(folder, ALONE)
    reader.load(reader.find(), make_state(1))
    kept.save(4, state, {})
    kept.wait()
    assert reader.find() == folder / "step-00000004"


def _limited(folder: Path) -> None:
    kept = Checkpoints(folder, ALONE)
    state = make_state(0, width=64)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        kept.save(3, state, {})
    except CheckpointError as error:
        (folder.parent / "said").write_text(str(error))


def test_a_file_that_may_not_grow(folder) -> None:
    saved(folder)
    child = get_context("fork").Process(target=_limited, args=(folder,))
    child.start()
    child.join()
    assert child.exitcode == 0
    said = (folder.parent / "said").read_text()
    assert "step 3 was not saved" in said and "File too large" in said
    check_nothing_lost(folder)


def test_a_failed_asynchronous_save_is_told_at_the_next_one(folder, monkeypatch) -> None:
    state, kept = saved(folder, asynchronous=True)
    with monkeypatch.context() as patch:
        fail_at(patch, 2, "fsync")
        kept.save(3, state, {})
        kept._thread.join()
    with pytest.raises(CheckpointError, match="step 3 was not saved"):
        kept.save(4, state, {})
    kept.save(5, state, {})
    kept.wait()
    assert kept.last == folder / "step-00000005"


def test_an_unwritable_folder_is_found_out_at_once(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"written, got .*file/states: .*Not a directory"):
        Checkpoints(tmp_path / "file" / "states", ALONE)
    folder = tmp_path / "states"
    folder.mkdir(mode=0o500)
    user = os.geteuid()
    if user == 0:  # whom rights do not hold
        os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match=r"can be written.*Permission denied"):
            Checkpoints(folder, ALONE)
    finally:
        os.seteuid(user)


def test_a_record_that_is_no_json_is_refused_before_writing(folder) -> None:
    state, kept = saved(folder)
    with pytest.raises(TypeError, match="JSON"):
        kept.save(3, state, {"path": folder})
    check_nothing_lost(folder)


@pytest.mark.parametrize("pointer", ["../latest", "", "Latest", "a/b", ".lock"])
def test_pointers_are_plain_names(folder, pointer) -> None:
    state, kept = saved(folder)
    with pytest.raises(ValueError, match="plain names"):
        kept.save(3, state, {}, pointers=(pointer,))
    check_nothing_lost(folder)


# several runs on one folder


def _hold(folder: Path, ready) -> None:
    kept = Checkpoints(folder, ALONE)
    ready.set()
    time.sleep(600)
    del kept


def test_one_run_writes_in_a_folder(folder) -> None:
    state = saved(folder)[0]
    context = get_context("fork")
    ready = context.Event()
    child = context.Process(target=_hold, args=(folder, ready))
    child.start()
    try:
        assert ready.wait(60)
        with pytest.raises(CheckpointError, match=f"no other run in .*got process {child.pid} on"):
            Checkpoints(folder, ALONE)
        assert find_intact(folder) == folder / "step-00000002"
        child.kill()
        child.join()
        Checkpoints(folder, ALONE).save(3, state, {})
    finally:
        child.kill()
        child.join()


def test_a_stale_lock_is_taken_over(folder) -> None:
    state, _ = saved(folder)
    (folder / ".lock").write_text("1 on another-host\n")
    kept = Checkpoints(folder, ALONE)
    kept.save(3, state, {})
    assert (folder / ".lock").read_text().startswith(f"{os.getpid()} on ")


def test_ranks_need_a_process_group(folder) -> None:
    with pytest.raises(CheckpointError, match="expected a process group of 2 ranks"):
        Checkpoints(folder, Ranks(0, 2, 0, torch.device("cpu")))
    with pytest.raises(ValueError, match="keep: expected an integer >= 1, got 0"):
        Checkpoints(folder, ALONE, keep=0)
