"""The sequential diffusion tokenizer: image -> codes -> conditions -> S denoising steps -> image.

encode: encoder, then nearest codes. decode: step i of the solver reads group
floor(i / S K + 0.5) of the condition tokens. Source: arXiv 2505.23660, §3; REFERENCE §3 and §4.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dar_fast.config import TokenizerConfig
from dar_fast.flow import (
    PREVIEWS,
    SOLVERS,
    Preview,
    Solver,
    Trajectory,
    drawn_group_start,
    group_start,
    sampling_times,
    shift_time,
    start_from,
)
from dar_fast.models.encoder import Encoder
from dar_fast.models.pixel_dit import PixelDiT
from dar_fast.models.quantizer import Quantizer
from dar_fast.models.token_decoder import TokenDecoder
from dar_fast.sampling import image_noise, resolve_seeds


class States(NamedTuple):
    """Solver states that a training pass evaluates beside its draws, each at its own step."""

    x: Tensor  # [B, 3, R, R], in units of data_std
    t: Tensor  # [B]
    start: Tensor  # [B] int64, first token of the group that the step reads


class TokenizerTraining(NamedTuple):
    """One training pass; the loss is fm + vq + commit."""

    predicted_velocity: Tensor  # [B, 3, R, R]
    velocity: Tensor  # [B, 3, R, R]
    fm: Tensor  # flow matching, over data_std^2
    vq: Tensor
    commit: Tensor
    predicted_images: Tensor  # [B, 3, R, R], the jump estimate of x_1 in image units
    repa: Tensor | None  # [B, 256, 768]
    codes: Tensor  # [B, n], of the tokens that were computed
    used: Tensor  # [B, n] bool: those up to the end of a group that was drawn or is a state's
    state_velocity: Tensor | None  # [B, 3, R, R], at the solver states, where there were any


class Tokenizer(nn.Module):
    """Pictures to codes and back.

    Args:
        config: sizes.
        gate_init: start of the residual gates of encoder and token decoder; published: 0.
    """

    def __init__(self, config: TokenizerConfig, gate_init: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, gate_init)
        self.quantizer = Quantizer(config)
        self.token_decoder = TokenDecoder(config, gate_init)
        self.pixel_dit = PixelDiT(config.dit, config.decoder_dim, config.image_size)

    @property
    def device(self) -> torch.device:
        return self.quantizer.codebook.device

    @property
    def dtype(self) -> torch.dtype:
        return self.quantizer.codebook.dtype

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError unless `images` is a floating-point `[B, 3, R, R]`."""
        R = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, R, R) or not images.is_floating_point():
            raise ValueError(
                f"images: expected floating point [B, 3, {R}, {R}] in [-1, 1], "
                f"got {images.dtype} {list(images.shape)}"
            )

    def check_codes(self, codes: Tensor) -> None:
        """Raise ValueError unless `codes` is `[B, N]` int64, each in [0, V)."""
        N, V = self.config.num_tokens, self.config.codebook_size
        if codes.ndim != 2 or codes.shape[1] != N or codes.dtype != torch.int64:
            raise ValueError(
                f"codes: expected int64 [B, {N}], got {codes.dtype} {list(codes.shape)}"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < V:
            raise ValueError(
                f"codes: expected values in [0, {V}), got {int(codes.min())} to {int(codes.max())}"
            )

    def pre_quantize(self, images: Tensor, tokens: int | None = None) -> Tensor:
        """`[B, n, C]`: the encoder's rows before normalising, of the first `tokens` or all N."""
        return self.quantizer.proj_in(self.encoder(images, tokens))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes `[B, N]` int64 of images `[B, 3, R, R]` in [-1, 1]."""
        self.check_images(images)
        return self.quantizer.nearest(self.pre_quantize(images.to(self.device, self.dtype)))

    def conditions(self, codes: Tensor) -> Tensor:
        """Condition tokens `[B, N, D]` of codes `[B, N]`."""
        return self.token_decoder(self.quantizer.embed(codes))

    def noise(self, seeds: int | Sequence[int] | Tensor | None, batch: int) -> Tensor:
        """Starting noise `[B, 3, R, R]`, a function of each picture's own seed."""
        R = self.config.image_size
        keys = torch.tensor(resolve_seeds(seeds, batch), dtype=torch.int64, device=self.device)
        return image_noise(keys, (3, R, R))

    def trajectory(
        self,
        noise: Tensor,
        num_steps: int | None = None,
        solver: Solver = "adams2",
        step: int = 0,
        preview: Preview = "jump",
    ) -> Trajectory:
        """A solver run that starts from `noise`, or from the state `noise` at step `step` > 0.

        Raises:
            ValueError: where the solver, preview, number of steps or shape does not fit.
        """
        num_steps = self.config.num_steps if num_steps is None else num_steps
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"num_steps: expected an integer >= 1, got {num_steps!r}")
        if solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {list(SOLVERS)}, got {solver!r}")
        if preview not in PREVIEWS:
            raise ValueError(f"preview: expected one of {list(PREVIEWS)}, got {preview!r}")
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < num_steps:
            raise ValueError(f"start_step: expected an integer in [0, {num_steps}), got {step!r}")
        self.check_images(noise)
        times = sampling_times(num_steps, self.config.dit.time_shift).tolist()
        x = noise.to(self.device, torch.promote_types(self.dtype, torch.float32))
        return Trajectory(x, times, self.config.dit.data_std, solver, preview, step)

    def group_start(self, step: int, num_steps: int) -> int:
        """First token of the group that a step reads."""
        return group_start(step, num_steps, self.config.num_groups, self.config.num_tokens)

    def advance(self, run: Trajectory, conditions: Tensor) -> None:
        """One denoising step; `conditions` `[B, n, D]` holds at least the group that it reads."""
        start = self.group_start(run.step, len(run.times) - 1)
        group = conditions[:, start : start + self.config.group_size]
        group = group.clone(memory_format=torch.contiguous_format)  # a compiled DiT guards strides
        t = torch.full((len(run.x),), run.time, device=run.x.device)
        run.advance(self.pixel_dit(run.x.to(self.dtype), t, group.to(self.dtype)).tokens)

    @torch.no_grad()
    def decode(
        self,
        codes: Tensor,
        noise: Tensor | None = None,
        seeds: int | Sequence[int] | Tensor | None = None,
        num_steps: int | None = None,
        solver: Solver = "adams2",
        stop_after: int | None = None,
        preview: Preview = "jump",
        init_image: Tensor | None = None,
        start_step: int = 0,
    ) -> Tensor:
        """Images `[B, 3, R, R]` of codes `[B, N]`, near [-1, 1] but not clamped.

        Args:
            codes: int64 in [0, V).
            noise: `[B, 3, R, R]` to start from; else drawn from `seeds`.
            seeds: one a picture, or the first of a range; 0, 1, … by default.
            num_steps: S ≥ 1; the configuration's by default.
            solver: "adams2" or "euler".
            stop_after: in (start_step, S]: stop after this step and return the preview there.
            preview: "jump", the paper's estimate, or "solver", the official preview.
            init_image: `[B, 3, R, R]` in [-1, 1] that `start_step` starts from, as SDEdit does.
            start_step: the first step to take, in [0, S); above 0 with an `init_image` only.

        Raises:
            ValueError: where an argument does not fit.
        """
        self.check_codes(codes)
        if noise is None:
            noise = self.noise(0 if seeds is None else seeds, len(codes))
        elif len(noise) != len(codes):
            raise ValueError(f"noise: expected {len(codes)} pictures, got {len(noise)}")
        run = self.trajectory(noise, num_steps, solver, start_step, preview)
        last = len(run.times) - 1
        if stop_after is not None and (
            isinstance(stop_after, bool)
            or not isinstance(stop_after, int)
            or not start_step < stop_after <= last
        ):
            raise ValueError(
                f"stop_after: expected an integer in [{start_step + 1}, {last}], got {stop_after!r}"
            )
        if (init_image is not None) != (start_step > 0):
            raise ValueError(f"init_image: expected one if start_step > 0, got step {start_step}")
        if init_image is not None:
            self.check_images(init_image)
            if len(init_image) != len(codes):
                raise ValueError(f"init_image: expected {len(codes)}, got {len(init_image)}")
            run.x.copy_(start_from(init_image.to(run.x), run.x, run.time, run.data_std))
        conditions = self.conditions(codes.to(self.device))
        while run.step < (stop_after or last):
            self.advance(run, conditions)
        return run.image() if stop_after is None else run.preview()

    def training_forward(
        self,
        images: Tensor,
        u: Tensor,
        noise: Tensor,
        code_noise: Tensor | None = None,
        states: States | None = None,
        *,
        tokens: int | None = None,
        count: Tensor | float | None = None,
        align: bool = True,
    ) -> TokenizerTraining:
        """Losses at drawn times and noise (REFERENCE §4).

        Only the drawn group's conditions reach the pixel DiT; the VQ losses cover the tokens up to
        it. The encoder and the token decoder run once for all draws of a picture.

        Args:
            images: `[B, 3, R, R]` in [-1, 1].
            u: `[m B]` in [0, 1), m draws a picture: row i is one of picture i mod B.
            noise: `[m B, 3, R, R]`, standard normal.
            code_noise: `[B, n, C]`, n ≥ `tokens`, that stands in for quantising.
            states: one a picture, evaluated along with the draws.
            tokens: how many of the N tokens to compute, none before the end of a group that a draw
                or a state reads: no token sees a later one, so the others change nothing. None: N.
            count: what the VQ losses are divided by; None: the tokens used in this call. Pieces of
                a batch add up to its mean if one with b of T pictures passes b / T times its count.
            align: whether to run the alignment head, where there is one.

        Raises:
            ValueError: where `tokens` is out of range, or too small (seen on a CPU only).
        """
        config = self.config
        Q, N = config.group_size, config.num_tokens
        t, start = self.drawn(u)
        x_1 = config.dit.data_std * images.repeat(len(u) // len(images), 1, 1, 1)
        wide = t[:, None, None, None]
        x_t = wide * x_1 + (1 - wide) * noise
        x = x_t
        if states is not None:
            x = torch.cat((x_t, states.x))
            t, start = torch.cat((t, states.t)), torch.cat((start, states.start))
        tokens = N if tokens is None else tokens
        least = int(start.max()) + Q if start.device.type == "cpu" else Q
        if not least <= tokens <= N:
            raise ValueError(f"tokens: expected an integer in [{least}, {N}], got {tokens}")
        if code_noise is not None:
            code_noise = code_noise[:, :tokens]
        quantized = self.quantizer.quantize(self.pre_quantize(images, tokens), code_noise)
        columns = start[:, None] + torch.arange(Q, device=u.device)
        group = self.token_decoder(
            self.quantizer.proj_out(quantized.embedding), columns=columns
        )  # [rows, Q, D]
        out = self.pixel_dit(x, t, group, align=align and config.dit.repa_layer is not None)
        predicted, at_states = out.velocity.to(x.dtype).tensor_split([len(u)])
        velocity = x_1 - noise
        used = torch.arange(tokens, device=u.device) < (start + Q)[:, None]  # [rows, n]
        rows = used.view(-1, len(images), tokens).sum(0)  # [B, n]: by how many rows of a picture
        count = rows.sum() if count is None else count
        return TokenizerTraining(
            predicted,
            velocity,
            (predicted - velocity).square().mean() / config.dit.data_std**2,
            (quantized.vq * rows).sum() / count,
            (quantized.commit * rows).sum() / count,
            (x_t + (1 - wide) * predicted) / config.dit.data_std,
            None if out.alignment is None else out.alignment[: len(u)],
            quantized.codes,
            rows > 0,
            None if states is None else at_states,
        )

    def drawn(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Times `[B]` and first tokens `[B]` of the groups, of draws `u` `[B]` in [0, 1)."""
        config = self.config
        start = drawn_group_start(u, config.num_groups, config.num_tokens)
        return shift_time(u, config.dit.time_shift), start
