"""The table of the examples, and what RecBole is given to read."""

import json

import pytest
import torch

from examples import compare, movielens, recbole_peers
from examples.compare import CONTESTS, Contender, Job, best_scores, rows_of
from recis_lightning import Jagged
from tests.helpers.deepfm_data import write_movielens
from tests.helpers.manual import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small files like MovieLens-100k's."""
    return str(write_movielens(tmp_path_factory.mktemp("data"), 300))


@pytest.mark.slow
def test_the_table_has_a_line_for_each_model(folder, tmp_path, capsys):
    num_threads, output = torch.get_num_threads(), tmp_path / "found.json"
    try:
        compare.main(["--data", folder, "--seeds", "2", "--epochs", "1", "--output", str(output)])
    finally:
        torch.set_num_threads(num_threads)
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "| example | model | AUC | GAUC | HR@10 | NDCG@10 |"
    assert [line.split(" | ")[0].strip("| ") for line in lines] == [
        *("DLRM", "DCNv2", "DIN"),
        *("MMoE, liked", "MMoE, liked", "MMoE, loved", "MMoE, loved"),
        *("two towers", "SASRec"),
    ]
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == len(lines)
    for row in rows:
        names = (
            ("HR@10", "NDCG@10") if row["example"] in ("two towers", "SASRec") else ("AUC", "GAUC")
        )
        assert [name for name in compare.METRICS if name in row] == [*names]
        assert all(len(row[name]) == 2 and 0 <= min(row[name]) <= 1 for name in names)


def test_the_epoch_that_is_best_on_validation_counts():
    epochs = iter([0.5, 0.9, 0.7])
    now = {}

    def losses():
        now["val"] = next(epochs)
        return []

    def scores(part):
        return {"liked": {"AUC": now["val"] if part == "val" else 10 * now["val"]}}

    model = torch.nn.Linear(1, 1)
    contender = Contender(model, torch.optim.SGD(model.parameters()), losses, scores)
    assert best_scores(contender, 3) == {"liked": {"AUC": 9.0}}


def test_seeds_of_a_model_are_in_one_row_and_a_task_has_its_own():
    jobs = [Job("MMoE", rival, seed, None, None, None) for rival in (None, 1) for seed in (0, 1)]
    both = {"liked": {"AUC": 0.5}, "loved": {"AUC": 0.25}}
    found = [
        (both, 1.0),
        (both, 2.0),
        ({"loved": {"AUC": 0.75}}, 3.0),
        ({"loved": {"AUC": 0.5}}, 4.0),
    ]
    assert rows_of(jobs, found) == [
        {"example": "MMoE, liked", "model": "ours", "seconds": [1.0, 2.0], "AUC": [0.5, 0.5]},
        {"example": "MMoE, loved", "model": "ours", "seconds": [1.0, 2.0], "AUC": [0.25, 0.25]},
        {
            "example": "MMoE, loved",
            "model": "ours, of one task",
            "seconds": [3.0, 4.0],
            "AUC": [0.75, 0.5],
        },
    ]


def test_an_epoch_without_an_auc_is_in_the_table_all_the_same():
    model = torch.nn.Linear(1, 1)
    scores = {"liked": {"AUC": float("nan")}}
    contender = Contender(
        model, torch.optim.SGD(model.parameters()), lambda: [], lambda part: scores
    )
    assert best_scores(contender, 2) == scores


def test_a_missing_recbole_is_told_before_anything_is_trained(monkeypatch, capsys):
    monkeypatch.setattr(compare, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--recbole"])
    assert "pip install recbole==1.2.1" in capsys.readouterr().err


def test_every_example_has_a_rival():
    assert all(contest.rivals for contest in CONTESTS.values())
    of_recbole = {r.make for c in CONTESTS.values() for r in c.rivals if isinstance(r.make, str)}
    assert of_recbole == set(recbole_peers._SETTINGS)


def test_recbole_reads_the_same_examples(folder, tmp_path):
    """The files that are written for it, whether or not it is installed."""
    split = movielens.load(folder)
    columns = [recbole_peers._columns_of(examples, True) for examples in split]
    settings = recbole_peers.write(tmp_path / "ml", columns, recbole_peers._genres(split))
    assert settings["alias_of_item_id"] == ["item_id_list"]
    assert settings["load_col"]["item"] == ["item_id", "genres"]
    head, *lines = (tmp_path / "ml" / "ml.test.inter").read_text().splitlines()
    assert head == "user_id:token\titem_id:token\titem_id_list:token_seq\tlabel:float"
    assert len(lines) == len(split.test.label)
    user, item, history, label = lines[3].split("\t")
    assert int(user) == split.test.features["user"][3]
    assert int(item) == split.test.features["item"][3]
    assert float(label) == split.test.label[3]
    bags = split.test.features["history"]
    assert isinstance(bags, Jagged)
    assert history.split() == [
        str(i) for i in bags.values[bags.offsets[3] : bags.offsets[4]].tolist()
    ]
    assert "none" in (tmp_path / "ml" / "ml.train.inter").read_text()  # a first history


def test_recbole_reads_the_same_likes(folder, tmp_path):
    split = movielens.load_likes(folder)
    columns = [
        recbole_peers._columns_of_likes(part) for part in (split.train, split.val, split.test)
    ]
    recbole_peers.write(tmp_path / "ml", columns, {})
    head, *lines = (tmp_path / "ml" / "ml.train.inter").read_text().splitlines()
    assert head == "user_id:token\titem_id:token\titem_id_list:token_seq"
    assert len(lines) == len(split.train.items)
    user, item, history = lines[4].split("\t")
    assert int(user) == split.train.users[4]
    assert int(item) == split.train.items[4]
    row = split.train.histories[4]
    assert history.split() == [str(one) for one in row[row != 0].tolist()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", recbole_peers._SETTINGS)
def test_a_model_of_recbole_trains_and_scores(name, folder):
    pytest.importorskip("recbole")
    of_likes = name in ("NPE", "SASRec")
    data = movielens.load_likes(folder) if of_likes else movielens.load(folder)
    peer = recbole_peers.Peer(name, data)
    model = peer.begin(0)
    for loss in peer.losses(model, 64, torch.Generator().manual_seed(0)):
        loss.backward()
    scores = peer.scores(model.eval(), "test", 50)
    assert scores.shape == ((2, len(data.items)) if of_likes else (len(data.test.label),))
    assert scores.isfinite().all()


def test_the_manual_has_the_table_of_the_results():
    results = ROOT / "benchmarks" / "results" / "examples.json"
    if not results.exists():
        pytest.skip("a source distribution is without the results")
    found = json.loads(results.read_text(encoding="utf-8"))
    rows = found["rows"]
    assert found["seeds"] == 5
    assert {len(row[name]) for row in rows for name in compare.METRICS if name in row} == {5}
    assert compare.table(rows) in (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert {row["example"].partition(",")[0] for row in rows} == set(CONTESTS)


def test_a_model_to_copy_has_at_most_150_lines():
    paths = [*(ROOT / "examples").glob("ranking/*.py"), *(ROOT / "examples").glob("retrieval/*.py")]
    assert len(paths) == 8
    assert {
        path.name: lines for path in paths if (lines := path.read_text().count("\n")) > 150
    } == {}
