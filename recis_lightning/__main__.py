"""``python -m recis_lightning``: the command ``recis-lightning``."""

from recis_lightning.cli import main

if __name__ == "__main__":
    main()
