"""What can go wrong with somebody else's file, and how much of it we are willing to read."""

from dataclasses import dataclass


class CheckpointError(RuntimeError):
    """A model file that cannot be read, does not fit the model, or asks for more than data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on one `.pt` file, some eight times above the largest official one.

    A tokenizer with optimizer and EMA has about 2,000 tensors: 90,000 opcodes, 1 MB, depth 6.
    """

    pickle_bytes: int = 32 << 20
    opcodes: int = 1_000_000
    memo: int = 500_000
    marks: int = 200  # open MARKs: nesting while reading
    depth: int = 200  # nesting of the result
    string_bytes: int = 1 << 20
    integer_bytes: int = 64
    copied: int = 8_000_000  # elements and bytes that constructors may copy
    dimensions: int = 16
    members: int = 100_000
    name_bytes: int = 512
    plain_values: int = 200_000  # values that one `Record.plain()` may visit


__all__ = ["CheckpointError", "Limits"]
