"""A small residual CNN with two heads, style and subgroup: it judges samples, nothing else.

About 60 MFLOPs a 32² picture at width 32. Labels are `style/subgroup`; with no slash, style is "".
"""

import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dar_fast.files import atomic_write
from dar_train.data import (
    HeldOut,
    PictureBatch,
    augment_drawn,
    chunks,
    held_out_pictures,
    open_pictures,
    picture_batches,
    to_float,
)
from dar_train.data.augmentation import DRAWS as AUGMENT_DRAWS
from dar_train.distributed import Ranks
from dar_train.draws import Draws
from dar_train.loop import Loop
from dar_train.parallel import Parallel, parallelize
from dar_train.recipes import ClassifierRecipe
from dar_train.reporting import logger
from dar_train.task import Batches, Loss, Run, autocast_of
from dar_train.training import seed_weights, train

CHUNK = 256
GROUPS = 8


class Prediction(NamedTuple):
    """Logits of both heads."""

    style: Tensor  # [B, styles]
    subgroup: Tensor  # [B, subgroups]


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.silu(norm(y)))
        return x + y


class Classifier(nn.Module):
    """Pictures [B, 3, R, R] in [-1, 1] to a style and a subgroup."""

    def __init__(self, label_names: list[str], width: int = 32, size: int = 32) -> None:
        super().__init__()
        if width % GROUPS:
            raise ValueError(f"width: expected a multiple of {GROUPS}, got {width}")
        pairs = [split_label(name) for name in label_names]
        self.label_names = list(label_names)
        self.styles = sorted({style for style, _ in pairs})
        self.subgroups = sorted({subgroup for _, subgroup in pairs})
        self.width, self.size = width, size
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
        for level in range(3):
            wide = width << level
            layers += [_Block(wide), nn.Conv2d(wide, 2 * wide, 2, stride=2)]
        layers += [nn.GroupNorm(GROUPS, 8 * width), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.2)
        self.style_head = nn.Linear(8 * width, len(self.styles))
        self.subgroup_head = nn.Linear(8 * width, len(self.subgroups))
        styles = [self.styles.index(style) for style, _ in pairs]
        subgroups = [self.subgroups.index(subgroup) for _, subgroup in pairs]
        self.register_buffer("style_of", torch.tensor(styles), persistent=False)
        self.register_buffer("subgroup_of", torch.tensor(subgroups), persistent=False)
        self.style_of: Tensor
        self.subgroup_of: Tensor

    def forward(self, images: Tensor) -> Prediction:
        x = self.dropout(self.trunk(images).mean(dim=(2, 3)))
        return Prediction(self.style_head(x), self.subgroup_head(x))

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Shares of pictures judged of their label's style, subgroup, and both."""
        style, subgroup = [], []
        for part in chunks(images, CHUNK):
            predicted = self(part.to(self.style_of.device))
            style.append(predicted.style.argmax(dim=-1))
            subgroup.append(predicted.subgroup.argmax(dim=-1))
        labels = labels.to(self.style_of.device)
        right_style = torch.cat(style) == self.style_of[labels]
        right_subgroup = torch.cat(subgroup) == self.subgroup_of[labels]
        return {
            "style": float(right_style.double().mean()),
            "subgroup": float(right_subgroup.double().mean()),
            "both": float((right_style & right_subgroup).double().mean()),
        }

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "model.safetensors") as temporary:
            save_file({k: v.contiguous() for k, v in self.state_dict().items()}, temporary)
        config = {"label_names": self.label_names, "width": self.width, "size": self.size}
        with atomic_write(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(config) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Classifier":
        """Read what `save` wrote.

        Raises:
            ValueError: where a file is missing, damaged or of something else.
        """
        try:
            config = json.loads((folder / "config.json").read_text())
            model = cls(config["label_names"], config["width"], config["size"])
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"classifier: expected a trained one in {folder}, got {error}"
            ) from error
        return model.eval()


def split_label(name: str) -> tuple[str, str]:
    """`noto/cat-face` to ("noto", "cat-face"); a name without a slash has style ""."""
    style, _, subgroup = name.rpartition("/")
    return style, subgroup


class ClassifierTask:
    """What the loop needs of the classifier's training."""

    title = "classifier"

    def __init__(
        self,
        recipe: ClassifierRecipe,
        parallel: Parallel,
        batches: Batches[PictureBatch],
        held_out: HeldOut,
    ) -> None:
        self.parallel = parallel
        self.batches = batches
        self.held_out = held_out
        self.autocast = autocast_of(recipe, parallel.ranks.device)

    @property
    def model(self) -> Classifier:
        """The classifier; its parameters may be shards."""
        return cast(Classifier, self.parallel.model)

    def arrange(self, batch: PictureBatch, draws: Draws) -> Tensor | None:
        return None

    def loss(self, batch: PictureBatch, draws: Draws) -> Loss:
        images = augment_drawn(to_float(batch.images), draws.uniform("augment", AUGMENT_DRAWS))
        with self.autocast:
            predicted: Prediction = self.parallel.call(images)
        style = F.cross_entropy(predicted.style.float(), self.model.style_of[batch.labels])
        subgroup = F.cross_entropy(
            predicted.subgroup.float(), self.model.subgroup_of[batch.labels], label_smoothing=0.1
        )
        return Loss(style + subgroup, {"style": style, "subgroup": subgroup})

    def after_step(self, batch: PictureBatch, draws: Draws, run: Run) -> dict[str, float]:
        return {}

    def notes(self) -> dict[str, float]:
        return {}

    def evaluate(self, averaged: nn.Module, step: int) -> dict[str, float]:
        if not isinstance(averaged, Classifier):
            raise TypeError(f"evaluate: expected a Classifier, got {type(averaged).__name__}")
        with self.autocast:
            return averaged.accuracy(to_float(self.held_out.images), self.held_out.labels)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None


def classifier_loop(recipe: ClassifierRecipe, ranks: Ranks) -> Loop[PictureBatch]:
    """The loop of a run, resumed where the recipe says so.

    Raises:
        ValueError: where the data do not fit the recipe.
    """
    pictures = open_pictures(recipe.data, recipe.size)
    batches = picture_batches(recipe, recipe.size, ranks, crop=False, flip=False, pictures=pictures)
    seed_weights(recipe)
    model = Classifier(list(pictures.label_names), recipe.width, recipe.size).to(ranks.device)
    parallel = parallelize(model, "forward", recipe, ranks, blocks=())
    held_out = held_out_pictures(pictures, recipe.size, len(pictures.held_out), recipe.seed)
    return Loop(recipe, ClassifierTask(recipe, parallel, batches, held_out), parallel)


def train_classifier(recipe: ClassifierRecipe) -> bool:
    """Train, resume or finish a classifier into `recipe.out / "classifier"`, as `train` says."""

    def export(averaged: nn.Module) -> None:
        cast(Classifier, averaged).save(recipe.out / "classifier")
        logger.info("wrote %s", recipe.out / "classifier")

    return train(recipe, classifier_loop, export)
