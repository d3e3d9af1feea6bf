"""Ahead-of-time compilation of every Triton kernel, without a GPU, with the resources of each.

    python -m benchmarks.gpu_kernels            # all targets, one line a kernel
    python -m benchmarks.gpu_kernels sm_90

Every kernel of ``recis_lightning/ops/gpu/`` is compiled with its first constants for each
target, and with all of them for sm_90. A line is JSON: kernel, constants, target, bytes of shared
memory, registers and bytes of stack (spilled registers) of a thread, and for NVIDIA's targets the
races that ``ptx_races`` finds, also without any barrier, to see that it finds some.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.ptx_races import find_races, without_barriers
from recis_lightning.ops import gpu
from recis_lightning.ops.gpu import runtime

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
IN_FULL = "sm_90"


def load_kernels() -> list[Any]:
    """Import every kernel file; return the kernels that they declare."""
    for path in sorted(Path(gpu.__path__[0]).glob("[!_]*.py")):
        importlib.import_module(f"recis_lightning.ops.gpu.{path.stem}")
    return runtime.KERNELS


def compile_kernel(index: int, variant: int, target: str) -> dict[str, Any]:
    """Compile one kernel; return its resources."""
    kernel = load_kernels()[index]
    constants = kernel.variants[variant]
    types = dict.fromkeys(kernel.numbers, "i64") | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.jit.arg_names}
    source = ASTSource(kernel.jit, signature, constexprs=constants)
    compiled = triton.compile(source, target=TARGETS[target], options=kernel.options)
    line = {"kernel": kernel.name, "constants": constants, "target": target}
    resources = {"shared_bytes": compiled.metadata.shared, **_resources(compiled)}
    return {**line, **resources, **_races(compiled)}


def _races(compiled: Any) -> dict[str, Any]:
    if "ptx" not in compiled.asm:
        return {}
    ptx = compiled.asm["ptx"]
    return {"races": find_races(ptx), "without_barriers": find_races(without_barriers(ptx))}


def _resources(compiled: Any) -> dict[str, int]:
    if "amdgcn" in compiled.asm:
        found = dict(
            re.findall(
                r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", compiled.asm["amdgcn"]
            )
        )
        size = int(found["private_segment_fixed_size"])  # where spilled registers go
        return {"registers": int(found["vgpr_count"]), "spilled_bytes": size}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if "cubin" not in compiled.asm or not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sizes = {key: int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "LOCAL")}
    return {"registers": sizes["REG"], "spilled_bytes": sizes["STACK"] + sizes["LOCAL"]}


def jobs(targets: list[str]) -> list[tuple[int, int, str]]:
    """Return all compilations: (index of the kernel, index of its variant, target)."""
    return [
        (index, variant, target)
        for target in targets
        for index, kernel in enumerate(load_kernels())
        for variant in range(len(kernel.variants) if target == IN_FULL else 1)
    ]


def main() -> int:
    """Compile, print, and exit 1 if a kernel does not compile."""
    failed = 0
    work = jobs(sys.argv[1:] or list(TARGETS))
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        for job, future in [(job, pool.submit(compile_kernel, *job)) for job in work]:
            try:
                print(json.dumps(future.result()), flush=True)
            except Exception as error:
                failed = 1
                kernel = load_kernels()[job[0]]
                where = f"{kernel.name} {kernel.variants[job[1]]} {job[2]}"
                print(f"{where}: {str(error)[-800:]}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
