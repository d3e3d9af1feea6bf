"""Command line: ``recis-lightning``, and ``RecisCLI``, a LightningCLI to call or to subclass."""

from typing import TYPE_CHECKING, Any

from recis_lightning.cli.commands import main

if TYPE_CHECKING:
    from recis_lightning.cli.recis_cli import RecisCLI

__all__ = ["RecisCLI", "main"]


def __getattr__(name: str) -> Any:
    if name == "RecisCLI":  # imports Lightning, which report and inspect do without
        from recis_lightning.cli.recis_cli import RecisCLI

        return RecisCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
