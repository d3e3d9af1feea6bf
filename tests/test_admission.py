"""Admission policies on exact small inputs, with the same result on every backend."""

import copy
import io
from collections import Counter

import pytest
import torch

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.admission import BloomCount, MinCount, Probability, ReadOnly
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.ops.shard_hash import shard_hash
from recis_lightning.optim import SparseSGD
from tests.helpers import rank_admission
from tests.helpers.sample_tables import EXTREMES, HIGH, LOW


def ids(*numbers):
    return torch.tensor(numbers)


def table_of(admission, **kwargs):
    return DynamicEmbedding(2, admission=admission, name="t", **kwargs)


def known(module):
    return sorted(module.table.ids().tolist())


def pending(module):
    state = module.table.get_extra_state()
    return dict(zip(state["pending_ids"].tolist(), state["pending_counts"].tolist(), strict=True))


def test_min_count_counts_every_occurrence(backend):
    """An id is admitted in the lookup in which its count reaches k, with all its occurrences."""
    module = table_of(MinCount(3))
    out = module(ids(1, 2, 2, LOW))
    assert not out.any()
    assert known(module) == []
    assert pending(module) == {LOW: 1, 1: 1, 2: 2}
    out = module(ids(1, 2, 3, 3, 3, LOW))
    assert known(module) == [2, 3]
    assert out.any(1).tolist() == [False, True, True, True, True, False]
    assert torch.equal(out[2], out[4])
    module(ids(LOW, HIGH, 1))
    assert known(module) == [LOW, 1, 2, 3]
    assert pending(module) == {HIGH: 1}
    statistics = module.table.statistics()
    assert (statistics.admitted, statistics.refused) == (4, 4 + 2 + 1)
    assert statistics.rejected == statistics.refused


def test_min_count_per_batch_counts_a_lookup_once(backend):
    """An id counts once in a lookup, however often and in however many features it occurs."""
    module = table_of(MinCount(2, per="batch"))
    module(ids(1, 1, 1, LOW, LOW))
    assert pending(module) == {LOW: 1, 1: 1}
    module(ids(1, 2, 2))
    assert known(module) == [1]
    option = EmbeddingOption(2, table="t", admission=MinCount(2, per="batch"))
    engine = EmbeddingEngine({"a": option, "b": option})
    engine({"a": ids(5), "b": ids(5)})
    assert len(engine.tables["t"]) == 0
    engine({"a": ids(6), "b": ids(5)})
    assert engine.tables["t"].ids().tolist() == [5]


def test_min_count_of_one_admits_at_once(backend):
    """``MinCount(1)`` admits as no policy does."""
    module = table_of(MinCount(1))
    module(ids(4, 4, LOW))
    assert known(module) == [LOW, 4]


def test_a_count_is_void_after_as_many_lookups(backend):
    """A count is dropped once forget_after lookups lacked the id, and no lookup earlier."""
    module = table_of(MinCount(2, forget_after=3))
    module(ids(1, 2))
    module(ids(9))
    module(ids(9))
    module(ids(2))  # three lookups after the first sight: in time
    module(ids(1))  # four: from 0
    assert known(module) == [2, 9]
    assert pending(module) == {1: 1}
    module(ids(1))
    assert known(module) == [1, 2, 9]


def test_counts_do_not_grow_without_end(backend):
    """A stream of ids that never come back needs only the memory of its window."""
    module = table_of(MinCount(2, forget_after=5))
    sizes = []
    for step in range(30):
        module(torch.arange(100) + 1000 * step)
        sizes.append(module.table.nbytes)
    assert len(module.table) == 0
    assert max(sizes[15:]) == max(sizes[:15])
    assert len(pending(module)) == 600
    assert module.table.storage.admission_counter.nbytes <= 64 * 4 * 700
    module.table.storage.admission_counter.compact()
    assert len(pending(module)) == 600
    assert module.table.storage.admission_counter.nbytes <= 16 * 2049


def test_an_evicted_id_must_qualify_again(backend):
    """A deleted id must qualify again, too, and so must one that ``insert`` added."""
    module = table_of(MinCount(2), eviction=GlobalStepFilter(1))
    table = module.table
    module(ids(1, 1, 2, 2, 3))
    table.insert(ids(3, LOW), torch.zeros(2, 2))
    assert known(module) == [LOW, 1, 2, 3]
    assert pending(module) == {}
    table.delete(ids(2, 3))
    table.update_step(2)
    assert table.evict() == 2
    module(ids(1, 2, 3, LOW))
    assert known(module) == []
    module(ids(1, 2, 3, LOW))
    assert known(module) == [LOW, 1, 2, 3]


