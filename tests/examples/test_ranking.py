"""The ranking examples: their data, a few steps of each model, and the table."""

import pytest
import torch
from torch import nn

from examples.ranking import compare, recbole_peers
from examples.ranking.data import HISTORY, batches, histories, load, scores
from recis_lightning import Jagged, hash_tables
from recis_lightning.cli.movielens import Examples
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer
from tests.helpers.deepfm_data import write_movielens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small files like MovieLens-100k's."""
    return str(write_movielens(tmp_path_factory.mktemp("data"), 300))


def test_a_history_has_what_the_user_liked_before_and_no_more():
    users = torch.tensor([1, 2, 1, 1, 2, 1])
    items = torch.tensor([10, 20, 11, 12, 21, 13])
    label = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    found = histories(Examples({"user": users, "item": items}, label))
    bags = [bag.tolist() for bag in found.values.split(found.lengths().tolist())]
    assert bags == [[], [], [10], [10], [], [10, 12]]
    many = torch.arange(HISTORY + 3)
    same = Examples({"user": torch.zeros_like(many), "item": many}, torch.ones(len(many)))
    assert histories(same).lengths().max() == HISTORY
    assert histories(same).values[-1] == HISTORY + 1


def test_the_parts_follow_one_another_in_time(folder):
    split = load(folder)
    assert [len(part.label) for part in split] == [210, 30, 60]
    whole = load(folder, 100)
    assert sum(len(part.label) for part in whole) == 100
    assert torch.equal(whole.train.label, split.train.label[:70])


@pytest.mark.parametrize("name", compare.MODELS)
def test_a_model_learns_from_all_of_its_tables(name, folder):
    split, (make, _) = load(folder), compare.MODELS[name]
    model = make(0)
    tables = hash_tables(model)
    dense = torch.optim.Adam(model.parameters(), lr=0.02)
    optimizer = SparseDenseOptimizer(dense, SparseAdam(tables, lr=0.02))
    losses, before = [], {}
    for epoch in range(12):
        for batch in batches(split.train, 105, None):
            loss = nn.functional.binary_cross_entropy_with_logits(model(batch), batch.label)
            if not epoch:
                before = before or {t.name: (t.ids(), t.embeddings(t.ids())) for t in tables}
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2])
    for table in tables:
        ids, rows = before[table.name]
        assert not torch.equal(table.embeddings(ids), rows), table.name
    logits = compare._logits(model.eval(), split.test)
    auc, gauc = scores(logits, split.test)
    assert 0 <= auc <= 1
    assert 0 <= gauc <= 1


def test_two_seeds_begin_with_other_rows_and_one_with_the_same(folder):
    batch = load(folder).train
    for make, _ in compare.MODELS.values():
        first, again, other = (make(seed)(batch) for seed in (0, 0, 1))
        assert torch.equal(first, again) or torch.allclose(first, again)
        assert not torch.allclose(first, other)


def test_the_table_has_a_line_for_each_model(folder, capsys):
    num_threads = torch.get_num_threads()
    try:
        compare.main(["--data", folder, "--seeds", "2", "--epochs", "1", "--batch-size", "70"])
    finally:
        torch.set_num_threads(num_threads)
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "| model | test AUC | test GAUC | seeds |"
    assert [line.split(",")[0] for line in lines] == ["| DCNv2", "| DIN"]
    assert all(line.endswith(" | 2 |") for line in lines)


def test_recbole_reads_the_same_examples(folder, tmp_path):
    """The files that are written for it, whether or not it is installed."""
    split = load(folder)
    settings = recbole_peers._write(tmp_path / "ml", split, "DIN")
    assert settings["alias_of_item_id"] == ["item_id_list"]
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
