"""Two towers: the split of likes, recall by hand, and a model that learns what users like."""

import pytest
import torch

from examples.retrieval.train import HELD_OUT, HISTORY, load, recall, recalls, split, train
from tests.helpers.deepfm_data import write_movielens


def test_the_last_likes_of_each_user_are_held_out(tmp_path):
    likes = load(str(write_movielens(tmp_path)))
    rows = [line.split("\t") for line in (tmp_path / "ml-100k.inter").read_text().split("\n")[1:-1]]
    rows.sort(key=lambda row: int(row[3]))
    assert likes.test_users.tolist() == [1, 2]
    for number, user in enumerate((1, 2)):
        films = [int(row[1]) for row in rows if row[0] == str(user) and int(row[2]) >= 4]
        assert len(films) >= 2 * HELD_OUT
        assert likes.held_out[number].tolist() == films[-HELD_OUT:]
        shown = likes.items[likes.users == user].tolist()
        assert shown == films[:-HELD_OUT]
        padded = [0] * HISTORY + shown
        assert likes.test_histories[number].tolist() == padded[: -HISTORY - 1 : -1]
        for place, history in enumerate(likes.histories[likes.users == user].tolist()):
            assert history == padded[place : place + HISTORY][::-1]


def test_users_of_few_likes_have_none_held_out():
    users, items = torch.tensor([3] * (2 * HELD_OUT - 1) + [2]), torch.arange(1, 2 * HELD_OUT + 1)
    likes = split(users, items)
    assert likes.test_users.tolist() == []
    assert likes.users.tolist() == [2] + [3] * (2 * HELD_OUT - 1)


def test_recall_counts_held_out_films_among_those_not_liked_before():
    items = torch.tensor([10, 20, 30, 40])
    empty = torch.zeros(0, HISTORY, dtype=torch.int64)
    likes = split(torch.tensor([1, 2, 2, 3]), torch.tensor([10, 10, 20, 30]))._replace(
        test_users=torch.tensor([1, 2]),
        test_histories=empty,
        held_out=torch.tensor([[20, 40], [30, 99]]),
    )
    scores = torch.tensor([[9.0, 3.0, 2.0, 1.0], [9.0, 8.0, 1.0, 2.0]])
    assert recall(likes, scores, items, 1) == pytest.approx((1 / 2 + 0) / 2)
    assert recall(likes, scores, items, 2) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert recall(likes, scores, items, 9) == pytest.approx((2 / 2 + 1 / 2) / 2)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Lightning's advice for long runs
def test_two_towers_learn_what_groups_of_users_like():
    """Even users like films up to 20 and odd ones the rest: popularity cannot tell."""
    generator = torch.Generator().manual_seed(0)
    users = torch.arange(40).repeat(20)
    films = torch.stack([torch.randperm(20, generator=generator) for _ in range(40)], 1)
    likes = split(users, 1 + films.flatten() + 20 * (users % 2))
    model = train(likes, epochs=10, batch_size=100)
    assert recalls(likes, model, 5)[0] > 0.6
    assert recalls(likes, None, 5)[0] < 0.5
