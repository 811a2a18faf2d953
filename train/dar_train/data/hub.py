"""A Hugging Face data set on this machine: saved to disk, or a folder of parquet or arrow files.

Pictures are read by number from memory-mapped files; parquet is turned into arrow once, in the
cache of the package datasets.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dar_train.data.source import BROKEN, Sample, UnreadableError, digest, opened, unreadable

LABELS = ("label", "labels", "class", "cls", "fine_label", "y")


def _load(path: Path, files: Sequence[Path]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError(
            f"data: hf: needs the package datasets: pip install 'dar-fast[hf]' ({error})"
        ) from error
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    if files[0].suffix == ".parquet":
        return datasets.Dataset.from_parquet([str(file) for file in files])
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in files])


def files_of(path: Path) -> list[Path]:
    """Its parquet files, else its arrow files, in the order of their names."""
    for suffix in ("parquet", "arrow"):
        files = sorted(path.rglob(f"*.{suffix}"))
        if files:
            return files
    return []


class Hub:
    """One split: the data set at `path`, or those of its files that `files` names.

    Raises:
        ValueError: where there is no such data set, or no column of pictures or of labels in it.
        RuntimeError: without the package datasets.
    """

    def __init__(self, path: Path, files: Sequence[Path] | None = None) -> None:
        files = files_of(path) if files is None else files
        if not files:
            raise ValueError(f"data: expected a data set saved to disk or parquet, got {path}")
        rows = _load(path, files)
        import datasets

        features = rows.features
        pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        names = [name for name in LABELS if name in features]
        if not pictures or not names:
            raise ValueError(
                f"data: expected a column of pictures and one of {', '.join(LABELS)} in {path}, "
                f"got {', '.join(features)}"
            )
        self.path = path
        self._picture, self._label = pictures[0], names[0]
        rows = rows.select_columns([self._picture, self._label])
        self._rows = rows.cast_column(self._picture, datasets.Image(decode=False))
        self.labels: NDArray[np.int64] = np.asarray(rows[self._label], dtype=np.int64)
        kind = features[self._label]
        if isinstance(kind, datasets.ClassLabel):
            self.label_names = list(kind.names)
        else:
            self.label_names = [str(i) for i in range(int(self.labels.max(initial=0)) + 1)]
        parts = [(str(file.relative_to(path)), file.stat().st_size) for file in files]
        self.fingerprint = digest([b"hub", repr(parts).encode(), self.labels.tobytes()])

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.path}:{index}"

    def read(self, index: int) -> Sample:
        try:
            held = self._rows[index][self._picture]
            content = held["bytes"]
            if content is None:
                content = Path(held["path"]).read_bytes()
        except BROKEN as error:
            raise unreadable(error) from error
        if not isinstance(content, bytes):
            raise UnreadableError(f"expected the bytes of a picture, got {type(content).__name__}")
        return Sample(opened(content), int(self.labels[index]))
