"""Batches of codes: the same samples for any number of ranks, resumed anywhere."""

import pytest
import torch
from fake_pictures import FakeSource, ranks_of, write
from hypothesis import given, settings
from hypothesis import strategies as st

from dar_train.tokens import code_batches, open_store
from dar_train.tokens.batches import CodeBatch, CodeOrder

BATCH = 12


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "tokens"
    write(folder, FakeSource(broken=(7,)))
    return open_store(folder)


def read(store, steps: int, rank: int = 0, world: int = 1, state=None, seed: int = 0) -> CodeBatch:
    """The next `steps` batches, one after the other."""
    batches = code_batches(store, batch=BATCH, seed=seed, ranks=ranks_of(rank, world))
    if state is not None:
        batches.load_state_dict(state)
    found = [batches.next() for _ in range(steps)]
    batches.close()
    return CodeBatch(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def test_samples_are_rows_of_the_store(store) -> None:
    batch = read(store, 3)
    samples = CodeOrder(store.train, 3, 0).take(0, 3 * BATCH)
    assert torch.equal(batch.codes, store.rows(samples.views, samples.pictures))
    assert torch.equal(batch.labels, store.labels[samples.pictures])
    assert batch.codes.dtype == batch.labels.dtype == torch.int64
    assert int(batch.codes.max()) > 2**15


def test_an_epoch_is_every_picture_once_under_drawn_views(store) -> None:
    T = len(store.train)
    order = CodeOrder(store.train, 3, 0)
    epochs = [order.take(epoch * T, T) for epoch in range(40)]
    for epoch in epochs:
        assert torch.equal(epoch.pictures.sort().values, store.train)
    views = torch.cat([epoch.views for epoch in epochs])
    share = torch.bincount(views) / len(views)
    assert ((share - 1 / 3).abs() < 0.05).all()
    of_one = {int(epoch.views[epoch.pictures == store.train[0]]) for epoch in epochs}
    assert of_one == {0, 1, 2}
    other = CodeOrder(store.train, 3, 1).take(0, T)
    assert not torch.equal(other.pictures, epochs[0].pictures)
    assert not torch.equal(other.views, epochs[0].views)


@settings(max_examples=30, deadline=None)
@given(
    position=st.integers(0, 500),
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    seed=st.integers(0, 9),
    views=st.integers(1, 20),
)
def test_samples_depend_on_their_position_alone(position, counts, seed, views) -> None:
    pictures = torch.arange(5, 42)
    whole = CodeOrder(pictures, views, seed).take(position, sum(counts))
    order, parts = CodeOrder(pictures, views, seed), []
    for count in counts:
        parts.append(order.take(position, count))
        position += count
    for part, all_of_it in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(part), all_of_it)
    assert bool(((whole.views >= 0) & (whole.views < views)).all())


@settings(max_examples=15, deadline=None)
@given(
    before=st.integers(0, 5),
    worlds=st.tuples(*[st.sampled_from([1, 2, 3, 4, 6])] * 2),
    seed=st.integers(0, 3),
)
def test_any_ranks_resume_what_any_ranks_began(store, before, worlds, seed) -> None:
    first, second = worlds
    began = code_batches(store, batch=BATCH, seed=seed, ranks=ranks_of(first - 1, first))
    for _ in range(before):
        began.next()
    state = began.state_dict()
    began.close()
    expected = read(store, before + 1, seed=seed)
    parts = [read(store, 1, rank, second, state, seed) for rank in range(second)]
    for i, expected_part in enumerate(expected):
        together = torch.cat([part[i] for part in parts])
        assert torch.equal(together, expected_part[before * BATCH :])


def test_reading_ahead_does_not_move_the_state(store) -> None:
    batches = code_batches(store, batch=BATCH, seed=0, ranks=ranks_of())
    assert batches.state_dict()["position"] == 0
    batches.next()
    assert batches.state_dict() == {"position": BATCH, "fingerprint": store.fingerprint}
    assert list(batches.skipped()) == []
    second = batches.next()
    batches.load_state_dict({"position": BATCH, "fingerprint": store.fingerprint})
    assert torch.equal(batches.next().codes, second.codes)
    batches.close()


def test_a_state_of_other_codes_is_refused(store) -> None:
    batches = code_batches(store, batch=BATCH, seed=0, ranks=ranks_of())
    with pytest.raises(
        ValueError, match=rf"tokens: expected d{{12}}, .* got {store.fingerprint[:12]} in"
    ):
        batches.load_state_dict({"position": 0, "fingerprint": "d" * 64})
    batches.close()


@pytest.mark.parametrize(("batch", "world"), [(12, 5), (0, 1), (-4, 2)])
def test_the_ranks_share_the_batch(store, batch, world) -> None:
    match = f"batch: expected a positive multiple of the {world} ranks, got {batch}"
    with pytest.raises(ValueError, match=match):
        code_batches(store, batch=batch, seed=0, ranks=ranks_of(0, world))


def test_a_resident_table_gives_the_same_batches(store) -> None:
    """The way of small stores on an accelerator, on the CPU."""
    batches = code_batches(store, batch=BATCH, seed=0, ranks=ranks_of())
    batches.make_resident()
    mapped = read(store, 4)
    found = [batches.next() for _ in range(4)]
    batches.close()
    assert torch.equal(torch.cat([batch.codes for batch in found]), mapped.codes)
    assert torch.equal(torch.cat([batch.labels for batch in found]), mapped.labels)


@pytest.mark.parametrize("resident", [False, True])
def test_an_accelerators_batches_are_pinned_on_its_own_device(store, monkeypatch, resident) -> None:
    """The way of a GPU, with stand-ins for pinning and for choosing the device."""
    pinned, chosen = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.dtype) or t)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    batches = code_batches(store, batch=BATCH, seed=0, ranks=ranks_of())
    batches._cuda = True
    if resident:
        batches.make_resident()
    batch = batches.next()
    batches.close()
    assert chosen == [torch.device("cpu")]
    assert pinned[:2] == [torch.int64 if resident else torch.int16, torch.int64]
    assert torch.equal(batch.codes, read(store, 1).codes)
