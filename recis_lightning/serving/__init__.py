"""From a trained model to scores: lookups in exported programs, and served folders."""

from recis_lightning.serving.binding import bind

__all__ = ["bind"]
