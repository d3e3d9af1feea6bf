"""Lookups of several modules together: what they return one after the other."""

import copy
import threading

import pytest
import torch

from recis_lightning import (
    DynamicEmbedding,
    DynamicEmbeddingBag,
    EmbeddingEngine,
    EmbeddingOption,
    Jagged,
    NestedJagged,
    hash_tables,
    look_up_together,
)
from recis_lightning.admission import MinCount
from recis_lightning.optim import SparseAdam
from tests.helpers import rank_messages


def modules():
    """Return modules of all kinds; two are of one dim, and the last looks the first's table up."""
    user, tags = DynamicEmbedding(4, name="user"), DynamicEmbeddingBag(4, mode="sum", name="tags")
    item = DynamicEmbedding(3, name="item", mode="unique", admission=MinCount(2))
    engine = EmbeddingEngine(
        {
            "click": EmbeddingOption(4, mode="mean"),
            "city": EmbeddingOption(2, padding_idx=0),
            "seen": EmbeddingOption(3, mode="unique"),
            "sums": EmbeddingOption(2, combiner=lambda rows, offsets: rows[offsets[:-1]]),
        }
    )
    return torch.nn.ModuleList([user, tags, item, engine, user])


def arguments(step):
    """Return what each is called with."""
    ids = torch.arange(6).view(2, 3) * (step + 1) % 7
    ragged = Jagged(ids.flatten()[:4], torch.tensor([0, 0, 3, 4]))
    weights = torch.full((2, 3), 0.5, requires_grad=True)
    nested = NestedJagged(ids.flatten(), torch.tensor([0, 2, 2, 6]), torch.tensor([0, 1, 3]))
    engine = {"click": nested if step else ragged, "city": ids, "seen": ragged, "other": "kept"}
    engine["sums"] = ids
    return [(ids.int(),), (ids, None, weights), (ids,), (engine,), (ids[:0],)]


