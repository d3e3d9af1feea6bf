"""Exceptions of a run: which are mistakes in two lines, and which keep their traceback."""

import lightning as L
import pyarrow as pa
import pytest
from lightning.pytorch.callbacks import Callback
from pyarrow import parquet
from torch.utils.data import DataLoader

from recis_lightning import DynamicEmbedding
from recis_lightning.callbacks import HashTableFilterHook, PredictionWriter
from recis_lightning.cli import main
from recis_lightning.cli.refusals import mistakes_in_two_lines
from recis_lightning.data import ColumnarDataModule, ColumnarDataset, Id, IdList, Label, Number

ROWS = {"user": ["a", "b"], "price": [1, None], "tags": [[1], [2]], "w": [[1.0], [None]]}

UNFIT = {
    "no such column": (
        [Label("click")],
        "columns ['click'] are missing; it has ['price', 'tags', 'user', 'w']",
        "correct data in the settings, or its files",
    ),
    "a typo": ([Id("usr", hash="xxh64")], "columns ['usr'] are missing", "did you mean 'user'?"),
    "a string": ([Id("user")], "got string; give it a hash=", None),
    "a null": ([Number("price")], "column 'price': 1 of 2 values are null, and there is no", None),
    "a null label": ([Label("price")], "column 'price': 1 of 2 values are null", None),
    "a null weight": ([IdList("tags", weights="w")], "column 'tags': weights in 'w': 1 of 2", None),
}


def said(capsys, work, running=True):
    """Return the two lines of what exits with status 2."""
    with pytest.raises(SystemExit) as done, mistakes_in_two_lines("recis-lightning fit", running):
        work()
    assert done.value.code == 2
    error, hint = capsys.readouterr().err.splitlines()
    return error.removeprefix("recis-lightning fit: error: "), hint.removeprefix("hint: ")


@pytest.fixture
def path(tmp_path):
    """Return a file of two rows."""
    parquet.write_table(pa.table(ROWS), tmp_path / "clicks.parquet")
    return str(tmp_path / "clicks.parquet")


@pytest.mark.parametrize("name", UNFIT)
def test_data_that_do_not_fit_their_columns(name, path, capsys):
    columns, message, hint = UNFIT[name]
    error, hinted = said(capsys, lambda: list(ColumnarDataset(path, columns, batch_size=2)))
    assert error.startswith(f"data: {path}")
    assert message in error
    assert hint in (None, hinted)


def test_a_process_that_reads_says_the_same(path, capsys):
    data = ColumnarDataset(path, [Number("price")], batch_size=2)
    error, _ = said(capsys, lambda: list(DataLoader(data, batch_size=None, num_workers=1)))
    assert error.startswith(f"data: {path}, part 0, column 'price': 1 of 2 values are null")


def test_files_that_are_none(tmp_path, capsys):
    (tmp_path / "bad.parquet").write_text("words")
    error, _ = said(capsys, lambda: ColumnarDataset(str(tmp_path / "bad.parquet"), [Id("user")]))
    assert "bad.parquet: Could not open" in error
    (tmp_path / "notes.txt").touch()
    error, _ = said(capsys, lambda: ColumnarDataset(str(tmp_path / "notes.txt"), [Id("user")]))
    assert error.startswith("data: paths: expected names that end in")


def test_what_a_callback_refuses_at_the_start(tmp_path, capsys):
    (tmp_path / "rank-00000.parquet").touch()
    writer = PredictionWriter(tmp_path)
    error, _ = said(capsys, lambda: writer.setup(None, None, "predict"))
    assert error.startswith(f"PredictionWriter: path: {tmp_path} has files")


class OwnCallback(Callback):
    def setup(self, trainer, pl_module, stage):
        raise ValueError("mine")


def convert(batch):
    return batch["nothing"]


