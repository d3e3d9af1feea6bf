"""Preemption: SIGTERM, SIGUSR1 and SLURM's requeue, in this process and on ranks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment

from recis_lightning import checkpoint
from recis_lightning.callbacks.preemption import Preemption
from tests.helpers import rank_signals
from tests.helpers.lightning_model import differences, everything
from tests.helpers.rank_checkpoints import same
from tests.helpers.rank_signals import Sends, run, slurm

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]
NAMES = (signal.SIGTERM, signal.SIGUSR1)


def handlers():
    return [signal.getsignal(signum) for signum in NAMES]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the model of a run that nothing disturbs, and how many steps it took."""
    model, through, status = run(tmp_path_factory.mktemp("whole"))
    assert status is None
    return model, through.global_step


# Where the signal comes, and the steps done when the run leaves: of 16, with a validation each 4.
PLACES = {
    "in a batch": ("on_train_batch_start", 1, 2),
    "before a validation": ("on_train_batch_start", 3, 4),
    "in a validation": ("on_validation_batch_start", 1, 4),
    "in an epoch's last batch": ("on_train_batch_start", 7, 8),
    "at an epoch's end": ("on_train_epoch_end", 0, 8),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("signum", NAMES)
@pytest.mark.slow_except(
    dict(signum=signal.SIGTERM, place=["in a batch", "in an epoch's last batch"]),
    dict(signum=signal.SIGUSR1, place=["in a validation", "at an epoch's end"]),
)
def test_a_run_saves_once_leaves_and_resumes(tmp_path, undisturbed, place, signum):
    """It ends where an undisturbed one does, bit by bit; what took signals before does so again."""
    before, (whole, num_steps) = handlers(), undisturbed
    hook, index, steps = PLACES[place]
    sends = Sends(signum, hook, index)
    _, left, status = run(tmp_path, sends)
    assert status == 128 + signum
    assert (left.global_step, sends.saves) == (steps, 1)
    assert left.received_sigterm
    assert handlers() == before
    assert set(checkpoint.inspect(tmp_path / "last-preempted.ckpt")) == {"user", "item", "tags"}
    model, ended, none = run(tmp_path, ckpt_path="last", seed=5)
    assert none is None
    assert ended.global_step == num_steps == 16
    assert differences(everything(model), everything(whole)) == []


def test_slurm_starts_the_job_again(tmp_path, undisturbed):
    """The next run of the job finds by itself where to go on, whatever a killed save left."""
    whole, _ = undisturbed
    with slurm(tmp_path):
        plugins = [SLURMEnvironment()]
        _, _, status = run(
            tmp_path, Sends(signal.SIGUSR1, "on_train_batch_start", 2), plugins=plugins
        )
        assert status == 128 + signal.SIGUSR1
        assert (tmp_path / "asked").read_text() == "requeue 77\n"
        (tmp_path / "hpc_ckpt_1.ckpt").readlink()
        model, ended, none = run(tmp_path, seed=5, plugins=plugins)
    assert none is None
    assert ended.ckpt_path == str(tmp_path / "hpc_ckpt_1.ckpt")
    assert differences(everything(model), everything(whole)) == []


def test_a_signal_after_the_last_batch_ends_nothing(tmp_path):
    """The run is complete; the program may ask for the signal."""
    _, ended, status = run(tmp_path, Sends(signal.SIGTERM, "on_train_end"))
    assert status is None
    assert ended.received_sigterm
    assert not (tmp_path / "last-preempted.ckpt").exists()


def test_a_users_handler_of_a_signal_is_called_too(tmp_path):
    """As under Lightning alone for SIGTERM; SIGUSR1 is left to it."""
    told = []
    before = [signal.signal(signum, lambda signum, _: told.append(signum)) for signum in NAMES]
    try:
        _, _, status = run(tmp_path, Sends(signal.SIGTERM, "on_train_batch_start", 2))
        assert status == 128 + signal.SIGTERM
        _, _, status = run(tmp_path, Sends(signal.SIGUSR1, "on_train_batch_start", 2))
        assert status is None
    finally:
        for signum, handler in zip(NAMES, before, strict=True):
            signal.signal(signum, handler)
    assert set(told) == set(NAMES)


def test_it_is_there_once_and_last(tmp_path):
    """A second run of a Trainer does not add another."""
    _, ended, _ = run(tmp_path)
    assert isinstance(ended.callbacks[-1], Preemption)
    Preemption.attach(ended)
    assert sum(isinstance(callback, Preemption) for callback in ended.callbacks) == 1


@pytest.mark.parametrize(
    ("kind", "signalled", "steps"),
    [("SIGTERM", [1], 3), ("SIGUSR1", [0], 2), ("requeue", [0, 1], 2)],
)
@pytest.mark.slow_except(dict(kind=["SIGTERM", "requeue"]))
def test_ranks_leave_together(ranks, tmp_path, kind, signalled, steps):
    """Whichever of them is told, and at whatever batch."""
    answers = ranks.run(2, rank_signals.one_rank_is_told, tmp_path, kind, signalled, timeout_s=120)
    signum = signal.SIGTERM if kind == "SIGTERM" else signal.SIGUSR1
    for status, left_at, ended_at, found, whole in answers:
        assert (status, ended_at) == (128 + signum, 16)
        assert left_at == steps
        assert same(found, whole)
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 77\n" * (kind == "requeue"))


def found_by(*args):
    """Run the harness in a process of its own, which forks the ranks; return what it prints."""
    command = [sys.executable, "-m", "tests.helpers.signalled_runs", *map(str, args)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def check(found, signals):
    """Each run left in order or ended by itself, in time, and was as one that nothing disturbed."""
    assert found["signals"] >= signals
    assert found["left"] > 0
    assert (found["disorder"], found["wrong"], found["differing"]) == ([], [], [])
    assert found["slowest"] < 20 + 10


@pytest.mark.slow
def test_signals_at_a_few_moments():
    check(found_by("--signals", 2, "--ranks", 2, "--seed", 1), signals=2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("args", [("--save-last",), ()])
def test_kills_and_signals_while_runs_save(args):
    """Two of each kind; RECIS_LIGHTNING_KILLS=50 for as many as that."""
    signals = 3 * int(os.environ.get("RECIS_LIGHTNING_KILLS", "2"))
    found = found_by("--signals", signals, "--each-kind", "--save-every", 2, *args, "--seed", 4)
    check(found, signals=signals)
    assert found["killed"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("kind", ["SIGTERM", "SIGUSR1"])
def test_signals_at_fifty_moments(num_ranks, kind):
    check(found_by("--signals", 50, "--ranks", num_ranks, "--kinds", kind), signals=50)
