"""The models trace whole: no op breaks the graph, with gradients and without."""

import copy

import pytest
import torch

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
