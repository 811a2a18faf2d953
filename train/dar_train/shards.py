"""Tensors of which a rank may hold a shard (DTensor), or all, as where nothing is sharded."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached; every rank calls it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, detached, in the same memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor) -> None:
    """Write `value`, whole and the same on every rank, over a tensor."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(
            value, tensor.device_mesh, tensor.placements, src_data_rank=None
        ).to_local()
    local(tensor).copy_(value)


__all__ = ["assign", "local", "whole"]
