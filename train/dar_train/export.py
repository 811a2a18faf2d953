"""The trained parts as folders of the released format: bf16 safetensors and config.json."""

import copy
from pathlib import Path

import torch
from torch import nn

from dar_fast.checkpoint import save_model
from dar_train.reporting import logger


def export_component(module: nn.Module, folder: Path) -> Path:
    """Write `module` in bf16 as one component folder and return it."""
    weights = copy.deepcopy(module).to(torch.bfloat16).cpu()
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(weights, folder)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    logger.info("wrote %s, %.1f MB", folder, size / 1e6)
    return folder
