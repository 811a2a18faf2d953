"""The launcher for Ray: what it asks of Ray, and what a worker runs; Ray itself is a stand-in."""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dar_train import cli, launch_ray

COMMAND = ["--workers", "4", "--gpus-per-worker", "0", "--", "prior", "--steps", "3"]


class Recorded:
    """A class whose calls are kept."""

    def __init__(self, **values: Any) -> None:
        self.values = values


class FakeRay:
    """Modules named as Ray's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: dict[str, Any] = {}
        self.trainers: list[tuple[Any, dict[str, Any]]] = []
        self.fits = 0
        fake = self

        class Trainer:
            def __init__(self, work: Any, **values: Any) -> None:
                fake.trainers.append((work, values))

            def fit(self) -> None:
                fake.fits += 1

        ray, train, torch = (ModuleType(name) for name in ("ray", "ray.train", "ray.train.torch"))
        ray.init = lambda **values: self.started.update(values)  # type: ignore[attr-defined]
        for name in ("FailureConfig", "RunConfig", "ScalingConfig"):
            setattr(train, name, type(name, (Recorded,), {}))
        torch.TorchConfig = type("TorchConfig", (Recorded,), {})  # type: ignore[attr-defined]
        torch.TorchTrainer = Trainer  # type: ignore[attr-defined]
        for module in (ray, train, torch):
            monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def ray(monkeypatch) -> FakeRay:
    return FakeRay(monkeypatch)


@pytest.mark.parametrize(
    ("gpus", "backend", "resources"),
    [(0, "gloo", {"CPU": 2}), (1, "cpu:gloo,cuda:nccl", {"CPU": 2, "GPU": 1})],
)
def test_what_ray_is_asked_for(ray, gpus, backend, resources, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--workers", "16", "--gpus-per-worker", str(gpus), "--cpus-per-worker", "2"]
    more = ["--failures", "5", "--records", "records", "--address", "ray://head:10001"]
    assert launch_ray.main([*flags, *more, "--", "prior", "--preset", "L"]) == 0
    assert ray.started["address"] == "ray://head:10001"
    assert ray.fits == 1
    ((work, asked),) = ray.trainers
    assert work is launch_ray.work
    assert asked["train_loop_config"] == {
        "directory": str(tmp_path), "command": ["prior", "--preset", "L"],
    }  # fmt: skip
    assert asked["torch_config"].values["backend"] == backend
    assert asked["scaling_config"].values == {
        "num_workers": 16, "use_gpu": gpus == 1, "resources_per_worker": resources,
    }  # fmt: skip
    assert asked["run_config"].values["storage_path"] == str(tmp_path / "records")
    assert asked["run_config"].values["failure_config"].values == {"max_failures": 5}


def test_a_worker_runs_the_command_line_in_the_launchers_directory(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "there"
    target.mkdir()
    ran = []
    monkeypatch.setattr(cli, "run", lambda command: ran.append((Path.cwd(), command)))
    launch_ray.work({"directory": str(target), "command": ["prior", "--steps", "3"]})
    assert ran == [(target, ["prior", "--steps", "3"])]


def test_without_ray(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert launch_ray.main(COMMAND) == 1
    error = capsys.readouterr().err
    assert "needs Ray Train" in error
    assert "pip install 'dar-fast[ray]'" in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workers", "0", "--", "prior"], "workers: expected an integer >= 1, got 0"),
        (["--workers", "2", "--gpus-per-worker", "2", "--", "prior"], "expected 0 or 1"),
        (["--workers", "2", "--failures", "-1", "--", "prior"], "failures: expected an integer"),
        (["--workers", "2", "--cpus-per-worker", "0", "--", "prior"], "cpus-per-worker: expected"),
        (["--workers", "2"], "command: expected -- and what follows 'dar train', got nothing"),
    ],
)
def test_bad_usage(argv, message, ray, capsys) -> None:
    assert launch_ray.main(argv) == 2
    assert message in capsys.readouterr().err
    assert ray.trainers == []


@pytest.mark.slow
def test_two_workers_of_a_real_ray(pictures, model_files, tmp_path, monkeypatch) -> None:
    pytest.importorskip("ray")
    import subprocess

    monkeypatch.chdir(tmp_path)
    command = [
        sys.executable, "-m", "dar_train.launch_ray", "--workers", "2", "--gpus-per-worker", "0",
        "--", "tokenizer", "--data", str(pictures), "--out", "run", "--model",
        model_files["tokenizer"], "--steps", "3", "--minutes", "None", "--batch", "4",
        "--device", "cpu", "--eval-pictures", "2", "--workers", "0", "--rollout", "0",
        "--warmup", "1",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "tokenizer" / "config.json").exists()
