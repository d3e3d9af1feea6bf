"""One batch through a group of tables."""

from recis_lightning.lookup.evaluation import finish_evaluation

__all__ = ["finish_evaluation"]
