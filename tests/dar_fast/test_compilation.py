"""The models trace whole, with gradients and without; a compiled pipeline draws the same."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch

from dar_fast import DARPipeline
from dar_fast.models.decoding import CompiledDecoding, PlainDecoding, start_decoding
from dar_fast.sampling import Sampling

INPUTS = {
    "pixel_dit": lambda: (
        torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.6]), torch.randn(2, 4, 32),
    ),
    "encoder": lambda: (torch.randn(2, 3, 16, 16),),
    "token_decoder": lambda: (torch.randn(2, 16, 32),),
}  # fmt: skip


@pytest.mark.parametrize("grad", [False, True], ids=["sampling", "training"])
@pytest.mark.parametrize("part", [*INPUTS, "prior"])
def test_the_whole_graph_equals_eager(tiny_pipeline, part, grad):
    if part == "prior":
        model = copy.deepcopy(tiny_pipeline.prior)
        inputs = torch.randint(64, (2, 16)), torch.tensor([1, 6])
    else:
        model = copy.deepcopy(getattr(tiny_pipeline.tokenizer, part))
        inputs = INPUTS[part]()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        results = model(*inputs), compiled(*inputs)
    outputs = [out[0] if isinstance(out, tuple) else out for out in results]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    if grad:
        gradients = []
        for output in outputs:
            model.zero_grad()
            output.square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_block_trains_on_one_picture_in_bf16(tiny_pipeline):
    """Where sums over pictures and over patches fall together."""
    dit = copy.deepcopy(tiny_pipeline.tokenizer.pixel_dit)
    inputs = [x[:1] for x in INPUTS["pixel_dit"]()]
    gradients = []
    for compile_it in (False, True):
        dit.zero_grad()
        if compile_it:
            dit.blocks[0].compile(dynamic=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = dit(*inputs)
        velocity = velocity[0] if isinstance(velocity, tuple) else velocity
        velocity.float().square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in dit.blocks[0].parameters()]))
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.02


LABELS, SEEDS = [2, 0, 5], [11, 7, 2**63 - 1]


def graphs() -> int:
    """How many were made since the counters were cleared."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def compiled(fresh_pipeline):
    """The pipeline, traced but not compiled, which is enough for shapes and numbers."""
    torch._dynamo.utils.counters.clear()
    return fresh_pipeline.compile(backend="eager")


def copy_of(pipe):
    return DARPipeline(copy.deepcopy(pipe.prior), copy.deepcopy(pipe.tokenizer), list(pipe.labels))


def check_alike(compiled, plain, **settings):
    arguments = {"seeds": SEEDS[: len(settings.get("labels", LABELS))], "output_type": "pt"}
    labels = settings.pop("labels", LABELS)
    actual, expected = (pipe(labels, **arguments, **settings) for pipe in (compiled, plain))
    assert torch.equal(actual.codes, expected.codes)
    torch.testing.assert_close(actual.images, expected.images, rtol=0, atol=1e-5)


def test_a_compiled_pipeline_draws_the_same_by_few_graphs(compiled, tiny_pipeline):
    check_alike(compiled, tiny_pipeline, guidance_scale=(1.5, 4.0), temperature=0.8)
    assert graphs() == 3  # a decode step, a group of the token decoder, a step of the pixel DiT
    check_alike(compiled, tiny_pipeline, guidance_scale=1.0)
    assert graphs() == 4  # one row a request: from here on, any number of rows
    for settings in (
        {"prefix_codes": torch.arange(6)},
        {"temperature": 0, "num_inference_steps": 7, "solver": "euler"},
        {"guidance_scale": 2.0, "num_groups": 2},
    ):
        check_alike(compiled, tiny_pipeline, **settings)
        assert graphs() == 4, settings


