"""The demo, served: the Trainer's scores from raw rows."""

import pyarrow as pa
import pytest
import torch
from torch import nn

from examples.deepfm import criteo, movielens
from examples.deepfm.train import criteo_model, movielens_model
from recis_lightning import serving
from tests.examples.test_deepfm import trainer
from tests.helpers.deepfm_data import criteo_rows, write_criteo, write_movielens


class Probability(nn.Module):
    """Score of ``predict_step``."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(batch).sigmoid()


@pytest.mark.parametrize("data_set", ["movielens", "criteo"])
def test_served_scores_are_those_that_the_trainer_predicts(data_set, tmp_path):
    """Bit for bit, from raw rows without labels, some of whose ids no training row had."""
    torch.manual_seed(0)
    if data_set == "movielens":
        model, example = movielens_model(lr=0.05), movielens
        data = movielens.MovieLensDataModule(str(write_movielens(tmp_path)), batch_size=16)
        data.prepare_data()
        parts = movielens.part_files(tmp_path)[80:]
        table = pa.concat_tables(pa.parquet.read_table(path) for path in parts)
    else:
        model, example = criteo_model(lr=0.05), criteo
        for index in range(2):
            write_criteo(tmp_path / f"part-{index}.parquet", 60, first=50 * index)
        parts = {"train": ["part-0.*"], "test": ["part-1.*"]}
        data = criteo.CriteoDataModule(str(tmp_path), **parts, batch_size=16, hash=None)
        table = pa.parquet.read_table(tmp_path / "part-1.parquet")
        assert criteo_rows(60, 50)["c1"] == table["c1"].to_pylist()
    runner = trainer(max_epochs=2, num_sanity_val_steps=0)
    runner.fit(model, data)
    predicted = runner.predict(model, data.test_dataloader())

    served = tmp_path / "served"
    options = {"features": data.features, "convert": example.to_batch}
    serving.export(Probability(model), served, example=table[:4].to_pydict(), **options)
    loaded, first = serving.load(served), 0
    table = table.drop(["rating" if data_set == "movielens" else "label"])
    assert len(set(torch.cat(predicted).tolist())) > 5
    for scores in predicted:
        raw = table[first : first + len(scores)]
        assert loaded(raw.to_pydict()).equal(scores)
        assert loaded(raw).equal(scores)
        first += len(scores)
    assert first == len(table)
