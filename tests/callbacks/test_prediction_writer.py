"""PredictionWriter: predictions beside keys, in order."""

import lightning as L
import pyarrow.parquet as pq
import pytest
import torch

from recis_lightning.callbacks import PredictionWriter
from recis_lightning.data import ColumnarDataModule
from tests.helpers.columnar_files import COLUMNS, write_files


class Scorer(L.LightningModule):
    """A model whose score of a row is half its number."""

    def __init__(self, as_dict=False, fail_at=-1):
        super().__init__()
        self.as_dict, self.fail_at = as_dict, fail_at

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        if batch_idx == self.fail_at:
            raise OSError("no more")
        score = batch["row"] / 2
        return {"score": score, "twice": torch.stack([score, score], 1)} if self.as_dict else score


def predict(folder, model, writer, loaders=1):
    data = ColumnarDataModule(COLUMNS, predict=write_files(folder), batch_size=4)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[writer]
    )
    trainer.predict(model, [data.predict_dataloader()] * loaders, return_predictions=False)


def test_rows_in_order_beside_their_keys(tmp_path):
    writer = PredictionWriter(tmp_path / "out", keys=["row", "tags"])
    predict(tmp_path, Scorer(), writer)
    table = pq.read_table(tmp_path / "out" / "rank-00000.parquet")
    assert table.column_names == ["row", "tags", "prediction"]
    assert table["row"].to_pylist() == list(range(22))
    assert table["prediction"].to_pylist() == [row / 2 for row in range(22)]
    assert table["tags"].to_pylist() == [list(range(row % 4))[-2:] for row in range(22)]


def test_dicts_and_several_loaders(tmp_path):
    predict(tmp_path, Scorer(as_dict=True), PredictionWriter(tmp_path / "out"), loaders=2)
    for name in ("rank-00000.parquet", "loader-1/rank-00000.parquet"):
        table = pq.read_table(tmp_path / "out" / name)
        assert table["twice"].to_pylist() == [[row / 2] * 2 for row in range(22)]


def test_a_run_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(OSError, match="no more"):
        predict(tmp_path, Scorer(fail_at=2), PredictionWriter(tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_an_earlier_prediction_is_refused_before_a_batch_or_replaced(tmp_path):
    """What another number of ranks and loaders left goes too; what is no prediction's stays."""
    out = tmp_path / "out"
    (out / "loader-1").mkdir(parents=True)
    old = [
        out / "rank-00000.parquet",
        out / "rank-00003.parquet",
        out / "loader-1/rank-00000.parquet",
    ]
    for file in old:
        file.write_bytes(b"old")
    (out / "rank-me.parquet").write_bytes(b"mine")
    with pytest.raises(
        FileExistsError, match=r"^path: .*out has files .* rank-00000.parquet; name"
    ):
        predict(tmp_path, Scorer(fail_at=0), PredictionWriter(out))
    with pytest.raises(OSError, match="no more"):
        predict(tmp_path, Scorer(fail_at=2), PredictionWriter(out, overwrite=True))
    assert all(file.read_bytes() == b"old" for file in old)
    predict(tmp_path, Scorer(), PredictionWriter(out, overwrite=True))
    assert [file.exists() for file in old] == [True, False, False]
    assert pq.read_table(old[0])["prediction"].to_pylist() == [row / 2 for row in range(22)]
    assert (out / "rank-me.parquet").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("keys", "name", "error", "words"),
    [
        (["nobody"], "score", ValueError, r"keys: the batch lacks \['nobody'\]; it has \['price'"),
        (["row"], "row", ValueError, r"keys: \['row'\] are names of predictions, too"),
    ],
)
def test_keys_that_do_not_fit(tmp_path, keys, name, error, words):
    with pytest.raises(error, match=words):
        predict(tmp_path, Scorer(), PredictionWriter(tmp_path / "out", keys=keys, name=name))


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"keys: expected a list of names, got 'row'; write keys="):
        PredictionWriter("out", keys="row")
    with pytest.raises(TypeError, match="name: expected"):
        PredictionWriter("out", name=3)
    with pytest.raises(TypeError, match="overwrite: expected a bool"):
        PredictionWriter("out", overwrite="yes")
    with pytest.raises(NotADirectoryError, match="path: expected a folder"):
        PredictionWriter(__file__)
