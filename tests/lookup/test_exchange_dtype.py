"""Rows and gradients that travel as bfloat16."""

import numpy as np
import pytest
import torch

from recis_lightning import DynamicEmbedding, DynamicEmbeddingBag, EmbeddingEngine, EmbeddingOption
from recis_lightning.lookup.exchange_dtype import pack_gradients, pack_rows, unpack_gradients
from tests.helpers import rank_exchange_dtype as checks


@pytest.mark.parametrize("shape", [(0, 2), (1, 2), (5, 4)])
def test_what_follows_a_gradient_is_exact(shape):
    """The number of ids that it is of; the rest is rounded."""
    gradients = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gradients[:, -1] = 1_000_003
    packed = pack_gradients(gradients, torch.bfloat16)
    assert packed.nbytes == shape[0] * (2 * shape[1] + 2)
    found = unpack_gradients(packed, torch.bfloat16)
    wanted = torch.cat([gradients[:, :-1].bfloat16().float(), gradients[:, -1:]], 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_nothing_is_packed_without_it():
    """The tensors themselves travel."""
    values = torch.ones(2, 3)
    assert pack_rows(values, None) is pack_gradients(values, None) is values
    assert unpack_gradients(values, None) is values


@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: DynamicEmbedding(2, exchange_dtype=dtype),
        lambda dtype: DynamicEmbeddingBag(2, exchange_dtype=dtype),
        lambda dtype: EmbeddingEngine({"a": EmbeddingOption(2)}, exchange_dtype=dtype),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", torch.float64, 16])
def test_other_dtypes_are_refused(make, dtype):
    """By the argument's name."""
    with pytest.raises(ValueError, match=r"exchange_dtype: expected torch\.bfloat16 or None, got"):
        make(dtype)


@pytest.mark.parametrize(
    "check",
    [
        checks.within_rounding,
        checks.gradients_are_rounded_once,
        checks.ranks_that_disagree,
        checks.copies_have_it,
    ],
    ids=lambda check: check.__name__,
)
def test_on_two_ranks(ranks, check):
    """The checks themselves say what holds."""
    ranks.run(2, check, timeout_s=150)


def write_movielens(root, num_users=300, num_items=200, num_rows=12_000):
    """Write files like MovieLens-100k's, whose ratings users and items say something of."""
    random = np.random.default_rng(0)
    users, items = random.normal(size=(num_users, 4)), random.normal(size=(num_items, 4))
    user, item = (
        random.integers(num_users, size=num_rows),
        random.integers(num_items, size=num_rows),
    )
    score = (users[user] * items[item]).sum(1) + users[user, 0] + items[item, 0]
    rating = np.clip(np.round(3.5 + score + random.normal(size=num_rows)), 1, 5).astype(int)
    tables = {
        "ml-100k.user": (
            "user_id age gender occupation zip_code",
            [f"{n}\t{20 + n % 40}\t{'MF'[n % 2]}\twriter\t{n % 90}" for n in range(num_users)],
        ),
        "ml-100k.item": (
            "item_id movie_title release_year class",
            [f"{n}\tfilm\t{1950 + n % 50}\tDrama Comedy" for n in range(num_items)],
        ),
        "ml-100k.inter": (
            "user_id item_id rating timestamp",
            [
                f"{u}\t{i}\t{r}\t{881250949 + 60 * n}"
                for n, (u, i, r) in enumerate(zip(user, item, rating, strict=True))
            ],
        ),
    }
    root.mkdir()
    for name, (header, lines) in tables.items():
        fields = "\t".join(f"{field}:token" for field in header.split())
        (root / name).write_text("\n".join([fields, *lines]) + "\n", encoding="utf-8")
    return root


@pytest.mark.slow
def test_the_demo_is_as_good(ranks, tmp_path):
    """AUC of the DeepFM example within 0.001."""
    from tests.helpers import rank_demo  # it imports Lightning and the example

    data = write_movielens(tmp_path / "data")
    exact, rounded = (
        ranks.run(2, rank_demo.demo_auc, tmp_path, data, dtype, timeout_s=600)[0]
        for dtype in (None, "bfloat16")
    )
    assert exact > 0.6
    assert exact != rounded
    assert abs(exact - rounded) <= 0.001
