"""Component folders: what is saved is loaded, bit for bit; what is damaged is named."""

import json
import os

import pytest
import safetensors.torch
import torch
from checkpoint_models import PRIOR, TOKENIZER, official_state, same

from dar_fast.checkpoint import (
    CheckpointError,
    folder,
    load_model,
    load_official_prior,
    load_official_tokenizer,
    save_model,
)


@pytest.fixture(scope="module")
def prior():
    return load_official_prior(official_state(PRIOR), PRIOR)


@pytest.fixture
def saved(tmp_path, prior):
    save_model(prior, tmp_path / "prior")
    return tmp_path / "prior"


def edit(path, **changes):
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("shard", [folder.MAX_SHARD_BYTES, 50_000, 1], ids=str)
@pytest.mark.parametrize("kind", ["prior", "tokenizer"])
def test_round_trip(tmp_path, prior, kind, shard):
    module = prior
    if kind == "tokenizer":
        module = load_official_tokenizer(official_state(TOKENIZER), TOKENIZER)
    files = save_model(module, tmp_path / "new" / kind, max_shard_bytes=shard)
    assert sorted(files) == sorted((tmp_path / "new" / kind).iterdir())
    assert (len(files) > 2) == (shard < folder.MAX_SHARD_BYTES)
    loaded = load_model(tmp_path / "new" / kind)
    assert type(loaded) is type(module)
    assert loaded.config == module.config
    assert same(loaded.state_dict(), module.state_dict())
    assert not loaded.training
    assert [p.name for p in (tmp_path / "new").iterdir()] == [kind]


def test_dtype(tmp_path, prior):
    half = load_official_prior(official_state(PRIOR), PRIOR, dtype=torch.bfloat16)
    save_model(half, tmp_path / "half")
    assert load_model(tmp_path / "half").norm.weight.dtype == torch.bfloat16
    loaded = load_model(tmp_path / "half", device="cpu", dtype=torch.float32)
    assert torch.equal(loaded.norm.weight, half.norm.weight.float())


def test_smaller_model_over_a_sharded_one(saved, prior):
    save_model(prior, saved, max_shard_bytes=50_000)
    (saved / "README.md").write_text("kept")
    save_model(prior, saved)
    assert sorted(os.listdir(saved)) == ["README.md", "config.json", "model.safetensors"]
    assert same(load_model(saved).state_dict(), prior.state_dict())


def test_shards_hold_at_most_their_size(saved, prior):
    save_model(prior, saved, max_shard_bytes=50_000)
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in prior.state_dict().values())
    for name in set(index["weight_map"].values()):
        tensors = safetensors.torch.load_file(saved / name)
        assert len(tensors) == 1 or sum(v.nbytes for v in tensors.values()) <= 50_000


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, prior, monkeypatch, existing):
    target = tmp_path / "prior"
    if existing:
        save_model(prior, target)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(folder, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_model(prior, target)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert target.exists() == existing


def test_bad_arguments(tmp_path, prior):
    with pytest.raises(TypeError, match="expected a Prior or a Tokenizer, got Linear"):
        save_model(torch.nn.Linear(1, 1), tmp_path / "x")
    with pytest.raises(ValueError, match="max_shard_bytes: expected an integer >= 1, got 0"):
        save_model(prior, tmp_path / "x", max_shard_bytes=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "config.json").unlink(), r"config\.json: cannot be read"),
        (lambda p: (p / "config.json").write_text("{"), r"config\.json: expected JSON"),
        (lambda p: (p / "config.json").write_text("[" * 100_000), r"config\.json: expected JSON"),
        (lambda p: (p / "config.json").write_text("[]"), "expected a JSON object, got list"),
        (lambda p: edit(p / "config.json", _class="Linear"), "expected _class .* got 'Linear'"),
        (
            lambda p: edit(p / "config.json", _class="Tokenizer"),
            "TokenizerConfig: expected keys among",
        ),
        (lambda p: edit(p / "config.json", colour=1), "expected keys among"),
        (lambda p: edit(p / "config.json", dim="wide"), "expected integer dim"),
        (lambda p: edit(p / "config.json", depth=3), r"missing 7: layers\.2\."),
        (lambda p: edit(p / "config.json", depth=1), r"unexpected 7: layers\.1\."),
        (lambda p: edit(p / "config.json", depth=1 << 40), "expected weights of 1099511627776"),
        (lambda p: edit(p / "config.json", vocab_size=31), r"expected shape \[31, 64\], got \[32"),
        (lambda p: edit(p / "config.json", vocab_size=1 << 62), "impossible sizes|expected shape"),
        (lambda p: edit(p / "config.json", _weights="../x.safetensors"), "expected _weights"),
        (lambda p: (p / "model.safetensors").unlink(), r"model\.safetensors: missing weights file"),
        (lambda p: (p / "model.safetensors").write_bytes(b""), "damaged or unreadable"),
        (lambda p: os.truncate(p / "model.safetensors", 9000), "damaged or unreadable"),
    ],
)
def test_damaged_folders(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(saved)
    assert str(saved) in str(caught.value)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / INDEX).unlink(), "index.json: cannot be read"),
        (lambda p: edit(p / INDEX, weight_map={}), "expected a weight_map"),
        (lambda p: edit(p / INDEX, weight_map={"a": "../b.safetensors"}), "refused file name"),
        (lambda p: edit(p / INDEX, weight_map={"a": 3}), "refused file name"),
        (lambda p: next(p.glob("model-00002*")).unlink(), "model-00002.*: missing weights file"),
        (
            lambda p: edit(p / INDEX, weight_map={"a": next(p.glob("model-00002*")).name}),
            "missing tensors a",
        ),
    ],
)
def test_damaged_shards(saved, prior, damage, message):
    save_model(prior, saved, max_shard_bytes=50_000)
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        load_model(saved)


def test_integer_weights(saved, prior):
    state = {k: v.detach() for k, v in prior.state_dict().items()}
    state["norm.weight"] = state["norm.weight"].int()
    safetensors.torch.save_file(state, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.weight: expected floating point"):
        load_model(saved)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(tmp_path / "none")
