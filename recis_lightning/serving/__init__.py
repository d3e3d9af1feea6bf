"""From a trained model to scores: lookups in exported programs, and served folders."""

from recis_lightning.serving.binding import bind
from recis_lightning.serving.exporter import export
from recis_lightning.serving.model import ServedModel, load

__all__ = ["ServedModel", "bind", "export", "load"]
