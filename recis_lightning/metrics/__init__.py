"""Values that hooks report (``add_metric``), and metrics of clicks and rankings.

The classes are imported when they are asked for: they need torchmetrics, whose import takes most of
a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recis_lightning.metrics.registry import (
    add_metric,
    add_to_ml_tracker,
    clear_metrics,
    get_metrics,
    take_tracked,
)

if TYPE_CHECKING:
    from recis_lightning.metrics.clicks import BinnedAUROC, Calibration, NormalizedEntropy
    from recis_lightning.metrics.gauc import GAUC
    from recis_lightning.metrics.rankings import NDCG, MeanReciprocalRank, RecallAtK

__all__ = [
    "GAUC",
    "NDCG",
    "BinnedAUROC",
    "Calibration",
    "MeanReciprocalRank",
    "NormalizedEntropy",
    "RecallAtK",
    "add_metric",
    "add_to_ml_tracker",
    "clear_metrics",
    "get_metrics",
    "take_tracked",
]


def __getattr__(name: str) -> Any:
    if name == "GAUC":
        from recis_lightning.metrics.gauc import GAUC

        return GAUC
    if name in ("BinnedAUROC", "Calibration", "NormalizedEntropy"):
        from recis_lightning.metrics import clicks

        return getattr(clicks, name)
    if name in ("NDCG", "MeanReciprocalRank", "RecallAtK"):
        from recis_lightning.metrics import rankings

        return getattr(rankings, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
