"""What ranks run in the tests of backward passes and programs that differ from rank to rank."""

import time

import torch
from torch import distributed

from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    look_up_together,
)
from recis_lightning.lookup import finish_evaluation
from recis_lightning.lookup.gradient_ledger import ledger_of
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer, SparseSGD, clip_grad_norm_
from recis_lightning.table.listing import hash_tables

IDS = torch.arange(-3, 9)


def tables(*names):
    """Return modules, and a way to see what a step of SGD took from each row."""
    modules = [DynamicEmbedding(2 + number % 2, name=name) for number, name in enumerate(names)]
    with torch.no_grad():
        before = [module(IDS).clone() for module in modules]

    def taken():
        found = []
        for module, rows in zip(modules, before, strict=True):
            module.eval()
            found.append((rows - module(IDS)).mean(1).round(decimals=4).tolist())
            module.train()
        for module in modules:
            finish_evaluation(module.eval())
            module.train()
        return found

    return modules, SparseSGD([module.table for module in modules], lr=1.0), taken


def assert_taken(taken, *wanted):
    """Compare what each table's rows lost, the same for all of a table's rows."""
    assert taken() == [[value] * len(IDS) for value in wanted], (taken(), wanted)


def another_output():
    """Each rank's loss uses another of two outputs: half of the mean comes from each."""
    (cn, us), sparse, taken = tables("cn", "us")
    outputs = cn(IDS), us(IDS)
    outputs[distributed.get_rank()].sum().backward()
    sparse.step()
    assert_taken(taken, 0.5, 0.5)
    assert [len(module.table.pending) for module in (cn, us)] == [0, 0]


def another_order():
    """Ranks run two backward passes in another order, and with a retained graph a third."""
    (cn, us), sparse, taken = tables("cn", "us")
    outputs = [cn(IDS), us(IDS)]
    if distributed.get_rank():
        outputs.reverse()
    for out in outputs:
        out.sum().backward(retain_graph=True)
    outputs[0].sum().backward()
    sparse.step()
    assert_taken(taken, 1.5, 1.5)


def after_a_step():
    """A retained graph is used again after a step, by one rank."""
    (cn, us), sparse, taken = tables("cn", "us")
    out, other = cn(IDS).sum(), us(IDS).sum()
    out.backward(retain_graph=True)
    sparse.step()
    (out if distributed.get_rank() else other).backward()
    sparse.step()
    assert_taken(taken, 1.5, 0.5)


def accumulated():
    """Micro-batches of which ranks use other outputs, or none, and an eviction in between."""
    (cn, us), sparse, taken = tables("cn", "us")
    tower = torch.nn.Linear(1, 1)
    for number in range(3):
        a, b = cn(IDS), us(IDS)
        dense = tower(torch.ones(1, 1)).sum()
        losses = [(a.sum() + dense, b.sum()), (dense, a.sum() + b.sum()), (b.sum(), dense)]
        losses[number][distributed.get_rank()].backward()
        cn.table.evict(), us.table.evict()
    sparse.step()
    assert_taken(taken, 1.0, 1.5)


def dropped():
    """``zero_grad`` drops what has not travelled: of one table on one rank."""
    (cn, us), sparse, taken = tables("cn", "us")
    (cn(IDS).sum() + us(IDS).sum()).backward()
    if distributed.get_rank():
        cn.zero_grad()
    sparse.step()
    assert_taken(taken, 0.5, 1.0)
    sparse.zero_grad()
    cn(IDS).sum().backward()
    sparse.zero_grad()
    us(IDS).sum().backward()
    sparse.step()
    assert_taken(taken, 0.5, 2.0)


def joined():
    """``concat`` of a feature of two tables, one frozen; a rank uses other columns, or none."""
    options = {
        "a": EmbeddingOption(2),
        "b": EmbeddingOption(3),
        "c": EmbeddingOption(2, trainable=False),
    }
    engine = EmbeddingEngine(options)
    sparse = SparseSGD(hash_tables(engine), lr=1.0)
    given = dict.fromkeys(options, IDS)
    before = engine.concat(given).detach().clone()
    tower = torch.nn.Linear(7, 1)
    for number in range(2):
        rows = engine.concat(given)
        plain = tower(rows.detach()).sum()
        used = rows[:, :2].sum() if distributed.get_rank() == number else plain
        used.backward()
        sparse.step()
    engine.eval()
    after = engine.concat(given)
    finish_evaluation(engine)
    lost = (before - after).round(decimals=4)
    assert torch.equal(lost[:, :2], torch.ones(len(IDS), 2)), lost
    assert not lost[:, 2:].any()


def clipped():
    """The norm is that of all gradients, before which they travel."""
    (cn, us), sparse, _ = tables("cn", "us")
    dense = torch.optim.SGD(torch.nn.Linear(1, 1).parameters())
    both = SparseDenseOptimizer(dense, sparse)
    outputs = cn(IDS), us(IDS)
    outputs[distributed.get_rank()].sum().backward()
    norm = clip_grad_norm_(both, 1.0)
    # Each row of 2 and of 3 columns has half a gradient of one.
    torch.testing.assert_close(norm, torch.tensor((len(IDS) * 5 * 0.25) ** 0.5))
    both.step()


