"""The retrieval examples: models that learn what users like, and what comes next."""

import inspect

import pytest
import torch

from examples.movielens import HISTORY, Likes, batches, hit_and_ndcg, split_likes
from examples.retrieval import sasrec, two_towers
from recis_lightning import hash_tables, serving
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer


def train(model, likes, epochs, size):
    optimizer = SparseDenseOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.01), SparseAdam(hash_tables(model), lr=0.01)
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in batches(likes, size, generator):
            optimizer.zero_grad()
            model.loss(batch).backward()
            optimizer.step()
    return model.eval()


def test_two_towers_learn_what_groups_of_users_like():
    """Even users like films up to 20 and odd ones the rest: popularity cannot tell."""
    generator = torch.Generator().manual_seed(0)
    users = torch.arange(40).repeat(15)
    films = torch.stack([torch.randperm(20, generator=generator) for _ in range(40)], 1)[:15]
    split = split_likes(users, 1 + films.flatten() + 20 * (users % 2))
    model = train(two_towers.model(0), split.train, epochs=6, size=100)
    with torch.no_grad():
        hit, _ = hit_and_ndcg(model.scores(split.test, split.items), split, k=6)
    assert hit > 0.9  # six films of the user's own are left, of 26
    assert all(len(table) for table in hash_tables(model))


def test_two_towers_train_no_row_of_the_table_that_counts():
    split = split_likes(torch.tensor([1] * 8 + [2] * 8), torch.arange(1, 17))
    model = train(two_towers.model(0), split.train, epochs=2, size=5)
    counted = model.likes.table
    assert sorted(counted.ids().tolist()) == sorted(split.train.items.tolist())
    shares = counted.sampling_probabilities(split.train.items)
    assert shares.tolist() == pytest.approx([1 / len(split.train.items)] * len(shares))


@pytest.fixture(scope="module")
def cycles():
    """Likes of users that go through twelve films in one order, each from another place."""
    users = torch.arange(48).repeat_interleave(9)
    start = torch.arange(48).repeat_interleave(9) % 12
    return split_likes(users, 1 + (start + torch.arange(9).repeat(48)) % 12)


def test_sasrec_learns_what_comes_next(cycles):
    model = train(sasrec.model(0), cycles.train, epochs=6, size=24)
    with torch.no_grad():
        hit, _ = hit_and_ndcg(model.scores(cycles.test, cycles.items), cycles, k=1)
    assert hit > 0.9
    assert sorted(model.item.table.ids().tolist()) == list(range(1, 13))  # no row for padding


def test_sasrec_does_not_look_ahead_nor_at_padding(cycles):
    model = sasrec.model(0)
    model.loss(cycles.train)  # rows
    model.eval()
    short = torch.zeros(1, HISTORY, dtype=torch.int64)
    short[0, :3] = torch.tensor([1, 2, 3])
    long = short.clone()
    long[0, 3:6] = torch.tensor([9, 8, 7])
    first, second = model.encode(short), model.encode(long)
    assert torch.allclose(first[:, :3], second[:, :3], atol=1e-6)
    assert not torch.allclose(first[:, 3:6], second[:, 3:6], atol=1e-3)
    likes = Likes(torch.tensor([1]), torch.tensor([4]), short)
    wanted = first[:, 2] @ model.item(cycles.items).T
    assert torch.allclose(model.scores(likes, cycles.items), wanted, atol=1e-6)


def test_sasrecs_loss_is_of_the_item_that_follows(cycles):
    """By hand, of the histories one after the other; items that it first sees count too."""
    model = sasrec.model(0)
    batch = cycles.train.part(torch.tensor([0, 5, 7, 40]))
    model.loss(batch)  # rows
    model.eval()
    ids = model.item.table.ids().sort().values
    losses = []
    for history, item in zip(batch.histories, batch.items, strict=True):
        last = model.encode(history[None])[0, int((history != 0).sum()) - 1]
        logits = last @ model.item(ids).T
        losses.append(-logits.log_softmax(0)[ids == item].item())
    assert model.loss(batch).item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_sasrecs_first_loss_is_among_the_items_of_its_histories_too(cycles):
    torch.manual_seed(0)
    model = sasrec.SASRec(dropout=0.0)
    batch = cycles.train.part(torch.tensor([3]))  # a history of items that have no row yet
    first = model.loss(batch).item()
    assert len(model.item.table) == 1 + int((batch.histories != 0).sum())
    assert first == pytest.approx(model.loss(batch).item(), rel=1e-5)


def test_sasrec_scores_an_item_zero_that_training_has_not_seen(cycles):
    model = sasrec.model(0)
    model.loss(cycles.train)
    model.eval()
    scores = model.scores(cycles.test, torch.tensor([1, 99]))
    assert scores[:, 0].abs().min() > 0
    assert scores[:, 1].tolist() == [0.0] * len(scores)
    assert 99 not in model.item.table.ids()


def test_sasrec_is_exported_as_it_stands(cycles, tmp_path):
    """Its file needs no other one of ours, and the served model takes any number of histories."""
    assert "from examples" not in inspect.getsource(sasrec)
    model = train(sasrec.model(0), cycles.train, epochs=1, size=48)
    serving.export(model, tmp_path, example=cycles.train.histories[:2])
    with torch.no_grad():
        wanted = model(cycles.train.histories)
    assert serving.load(tmp_path)(cycles.train.histories).allclose(wanted, atol=1e-5)
