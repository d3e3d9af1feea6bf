"""Checks of ``gpu_acceptance``: is what the kernels do right, also when they race?"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.bench_cuda_step import insert_initial
from benchmarks.gpu_stage import ROOT, Stage
from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
    hash_tables,
)
from recis_lightning.ops import backend
from recis_lightning.optim import (
    SparseAdagrad,
    SparseAdam,
    SparseOptimizer,
    SparseRowwiseAdagrad,
    SparseSGD,
)

Ids = npt.NDArray[np.int64]
OPTIMIZERS: list[type[SparseOptimizer]] = [
    SparseAdam,
    SparseSGD,
    SparseAdagrad,
    SparseRowwiseAdagrad,
]
_LOW = np.iinfo(np.int64).min


def smoke(stage: Stage) -> None:
    """Compare lookups, steps, deletion, growth and evaluation with the CPU's."""
    wide, narrow = torch.float32, torch.bfloat16
    cases = ((33, wide), (5, narrow), (128, wide), (8, wide), (128, narrow))
    for dim, dtype in cases[: stage.size(5, 2)]:
        for optimizer in OPTIMIZERS:
            ids, rows = _smoke_run(stage, True, dim, dtype, optimizer)
            wanted_ids, wanted = _smoke_run(stage, False, dim, dtype, optimizer)
            same = torch.equal(ids, wanted_ids)
            near = torch.allclose(rows, wanted, rtol=2e-2 if dtype is narrow else 1e-4, atol=1e-4)
            worst = float((rows - wanted).abs().max())
            name = f"{optimizer.__name__}, dim {dim}, {dtype}: as on the CPU"
            stage.check(name, same and near, f"same ids: {same}, worst difference {worst:.3g}")


def _smoke_run(
    stage: Stage, tested: bool, dim: int, dtype: torch.dtype, optimizer: type[SparseOptimizer]
) -> tuple[Tensor, Tensor]:
    """Return the ids, in the order of their rows, and the weights after some steps."""
    device = stage.device if tested else torch.device("cpu")
    generator = torch.Generator().manual_seed(1)
    with stage.kernels() if tested else backend.use("cpu"):
        module = DynamicEmbedding(dim, dtype=dtype, name="t", device=device)
        sparse = optimizer(hash_tables(module), lr=0.1)
        for _ in range(3):
            ids = torch.randint(-9, 200, (stage.size(700, 150),), generator=generator)
            out = module(ids.to(device))
            out.float().square().sum().backward()
            sparse.step()
            stage.wait()
        module.table.delete(torch.arange(20))
        module(torch.arange(500, device=device))
        found = module.eval()(torch.arange(-20, 600, device=device))
        return module.table.ids().cpu(), found.float().cpu()


