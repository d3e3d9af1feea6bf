"""Faults that once killed a process or corrupted a table on a GPU, each tried in a process.

Numbers are those of the review that found them: A2, A3 default devices, A4 malformed offsets, A5 a
failed allocation, A6 inference mode, A7 streams. A1, a race, is looked for in ``long_rows``.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from unittest.mock import patch

import torch

from benchmarks.bench_cuda_step import insert_initial
from benchmarks.gpu_stage import ROOT, Stage, command_of
from recis_lightning import DynamicEmbedding, DynamicEmbeddingBag, HashTable, hash_tables
from recis_lightning.optim import SparseSGD

_LIMIT_SECONDS = 60


def run_all(stage: Stage) -> None:
    """Run each danger in a process of its own, all at once."""
    names = [name for name in DANGERS if not (stage.is_dry and name in ONLY_ON_GPU)]
    running = {
        name: subprocess.Popen(
            command_of(f"danger {name}", stage.output, stage.is_dry),
            **{"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "text": True},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for name in names
    }
    for name, process in running.items():
        try:
            said, _ = process.communicate(timeout=_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            said = f"{process.communicate()[0]}\nmore than {_LIMIT_SECONDS} s"
        print(said, flush=True)
        detail = f"status {process.returncode}: {said.strip()[-300:]}"
        stage.check(name, process.returncode == 0, detail)


def _default_device(stage: Stage) -> None:
    """Train a table on the CPU while torch makes new tensors elsewhere by default."""
    torch.set_default_device("meta" if stage.is_dry else "cuda")
    module = DynamicEmbedding(8, name="t", device="cpu")
    sparse = SparseSGD(hash_tables(module), lr=0.1)
    for _ in range(3):
        ids = torch.arange(50, device="cpu")
        module(ids).sum().backward()
        sparse.step()
    assert module.table.embeddings(ids).device.type == "cpu"


def _pinned_counts(stage: Stage) -> None:
    """Have counts on their way through pinned memory while the default device is the GPU."""
    torch.set_default_device("cuda")
    module = DynamicEmbedding(8, name="t")
    sparse = SparseSGD(hash_tables(module), lr=0.1)
    for number in range(8):
        module(torch.arange(number * 9000, number * 9000 + 20_000)).sum().backward()
        sparse.step()
    assert len(module.table) == 7 * 9000 + 20_000


def _malformed_offsets(stage: Stage) -> None:
    """Train with offsets that do not end at the number of ids: an error, and nothing is written."""
    device = stage.device
    module = DynamicEmbeddingBag(8, mode="sum", name="t", include_last_offset=True, device=device)
    sparse = SparseSGD(hash_tables(module), lr=1.0)
    ids = torch.arange(1000, device=device)
    module(ids, torch.arange(0, 1001, 10, device=device)).sum().backward()
    sparse.step()
    before = module.table.embeddings(ids[500:]).clone()
    poison = [torch.full((size,), 12345, device=device) for size in (1 << 20, 4000)]
    del poison  # the allocator hands this memory out again
    said = ""
    try:
        for _ in range(stage.size(20, 3)):
            module(ids, torch.arange(0, 501, 5, device=device)).sum().backward()
            sparse.step()
            stage.wait()
    except ValueError as error:
        said = str(error)
    assert "offsets" in said, f"expected an error that names offsets, got {said!r}"
    assert torch.equal(module.table.embeddings(ids[500:]), before)


def _failed_allocation(stage: Stage) -> None:
    """Let each allocation of an insertion fail in turn: the table is as it was."""
    made = torch.empty
    for failing in range(6):
        table, left = HashTable(2, name="t", device=stage.device), failing
        table.storage.reserve_ids(1000)
        table.storage.reserve_rows(1000)
        insert_initial(table, torch.arange(5, device=stage.device))

        def empty(*size: object, **kwargs: object) -> torch.Tensor:
            nonlocal left
            left -= 1
            if left == -1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return made(*size, **kwargs)  # type: ignore[call-overload, no-any-return]

        with patch.object(torch, "empty", empty):
            try:
                insert_initial(table, torch.tensor([100, 101, 102], device=stage.device))
            except MemoryError:
                assert len(table) == 5
        ids = torch.tensor([7, 8, 9, 100, 101, 102], device=stage.device)
        insert_initial(table, ids)
        rows = table.storage.find(torch.cat([torch.arange(5, device=stage.device), ids]))
        assert sorted(rows.tolist()) == list(range(11)), (failing, rows)


def _inference_mode(stage: Stage) -> None:
    """Make and fill a table in inference mode, then train it."""
    with torch.inference_mode():
        module = DynamicEmbedding(8, name="t", device=stage.device)
        module.table.insert(torch.arange(5), torch.ones(5, 8))
    sparse = SparseSGD(hash_tables(module), lr=0.1)
    module(torch.arange(500, device=stage.device)).sum().backward()
    sparse.step()
    rows = module.table.embeddings(torch.arange(5, device=stage.device))
    torch.testing.assert_close(rows.cpu(), torch.full((5, 8), 0.9))


def _side_stream(stage: Stage) -> None:
    """Let a table grow on a side stream while its old memory is handed out again."""
    module = DynamicEmbedding(8, name="t", device=stage.device)
    sparse = SparseSGD(hash_tables(module), lr=0.1)
    with torch.cuda.stream(torch.cuda.Stream()):
        for number in range(30):
            ids = torch.arange(number * 5000, number * 5000 + 9000, device=stage.device)
            module(ids).sum().backward()
            sparse.step()
            torch.empty(1 << 22, device=stage.device).fill_(7)
    torch.cuda.synchronize()
    assert len(module.table) == 29 * 5000 + 9000
    every = torch.arange(len(module.table), device=stage.device)
    assert torch.equal(module.table.storage.find(every), every)


DANGERS: dict[str, Callable[[Stage], None]] = {
    "A2: a default device, and a table on the CPU": _default_device,
    "A3: default device cuda, counts on their way": _pinned_counts,
    "A4: malformed offsets in training": _malformed_offsets,
    "A5: a failed allocation in an insertion": _failed_allocation,
    "A6: made in inference mode, then trained": _inference_mode,
    "A7: growth on a side stream": _side_stream,
}
ONLY_ON_GPU = ("A3: default device cuda, counts on their way", "A7: growth on a side stream")

__all__ = ["DANGERS", "ONLY_ON_GPU", "run_all"]
