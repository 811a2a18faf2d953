"""`dar tokenize`: a data set's codes in one folder, from one process or many under torchrun.

dar tokenize --tokenizer runs/tokenizer/tokenizer --data imagenet --out tokens --ten-crop
torchrun --nproc-per-node 8 -m dar_fast.cli tokenize …
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from dar_fast.cli.parse import run_command
from dar_fast.cli.report import progress, say
from dar_train.reporting import logger, shown_logs
from dar_train.tokens.manifest import Precision, Spec, folder_hash, read_manifest, views_of

if TYPE_CHECKING:
    from dar_train.distributed import Ranks
    from dar_train.tokens.encode import Progress

LOG_SECONDS = 10.0  # between lines where there is no terminal
LISTED = 5  # unreadable pictures named in the summary

Folder = Annotated[Path, arg(metavar="FOLDER")]


def tokenize(
    *,
    tokenizer: Folder,
    data: Annotated[Path, arg(metavar="DATA")],
    out: Folder,
    ten_crop: bool = False,
    flip: bool = False,
    moves: int = 0,
    batch: int = 128,
    precision: Precision = "fp32",
    device: str = "auto",
    workers: int = 4,
    seed: int = 0,
) -> None:
    """Encode a data set into codes for `dar train prior --tokens`. Killed, it goes on where it was.

    Args:
        tokenizer: Folder of the trained tokenizer.
        data: Pictures as dar train takes them: a packed file, a folder, shards, tars, hf:FOLDER.
        out: Folder for codes.npy, labels.npy, held_out.npy and manifest.json.
        ten_crop: Ten crops of each picture at 1.1 times the size, as published; five are mirrored.
        flip: Also the mirror image of each picture; the ten crops have theirs already.
        moves: Further versions of each picture, moved by up to 5% and two pixels of 32.
        batch: Pictures encoded together, and written together.
        precision: fp32, or bf16: faster on a GPU, but codes near a tie differ from those in fp32.
        device: auto, cpu, cuda or cuda:<n>; auto is a GPU where there is one.
        workers: Processes that read pictures; 0: none.
        seed: Of the moves.
    """
    for name, value, least in (
        ("moves", moves, 0), ("batch", batch, 1), ("workers", workers, 0), ("seed", seed, 0),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    from dar_fast.device import pick_device
    from dar_train.data import open_pictures
    from dar_train.distributed import ranks_of_environment
    from dar_train.tokens.encode import load_tokenizer, spec_of, write_tokens

    ranks = ranks_of_environment(pick_device(None if device == "auto" else device))
    tokenizer_hash = folder_hash(tokenizer)
    model = load_tokenizer(tokenizer, ranks.device)
    pictures = open_pictures(data, model.config.image_size)
    spec = spec_of(
        model, tokenizer_hash, pictures, batch=batch, precision=precision, seed=seed,
        views=views_of(ten_crop=ten_crop, flip=flip, moves=moves),
    )  # fmt: skip
    began = time.monotonic()
    last: list[Progress] = []
    with _shown(spec, ranks) as show:

        def report(now: "Progress") -> None:
            last[:] = [now]
            show(now)

        complete = write_tokens(out, model, pictures, spec, ranks, workers=workers, report=report)
    _say_rate(last, ranks, time.monotonic() - began)
    _say_end(out, complete, fresh=bool(last), ranks=ranks)


@contextmanager
def _shown(spec: Spec, ranks: "Ranks") -> Iterator[Callable[["Progress"], None]]:
    """A bar of this rank's chunks on a terminal, lines elsewhere."""
    mine = len(range(ranks.rank, spec.chunks, ranks.world))
    logged, moved = time.monotonic(), 0
    with progress(f"encoding {spec.pictures} pictures", mine) as advance, shown_logs():

        def show(now: "Progress") -> None:
            nonlocal logged, moved
            there = mine - now.chunks + now.chunk  # those of an earlier run count
            while ranks.first and moved < there:
                moved += 1
                advance()
            if time.monotonic() - logged >= LOG_SECONDS:
                logged = time.monotonic()
                where = (ranks.rank, now.chunk, now.chunks)
                logger.info("rank %d: chunk %d of %d, %s", *where, _rate(now))

        yield show


def _rate(now: "Progress") -> str:
    return f"{now.encodings / now.seconds:,.0f} encodings/s" if now.seconds > 0 else "at once"


def _say_rate(last: "Sequence[Progress]", ranks: "Ranks", seconds: float) -> None:
    if last:
        now = last[0]
        who = f"rank {ranks.rank}: " if ranks.world > 1 else ""
        say(
            f"{who}encoded {now.pictures:,} pictures, {now.encodings:,} views, in {seconds:.1f} s: "
            f"{_rate(now)}"
        )


def _say_end(out: Path, complete: bool, *, fresh: bool, ranks: "Ranks") -> None:
    found = read_manifest(out)
    if found is None or not complete:
        say(f"rank {ranks.rank}: done; the other ranks are not yet")
        return
    if not fresh and ranks.first:  # nothing was to do, but to look whether it is all there
        from dar_train.tokens.store import open_store

        open_store(out, verify=True)
    views, M, N = found.spec.shape
    say(f"{out}: complete, {views} views of {M:,} pictures, {N} codes each")
    if found.skipped:
        say(f"left out {len(found.skipped)} pictures that could not be read:")
        for skipped in found.skipped[:LISTED]:
            say(f"  {skipped.reason}")
        if len(found.skipped) > LISTED:
            say(f"  and {len(found.skipped) - LISTED} more, in {out / 'manifest.json'}")


def run(argv: Sequence[str]) -> None:
    """Run one command line; errors come out as they are.

    Raises:
        ValueError: where the arguments do not parse, or what they name does not fit.
    """
    run_command(tokenize, argv, "dar tokenize")
