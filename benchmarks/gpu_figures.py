"""Figures of ``gpu_acceptance``: where a step's time goes, and what shapes and settings cost."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks import bench_cuda_step as shape
from benchmarks.gpu_stage import Stage
from recis_lightning import EmbeddingEngine, EmbeddingOption, Jagged, hash_tables
from recis_lightning.ops.gpu import embedding_bag, hash_insert, row_update, runtime
from recis_lightning.optim import SparseAdam, SparseOptimizer, SparseSGD

_DRY_SCALE = 4000
_STEPS = 10  # profiled
Call = Callable[[], object]


def profile(stage: Stage) -> None:
    """Take a step of the published shape apart: kernels, launches, waits."""
    with stage.kernels():
        started = time.perf_counter()
        engine, forward, step = _published(stage)
        stage.wait()
        stage.figure("filling", time.perf_counter() - started, "s")
        stage.figure("step, Adam", stage.ms(step, 30), "ms")
        stage.figure("training lookup", stage.ms(forward, 30), "ms")
        with _counted_launches() as launches:
            step()
        stage.figure("launches of our kernels, a step", len(launches), "launches")
        for name in dict.fromkeys(launches):
            stage.figure(f"launches of {name}", launches.count(name), "launches")
        if not stage.is_dry:
            waits = _waits(step)
            stage.check("a steady step waits for nothing", not waits, "; ".join(waits[:3]))
            _profile_kernels(stage, "step", step)
        engine.eval()
        stage.figure("evaluation lookup", stage.ms(forward, 30), "ms")
        if not stage.is_dry:
            _profile_kernels(stage, "evaluation", forward)
            source = torch.empty(1 << 28, device=stage.device)
            target = torch.empty_like(source)
            rate = 2 * source.nbytes / stage.ms(lambda: target.copy_(source), 10) / 1e9
            stage.figure("copy, read and written", rate, "TB/s")


def _published(
    stage: Stage, optimizer: type[SparseOptimizer] = SparseAdam
) -> tuple[EmbeddingEngine, Call, Call]:
    """Return the published shape's engine, its training lookup and its step."""
    scale = stage.size(1, _DRY_SCALE)
    num_rows, lookups = shape.NUM_ROWS // scale, max(shape.LOOKUPS // scale, 50)
    data = shape.batches(shape.NUM_TABLES, num_rows, lookups, stage.device)
    gradients = [
        torch.randn(lookups, shape.DIM, device=stage.device) for _ in range(shape.NUM_TABLES)
    ]
    engine = shape.filled_engine(shape.NUM_TABLES, num_rows, shape.DIM, stage.device)
    sparse = optimizer(hash_tables(engine), lr=1e-3)
    turn = iter(range(10**9))

    def forward() -> list[torch.Tensor]:
        return list(engine(data[next(turn) % len(data)]).values())

    def step() -> None:
        torch.autograd.backward(forward(), gradients)
        sparse.step()

    return engine, forward, step


@contextmanager
def _counted_launches() -> Iterator[list[str]]:
    """Collect the names of our kernels as they are launched."""
    names: list[str] = []
    launch = runtime.Kernel.launch

    def counted(self: Any, device: Any, num_programs: int, *numbers: Any, **constants: Any) -> None:
        if num_programs > 0:
            names.append(self.name)
        launch(self, device, num_programs, *numbers, **constants)

    with patch.object(runtime.Kernel, "launch", counted):
        yield names


def _waits(step: Call) -> list[str]:
    """Return what torch says of the host's waits in some steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(_STEPS):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = [str(warning.message) for warning in caught]
    return [text for text in said if "synchronizing" in text and "prototype" not in text]


def _profile_kernels(stage: Stage, name: str, timed: Call) -> None:
    """Record the device's microseconds a step, of each kernel and of all."""
    stage.wait()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA, kinds.CPU]) as found:
        for _ in range(_STEPS):
            timed()
        stage.wait()
    events = [
        (event.self_device_time_total / _STEPS, event.count / _STEPS, event.key[:60])
        for event in found.key_averages()
        if str(event.device_type).endswith("CUDA") and event.self_device_time_total
    ]
    events.sort(reverse=True)
    stage.figure(f"{name}: time of the device", sum(event[0] for event in events), "us")
    stage.figure(f"{name}: kernels and copies", sum(event[1] for event in events), "launches")
    for microseconds, count, key in events[:30]:
        stage.figure(f"{name}: {key}, {count:g} times", microseconds, "us")


