"""dar_fast: the engine for D-AR, "Diffusion via Autoregressive Models" (arXiv 2505.23660).

Shapes use one glossary everywhere:
    B batch, N tokens, D width, H heads, Dh head width, K groups, Q tokens a group, V codes, P patch,
    R image resolution, S denoising steps, M rows, C channels of a code, F hidden width of an MLP.
"""

__version__ = "0.1.0"
