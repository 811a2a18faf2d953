"""Batches in process: any interruption, ranks and sizes give one stream; damage and labels."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from data_helpers import DAMAGE, Settings, encoded, folder, ranks, tars
from hypothesis import given, settings
from hypothesis import strategies as st

from dar_train.data import ReadingError, held_out_pictures, open_pictures, picture_batches
from dar_train.data import feeds as feeds_module
from dar_train.data import loading as loading_module
from dar_train.data import reading as reading_module

SIZE = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(params=["resident", "loaded"])
def kept(request, monkeypatch):
    """Whether small sets lie in memory."""
    if request.param == "loaded":
        monkeypatch.setattr(loading_module, "RESIDENT_BYTES", 0)
    return request.param


def batches_of(place, *, rank=0, world=1, crop=False, flip=True, **changes):
    recipe = Settings(place, **changes)
    return picture_batches(recipe, SIZE, ranks(rank, world), crop=crop, flip=flip)


def samples(batches, count: int) -> list[tuple[int, int, bytes]]:
    """Position, label and pixels of the samples of `count` batches."""
    found = []
    for _ in range(count):
        batch = batches.next()
        for image, label, position in zip(*batch, strict=True):
            found.append((int(position), int(label), image.numpy().tobytes()))
    return found


@pytest.mark.parametrize("crop", [False, True], ids=["centre", "crop"])
@pytest.mark.parametrize("flip", [False, True], ids=["plain", "flip"])
def test_small_sets_in_memory_and_files_give_one_stream(place, monkeypatch, crop, flip) -> None:
    resident = samples(batches_of(place, crop=crop, flip=flip), 8)
    monkeypatch.setattr(loading_module, "RESIDENT_BYTES", 0)
    assert samples(batches_of(place, crop=crop, flip=flip), 8) == resident
    assert [position for position, _, _ in resident] == list(range(48))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([6, 12, 18]), st.integers(1, 3)),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 40),
)
def test_any_interruptions_ranks_and_batch_sizes_give_one_stream(place, calls, piece) -> None:
    total = sum(batch * count for _, batch, count in calls)
    whole = samples(batches_of(place, crop=True, batch=total), 1)
    found, state = [], None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(feeds_module, "PIECE", piece)
        for world, batch, count in calls:
            parts = []
            states = []
            for rank in range(world):
                batches = batches_of(place, rank=rank, world=world, crop=True, batch=batch)
                if state is not None:
                    batches.load_state_dict(json.loads(json.dumps(state)))
                parts.append(samples(batches, count))
                states.append(batches.state_dict())
            assert all(other == states[0] for other in states)
            state = states[0]
            found += sorted(sample for part in parts for sample in part)
    assert found == whole


def test_a_state_is_taken_up_again_in_the_middle(place, kept) -> None:
    batches = batches_of(place)
    first = samples(batches, 2)
    state = batches.state_dict()
    rest = samples(batches, 3)
    batches.load_state_dict(state)
    assert samples(batches, 3) == rest
    batches.load_state_dict({**state, "position": 0})
    assert samples(batches, 2) == first


def test_seeds_change_the_stream(place, kept) -> None:
    assert samples(batches_of(place, seed=4), 2) != samples(batches_of(place), 2)


def test_reading_leaves_the_run_s_random_numbers_alone(place, kept) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    samples(batches_of(place, crop=True), 1)
    assert torch.equal(torch.rand(3), expected)


def test_held_out_pictures_are_never_trained_on(place, kept) -> None:
    pictures = open_pictures(place, SIZE)
    seen = {pixels for _, _, pixels in samples(batches_of(place, flip=False), 6)}
    held_out = held_out_pictures(pictures, SIZE, 99, seed=0)
    assert len(seen) == len(pictures.train) == 18
    assert len(held_out.images) == 2
    assert not seen & {image.numpy().tobytes() for image in held_out.images}


def test_held_out_pictures_are_bounded_and_drawn_by_the_seed(tmp_path) -> None:
    pictures = open_pictures(folder(tmp_path, (60, 60)), SIZE)
    few = held_out_pictures(pictures, SIZE, 5, seed=1)
    assert few.images.shape == (5, 3, SIZE, SIZE)
    assert few.images.dtype == torch.uint8
    assert few.names == held_out_pictures(pictures, SIZE, 5, seed=1).names
    assert few.names != held_out_pictures(pictures, SIZE, 5, seed=2).names
    assert few.labels.tolist() == [int(name.startswith("b")) for name in few.names]


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_files_give_way_to_the_next_and_are_listed_once(tmp_path, kept, how) -> None:
    place = folder(tmp_path)
    sound = samples(batches_of(place, flip=False), 9)
    damaged = [f"b/{number:03}.png" for number in (12, 15)]
    for name in damaged:
        (place / name).write_bytes(DAMAGE[how]((place / name).read_bytes()))
    pictures = open_pictures(place, SIZE)
    names = [pictures.name(index) for index in pictures.train.tolist()]
    damaged = [name for name in damaged if name in names]
    batches = batches_of(place, flip=False)
    order = loading_module.Reader(pictures, SIZE, seed=3, crop=False, flip=False).order.take(0, 60)
    is_damaged = [pictures.name(index) in damaged for index in order.tolist()]
    found = samples(batches, 9)
    for position, sample in enumerate(found):
        source = position
        while is_damaged[source]:
            source += 1
        replaced = sound[source] if source < len(sound) else None
        assert replaced is None or sample[1:] == replaced[1:]
    listed = list(batches.skipped())
    assert sorted(line.split(":")[0] for line in listed) == damaged
    assert all(len(line.split(": ", 1)[1]) > 5 for line in listed)
    assert batches.skipped() == []


def test_a_vanished_file_is_skipped(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loading_module, "RESIDENT_BYTES", 0)
    place = folder(tmp_path)
    batches = batches_of(place)
    (place / "b" / "015.png").unlink()
    assert len(samples(batches, 9)) == 54
    assert [line.split(":")[0] for line in batches.skipped()] in (["b/015.png"], [])


def test_nothing_readable_is_an_error_that_names_the_first(tmp_path, kept, monkeypatch) -> None:
    monkeypatch.setattr(reading_module, "MOST_UNREADABLE", 5)
    place = folder(tmp_path)
    for file in place.rglob("*.png"):
        file.write_bytes(b"gone")
    with pytest.raises(ReadingError, match=r"expected .*readable pictures?.*[ab]/0\d\d\.png: not"):
        batches_of(place).next()


def test_ranks_must_divide_the_batch(place) -> None:
    with pytest.raises(ValueError, match="positive multiple of the 4 ranks, got 6"):
        batches_of(place, world=4)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"position": 6, "fingerprint": "0123456789abcdef"}, "expected the data set 0123456789ab"),
        ({"position": -1, "fingerprint": None}, "position: expected a number >= 0, got -1"),
        ({"position": True}, "got True"),
        ({}, "got None"),
    ],
    ids=["other-data", "negative", "bool", "empty"],
)
def test_states_of_something_else(place, state, message) -> None:
    if state.get("position") == 6:
        message += ".*another --out"
    with pytest.raises(ValueError, match=message):
        batches_of(place).load_state_dict(state)


def test_labels_known_beforehand_are_checked_before_reading(tmp_path) -> None:
    place = tars(tmp_path)
    recipe = Settings(place)
    with pytest.raises(ValueError, match=r"labels: expected 0 to 2, got 3 of .*000000\.tar/0003"):
        picture_batches(recipe, SIZE, ranks(), crop=False, flip=False, classes=3)


def test_labels_unknown_beforehand_are_checked_while_reading(place, kept, monkeypatch) -> None:
    pictures = open_pictures(place, SIZE)
    monkeypatch.setattr(type(pictures), "labels", None)
    with pytest.raises(ValueError, match=r"labels: expected 0 to 0, got 1 of b/0\d\d\.png"):
        batches = picture_batches(
            Settings(place), SIZE, ranks(), crop=False, flip=False, pictures=pictures, classes=1
        )
        samples(batches, 3)


def test_a_packed_file_is_gathered_from_memory(tmp_path) -> None:
    file = tmp_path / "packed.npz"
    content = [encoded(number, width=SIZE, height=SIZE) for number in range(10)]
    names = [f"emoji {number}" for number in range(10)]
    np.savez(
        file, size=np.int64(SIZE), bytes=np.frombuffer(b"".join(content), np.uint8),
        offsets=np.cumsum([0, *map(len, content)]), labels=np.arange(10) % 2,
        names=np.array(names), styles=np.array(["x"] * 10), held_out=np.arange(10) >= 8,
        label_names=np.array(["x/a", "x/b"]),
    )  # fmt: skip
    batches = batches_of(file, flip=False)
    first = samples(batches, 4)
    pictures = open_pictures(file, SIZE)
    assert pictures.train.tolist() == list(range(8))
    by_pixels = {pictures.read(i).picture.transpose(2, 0, 1).tobytes(): i for i in range(10)}
    assert [by_pixels[pixels] % 2 for _, _, pixels in first] == [label for _, label, _ in first]
    assert sorted(by_pixels[pixels] for _, _, pixels in first[:8]) == list(range(8))
    with pytest.raises(ValueError, match="expected pictures of 24 x 24 for this model, got 12 x"):
        open_pictures(file, 24)


def test_copies_on_a_stream_of_their_own_are_waited_for(place, monkeypatch) -> None:
    """The path of an accelerator, with stand-ins for its streams."""
    monkeypatch.setattr(loading_module, "RESIDENT_BYTES", 0)
    expected = samples(batches_of(place, crop=True), 3)
    events = []

    class Stream:
        def wait_stream(self, other) -> None:
            events.append(("waits", self, other))

    computing, copying = Stream(), Stream()

    @contextmanager
    def within(stream):
        events.append(("enters", stream))
        yield
        events.append(("leaves", stream))

    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: events.append(("kept", stream))
    )
    batches = batches_of(place, crop=True)
    batches._feed._copies = copying
    assert samples(batches, 3) == expected
    one = [("enters", copying), ("leaves", copying), ("waits", computing, copying)]
    assert events == 3 * [*one, ("kept", computing), ("kept", computing)]
