"""What calls and streams of the pipeline give."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dar_fast.images import Images


@dataclass(frozen=True, slots=True)
class PipelineOutput:
    """What a call returns."""

    images: (
        Images | None
    )  # by output_type: list of PIL, [B, R, R, 3] or [B, 3, R, R] in [0, 1]; "codes": None
    codes: Tensor  # [B, N] int64; [B, G Q] after num_groups = G
    seeds: list[int]  # one a picture; pass them again for the same pictures


@dataclass(frozen=True, slots=True)
class PipelineEvent:
    """One picture after one step."""

    kind: Literal["preview", "image"]
    index: int  # which picture of the batch
    step: int  # steps done, 1 … S
    image: Image.Image | NDArray[np.float32] | Tensor  # by output_type; "codes": the codes so far
    codes: Tensor  # [n] int64, this picture's codes so far; all of them with "image"
    seed: int  # this picture's


__all__ = ["PipelineEvent", "PipelineOutput"]
