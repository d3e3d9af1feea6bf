"""Run notebooks in one process, without Jupyter, and write what their cells give into them.

From the root of the repository, after a change to a notebook's code::

    python -m examples.notebooks.execute examples/notebooks/*.ipynb

Needs ``recis-lightning[all]``. A cell's output is what it prints, what the package logs, and its
figures as of ``plt.show()``.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

Notebook = dict[str, Any]


def code_cells(notebook: Notebook) -> list[dict[str, Any]]:
    """Return the cells that have code, in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: Notebook) -> dict[str, Any]:
    """Run the cells in the current folder, keep their outputs in them, and return the names.

    Raises:
        RuntimeError: A cell raised an error, which is its cause; names the cell.
    """
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names: dict[str, Any] = {"__name__": "__main__"}
    shown: list[bytes] = []
    show = plt.show
    plt.show = lambda: shown.extend(_figures())  # type: ignore[assignment]
    logger = logging.getLogger("recis_lightning")
    try:
        for number, cell in enumerate(code_cells(notebook), start=1):
            written = io.StringIO()
            log = logging.StreamHandler(written)
            logger.addHandler(log)
            try:
                with redirect_stdout(written):
                    exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
            except Exception as error:
                raise RuntimeError(f"cell {number} raised {error!r}") from error
            finally:
                logger.removeHandler(log)
            cell["execution_count"] = number
            cell["outputs"] = _outputs(written.getvalue(), shown)
            shown.clear()
    finally:
        plt.show = show
    return names


def _figures() -> list[bytes]:
    """Return the open figures as PNG, and close them."""
    from matplotlib import pyplot as plt

    pictures = []
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, dpi=80, metadata={"Software": None})
        pictures.append(picture.getvalue())
        plt.close(number)
    return pictures


def _outputs(text: str, pictures: Sequence[bytes]) -> list[dict[str, Any]]:
    outputs: list[dict[str, Any]] = []
    lines = [line for line in text.splitlines(True) if not line.startswith("Compiling kernels")]
    if lines:
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    for picture in pictures:
        data = {"image/png": base64.b64encode(picture).decode()}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    return outputs


def main(paths: Sequence[str]) -> None:
    """Run notebooks, each in a new folder, and write their outputs."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # tiny steps would wait for threads
    start = Path.cwd()
    for path in [Path(path).resolve() for path in paths]:  # before the folder changes
        notebook = json.loads(path.read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            run(notebook)
            os.chdir(start)
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
