"""RecIS's hooks as Lightning callbacks."""

import logging as _logging

from recis_lightning.callbacks.filter import HashTableFilterHook
from recis_lightning.callbacks.hook import Hook
from recis_lightning.callbacks.logger import AboveTheBar as _AboveTheBar
from recis_lightning.callbacks.logger import LoggerHook
from recis_lightning.callbacks.profiler import ProfilerHook

__all__ = ["HashTableFilterHook", "Hook", "LoggerHook", "ProfilerHook"]

# The hooks report at INFO, which Python hides by default; Lightning shows its own likewise.
_logger = _logging.getLogger("recis_lightning")
if _logger.level == _logging.NOTSET:
    _logger.setLevel(_logging.INFO)
if not any(isinstance(handler, _AboveTheBar) for handler in _logger.handlers):
    _logger.addHandler(_AboveTheBar())
