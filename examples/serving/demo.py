"""From the demo's checkpoint to a served score: ``make serve-demo``.

Trains as ``make demo`` does if there is no checkpoint of it, exports the model with its transforms,
starts the server on a free port of loopback, and asks it for scores of raw rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from torch import Tensor, nn

from examples.deepfm import demo
from examples.deepfm.model import DeepFM
from examples.deepfm.movielens import FEATURES, download, part_files, to_batch, write_parts
from examples.deepfm.train import movielens_model
from recis_lightning import serving


class Probability(nn.Module):
    """Probability of a click, as ``DeepFM.predict_step`` returns it.

    Args:
        model: A trained model.
    """

    def __init__(self, model: DeepFM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        """Return probabilities [B]."""
        return self.model(batch).sigmoid()  # type: ignore[no-any-return]


def exported(root: str, output_dir: str) -> tuple[DeepFM, Path]:
    """Return the demo's trained model, and the folder that it is exported to.

    Args:
        root: Folder of the data.
        output_dir: Of the demo, which runs if it has left no checkpoint there.
    """

    def checkpoints() -> list[Path]:
        found = Path(output_dir).glob("version_*/checkpoints/*.ckpt")
        return sorted(found, key=lambda path: path.stat().st_mtime)

    if not checkpoints():
        demo.main(["--root", root, "--output-dir", output_dir])
    state = torch.load(checkpoints()[-1], weights_only=True)["state_dict"]
    model = movielens_model()
    model.load_state_dict(state)
    folder = Path(output_dir) / "served"
    if not all(path.is_file() for path in part_files(Path(root))):
        download(Path(root))
        write_parts(Path(root))
    example = pyarrow.parquet.read_table(part_files(Path(root))[0])[:4].to_pydict()
    options: dict[str, Any] = {"features": FEATURES, "convert": to_batch}
    serving.export(Probability(model), folder, example=example, **options)
    return model, folder


def main(args: Sequence[str] | None = None) -> None:
    """Serve the demo's model, and print what it answers."""
    from examples.serving.app import app_of
    from examples.serving.load_test import ask, running

    parser = argparse.ArgumentParser("python -m examples.serving.demo", description=main.__doc__)
    parser.add_argument("--root", default="data/ml-100k", help="folder of the data")
    parser.add_argument("--output-dir", default="outputs/demo")
    given = parser.parse_args(args)
    _, folder = exported(given.root, given.output_dir)
    rows = pyarrow.parquet.read_table(part_files(Path(given.root))[90])[:3]
    columns = rows.drop(["rating"]).to_pydict()
    with running(app_of(str(folder))) as port:
        print(f"served from {folder}: {ask(port, '/version')[1]}")
        print(f"request: {columns}")
        status, answer = ask(port, "/score", {"columns": columns})
        if status != 200:
            raise RuntimeError(f"the server answered {status}: {answer}")
        print(f"scores: {answer['scores']}")


if __name__ == "__main__":
    main()
