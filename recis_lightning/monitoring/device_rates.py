"""Rates of a device: how fast it multiplies, by its data sheet, and copies, by measurement."""

from __future__ import annotations

import threading
import time

import torch

__all__ = ["copy_rate", "peak_tflops"]

# Dense TFLOP/s (half of what data sheets print "with sparsity"), summed up in float32: of bfloat16
# and float16 on tensor cores, TF32 on them, and float32. From NVIDIA's and AMD's data sheets and
# architecture papers, for one GPU as torch counts them. A name whose words contain another's is
# before it.
_PEAKS: tuple[tuple[str, float, float, float], ...] = (
    ("GB200", 2500.0, 1250.0, 80.0),
    ("B200", 2250.0, 1125.0, 75.0),
    ("H100 PCIE", 756.0, 378.0, 51.2),
    ("H100 NVL", 835.5, 417.5, 60.0),
    ("H100", 989.4, 494.7, 66.9),
    ("H200 NVL", 835.5, 417.5, 60.0),
    ("H200", 989.4, 494.7, 66.9),
    ("H20", 148.0, 74.0, 44.0),
    ("H800 PCIE", 756.0, 378.0, 51.2),
    ("H800", 989.4, 494.7, 66.9),
    ("GH200", 989.4, 494.7, 66.9),
    ("A100", 312.0, 156.0, 19.5),
    ("A800", 312.0, 156.0, 19.5),
    ("A10G", 70.0, 35.0, 35.0),
    ("A10", 125.0, 62.5, 31.2),
    ("A30", 165.0, 82.0, 10.3),
    ("A40", 149.7, 74.8, 37.4),
    ("L40S", 362.0, 183.0, 91.6),
    ("L40", 181.0, 90.5, 90.5),
    ("L20", 119.5, 59.8, 59.8),
    ("L4", 121.0, 60.0, 30.3),
    ("V100 PCIE", 112.0, 14.0, 14.0),
    ("V100S PCIE", 130.0, 16.4, 16.4),
    ("V100", 125.0, 15.7, 15.7),
    ("T4", 65.0, 8.1, 8.1),
    ("RTX 4090", 165.2, 82.6, 82.6),
    ("RTX 3090 TI", 80.0, 40.0, 40.0),
    ("RTX 3090", 71.0, 35.6, 35.6),
    ("MI300X", 1307.4, 653.7, 163.4),
    ("MI250X", 191.5, 47.9, 47.9),  # torch has a GPU for each of its two dies
)
_WITHOUT_BFLOAT16 = {"V100", "V100S", "T4"}  # their tensor cores take float16 only
_COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 28}  # more than caches hold
_ROUNDS = 4
_rates: dict[str, float] = {}
_lock = threading.Lock()


def peak_tflops(device_name: str, precision: str, tf32: bool = False) -> float | None:
    """Return the peak of a common GPU in TFLOP/s, dense (no sparsity); None if it is not known.

    Args:
        device_name: As ``torch.cuda.get_device_name`` has it.
        precision: Of a Trainer, and so of matrices: "bf16-mixed", "16-true", "32-true", ...
        tf32: Whether matrices of float32 are multiplied as TF32.

    Example:
        >>> peak_tflops("NVIDIA A100-SXM4-80GB", "bf16-mixed")
        312.0
        >>> peak_tflops("NVIDIA A100-SXM4-80GB", "32-true")
        19.5
        >>> peak_tflops("Intel(R) Xeon(R)", "32-true") is None
        True
    """
    words = set(device_name.upper().replace("-", " ").split())
    for name, half, tensor, single in _PEAKS:
        if set(name.split()) <= words:
            if "64" in precision:
                return None
            if "16" in precision:
                return None if "bf16" in precision and words & _WITHOUT_BFLOAT16 else half
            return tensor if tf32 else single
    return None


def copy_rate(device: torch.device) -> float:
    """Return the bytes a second that a device reads and writes in a copy of a large tensor.

    Measured once for each device, on the CPU with torch's threads: the best of a few copies.
    """
    with _lock:
        key = str(device)
        if key not in _rates:
            _rates[key] = _measure(device)
        return _rates[key]


def _measure(device: torch.device) -> float:
    size = _COPY_BYTES.get(device.type, 1 << 27)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)  # written once: its pages are there
    best = float("inf")
    for _ in range(_ROUNDS):
        _wait_for(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best if best > 0 else float("inf")


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
