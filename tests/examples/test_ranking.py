"""The ranking examples: a few steps of each model, on all of its tables."""

import pytest
import torch
from torch import nn
from torchmetrics.functional.classification import binary_auroc

from examples import movielens
from examples.ranking import dcnv2, din, dlrm, mmoe
from recis_lightning import Jagged, hash_tables
from recis_lightning.cli.movielens import FEATURES, Examples
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer
from tests.helpers.deepfm_data import write_movielens

MODELS = {"dlrm": dlrm.model, "dcnv2": dcnv2.model, "din": din.model, "mmoe": mmoe.model}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Parts of small files like MovieLens-100k's."""
    return movielens.load(str(write_movielens(tmp_path_factory.mktemp("data"), 300)))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_learns_from_all_of_its_tables(name, split):
    model, tasks = MODELS[name](0), tuple(movielens.TASKS)[: 2 if name == "mmoe" else 1]
    tables = hash_tables(model)
    dense = torch.optim.Adam(model.parameters(), lr=0.02)
    optimizer = SparseDenseOptimizer(dense, SparseAdam(tables, lr=0.02))
    losses, before = [], {}
    for epoch in range(12):
        for batch in movielens.batches(split.train, 105, None):
            labels = movielens.labels(batch, tasks)
            logits = model(batch).reshape(labels.shape)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
            if not epoch:
                before = before or {t.name: (t.ids(), t.embeddings(t.ids())) for t in tables}
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    # What is liked here is random: the loss falls by what is learned by heart, in DLRM a little.
    assert sum(losses[-2:]) < (0.98 if name == "dlrm" else 0.95) * sum(losses[:2])
    for table in tables:
        ids, rows = before[table.name]
        assert not torch.equal(table.embeddings(ids), rows), table.name


def tastes(num_users=40, num_items=30):
    """Return examples of all pairs in random order: half the users like half the items.

    The others like the other half, so that neither a user nor an item alone tells what is liked.
    """
    index = torch.randperm(num_users * num_items, generator=torch.Generator().manual_seed(0))
    user, item = 1 + index // num_items, 1 + index % num_items
    same = torch.ones_like(index)
    features = dict.fromkeys(FEATURES, same) | {"user": user, "item": item}
    features["genres"] = Jagged(same, torch.arange(len(index) + 1))
    return Examples(features, ((user + item) % 2).float())


def test_dlrm_tells_what_unseen_pairs_of_users_and_items_are_liked():
    examples, model = tastes(), dlrm.model(0)
    train, held_out = (examples.part(part) for part in torch.arange(1200).split(800))
    dense = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = SparseDenseOptimizer(dense, SparseAdam(hash_tables(model), lr=0.01))

    def auc():
        with torch.no_grad():
            return float(binary_auroc(model.eval()(held_out).sigmoid(), held_out.label.long()))

    assert 0.4 < auc() < 0.6
    model.train()
    for _ in range(10):
        for batch in movielens.batches(train, 100, None):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(batch), batch.label).backward()
            optimizer.step()
    assert auc() > 0.95


@pytest.mark.parametrize("name", MODELS)
def test_two_seeds_begin_with_other_rows_and_one_with_the_same(name, split):
    first, again, other = (MODELS[name](seed)(split.train) for seed in (0, 0, 1))
    assert torch.equal(first, again) or torch.allclose(first, again)
    assert not torch.allclose(first, other)


def test_a_gate_of_mmoe_weighs_experts_and_one_task_has_one_column(split):
    model = mmoe.model(0).eval()
    for gate in model.gates:
        nn.init.zeros_(gate.weight)
        gate.bias.data.copy_(torch.tensor([99.0, 0, 0, 0]))  # the first expert alone
    both = model(split.val)
    assert both.shape == (30, 2)
    for expert in model.experts[1:]:
        expert[0].weight.data.fill_(7.0)
    assert torch.equal(model(split.val), both)
    assert mmoe.one_task(0)(split.val).shape == (30, 1)


def test_dlrm_multiplies_all_pairs_of_its_features(split):
    model = dlrm.model(0).eval()
    seen = []
    model.upper.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(split.val)
    vectors, products = seen[0][:, : 8 * 16].unflatten(1, (8, 16)), seen[0][:, 8 * 16 :]
    wanted = [(vectors[:, i] * vectors[:, j]).sum(1) for i in range(8) for j in range(i + 1, 8)]
    assert torch.allclose(products, torch.stack(wanted, 1), atol=1e-6)