def test_evaluation_and_padding_do_not_count(backend):
    """Evaluation and padding change no count."""
    module = table_of(MinCount(2), padding_idx=0)
    module(ids(1, 0, 0, 0))
    for _ in range(3):
        module.eval()(ids(1, 2))
    assert module.table.storage.admission_counter.num_lookups == 1
    module.train()(ids(2))
    assert pending(module) == {1: 1, 2: 1}


def test_rejected_ids_have_no_gradient(backend):
    """Rejected ids have no row and no update, and admitted ids train as usual."""
    module = table_of(MinCount(2))
    sparse = SparseSGD(hash_tables(module), lr=1.0)
    out = module(ids(1, 2, 2))
    before = out.detach().clone()
    out.sum().backward()
    sparse.step()
    torch.testing.assert_close(module.table.embeddings(ids(2)), before[1:2] - 2)
    assert known(module) == [2]


@pytest.mark.parametrize("per", ["occurrence", "batch"])
@pytest.mark.slow_except(
    dict(backend="cpu"),
    dict(backend="triton", per="batch"),
    dict(backend="reference", per="occurrence"),
)
def test_min_count_agrees_with_a_counter(backend, per):
    """Two features of one table, beside a table without a policy, on a skewed stream of ids."""
    generator = torch.Generator().manual_seed(0)
    option = EmbeddingOption(2, table="t", admission=MinCount(3, per=per))
    engine = EmbeddingEngine({"a": option, "free": EmbeddingOption(2), "b": option})
    counts, expected, free = Counter(), set(), set()
    for _ in range(8):
        draws = torch.rand(3, 700, generator=generator) ** 4 * 2000
        batch = dict(zip(engine.options, draws.long(), strict=True))
        engine(batch)
        seen = [*batch["a"].tolist(), *batch["b"].tolist()]
        seen = seen if per == "occurrence" else set(seen)
        counts.update([i for i in seen if i not in expected])
        expected |= {i for i, count in counts.items() if count >= 3}
        free |= set(batch["free"].tolist())
        assert set(engine.tables["t"].ids().tolist()) == expected
        assert set(engine.tables["free"].ids().tolist()) == free


def test_a_huge_count_is_not_an_overflow(backend):
    """Counts are clamped at k."""
    module = table_of(MinCount(2**31 - 1))
    many = torch.full((64,), 5)
    for _ in range(3):
        module(many)
    assert pending(module) == {5: 3 * 64}


def test_probability_is_a_function_of_table_id_and_lookup(backend):
    """Order, batch and run do not change the admitted ids; another seed does."""
    first = table_of(Probability(0.3))
    asked = torch.arange(-500, 500)
    first(asked)
    chosen = known(first)
    assert 230 < len(chosen) < 370
    second = table_of(Probability(0.3))
    out = second(asked.flip(0).repeat(2))
    assert known(second) == chosen
    assert out.any(1).view(2, -1).sum(1).tolist() == [len(chosen)] * 2
    first(asked)
    assert len(known(first)) > len(chosen) + 100
    other = table_of(Probability(0.3), seed=1)
    other(asked)
    assert known(other) != chosen


def test_probabilities_of_zero_and_one(backend):
    """Probability 0 admits no id, and 1 all of them."""
    never, always = table_of(Probability(0.0)), table_of(Probability(1.0))
    never(EXTREMES)
    always(EXTREMES)
    assert known(never) == []
    assert known(always) == sorted(EXTREMES.tolist())
    assert never.table.statistics().refused == 9


def test_bloom_count_never_counts_too_low(backend):
    """An id is admitted at the latest when its true count reaches k, despite collisions."""
    module = table_of(BloomCount(3, num_counters=4096))
    module(ids(1, 2, 2, LOW))
    assert known(module) == []
    module(ids(2, LOW, LOW, 9))
    assert known(module) == [LOW, 2]
    module(ids(1, 1))
    assert known(module) == [LOW, 1, 2]
    crowded = table_of(BloomCount(2, num_counters=4, num_hashes=2))
    crowded(torch.arange(50))
    assert len(known(crowded)) == 50


def test_a_sketch_is_halved_when_enough_was_added(backend):
    """A block's counters are halved before the next lookup, in place; so old counts decay."""
    admission = BloomCount(5, num_counters=4096)  # 24 blocks, each halved after 42 sightings
    module = table_of(admission)
    size = module.table.storage.admission_counter.nbytes
    block = shard_hash(torch.arange(200)) % admission.num_blocks
    same, other = (int((block == block[1] + i).nonzero()[2]) for i in (0, 1))
    module(ids(1, 1, 1, other, other, other))
    module(torch.full((39,), same))
    module(ids(1, 1, 1, other))  # 3 halved is 1, and 3 more is 4
    assert known(module) == [same]
    module(ids(1, other))  # the other block had 4 sightings, and is not halved
    assert known(module) == sorted([1, same, other])
    assert module.table.storage.admission_counter.nbytes == size == 24 * (4 * 42 + 8)


