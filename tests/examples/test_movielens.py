"""The data of the examples: histories, parts in time, likes by user, and metrics by hand."""

import pytest
import torch

from examples.movielens import (
    HISTORY,
    Likes,
    auc_and_gauc,
    batches,
    histories,
    hit_and_ndcg,
    labels,
    load,
    load_likes,
    split_likes,
)
from recis_lightning.cli.movielens import Examples
from recis_lightning.metrics import NDCG, RecallAtK
from tests.helpers.deepfm_data import write_movielens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small files like MovieLens-100k's."""
    return write_movielens(tmp_path_factory.mktemp("data"), 300)


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
    split = load(str(folder))
    assert [len(part.label) for part in split] == [210, 30, 60]
    whole = load(str(folder), 100)
    assert sum(len(part.label) for part in whole) == 100
    assert torch.equal(whole.train.label, split.train.label[:70])


def test_labels_of_tasks_are_of_the_ratings_in_the_order_of_time(folder):
    rows = [line.split("\t") for line in (folder / "ml-100k.inter").read_text().splitlines()[1:]]
    rows.sort(key=lambda row: int(row[3]))
    split = load(str(folder))
    assert split.test.features["rating"].tolist() == [int(row[2]) for row in rows[240:]]
    found = labels(split.test, ("liked", "loved"))
    assert torch.equal(found[:, 0], split.test.label)
    assert found[:, 1].tolist() == [float(row[2] == "5") for row in rows[240:]]


def test_the_last_like_of_a_user_is_the_tests_and_the_one_before_validations(folder):
    split = load_likes(str(folder))
    rows = [line.split("\t") for line in (folder / "ml-100k.inter").read_text().splitlines()[1:]]
    rows.sort(key=lambda row: int(row[3]))
    assert split.test.users.tolist() == split.val.users.tolist() == [1, 2]
    for number, user in enumerate((1, 2)):
        items = [int(row[1]) for row in rows if row[0] == str(user) and int(row[2]) >= 4]
        assert len(items) > HISTORY + 2
        assert [split.val.items[number], split.test.items[number]] == items[-2:]
        assert split.test.histories[number].tolist() == items[-1 - HISTORY : -1]
        of_user = split.train.part(split.train.users == user)
        assert of_user.items.tolist() == items[1:-2]
        for place, history in enumerate(of_user.histories.tolist(), start=1):
            before = items[max(0, place - HISTORY) : place]
            assert history == before + [0] * (HISTORY - len(before))
        assert split.items[split.seen[number]].tolist() == sorted(set(items[:-2]))


def test_batches_have_each_example_once():
    likes = Likes(torch.arange(5), torch.arange(5), torch.zeros(5, HISTORY, dtype=torch.int64))
    sizes = [len(batch.items) for batch in batches(likes, 2, None)]
    assert sizes == [2, 2, 1]
    shuffled = [*batches(likes, 2, torch.Generator().manual_seed(1))]
    assert sorted(torch.cat([batch.users for batch in shuffled]).tolist()) == [0, 1, 2, 3, 4]


def test_hits_and_gains_are_those_of_the_packages_metrics():
    """Whose lists are without what was seen; here by scores below all others."""
    generator = torch.Generator().manual_seed(0)
    users = torch.arange(7).repeat_interleave(6)
    items = torch.cat([torch.randperm(30, generator=generator)[:6] + 1 for _ in range(7)])
    split = split_likes(users, items)
    scores = torch.randn(7, len(split.items), generator=generator)
    for part in ("val", "test"):
        before = split.seen.clone()
        if part == "test":
            places = torch.searchsorted(split.items, split.val.items)
            before[torch.arange(7), places] = True
        likes = getattr(split, part)
        target = (split.items == likes.items[:, None]).long()
        rows = torch.arange(7)[:, None].expand_as(target)
        left = scores.masked_fill(before, -9.0)
        for k in (3, 10):
            metrics = RecallAtK(k), NDCG(k)
            for metric in metrics:
                metric.update(left.flatten(), target.flatten(), rows.flatten())
            wanted = [float(metric.compute()) for metric in metrics]
            assert hit_and_ndcg(scores, split, part, k) == pytest.approx(wanted, abs=1e-6)


def test_of_equal_scores_the_one_to_find_comes_last():
    split = split_likes(torch.tensor([1] * 3 + [2] * 12), torch.arange(1, 16))
    hit, gain = hit_and_ndcg(torch.zeros(2, 15), split)  # at rank 13 of 13, and 4 of 4
    assert hit == 0.5
    assert gain == pytest.approx(0.5 / torch.tensor(5.0).log2().item())


def test_auc_and_gauc_by_hand():
    examples = Examples({"user": torch.tensor([1, 1, 2, 2])}, torch.zeros(4))
    label = torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert auc_and_gauc(torch.tensor([3.0, 2.0, 1.0, 2.5]), label, examples) == (1.0, 1.0)
    assert auc_and_gauc(torch.tensor([3.0, 2.0, 1.0, 0.5]), label, examples) == (0.5, 0.5)
