"""Facts of a run for its page: date, host, versions and settings, as text by name."""

from __future__ import annotations

import datetime
import os
import platform
import socket
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

__all__ = ["run_facts"]

_PACKAGES = ("recis-lightning", "torch", "lightning", "numba", "triton", "numpy")
_MAX_CHARS = 200  # of a value


def run_facts(settings: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return facts of this process, and settings of the run.

    Args:
        settings: Name -> value; a mapping's entries get names with dots, other values are shown as
            text, and long ones are cut.

    Example:
        >>> facts = run_facts({"model": {"lr": 0.5}, "seed": None})
        >>> facts["model.lr"], "seed" in facts, type(facts["torch"])
        ('0.5', False, <class 'str'>)
    """
    now = datetime.datetime.now().astimezone()
    facts = {
        "date": now.strftime("%Y-%m-%d %H:%M:%S %z"),
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "device": _device(),
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    facts["torch"] = str(torch.__version__)  # it is more than a str
    facts.update(_flat("", settings or {}))
    return facts


def _device() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return f"CPU with {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _flat(prefix: str, settings: Mapping[Any, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found.update(_flat(f"{name}.", value))
        elif value is not None:
            text = str(value)
            found[name] = text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}…"
    return found
