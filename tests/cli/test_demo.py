"""``recis-lightning demo``: a run on small data."""

import logging
import re

import pytest
import torch

from recis_lightning.cli import main
from recis_lightning.cli.inspection import inspection
from tests.helpers.deepfm_data import write_movielens


@pytest.fixture(autouse=True)
def restored():
    """Leave the number of threads and the level of Lightning's loggers as they were."""
    names = ("lightning.pytorch", "lightning.fabric")
    levels = {name: logging.getLogger(name).level for name in names}
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_the_demo_trains_and_reports(tmp_path, capsys):
    write_movielens(tmp_path / "data", 3000)
    folder = tmp_path / "out"
    main(["demo", "--data", str(tmp_path / "data"), "--output-dir", str(folder), "--epochs", "1"])
    out = capsys.readouterr().out
    assert "9 batches" in out
    assert re.search(r"test AUC +0\.\d{4}\n +test GAUC +0\.\d{4}", out)
    assert re.search(r"\n  user +2 +0 +\d", out)
    assert "Rows" in (folder / "report.html").read_text(encoding="utf-8")
    assert (folder / "demo.ckpt").name in out
    assert "exp_avg" in inspection(folder / "demo.ckpt")


def test_without_data_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("recis_lightning.cli.movielens.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as done:
        main(["demo"])
    assert done.value.code == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert "pip download --no-deps --dest FOLDER recbole==1.2.1" in error
    assert hint.startswith("hint: ")
