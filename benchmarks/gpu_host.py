"""Host overhead of a step of tables on a GPU, measured without a GPU.

The shape is that of ``bench_cuda_step``, with few ids: ten tables of dim 128. Gradients come from a
loss that makes them anew, as in a model; or the caller gives them to ``backward`` and holds them,
so that they are checked and copied. Tables are kept as beside a GPU, over the CPU's memory, and
kernels are launched by Triton, compiled for an H100, on a driver that does nothing (``fake_cuda``).
So the time is that of torch's and our Python, torch's operators on the CPU, and Triton's launcher.
Not covered are CUDA's driver, torch's operators on a GPU (the sort of gradients first of all), its
allocator, and two copies a step from pinned memory.

    python -m benchmarks.gpu_host            # with Triton's launcher
    python -m benchmarks.gpu_host --stubbed  # without: launches do nothing at all
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any

from benchmarks import fake_cuda

ROWS, LOOKUPS, WARMUP = 100_000, 100, 60


def _times_us(timed: Callable[[], object], steps: int) -> str:
    for _ in range(WARMUP):
        timed()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        timed()
        times.append((time.perf_counter() - start) * 1e6)
    return f"median {median(times):.0f} us, fastest tenth {quantiles(times, n=10)[0]:.0f} us"


def measure(stubbed: bool, steps: int) -> None:
    """Print the host's microseconds for a training step and for an evaluation lookup."""
    import torch

    from benchmarks import bench_cuda_step as shape
    from recis_lightning import EmbeddingEngine, EmbeddingOption, hash_tables
    from recis_lightning.ops import backend
    from recis_lightning.ops.gpu import runtime

    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    if stubbed:
        runtime.Kernel.launch = lambda *numbers, **constants: None

    class Loss(torch.autograd.Function):
        """One node in place of a model."""

        @staticmethod
        def forward(ctx: Any, *rows: torch.Tensor) -> torch.Tensor:
            return rows[0].new_zeros(())

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(gradient.new_empty(LOOKUPS, shape.DIM) for _ in gradients)

    loss_of: Any = Loss.apply
    batches = shape.batches(shape.NUM_TABLES, ROWS, LOOKUPS, torch.device("cpu"))
    gradients = [torch.zeros(LOOKUPS, shape.DIM) for _ in range(shape.NUM_TABLES)]
    with backend.use("triton"):
        for name, optimizer in shape.OPTIMIZERS.items():
            engine = EmbeddingEngine({key: EmbeddingOption(shape.DIM) for key in batches[0]})
            sparse = optimizer(hash_tables(engine), lr=1e-3)
            for table in hash_tables(engine):
                table.storage.reserve_ids(ROWS)
                table.storage.reserve_rows(ROWS)
            turn = iter(range(10**9))

            def forward(engine: EmbeddingEngine = engine, turn=turn) -> list[torch.Tensor]:
                return list(engine(batches[next(turn) % len(batches)]).values())

            def step(forward=forward, sparse=sparse) -> None:
                loss_of(*forward()).backward()
                sparse.step()

            def step_with_held(forward=forward, sparse=sparse) -> None:
                torch.autograd.backward(forward(), gradients)
                sparse.step()

            print(f"training, {name}: {_times_us(step, steps)}")
            print(f"training, {name}, held gradients: {_times_us(step_with_held, steps)}")
            engine.eval()
            print(f"evaluation: {_times_us(forward, steps)}")


def main() -> int:
    """Measure in this process, whose Triton then uses the driver that does nothing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stubbed", action="store_true")
    parser.add_argument("--steps", type=int, default=600)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        fake_cuda.build(Path(directory))
        fake_cuda.activate()
        measure(asked.stubbed, asked.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