def leaves(output):
    """Return the tensors of an output."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = output.values()
    return [leaf for part in output if not isinstance(part, str | None) for leaf in leaves(part)]


def train(parts, look_up):
    """Train for some steps; return all outputs, gradients of weights, and rows."""
    sparse, kept = SparseAdam(hash_tables(parts), lr=0.1), []
    for step in range(3):
        asked = arguments(step)
        outputs = [leaf for out in look_up(parts, asked) for leaf in leaves(out)]
        kept += outputs
        sum(out.square().sum() for out in outputs if out.requires_grad).backward()
        kept.append(asked[1][2].grad)
        sparse.step()
    kept += [tensor for table in hash_tables(parts) for tensor in table.ids_map()]
    return kept + [table.embeddings(table.ids()) for table in hash_tables(parts)]


def together(parts, asked):
    return look_up_together(*((part, *given) for part, given in zip(parts, asked, strict=True)))


def one_by_one(parts, asked):
    return [part(*given) for part, given in zip(parts, asked, strict=True)]


def test_training_is_the_same():
    """Outputs, gradients, rows and their order: to the bit."""
    one, other = train(modules(), together), train(modules(), one_by_one)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_evaluation_reads_only():
    """As the modules do, on a copy too."""
    parts = modules()
    train(parts, together)
    parts = copy.deepcopy(parts).eval()
    before = [len(table) for table in hash_tables(parts)]
    asked = arguments(5)
    found, expected = together(parts, asked), one_by_one(parts, asked)
    torch.testing.assert_close(leaves(found), leaves(expected), rtol=0, atol=0)
    assert [len(table) for table in hash_tables(parts)] == before


def test_settings_take_effect():
    """A policy or padding id that was set since."""
    user, item = DynamicEmbedding(2, name="user"), DynamicEmbedding(2, name="item")
    ids = torch.tensor([1, 2])
    look_up_together((user, ids), (item, ids))
    user.padding_idx, item.table.admission = 1, MinCount(2)
    rows, others = look_up_together((user, ids), (item, ids + 5))
    assert not rows[0].any()
    assert not others.any()
    assert rows[1].any()


def test_a_shared_table_admits_by_the_ids_of_all():
    """As that of an engine does: the second occurrence is in the same lookup."""
    user = DynamicEmbedding(2, name="user", admission=MinCount(2))
    ids = torch.tensor([3])
    one, other = look_up_together((user, ids), (user, ids))
    assert torch.equal(one, other)
    assert one.any()


def test_an_unused_table_may_lose_rows():
    """Of a module whose output no loss uses, as where modules are called one by one."""
    user, item = DynamicEmbedding(2, name="user"), DynamicEmbedding(2, name="item")
    ids = torch.arange(3)
    rows, others = look_up_together((user, ids), (item, ids))
    item.table.clear()
    rows.sum().backward()
    assert [len(user.table.pending), len(item.table.pending)] == [1, 0]
    with pytest.raises(RuntimeError, match="table 'item' lost rows"):
        others.sum().backward()


@pytest.mark.parametrize("look_up", [together, one_by_one])
def test_a_backward_pass_may_be_asked_for_some_tables(look_up):
    """By their anchors; and for other leaves alone."""
    parts = [DynamicEmbedding(2, name=name) for name in "abc"]
    asked, scale = [(torch.arange(3),)] * 3, torch.ones(1, requires_grad=True)
    for inputs in ([1], [0, 2], []):
        outputs = look_up(parts, asked)
        anchors = [parts[number].table.anchor for number in inputs]
        (sum(out.sum() for out in outputs) * scale).sum().backward(inputs=[scale, *anchors])
        pending = [number for number, part in enumerate(parts) if part.table.pending]
        assert pending == inputs
        for part in parts:
            part.table.pending.clear()


def test_threads_evaluate_at_once():
    """Each gets what it asked for."""
    parts = [DynamicEmbedding(2, name=f"t{i}") for i in range(3)]
    ids = torch.arange(50)
    expected = torch.stack(look_up_together(*((part, ids) for part in parts))).detach()
    for part in parts:
        part.eval()
    wrong = []

    def work(number):
        for _ in range(20):
            shift = ids.roll(number)
            found = torch.stack(look_up_together(*((part, shift) for part in parts)))
            if not torch.equal(found, expected[:, shift]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_asked_of_nobody():
    """An empty call returns nothing."""
    assert look_up_together() == []


@pytest.mark.parametrize(
    ("lookups", "error", "text"),
    [
        ([torch.tensor([1])], TypeError, r"lookups\[0\]: expected \(module, \*arguments\)"),
        ([(torch.nn.Linear(1, 1), 1)], TypeError, "got Linear"),
        ([()], TypeError, "got tuple"),
        (
            [
                (DynamicEmbedding(1), torch.tensor([1])),
                (DynamicEmbedding(1).eval(), torch.tensor([1])),
            ],
            ValueError,
            r"lookups\[1\]: expected modules that all train",
        ),
        ([(DynamicEmbedding(1), torch.tensor([0.5]))], TypeError, "ids"),
    ],
)
def test_bad_input_is_named(lookups, error, text):
    """Before anything changes."""
    with pytest.raises(error, match=text):
        look_up_together(*lookups)


def test_malformed_offsets_name_the_table():
    """Their feature has no other name."""
    user, tags = DynamicEmbedding(2, name="user"), DynamicEmbeddingBag(2, name="tags")
    ids = torch.arange(4)
    with pytest.raises(ValueError, match=r"tags\.offsets"):
        look_up_together((user, ids), (tags, Jagged(ids, torch.tensor([0, 3]))))
    assert len(user.table) == 0


@pytest.mark.parametrize(
    "check",
    [
        rank_messages.of_engines,
        rank_messages.of_embeddings,
        rank_messages.of_more_tables_than_a_head_has_counts_for,
        rank_messages.of_more_tables_than_a_head_has_bits_for,
        rank_messages.of_bits_alone,
        rank_messages.of_evaluation,
        rank_messages.of_malformed_input,
    ],
    ids=lambda check: check.__name__,
)
def test_messages_of_two_ranks(ranks, check):
    """The checks themselves say how many there are."""
    ranks.run(2, check, timeout_s=150)


@pytest.mark.slow
def test_messages_of_many_tables(ranks):
    ranks.run(2, rank_messages.of_tables, 200, timeout_s=150)


@pytest.mark.parametrize("how", ["override", "hook"])
def test_modules_that_do_more_than_look_up_are_called(how):
    class Shifted(DynamicEmbedding):
        def forward(self, ids):
            return super().forward(ids + 1)

    module = (Shifted if how == "override" else DynamicEmbedding)(2, name="t")
    if how == "hook":
        module.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    other = DynamicEmbedding(2, name="other")
    look_up_together((other, torch.arange(2)), (module, torch.tensor([4, 5])))
    assert module.table.ids().sort().values.tolist() == [5, 6]
