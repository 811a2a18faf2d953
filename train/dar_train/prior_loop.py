"""Training of the prior over a folder of codes, which it writes first where there is none."""

import json
from functools import partial
from pathlib import Path

from dar_fast.config import PriorConfig
from dar_fast.files import atomic_write
from dar_fast.models.prior import Prior
from dar_fast.models.tokenizer import Tokenizer
from dar_train.data import open_pictures
from dar_train.distributed import Ranks
from dar_train.export import export_component
from dar_train.init import start_weights
from dar_train.loop import Loop
from dar_train.parallel import Parallel, parallelize
from dar_train.prior_task import PriorTask
from dar_train.recipes import PriorRecipe
from dar_train.recompute import recompute
from dar_train.reporting import logger
from dar_train.tokens import (
    CodeBatch,
    Progress,
    Spec,
    Store,
    await_complete,
    check_belongs,
    code_batches,
    folder_hash,
    load_tokenizer,
    open_store,
    spec_of,
    views_of,
    write_tokens,
)
from dar_train.training import parameter_millions, seed_weights, train


def _check_fit(config: PriorConfig, spec: Spec) -> None:
    fits = [("vocab_size", spec.codebook_size), ("num_tokens", spec.tokens)]
    fits += [("num_classes", len(spec.label_names))] if spec.label_names else []
    for field, expected in fits:
        got = getattr(config, field)
        if got != expected:
            raise ValueError(
                f"model: expected {field} {expected} for this tokenizer and data, got {got}; "
                f"set --override {field}={expected}"
            )


def _check_labels(config: PriorConfig, store: Store) -> None:
    wrong = (store.labels >= config.num_classes).nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"labels: expected 0 to {config.num_classes - 1}, got {int(store.labels[first])} of "
            f"picture {first}, the first of {len(wrong)}"
        )


def _is_there(data: Path) -> bool:
    text = str(data).removeprefix("hf:")
    return "{" in text or Path(text).exists()


def open_tokens(
    recipe: PriorRecipe, config: PriorConfig, tokenizer: Tokenizer, ranks: Ranks
) -> Store:
    """The codes that the recipe names, or those of its data, encoded now where they are not yet.

    Raises:
        ValueError: where codes are of another tokenizer, of other pictures, labels or views, or
            do not fit the model.
    """
    digest = folder_hash(recipe.tokenizer)
    views = views_of(ten_crop=recipe.ten_crop, flip=recipe.flip, moves=recipe.views)
    size = tokenizer.config.image_size
    if recipe.tokens is None:
        folder = recipe.out / "tokens"
        pictures = open_pictures(recipe.data, size)
        spec = spec_of(tokenizer, digest, pictures, views=views, seed=recipe.seed)
        _check_fit(config, spec)  # before the work
        if not write_tokens(
            folder, tokenizer, pictures, spec, ranks, workers=recipe.workers, report=_log
        ):
            await_complete(folder)
        return open_store(folder)
    store = open_store(recipe.tokens)
    check_belongs(store, tokenizer=digest)
    _check_fit(config, store.spec)
    if not _is_there(recipe.data):
        logger.info("data: %s is not there; the tokens say what they are of", recipe.data)
    elif ranks.first:
        pictures = open_pictures(recipe.data, size)
        check_belongs(store, data=pictures.fingerprint, label_names=pictures.label_names)
    if store.spec.views != views:
        raise ValueError(
            f"tokens: expected the recipe's views, {'; '.join(map(str, views))}, got "
            f"{'; '.join(map(str, store.spec.views))} in {recipe.tokens}; set --ten-crop, --flip "
            "and --views as they were, or run dar tokenize into another folder"
        )
    return store


def _log(now: Progress) -> None:
    logger.info("encoded chunk %d of %d", now.chunk, now.chunks)


def parallel_prior(recipe: PriorRecipe, ranks: Ranks) -> Parallel:
    """The model as a run starts with it, on all ranks.

    Raises:
        ValueError: where the weights to start from do not fit.
    """
    seed_weights(recipe)
    model = Prior(recipe.config(), dropout=recipe.dropout).to(ranks.device)
    if recipe.init is not None:
        start_weights(model, recipe.init)
    blocks = list(model.blocks())
    recompute(blocks, recipe.recompute)
    return parallelize(model, "loss", recipe, ranks, blocks)


def prior_loop(recipe: PriorRecipe, ranks: Ranks) -> Loop[CodeBatch]:
    """The loop of a run, resumed where the recipe says so.

    Raises:
        ValueError: where the data, the tokenizer, the codes or the model do not fit the recipe.
    """
    config = recipe.config()
    tokenizer = load_tokenizer(recipe.tokenizer, ranks.device)
    store = open_tokens(recipe, config, tokenizer, ranks)
    _check_labels(config, store)
    parallel = parallel_prior(recipe, ranks)
    batches = code_batches(store, batch=recipe.batch, seed=recipe.seed, ranks=ranks)
    task = PriorTask(recipe, parallel, batches, store, tokenizer if ranks.first else None)
    loop = Loop(recipe, task, parallel)
    logger.info(
        "prior %s: %.1fM parameters, %d training pictures, %d views of each, %s",
        recipe.model, parameter_millions(parallel.model),
        len(store.train), len(store.spec.views), ranks.device,
    )  # fmt: skip
    if store.manifest.skipped:
        logger.warning(
            "%d pictures could not be read when the codes were made; %s lists them",
            len(store.manifest.skipped), store.folder / "manifest.json",
        )  # fmt: skip
    if ranks.first:
        with atomic_write(recipe.out / "labels.json") as temporary:
            temporary.write_text(json.dumps(store.spec.label_names) + "\n")
    return loop


def train_prior(recipe: PriorRecipe) -> bool:
    """Train, resume or finish a prior into `recipe.out / "prior"`, as `train` says."""
    return train(recipe, prior_loop, partial(export_component, folder=recipe.out / "prior"))
