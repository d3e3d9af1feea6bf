"""RecIS's hooks as Lightning callbacks."""

import logging as _logging

from recis_lightning.callbacks.auto_profiler import AutoProfilerHook
from recis_lightning.callbacks.checkpoint import CheckpointHook
from recis_lightning.callbacks.clip_grad_norm import ClipGradNormHook
from recis_lightning.callbacks.delta import DeltaHook
from recis_lightning.callbacks.filter import HashTableFilterHook
from recis_lightning.callbacks.hook import Hook
from recis_lightning.callbacks.logger import LoggerHook, TqdmLoggingHandler
from recis_lightning.callbacks.lookahead import Lookahead
from recis_lightning.callbacks.memory_access import MemoryAccessHook
from recis_lightning.callbacks.module_flops import ModuleFlopsHook
from recis_lightning.callbacks.prediction_writer import PredictionWriter
from recis_lightning.callbacks.profiler import ProfilerHook
from recis_lightning.callbacks.progressive_validation import ProgressiveValidation
from recis_lightning.callbacks.reinitialize import ReinitializeRowsHook
from recis_lightning.callbacks.report import MetricReportHook
from recis_lightning.callbacks.timeline_profiler import TimelineProfiler
from recis_lightning.callbacks.trace import TraceHook
from recis_lightning.callbacks.tracker import MLTrackerHook
from recis_lightning.callbacks.uneven_batches import UnevenBatches
from recis_lightning.callbacks.window_checkpoint import WindowCheckpoint
from recis_lightning.callbacks.windows import WindowList, Windows
from recis_lightning.metrics import add_to_ml_tracker
from recis_lightning.trace import add_to_trace

__all__ = [
    "AutoProfilerHook",
    "CheckpointHook",
    "ClipGradNormHook",
    "DeltaHook",
    "HashTableFilterHook",
    "Hook",
    "LoggerHook",
    "Lookahead",
    "MLTrackerHook",
    "MemoryAccessHook",
    "MetricReportHook",
    "ModuleFlopsHook",
    "PredictionWriter",
    "ProfilerHook",
    "ProgressiveValidation",
    "ReinitializeRowsHook",
    "TimelineProfiler",
    "TraceHook",
    "UnevenBatches",
    "WindowCheckpoint",
    "WindowList",
    "Windows",
    "add_to_ml_tracker",
    "add_to_trace",
]

# The hooks log at INFO, which Python hides by default; Lightning sets up its own logger likewise.
_logger = _logging.getLogger("recis_lightning")
if _logger.level == _logging.NOTSET:
    _logger.setLevel(_logging.INFO)
if not any(isinstance(handler, TqdmLoggingHandler) for handler in _logger.handlers):
    _logger.addHandler(TqdmLoggingHandler())
