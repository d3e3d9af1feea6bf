"""Real processes with a gloo process group, started once and used by many tests.

Starting a process costs seconds (torch, Numba, Lightning), a process group milliseconds. So a pool
of processes stays up; each check runs a named function in the first few of them, in a process group
of its own. They are forked by a server that has imported everything and done nothing else; beside
a GPU, whose driver survives no fork, they are spawned.
"""

import gc
import importlib
import multiprocessing
import tempfile
import time
import traceback
from datetime import timedelta

import torch
from torch import distributed

from recis_lightning.distributed.process_group import communicator

_IS_FORKED = "forkserver" in multiprocessing.get_all_start_methods() and (
    not torch.cuda.is_available()
)
_TRIES = 2
_CONTEXT = multiprocessing.get_context("forkserver" if _IS_FORKED else "spawn")
if _IS_FORKED:
    _CONTEXT.set_forkserver_preload(["tests.helpers.rank_imports"])


class Ranks:
    """Processes that act as ranks.

    Args:
        most: Of how many processes.
    """

    def __init__(self, most=4):
        self._most, self._workers = most, []

    def run(self, world_size, function, *args, **kwargs):
        """Run a function of a module below ``tests`` in a group of ranks; return their answers.

        A check that fails or hangs ends the processes: nothing outlives its test.
        """
        answers = self.try_to_run(world_size, function, *args, **kwargs)
        if not all(good for good, _ in answers):
            errors = [answer for good, answer in answers if not good]
            raise AssertionError("\n".join(errors))
        return [answer for _, answer in answers]

    def try_to_run(
        self,
        world_size,
        function,
        *args,
        timeout_s=60,
        group_timeout_s=20,
        group_backend="gloo",
        **kwargs,
    ):
        """Return for each rank whether it answered, and its answer, or what went wrong.

        Where gloo cannot connect the ranks, as when a port was taken meanwhile, it is tried again.
        """
        limits = timeout_s, group_timeout_s, group_backend
        for _ in range(_TRIES):
            answers = self._try_to_run(world_size, function, args, kwargs, *limits)
            if not any("connectFullMesh failed" in str(answer) for _, answer in answers):
                break
        return answers

    def _try_to_run(
        self, world_size, function, args, kwargs, timeout_s, group_timeout_s, group_backend
    ):
        self._start(world_size)
        workers = self._workers[:world_size]
        with tempfile.TemporaryDirectory() as folder:
            where = (function.__module__, function.__name__)
            for rank, (_, pipe) in enumerate(workers):
                group = (world_size, f"file://{folder}/store", group_timeout_s, group_backend)
                pipe.send((rank, group, where, args, kwargs))
            end, answers = time.monotonic() + timeout_s, []
            for rank, (_, pipe) in enumerate(workers):
                if not pipe.poll(max(end - time.monotonic(), 0)):
                    answers.append((False, f"rank {rank} had not answered after {timeout_s} s"))
                    continue
                try:
                    answers.append(pipe.recv())
                except EOFError:
                    answers.append((False, f"rank {rank} died"))
        if not all(good for good, _ in answers):
            self.stop()
        return answers

    def _start(self, world_size):
        assert world_size <= self._most
        known = len(self._workers)
        for _ in range(world_size - known):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        for _, pipe in self._workers[known:]:
            assert pipe.poll(120)
            pipe.recv()  # it is ready: what follows is not the time to start

    def stop(self):
        """End all processes."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []


def _work(pipe):
    torch.set_num_threads(1)
    importlib.import_module("tests.helpers.rank_imports")
    gc.freeze()  # a walk of the heap, as for a LightningModule, takes 0.1 s of what was imported
    pipe.send("ready")
    while True:
        try:
            rank, group, (module, name), args, kwargs = pipe.recv()
        except EOFError:
            return
        world_size, store, timeout_s, backend = group
        try:
            if backend == "nccl":
                torch.cuda.set_device(rank)
            if world_size > 1:
                distributed.init_process_group(
                    backend,
                    init_method=store,
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=timeout_s),
                )
            answer = getattr(importlib.import_module(module), name)(*args, **kwargs)
            pipe.send((True, answer))
        except BaseException:
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()


def set_timeout(seconds):
    """Let this rank wait so long for others from now on: once all are level, it may be short."""
    for group in (None, communicator()):
        distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


__all__ = ["Ranks", "set_timeout"]
