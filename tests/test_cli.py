"""``python -m recis_lightning``, and every YAML file of the examples through it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from examples.deepfm import train
from recis_lightning import hash_tables
from recis_lightning.__main__ import main
from recis_lightning.admission import BloomCount, MinCount, Probability
from recis_lightning.callbacks import HashTableFilterHook, LoggerHook, ProfilerHook
from recis_lightning.eviction import AllOf, AnyOf, GlobalStepFilter, MaxRows, MinNorm, TimeToLive
from recis_lightning.optim import SparseAdamW
from tests.helpers.deepfm_data import write_criteo, write_movielens

ROOT = Path(__file__).parents[1]
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


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--trainer.callbacks", "NoSuchHook"], "NoSuchHook"),
        (["--trainer.callbacks", "HashTableFilterHook", "--trainer.callbacks.filter_interva", "1"],
         "filter_interva"),
        (["--model.init_args.embeddings", "{user: {embedding_dims: 3}}"], "embedding_dim"),
        (["--data.init_args.batch_size", "many"], "batch_size"),
    ],
)  # fmt: skip
def test_errors_name_the_culprit(args, words, capsys):
    with pytest.raises(SystemExit) as done:
        main(["fit", "-c", str(MOVIELENS), *args])
    assert done.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("trainer: {callbacks: {class_path: LoggerHok}}", "LoggerHook"),
        ("trainer: {callbacks: [LoggerHook, {class_path: Hashtablefilterhook}]}",
         "HashTableFilterHook"),
        ("trainer: {callbacks: [recis_lightning.callbacks.ProfilerHok]}", "ProfilerHook"),
        ("trainer: {callbacks: [EarlyStoping]}", "EarlyStopping"),
        ("model: {init_args: {sparse_optimizer: {class_path: SparseAdmaW}}}", "SparseAdamW"),
        ("model: {init_args: {embeddings: {a: {embedding_dim: 3, eviction: MaxRow}}}}", "MaxRows"),
    ],
)  # fmt: skip
def test_a_misspelt_class_is_told_apart(given, meant, capsys):
    """The parser's own error says that it expected an import path."""
    Path("typo.yaml").write_text(given)
    with pytest.raises(SystemExit) as done:
        main(["fit", "-c", str(MOVIELENS), "-c", "typo.yaml"])
    assert done.value.code == 2
    hints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hint:")]
    assert len(hints) == 1
    assert hints[0].endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["--trainer.callbacks", "HashTableFilterHook",
          "--trainer.callbacks.filter_intervall", "3"], "filter_interval"),
        (["--trainer.callbacks", "{class_path: LoggerHook, init_args: {log_steps: 3}}"],
         "log_step"),
    ],
)  # fmt: skip
def test_a_misspelt_argument_is_told_apart(args, meant, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(MOVIELENS), *args])
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_a_class_that_the_argument_does_not_take_is_not_called_misspelt(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(MOVIELENS), "--model.init_args.hidden", "SparseAdamW"])
    assert "there is no class" not in capsys.readouterr().err


def test_a_class_that_resembles_none_gets_no_hint(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(MOVIELENS), "--trainer.callbacks", "NoSuchHook"])
    assert "hint:" not in capsys.readouterr().err


def test_a_value_that_an_option_refuses_is_named():
    option = "{user: {embedding_dim: 3, mode: max}}"
    with pytest.raises((ValueError, SystemExit), match=r"mode: expected one of|2"):
        main(["fit", "-c", str(MOVIELENS), "--model.init_args.embeddings", option])


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--model.init_args.embeddings", "{user: {embedding_dim: -3}}"],
         "EmbeddingOption: embedding_dim: expected an int >= 1, got -3"),
        (["--trainer.callbacks", "LoggerHook", "--trainer.callbacks.log_step", "0"],
         "LoggerHook: log_step: expected an int >= 1, got 0"),
        (["--model.init_args.embeddings",
          "{user: {embedding_dim: 3, eviction: {class_path: GlobalStepFilter, "
          "init_args: {filter_step: 0}}}}"],
         "GlobalStepFilter: filter_step: expected an int >= 1, got 0"),
        (["--model.init_args.sparse_optimizer.lr", "-1"],
         "SparseAdamW: lr: expected a number >= 0.0, got -1.0"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_one_line(args, line, capsys):
    with pytest.raises(SystemExit) as done:
        main(["fit", "-c", str(MOVIELENS), *data_args(MOVIELENS), *args])
    assert done.value.code == 2
    said = [one for one in capsys.readouterr().err.splitlines() if "error:" in one]
    assert said == [f"python -m recis_lightning: error: {line}"]


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


def test_the_module_can_be_run():
    done = subprocess.run(
        [sys.executable, "-m", "recis_lightning", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: python -m recis_lightning" in done.stdout
    assert "fit" in done.stdout
