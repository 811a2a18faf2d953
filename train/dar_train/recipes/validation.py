"""What of a recipe needs a look at the machine: files, ranks, the device.

Costs no loading: a few looks at the file system.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from dar_fast.config import TokenizerConfig
from dar_fast.problems import ProblemsError
from dar_kernels.attention import OP as ATTENTION
from dar_train.recipes.base import Recipe
from dar_train.recipes.checks import of_known
from dar_train.recipes.prior import PriorRecipe
from dar_train.recipes.tokenizer import TokenizerRecipe

VGG = "https://download.pytorch.org/models/vgg16-397923af.pth"
DINO = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"
WEIGHTS = {  # field: what it is, and where to get it
    "lpips_weights": f"torchvision's VGG-16: {VGG}; none leaves the loss out",
    "repa_weights": f"DINOv2 ViT-B/14: {DINO}, or timm's vit_base_patch14_dinov2.lvd142m; "
    "none leaves the loss out",
    "perceptual": "what dar_train.feature_network.save_feature_network wrote of a chain of layers; "
    "none leaves the loss out",
}


def validate(recipe: Recipe, world: int = 1) -> None:
    """Check a recipe against the machine before anything is loaded.

    Args:
        world: ranks of the run.

    Raises:
        ProblemsError: a line for each thing wrong.
    """
    problems = [*_data(recipe), *_scale(recipe, world), *_weights(recipe), *_out(recipe.out)]
    if isinstance(recipe, TokenizerRecipe | PriorRecipe):
        try:
            config = recipe.config()
        except ProblemsError as error:
            problems = [*error.problems, *problems]
        else:
            if isinstance(recipe, TokenizerRecipe) and isinstance(config, TokenizerConfig):
                problems += _heads(recipe, config)
    if isinstance(recipe, PriorRecipe):
        problems += _codes(recipe)
    if problems:
        raise ProblemsError(problems)


def _data(recipe: Recipe) -> Iterator[str]:
    text = str(recipe.data)
    folder = Path(text.removeprefix("hf:"))
    optional = isinstance(recipe, PriorRecipe) and recipe.tokens is not None
    if "{" not in text and not folder.exists() and not optional:
        yield (
            f"data: expected a packed file or a folder of pictures, got {text!r} (not there); "
            "dar train emoji builds the embedded model's"
        )
    if getattr(recipe, "crop", False) and recipe.data.suffix == ".npz":
        yield (
            "crop: expected false with a packed file, whose pictures are no larger than the "
            "model's, got true"
        )


def _scale(recipe: Recipe, world: int) -> Iterator[str]:
    if recipe.batch % world:
        yield f"batch: expected a multiple of the {world} ranks, got {recipe.batch}"
    elif recipe.compile and recipe.micro_batch is not None:
        mine = recipe.batch // world
        if mine > recipe.micro_batch and mine % recipe.micro_batch:
            yield (
                f"micro_batch: expected a divisor of the {mine} samples of a rank with compile, "
                f"whose graphs have one shape, got {recipe.micro_batch}"
            )
    if recipe.steps is not None and recipe.warmup >= recipe.steps:
        yield f"warmup: expected fewer than the {recipe.steps} steps, got {recipe.warmup}"
    cuda = torch.cuda.is_available()
    if recipe.device.startswith("cuda") and not cuda:
        yield f"device: expected an available device, got {recipe.device!r} without a GPU"
    elif recipe.float8 and (recipe.device == "cpu" or not cuda):
        yield "float8: expected false on a CPU, got true"
    if recipe.attention is not None:
        yield from _attention(recipe.attention)
    if recipe.parallel == "fsdp" and recipe.optimizer == "muon" and world > 1:
        yield "optimizer: expected 'adamw' with parallel 'fsdp', got 'muon', for whole matrices"


def _attention(name: str) -> Iterator[str]:
    found = next((i for i in ATTENTION.implementations if i.answers(name)), None)
    if found is None:
        yield of_known("attention", name, [i.name for i in ATTENTION.implementations])
    elif (reason := found.missing()) is not None:
        yield f"attention: expected a back end that is here, got {name!r}: {reason}"


def _weights(recipe: Recipe) -> Iterator[str]:
    for field, source in WEIGHTS.items():
        file: Path | None = getattr(recipe, field, None)
        if file is not None and not file.is_file():
            yield f"{field}: expected a weights file, got {str(file)!r} (not there); {source}"
    if recipe.init is not None and not (
        (recipe.init / "config.json").is_file() or recipe.init.is_file()
    ):
        yield (
            f"init: expected a component folder or an official .pt, got {str(recipe.init)!r}; "
            "the authors of D-AR release theirs (arXiv 2505.23660)"
        )


def _out(out: Path) -> Iterator[str]:
    """Whether files can be made where `out` is or will be; leaves nothing there."""
    place = out.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        yield f"out: expected a folder that can be written, got {str(out)!r} ({reason})"


def _heads(recipe: TokenizerRecipe, config: TokenizerConfig) -> Iterator[str]:
    if recipe.repa_weights is not None and config.dit.repa_layer is None:
        yield (
            "repa_weights: expected none for a model without dit.repa_layer, got "
            f"{str(recipe.repa_weights)!r}"
        )


def _codes(recipe: PriorRecipe) -> Iterator[str]:
    if not recipe.tokenizer.is_dir():
        folder = str(recipe.tokenizer)
        yield f"tokenizer: expected the folder of a trained tokenizer, got {folder!r}"
    if recipe.tokens is not None and not (recipe.tokens / "manifest.json").is_file():
        yield (
            f"tokens: expected a folder that dar tokenize wrote, got {str(recipe.tokens)!r}; "
            "none encodes the data in this run"
        )