def many_lookups():
    """More lookups without a step than a head has bits for; the dead are dropped."""
    (cn,), sparse, _ = tables("cn")
    ledger = ledger_of(None)
    for _ in range(3):
        cn(IDS[:1])
    assert len(ledger.entries) <= 2
    kept = [cn(IDS[:1]) for _ in range(1100)]
    sum(out.sum() for out in kept[distributed.get_rank() :: 2]).backward()
    sparse.step()
    cn.eval()
    del kept, _
    cn.train()(IDS[:1])
    assert len(ledger.entries) <= 2


def fails(work):
    """Return what a rank's error says, and after how many seconds it came."""
    start = time.monotonic()
    try:
        work()
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error), time.monotonic() - start
    return "", time.monotonic() - start


def differing(case):
    """Do something else on rank 1 than on rank 0."""
    (cn, us), sparse, _ = tables("cn", "us")
    first = distributed.get_rank() == 0

    def work():
        if case == "evaluation":
            cn.train(first)
            cn(IDS)
        elif case == "skipped":
            loss = cn(IDS).sum()
            if first:
                loss = loss + us(IDS).sum()
            loss.backward()
            sparse.step()
        elif case == "rank 0 evaluates":
            if first:
                cn.eval()(IDS)
            cn.train()(IDS).sum().backward()
            sparse.step()
        elif case == "no backward":
            loss = cn(IDS).sum()
            if first:
                loss.backward()
            sparse.step()
        elif case == "no step":
            for _ in range(2):
                cn(IDS).sum().backward()
                if first:
                    sparse.step()
        elif case == "frozen":
            cn.requires_grad_(first)
            cn(IDS)
        elif case == "bad input":
            engine = EmbeddingEngine({"a": EmbeddingOption(2, mode="sum")})
            from recis_lightning import Jagged

            engine({"a": Jagged(IDS, torch.tensor([0, 3 if first else len(IDS)]))})
        elif case == "clip":
            cn(IDS).sum().backward()
            if first:
                clip_grad_norm_(sparse, 1.0)
            sparse.step()
        elif case == "changed gradient":
            rows, kept = cn(IDS), []
            rows.register_hook(lambda gradient: kept.append(gradient.detach()))
            (rows * 1.0).sum().backward()
            if first:
                kept[0].zero_()
            try:
                sparse.step()
            finally:
                sparse.zero_grad()
        elif case == "lost rows":
            loss = cn(IDS).sum()
            if first:
                cn.table.delete(IDS)
            loss.backward()
            sparse.step()

    return fails(work)


CASES = {
    "no backward": ("rank 1 steps SparseSGD of tables cn+us without a backward pass", ""),
    "evaluation": ("rank 0 looks up ids (table 'cn', mode none) in training; rank 1 looks up", ""),
    "skipped": ("rank 0 looks up ids (table 'us', mode none) in training; rank 1 steps", ""),
    "rank 0 evaluates": ("rank 0 looks up ids (table 'cn', mode none) in evaluation; rank 1", ""),
    "no step": ("rank 0 steps SparseSGD of tables cn+us; rank 1 looks up", ""),
    "frozen": ("rank 1 looks up ids (table 'cn', mode none) in training, with tables ['cn']", ""),
    "bad input": ("a.offsets: must start at 0", "rank 0 looks up a (table 'a', mode sum) in"),
    "clip": ("rank 0 computes the norm of gradients of SparseSGD", ""),
    "changed gradient": (
        "table 'cn': a gradient was changed in place",
        "rank 0 steps SparseSGD of tables cn+us and failed with RuntimeError: table 'cn': a",
    ),
    "lost rows": ("table 'cn' lost rows on rank 0 between a lookup and the step", ""),
}


def all_differing():
    """Run all cases in one group of ranks, which goes on after each."""
    for case, (first, second) in CASES.items():
        said, seconds = differing(case)
        wanted = (second or first) if distributed.get_rank() else first
        assert wanted in said, (case, said)
        assert seconds < 10, case


def lost_once(how):
    """A rank's table loses rows before backward, or before the step: one error, then it goes on."""
    (cn, us), sparse, taken = tables("cn", "us")
    for first in (True, False):
        loss = cn(IDS).sum()
        if not first:
            loss.backward()
        if distributed.get_rank() == 1:
            cn.table.delete(IDS) if how == "delete" else cn.table.clear()
        if first:
            loss.backward()
        said, seconds = fails(sparse.step)
        assert "table 'cn' lost rows on rank 1" in said, said
        assert seconds < 10
    with torch.no_grad():
        rows = cn(IDS)
    (cn(IDS).sum() + us(IDS).sum()).backward()
    sparse.step()
    assert_close_to(cn, rows - 1.0)
    assert taken()[1] == [1.0] * len(IDS)


