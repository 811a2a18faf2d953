"""Tensors as safetensors files, one a part and rank, that any number of ranks can read again.

torch.distributed.checkpoint plans who writes which slice, replicas shared out among the ranks, and
who reads which; its own index of them is a pickle, so each file's header says what it holds.
A save writes every byte of the state once over all ranks, a load reads what the rank holds.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

SLICES = "slices"  # the key in a file's header: {name: [shape of the whole, offsets]}
SUFFIX = ".safetensors"


class Slice(NamedTuple):
    """What one rank writes of one tensor, named `part/name`."""

    name: str
    shape: tuple[int, ...]  # of the whole
    offsets: tuple[int, ...]
    data: Tensor


def plan_save(
    tensors: Mapping[str, Tensor], rank: int, gather: Callable[[Any], list[Any]]
) -> list[Slice]:
    """This rank's slices of `tensors`; `gather` gives every rank all ranks' plans."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
    plans, _ = planner.create_global_plan(gather(planner.create_local_plan()))
    slices = []
    for item in planner.finish_plan(plans[rank]).items:
        whole, data = item.tensor_data, planner.resolve_data(item)
        if whole is None or not isinstance(data, Tensor):
            raise TypeError(f"checkpoint: expected a tensor {item.index.fqn}, got {type(data)}")
        if data.numel() == 0 and math.prod(whole.size) > 0:
            continue  # more ranks than rows
        offsets = tuple(whole.chunk.offsets)
        slices.append(Slice(item.index.fqn, tuple(whole.size), offsets, data.detach()))
    return slices


def staged(slices: Iterable[Slice], buffers: dict[str, Tensor] | None) -> list[Slice]:
    """The slices in host memory; in `buffers`, kept from save to save, where training goes on.

    Without buffers, what is on the host already is not copied.
    """
    out, storages, on_device = [], set(), False
    for piece in slices:
        data = piece.data
        if buffers is None:
            host = data.to("cpu").contiguous()
            if host.untyped_storage().data_ptr() in storages:  # tied weights; a file wants copies
                host = host.clone()
            storages.add(host.untyped_storage().data_ptr())
        else:
            known = buffers.get(piece.name)
            if known is None or known.shape != data.shape or known.dtype != data.dtype:
                pinned = data.device.type == "cuda"
                known = torch.empty(data.shape, dtype=data.dtype, pin_memory=pinned)
                buffers[piece.name] = known
            host = known.copy_(data, non_blocking=True)
            on_device = on_device or data.device.type == "cuda"
        out.append(piece._replace(data=host))
    if on_device:
        torch.cuda.synchronize()
    return out


def write_slices(folder: Path, rank: int, slices: Iterable[Slice]) -> list[Path]:
    """One file a part under `folder`, on disk when this returns."""
    parts: dict[str, list[Slice]] = defaultdict(list)
    for piece in slices:
        parts[piece.name.partition("/")[0]].append(piece)
    files = []
    for part, pieces in parts.items():
        file = folder / f"{part}.{rank}{SUFFIX}"
        named = {piece.name.partition("/")[2]: piece for piece in pieces}
        if len(named) != len(pieces):
            raise ValueError(f"checkpoint: expected one slice a tensor of {part}, got several")
        header = {name: [piece.shape, piece.offsets] for name, piece in named.items()}
        tensors = {name: piece.data for name, piece in named.items()}
        save_file(tensors, file, metadata={SLICES: json.dumps(header)})
        file.chmod(folder.stat().st_mode & 0o666)  # safetensors gives its owner alone rights
        with file.open("rb") as written:
            os.fsync(written.fileno())
        files.append(file)
    return files


class Shards:
    """The tensors in safetensors files of one state, by `part/name`.

    Raises:
        ValueError: where a file is unreadable, or the slices do not make up whole tensors.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self._files: dict[tuple[str, tuple[int, ...]], Any] = {}
        self._open: list[Any] = []
        for file in files:
            try:
                self._add(file)
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                self.close()
                raise ValueError(f"checkpoint: expected a readable {file}, got {error}") from error
        for name, tensor in self.tensors.items():
            saved = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
            if saved != math.prod(tensor.size):
                self.close()
                raise ValueError(
                    f"checkpoint: expected {math.prod(tensor.size)} numbers of {name}, got {saved}"
                )

    def _add(self, file: Path) -> None:
        reader: Any = safe_open(file, framework="pt")
        self._open.append(reader.__enter__())
        slices = json.loads(reader.metadata()[SLICES])
        part = file.name.partition(".")[0]
        for name in reader.keys():
            shape, offsets = (tuple(int(n) for n in numbers) for numbers in slices[name])
            held = reader.get_slice(name)
            sizes = tuple(held.get_shape())
            if not len(shape) == len(offsets) == len(sizes):
                raise ValueError(f"slices of {len(shape)}, {len(offsets)}, {len(sizes)} dimensions")
            if any(
                o < 0 or o + n > whole for o, n, whole in zip(offsets, sizes, shape, strict=True)
            ):
                raise ValueError(f"a slice outside of {name} {shape}")
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            few = held[tuple(slice(0, 0) for _ in sizes)] if sizes else reader.get_tensor(name)
            tensor = self.tensors.setdefault(
                f"{part}/{name}",
                TensorStorageMetadata(TensorProperties(few.dtype), torch.Size(shape), []),
            )
            if tuple(tensor.size) != shape or tensor.properties.dtype != few.dtype:
                raise ValueError(f"slices of {name} of different shapes or types")
            tensor.chunks.append(chunk)
            if (f"{part}/{name}", offsets) in self._files:
                raise ValueError(f"{name} at {offsets} twice")
            self._files[f"{part}/{name}", offsets] = reader

    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Fill `targets`, whole tensors or shards of them, in place; names must be saved ones."""
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        metadata: Any = {name: self.tensors[name] for name in targets}
        planner.set_up_planner(dict(targets), Metadata(metadata), True)
        for item in planner.create_local_plan().items:
            target = planner.resolve_tensor(item).detach()
            target.copy_(self._piece(item))
            planner.commit_tensor(item, target)

    def _piece(self, item: ReadItem) -> Tensor:
        name, offsets = item.storage_index.fqn, item.storage_index.offset
        reader = self._files[name, tuple(offsets or ())]
        name = name.partition("/")[2]
        if not item.lengths:
            return reader.get_tensor(name)
        where = (slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
        return reader.get_slice(name)[tuple(where)]

    def whole(self, name: str) -> Tensor:
        """A tensor as it was saved, on the host."""
        saved = self.tensors[name]
        tensor = torch.empty(saved.size, dtype=saved.properties.dtype)
        self.read({name: tensor})
        return tensor

    def close(self) -> None:
        for reader in self._open:
            reader.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
