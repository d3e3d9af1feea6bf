import gc
import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from recis_lightning import DynamicEmbeddingBag, EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.ops.cpu import runtime
from recis_lightning.ops.cpu.intrinsics import atomic_add, load_i64, store_i64
from recis_lightning.optim import SparseAdam
from tests.helpers.sample_tables import insert_initial


@pytest.fixture
def num_threads():
    """Return the setter of torch's thread count, which is put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@runtime.kernel
def _count_chunks_kernel(chunk, counts, unused):
    atomic_add(counts + 8 * chunk, 1)


@runtime.kernel
def _count_chunks_ahead_kernel(next_chunk, unused, chunk, counts):
    if next_chunk > chunk:
        atomic_add(counts + 8 * chunk, 1)


@runtime.kernel
def _note_items_kernel(num_items, high, low, num_chunks, chunk, out, thread, by_thread):
    for i in range(low, high):
        store_i64(out + 24 * i, chunk)
        store_i64(out + 24 * i + 8, num_items)
        store_i64(out + 24 * i + 16, num_chunks)
    atomic_add(by_thread + 8 * thread, high - low)


@runtime.kernel
def _divide_kernel(low, high, next_chunk, values, divisors):
    for i in range(low, high):
        store_i64(values + 8 * i, load_i64(values + 8 * i) // load_i64(divisors + 8 * i))


@runtime.kernel_template
def _add_kernel(constant):
    def add(low, high, values):
        for i in range(low, high):
            store_i64(values + 8 * i, load_i64(values + 8 * i) + constant)

    return add


def _train(seed=0):
    """Train two shared tables for three steps; return all that came of it."""
    generator = torch.Generator().manual_seed(seed)
    engine = EmbeddingEngine(
        {
            "item": EmbeddingOption(8, table="item"),
            "history": EmbeddingOption(8, table="item", mode="mean"),
            "tags": EmbeddingOption(8, table="tags", mode="sum", padding_idx=0),
        }
    )
    tables = hash_tables(engine)
    optimizer = SparseAdam(tables, lr=0.1, clip_grad_norm=1.0)
    outputs = []
    for _ in range(3):
        batch = {
            "item": torch.randint(-9000, 9000, (12_000,), generator=generator),
            "history": torch.randint(0, 20_000, (4_000, 6), generator=generator),
            "tags": torch.randint(0, 50, (4_000, 3), generator=generator),
        }
        out = engine(batch)
        outputs += [value.detach() for value in out.values()]
        sum((value * value.detach()).sum() for value in out.values()).backward()
        optimizer.step()
        tables[0].delete(torch.arange(-50, 50))
    states = [table.get_extra_state() for table in tables]
    return [
        *outputs,
        *(state["ids"] for state in states),
        *(state["weights"] for state in states),
        *(slot for state in states for slot in state["slots"].values()),
    ]


def _all_equal(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("kernel", [_count_chunks_kernel, _count_chunks_ahead_kernel])
def test_every_chunk_runs_once(num_threads, monkeypatch, threads, openmp, kernel):
    """No chunk is left out and none runs twice, on OpenMP's threads and on Python's."""
    num_threads(threads)
    if not openmp:
        monkeypatch.setattr(runtime, "_gomp_parallel", lambda: None)
    for chunks in (0, 1, 2, 5, 20_000):
        counts = np.zeros(chunks + 1, np.int64)
        kernel.launch(chunks, 1, counts=counts, unused=17)
        assert counts.tolist() == [1] * chunks + [0]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_kernel_gets_what_its_parameters_name(num_threads, threads):
    """Items are covered once by the chunks, the last of which is short; threads have indices."""
    num_threads(threads)
    out, by_thread = np.full((10, 3), -1), np.zeros(threads, np.int64)
    _note_items_kernel.launch(9, 4, out=torch.from_numpy(out), by_thread=by_thread)
    assert out.tolist() == [[i // 4, 9, 3] for i in range(9)] + [[-1] * 3]
    assert by_thread.sum() == 9


@pytest.mark.parametrize("threads", [1, 3])
def test_an_exception_in_a_kernel_is_raised(num_threads, threads):
    """The other chunks run to their ends."""
    num_threads(threads)
    values, divisors = torch.full((10,), 6), torch.full((10,), 3)
    divisors[4] = 0
    with pytest.raises(RuntimeError, match="_divide_kernel raised"):
        _divide_kernel.launch(10, 3, values=values, divisors=divisors)
    assert values.tolist() == [2, 2, 2, 2, 6, 6, 2, 2, 2, 2]
    divisors[4] = 3
    _divide_kernel.launch(10, 3, values=values, divisors=divisors)


def test_constants_tell_kernels_apart():
    """One definition gives a kernel for each set of constants, and the same one again."""
    values = np.zeros(3, np.int64)
    for constant in (1, 10, 1):
        _add_kernel(constant).launch(3, 2, values=values)
    assert values.tolist() == [12] * 3
    assert _add_kernel(1) is _add_kernel(1)


@pytest.mark.parametrize("arguments", [{}, {"counts": 0}, {"counts": 0, "unsued": 0}])
def test_a_launch_names_all_arguments(arguments):
    """A missing or misspelt argument is an error."""
    with pytest.raises(TypeError, match="takes counts, unused"):
        _count_chunks_kernel.launch(1, 1, **arguments)


@pytest.mark.parametrize("threads", [2, 3])
def test_results_do_not_depend_on_the_number_of_threads(num_threads, threads):
    """Rows, outputs, weights and moments are bitwise those of one thread."""
    num_threads(1)
    wanted = _train()
    num_threads(threads)
    assert _all_equal(_train(), wanted)


def test_results_do_not_depend_on_openmp(num_threads, monkeypatch):
    """Where torch brings no OpenMP, Python's threads do the same work."""
    num_threads(2)
    wanted = _train()
    monkeypatch.setattr(runtime, "_gomp_parallel", lambda: None)
    assert _all_equal(_train(), wanted)