def skew(stage: Stage) -> None:
    """Time shapes that balance badly, odd dims, a cold start, and the host alone."""
    scale = stage.size(1, 400)
    with stage.kernels():
        _long_bags(stage, scale)
        for name, distinct in (("one id", 1), ("200k ids", 200_000 // scale)):
            ids = torch.randint(0, distinct, (1_000_000 // scale,), device=stage.device)
            options = {"f": EmbeddingOption(64, device=stage.device)}
            _, step = _training(options, {"f": ids}, SparseAdam)
            for _ in range(stage.size(5, 1)):
                step()
            waits: list[int] = []
            count = hash_insert._count_distinct

            def counted(*numbers: Any, waits: list[int] = waits, count: Any = count) -> Any:
                waits.append(1)
                return count(*numbers)

            with patch.object(hash_insert, "_count_distinct", counted):
                stage.figure(f"a million of {name}: step", stage.ms(step, 10, 0), "ms")
            passed = not waits or stage.is_dry
            stage.check(f"a million of {name}: no lookup waits", passed, f"{len(waits)} of 30 do")
        _odd_dims(stage, scale)
        _cold_start(stage, scale)
        _host_alone(stage)


def _training(
    options: dict[str, EmbeddingOption],
    batch: dict[str, Any],
    optimizer: type[SparseOptimizer] = SparseSGD,
) -> tuple[EmbeddingEngine, Call]:
    engine = EmbeddingEngine(options)
    sparse = optimizer(hash_tables(engine), lr=1e-3)

    def step() -> None:
        torch.stack([out.sum() for out in engine(batch).values()]).sum().backward()
        sparse.step()

    return engine, step


def _long_bags(stage: Stage, scale: int) -> None:
    """Bags of one size, and as many ids with one bag of most of them."""
    num_ids, bags = 140_000 // scale, max(4096 // scale, 4)
    for name, longest in (("even bags", num_ids // bags), ("a long bag", num_ids * 5 // 7)):
        sizes = np.full(bags, (num_ids - longest) // (bags - 1))
        sizes[bags // 2] = longest
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)])).to(stage.device)
        ids = torch.randint(0, 50_000, (int(sizes.sum()),), device=stage.device)
        batch = {"f": Jagged(ids, offsets)}
        options = {"f": EmbeddingOption(128, mode="sum", device=stage.device)}
        engine, step = _training(options, batch)
        stage.figure(f"{name}: step", stage.ms(step, 10), "ms")
        engine.eval()
        stage.figure(
            f"{name}: evaluation",
            stage.ms(lambda engine=engine, batch=batch: engine(batch), 10),
            "ms",
        )


def _odd_dims(stage: Stage, scale: int) -> None:
    wide, narrow = torch.float32, torch.bfloat16
    for dim, dtype in ((100, wide), (128, wide), (33, narrow), (64, narrow), (1, wide)):
        names = [f"f{number}" for number in range(4)]
        ids = torch.randint(0, 200_000 // scale, (4, 100_000 // scale), device=stage.device)
        option = EmbeddingOption(dim, dtype=dtype, device=stage.device)
        _, step = _training(dict.fromkeys(names, option), dict(zip(names, ids, strict=True)))
        stage.figure(f"dim {dim}, {dtype}: step", stage.ms(step, 10), "ms")


def _cold_start(stage: Stage, scale: int) -> None:
    """Lookups all of whose ids are new."""
    names, turns = [f"f{number}" for number in range(10)], stage.size(10, 2)
    engine = EmbeddingEngine({name: EmbeddingOption(128, device=stage.device) for name in names})
    stage.wait()
    started = time.perf_counter()
    for _ in range(turns):
        ids = torch.randint(0, 1 << 40, (10, 104_857 // scale), device=stage.device)
        engine(dict(zip(names, ids, strict=True)))
    stage.wait()
    spent = (time.perf_counter() - started) / turns * 1e3
    stage.figure("a lookup of a million new ids", spent, "ms")


def _host_alone(stage: Stage) -> None:
    """Ten tables of few ids, whose step is the host's."""
    names = [f"f{number}" for number in range(10)]
    options = {name: EmbeddingOption(128, device=stage.device) for name in names}
    ids = torch.arange(100, device=stage.device)
    batch = dict.fromkeys(names, ids)
    engine, step = _training(options, batch, SparseAdam)
    stage.figure("the host alone: step", stage.ms(step, 100, 30), "ms")
    engine.eval()
    stage.figure("the host alone: evaluation", stage.ms(lambda: engine(batch), 100, 10), "ms")


def tune(stage: Stage) -> None:
    """Time other tiles, programs and warps of the kernels that move the most bytes."""
    with stage.kernels():
        _, forward, step = _published(stage)

        def figure(name: str, timed: Call) -> None:
            stage.figure(name, stage.ms(timed, 15), "ms")

        figure("as it is: step", step)
        figure("as it is: training lookup", forward)
        for cells in (2048, 4096):
            with patch.object(embedding_bag, "_CELLS", cells):
                embedding_bag._tile.cache_clear()
                figure(f"gather's cells {cells}: training lookup", forward)
            embedding_bag._tile.cache_clear()
            with patch.object(row_update, "_CELLS", cells):
                figure(f"update's cells {cells}: step", step)
        for on_each in (8, 16, 32):
            with patch.object(row_update, "_ON_EACH", on_each):
                figure(f"update's programs, {on_each} a multiprocessor: step", step)
        kernels = ((row_update._update_kernel, step), (embedding_bag._gather_kernel, forward))
        for kernel, timed in kernels:
            before = kernel.options
            for warps in (2, 8):
                kernel.options = {**before, "num_warps": warps}
                kernel._compiled.clear()
                figure(f"{kernel.name}, {warps} warps", timed)
            kernel.options = before
            kernel._compiled.clear()


def published(stage: Stage) -> None:
    """Time the published shape, and find and gather of 128M keys, and hold them to the targets."""
    scale, rounds = stage.size(1, _DRY_SCALE), stage.size(30, 1)
    timer = patch.object(shape, "event_ms", lambda timed, rounds, warmup=2: stage.ms(timed))
    with stage.kernels():
        if stage.is_dry:  # torch times by events on a GPU only
            with timer:
                _record_published(stage, rounds, scale)
        else:
            shape.check(stage.device)
            _record_published(stage, rounds, scale)


def _record_published(stage: Stage, rounds: int, scale: int) -> None:
    for name, value in shape.time_steps(stage.device, rounds, scale).items():
        bound, _ = shape.WANTED.get(name.removesuffix(" step"), (None, None))
        stage.figure(name, value, "ms", bound)
    rate = shape.keys_per_second(stage.device, rounds, scale) / 1e9
    stage.figure("find and gather", rate, "10**9 keys/s", _KEYS_WANTED)


_KEYS_WANTED = 4.0

__all__ = ["profile", "published", "skew", "tune"]
