"""The weights alone out of a training state, of today's format or the first one, on the host."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dar_train.checkpoints.manifest import check_files, is_first_format, read_manifest
from dar_train.checkpoints.shards import Shards


def read_weights(state: Path, *, averaged: bool = True) -> dict[str, Tensor]:
    """The averaged weights of a state by name, whole, whoever saved them.

    Those that were trained where no average was kept, or where `averaged` is False.

    Raises:
        ValueError: where the state is missing or damaged.
    """
    if is_first_format(state):
        file = state / ("ema.safetensors" if averaged else "model.safetensors")
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"checkpoint: expected a readable {file}, got {error}") from error
    files = read_manifest(state).files
    kept = any(name.startswith("averaged.") for name in files)
    part = "averaged" if averaged and kept else "model"
    names = [name for name in sorted(files) if name.startswith(f"{part}.")]
    check_files(state, files, names)
    with Shards([state / name for name in names]) as shards:
        return {name.partition("/")[2]: shards.whole(name) for name in shards.tensors}
