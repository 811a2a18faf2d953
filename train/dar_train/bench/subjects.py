"""The two that take turns: a training run as recipes make it, and the plain eager loop.

Both train the same model on the same random samples in the same batch under bf16 autocast. The
plain one is what one writes first: the modules' PyTorch operators one by one, attention under a
dense mask, whole logits, all tokens of all groups, optimizer and average parameter by parameter.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_fast.config import PriorConfig
from dar_fast.models import Prior, Tokenizer
from dar_kernels import prefer
from dar_train.data import PictureBatch, to_float
from dar_train.distributed import ranks_of_environment
from dar_train.host_memory import keep_freed_memory
from dar_train.loop import Loop
from dar_train.prior_loop import parallel_prior
from dar_train.prior_task import PriorTask
from dar_train.recipes import PRIOR_RECIPES, TOKENIZER_RECIPES, PriorRecipe, TokenizerRecipe
from dar_train.tokenizer_figures import HeldOutFigures
from dar_train.tokenizer_loop import make_tokenizer, parallel_tokenizer
from dar_train.tokenizer_task import TokenizerTask
from dar_train.tokens import Store, code_batches, views_of
from dar_train.tokens.manifest import Manifest, Spec
from dar_train.training import attention_of

SAMPLES = 64  # random ones that the batches are drawn from
ENDLESS = 1_000_000  # steps: a bench never gets there


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is trained and how; all that a child process needs."""

    model: Literal["prior", "tokenizer"]
    preset: str
    device: str
    batch: int
    micro_batch: int | None
    compile: bool
    attention: str | None
    recompute: Literal["none", "selective", "full"]
    threads: int | None

    def recipe(self, out: Path) -> PriorRecipe | TokenizerRecipe:
        """The preset's recipe with this setting; without losses that need weights files."""
        common: dict[str, Any] = {
            "steps": ENDLESS, "minutes": None, "batch": self.batch, "device": self.device,
            "micro_batch": self.micro_batch, "compile": self.compile, "attention": self.attention,
            "recompute": self.recompute, "workers": 0, "out": out, "init": None, "parallel": "ddp",
            "precision": "bf16", "start": "fresh",
        }  # fmt: skip
        if self.model == "prior":
            return replace(PRIOR_RECIPES[self.preset], **common)
        without: dict[str, Any] = {
            "lpips_weights": None,
            "repa_weights": None,
            "rollout": 0.0,
            "crop": False,
        }
        return replace(TOKENIZER_RECIPES[self.preset], continuous_steps=0, **without, **common)


class Subject(NamedTuple):
    """One that trains: a step, and what holds memory."""

    step: Callable[[], object]
    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    average: nn.Module | None


class _Pictures:
    """Batches of the same random pictures again and again."""

    def __init__(self, batch: int, size: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (min(batch, SAMPLES), 3, size, size)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        images = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]
        self.batch = PictureBatch(
            images.to(device), torch.zeros(batch, dtype=torch.int64, device=device),
            torch.arange(batch),
        )  # fmt: skip

    def next(self) -> PictureBatch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None

    def skipped(self) -> Sequence[str]:
        return ()

    def close(self) -> None:
        return None


def _store(c: PriorConfig) -> Store:
    """Random codes in memory."""
    rng = np.random.default_rng(0)
    spec = Spec(
        tokenizer="random", data="random", label_names=(), pictures=SAMPLES, tokens=c.num_tokens,
        codebook_size=c.vocab_size, views=views_of(), held_out="none", seed=0, precision="fp32",
        batch=SAMPLES,
    )  # fmt: skip
    codes = rng.integers(0, c.vocab_size, (1, SAMPLES, c.num_tokens)).astype(np.uint16)
    labels = torch.from_numpy(rng.integers(0, c.num_classes, SAMPLES))
    everything = torch.arange(SAMPLES)
    return Store(Path(), Manifest(spec, True), codes, labels, everything, everything[:1])


@contextmanager
def trained(setting: Setting) -> Iterator[Subject]:
    """The run of a recipe, by the loop that `dar train` has."""
    with ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        recipe = setting.recipe(out)
        stack.enter_context(attention_of(recipe))
        ranks = ranks_of_environment(torch.device(setting.device))
        if ranks.device.type == "cpu":
            keep_freed_memory()
        loop: Loop[Any]
        if isinstance(recipe, PriorRecipe):
            parallel = parallel_prior(recipe, ranks)
            store = _store(recipe.config())
            codes = code_batches(store, batch=recipe.batch, seed=0, ranks=ranks)
            loop = Loop(recipe, PriorTask(recipe, parallel, codes, store, None), parallel)
        else:
            parallel = parallel_tokenizer(recipe, ranks)
            pictures = _Pictures(recipe.batch, recipe.config().image_size, ranks.device)
            images = pictures.batch.images
            held_out = HeldOutFigures(images[:1], 0, out, ranks.device)
            task = TokenizerTask(recipe, parallel, pictures, held_out, lambda: images)
            loop = Loop(recipe, task, parallel)
        loop.task.model.train()
        stack.callback(loop.task.batches.close)
        average = loop.ema.saved if recipe.ema else None
        yield Subject(loop.step, loop.task.model, loop.optimizers, average)


@contextmanager
def plain(setting: Setting) -> Iterator[Subject]:
    """The plain eager loop."""
    with ExitStack() as stack:
        stack.enter_context(prefer("torch"))
        stack.enter_context(prefer("sdpa-masked", op="attention"))
        recipe = setting.recipe(Path())
        device = torch.device(setting.device)
        torch.manual_seed(0)
        loss: Callable[[], Tensor]
        model: nn.Module
        if isinstance(recipe, PriorRecipe):
            model, loss = _plain_prior(recipe, device)
        else:
            model, loss = _plain_tokenizer(recipe, device)
        betas = recipe.betas
        kind = torch.optim.AdamW if recipe.weight_decay else torch.optim.Adam
        optimizer = kind(model.parameters(), lr=1e-4, betas=betas, weight_decay=recipe.weight_decay)
        average = copy.deepcopy(model) if recipe.ema else None
        model.train()

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=torch.bfloat16):
                total = loss()
            total.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
            optimizer.step()
            if average is not None:
                with torch.no_grad():
                    for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                        mine.lerp_(theirs, 1 - recipe.ema)

        yield Subject(step, model, [optimizer], average)


def _plain_prior(recipe: PriorRecipe, device: torch.device) -> tuple[Prior, Callable[[], Tensor]]:
    model = Prior(recipe.config(), dropout=recipe.dropout).to(device)
    store = _store(model.config)
    rows = torch.arange(recipe.batch) % SAMPLES

    def loss() -> Tensor:
        codes = store.rows(0, rows).to(device)
        labels = store.labels[rows].to(device)
        dropped = torch.rand(len(labels), device=device) < recipe.class_dropout
        labels = labels.masked_fill(dropped, model.config.null_class)
        return F.cross_entropy(model(codes, labels).flatten(0, 1), codes.flatten())

    return model, loss


def _plain_tokenizer(
    recipe: TokenizerRecipe, device: torch.device
) -> tuple[Tokenizer, Callable[[], Tensor]]:
    config = recipe.config()
    model = make_tokenizer(recipe, config, device)
    pictures = _Pictures(recipe.batch, config.image_size, device).batch.images

    def loss() -> Tensor:
        images = to_float(pictures)
        u = torch.rand(len(images), device=device)
        out = model.training_forward(images, u, torch.randn_like(images), align=False)
        return out.fm + out.vq + out.commit

    return model, loss
