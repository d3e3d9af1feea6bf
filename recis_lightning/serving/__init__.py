"""From a trained model to scores: lookups in exported programs, served folders, and deltas."""

from recis_lightning.serving.binding import bind
from recis_lightning.serving.chain_sink import ChainSink
from recis_lightning.serving.compaction import compact
from recis_lightning.serving.delta import Delta, DeltaSink, ModelMark, TableDelta, TableState
from recis_lightning.serving.exporter import export
from recis_lightning.serving.follower import FollowedModel, follow
from recis_lightning.serving.model import ServedModel, load
from recis_lightning.serving.parquet_sink import ParquetSink
from recis_lightning.serving.restoring import restore
from recis_lightning.serving.traces import Trace, find_traces
from recis_lightning.serving.vector_index import export_index

__all__ = [
    "ChainSink",
    "Delta",
    "DeltaSink",
    "FollowedModel",
    "ModelMark",
    "ParquetSink",
    "ServedModel",
    "TableDelta",
    "TableState",
    "Trace",
    "bind",
    "compact",
    "export",
    "export_index",
    "find_traces",
    "follow",
    "load",
    "restore",
]