@pytest.mark.slow
def test_other_batches_compile_a_bounded_number_of_times(compiled, tiny_pipeline):
    for labels in ([1], [1, 2], [1, 2, 3], [2], [2, 3]):
        for scale in (1.0, 3.0):
            compiled(labels, seeds=0, guidance_scale=scale, num_groups=2, output_type="pt")
    assert graphs() <= 9  # of each of three parts: one picture or row, the first number, any
    check_alike(compiled, tiny_pipeline, labels=[4])


def test_one_prior_draws_by_its_compiled_step_unless_another_is_named(compiled, tiny_pipeline):
    labels, sampling = torch.tensor(LABELS), Sampling(guidance_scale=2.0)
    for name, kind in {None: CompiledDecoding, "torch": CompiledDecoding}.items():
        run = start_decoding(compiled.prior, labels, sampling, labels, labels.new_empty(3, 0), name)
        assert type(run) is kind
    codes = torch.cat(list(compiled.prior.generation(labels, sampling, SEEDS)), 1)
    expected = tiny_pipeline.prior.generation(labels, sampling, SEEDS, implementation="torch")
    assert torch.equal(codes, torch.cat(list(expected), 1))
    plain = start_decoding(
        tiny_pipeline.prior, labels, sampling, labels, labels.new_empty(3, 0), "torch"
    )
    assert type(plain) is PlainDecoding


@pytest.mark.slow
def test_compiled_models_are_saved_moved_packed_and_copied(compiled, tiny_pipeline, tmp_path):
    for part in ("prior", "tokenizer"):
        model, plain = getattr(compiled, part), getattr(tiny_pipeline, part)
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert [m for m, _ in model.named_modules()] == [m for m, _ in plain.named_modules()]
    compiled([1], seeds=0)
    compiled.save_pretrained(tmp_path / "model")
    check_alike(DARPipeline.from_pretrained(tmp_path / "model"), tiny_pipeline, labels=[1])
    copied = copy_of(compiled)
    assert copied.prior.compiled_step is None and compiled.prior.compiled_step is not None
    assert pickle.loads(pickle.dumps(compiled.prior)).compiled_step is None
    before = graphs()
    check_alike(copied, tiny_pipeline, labels=[1])
    assert graphs() == before
    half = copy_of(tiny_pipeline).to(dtype=torch.bfloat16)
    actual, expected = (
        pipe([1], seeds=0, prefix_codes=torch.arange(16), output_type="pt").images
        for pipe in (compiled.to(dtype=torch.bfloat16), half)
    )
    assert (actual - expected).norm() <= 0.1 * expected.norm()
    half.to(dtype=torch.float32)
    check_alike(compiled.to(dtype=torch.float32), half, labels=[1])


def test_unknown_modes_are_named(fresh_pipeline):
    with pytest.raises(ValueError, match=r"mode: expected one of .*, got 'fast'"):
        fresh_pipeline.compile("fast")


SCRIPT = """
import sys
import torch
from dar_fast import DARPipeline
torch.set_num_threads(1)
pipe = DARPipeline.from_pretrained(sys.argv[1], device="cpu", dtype=torch.float32).compile()
out = pipe([2, 0, 5], seeds=[11, 7, 3], output_type="pt")
half = pipe.to(dtype=torch.bfloat16)([1], seeds=0, output_type="pt")
torch.save((out.codes, out.images, half.images), sys.argv[2])
"""


@pytest.mark.slow
def test_the_compiler_draws_the_same(tiny_pipeline, tmp_path):
    """In a process of its own: the compiler's leaves threads and warnings behind."""
    tiny_pipeline.save_pretrained(tmp_path / "model")
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "model", tmp_path / "drawn.pt"],
        env=environment, check=True, timeout=500,
    )  # fmt: skip
    codes, images, half = torch.load(tmp_path / "drawn.pt")
    expected = tiny_pipeline([2, 0, 5], seeds=[11, 7, 3], output_type="pt")
    assert torch.equal(codes, expected.codes)
    torch.testing.assert_close(images, expected.images, rtol=0, atol=1e-5)
    assert half.isfinite().all() and half.std() > 0.1
