"""Reading of rows of mapped files in plain torch: the system reads what is used."""

from __future__ import annotations

from typing import Any


def bring_in(places: Any, writes: bool, page_bytes: int) -> None:
    """Do nothing: the rows are there all the same, only slower."""


__all__ = ["bring_in"]
