"""Tracing: selected tensors of every step as a Parquet data set."""

from recis_lightning.trace.collect import add_to_trace, collect_trace
from recis_lightning.trace.writer import TraceWriter

__all__ = ["TraceWriter", "add_to_trace", "collect_trace"]
