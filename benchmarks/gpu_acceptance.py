"""The first minutes on a GPU: do the kernels run, are they right, and how fast are they?

    python -m benchmarks.gpu_acceptance --output out          # on a GPU, at most 450 s
    python -m benchmarks.gpu_acceptance --output out --dry    # interpreted, at tiny sizes

Each stage is a process with a limit of its own: an illegal access ends a CUDA context for good.
What is right comes first; figures are not taken where it is not, for they would mean nothing. The
folder gets ``acceptance.jsonl``, a line for each check, figure and stage, written as it is found,
and ``acceptance.log`` with all that was printed. The status is 0 if all passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton decides when a kernel is declared

from benchmarks import gpu_stage
from benchmarks.gpu_stage import ROOT, Stage, append_line, command_of

LIMIT_SECONDS = 450
_LEAST_SECONDS = 15  # that a stage is begun with
_NEEDED = ("numba", "lightning", "torchmetrics", "jsonargparse", "safetensors", "numpy")
_FOR_TESTS = ("pytest", "hypothesis", "pyarrow")


def machine(stage: Stage) -> None:
    """Record the machine and the versions; check that what the other stages import is there."""
    import torch
    import triton

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"triton": triton.__version__, "cores": os.cpu_count()}
    if not stage.is_dry:
        properties = torch.cuda.get_device_properties(stage.device)
        found |= {"gpu": properties.name, "cuda": torch.version.cuda}
        found |= {"multiprocessors": properties.multi_processor_count}
        found |= {"memory_gb": round(properties.total_memory / 1e9, 1)}
    append_line(stage.output, {"stage": stage.name, "machine": found})
    print(found, flush=True)
    for names, what in ((_NEEDED, "the package"), (_FOR_TESTS, "its tests")):
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        stage.check(f"modules of {what} are installed", not missing, f"missing: {missing}")


class Plan(NamedTuple):
    """One stage of the run.

    Attributes:
        limit: Seconds that it may take.
        is_figures: Whether it takes figures, which mean nothing where results are wrong.
        module: File that holds it.
        function: Its name there.
    """

    limit: int
    is_figures: bool
    module: str
    function: str


PLANS = {
    "machine": Plan(40, False, "gpu_acceptance", "machine"),
    "smoke": Plan(75, False, "gpu_checks", "smoke"),
    "races": Plan(60, False, "gpu_checks", "races"),
    "long rows": Plan(80, False, "gpu_checks", "long_rows"),
    "dangers": Plan(75, False, "gpu_dangers", "run_all"),
    "tests": Plan(120, False, "gpu_checks", "tests"),
    "profile": Plan(75, True, "gpu_figures", "profile"),
    "published": Plan(90, True, "gpu_figures", "published"),
    "skew": Plan(70, True, "gpu_figures", "skew"),
    "tune": Plan(70, True, "gpu_figures", "tune"),
}
# A wrong answer of these makes figures meaningless; others may fail for reasons of their own.
_DECIDES = ("machine", "smoke", "races")


def _function_of(name: str) -> Callable[[Stage], None]:
    """Return a stage's function, or that of one danger."""
    if name.startswith("danger "):
        from benchmarks.gpu_dangers import DANGERS

        return DANGERS[name.removeprefix("danger ")]
    plan = PLANS[name]
    function: Callable[[Stage], None]
    function = getattr(importlib.import_module(f"benchmarks.{plan.module}"), plan.function)
    return function


def run_stage(name: str, output: Path, is_dry: bool) -> int:
    """Run one stage in this process; return 1 if anything failed."""
    stage = Stage(name, output, is_dry)
    try:
        if name.startswith("danger "):
            with stage.kernels():
                _function_of(name)(stage)
        else:
            _function_of(name)(stage)
    except BaseException as error:  # the next stage is a process of its own
        traceback.print_exc()
        if not name.startswith("danger "):
            stage.check("the stage ran to its end", False, f"{type(error).__name__}: {error}"[:500])
        return 1
    return bool(stage.failed)


def run(names: list[str], output: Path, is_dry: bool) -> int:
    """Run stages one after the other; return how many did not pass."""
    output.mkdir(parents=True, exist_ok=True)
    for old in (gpu_stage.RESULTS, "acceptance.log"):
        (output / old).unlink(missing_ok=True)
    started, failed = time.monotonic(), []
    for name in names:
        left = LIMIT_SECONDS - (time.monotonic() - started)
        plan = PLANS[name]
        why = ""
        if left < _LEAST_SECONDS:
            why = "out of time"
        elif plan.is_figures and (wrong := [one for one in _DECIDES if one in failed]):
            why = f"{' and '.join(wrong)} failed"
        if why:
            status, outcome, seconds = None, f"skipped: {why}", 0.0
        else:
            status, seconds = _run_process(name, output, is_dry, min(plan.limit, left))
            outcome = {0: "passed", None: "took too long"}.get(status, "FAILED")
        if status != 0:
            failed.append(name)
        line = {"stage": name, "outcome": outcome, "status": status, "seconds": round(seconds, 1)}
        append_line(output, line)
        total = time.monotonic() - started
        print(f"{name}: {outcome}, {seconds:.0f} s ({total:.0f} s in all)", flush=True)
    verdict = f"{len(names) - len(failed)} of {len(names)} stages passed"
    print(f"{verdict}; results in {output / gpu_stage.RESULTS}")
    return len(failed)


def _run_process(name: str, output: Path, is_dry: bool, limit: float) -> tuple[int | None, float]:
    """Run a stage's process; return its status, None if it took too long, and its seconds."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if is_dry:
        environment["TRITON_INTERPRET"] = "1"
    elif name == "smoke":
        environment["CUDA_LAUNCH_BLOCKING"] = "1"  # so that the first bad kernel is named
    started = time.monotonic()
    with (output / "acceptance.log").open("a", encoding="utf-8") as log:
        print(f"== {name}", file=log, flush=True)
        process = subprocess.Popen(
            command_of(name, output, is_dry),
            **{"cwd": ROOT, "env": environment, "stdout": log, "stderr": subprocess.STDOUT},
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # Its children too, such as pytest's: they would take the time of the next stage.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return status, time.monotonic() - started


def main(arguments: list[str] | None = None) -> int:
    """Run the stages that were asked for, or the one that this process is for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--dry", action="store_true", help="interpret, at tiny sizes")
    parser.add_argument("--stages", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    output = asked.output.absolute()
    if asked.stage:
        return run_stage(asked.stage, output, asked.dry)
    return int(run(asked.stages, output, asked.dry) > 0)


if __name__ == "__main__":
    sys.exit(main())
