"""States that are damaged or crafted: an error, and the table is as it was."""

import copy
import io
import random
import zlib

import pytest
import torch

from recis_lightning import DynamicEmbedding, HashTable
from recis_lightning.admission import MinCount
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.table import state_schema
from recis_lightning.table.state_schema import CHECKSUM, with_checksum
from tests.helpers.sample_tables import filled, same, trained


def put(key, value):
    """Return what sets a field, or changes it by a function."""

    def change(state):
        state[key] = value(state[key]) if callable(value) else value

    return change


def slots(change):
    return put("slots", lambda slots: {key: change(slot) for key, slot in slots.items()})


def twice(ids):
    return torch.cat([ids[:1], ids[:-1]])


def bomb(tensor):
    """A view of one item as many."""
    return torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("ids", twice), "of 7 ids, 1 occur twice"),
        (put("step", 2**63), "expected step from .*, got 9223372036854775808"),
        (put("step", -(2**63)), "expected step from"),
        (put("num_updates", -1), "expected num_updates from 0 to .*, got -1"),
        (put("seed", 2**70), "expected seed from"),
        (put("state_fill", 1e300), r"expected a float32 state_fill, got 1e\+300"),
        (put("state_fill", float("nan")), "expected a float32 state_fill, got nan"),
        (put("weights", lambda w: w.to("meta")), "expected weights with its items, got it on meta"),
        (put("ids", lambda ids: ids.to("meta")), "expected ids with its items"),
        (slots(lambda slot: slot.to("meta")), "expected exp_avg with its items"),
        (put("weights", lambda w: w.to_sparse()), "expected weights as a dense tensor"),
        (put("last_seen", lambda seen: seen.to_sparse()), "expected last_seen as a dense tensor"),
        (put("weights", bomb), "expected weights as plain items, got a view that has fewer"),
        (slots(bomb), "expected exp_avg as plain items"),
        (put("weights", lambda w: torch.complex(w, w).conj().imag), "weights as plain items"),
        (slots(lambda slot: torch.zeros(len(slot), 100_000)), "expected 1 to 192 words of optim"),
        (slots(lambda slot: slot[:, :0]), "expected 1 to 192 words"),
        (slots(lambda slot: slot[:, 0]), "expected exp_avg of shape"),
        (slots(lambda slot: slot[:, :, None]), "expected exp_avg of shape"),
        (slots(lambda slot: "text"), "slots is not what it should be"),
        (put("slots", lambda slots: {1: slots["exp_avg"]}), "slots is not what it should be"),
        (put("counts", torch.full((7,), -1)), "expected counts from 0 to .*, got -1"),
        (put("num_lookups", -5), "expected num_lookups from 0"),
        (lambda state: state.pop("name"), "name is missing or not what it should be"),
        (put("dtype", "complex64"), "dtype: expected .* got 'complex64'"),
        (put("wieghts", 1), r"unknown fields \['wieghts'\]"),
    ],
)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_crafted_state_changes_nothing(change, message, fresh):
    """Rows, slots, steps and the name stay; also without a checksum, as states of 0.1.0 are."""
    module, _ = trained()
    state = module.table.get_extra_state()
    del state[CHECKSUM]
    change(state)
    table = HashTable(3, eviction=GlobalStepFilter(9)) if fresh else module.table
    before = table.get_extra_state()
    with pytest.raises(ValueError, match=f"state of table '(t|table)': .*{message}"):
        table.set_extra_state(state)
    assert same(table.get_extra_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("pending_ids", twice), "of 3 pending_ids, 1 occur twice"),
        (put("pending_counts", lambda counts: -counts), "expected pending_counts from 0"),
        (put("pending_lookups", lambda lookups: lookups << 40), "expected pending_lookups from"),
    ],
)
def test_crafted_admission_counts_change_nothing(change, message):
    module = DynamicEmbedding(2, name="t", admission=MinCount(9))
    module(torch.tensor([1, 2, 3]))
    before, state = module.table.get_extra_state(), module.table.get_extra_state()
    del state[CHECKSUM]
    change(state)
    with pytest.raises(ValueError, match=message):
        module.table.set_extra_state(state)
    assert same(module.table.get_extra_state(), before)


def leaves(state):
    for value in state.values():
        yield from leaves(value) if isinstance(value, dict) else [value]


def test_no_flipped_bit_of_a_state_loads():
    """In any tensor, of a state that was saved without the hook."""
    random.seed(0)
    module, _ = trained()
    before = module.table.get_extra_state()
    tensors = [i for i, v in enumerate(leaves(before)) if isinstance(v, torch.Tensor)]
    for _ in range(100):
        state = copy.deepcopy(before)
        tensor = list(leaves(state))[random.choice(tensors)]
        data = tensor.view(torch.uint8).flatten()
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        with pytest.raises(ValueError, match="state of table 't': "):
            module.table.set_extra_state(state)
    assert same(module.table.get_extra_state(), before)


@pytest.mark.parametrize(
    "change",
    [
        put("seed", 5),
        put("step", lambda step: step + 1),
        put("num_updates", 17),
        put("state_fill", 0.5),
        put("name", "s"),
        put(CHECKSUM, lambda value: value ^ 1),
        put("slots", lambda slots: {"exp_avg_s": slots["exp_avg_sq"], "exp_avg": slots["exp_avg"]}),
        lambda state: state.pop("last_seen"),
    ],
)
def test_no_changed_field_loads(change):
    """The checksum is over every field; a state that was changed on purpose goes without it."""
    module, _ = trained()
    before, state = module.table.get_extra_state(), module.table.get_extra_state()
    change(state)
    with pytest.raises(ValueError, match=r"it is damaged: its checksum is .* loads without its"):
        module.table.set_extra_state(state)
    assert same(module.table.get_extra_state(), before)
    del state[CHECKSUM]
    module.table.set_extra_state(state)


def test_the_checksum_is_of_the_content():
    """Not of where tensors are, nor of the order of fields; torch.save keeps it."""
    table = filled(dtype=torch.bfloat16)
    state = table.get_extra_state()
    file = io.BytesIO()
    torch.save(dict(reversed(state.items())), file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    again["weights"] = again["weights"].t().contiguous().t()
    table.set_extra_state(again)
    assert table.get_extra_state()[CHECKSUM] == state[CHECKSUM]


@pytest.mark.parametrize("combine", [state_schema.crc32_combine, None])
@pytest.mark.parametrize("num_bytes", [0, 1, 7, 8, 15, 16, 17, 41])
def test_the_checksum_in_threads_is_the_crc_of_all_bytes(monkeypatch, num_bytes, combine):
    monkeypatch.setattr(state_schema, "_PART_BYTES", 8)
    monkeypatch.setattr(state_schema, "crc32_combine", combine)
    data = torch.arange(num_bytes, dtype=torch.uint8)
    found = with_checksum({"sketch": data})[CHECKSUM]
    head = f"sketch:torch.uint8({num_bytes},);".encode()
    assert found == zlib.crc32(data.numpy().tobytes(), zlib.crc32(head))