@pytest.mark.parametrize(
    ("work", "error"),
    [
        (lambda path: OwnCallback().setup(None, None, "fit"), ValueError),
        (lambda path: list(ColumnarDataset(path, [Id("tags")], convert=convert)), KeyError),
        (lambda path: int("x"), ValueError),
    ],
)
def test_what_is_no_mistake_in_settings_keeps_its_traceback(work, error, path):
    with pytest.raises(error), mistakes_in_two_lines("recis-lightning fit", running=True):
        work(path)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, path):
    """What a call within the room of data runs into is no refusal."""
    monkeypatch.setattr("recis_lightning.data.dataset.join_rows", lambda parts: int("x"))
    data = ColumnarDataset(path, [Id("tags")], batch_size=2)
    with pytest.raises(ValueError, match="invalid literal"), mistakes_in_two_lines("x", True):
        list(data)


def test_a_constructor_that_refuses(capsys):
    error, hint = said(capsys, lambda: L.Trainer(accelerator="nothing"), running=False)
    assert error.startswith("Trainer: ")
    assert hint == "recis-lightning fit --help lists the settings"


def test_a_folder_of_rows_that_is_not_there(tmp_path, capsys):
    """An OSError of ours names its argument; the system's own, of user code, does not."""
    rows = f"file:{tmp_path / 'away'}"
    error, _ = said(capsys, lambda: DynamicEmbedding(2, rows=rows), running=False)
    assert error.startswith("HashTable: rows: expected a folder that is there, got 'file:")
    with pytest.raises(FileNotFoundError), mistakes_in_two_lines("recis-lightning fit"):
        (tmp_path / "away").read_text()


def test_a_refused_value_has_its_place(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("trainer:\n  callbacks:\n    - filter_interval: 0\n")
    with (
        pytest.raises(SystemExit),
        mistakes_in_two_lines("recis-lightning fit", files=[str(path)]),
    ):
        HashTableFilterHook(filter_interval=0)
    error, _ = capsys.readouterr().err.splitlines()
    assert f"{path}, line 3: trainer.callbacks.0: HashTableFilterHook: filter_interval:" in error


class Asking(L.LightningModule):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def training_step(self, batch):
        return batch[self.name].float().sum()

    def configure_optimizers(self):
        return None


def run(path, name="usr", **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, **quiet, **settings)
    trainer.fit(Asking(name), ColumnarDataModule([Id("user", hash="xxh64")], train=path))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_feature_that_batches_lack(path, capsys):
    error, hint = said(capsys, lambda: run(path))
    assert error == "data: the model asks for 'usr' of a batch, whose entries are ['user']"
    assert hint == "did you mean 'user'?"


class OwnDict(Asking):
    def training_step(self, batch):
        weights = {"user": 1.0}
        return weights[self.name] * batch["user"].float().sum()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_key_that_a_dict_of_the_model_lacks_keeps_its_traceback(path):
    """Data has nothing to do with it, though a batch is there."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, **quiet)
    data = ColumnarDataModule([Id("user", hash="xxh64")], train=path)
    with pytest.raises(KeyError, match="usr"), mistakes_in_two_lines("x", running=True):
        trainer.fit(OwnDict("usr"), data)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_lightning_refuses_when_a_run_begins(path, capsys):
    error, _ = said(capsys, lambda: L.Trainer(accelerator="cpu", logger=False).fit(Asking("user")))
    assert "train_dataloader" in error


BORING = ("--model", "lightning.pytorch.demos.boring_classes.BoringModel")


@pytest.mark.parametrize("content", [b"", b"nothing"])
def test_a_checkpoint_that_cannot_be_read(content, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.ckpt").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", *BORING, "--ckpt_path", "bad.ckpt"])
    error = capsys.readouterr().err.splitlines()[-2]
    assert "ckpt_path: bad.ckpt is no checkpoint that can be read, or is damaged" in error


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": -1}, "seed: expected an int >= 0, got -1"),
        ({"prefetch": -1}, "prefetch: expected"),
        ({"on_bad_file": "ignore"}, "on_bad_file: expected 'error' or 'skip', got 'ignore'"),
        ({"filter": "user = 3"}, "filter: expected comparisons"),
    ],
)
def test_a_data_module_checks_its_arguments_at_once(settings, words):
    with pytest.raises(ValueError, match=words.split(",")[0]):
        ColumnarDataModule([Id("user")], **settings)
