"""Peaks of data sheets by a device's name, and the measured rate of copies."""

from types import SimpleNamespace

import pytest
import torch

from recis_lightning.monitoring import device_rates
from recis_lightning.monitoring.device_rates import copy_rate, peak_tflops


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "wanted"),
    [
        ("NVIDIA H200", "bf16-mixed", False, 989.4),
        ("NVIDIA H100 80GB HBM3", "32-true", True, 494.7),
        ("NVIDIA H100 PCIe", "16-true", False, 756.0),
        ("NVIDIA A100-SXM4-40GB", "32-true", False, 19.5),
        ("NVIDIA A10", "bf16-true", False, 125.0),
        ("NVIDIA A10G", "bf16-true", False, 70.0),
        ("Tesla T4", "16-mixed", False, 65.0),
        ("NVIDIA L4", "bf16-mixed", False, 121.0),
        ("NVIDIA L40S", "bf16-mixed", False, 362.0),
        ("NVIDIA A100-SXM4-40GB", "64-true", False, None),
        ("NVIDIA H200 NVL", "bf16-mixed", False, 835.5),
        ("NVIDIA H100 NVL", "32-true", True, 417.5),
        ("NVIDIA H800 PCIe", "32-true", False, 51.2),
        ("NVIDIA GB200", "bf16-mixed", False, 2500.0),
        ("Tesla V100-SXM2-16GB", "16-mixed", False, 125.0),
        ("Tesla V100-PCIE-16GB", "16-mixed", False, 112.0),
        ("Tesla V100S-PCIE-32GB", "32-true", True, 16.4),
        ("Tesla V100-SXM2-16GB", "bf16-mixed", False, None),
        ("NVIDIA GeForce RTX 3090 Ti", "16-mixed", False, 80.0),
        ("AMD Instinct MI250X", "bf16-mixed", False, 191.5),
        ("GeForce GT 1030", "32-true", False, None),
    ],
)
def test_peaks(name, precision, tf32, wanted):
    assert peak_tflops(name, precision, tf32) == wanted


def test_tensor_cores_double_from_tf32_to_16_bits_and_no_name_hides_another():
    """Dense and sparse figures, mixed up, would break the ratio of a row."""
    names = [set(name.split()) for name, *_ in device_rates._PEAKS]
    for index, (name, half, tensor, single) in enumerate(device_rates._PEAKS):
        assert not any(before <= names[index] for before in names[:index]), name
        assert half >= tensor >= single, name
        if tensor > single or name.startswith(("RTX", "L")):
            assert half / tensor == pytest.approx(2, rel=0.02), name


def test_the_copy_rate_is_measured_once(monkeypatch):
    """Bytes read and written over the fastest copy, which the clock says takes 2 s."""
    ticks = iter([0, 3, 10, 12, 20, 25, 30, 33])
    monkeypatch.setattr(device_rates, "_rates", {})
    monkeypatch.setattr(device_rates, "_COPY_BYTES", {"cpu": 1000})
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(device_rates, "time", clock)
    assert copy_rate(torch.device("cpu")) == 1000
    assert copy_rate(torch.device("cpu")) == 1000
