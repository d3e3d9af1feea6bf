"""Launches of kernels: the same as Triton's own, and as many for ten tables as for one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from recis_lightning import EmbeddingEngine, EmbeddingOption, HashTable, hash_tables
from recis_lightning.admission import MinCount, Probability
from recis_lightning.eviction import MaxRows, TimeToLive
from recis_lightning.ops import async_copy, backend, row_update
from recis_lightning.optim import SparseAdam

ROOT = Path(__file__).parents[3]

_LOOKUP = [
    "_find_kernel",
    "_count_first_kernel",
    "_add_up_kernel",
    "_assign_kernel",
    "_fill_rows_kernel",
    "_init_kernel",
    "_gather_kernel",
]
_SORT = ["_key_kernel", "_count_pieces_kernel", "_add_up_kernel", "_list_pieces_kernel"]
_UPDATE = ["_update_kernel", "_update_long_kernel"]


needs_cc = pytest.mark.skipif(
    shutil.which("cc") is None, reason="builds a driver that launches nothing"
)


def _run(module, *arguments):
    """Return the lines that a module prints in a process whose kernels are compiled."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_cc
def test_the_host_can_be_timed_without_a_gpu():
    lines = _run("benchmarks.gpu_host", "--stubbed", "--steps", "3")
    assert [line.split(":")[0] for line in lines] == [
        "training, Adam",
        "training, Adam, held gradients",
        "evaluation",
        "training, SGD",
        "training, SGD, held gradients",
        "evaluation",
    ]


@needs_cc
def test_a_launch_is_what_triton_would_have_launched(tmp_path):
    """Function, grid, stream and arguments are the same, in any order of constants."""
    lines = [json.loads(line) for line in _run("benchmarks.fake_cuda", tmp_path)]
    assert len({line["triton"]["function"] for line in lines}) == len(lines) >= 7
    for line in lines:
        wanted = line["triton"]
        assert wanted["args"] == line["numbers"]
        for i, call in enumerate(("first", "again", "reordered", "reordered again"), 1):
            assert line[call] == {**wanted, "launches": wanted["launches"] + i}
        assert line["hooked"] == [line["kernel"]]


def _launched(num_tables, do_step, policies=None, **options):
    """Return the kernels that a steady step launches, and the number of arrays it copies."""
    from recis_lightning.ops.gpu.runtime import Kernel

    launches, sent = [], []
    launch, send = Kernel.launch, async_copy._send

    def recorded(kernel, device, num_programs, *numbers, **constants):
        if num_programs > 0:
            launches.append(kernel.name)
        launch(kernel, device, num_programs, *numbers, **constants)

    with backend.use("triton"):
        names = [f"t{i}" for i in range(num_tables)]
        engine = EmbeddingEngine({name: EmbeddingOption(4, **(policies or {})) for name in names})
        optimizer = SparseAdam(hash_tables(engine), lr=0.1, **options)
        batch = {name: torch.arange(40) for name in names}
        for _ in range(4 if policies else 2):
            do_step(engine, optimizer, batch)
        with (
            patch.object(Kernel, "launch", recorded),
            patch.object(async_copy, "_send", lambda *a: sent.append(a) or send(*a)),
        ):
            do_step(engine, optimizer, batch)
    return launches, len(sent)


def _train(engine, optimizer, batch):
    sum(out.sum() for out in engine(batch).values()).backward()
    optimizer.step()


def _evaluate(engine, optimizer, batch):
    engine.train(len(hash_tables(engine)[0]) == 0)
    engine(batch)


@pytest.mark.interpreted
def test_ten_tables_are_launched_as_one():
    """A training step is 13 launches and copies two arrays, however many tables there are."""
    ten = _launched(10, _train)
    assert ten == _launched(1, _train)
    assert ten == (_LOOKUP + _SORT + _UPDATE, 2)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("policies", "added"),
    [
        ({"admission": MinCount(2)}, ["_count_kernel", "_admit_kernel", "_claim_kernel"]),
        ({"admission": Probability(0.9)}, ["_count_kernel", "_admit_kernel", "_claim_kernel"]),
        ({"eviction": TimeToLive(3600)}, ["_touch_kernel"]),
        ({"eviction": MaxRows(1000, by="count")}, ["_touch_kernel"]),
    ],
    ids=["count", "draw", "time", "uses"],
)
@pytest.mark.slow_except(dict(id=["draw", "uses"]))
def test_policies_of_several_tables_are_launched_as_one(policies, added):
    """No more arrays are copied than without a policy, and their kernels are launched once."""
    launches, num_sent = _launched(3, _train, policies)
    assert (launches, num_sent) == _launched(1, _train, policies)
    assert sorted(launches) == sorted(_LOOKUP + _SORT + _UPDATE + added)
    assert num_sent == 2


@pytest.mark.interpreted
def test_an_evaluation_is_one_launch():
    """The number of tables does not matter."""
    ten = _launched(10, _evaluate)
    assert ten == _launched(1, _evaluate)
    assert ten == (["_find_and_gather_kernel"], 1)


@pytest.mark.interpreted
def test_norm_clipping_sorts_once():
    """Norm and update both reduce the gradients, which are sorted once for both."""
    launches, num_sent = _launched(10, _train, clip_grad_norm=0.5)
    assert launches == _LOOKUP + _SORT + 2 * _UPDATE
    assert num_sent == 2


@pytest.mark.interpreted
def test_room_is_counted_anew_after_a_table_lost_it():
    """The host caches how many ids fit; an outdated value would overfill the index."""
    with backend.use("triton"):
        table = HashTable(2)
        table.insert(torch.arange(1000), torch.ones(1000, 2))
        table.insert(torch.arange(3), torch.ones(3, 2))
        assert table.storage.guaranteed_free() > 900
        table.clear()
        assert table.storage.guaranteed_free() < 64
        table.insert(torch.arange(1000), torch.ones(1000, 2))
        table.delete(torch.arange(10, 1000))
        table.compact()
        room = table.storage.guaranteed_free()
        assert 10 + room <= table.capacity * 0.5
        table.insert(torch.arange(100), torch.ones(100, 2))
        assert len(table) == 100
        assert table.storage.guaranteed_free() >= 0


@pytest.mark.parametrize("dims", [(4, 4), (4, 8)])
def test_norm_clipping_on_the_cpu_sorts_again_only_what_another_sort_wrote_over(dims):
    names = ["one", "two"]
    options = {name: EmbeddingOption(dim) for name, dim in zip(names, dims, strict=True)}
    engine = EmbeddingEngine(options)
    optimizer = SparseAdam(hash_tables(engine), lr=0.1, clip_grad_norm=0.5)
    calls = []
    sort = row_update.sort_gradients
    with patch.object(row_update, "sort_gradients", lambda *a: calls.append(a) or sort(*a)):
        _train(engine, optimizer, {name: torch.arange(40) for name in names})
    assert len(calls) == (1 if dims == (4, 4) else 3)
