"""``python -m recis_lightning fit --config x.yaml``: LightningCLI that knows this package.

Any LightningModule and LightningDataModule is named by its import path (the current folder is
searched too). Our callbacks, policies, initializers and sparse optimizers need only their class
name. A module configures its own optimizers, since it joins a dense and a sparse one.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningCLI

# jsonargparse finds a class by its short name once its module is imported.
import recis_lightning.admission
import recis_lightning.callbacks
import recis_lightning.eviction
import recis_lightning.initializers
import recis_lightning.optim  # noqa: F401


def main(args: Sequence[str] | None = None) -> LightningCLI:
    """Parse a command line and run it.

    Args:
        args: Subcommand and options, as on the command line; None takes the command line.

    Returns:
        The CLI after its run, with ``trainer``, ``model`` and ``datamodule``.

    Raises:
        SystemExit: An argument is invalid; with status 2 and a message.
    """
    return LightningCLI(
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "python -m recis_lightning"},
        auto_configure_optimizers=False,
        args=None if args is None else list(args),
    )


if __name__ == "__main__":
    main()
