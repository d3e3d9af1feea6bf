"""``recis-lightning fit`` and ``test``, and every YAML file of the examples through it."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from examples.deepfm import train
from recis_lightning import hash_tables
from recis_lightning.admission import BloomCount, MinCount, Probability
from recis_lightning.callbacks import HashTableFilterHook, LoggerHook, ProfilerHook
from recis_lightning.cli import RecisCLI, main
from recis_lightning.eviction import AllOf, AnyOf, GlobalStepFilter, MaxRows, MinNorm, TimeToLive
from recis_lightning.optim import SparseAdamW
from tests.helpers.deepfm_data import write_criteo, write_movielens

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples").rglob("configs/*.yaml"))
MOVIELENS = ROOT / "examples" / "deepfm" / "configs" / "movielens.yaml"

each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def command_line(tmp_path, monkeypatch):
    """Run in an empty folder, without a command line; restore the number of threads."""
    monkeypatch.setattr(sys, "argv", ["recis_lightning"])
    monkeypatch.chdir(tmp_path)
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def data_args(config: Path) -> list[str]:
    """Write small data for a configuration; return the arguments that name it."""
    root = Path("some data")
    if config.stem != "criteo":
        write_movielens(root, num_rows=400)
        return ["--data.init_args.root", str(root), "--data.init_args.batch_size", "16"]
    for part in range(4):
        write_criteo(root / f"part-{part}.orc", 40)
    return ["--data.init_args.root", str(root), "--data.init_args.batch_size", "16"]


def test_there_are_configs():
    assert {"movielens", "criteo", "policies", "reports"} <= {config.stem for config in CONFIGS}


@each_config
@pytest.mark.slow_except(dict(config=MOVIELENS))
def test_config_runs(config):
    cli = main(["fit", "-c", str(config), *data_args(config), "--trainer.fast_dev_run", "2"])
    assert cli.trainer.global_step == 2
    kinds = {type(callback) for callback in cli.trainer.callbacks}
    assert {HashTableFilterHook, LoggerHook, ProfilerHook} <= kinds
    assert all(len(table) for table in hash_tables(cli.model))


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as done:
        main([*args, "--print_config"])
    assert not done.value.code
    return capsys.readouterr().out


@each_config
@pytest.mark.slow_except(dict(config=MOVIELENS))
def test_print_config_shows_everything(config, capsys):
    shown = yaml.safe_load(printed(capsys, "fit", "-c", str(config)))
    model = shown["model"]["init_args"]
    embeddings = model["embeddings"].values()
    assert {option["embedding_dim"] for option in embeddings} == {17}
    policies = [option["eviction"] for option in embeddings if option["eviction"]]
    if config.stem != "policies":
        assert {policy["class_path"] for policy in policies} == {
            "recis_lightning.eviction.GlobalStepFilter"
        }
    assert model["sparse_optimizer"]["class_path"] == "recis_lightning.optim.SparseAdamW"


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.slow_except(dict(command="fit"))
def test_printed_config_can_be_read_again(command, capsys):
    text = printed(capsys, command, "-c", str(MOVIELENS))
    Path("again.yaml").write_text(text)
    assert printed(capsys, command, "-c", "again.yaml") == text


def test_yaml_sets_policies_and_optimizers():
    cli = main(["fit", "-c", str(MOVIELENS), *data_args(MOVIELENS), "--trainer.fast_dev_run=1"])
    tables = {table.name: table for table in hash_tables(cli.model)}
    assert tables["user"].eviction == GlobalStepFilter(filter_step=150)
    assert tables["age"].eviction is None
    assert isinstance(tables["user"].optimizer, SparseAdamW)
    assert tables["user"].optimizer.param_groups[0]["lr"] == 5e-4


def test_yaml_composes_policies():
    config = MOVIELENS.with_name("policies.yaml")
    cli = main(["fit", "-c", str(config), *data_args(config), "--trainer.fast_dev_run=1"])
    tables = {table.name: table for table in hash_tables(cli.model)}
    assert tables["user"].admission == MinCount(2)
    assert tables["user"].eviction == AnyOf([GlobalStepFilter(300), MaxRows(900, by="count")])
    assert tables["item"].admission == BloomCount(2, num_counters=100_000)
    assert tables["item"].eviction == AllOf([TimeToLive(60), MinNorm(0.05)])
    assert tables["zip"].admission == Probability(0.5)
    assert tables["zip"].eviction == MaxRows(500)


def test_short_names_and_overrides_on_the_command_line():
    embeddings = "--model.init_args.embeddings"
    option = (
        "{embedding_dim: 3, admission: {class_path: ReadOnly}, "
        "initializer: {class_path: Uniform, init_args: {a: -0.1, b: 0.1}}}"
    )
    cli = main(
        [
            *["fit", "-c", str(MOVIELENS), *data_args(MOVIELENS), "--trainer.fast_dev_run=1"],
            *[embeddings, f"{{user: {option}, genres: {{embedding_dim: 3, mode: sum}}}}"],
            *["--model.init_args.sparse_optimizer", "SparseRowwiseAdagrad"],
            *["--model.init_args.sparse_optimizer.lr", "0.5"],
            *["--trainer.callbacks", "LoggerHook", "--trainer.callbacks.log_step", "3"],
        ]
    )
    tables = {table.name: table for table in hash_tables(cli.model)}
    assert len(tables["user"]) == 0
    assert len(tables["genres"]) > 0
    optimizer = tables["genres"].optimizer
    assert type(optimizer).__name__ == "SparseRowwiseAdagrad"
    assert optimizer.param_groups[0]["lr"] == 0.5
    hook = next(c for c in cli.trainer.callbacks if isinstance(c, LoggerHook))
    assert hook.log_step == 3


def test_deltas_are_set_up_in_yaml(tmp_path):
    config = tmp_path / "deltas.yaml"
    hook = {"class_path": "DeltaHook"}
    hook["init_args"] = {"folder": str(tmp_path / "served"), "seconds": 0.5, "state": True}
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [hook]}}))
    main(
        [
            *["fit", "-c", str(MOVIELENS), *data_args(MOVIELENS), "-c", str(config)],
            "--trainer.fast_dev_run=1",
        ]
    )
    names = sorted(path.name.partition("-")[0] for path in (tmp_path / "served/deltas").iterdir())
    assert names == [".publish.lock", ".writer.lock", *["base"] * 2, *["delta"] * 2, "head.json"]


MISTAKES = {
    "trainr: {max_epochs: 1}": ("trainr.max_epochs: there is no such setting",
        "did you mean trainer.max_epochs?"),
    "trainer: {max_epoch: 1}": ("trainer.max_epoch: there is no such setting",
        "did you mean trainer.max_epochs?"),
    "trainer: {max_epochs: many}": ("trainer.max_epochs: expected int or None, got many", None),
    "trainer: {callbacks: [{class_path: LoggerHook, init_args: {log_steps: 3}}]}":
        ("trainer.callbacks: LoggerHook: log_steps: there is no such setting",
         "did you mean log_step?"),
    "trainer: {callbacks: [{class_path: LoggerHook, init_args: {log_step: x}}]}":
        ("trainer.callbacks: LoggerHook: log_step: expected int, got x", None),
    "trainer: {callbacks: [LoggerHook, {class_path: Hashtablefilterhook}]}":
        ("trainer.callbacks: there is no class Hashtablefilterhook",
         "did you mean HashTableFilterHook?"),
    "trainer: {callbacks: [recis_lightning.callbacks.ProfilerHok]}":
        ("trainer.callbacks: there is no class recis_lightning.callbacks.ProfilerHok",
         "did you mean ProfilerHook?"),
    "trainer: {callbacks: [EarlyStoping]}":
        ("trainer.callbacks: there is no class EarlyStoping", "did you mean EarlyStopping?"),
    "trainer: {callbacks: [NoSuchHook]}": ("trainer.callbacks: there is no class NoSuchHook",
        "a class of yours has its module before it, such as my_project.models.Model"),
    "trainer: {callbacks: [{init_args: {log_step: 3}}]}":
        ("trainer.callbacks: the class_path of log_step is missing",
         "write the class beside its arguments, as in {class_path: LoggerHook, "
         "init_args: {log_step: ...}}"),
    "trainer: {callbacks: 3}":
        ("trainer.callbacks: expected list[Callback], Callback or None, got 3", None),
    "model: {class_path: nowhere.Model}":
        ("model: there is no module nowhere, of the class nowhere.Model",
         "modules are looked for in the current folder, and where Python finds them"),
    "model: {class_path: examples.deepfm.model.DeepFN}":
        ("model: there is no class examples.deepfm.model.DeepFN", "did you mean DeepFM?"),
    "model: {init_args: {sparse_optimizer: {class_path: SparseAdmaW}}}":
        ("model: DeepFM: sparse_optimizer: there is no class SparseAdmaW",
         "did you mean SparseAdamW?"),
    "model: {init_args: {sparse_optimizer: {class_path: SparseAdamW, init_args: {lrr: 3}}}}":
        ("model: DeepFM: sparse_optimizer: SparseAdamW: lrr: there is no such setting",
         "did you mean lr?"),
    "model: {init_args: {embeddings: {a: {embedding_dims: 3}}}}":
        ("model: DeepFM: embeddings: EmbeddingOption: embedding_dims: there is no such setting",
         "did you mean embedding_dim?"),
    "model: {init_args: {embeddings: {a: {embedding_dim: 3, eviction: MaxRow}}}}":
        ("model: DeepFM: embeddings: EmbeddingOption: eviction: there is no class MaxRow",
         "did you mean MaxRows?"),
    "data: {init_args: {batch_size: many}}":
        ("data: MovieLensDataModule: batch_size: expected int, got many", None),
    "ckpt_path: [3]": ("ckpt_path: expected str, Path or None, got [3]", None),
}  # fmt: skip


def said(capsys: pytest.CaptureFixture[str], args: list[str]) -> tuple[str, str]:
    """Run a command that fails with two lines; return what they say."""
    with pytest.raises(SystemExit) as done:
        main(["fit", *args])
    assert done.value.code == 2
    error, hint = capsys.readouterr().err.splitlines()
    return error.removeprefix("recis-lightning fit: error: "), hint.removeprefix("hint: ")


@pytest.mark.parametrize("text", MISTAKES)
@pytest.mark.slow_except(
    dict(text=list(MISTAKES)[1:4]),
    dict(text=[one for one in MISTAKES if "{lrr: 3}" in one or "[{init_args" in one]),
)
def test_a_mistake_in_a_file_is_two_lines_with_its_place(text, capsys):
    Path("typo.yaml").write_text(f"# settings\n{text}\n")
    error, hint = said(capsys, ["-c", str(MOVIELENS), "-c", "typo.yaml"])
    message, expected = MISTAKES[text]
    assert error == f"typo.yaml, line 2: {message}"
    assert hint == (expected or "recis-lightning fit --help lists the settings")


@pytest.mark.parametrize(
    ("args", "error", "hint"),
    [
        (["-c", "no.yaml"], "config: File does not exist: '{cwd}/no.yaml'", None),
        (["--trainer.max_epochs", "x"], "trainer.max_epochs: expected int or None, got x", None),
        (["--trainer.maxepochs=3"], "trainer.maxepochs: there is no such setting",
         "did you mean trainer.max_epochs?"),
        (["--trainer.callbacks", "{class_path: LoggerHook, init_args: {log_steps: 3}}"],
         "trainer.callbacks: LoggerHook: log_steps: there is no such setting",
         "did you mean log_step?"),
        (["stray"], "stray: expected an option such as --trainer.max_epochs 3", None),
        (["--ckpt_path", "no.ckpt"], "ckpt_path: there is no file no.ckpt",
         "paths are relative to the current folder, {cwd}"),
        (["--model.init_args.embeddings", "{user: {embedding_dim: -3}}"],
         "EmbeddingOption: embedding_dim: expected an int >= 1, got -3", None),
        (["--trainer.callbacks", "LoggerHook", "--trainer.callbacks.log_step", "0"],
         "LoggerHook: log_step: expected an int >= 1, got 0", None),
        (["--model.init_args.embeddings",
          "{user: {embedding_dim: 3, eviction: {class_path: GlobalStepFilter, "
          "init_args: {filter_step: 0}}}}"],
         "GlobalStepFilter: filter_step: expected an int >= 1, got 0", None),
    ],
)  # fmt: skip
@pytest.mark.slow_except(dict(error="EmbeddingOption: embedding_dim: expected an int >= 1, got -3"))
def test_a_mistake_on_the_command_line_is_two_lines(args, error, hint, capsys):
    found = said(capsys, ["-c", str(MOVIELENS), *data_args(MOVIELENS), *args])
    here = {"cwd": Path.cwd()}
    expected = hint or "recis-lightning fit --help lists the settings"
    assert found == (error.format(**here), expected.format(**here))


def test_an_optimizer_that_refuses_its_argument_is_two_lines(capsys):
    args = ["--trainer.fast_dev_run=1", "--model.init_args.sparse_optimizer.lr", "-1"]
    with pytest.raises(SystemExit) as done:
        main(["fit", "-c", str(MOVIELENS), *data_args(MOVIELENS), *args])
    assert done.value.code == 2
    *_, error, hint = capsys.readouterr().err.splitlines()
    assert error.endswith("error: SparseAdamW: lr: expected a number >= 0.0, got -1.0")
    assert hint.startswith("hint: ")


def columnar(**arguments):
    """Write settings of columnar data; return the arguments that name them."""
    user = {"class_path": "recis_lightning.data.Id", "init_args": {"name": "user"}}
    data = {"class_path": "ColumnarDataModule", "init_args": {"columns": [user], **arguments}}
    Path("data.yaml").write_text(yaml.safe_dump({"data": data}))
    return ["-c", str(MOVIELENS), "-c", "data.yaml"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"train": "none/*.parquet"}, "train"),
        ({"train": ["data.yaml", "none/*.parquet"]}, "train"),
        ({"train": "data.yaml", "val": "none/*.parquet"}, "val"),
        ({"train": {"a": "none/*.parquet"}, "mix": {"a": 1.0}}, "train"),
    ],
)
@pytest.mark.slow_except(dict(part="val"))
def test_files_of_data_that_are_missing_are_two_lines(arguments, part, capsys):
    error, hint = said(capsys, columnar(**arguments))
    assert error.startswith("data.yaml, line ")
    assert error.partition(": ")[2] == f"data: {part}: no file matches 'none/*.parquet'"
    assert hint == f"paths are relative to the current folder, {Path.cwd()}"


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of Lightning, that there is no validation
def test_missing_files_that_only_the_run_finds_are_two_lines_too(monkeypatch, capsys):
    monkeypatch.setattr("recis_lightning.cli.recis_cli._missing_data", lambda *given: None)
    with pytest.raises(SystemExit) as done:
        main(["fit", *columnar(train="none/*.parquet"), "--trainer.fast_dev_run=1"])
    assert done.value.code == 2
    *_, error, hint = capsys.readouterr().err.splitlines()
    assert "none/*.parquet" in error
    assert str(Path.cwd()) in hint


@pytest.mark.slow_except(dict(text=""))
@pytest.mark.parametrize("text", ["trainer: {max_epochs: [1", "just words", "", "- 1"])
def test_a_file_that_has_no_settings_is_named(text, capsys):
    Path("broken.yaml").write_text(text)
    error, _ = said(capsys, ["-c", str(MOVIELENS), "-c", "broken.yaml"])
    assert error.startswith("broken.yaml")


def test_an_error_of_the_users_model_keeps_its_traceback(monkeypatch):
    Path("own_model.py").write_text(
        "import lightning as L\n"
        "class Model(L.LightningModule):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        raise ValueError('mine')\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    with pytest.raises(ValueError, match="mine"):
        main(["fit", "--model", "own_model.Model"])


def test_a_command_line_of_ones_own(capsys):
    """A subclass adds settings and gives defaults; its mistakes are two lines as well."""

    class Own(RecisCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_argument("--tag", type=int, default=3)
            parser.set_defaults({"trainer.max_epochs": 4})

    cli = Own(train.DeepFM, run=False, args=["--model.embeddings", "{a: {embedding_dim: 3}}"])
    assert (cli.config["tag"], cli.trainer.max_epochs) == (3, 4)
    with pytest.raises(SystemExit) as done:
        Own(train.DeepFM, run=False, args=["--tagg", "3"])
    assert done.value.code == 2
    assert "did you mean tag?" in capsys.readouterr().err.splitlines()[1]


def short_run(command: str, *args: str):
    return main(
        [
            *[command, "-c", str(MOVIELENS), *data_args(MOVIELENS)],
            *["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"],
            *["--trainer.callbacks", "HashTableFilterHook"],
            *["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"],
            *["--trainer.logger.name", "x", "--trainer.logger.version", "0"],
            *["--trainer.val_check_interval", "1.0"],
            *args,
        ]
    )


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists:UserWarning")
def test_fit_then_test_from_the_checkpoint_over_a_saved_config():
    fitted = short_run("fit")
    checkpoint = next(Path("logs").rglob("*.ckpt"))
    assert Path("logs/x/version_0/config.yaml").is_file()
    tested = short_run("test", "--ckpt_path", str(checkpoint))
    assert 0 <= tested.trainer.callback_metrics["test_auc"] <= 1
    assert weights(tested.model).keys() == weights(fitted.model).keys()
    for name, value in weights(fitted.model).items():
        assert torch.equal(weights(tested.model)[name], value), name


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the dense parameters, and each table's rows in the order of their ids."""
    found = {name: value.detach() for name, value in model.named_parameters()}
    for table in hash_tables(model):
        found[f"{table.name} ids"] = table.ids().sort().values
        found[table.name] = table.embeddings(found[f"{table.name} ids"])
    return found


def test_yaml_and_train_py_train_the_same_model(monkeypatch):
    args = data_args(MOVIELENS)
    cli = main(["fit", "-c", str(MOVIELENS), *args[:2], "--trainer.fast_dev_run", "3"])
    models = []
    monkeypatch.setattr(train, "movielens_model", lambda: models.append(made()) or models[-1])
    train.main(["movielens", "--root", args[1], "--fast-dev-run", "3"])
    ours, theirs = weights(cli.model), weights(models[0])
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


made = train.movielens_model
