"""Reading official `.pt` files without executing anything in them.

Opening costs the pickle (about 0.1 s for 3,000 tensors) and no weights: tensors are views over a
private mapping of the file.

    path -> Archive (zip, ranges checked) -> Machine (data.pkl) -> Storages (views over data/N)
"""

import os
from typing import Any

from dar_fast.checkpoint.archive import Archive
from dar_fast.checkpoint.errors import CheckpointError, Limits
from dar_fast.checkpoint.machine import Machine
from dar_fast.checkpoint.records import check_depth
from dar_fast.checkpoint.storages import Storages

VERIFY_BYTES = 64 << 20  # files up to this size are checked in full by default: under 0.1 s


def read_torch_file(
    path: str | os.PathLike[str], *, verify: bool | None = None, limits: Limits | None = None
) -> Any:
    """What `torch.save` wrote: tensors, containers, plain values, and a `Record` for the rest.

    Args:
        verify: check every checksum, which reads the whole file; None does so up to 64 MiB. Without
            it damaged weights of a large file go unnoticed; the pickle is checked always.
        limits: bounds on the pickle and the archive.

    Raises:
        CheckpointError: where the file is missing, damaged, or names what it may not.
    """
    limits = limits or Limits()
    try:
        archive = Archive(path, limits)
        if verify or (verify is None and archive.file_size <= VERIFY_BYTES):
            archive.verify()
        if archive.members["data.pkl"].size > limits.pickle_bytes:
            raise CheckpointError(f"pickle larger than {limits.pickle_bytes} bytes")
        value = Machine(archive.read("data.pkl"), Storages(archive, limits), limits).run()
        check_depth(value, limits.depth)
    except OSError as error:
        raise CheckpointError(f"{os.fspath(path)}: cannot be read ({error.strerror})") from error
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from None
    return value


__all__ = ["VERIFY_BYTES", "read_torch_file"]
