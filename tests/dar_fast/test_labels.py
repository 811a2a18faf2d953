"""Label names: how they are found, and what is said where they are not."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dar_fast.labels import find_label, label_ids, label_table

NAMES = ["noto/cat-face", "noto/face-smiling", "twemoji/cat-face", "twemoji/transport-air"]
TABLE = label_table(NAMES, 4)


def test_table() -> None:
    assert TABLE == {name: i for i, name in enumerate(NAMES)}
    assert label_table(dict(reversed(TABLE.items())), 4) == TABLE
    assert list(label_table(dict(reversed(TABLE.items())), 4)) == NAMES
    assert label_table(None, 4) == label_table([], 4) == {}


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (["a"], ValueError, "labels: expected 2 names, one a class, got 1"),
        (["a", "a"], ValueError, "repeated or empty"),
        (["a", ""], ValueError, "repeated or empty"),
        (["a", 3], TypeError, "labels: expected names, got 3"),
        ("ab", TypeError, "labels: expected a list of names, got str"),
        (7, TypeError, "labels: expected a list of names, got int"),
        ({"a": 0, "b": 2}, ValueError, "labels: expected ids 0 to 1"),
        ({"a": 0, "b": "x"}, TypeError, "labels: expected integer ids, got 'x'"),
    ],
)
def test_wrong_tables(labels: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        label_table(labels, 2)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("twemoji/cat-face", "twemoji/cat-face"),
        ("Twemoji / Cat Face", "twemoji/cat-face"),
        ("TWEMOJI/cat_face", "twemoji/cat-face"),
        ("cat face", "noto/cat-face"),
        ("transport-air", "twemoji/transport-air"),
        (" Transport  Air ", "twemoji/transport-air"),
    ],
)
def test_names_are_found(name: str, label: str) -> None:
    assert find_label(name, TABLE) == TABLE[label]


def test_an_exact_name_comes_first() -> None:
    assert find_label("Cat face", label_table(["cat-face", "Cat face"], 2)) == 1


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("noto/cat-fase", "did you mean 'noto/cat-face'"),
        ("cat fase", "'noto/cat-face'"),
        ("twemoji/smiling", "'noto/face-smiling'"),
        ("qqqqqqqq", "for example 'noto/cat-face'"),
        ("", "for example 'noto/cat-face'"),
    ],
)
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match="class_labels: expected one of 4 label names") as caught:
        find_label(name, TABLE)
    assert hint in str(caught.value)


@given(name=st.text(max_size=30))
def test_any_text_is_found_or_refused_in_one_line(name: str) -> None:
    try:
        assert 0 <= find_label(name, TABLE) < 4
    except ValueError as error:
        assert str(error).startswith("class_labels: expected")
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        (2, [2]),
        ("noto/face-smiling", [1]),
        (["cat face", 3, "twemoji/cat-face"], [0, 3, 2]),
        ((0, 1), [0, 1]),
        (torch.tensor([3, 3]), [3, 3]),
        (torch.tensor(1), [1]),
        ([torch.tensor(1)], [1]),
        (range(3), [0, 1, 2]),
    ],
)
def test_ids(labels: Any, ids: list[int]) -> None:
    assert label_ids(labels, TABLE, 4) == ids


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([], ValueError, "class_labels: expected at least one label, got none"),
        (torch.empty(0, dtype=torch.int64), ValueError, "at least one"),
        (4, ValueError, r"class_labels: expected ids in \[0, 4\), got 4"),
        ([0, -1], ValueError, "got -1"),
        (torch.tensor([4]), ValueError, "got 4"),
        (torch.tensor([1.0]), ValueError, "class_labels: expected int64"),
        (torch.tensor([[1]]), ValueError, "class_labels: expected int64"),
        (1.0, TypeError, "class_labels: expected names or integer ids, got float"),
        (True, TypeError, "got bool"),
        (None, TypeError, "got NoneType"),
        ([[1]], TypeError, "got list"),
        ({"noto/cat-face": 0}, TypeError, "got dict"),
    ],
)
def test_wrong_labels(labels: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        label_ids(labels, TABLE, 4)


def test_a_model_without_names() -> None:
    assert label_ids([5], {}, 6) == [5]
    with pytest.raises(ValueError, match="expected ids, as this model has no names, got 'cat'"):
        label_ids("cat", {}, 6)
