"""`dar train …` on the workers of a Ray cluster: Ray Train places and restarts them, no more.

python -m dar_train.launch_ray --workers 16 --gpus-per-worker 1 -- prior --preset L --out /shared/L

What follows `--` is the command line that `dar train` takes. Each worker finds the others by the
variables that torchrun would set. After a failure all start again and resume the latest state, so
`out` lies where every node sees it, as do the data; the packages are installed on every node.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dar_train.distributed import TIMEOUT_MINUTES

INSTALL = "pip install 'dar-fast[ray]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class RayRun:
    """How many workers, on what, and what they run."""

    workers: int
    gpus_per_worker: int
    cpus_per_worker: int
    failures: int
    records: Path
    address: str | None
    command: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, value, low in (
            ("workers", self.workers, 1), ("gpus-per-worker", self.gpus_per_worker, 0),
            ("cpus-per-worker", self.cpus_per_worker, 1), ("failures", self.failures, 0),
        ):  # fmt: skip
            if value < low:
                raise ValueError(f"{name}: expected an integer >= {low}, got {value}")
        if self.gpus_per_worker > 1:
            raise ValueError(
                f"gpus-per-worker: expected 0 or 1, as a rank has one, got {self.gpus_per_worker}"
            )
        if not self.command:
            raise ValueError("command: expected -- and what follows 'dar train', got nothing")


def parse(argv: Sequence[str]) -> RayRun:
    """The run that a command line stands for.

    Raises:
        ValueError: where a number is out of its range, or nothing is to run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dar_train.launch_ray", description="Run `dar train …` on Ray's workers."
    )
    parser.add_argument("--workers", type=int, required=True, help="ranks, on all nodes together")
    parser.add_argument("--gpus-per-worker", type=int, default=1, help="1; 0: on CPUs, by gloo")
    parser.add_argument("--cpus-per-worker", type=int, default=1, help="that Ray sets aside")
    parser.add_argument("--failures", type=int, default=3, help="restarts after a lost worker")
    parser.add_argument(
        "--records", type=Path, default=Path("runs/ray"), help="folder of Ray's own records"
    )
    parser.add_argument("--address", help="of the cluster; RAY_ADDRESS, else this machine alone")
    parser.add_argument("command", nargs="*", help="-- and what follows 'dar train'")
    values = vars(parser.parse_args(list(argv)))
    return RayRun(**values | {"command": tuple(values["command"])})


def work(settings: dict[str, Any]) -> None:
    """One worker: `dar train` in the launcher's directory; Ray has joined it to the others."""
    from dar_train import cli

    os.chdir(settings["directory"])  # Ray moves to one of its own
    cli.run(settings["command"])


def launch(run: RayRun) -> None:
    """Run it on a Ray cluster and wait for its end.

    Raises:
        RuntimeError: where Ray is missing, or a worker failed once more than it may.
    """
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise RuntimeError(f"launch_ray: needs Ray Train ({error}): {INSTALL}") from error
    gpu = run.gpus_per_worker > 0
    resources: dict[str, float] = {"CPU": run.cpus_per_worker}
    if gpu:
        resources["GPU"] = run.gpus_per_worker
    ray.init(address=run.address, ignore_reinit_error=True, log_to_driver=True)
    trainer = TorchTrainer(
        work,
        train_loop_config={"directory": str(Path.cwd()), "command": list(run.command)},
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=int(60 * TIMEOUT_MINUTES)
        ),
        scaling_config=ScalingConfig(
            num_workers=run.workers, use_gpu=gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            storage_path=str(run.records.absolute()),
            failure_config=FailureConfig(max_failures=run.failures),
        ),
    )
    trainer.fit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run and return the exit status: 0 done, 1 failed, 2 bad usage."""
    try:
        launch(parse(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except (RuntimeError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
