"""`dar encode` and `dar decode`: pictures to packed code files and back.

A file is its codes and nothing else, so the model that reads it must be the one that wrote it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from dar_fast.cli.draw import check_count, steps_within, where
from dar_fast.cli.options import MODEL, Json, ModelOptions, Scale
from dar_fast.cli.pictures import (
    Pictures,
    Seed,
    Solver,
    Steps,
    check_some,
    decode_all,
    encode_all,
    read_pictures,
)
from dar_fast.cli.report import say, say_json

if TYPE_CHECKING:
    from torch import Tensor

    from dar_fast.config import TokenizerConfig


def encode(
    images: Pictures = (),
    *,
    out: Annotated[Path, arg(metavar="X.dar")] = Path("codes.dar"),
    model: OmitArgPrefixes[ModelOptions] = MODEL,
    json: Json = False,
) -> None:
    """Write the codes of pictures to a packed file: 448 bytes a picture for 256 codes of 14 bits.

    Args:
        images: Picture files; resized where they have another size.
        out: The code file.
        json: Print one JSON document.
    """
    from dar_fast.cli.save import check_output, save_bytes
    from dar_fast.codes_file import code_bits, pack

    check_some(images)
    check_output("out", out, ".dar")
    pipe = model.load()
    config = pipe.tokenizer.config
    data = pack(encode_all(pipe, read_pictures(pipe, images)), config.codebook_size)
    save_bytes(out, data)
    each, bits = len(data) // len(images), code_bits(config.codebook_size)
    if json:
        say_json(
            {
                "command": "encode",
                "model": model.model,
                **where(pipe),
                "inputs": [str(path) for path in images],
                "files": [str(out)],
                "bytes": len(data),
                "bytes_per_picture": each,
                "bits_per_code": bits,
                "codes_per_picture": config.num_tokens,
            }
        )
        return
    some = "1 picture" if len(images) == 1 else f"{len(images)} pictures"
    say(f"{out}: {some}, {each} bytes each: {config.num_tokens} codes of {bits} bits")


def decode(
    codes: Annotated[Positional[Path], arg(metavar="X.dar")],
    *,
    out: Annotated[str, arg(metavar="PATH")] = "decoded.png",
    groups: Annotated[int | None, arg(metavar="G", help_behavior_hint="(default: all)")] = None,
    seed: Seed = 0,
    steps: Steps = None,
    solver: Solver = "adams2",
    scale: Scale = None,
    model: OmitArgPrefixes[ModelOptions] = MODEL,
    json: Json = False,
) -> None:
    """Decode a packed code file: one picture as it is, several as a contact sheet or in a folder.

    Args:
        codes: The code file.
        out: A .png file, or a folder (it exists, or ends in /) for a file a picture.
        groups: Only the first G groups of codes, for a coarser picture from fewer bytes; of one
            picture, the start of its file is enough.
        seed: Seed of the noise that decoding starts from, the same for every picture.
        steps: Denoising steps.
        solver: How the steps are taken.
        scale: Enlarge pictures by this whole factor; single pictures stay as they are.
        json: Print one JSON document.
    """
    from dar_fast.cli.save import check_output, is_folder, save_png
    from dar_fast.cli.sheet import Tile, columns_for, contact_sheet, enlarge
    from dar_fast.images import to_pil

    check_count("scale", scale)
    check_count("steps", steps)
    target, folder = Path(out), is_folder(Path(out), out)
    if not folder:
        check_output("out", target, ".png")
    if not codes.is_file():
        raise FileNotFoundError(f"expected a code file, got '{codes}', which is none")
    pipe = model.load()
    config = pipe.tokenizer.config
    if groups is not None and not 1 <= groups <= config.num_groups:
        raise ValueError(f"groups: expected an integer in [1, {config.num_groups}], got {groups}")
    read = config.num_groups if groups is None else groups
    rows = read_rows(codes, config, read)
    stop = None if read == config.num_groups else max(1, steps_within(pipe, read, steps))
    decoded = decode_all(pipe, rows, seed=seed, num_steps=steps, solver=solver, stop_after=stop)
    pictures = to_pil(decoded)

    about = {
        "command": "decode",
        "model": model.model,
        **where(pipe),
        "input": str(codes),
        "groups": read,
        "seed": seed,
        "num_steps": steps or config.num_steps,
        "solver": solver,
    }
    if folder:
        target.mkdir(parents=True, exist_ok=True)
        files = [target / f"{codes.stem}-{i:03d}.png" for i in range(len(pictures))]
        for path, picture in zip(files, pictures, strict=True):
            save_png(path, enlarge(picture, scale or 1), about)
    elif len(pictures) == 1:
        files = [target]
        save_png(target, enlarge(pictures[0], scale or 1), about)
    else:
        files = [target]
        tiles = [Tile(picture, f"picture {i + 1}") for i, picture in enumerate(pictures)]
        save_png(target, contact_sheet(tiles, columns_for(len(tiles)), scale), about)
    if json:
        say_json({**about, "pictures": len(pictures), "files": [str(path) for path in files]})
        return
    some = "1 picture" if len(pictures) == 1 else f"{len(pictures)} pictures"
    part = "" if stop is None else f" from {read} of {config.num_groups} groups"
    say(f"{out}: {some}{part}")


def read_rows(path: Path, config: "TokenizerConfig", groups: int) -> "Tensor":
    """Codes `[B, N]` of a file; one that stops behind `groups` groups goes on with zeros.

    Raises:
        OSError: where the file cannot be read.
        RuntimeError: where it does not hold whole pictures of this model.
    """
    from dar_fast.codes_file import code_bits, picture_bytes, unpack

    data = path.read_bytes()
    size = picture_bytes(config.num_tokens, config.codebook_size)
    needed = -(-groups * config.group_size * code_bits(config.codebook_size) // 8)
    if needed <= len(data) < size:
        data = data[:needed].ljust(size, b"\0")
    if not data:
        raise RuntimeError(f"{path}: expected a multiple of {size} bytes, got an empty file")
    try:
        return unpack(data, config.num_tokens, config.codebook_size)
    except ValueError as error:
        raise RuntimeError(f"{path}: {error}") from error
