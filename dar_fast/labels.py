"""Label names to ids: exact, else whatever the case, spaces and hyphens, else by the last part.

`Noto / Cat Face` is `noto/cat-face`; `cat face` is the first label whose last part is `cat-face`.
"""

import difflib
import operator
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

ClassLabels = int | str | Sequence[int | str] | Tensor


def label_table(
    labels: Sequence[str] | Mapping[str, int] | None, num_classes: int
) -> dict[str, int]:
    """Name to id, from the names in order of their ids or from such a table; None: no names.

    Raises:
        TypeError: where a name is not a string.
        ValueError: where names repeat, or are not one a class.
    """
    if labels is None:
        return {}
    if isinstance(labels, str) or not isinstance(labels, Sequence | Mapping):
        raise TypeError(f"labels: expected a list of names, got {type(labels).__name__}")
    if isinstance(labels, Mapping):
        for number in labels.values():
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"labels: expected integer ids, got {number!r}")
        ids = sorted(labels.values())
        if ids != list(range(len(ids))):
            raise ValueError(f"labels: expected ids 0 to {len(ids) - 1}, each once, got {ids[:8]}…")
        labels = sorted(labels, key=labels.__getitem__)
    wrong = [name for name in labels if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"labels: expected names, got {wrong[0]!r}")
    if labels and len(labels) != num_classes:
        raise ValueError(f"labels: expected {num_classes} names, one a class, got {len(labels)}")
    table = {name: i for i, name in enumerate(labels)}
    if len(table) != len(labels) or "" in table:
        raise ValueError("labels: expected different, non-empty names, got a repeated or empty one")
    return table


def _plain(name: str) -> str:
    """`Noto / Cat_Face` to `noto/cat-face`."""
    parts = name.casefold().split("/")
    return "/".join(re.sub(r"[\s_-]+", "-", part.strip()) for part in parts)


def find_label(name: str, labels: Mapping[str, int]) -> int:
    """The id of a label name.

    Raises:
        ValueError: where there is no such name; the message holds the nearest ones.
    """
    if name in labels:
        return labels[name]
    if not labels:
        raise ValueError(f"class_labels: expected ids, as this model has no names, got {name!r}")
    wanted = _plain(name)
    whole: dict[str, str] = {}
    last: dict[str, str] = {}
    for label in labels:
        whole.setdefault(_plain(label), label)
        last.setdefault(_plain(label).rpartition("/")[2], label)
    for table in (whole, last):
        if wanted in table:
            return labels[table[wanted]]
    near = [whole[match] for match in difflib.get_close_matches(wanted, whole, n=3)]
    part = wanted.rpartition("/")[2]
    near += [last[match] for match in difflib.get_close_matches(part, last, n=3)]
    hint = ", ".join(repr(label) for label in dict.fromkeys(near[:4]))
    hint = f"did you mean {hint}?" if hint else f"for example {next(iter(labels))!r}"
    raise ValueError(
        f"class_labels: expected one of {len(labels)} label names, got {name!r}; {hint}"
    )


def label_ids(class_labels: ClassLabels, labels: Mapping[str, int], num_classes: int) -> list[int]:
    """Ids of one label or several, each a name or an id; also an int64 tensor, `[B]` or one id.

    Raises:
        TypeError: where an element is neither a name nor an integer.
        ValueError: where a name or an id is unknown, or there is none.
    """
    if isinstance(class_labels, Tensor):
        dtype, shape = class_labels.dtype, list(class_labels.shape)
        if str(dtype) != "torch.int64" or len(shape) > 1:
            raise ValueError(f"class_labels: expected int64 [B], got {dtype} {shape}")
        class_labels = class_labels.flatten().tolist()
    elif isinstance(class_labels, str) or not isinstance(class_labels, Sequence):
        class_labels = [class_labels]
    ids = [_label_id(label, labels, num_classes) for label in class_labels]
    if not ids:
        raise ValueError("class_labels: expected at least one label, got none")
    return ids


def _label_id(label: object, labels: Mapping[str, int], num_classes: int) -> int:
    if isinstance(label, str):
        return find_label(label, labels)
    kind = type(label).__name__
    try:
        index = operator.index(label)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"class_labels: expected names or integer ids, got {kind}") from error
    if isinstance(label, bool):
        raise TypeError(f"class_labels: expected names or integer ids, got {kind}")
    if not 0 <= index < num_classes:
        raise ValueError(f"class_labels: expected ids in [0, {num_classes}), got {index}")
    return index


__all__ = ["ClassLabels", "find_label", "label_ids", "label_table"]
