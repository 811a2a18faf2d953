"""The front door: class labels in, pictures out, with previews while later codes are still drawn.

Source: arXiv 2505.23660, §3.
"""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from dar_fast.checkpoint import CheckpointError
from dar_fast.checkpoint.pipeline_folder import (
    check_parts,
    load_parts,
    pick_dtype,
    save_parts,
)
from dar_fast.device import pick_device
from dar_fast.engine import Engine, EngineConfig
from dar_fast.engine.batch import batch_frames
from dar_fast.engine.keeper import EngineKeeper
from dar_fast.flow import Solver
from dar_fast.frames import Frame, draw_frames
from dar_fast.images import Images, OutputType, convert_images
from dar_fast.labels import ClassLabels, label_ids
from dar_fast.models import Prior, Tokenizer
from dar_fast.models.layers import ProductDtype
from dar_fast.outputs import PipelineEvent, PipelineOutput
from dar_fast.request import Request, Seeds, StepCallback, make_request
from dar_fast.sampling import GuidanceScale, Temperature

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class DARPipeline:
    """A prior and a tokenizer, put in evaluation mode, and the names of the classes.

    Args:
        prior: draws codes.
        tokenizer: turns them into pictures; on the same device.
        labels: one name a class in order of the ids, or name to id; None: the model has no names.
        engine: how the engine is made that calls go through.

    Raises:
        TypeError, ValueError: where the parts do not fit each other.
    """

    def __init__(
        self,
        prior: Prior,
        tokenizer: Tokenizer,
        labels: Sequence[str] | Mapping[str, int] | None = None,
        engine: EngineConfig | None = None,
        dit_products: ProductDtype = "as given",
    ) -> None:
        self.labels = check_parts(prior, tokenizer, labels)
        self.prior = prior.eval()
        self.tokenizer = tokenizer.eval()
        self._keeper = EngineKeeper(prior, tokenizer, engine or EngineConfig())
        self._dit_products = dit_products
        self._compiled = False

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        engine: EngineConfig | None = None,
        dit_products: ProductDtype = "as given",
    ) -> Self:
        """The pipeline of a folder that `save_pretrained` wrote, or "demo", the embedded model.

        Args:
            path: a folder, or "demo" (a folder of that name is "./demo").
            device: by default the GPU where there is one, else the CPU.
            dtype: of the weights; by default fp32 on the CPU, bf16 on a GPU. In bf16 on a CPU the
                pixel DiT keeps a second copy of them, in the order that its products read.
            engine: how the engine is made that calls go through.
            dit_products: "fp8": the pixel DiT's large products in fp8, with scales of rows and
                channels; faster on a GPU of capability 9.0 or more, computed, slowly, on a CPU.

        Raises:
            CheckpointError: where the folder is missing, incomplete or corrupt.
            TypeError, ValueError: where device or dtype is none.
            UnavailableError: where the device has no fp8 products.
        """
        place = pick_device(device)
        parts = load_parts(path, place, pick_dtype(dtype, place))
        try:
            pipeline = cls(parts.prior, parts.tokenizer, parts.labels, engine, dit_products)
        except ValueError as error:
            raise CheckpointError(f"{os.fspath(path)}: {error}") from error
        pipeline.tokenizer.pixel_dit.pack(dit_products)
        return pipeline

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write model_index.json, prior/ and tokenizer/ to the folder `path`, made where missing.

        Nothing of an earlier model there is touched before all of the new one is written.

        Raises:
            OSError: where the folder cannot be written, or the disk is full.
        """
        save_parts(path, self.prior, self.tokenizer, list(self.labels))

    @property
    def device(self) -> torch.device:
        return self.prior.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the tokenizer's weights."""
        return self.tokenizer.dtype

    @property
    def engine(self) -> Engine:
        """The engine that calls and streams go through; made at first use, and again where the
        weights have moved or another implementation is preferred (`dar_kernels.prefer`)."""
        return self._keeper.engine()

    def close(self) -> None:
        """Stop the engine's threads and free its memory; the next call makes another one."""
        self._keeper.close()

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move the weights, or cast them; what is None stays."""
        self.close()
        for module in (self.prior, self.tokenizer):
            module.to(device=device, dtype=dtype)
        self.tokenizer.pixel_dit.pack(self._dit_products)
        return self

    def compile(self, mode: str | None = None, *, backend: str = "inductor") -> Self:
        """Compile the plain models in place, whole: decode step, token decoder and pixel DiT.

        The first pictures wait for the compiler, and once more each for another dtype and the first
        other batch sizes. Drawing then goes by the plain path, not by the engine.
        Within `dar_kernels.prefer("torch")` no op of `dar_kernels` is opaque to the compiler.

        Args:
            mode: of torch.compile.
            backend: of torch.compile.

        Raises:
            ValueError: where there is no such mode.
        """
        if mode not in (None, *COMPILE_MODES):
            raise ValueError(f"mode: expected one of {list(COMPILE_MODES)} or None, got {mode!r}")
        dit = self.tokenizer.pixel_dit
        dit.rotary.tables(self.device)  # made while tracing, they would be traced twice
        for module in (self.prior, self.tokenizer.token_decoder, dit):
            module.compile(fullgraph=True, mode=mode, backend=backend)
        self._compiled = True
        return self

    def get_label_ids(self, class_labels: ClassLabels) -> list[int]:
        """Class ids of names (or ids), as written, else whatever the case and hyphens, else by the
        part behind the slash: the first label that fits.

        Raises:
            TypeError: where one is neither a name nor an integer.
            ValueError: where one is unknown; the message holds the nearest names.
        """
        return label_ids(class_labels, self.labels, self.prior.config.num_classes)

    def __call__(
        self,
        class_labels: ClassLabels,
        *,
        seeds: Seeds | None = None,
        guidance_scale: GuidanceScale = 4.0,
        temperature: Temperature = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_inference_steps: int | None = None,
        solver: Solver = "adams2",
        prefix_codes: Tensor | None = None,
        num_groups: int | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
    ) -> PipelineOutput:
        """Draw one picture a label; each depends on its label, its seed and the settings alone.

        Args:
            class_labels: a name or an id, several, or an int64 tensor `[B]` of ids.
            seeds: one a picture in [0, 2^63), or one integer s for s, s + 1, …; drawn where None.
            guidance_scale: a number, or (first, last) of a schedule linear in the codes, or
                `PerGroup` of K numbers; 1: none.
            temperature: ≥ 0, or `PerGroup` of K such numbers; 0 is greedy.
            top_k: codes kept by rank; 0 keeps all.
            top_p: probability mass kept, in (0, 1].
            num_inference_steps: S solver steps, in [1, 10000]; the tokenizer's number by default.
            solver: "adams2" or "euler".
            prefix_codes: the first codes (layout control): int64 `[B, P]`, or `[P]` for all.
            num_groups: draw only the first G groups; for G < K the result is the jump estimate
                after the last step that needs no more than these.
            output_type: "pil"; "np", fp32 `[B, R, R, 3]` in [0, 1]; "pt", fp32 `[B, 3, R, R]` in
                [0, 1]; "codes", no picture and no solver step.
            callback_on_step_end: called as (pipeline, i, t, {"latents", "preview", "codes"}) after
                solver step i = 0 … S - 1, evaluated at time t, with pictures `[B, 3, R, R]`; it may
                return {"latents": …} to go on from there. What it raises ends the call. Such a
                call draws batch-wise by the plain path, not by the engine.

        Raises:
            TypeError, ValueError: before any work, where an argument does not fit.
        """
        request = make_request(
            class_labels, seeds=seeds, guidance_scale=guidance_scale, temperature=temperature,
            top_k=top_k, top_p=top_p, num_inference_steps=num_inference_steps, solver=solver,
            prefix_codes=prefix_codes, num_groups=num_groups, output_type=output_type,
            callback_on_step_end=callback_on_step_end, label_names=self.labels,
            num_classes=self.prior.config.num_classes, config=self.tokenizer.config,
        )  # fmt: skip
        result = deque(self._frames(request, previews=False), maxlen=1)[0]
        images = result.estimate
        return PipelineOutput(
            None if images is None else convert_images(images, request.output_type),
            result.codes,
            request.seeds,
        )

    def stream(
        self,
        class_labels: ClassLabels,
        *,
        seeds: Seeds | None = None,
        guidance_scale: GuidanceScale = 4.0,
        temperature: Temperature = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_inference_steps: int | None = None,
        solver: Solver = "adams2",
        prefix_codes: Tensor | None = None,
        num_groups: int | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
    ) -> Iterator[PipelineEvent]:
        """The same as it comes: after each of the S steps a preview a picture, then the pictures.

        A preview is the jump estimate; it comes while later groups are drawn, and costs no network
        evaluation. The arguments are those of a call; with output_type "codes" an event's `image`
        is the picture's codes so far. Stop iterating to stop the work.

        Raises:
            TypeError, ValueError: at once, before the first event, where an argument does not fit.
        """
        request = make_request(
            class_labels, seeds=seeds, guidance_scale=guidance_scale, temperature=temperature,
            top_k=top_k, top_p=top_p, num_inference_steps=num_inference_steps, solver=solver,
            prefix_codes=prefix_codes, num_groups=num_groups, output_type=output_type,
            callback_on_step_end=callback_on_step_end, label_names=self.labels,
            num_classes=self.prior.config.num_classes, config=self.tokenizer.config,
        )  # fmt: skip
        return self._events(request)

    def _frames(self, request: Request, previews: bool) -> Iterator[Frame]:
        """Through the engine; by the plain path where a callback takes part, or once compiled."""
        if request.callback is not None or self._compiled:
            return draw_frames(self, request)
        return batch_frames(self.engine, request, previews)

    def _events(self, request: Request) -> Iterator[PipelineEvent]:
        for frame in self._frames(request, previews=True):
            shown: Images = frame.codes
            if frame.estimate is not None:
                shown = convert_images(frame.estimate, request.output_type)
            for index, seed in enumerate(request.seeds):
                yield PipelineEvent(
                    kind="image" if frame.final else "preview",
                    index=index,
                    step=frame.step,
                    image=shown[index],
                    codes=frame.codes[index],
                    seed=seed,
                )


__all__ = ["DARPipeline", "PipelineEvent", "PipelineOutput"]