def test_blocks_have_room_for_ids_that_collide():
    """Each block has 32 counters of a hash function; many numbers divide the number of blocks."""
    numbers = {
        size: BloomCount(2, num_counters=size).num_blocks
        for size in (4, 1535, 1536, 2**15, 2**20, 10**7, 2**31 - 1)
    }
    assert list(numbers.values()) == [1, 1, 12, 120, 5040, 40_320, 161_280]


STREAM = (torch.rand(20, 240, generator=torch.Generator().manual_seed(2)) ** 3 * 4000).long()


@pytest.mark.parametrize(
    ("admission", "world_sizes"),
    [(BloomCount(3, num_counters=1536), (2, 3, 4)), (BloomCount(2, num_counters=20_000), (4,))],
    ids=repr,
)
def test_a_sketch_counts_alike_on_any_number_of_ranks(ranks, admission, world_sizes):
    """Collisions and halvings of a crowded sketch admit the ids that they admit in one process."""
    expected, saved = rank_admission.admit(admission, STREAM, saves_after=10)
    for world_size in world_sizes:
        answers = ranks.run(world_size, rank_admission.admit, admission, STREAM, None, 10)
        assert sorted(i for admitted, _ in answers for i in admitted) == sorted(expected)
        for key in ("sketch", "num_sketched"):  # each rank saves its own blocks
            parts = torch.stack([state[key] for _, state in answers])
            assert torch.equal(parts.sum(0, dtype=parts.dtype), saved[key])
            assert ((parts != 0).sum(0) <= 1).all()
    exact = rank_admission.admit(MinCount(admission.k), STREAM)[0]
    assert sorted(exact) != sorted(expected)


def test_a_sketch_goes_on_on_other_ranks(ranks):
    """Ranks that load the state of one process admit what it admits, and save their own blocks."""
    admission = BloomCount(3, num_counters=1536)
    expected, end = rank_admission.admit(admission, STREAM, saves_after=20)
    start = table_of(admission)
    for batch in STREAM[:8]:
        start(batch)
    state = start.state_dict()
    answers = ranks.run(3, rank_admission.admit, admission, STREAM[8:], state, 12)
    assert sorted(i for admitted, _ in answers for i in admitted) == sorted(expected)
    parts = torch.stack([state["sketch"] for _, state in answers])
    assert torch.equal(parts.amax(0), end["sketch"])


@pytest.mark.slow_except(dict(backend=["reference", "cpu"]))
def test_counters_are_full_at_255(backend):
    """Counters are clamped at 255 and do not wrap around."""
    module = table_of(BloomCount(255, num_counters=4 * 10**6))
    module(torch.full((254,), 3))
    assert known(module) == []
    module(torch.full((300 if backend == "triton" else 10**4,), 3))  # 42 and 14, had they wrapped
    assert known(module) == [3]


@pytest.mark.parametrize(
    "admission", [MinCount(4), MinCount(3, per="batch"), BloomCount(4, 1000), Probability(0.2)]
)
@pytest.mark.parametrize("how", ["file", "deepcopy"])
def test_a_resumed_run_admits_as_the_one_that_went_on(admission, how):
    """Counts, their ages and the number of lookups are part of the saved state."""
    generator = torch.Generator().manual_seed(1)
    batches = (torch.rand(12, 300, generator=generator) ** 3 * 1000).long()
    module = table_of(admission)
    for batch in batches[:6]:
        module(batch)
    if how == "deepcopy":
        twin = copy.deepcopy(module)
    else:
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        twin = table_of(admission)
        twin(torch.arange(50))
        twin.load_state_dict(torch.load(file, weights_only=True))
    for batch in batches[6:]:
        assert torch.equal(module(batch), twin(batch))
    assert known(module) == known(twin)


