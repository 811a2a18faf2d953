"""`dar train …`: hands the rest of the line to dar_train, which comes with the extra `train`."""

import importlib
from collections.abc import Sequence


def train(argv: Sequence[str]) -> None:
    """Run dar_train's command line; its errors come out as they are.

    Raises:
        RuntimeError: where a package that training needs is missing.
    """
    try:
        command_line = importlib.import_module("dar_train.cli")
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"dar train: expected the packages of the extra 'train', got no {error.name}; "
            "install them: pip install 'dar-fast[train]'"
        ) from error
    command_line.run(list(argv))
