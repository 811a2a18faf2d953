"""The engine on a GPU: graphs, three streams, pinned copies; the same codes as the plain path."""

import pytest
import torch
from engine_helpers import LONG, check_result, plain

from dar_fast import DARPipeline
from dar_fast.engine import Engine, EngineConfig, GenerationRequest
from dar_fast.sampling import Sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

REQUESTS = [
    GenerationRequest(
        label=i % 6, seed=i, num_steps=1 + i % 9, num_groups=1 + i % 4,
        sampling=Sampling(guidance_scale=(1.0, 1.0 + i % 3), temperature=0.5 + 0.1 * (i % 7)),
    )
    for i in range(24)
]  # fmt: skip


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turns"])
@pytest.mark.parametrize("capture", [True, False], ids=["graphs", "no graphs"])
def test_mixes_are_drawn_as_by_the_plain_path(
    fresh_pipeline: DARPipeline, capture: bool, overlap: bool
) -> None:
    expected = [plain(fresh_pipeline, request) for request in REQUESTS]  # on the CPU
    pipe = fresh_pipeline.to("cuda")
    config = EngineConfig(max_requests=7, diffusion_batch=3, capture=capture, overlap=overlap)
    with Engine(pipe.prior, pipe.tokenizer, config) as engine:
        handles = [engine.submit(request) for request in REQUESTS]
        for handle, wanted in zip(handles, expected, strict=True):
            check_result(handle.result(LONG), wanted, most=1e-3)
        assert engine.stats().retries == 0


@pytest.mark.parametrize("page_dtype", ["as weights", "int8", "fp8"])
@pytest.mark.parametrize("prior_weights", ["as given", "int8", "fp8"])
def test_alone_and_in_a_batch_the_codes_are_equal(
    fresh_pipeline: DARPipeline, prior_weights: str, page_dtype: str
) -> None:
    pipe = fresh_pipeline.to("cuda", torch.bfloat16)
    config = EngineConfig(
        max_requests=8,
        prior_weights=prior_weights,  # type: ignore[arg-type]
        page_dtype=page_dtype,  # type: ignore[arg-type]
        deterministic=True,
    )
    with Engine(pipe.prior, pipe.tokenizer, config) as engine:
        together = engine.generate(REQUESTS[:8])
        for request, result in zip(REQUESTS[:8], together, strict=True):
            alone = engine.generate([request])[0]
            assert torch.equal(alone.codes, result.codes)
            assert alone.image is not None and result.image is not None
            assert torch.equal(alone.image, result.image)
