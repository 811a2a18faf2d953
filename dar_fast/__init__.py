"""dar_fast: the engine for D-AR, "Diffusion via Autoregressive Models" (arXiv 2505.23660).

Shapes use one glossary everywhere:
    B batch, N tokens, D width, H heads, Dh head width, K groups, Q tokens a group, V codes,
    P patch, R image resolution, S denoising steps, M rows, C channels of a code.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dar_fast.pipeline import DARPipeline

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`DARPipeline`, imported when first asked for: `dar --help` does not wait for torch."""
    if name == "DARPipeline":
        from dar_fast.pipeline import DARPipeline

        return DARPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["DARPipeline", "__version__"]