def races(stage: Stage) -> None:
    """Insert ids under contention: rows are given in the order of first appearance."""
    generator, count = np.random.default_rng(0), stage.size(400_000, 300)
    cases = [(1, 1), (3, 1), (100, 1), (5000, 7919), (400_000, 1 << 40)]
    with stage.noise(9000), stage.kernels():
        for turn in range(stage.size(8, 1)):
            for distinct, stride in cases:
                ids = generator.integers(0, distinct, (3, count)) * stride - (1 << 62)
                ids[:, generator.integers(0, count, 2)] = _LOW
                _check_insertion(stage, list(ids), f"{distinct} ids, stride {stride}, turn {turn}")
        _check_features(stage, generator, count // 10)
    with stage.kernels():
        table = HashTable(2, device=stage.device, name="t")
        ids_kept = torch.arange(count, device=stage.device) * 3
        insert_initial(table, ids_kept)
        table.delete(ids_kept[::2])
        gone, kept = (table.storage.find(ids_kept[start::2]) for start in (0, 1))
        stage.check("deleted ids are gone", bool((gone < 0).all()))
        distinct_rows = kept.unique().numel() == len(table) == kept.numel()
        stage.check("what was not deleted has rows of its own", distinct_rows)


def _check_insertion(stage: Stage, parts: Sequence[Ids], name: str) -> None:
    table = HashTable(1, device=stage.device, name="t")
    wrong = 0
    for number, ids in enumerate(parts):
        insert_initial(table, torch.from_numpy(ids).to(stage.device))
        wanted = _first_appearances(parts[: number + 1])[-ids.size :]
        found = table.storage.find(torch.from_numpy(ids).to(stage.device)).cpu().numpy()
        wrong += int((found != wanted).sum())
    length = len(np.unique(np.concatenate(parts)))
    passed = wrong == 0 and len(table) == length
    stage.check(f"insertion: {name}", passed, f"{wrong} wrong rows, {len(table)} ids of {length}")


def _check_features(stage: Stage, generator: np.random.Generator, count: int) -> None:
    """Ten features on three tables, half of them of three ids."""
    names = [f"f{number}" for number in range(10)]
    options = {
        name: EmbeddingOption(4, table=f"t{number % 3}", device=stage.device)
        for number, name in enumerate(names)
    }
    engine = EmbeddingEngine(options)
    seen: dict[str, list[Ids]] = {"t0": [], "t1": [], "t2": []}
    for _ in range(stage.size(20, 2)):
        batch = {}
        for number, name in enumerate(names):
            ids = generator.integers(0, 3 if number % 2 else 50_000, count)
            seen[f"t{number % 3}"].append(ids)
            batch[name] = torch.from_numpy(ids).to(stage.device)
        engine(batch)
    for name, parts in seen.items():
        ids = np.concatenate(parts)
        found = engine.tables[name].storage.find(torch.from_numpy(ids).to(stage.device))
        right = bool((found.cpu().numpy() == _first_appearances(parts)).all())
        stage.check(f"ten features at once, table {name}", right)


def _first_appearances(parts: Sequence[Ids]) -> Ids:
    """Return the rows of ids if each new id gets the next row."""
    _, first, inverse = np.unique(np.concatenate(parts), return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def long_rows(stage: Stage) -> None:
    """Give rows hundreds of gradients each: two runs agree bit for bit, and with float64."""
    count, num_rows = stage.size(200_000, 1500), stage.size(900, 20)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, num_rows, (count,), generator=generator).to(stage.device)
    dims = (4, 24) if stage.is_dry else (4, 24, 32, 64, 100, 128, 256)
    for optimizer in (SparseRowwiseAdagrad, SparseAdagrad, SparseAdam):
        for dim in dims:
            # Of few bits: sums are exact in any order.
            bits = torch.randint(-3, 4, (count, dim), generator=generator)
            gradient = (bits.float() / 64).to(stage.device)
            with stage.kernels():
                _check_twice(stage, optimizer, ids, gradient, num_rows)
                if optimizer is SparseRowwiseAdagrad:
                    _check_rowwise(stage, ids, gradient, num_rows)


def _check_twice(
    stage: Stage, optimizer: type[SparseOptimizer], ids: Tensor, gradient: Tensor, num_rows: int
) -> None:
    modules = [DynamicEmbedding(gradient.shape[1], name="t", device=stage.device) for _ in "ab"]
    steps = [optimizer(hash_tables(module), lr=0.1) for module in modules]
    every, differing = torch.arange(num_rows, device=stage.device), 0
    with stage.noise():
        for number in range(stage.size(60, 2)):
            for module, sparse in zip(modules, steps, strict=True):
                module(ids).backward(gradient)
                sparse.step()
            if number % 5 == 4 or stage.is_dry:
                one, other = (module.table.embeddings(every) for module in modules)
                differing = max(differing, int((one != other).any(1).sum()))
    name = f"two runs of {optimizer.__name__}, dim {gradient.shape[1]}, are the same bits"
    stage.check(name, differing == 0, f"{differing} of {num_rows} rows differ")


def _check_rowwise(stage: Stage, ids: Tensor, gradient: Tensor, num_rows: int) -> None:
    """A state that is added to twice moves its row by 1 / (2 * step) of a step."""
    dim, wide = gradient.shape[1], torch.float64
    module = DynamicEmbedding(dim, name="t", device=stage.device)
    sparse = SparseRowwiseAdagrad(hash_tables(module), lr=0.1, eps=1e-8)
    every = torch.arange(num_rows, device=stage.device)
    insert_initial(module.table, every)
    weights = module.table.embeddings(every).to(wide)
    total = torch.zeros(num_rows, dim, dtype=wide, device=stage.device)
    total.index_add_(0, ids, gradient.to(wide))
    state = torch.zeros(num_rows, 1, dtype=wide, device=stage.device)
    with stage.noise():
        for _ in range(stage.size(10, 2)):
            module(ids).backward(gradient)
            sparse.step()
            state += total.square().mean(1, keepdim=True)
            weights -= 0.1 * total / (state.sqrt() + 1e-8)
    off = float((module.table.embeddings(every).to(wide) - weights).abs().max()) / 0.1
    stage.check(f"row-wise Adagrad, dim {dim}: as in float64", off < 1e-3, f"off by {off:.3g}")


# Tests that take long apart from each other; what none names is the last process's.
_GROUPS = (
    "million or racing or churn",
    "two_hundred or two_runs or evaluation_agrees",
    "rows_of_any_width",
    "steady_step or out_of_memory or moves or checkpoint_loads or refused",
    "trainer",
    "benchmarks_agree",
    "very_many_gradients",
)


def tests(stage: Stage) -> None:
    """Run the tests marked for CUDA, in processes: a dead context costs one of them."""
    if stage.is_dry:
        files, groups = ["tests/ops/gpu/test_duplicates.py"], ["", "no_such_test"]
    else:
        files = sorted(
            str(path.relative_to(ROOT))
            for path in (ROOT / "tests").rglob("test_*.py")
            if "pytest.mark.gpu" in path.read_text()
        )
        groups = [*_GROUPS, "not (" + " or ".join(_GROUPS) + ")"]
    # The project's settings need plugins that may be missing, and make errors of any warnings.
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *files]
    command += ["-o", "addopts=--import-mode=importlib", "-o", "filterwarnings=ignore"]
    if not stage.is_dry:
        command += ["-m", "gpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with contextlib.ExitStack() as stack:
        running = [
            (
                group,
                stack.enter_context(
                    subprocess.Popen(
                        [*command, "-k", group] if group else command,
                        **{"cwd": ROOT, "env": environment, "stdout": pipe, "text": True},
                        stderr=subprocess.STDOUT,
                    )
                ),
            )
            for group in groups
        ]
        for group, process in running:
            said, _ = process.communicate()
            print(said, flush=True)
            failures = re.findall(r"^(?:FAILED|ERROR) (.*)", said, re.MULTILINE)
            last = (said.strip().splitlines() or ["no output"])[-1]
            # 5: no test has such a name; that is so in a dry run only.
            passed = process.returncode == (5 if group == "no_such_test" else 0)
            detail = "; ".join([last, *failures])[:2000]
            stage.check(f"tests: {group or 'all'}", passed, detail)


__all__ = ["long_rows", "races", "smoke", "tests"]
