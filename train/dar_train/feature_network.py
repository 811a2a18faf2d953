"""A perceptual loss over a convolutional network of one's own, kept in one .safetensors file.

    loss = mean over the outputs f of mean over pixels |f(x)/|f(x)| - f(y)/|f(y)||^2

LPIPS with weights of one; one pass over both pictures. The file's tensors are the weights, and its
metadata, under "layers", is a JSON list of what to compute: numbers and names, nothing that runs.
An exported program (torch.export) is not read: loading one unpickles, and evaluates expressions.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dar_fast.files import atomic_write

EPS = 1e-10
FORMAT = "dar-feature-network-1"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh,
}  # fmt: skip
MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu", nn.Tanh: "tanh",
}  # fmt: skip
POOLS: dict[str, Callable[..., Tensor]] = {"max_pool": F.max_pool2d, "avg_pool": F.avg_pool2d}
SIZES = {"stride", "padding", "dilation", "groups", "size"}


class Layer(NamedTuple):
    """One step of the network."""

    kind: str  # conv, an activation, a pool, or output: what the loss compares
    name: str = ""  # of a convolution's tensors: <name>.weight and <name>.bias
    options: dict[str, int] = {}  # noqa: RUF012  stride, padding, dilation, groups, size


class FeatureNetwork(nn.Module):
    """Outputs of a chain of layers on pictures `[B, 3, R, R]` in [-1, 1].

    The chain sees (x - mean) / std of its own three channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, layers: Sequence[Layer], weights: dict[str, Tensor], mean: Tensor, std: Tensor
    ) -> None:
        super().__init__()
        self.layers = list(layers)
        self.places = {name: f"weight_{i}" for i, name in enumerate(sorted(weights))}
        for name, place in self.places.items():
            self.register_buffer(place, weights[name])
        self.register_buffer("mean", mean.view(1, 3, 1, 1))
        self.register_buffer("std", std.view(1, 3, 1, 1))

    def _weight(self, name: str) -> Tensor | None:
        place = self.places.get(name)
        return None if place is None else self.get_buffer(place)

    def forward(self, images: Tensor) -> list[Tensor]:
        x, outputs = (images - self.mean) / self.std, []
        for layer in self.layers:
            if layer.kind == "output":
                outputs.append(x)
            elif layer.kind == "conv":
                weight, bias = (self._weight(f"{layer.name}.{part}") for part in ("weight", "bias"))
                if weight is None:
                    raise ValueError(f"perceptual: expected a tensor {layer.name}.weight, got none")
                x = F.conv2d(x, weight, bias, **layer.options)
            elif layer.kind in ACTIVATIONS:
                x = ACTIVATIONS[layer.kind](x)
            else:
                size = layer.options["size"]
                rest = {k: v for k, v in layer.options.items() if k != "size"}
                x = POOLS[layer.kind](x, size, **rest)
        return outputs

    def distance(self, images: Tensor, predicted: Tensor) -> Tensor:
        """The loss of `images` `[B, 3, R, R]` and `predicted` `[m B, 3, R, R]`, a scalar.

        Row i of `predicted` is of picture i mod B. Differentiable in `predicted`.
        """
        with torch.no_grad():
            wanted = self(images)
        total = images.new_zeros((), dtype=torch.float32)
        for a, b in zip(wanted, self(predicted), strict=True):
            a, b = (F.normalize(f.float(), dim=1, eps=EPS) for f in (a, b))
            a = a.repeat(len(b) // len(a), 1, 1, 1)
            total = total + (a - b).square().sum(1).mean()
        return total / len(wanted)


def save_feature_network(
    network: nn.Sequential,
    outputs: Sequence[int],
    file: Path,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> None:
    """Write a chain of modules to `file`, for `--perceptual`.

    Args:
        network: Conv2d, ReLU, SiLU, GELU, Tanh, MaxPool2d and AvgPool2d, on three channels.
        outputs: indices of the modules whose outputs the loss compares.
        file: .safetensors.
        mean, std: of the three channels, for pictures in [-1, 1].

    Raises:
        ValueError: where a module is of another kind, or an index is out of range.
    """
    if not outputs or not all(0 <= i < len(network) for i in outputs):
        raise ValueError(f"outputs: expected indices below {len(network)}, got {list(outputs)}")
    layers: list[dict[str, Any]] = []
    for i, module in enumerate(network):
        layers.append(_described(module, str(i)))
        if i in outputs:
            layers.append({"kind": "output"})
    tensors = {name: t.detach().float().contiguous() for name, t in network.state_dict().items()}
    description = {"layers": layers, "mean": list(mean), "std": list(std)}
    with atomic_write(file) as temporary:
        save_file(tensors, temporary, {"format": FORMAT, "network": json.dumps(description)})


def _described(module: nn.Module, name: str) -> dict[str, Any]:
    def one(value: Any) -> int:
        pair = (value, value) if isinstance(value, int) else value
        if not isinstance(pair, tuple) or pair[0] != pair[1]:
            raise ValueError(f"network.{name}: expected one size for both sides, got {value}")
        return int(pair[0])

    if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
        sizes = {k: one(getattr(module, k)) for k in ("stride", "padding", "dilation")}
        return {"kind": "conv", "name": name, **sizes, "groups": module.groups}
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        kind = "max_pool" if isinstance(module, nn.MaxPool2d) else "avg_pool"
        sizes = {k: one(getattr(module, k)) for k in ("stride", "padding")}
        return {"kind": kind, "size": one(module.kernel_size), **sizes}
    if type(module) in MODULES:
        return {"kind": MODULES[type(module)]}
    raise ValueError(
        f"network.{name}: expected Conv2d with zero padding, an activation of {list(ACTIVATIONS)} "
        f"or a pool, got {module}"
    )


def load_feature_network(file: Path, size: int) -> FeatureNetwork:
    """The network in `file`, tried on a picture of `size` pixels a side.

    Raises:
        ValueError: where the file is missing, damaged, or describes no network that runs.
    """
    if file.suffix != ".safetensors" or not file.is_file():
        raise ValueError(
            "perceptual: expected a .safetensors file of "
            f"dar_train.feature_network.save_feature_network, got {file}"
        )
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"perceptual: expected readable weights in {file}, got {error}") from error
    try:
        if metadata.get("format") != FORMAT:
            raise ValueError(f"format {FORMAT}, got {metadata.get('format')!r}")
        description = json.loads(metadata["network"])
        layers = [_layer(entry) for entry in description["layers"]]
        if not any(layer.kind == "output" for layer in layers):
            raise ValueError("at least one output, got none")
        mean, std = (torch.tensor(description[k], dtype=torch.float32) for k in ("mean", "std"))
        network = FeatureNetwork(layers, weights, mean, std)
        with torch.no_grad():
            network(torch.zeros(1, 3, size, size))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"perceptual: expected a network in {file}: {error}") from error
    return network.eval().requires_grad_(False)


def _layer(entry: Any) -> Layer:
    if not isinstance(entry, dict):
        raise ValueError(f"expected layers as objects, got {entry!r}")
    kind, name = entry.get("kind"), entry.get("name", "")
    options = {k: v for k, v in entry.items() if k not in ("kind", "name")}
    known = {"conv", "output", *ACTIVATIONS, *POOLS}
    sizes = all(k in SIZES and type(v) is int and 0 <= v < 2**16 for k, v in options.items())
    if kind not in known or not isinstance(name, str) or not sizes:
        raise ValueError(f"expected a layer among {sorted(known)} with whole sizes, got {entry}")
    return Layer(kind, name, options)
