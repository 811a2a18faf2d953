"""Optional losses that need a weights file: LPIPS (Zhang et al. 2018) and REPA (Yu et al. 2024).

    perceptual = LPIPS_vgg(image, x̂_1);  alignment = 1 - cos(head, DINOv2 ViT-B/14 at 224²)

A VGG-16 pass over both pictures, and a ViT-B pass over one: more than the tokenizer's own step.
They run in the dtype of autocast, where there is one; only VGG's activations of one of the two
pictures are kept for the backward pass, since the other needs no gradient. Where m draws share a
picture, row i of a prediction is one of picture i mod B, and DINOv2 runs once for all of them.
"""

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_train.feature_network import load_feature_network

AuxiliaryLoss = Callable[[Tensor, Tensor], Tensor]

DINO = "vit_base_patch14_dinov2"
DINO_SIZE = 224
DINO_MEAN = (0.485, 0.456, 0.406)
DINO_STD = (0.229, 0.224, 0.225)


def _weights(field: str, file: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors or a weights-only .pth file."""
    if not file.is_file():
        raise ValueError(f"{field}: expected a weights file, got {file}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise ValueError(f"{field}: expected readable weights in {file}, got {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{field}: expected a state dict in {file}, got {type(loaded).__name__}")
    return loaded


def import_torchvision() -> None:
    """Import torchvision, also where its own operators were built for another torch.

    Such a build lacks two operators that it registers fakes for; nothing here calls them.

    Raises:
        ImportError: where it is not installed.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        module: Any = importlib.import_module("torchvision")
        module._dar_schemas = library  # definitions last as long as this object


def _imported(field: str, package: str) -> Any:
    """A package that imports torchvision."""
    try:
        import_torchvision()
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{field}: the package {error.name or package} is missing: pip install {package}"
        ) from error


def perceptual_loss(weights: Path, device: torch.device) -> AuxiliaryLoss:
    """LPIPS over a VGG-16 trunk from `weights` (torchvision's names, features.*).

    Raises:
        ValueError: where the file or the package is missing, or the weights are another network's.
    """
    state = _weights("lpips_weights", weights)
    lpips = _imported("lpips_weights", "lpips")
    with warnings.catch_warnings():
        # lpips asks torchvision for VGG by an older name of an argument
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    trunk = {}
    for part in ("slice1", "slice2", "slice3", "slice4", "slice5"):
        for name in getattr(network.net, part).state_dict():
            if f"features.{name}" not in state:
                raise ValueError(f"lpips_weights: expected features.{name} in {weights}")
            trunk[f"{part}.{name}"] = state[f"features.{name}"]
    network.net.load_state_dict(trunk)
    network = network.to(device).eval().requires_grad_(False)

    def loss(images: Tensor, predicted: Tensor) -> Tensor:
        value: Tensor = network(_shared(images, predicted), predicted.to(images.dtype)).mean()
        return value

    return loss


def feature_loss(file: Path, size: int, device: torch.device) -> AuxiliaryLoss:
    """The distance of a network of one's own, for pictures of `size` pixels a side.

    Raises:
        ValueError: where `file` holds no network that `dar_train.feature_network` saved.
    """
    network = load_feature_network(file, size).to(device)

    def loss(images: Tensor, predicted: Tensor) -> Tensor:
        return network.distance(images, predicted.to(images.dtype))

    return loss


def _shared(rows: Tensor, draws: Tensor) -> Tensor:
    """`rows` `[B, …]` as often as `draws` `[m B, …]` has them."""
    m = len(draws) // len(rows)
    return rows if m == 1 else rows.repeat(m, *(1,) * (rows.ndim - 1))


def alignment_loss(weights: Path, device: torch.device) -> AuxiliaryLoss:
    """1 - cos of the alignment head [m B, 256, 768] and DINOv2 ViT-B/14's patch features.

    Raises:
        ValueError: where the file or the package is missing, or the weights are another network's.
    """
    state = _weights("repa_weights", weights)
    timm = _imported("repa_weights", "timm")
    network = timm.create_model(DINO, pretrained=False, img_size=DINO_SIZE, num_classes=0)
    names = _imported("repa_weights", "timm.models.vision_transformer")
    try:
        network.load_state_dict(names.checkpoint_filter_fn(state, network))
    except RuntimeError as error:
        raise ValueError(f"repa_weights: expected {DINO} in {weights}, got {error}") from error
    network = network.to(device).eval().requires_grad_(False)
    mean = torch.tensor(DINO_MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(DINO_STD, device=device).view(1, 3, 1, 1)

    def loss(images: Tensor, head: Tensor) -> Tensor:
        resized = F.interpolate(
            images, (DINO_SIZE, DINO_SIZE), mode="bicubic", antialias=True, align_corners=False
        )
        with torch.no_grad():
            tokens = network.forward_features(((resized + 1) / 2 - mean) / std)
            target = _shared(tokens[:, network.num_prefix_tokens :], head)  # [m B, 256, 768]
        return 1 - F.cosine_similarity(head.float(), target.float(), dim=-1).mean()

    return loss