def test_python_threads_train_their_own_tables_at_once(num_threads):
    """Scratch memory and kernels are not mixed up between threads."""
    num_threads(2)
    wanted = [_train(seed) for seed in range(4)]
    results = [None] * 4

    def work(seed):
        results[seed] = _train(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(_all_equal, results, wanted))


def _look_up_in_child(bag, ids, connection):
    table = bag.table
    rows = insert_initial(table, ids)
    with torch.no_grad():
        pooled = bag.eval()(ids.view(-1, 4))
    connection.send((len(table), rows[-1].item(), pooled[-1].tolist()))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_looks_ids_up(num_threads):
    """OpenMP's threads do not survive a fork; the child works with threads of its own."""
    num_threads(3)
    bag, ids = DynamicEmbeddingBag(4, mode="sum", name="forked"), torch.arange(40_000)
    insert_initial(bag.table, ids[:20_000])
    context = multiprocessing.get_context("fork")
    answers = []
    for _ in range(2):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_look_up_in_child, args=(bag, ids, sender), daemon=True)
        child.start()
        arrived = receiver.poll(60)
        if not arrived:
            child.kill()
        assert arrived, "the child hangs"
        answers.append(receiver.recv())
        child.join(60)
        assert child.exitcode == 0
    assert len(bag.table) == 20_000
    rows = insert_initial(bag.table, ids)
    wanted = (40_000, rows[-1].item(), bag.eval()(ids.view(-1, 4))[-1].tolist())
    assert answers == [wanted, wanted]


def _kernels():
    return [
        thing for thing in gc.get_objects() if isinstance(thing, runtime.Kernel) and thing._address
    ]


def _report_cache():
    """Train, and print each kernel with how often it was loaded from the disk."""
    _train()
    for kernel in _kernels():
        print(kernel.function.__qualname__, int(kernel._compiled.is_cached))


def test_a_second_process_compiles_nothing():
    """All kernels of a training step come from the cache that an earlier process left."""
    _train()
    script = "from tests.ops.cpu import test_runtime; test_runtime._report_cache()"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    hits = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert len(hits) >= 10
    assert set(hits.values()) == {"1"}, hits


def test_kernels_compile_once_whoever_comes_first():
    """Threads that launch a new kernel together share one compilation."""

    def function(counts):
        atomic_add(counts, 1)

    kernel, counts, addresses = runtime.kernel(function), np.zeros(1, np.int64), []

    def work():
        kernel.launch(1, 1, counts=counts)
        addresses.append(kernel.address)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts[0] == 4
    assert len(set(addresses)) == 1


def test_workspaces_are_reused_and_private_to_a_thread():
    """A second request gets the same memory, a larger one more, another thread its own."""
    workspace = runtime.Workspace()
    first = workspace.take("keys", 100, np.int64)
    assert first.size >= 100
    assert workspace.take("keys", 50, np.int64) is first
    assert workspace.take("scales", 100, np.float32) is not first
    assert workspace.take("keys", first.size + 1, np.int64).size > first.size
    others = []
    thread = threading.Thread(target=lambda: others.append(workspace.take("keys", 100, np.int64)))
    thread.start()
    thread.join()
    assert others[0] is not workspace.take("keys", 100, np.int64)