def test_other_policies_load_the_usable_part_of_a_state():
    """A lower k admits at the next occurrence; a state without counts starts them at 0."""
    module = table_of(MinCount(5))
    module(ids(1, 1, 1, 1, 2))
    lower = table_of(MinCount(3))
    lower.load_state_dict(module.state_dict())
    lower(ids(1, 2))
    assert known(lower) == [1]
    old = table_of(None)
    old(ids(7))
    lower.load_state_dict(old.state_dict())
    assert known(lower) == [7]
    assert pending(lower) == {}
    old.load_state_dict(module.state_dict())
    assert known(old) == []
    sketch = table_of(BloomCount(2, 100))
    other = table_of(BloomCount(2, 1000))
    with pytest.warns(UserWarning, match=r"'t': the saved sketch .* \(1, 100\).* \(1, 1000\)"):
        other.load_state_dict(sketch.state_dict())
    before_blocks = sketch.state_dict()
    state = before_blocks["table._extra_state"]
    state.update(sketch=state["sketch"].view(4, 25), num_sketched=7)
    del state["checksum"]
    with pytest.warns(UserWarning, match=r"'t': the saved sketch .* \(4, 25\).* \(1, 100\)"):
        sketch.load_state_dict(before_blocks)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: state.pop("pending_counts"), "pending_counts or pending_lookups is missing"),
        (lambda state: state.update(pending_ids=3), "pending_ids or pending_ids is not what"),
        (lambda state: state.update(num_lookups="3"), "num_lookups is not what it should"),
        (
            lambda state: state.update(pending_lookups=state["pending_lookups"][1:]),
            r"expected pending_lookups of shape \(2,\)",
        ),
    ],
)
def test_torn_counts_are_an_error(spoil, words):
    """The error leaves the table unchanged."""
    module = table_of(MinCount(5))
    module(ids(1, 2))
    state = module.table.get_extra_state()
    spoil(state)
    with pytest.raises(ValueError, match=words):
        module.table.set_extra_state(state)
    assert pending(module) == {1: 1, 2: 1}


def test_lookups_of_known_ids_count_as_lookups(backend):
    """Lookups of known ids age the counts of unknown ids, on both paths of a lookup."""
    module = table_of(MinCount(2, forget_after=3))
    module(ids(1, 1, 2))
    for number in range(3):
        module(ids(1))
        assert module.table.storage.admission_counter.num_lookups == number + 2
    module(ids(1))
    module(ids(2))
    assert pending(module) == {2: 1}


def test_a_large_lookup_is_checked_before_it_is_inserted_in_rounds():
    """Insertion looks ids up again, but does not insert rejected ids."""
    module = table_of(MinCount(2))
    twice = torch.arange(150_000)
    module(torch.cat([twice, twice, torch.arange(10**6, 10**6 + 50_000)]))
    assert len(module.table) == 150_000
    assert module.table.statistics().refused == 50_000
    assert module.table.ids().max() == 149_999


def test_threads_do_not_matter():
    """Counts, rows and weights are the same with one thread and two."""
    states = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        module = table_of(MinCount(3))
        generator = torch.Generator().manual_seed(5)
        for _ in range(4):
            module((torch.rand(20_000, generator=generator) ** 5 * 30_000).long())
        states.append(module.table.get_extra_state())
    torch.set_num_threads(2)
    first, second = states
    for key in ("ids", "weights", "pending_ids", "pending_counts", "pending_lookups"):
        assert torch.equal(first[key], second[key])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: MinCount(0), ValueError, "k: expected an int >= 1, got 0"),
        (lambda: MinCount(2.0), TypeError, r"k: expected an int >= 1, got 2\.0"),
        (lambda: MinCount(2**31), ValueError, "k: expected an int below"),
        (lambda: MinCount(2, per="epoch"), ValueError, "per: expected 'occurrence' or 'batch'"),
        (lambda: MinCount(2, forget_after=0), ValueError, "forget_after: expected an int >= 1"),
        (lambda: Probability(1.5), ValueError, r"p: expected a number in \[0, 1\], got 1\.5"),
        (lambda: Probability(float("nan")), ValueError, "p: expected a number in"),
        (lambda: BloomCount(256, 100), ValueError, "k: expected an int <= 255, got 256"),
        (lambda: BloomCount(2, 3), ValueError, "num_counters: expected an int >= 4, got 3"),
        (lambda: BloomCount(2, 100, num_hashes=17), ValueError, "num_hashes: .*<= 16, got 17"),
    ],
)
def test_wrong_arguments(make, error, words):
    """An error names the argument, its value and the expected one."""
    with pytest.raises(error, match=words):
        make()


def test_a_table_counts_for_one_policy():
    """Equal policies may share a table, and others that check nothing; two that count may not."""
    same = [EmbeddingOption(2, table="t", admission=MinCount(2)) for _ in range(2)]
    EmbeddingEngine(dict(zip("ab", same, strict=True)))
    readers = EmbeddingOption(2, table="t", admission=ReadOnly())
    engine = EmbeddingEngine({"b": readers, "a": same[0]})
    assert engine.tables["t"].admission == MinCount(2)
    other = EmbeddingOption(2, table="t", admission=MinCount(3))
    with pytest.raises(ValueError, match=r"one policy only, .*MinCount\(k=2.*MinCount\(k=3"):
        EmbeddingEngine({"a": same[0], "b": other})
