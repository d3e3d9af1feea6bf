"""RecIS's training hooks and dynamic embedding tables for PyTorch Lightning."""

import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from recis_lightning import admission, checkpoint, eviction, initializers, trainer_bridge
from recis_lightning.checkpoint.shard_loader import SHARD_LOADER
from recis_lightning.embedding import DynamicEmbedding, DynamicEmbeddingBag
from recis_lightning.embedding_option import EmbeddingOption
from recis_lightning.engine import EmbeddingEngine
from recis_lightning.jagged import Jagged
from recis_lightning.lookup.table_call import TableLookup
from recis_lightning.lookup.together import look_up_together
from recis_lightning.metrics import add_metric
from recis_lightning.monitoring.report import TableReport, report
from recis_lightning.nested_jagged import NestedJagged
from recis_lightning.table import hash_table
from recis_lightning.table.anchor import keep_anchors_out
from recis_lightning.table.averaged_model import share_tables_with_averaged_models
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.listing import hash_tables
from recis_lightning.table.state import set_shard_loader

if TYPE_CHECKING:
    from recis_lightning.metrics.gauc import GAUC

__version__ = "0.2.0"

keep_anchors_out()
share_tables_with_averaged_models()
trainer_bridge.register()
set_shard_loader(SHARD_LOADER.load)
hash_table.set_lookup(TableLookup())

# Settings that save_hyperparameters puts into checkpoints, which load with weights_only=True:
# classes with plain fields, whose construction does nothing else. TimeToLive has a clock,
# time.time.
torch.serialization.add_safe_globals(
    [
        *(EmbeddingOption, (EmbeddingOption, "recis_lightning.engine.EmbeddingOption")),  # of 0.1.0
        *(admission.ReadOnly, admission.MinCount, admission.Probability, admission.BloomCount),
        *(eviction.GlobalStepFilter, eviction.TimeToLive, eviction.MaxRows, eviction.MinNorm),
        *(eviction.AnyOf, eviction.AllOf, time.time),
        *(initializers.Constant, initializers.Uniform, initializers.Normal),
        *(initializers.TruncatedNormal, initializers.XavierUniform, initializers.XavierNormal),
        *(Jagged, NestedJagged),  # among the example inputs of programs of torch.export
        *(initializers.KaimingUniform, initializers.KaimingNormal),
    ]
)

# Pickles of 0.1.0 name modules by paths they had then.
for _path, _module in {"hash_table": hash_table}.items():
    sys.modules[f"{__name__}.{_path}"] = _module

__all__ = [
    "GAUC",
    "DynamicEmbedding",
    "DynamicEmbeddingBag",
    "EmbeddingEngine",
    "EmbeddingOption",
    "HashTable",
    "Jagged",
    "NestedJagged",
    "TableReport",
    "add_metric",
    "checkpoint",
    "hash_tables",
    "look_up_together",
    "report",
]


def __getattr__(name: str) -> Any:
    if name == "GAUC":  # torchmetrics takes most of a second to import
        from recis_lightning.metrics.gauc import GAUC

        return GAUC
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
