"""Weights to start from: a component folder, or an official .pt.

Everything has to fit but what a recipe changes on purpose, the codebook, the class embedding, and
the prior's token embedding and head for other codes: those stay as the model starts them. So does
the tokenizer's alignment head, which is for training alone and may be missing on either side.
"""

from pathlib import Path

import torch
from torch import nn

from dar_fast.checkpoint import CheckpointError, load_model
from dar_fast.checkpoint import load_official_prior as official_prior
from dar_fast.checkpoint import load_official_tokenizer as official_tokenizer
from dar_fast.models import Prior, Tokenizer
from dar_fast.problems import ProblemsError
from dar_train.reporting import logger

MAY_DIFFER = {  # in shape, by the recipe
    Tokenizer: ("quantizer.codebook",),
    Prior: ("class_embedding.weight", "token_embedding.weight", "head.weight"),
}
ALIGNMENT_HEAD = "pixel_dit.repa_out."


def _load(model: nn.Module, path: Path) -> Prior | Tokenizer:
    if path.is_dir():
        return load_model(path, dtype=torch.float32)
    try:
        if isinstance(model, Tokenizer):  # an official file does not say for which size
            return official_tokenizer(path, image_size=model.config.image_size)
        return official_prior(path)
    except OSError as error:
        raise CheckpointError(f"init: expected a readable file, got {path} ({error})") from error


def start_weights(model: nn.Module, path: Path) -> list[str]:
    """Copy the weights in `path` into `model`; returns the names of those left as they were.

    Raises:
        CheckpointError: where `path` cannot be read; nothing in it is executed.
        ValueError: a line for each weight that does not fit; the model is as it was.
    """
    kind = next((cls for cls in MAY_DIFFER if isinstance(model, cls)), None)
    if kind is None:
        raise TypeError(f"init: expected a Prior or a Tokenizer, got {type(model).__name__}")
    source = _load(model, path)
    if not isinstance(source, kind):
        raise ValueError(f"init: expected a {kind.__name__} in {path}, got {type(source).__name__}")
    given = {name: tensor.detach() for name, tensor in source.state_dict().items()}
    wanted = model.state_dict()
    left, problems = [], []
    for name in sorted(given.keys() | wanted.keys()):
        if name.startswith(ALIGNMENT_HEAD) and (name not in given or name not in wanted):
            left += [name] if name in wanted else []
        elif name not in wanted:
            problems.append(f"init: expected no {name} for this model, got one in {path}")
        elif name not in given:
            problems.append(f"init: expected {name} in {path}, got none")
        elif given[name].shape != wanted[name].shape:
            if name in MAY_DIFFER[kind]:
                left.append(name)
                continue
            problems.append(
                f"init: expected {name} {list(wanted[name].shape)}, "
                f"got {list(given[name].shape)} in {path}"
            )
    if problems:
        raise ProblemsError(problems)
    with torch.no_grad():
        for name, tensor in wanted.items():
            if name not in left:
                tensor.copy_(given[name])
    logger.info("init: %d tensors from %s", len(wanted) - len(left), path)
    for name in left:
        logger.info("init: %s is left at its start", name)
    return left
