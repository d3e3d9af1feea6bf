"""The DeepFM example: the model, the two ways to train it, and the demo."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from examples.deepfm import demo, train
from examples.deepfm.batch import Batch
from examples.deepfm.criteo import criteo_features, to_batch
from examples.deepfm.history import History
from examples.deepfm.model import DeepFM
from recis_lightning import EmbeddingOption, Jagged, checkpoint, hash_tables
from recis_lightning.callbacks import HashTableFilterHook
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.initializers import Normal
from recis_lightning.optim import SparseDenseOptimizer
from tests.helpers.deepfm_data import criteo_rows, write_criteo, write_movielens


@pytest.fixture(autouse=True)
def restored():
    """Leave the level of Lightning's loggers, and the number of threads, as they were."""
    levels = {name: logging.getLogger(name).level for name in demo.LOUD}
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def options(dim: int = 4) -> dict[str, EmbeddingOption]:
    normal = Normal(std=0.5)
    return {
        "user": EmbeddingOption(dim, initializer=normal),
        "tags": EmbeddingOption(dim, mode="mean", initializer=normal),
        "item": EmbeddingOption(dim, initializer=normal),
    }


def batch(group: int | None = None) -> Batch:
    user = torch.tensor([1, 2, 1])
    return Batch(
        features={
            "user": user,
            "item": torch.tensor([7, 8, 9]),
            "tags": Jagged(torch.tensor([5, 6, 5]), torch.tensor([0, 2, 2, 3])),
        },
        dense=torch.tensor([[0.5, 1.0], [0.0, 2.0], [1.5, 0.0]]),
        label=torch.tensor([1.0, 0.0, 0.0]),
        group=user if group is None else torch.full((3,), group),
    )


def test_logits_are_those_of_the_paper():
    torch.manual_seed(0)
    model = DeepFM(options(), num_dense=2, hidden=(5,), dropout=0.0)
    logits = model(batch())
    tables = {table.name: table for table in hash_tables(model)}
    for row, (user, tags, item) in enumerate([(1, [5, 6], 7), (2, [], 8), (1, [5], 9)]):
        bag = tables["tags"].embeddings(torch.tensor(tags, dtype=torch.int64))
        fields = [
            tables["user"].embeddings(torch.tensor(user)),
            bag.mean(0) if tags else torch.zeros(4),
            tables["item"].embeddings(torch.tensor(item)),
        ]
        weights, factors = [f[0] for f in fields], [f[1:] for f in fields]
        pairs = sum(factors[i] @ factors[j] for i in range(3) for j in range(i))
        dense = batch()["dense"][row]
        deep = model.perceptron(torch.cat([*factors, dense]))
        expected = sum(weights) + pairs + model.linear(dense) + deep
        torch.testing.assert_close(logits[row : row + 1], expected)


def test_embeddings_of_several_dims_are_refused():
    with pytest.raises(ValueError, match=r"one embedding_dim, got \[4, 5\]"):
        DeepFM({"a": EmbeddingOption(4), "b": EmbeddingOption(5)})


def trainer(**kwargs) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def loader(*batches: Batch) -> DataLoader[Batch]:
    return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)


@pytest.mark.parametrize("group", [None, -1])
def test_gauc_is_logged_where_there_are_groups(group):
    model = DeepFM(options(), num_dense=2)
    scores = trainer().test(model, loader(batch(group), batch(group)), verbose=False)[0]
    assert {"test_loss", "test_auc"} <= set(scores)
    if group == -1:
        assert "test_gauc" not in scores


def test_both_optimizers_are_used():
    model = DeepFM(options(), num_dense=2, dropout=0.0)
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, SparseDenseOptimizer)
    losses = []
    for _ in range(50):
        loss = model.training_step(batch(), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    rows = hash_tables(model)[0].embeddings(torch.tensor([1, 2]))
    fresh = DeepFM(options(), num_dense=2)
    fresh(batch())
    assert not torch.equal(rows, hash_tables(fresh)[0].embeddings(torch.tensor([1, 2])))


def test_predictions_are_probabilities():
    model = DeepFM(options(), num_dense=2)
    predicted = trainer().predict(model, loader(batch()))[0]
    assert ((predicted > 0) & (predicted < 1)).all()


def test_history_counts_evictions_wherever_it_stands():
    """Item 7 is seen once, the others always; with filter_step 2 it goes once."""

    def counts(order: int) -> History:
        kept = EmbeddingOption(4, eviction=GlobalStepFilter(filter_step=2))
        model = DeepFM({"item": kept})

        def items(*ids: int) -> Batch:
            item = torch.tensor(ids)
            none, label = torch.empty(len(ids), 0), torch.arange(len(ids)) % 2.0
            return Batch(features={"item": item}, dense=none, label=label, group=-item)

        history = History()
        callbacks = [history, HashTableFilterHook(filter_interval=1)][::order]
        batches = [items(7, 8), *[items(8)] * 4]
        trainer(max_epochs=1, callbacks=callbacks).fit(model, loader(*batches), loader(items(7, 8)))
        return history

    for history in (counts(1), counts(-1)):
        assert history.evicted == {"item": 1}
        assert history.rows["item"][0] == 2
        assert history.rows["item"][-1] == 1
        assert len(history.losses) == 5


def test_criteo_model_takes_criteo_batches():
    model = train.criteo_model()
    entries = criteo_features()(criteo_rows(6))
    assert model(to_batch(entries)).shape == (6,)
    assert len(hash_tables(model)) == 26


@pytest.mark.parametrize("data", ["movielens", "criteo"])
def test_train_py_runs(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    if data == "movielens":
        write_movielens(root)
    else:
        for part in range(4):
            write_criteo(root / f"part-{part}.orc", 20)
    runner = train.main([data, "--root", str(root), "--fast-dev-run", "1"])
    assert runner.global_step == 1
    assert "test_auc" in runner.callback_metrics


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ([], []),
        (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
            ["--fast-dev-run", "2"],
        ),
    ],
)
@pytest.mark.slow
def test_train_py_runs_on_two_processes(launcher, options, tmp_path):
    """Launched by Lightning and by torchrun; each process saves its shard of the tables."""
    write_movielens(tmp_path / "data", num_rows=2000)
    program = ["-m", "examples.deepfm.train", "movielens", "--devices", "2", *options]
    command = [sys.executable, *launcher, *program, "--root", str(tmp_path / "data")]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(train.__file__).parents[2])},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            assert process.wait(timeout=240) == 0, log.read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what it started
    said = log.read_text()
    assert "MEMBER: 2/2" in said
    assert "test_auc" in said
    if not options:
        (saved,) = tmp_path.glob("outputs/movielens/*/checkpoints/*.ckpt")
        tables = checkpoint.inspect(saved)
        assert len(tables) == 9
        assert all(len(table.rows) == 2 and sum(table.rows) for table in tables.values())


def test_demo_shows_scores_tables_traces_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "WINDOW", {"wait": 1, "warmup": 1, "active": 1, "repeat": 2})
    write_movielens(tmp_path / "data", num_rows=2000)
    demo.main(["--root", "data", "--output-dir", "out"])
    shown = capsys.readouterr().out
    assert "test AUC" in shown
    assert "test GAUC" in shown
    for table in ("user", "item", "genres", "all"):
        assert f"\n  {table} " in shown
    traces = sorted(Path("out/timeline").glob("*.json"))
    assert len(traces) == 2
    for trace in traces:
        assert str(trace) in shown
        assert json.loads(trace.read_text())["traceEvents"]
    assert "out/history.png" in shown
    assert Path("out/history.png").read_bytes().startswith(b"\x89PNG")
