"""Several things wrong with one input, reported together."""

from collections.abc import Sequence


class ProblemsError(ValueError):
    """What is wrong, a line each: "field: expected X, got Y"."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type["ProblemsError"], tuple[tuple[str, ...]]]:
        return ProblemsError, (self.problems,)


__all__ = ["ProblemsError"]
