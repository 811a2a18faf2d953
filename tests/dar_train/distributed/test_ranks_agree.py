"""Two ranks equal one with the doubled batch: both models, DDP and FSDP2; and what ranks say."""

import json
import socket
from typing import NamedTuple

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor
from training_ranks import STEPS, messages, one_rank, train

from dar_train.distributed import Ranks
from dar_train.parallel import Parallel, parallelize
from dar_train.recipes import PriorRecipe, Recipe, TokenizerRecipe

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
CASES = [f"{model}-{kind}" for model in ("prior", "tokenizer") for kind in ("ddp", "fsdp")]


class Runs(NamedTuple):
    alone: dict[str, dict[str, Tensor]]  # by model
    together: dict[str, dict[str, Tensor]]  # by case
    ranks: list[dict]


@pytest.fixture(scope="module")
def runs(pictures, model_files, tmp_path_factory) -> Runs:
    """All trainings, on one rank here and on two in one start of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    common = {
        "data": pictures, "steps": STEPS, "batch": 8, "micro_batch": 2, "warmup": 1, "lr": 1e-3,
        "precision": "fp32", "device": "cpu", "eval_pictures": 2, "workers": 0, "ema": 0.5,
    }  # fmt: skip

    def recipe(model: str, **changes) -> Recipe:
        if model == "prior":
            return PriorRecipe(**common, **changes, dropout=0.0)
        return TokenizerRecipe(
            **common, **changes, model=model_files["tokenizer"], gate_init=0.1, flip=True,
            continuous_steps=1, codebook_from_data=True,
        )  # fmt: skip

    alone = {}
    for model in ("prior", "tokenizer"):
        train(model, recipe(model, out=folder / model), ALONE, folder)
        alone[model] = load_file(folder / f"{model}.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipes = {case: recipe(case.split("-")[0], parallel=case.split("-")[1]) for case in CASES}
    mp.spawn(one_rank, (2, port, folder, recipes), nprocs=2)
    return Runs(
        alone,
        {case: load_file(folder / f"{case}.safetensors") for case in CASES},
        [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)],
    )


def relative(got: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> float:
    names = [name for name in expected if name.startswith(prefix)]
    assert names
    difference = torch.stack([(got[n] - expected[n]).norm() for n in names]).norm()
    return float(difference / torch.stack([expected[n].norm() for n in names]).norm())


@pytest.mark.parametrize("case", CASES)
class TestTwoRanksEqualOne:
    def test_same_tensors(self, runs, case) -> None:
        expected = runs.alone[case.split("-")[0]]
        assert runs.together[case].keys() == expected.keys()
        assert all(runs.together[case][n].shape == t.shape for n, t in expected.items())

    @pytest.mark.parametrize("step", range(STEPS))
    @pytest.mark.parametrize("what", ["loss", "norm", "gradient"])
    def test_each_step(self, runs, case, what, step) -> None:
        expected = runs.alone[case.split("-")[0]]
        assert relative(runs.together[case], expected, f"{what} {step}") < 1e-5

    @pytest.mark.parametrize("what", ["weight", "average"])
    def test_after_the_steps(self, runs, case, what) -> None:
        expected = runs.alone[case.split("-")[0]]
        assert relative(runs.together[case], expected, what) < 1e-5

    def test_the_average_lags(self, runs, case) -> None:
        got = runs.together[case]
        weights = {
            n.replace("weight", "average", 1): t for n, t in got.items() if n[:7] == "weight "
        }
        assert relative(weights, got, "average") > 1e-4


def test_messages(runs) -> None:
    first, second = (found["messages"] for found in runs.ranks)
    for name in ("sum", "mean", "share"):
        assert first[name] == second[name]
    assert first["sum"] == [3.0, 30.0]
    assert first["mean"] == [1.5, 15.0]
    assert (first["mine"], second["mine"]) == ([1.0, 10.0], [2.0, 20.0])
    assert first["share"] == {"rank": 0, "text": "é", "list": [1, None]}


def test_shards(runs) -> None:
    first, second = (found["shards"] for found in runs.ranks)
    assert first["held"] + second["held"] == first["total"]
    assert first["held"] < 0.6 * first["total"]
    for found in (first, second):
        assert found["all sharded"]
        assert found["written"]
        assert found["rows"] == [2, 8, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 5}, "batch: expected a multiple of the 2 ranks, got 5"),
        ({"optimizer": "muon", "parallel": "fsdp"}, "optimizer: expected 'adamw' with parallel"),
    ],
)
def test_what_ranks_cannot_do(changes, message) -> None:
    recipe = PriorRecipe(steps=600, **{"batch": 4, **changes})
    with pytest.raises(ValueError, match=message):
        parallelize(torch.nn.Linear(2, 2), "forward", recipe, ALONE._replace(world=2), [])


def test_alone_nothing_is_sent() -> None:
    model = torch.nn.Linear(2, 2)
    parallel = Parallel(model, "forward", ALONE)
    assert messages(parallel) == {
        "sum": [1.0, 10.0], "mean": [1.0, 10.0], "mine": [1.0, 10.0],
        "share": {"rank": 0, "text": "é", "list": [1, None]},
    }  # fmt: skip
    assert parallel.gathered(model) is model
    with parallel.accumulating(True):
        parallel.call(torch.ones(1, 2)).sum().backward()
    before = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert torch.equal(parallel.clip(0.5), before)
    after = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert float(after) == pytest.approx(0.5, rel=1e-5)
