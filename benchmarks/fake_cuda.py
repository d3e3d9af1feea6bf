"""CUDA driver that launches nothing, to compare and time launches without a GPU.

    python -m benchmarks.fake_cuda DIRECTORY    # prints launches, a line of JSON a kernel
    python -m benchmarks.fake_cuda DIRECTORY time

The driver, and the kernels that Triton compiles for sm_90, are written to DIRECTORY. The second
form also times a launch by Triton's own launcher and by ``ops.gpu.runtime``.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".c")
STREAM = 7


def build(directory: Path) -> ctypes.CDLL:
    """Build the driver and load it under the name of CUDA's."""
    path = directory / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *flags, "-o", path, SOURCE], check=True)
    (directory / "libcuda.so").symlink_to(path)
    os.environ["TRITON_LIBCUDA_PATH"] = str(directory)
    os.environ["TRITON_CACHE_DIR"] = str(directory / "cache")
    os.environ["TRITON_INTERPRET"] = "0"
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def activate() -> None:
    """Make Triton use the driver as that of an H100."""
    import triton
    from triton.backends.nvidia import driver as nvidia

    driver = nvidia.CudaDriver.__new__(nvidia.CudaDriver)
    driver.utils, driver.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: STREAM
    driver.get_device_capability = lambda device: (9, 0)
    triton.runtime.driver.set_active(driver)


def launches() -> list[tuple[object, tuple[int, ...], dict[str, object]]]:
    """Return launches with few and many arguments: (kernel, numbers, constants)."""
    from recis_lightning.ops.gpu import gradient_sort, hash_index, row_io

    big = [2**62 + 1, -(2**63), 2**31, 0, 1, 16, -1, 2**40]
    kernels = (
        hash_index._clear_kernel,
        gradient_sort._count_pieces_kernel,
        gradient_sort._key_kernel,
        row_io._copy_kernel,
    )
    return [
        (kernel, tuple(big[: len(kernel.numbers)]), constants)
        for kernel in kernels
        for constants in kernel.variants[:2]
    ]


def _seen(cuda: ctypes.CDLL, num_args: int) -> dict[str, object]:
    names = ("launches", "grid", "stream", "function")
    values = {name: ctypes.c_int64.in_dll(cuda, name).value for name in names}
    return {**values, "args": list((ctypes.c_int64 * 64).in_dll(cuda, "args"))[:num_args]}


def _hooked(call: Callable[[], object]) -> list[str]:
    """Return the names of kernels for whose launch a profiler's hook is called."""
    import triton

    names: list[str] = []

    def hook(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    triton.knobs.runtime.launch_enter_hook.add(hook)
    call()
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    return names


def compare(cuda: ctypes.CDLL, kernel: Any, numbers: Any, constants: Any, times: bool) -> Any:
    """Launch a kernel by Triton, then twice by ours, with constants in both orders."""
    import torch

    device, reordered = torch.device("cpu"), dict(reversed(constants.items()))
    ctypes.c_int64.in_dll(cuda, "num_args").value = len(numbers)

    def ours(constants: dict[str, object]) -> Callable[[], object]:
        return lambda: kernel.launch(device, 3, *numbers, **constants)

    calls = {
        "triton": lambda: kernel.jit[(3,)](*numbers, **constants, **kernel.options),
        "first": ours(constants),
        "again": ours(constants),
        "reordered": ours(reordered),
        "reordered again": ours(reordered),
    }
    line = {"kernel": kernel.name, "constants": constants, "numbers": numbers}
    for name, call in calls.items():
        call()
        line[name] = _seen(cuda, len(numbers))
    line["hooked"] = _hooked(calls["again"])
    if times:
        line["us"] = {
            name: min(timeit.repeat(calls[name], number=1000, repeat=5)) * 1e3
            for name in ("triton", "again")
        }
    return line


def main(directory: Path, times: bool) -> None:
    """Compare the launches of some kernels."""
    cuda = build(directory)
    activate()
    for kernel, numbers, constants in launches():
        print(json.dumps(compare(cuda, kernel, numbers, constants, times)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "time" in sys.argv[2:])