def assert_close_to(module, rows):
    """Compare what all ranks look up in evaluation."""
    found = module.eval()(IDS)
    finish_evaluation(module)
    module.train()
    torch.testing.assert_close(found, rows)


def unused_tables_may_lose_rows():
    """Of modules that are looked up together, where the loss uses another one."""
    (cn, us), sparse, _ = tables("cn", "us")
    other = DynamicEmbedding(2, name="other")
    sparse = SparseSGD([m.table for m in (cn, us, other)], lr=1.0)
    with torch.no_grad():
        before = cn(IDS)
    rows, *_ = look_up_together((cn, IDS), (us, IDS), (other, IDS))
    if distributed.get_rank() == 1:
        other.table.clear()
        us.table.delete(IDS)
    rows.sum().backward()
    sparse.step()
    assert_close_to(cn, before - 1.0)
    assert not other.table.pending


def anchors_of_some():
    """``backward(inputs=)`` with anchors leaves the gradients of these tables alone."""
    (cn, us), sparse, _ = tables("cn", "us")
    other = DynamicEmbedding(2, name="other")
    sparse = SparseSGD([m.table for m in (cn, us, other)], lr=1.0)
    with torch.no_grad():
        before = cn(IDS), other(IDS)
    outputs = look_up_together((cn, IDS), (us, IDS), (other, IDS))
    sum(out.sum() for out in outputs).backward(inputs=[other.table.anchor])
    sparse.step()
    assert_close_to(cn, before[0])
    assert_close_to(other, before[1] - 1.0)


def refused(case):
    """Rank 1 alone is given what is refused before any message; rank 0 hears of it."""
    (cn, us), _, _ = tables("cn", "us")
    engine = EmbeddingEngine({"a": EmbeddingOption(2), "b": EmbeddingOption(2)})
    bad = distributed.get_rank() == 1

    def work():
        if case == "dtype":
            cn(IDS.float() if bad else IDS)
        elif case == "together in eval":
            us.train(not bad)
            look_up_together((cn, IDS), (us, IDS))
        elif case == "all in eval":
            cn.train(not bad), us.train(not bad)
            look_up_together((cn, IDS), (us, IDS))
        elif case == "no module":
            look_up_together((cn, IDS), (None if bad else us, IDS))
        elif case == "no feature":
            engine.concat({"a": IDS} if bad else {"a": IDS, "b": IDS})
        elif case == "samples":
            engine.concat({"a": IDS, "b": IDS[bad:]})
        elif case == "kind":
            engine({"a": IDS, "b": "text" if bad else IDS})
        elif case == "frozen":
            us.requires_grad_(not bad)
            look_up_together((cn, IDS), (us, IDS))
        elif case == "hook":
            if bad:
                us.register_forward_hook(lambda *_: None)
            look_up_together((cn, IDS), (us, IDS))

    return fails(work)


REFUSED = {  # what rank 0 says, and rank 1
    "dtype": ("rank 1 looks up DynamicEmbedding 'cn' in training and failed with", "ids: expected"),
    "together in eval": ("rank 1 looks up DynamicEmbedding 'cn' in training, DynamicEmbedding 'us'"
                         " in evaluation and failed", "lookups[1]: expected modules that all"),
    "all in eval": ("rank 1 looks up ids (table 'cn', mode none) in evaluation",) * 2,
    "no module": ("rank 1 looks up DynamicEmbedding 'cn' in training and", "lookups[1]: expected"),
    "no feature": ("rank 1 looks up EmbeddingEngine in training and failed with", "missing ['b']"),
    "samples": ("failed with ValueError: b: concat needs as many", "b: concat needs as many"),
    "kind": ("rank 1 looks up EmbeddingEngine in training and failed with TypeError", "b: "),
    "frozen": ("rank 1 looks up cn (table 'cn', mode none), us (table 'us', mode none) in training,"
               " with tables ['us'] frozen",) * 2,
    "hook": ("rank 1 looks up ids (table 'cn', mode none) in training",) * 2,
}  # fmt: skip


def all_refused():
    """Run all cases in one group of ranks, which goes on after each."""
    for case, words in REFUSED.items():
        said, seconds = refused(case)
        assert words[distributed.get_rank()] in said, (case, said)
        assert seconds < 10, case
    (cn,), _, _ = tables("cn")
    cn(IDS)


def adam_of_zeros():
    """A rank's ids without a gradient do not move: unlike with zeros, moments do not decay."""
    (cn,), _, _ = tables("cn")
    sparse = SparseAdam([cn.table])
    cn(IDS).sum().backward()
    sparse.step()
    before = cn.table.embeddings(IDS)
    mine = IDS[distributed.get_rank() :: 2]
    rows, plain = cn(mine), torch.nn.Linear(1, 1)(torch.ones(1, 1))
    (rows.sum() if distributed.get_rank() == 0 else plain.sum()).backward()
    sparse.step()
    known = cn.table.embeddings(IDS).any(1)
    moved = (cn.table.embeddings(IDS) != before).any(1)
    expected = torch.zeros(len(IDS), dtype=torch.bool)
    expected[::2] = True
    assert torch.equal(moved, expected & known)
