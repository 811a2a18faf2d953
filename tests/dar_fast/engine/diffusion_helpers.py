"""What the tests of the engine's diffusion half share."""

from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dar_fast.config import PixelDiTConfig, TokenizerConfig
from dar_fast.engine.conditions import Conditions
from dar_fast.engine.diffusion import Diffusion
from dar_fast.engine.graphs import TapeCapture
from dar_fast.engine.launcher import GraphLauncher
from dar_fast.engine.rows import StepRow
from dar_fast.engine.slots import SlotState
from dar_fast.models import Tokenizer
from dar_kernels import prefer


class NoHostReads(TorchDispatchMode):
    """Fails where a value of a tensor is wanted on the host."""

    FORBIDDEN = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.equal.default,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.FORBIDDEN:
            raise AssertionError(f"{func} reads from the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def launchers(graphs, rows, slots):
    """None, or one of graphs on tape, which hold no C++ of ours: then the ops are PyTorch's."""
    if not graphs:
        yield None
        return
    with prefer("torch"):
        yield GraphLauncher(TapeCapture(), rows, slots)


ONE_CODE_A_GROUP = TokenizerConfig(
    image_size=16, patch_size=4, encoder_dim=32, encoder_depth=1, decoder_dim=192, decoder_depth=2,
    head_dim=16, codebook_size=64, num_tokens=4, num_groups=4, num_steps=4, query_table=4,
    dit=PixelDiTConfig(dim=192, depth=2, patch_size=4, head_dim=16),
)  # fmt: skip
SMALL_BF16 = replace(
    ONE_CODE_A_GROUP, decoder_dim=32, num_tokens=16, query_table=16,
    dit=PixelDiTConfig(dim=32, depth=4, patch_size=4, head_dim=16),
)  # fmt: skip


def random_tokenizer(config, dtype=torch.float32):
    """Random weights, none of them zero, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Tokenizer(config, gate_init=0.5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.to(dtype).eval()


def random_codes(config, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = rows, config.num_tokens
    return torch.randint(config.codebook_size, shape, generator=generator)


def extend_all(conditions, codes, slot_ids):
    """Write `codes` `[B, N]` into slots and make the conditions of all groups."""
    conditions.slots.codes[list(slot_ids)] = codes
    for group in range(conditions.slots.config.num_groups):
        conditions.extend(group, slot_ids)


def ready(tokenizer, codes, slots=None, **options):
    """A diffusion whose slots 0 … B - 1 have the conditions of `codes` and no noise yet."""
    state = SlotState(tokenizer, slots or len(codes))
    deterministic = options.get("deterministic", False)
    conditions = Conditions(tokenizer, state, deterministic, options.get("launcher"))
    extend_all(conditions, codes, range(len(codes)))
    return Diffusion(tokenizer, state, **options)


def rows(slots, step, num_steps, solver="adams2"):
    return [StepRow(slot=s, step=step, num_steps=num_steps, solver=solver) for s in slots]


def decoded(diffusion, seeds, num_steps, solver="adams2"):
    """Pictures of the first slots, all in step; and every step's previews."""
    slots = range(len(seeds))
    for slot, seed in zip(slots, seeds, strict=True):
        diffusion.start(slot, seed)
    previews = [diffusion.step(rows(slots, i, num_steps, solver)) for i in range(num_steps)]
    return torch.stack([diffusion.image(slot) for slot in slots]), previews
