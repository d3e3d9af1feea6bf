"""Each call as on Linux, and where the system lacks what Linux has; and a run on such systems."""

import errno
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from recis_lightning import system_calls

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=["linux", "macos", "windows"])
def system(request, monkeypatch):
    """Take away what another system lacks."""
    lacking = {
        "linux": [],
        "macos": ["posix_fallocate", "fdatasync"],
        "windows": ["posix_fallocate", "fdatasync", "preadv", "pwrite", "register_at_fork",
                    "geteuid", "getuid", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"],
    }[request.param]  # fmt: skip
    for name in lacking:
        monkeypatch.delattr(os, name)
    if request.param == "windows":
        monkeypatch.setattr(system_calls, "_fcntl", None)
        monkeypatch.setattr(system_calls, "_msvcrt", Msvcrt())
    return request.param


class Msvcrt(types.SimpleNamespace):
    """Locks of bytes of files, as Windows has them: of a descriptor, not of a process."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self):
        self.held = {}

    def locking(self, file, mode, count):
        status = os.fstat(file)
        place = (status.st_dev, status.st_ino, os.lseek(file, 0, os.SEEK_CUR), count)
        if mode == self.LK_UNLCK:
            del self.held[place]
        elif self.held.setdefault(place, file) != file:
            raise OSError(errno.EACCES, "Permission denied")


@pytest.mark.usefixtures("system")
def test_bytes_are_written_and_read_at_offsets(tmp_path):
    flags = system_calls.open_flags("O_RDWR", "O_CREAT", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC")
    file = os.open(tmp_path / "file", flags)
    try:
        system_calls.reserve(file, 100)
        assert os.fstat(file).st_size == 100
        assert system_calls.write_at(file, memoryview(b"later"), 50) == 5
        assert system_calls.write_at(file, memoryview(b"first"), 0) == 5
        system_calls.sync_data(file)
        data = bytearray(8)
        assert system_calls.read_at(file, memoryview(data), 48) == 8
        assert bytes(data) == b"\0\0later\0"
        assert system_calls.read_at(file, memoryview(data), 97) == 3
        assert system_calls.read_at(file, memoryview(data), 100) == 0
    finally:
        os.close(file)
    system_calls.sync_folder(tmp_path)


@pytest.mark.usefixtures("system")
def test_a_lock_keeps_others_out_until_it_is_given_back(tmp_path):
    flags = system_calls.open_flags("O_RDWR", "O_CREAT")
    ours, theirs = (os.open(tmp_path / "lock", flags) for _ in range(2))
    try:
        os.write(ours, b"text")
        system_calls.lock(ours)
        with pytest.raises(BlockingIOError):
            system_calls.lock(theirs)
        assert os.read(theirs, 4) == b"text"
        assert os.lseek(ours, 0, os.SEEK_CUR) == 4  # its place is kept
        system_calls.unlock(ours)
        system_calls.lock(theirs, wait=True)
        system_calls.unlock(theirs)
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_file_system_without_locks_is_an_error_of_the_system(tmp_path, monkeypatch):
    monkeypatch.setattr(system_calls, "_fcntl", None)
    file = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(OSError, match="No locks available") as found:
            system_calls.lock(file)
        assert not isinstance(found.value, BlockingIOError)
    finally:
        os.close(file)


def test_users_and_processes(system, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    who = system_calls.others_may_write(os.lstat(tmp_path / "open"))
    assert (who is None) == (system == "windows")
    assert system_calls.is_alive(os.getpid())
    assert system_calls.is_alive(2**22 + 1) == (system == "windows")  # beyond the greatest number


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    def full(file, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="No space"):
        system_calls.reserve(file.fileno(), 100)


@pytest.mark.usefixtures("system")
def test_space_of_a_file_is_reserved_given_back_and_written(tmp_path):
    with (tmp_path / "file").open("w+b") as file:
        system_calls.reserve_range(file.fileno(), 4096, 3 << 20)
        assert os.fstat(file.fileno()).st_size == 4096 + (3 << 20)
        assert 512 * os.fstat(file.fileno()).st_blocks >= 3 << 20
        system_calls.write_at(file.fileno(), memoryview(b"x" * 9000), 1 << 20)
        system_calls.write_back(file.fileno())
        system_calls.free_range(file.fileno(), 1 << 20, 8192)
        file.seek(1 << 20)
        start = file.read(9000)
        assert start[8192:] == b"x" * 808
        assert start[:8192] in (bytes(8192), b"x" * 8192)  # the latter where nothing can be freed


RUN = """
import ctypes, mmap, os, signal, sys, tempfile
sys.path.insert(0, os.getcwd())
# These have their own fallbacks:
import filelock, lightning, numba, pyarrow, torch, torch.export._trace, torchmetrics, types
system = sys.argv[1]
lacking = ["posix_fallocate", "fdatasync", "sched_getaffinity", "memfd_create"]
gone = ["MADV_HUGEPAGE", "MADV_DONTNEED"]
sys.platform = "darwin"
if system == "windows":
    sys.platform = "win32"
    lacking += ["preadv", "pread", "pwrite", "pwritev", "register_at_fork", "fork", "geteuid",
                "getuid", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "waitpid"]
    gone += ["MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_SHARED", "PROT_READ", "PROT_WRITE"]
    sys.modules["fcntl"] = sys.modules["resource"] = None
    locks = {"LK_NBLCK": 2, "LK_UNLCK": 0, "locking": lambda file, mode, count: None}
    sys.modules["msvcrt"] = types.SimpleNamespace(**locks)
    for name in ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP", "pthread_sigmask"):
        delattr(signal, name)
    from lightning.pytorch.trainer.connectors import signal_connector
    signal_connector._IS_WINDOWS = True
    names = ("SIGINT", "SIGTERM", "SIGABRT", "SIGILL", "SIGSEGV", "SIGFPE")
    known = {getattr(signal, name) for name in names}
    signal.valid_signals = lambda: set(known)
    real = ctypes.CDLL
    def load(name, *args, **kwargs):
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        return real(name, *args, **kwargs)
    ctypes.CDLL = load
for name in lacking:
    delattr(os, name)
for name in gone:
    delattr(mmap, name)

import recis_lightning as r
from recis_lightning import callbacks, checkpoint, cli, data, serving
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.optim import SparseAdam

if system == "windows":  # where the C library is not to be asked
    from recis_lightning.table import storage
    storage.os = type("os", (), {**vars(os), "name": "nt"})
users = r.DynamicEmbedding(4, eviction=GlobalStepFilter(1), name="user")
model = torch.nn.Sequential(users, torch.nn.Linear(4, 1))
optimizer = SparseAdam(r.hash_tables(model), lr=0.1)
(table,) = r.hash_tables(model)
for ids in (torch.arange(5000), torch.arange(100), torch.arange(100)):
    table.update_step()
    model(ids).sum().backward()
    optimizer.step()
assert table.evict() == 4900, len(table)
with tempfile.TemporaryDirectory() as folder:
    for _ in range(2):
        checkpoint.save(f"{folder}/tables", model)
    rows = table.embeddings(torch.arange(100))
    table.clear()
    checkpoint.load(f"{folder}/tables", model)
    assert torch.equal(table.embeddings(torch.arange(100)), rows)
    scores = model.eval()(torch.arange(9))
    for _ in range(2):
        serving.export(model, f"{folder}/served", example=torch.arange(2))
    assert torch.equal(serving.load(f"{folder}/served")(torch.arange(9)), scores)
    module = lightning.LightningModule()
    module.part = model.train()
    module.training_step = lambda batch, batch_idx: model(batch).mean()
    module.configure_optimizers = lambda: r.optim.SparseDenseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), r.optim.SparseAdam([table], lr=0.1))
    hooks = [callbacks.CheckpointHook(), callbacks.HashTableFilterHook(filter_interval=2),
             callbacks.DeltaHook(f"{folder}/served", every_n_batches=2)]
    trainer = lightning.Trainer(accelerator="cpu", max_steps=4, callbacks=hooks, logger=False,
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False)
    loader = torch.utils.data.DataLoader([torch.arange(8)] * 4, batch_size=None)
    trainer.fit(module, loader)
    trainer.save_checkpoint(f"{folder}/last.ckpt")
    assert checkpoint.inspect(f"{folder}/last.ckpt")["user"].rows == [8]
print("done on", system)
"""


@pytest.mark.parametrize("name", ["macos", "windows"])
@pytest.mark.slow_except(dict(name="windows"))
def test_a_run_where_calls_of_linux_are_missing(name, tmp_path):
    """Training, eviction, checkpoints, exports, deltas and hooks."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"done on {name}"
