"""`dar train …` and `dar tokenize …`: hand the rest of the line to dar_train (extra `train`)."""

import importlib
from collections.abc import Sequence


def train(argv: Sequence[str]) -> None:
    """Run dar_train's command line; its errors come out as they are.

    Raises:
        RuntimeError: where a package that training needs is missing.
    """
    run_extra("train", "dar_train.cli", argv)


def tokenize(argv: Sequence[str]) -> None:
    """Encode a data set into a folder of codes; errors come out as they are.

    Raises:
        RuntimeError: where a package that training needs is missing.
    """
    run_extra("tokenize", "dar_train.tokens.command", argv)


def run_extra(command: str, module: str, argv: Sequence[str]) -> None:
    """Hand the rest of the line to `run` of a module of dar_train.

    Raises:
        RuntimeError: where a package that training needs is missing.
    """
    try:
        command_line = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"dar {command}: expected the packages of the extra 'train', got no {error.name}; "
            "install them: pip install 'dar-fast[train]'"
        ) from error
    command_line.run(list(argv))
