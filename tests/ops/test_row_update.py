import math

import numpy as np
import pytest
import torch

from recis_lightning import HashTable
from recis_lightning.initializers import Normal
from recis_lightning.ops import backend as ops_backend
from recis_lightning.ops import layout as fields
from recis_lightning.ops import row_update
from recis_lightning.ops.layout import (
    ADAGRAD,
    ADAM,
    ADAM_AR,
    COUPLED_DECAY,
    COW_CLIP,
    FTRL,
    HYPER_ALPHA,
    HYPER_CLIP,
    HYPER_COW_LEAST,
    HYPER_COW_RATIO,
    HYPER_DECAY,
    HYPER_EPS,
    HYPER_INV_SQRT_BIAS2,
    HYPER_LR,
    HYPER_MARKS,
    HYPER_MOMENTUM,
    HYPER_OF_BUFFER,
    HYPER_OF_GRADIENT,
    HYPER_ONE_MINUS_BETA1,
    HYPER_ONE_MINUS_BETA2,
    HYPER_SCALE,
    HYPER_SIZE,
    HYPER_UPDATE,
    HYPER_WEIGHT_DECAY,
    LION,
    MOMENTUM,
    PADDING,
    RMSPROP,
    ROWWISE_ADAGRAD,
    ROWWISE_ADAM,
    SGD,
    UNKNOWN,
)
from recis_lightning.ops.row_update import RowLayout
from tests.helpers.gather_plans import Feature, mixed_features, random_rows
from tests.helpers.sample_tables import insert_initial

DIMS = [1, 2, 3, 7, 8, 10, 16, 24, 33, 64, 128]
NUM_ROWS = 500
SLOTS = {
    SGD: lambda dim: {},
    ADAGRAD: lambda dim: {"sum": dim},
    ROWWISE_ADAGRAD: lambda dim: {"sum": 1},
    ADAM: lambda dim: {"exp_avg": dim, "exp_avg_sq": dim},
    MOMENTUM: lambda dim: {"momentum_buffer": dim},
    RMSPROP: lambda dim: {"square_avg": dim},
    ROWWISE_ADAM: lambda dim: {"exp_avg": dim, "exp_avg_sq": 1},
    FTRL: lambda dim: {"sum": dim, "linear": dim},
    LION: lambda dim: {"exp_avg": dim},
    ADAM_AR: lambda dim: {"exp_avg": dim, "exp_avg_sq": dim, "last_update": 1},
}
RULES = {
    "sgd": SGD,
    "adagrad": ADAGRAD,
    "rowwise_adagrad": ROWWISE_ADAGRAD,
    "adam": ADAM,
    "momentum": MOMENTUM,
    "rmsprop": RMSPROP,
    "rowwise_adam": ROWWISE_ADAM,
    "ftrl": FTRL,
    "lion": LION,
    "adam_ar": ADAM_AR,
    "adagrad, decayed": ADAGRAD + COUPLED_DECAY,
    "rowwise_adagrad, decayed": ROWWISE_ADAGRAD + COUPLED_DECAY,
    "adam, cow": ADAM + COW_CLIP,
    "rowwise_adagrad, decayed, cow": ROWWISE_ADAGRAD + COUPLED_DECAY + COW_CLIP,
}
HYPER = {
    HYPER_LR: 0.1,
    HYPER_EPS: 1e-3,
    HYPER_ONE_MINUS_BETA1: 0.2,
    HYPER_ONE_MINUS_BETA2: 0.05,
    HYPER_INV_SQRT_BIAS2: 1.7,
    HYPER_DECAY: 0.99,
    HYPER_SCALE: 0.5,
    HYPER_CLIP: 0.8,
    HYPER_WEIGHT_DECAY: 0.3,
    HYPER_MOMENTUM: 0.9,  # FTRL's l1
    HYPER_OF_BUFFER: 0.7,  # its l2
    HYPER_OF_GRADIENT: 1.1,  # its beta
    HYPER_COW_RATIO: 0.2,
    HYPER_COW_LEAST: 0.3,
}


HYPERS = {"adam_ar": {**HYPER, HYPER_ALPHA: 0.004, HYPER_UPDATE: 300}}


def _table(dim, rule=SGD, dtype=torch.float32, name="table", num_rows=NUM_ROWS):
    """Return a table with the state of ``rule``, none of it zero, whose row r is known."""
    table = HashTable(dim, dtype=dtype, initializer=Normal(), name=name)
    table.storage.rows.relayout(SLOTS[rule % COUPLED_DECAY](dim), 0.0)
    insert_initial(table, torch.arange(num_rows))
    generator = torch.Generator().manual_seed(dim)
    weights, slots = table.storage.rows.read(torch.arange(num_rows))
    for slot in slots.values():
        slot.copy_(torch.rand(slot.shape, generator=generator))
    if "last_update" in slots:
        slots["last_update"].mul_(300).round_()
    table.storage.rows.write(torch.arange(num_rows), weights, slots)
    return table


def _gradients(features, hyper=HYPER):
    """Sort the gradients of features; return also the objects that they point to."""
    tables = list(dict.fromkeys(feature.table for feature in features))
    values = np.ones((len(tables), HYPER_SIZE), np.float32)
    values[:, HYPER_MARKS:] = 0
    per_table = hyper if isinstance(hyper, list) else [hyper] * len(tables)
    for line, wanted in zip(values, per_table, strict=True):
        line[list(wanted)] = list(wanted.values())
    rows = tables[0].storage.rows
    addresses, bases = [], {}
    for number, table in enumerate(tables):
        bases[table] = len(addresses) << rows.block_shift
        at = values.ctypes.data + number * values.strides[0]
        addresses += [(block, at) for block in table.storage.rows.addresses.tolist()]
    plan = np.stack([feature.line() for feature in features])
    sizes = plan[:, fields.PLAN_NUM_IDS]
    plan[:, fields.PLAN_FIRST_ID] = np.cumsum(sizes) - sizes
    plan[:, fields.PLAN_FLAT_BASE] = [bases[feature.table] for feature in features]
    layout = RowLayout(
        rows.embedding_dim, rows.dtype, 4 * rows.row_words, rows.block_shift, tables[0].device
    )
    blocks = np.array(addresses, np.int64).reshape(-1, 2)
    return row_update.sort_gradients(plan, blocks, layout), (values, features)


def _update(features, rule, hyper=HYPER):
    gradients, keep = _gradients(features, hyper)
    row_update.update_rows_(gradients, rule)
    del keep


def _dense_gradient(features, table, num_rows=NUM_ROWS):
    """Return the gradient of all rows, float64 [num_rows, dim], by torch's own autograd."""
    dim = table.embedding_dim
    weight = torch.zeros(num_rows, dim, dtype=torch.float64, requires_grad=True)
    loss = torch.zeros((), dtype=torch.float64)
    for feature in (f for f in features if f.table is table):
        offsets = feature.offsets
        if offsets is None:
            offsets = torch.arange(feature.num_bags + 1) * feature.length
        gradient = feature.buffer[:, : feature.width].double().reshape(feature.num_bags, -1, dim)
        for bag in range(feature.num_bags):
            span = slice(int(offsets[bag]), int(offsets[bag + 1]))
            rows = feature.rows[span]
            scale = torch.ones(rows.numel(), dtype=torch.float64)
            if feature.weights is not None:
                scale = feature.weights[span].double()
            values = torch.where((rows >= 0)[:, None], weight[rows.clamp(min=0)], 0)
            if feature.mode == "mean":
                total = scale[rows != PADDING].sum()
                scale = scale / total if total else torch.zeros_like(scale)
            if feature.mode == "mean_by_count":
                scale = scale / max(int((rows != PADDING).sum()), 1)
            values = values * scale[:, None]
            if feature.mode == "tile":
                values = values[: feature.tile_len]
                loss = loss + (values * gradient[bag, : len(values)]).sum()
            else:
                loss = loss + (values.sum(0) * gradient[bag, 0]).sum()
    loss.backward()
    return weight.grad


def _state(table, num_rows=NUM_ROWS):
    weights, slots = table.storage.rows.read(torch.arange(num_rows))
    return {"weights": weights, **slots}


def _assert_states_agree(ours, theirs, rtol=2e-5, atol=1e-6):
    assert ours.keys() == theirs.keys()
    for name in ours:
        loose = ours[name].dtype is torch.bfloat16
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=2**-7 if loose else rtol, atol=atol, msg=name
        )


_CASES = [
    ("sgd", torch.float32, DIMS),
    ("adagrad", torch.float32, [7, 24]),
    ("rowwise_adagrad", torch.float32, [7, 24]),
    ("adam", torch.float32, [1, 3, 7, 24]),
    ("sgd", torch.bfloat16, [7]),
    ("adagrad", torch.bfloat16, [7]),
    ("rowwise_adagrad", torch.bfloat16, [7]),
    ("adam", torch.bfloat16, [7, 24]),
    ("momentum", torch.float32, [24]),
    ("rmsprop", torch.float32, [24]),
    ("rowwise_adam", torch.float32, [24]),
    ("ftrl", torch.float32, [24]),
    ("lion", torch.float32, [24]),
    ("adam_ar", torch.float32, [24]),
    ("adam_ar", torch.bfloat16, [7]),
    ("adagrad, decayed", torch.float32, [24]),
    ("rowwise_adagrad, decayed", torch.float32, [24]),
    ("momentum", torch.bfloat16, [7]),
    ("rowwise_adam", torch.bfloat16, [7]),
    ("ftrl", torch.bfloat16, [7]),
    ("rowwise_adagrad, decayed", torch.bfloat16, [7]),
    ("adam", torch.float32, [2, 8, 10, 16, 33, 64, 128]),
    ("adam", torch.bfloat16, [1, 2, 3, 8, 10, 16, 33, 64, 128]),
    ("adam, cow", torch.float32, [24]),
    ("rowwise_adagrad, decayed, cow", torch.bfloat16, [7]),
]
# Each rule, dtype and vector width is a kernel to compile, and an interpreted one takes seconds: in
# each run of the tests are all rules, and each dtype with some; the others are in the longer one.
_REPEATED = {
    ("adagrad", torch.bfloat16),
    ("rowwise_adagrad", torch.bfloat16),
    ("momentum", torch.bfloat16),
    ("rowwise_adam", torch.bfloat16),
    ("rowwise_adagrad, decayed", torch.bfloat16),
}
_INTERPRETED = {
    ("sgd", torch.float32),
    ("rowwise_adagrad", torch.float32),
    ("adam", torch.bfloat16),
    ("ftrl", torch.float32),
    ("adam_ar", torch.float32),
    ("adam, cow", torch.float32),
    ("rowwise_adagrad, decayed", torch.bfloat16),
}


# Interpreted in every run with fewer ids.
_OTHERS_INTERPRETED = ["adagrad", "momentum", "rmsprop", "rowwise_adam", "lion"]


def _marks(kernels, rule, dtype, dims):
    is_many = rule == "adam" and len(dims) > 4
    if kernels != "triton":
        return [pytest.mark.slow] if is_many or (rule, dtype) in _REPEATED else []
    is_quick = (rule, dtype) in _INTERPRETED and not is_many
    return [pytest.mark.interpreted, *([] if is_quick else [pytest.mark.slow])]


@pytest.mark.parametrize(
    ("kernels", "rule", "dtype", "dims"),
    [
        pytest.param(kernels, *case, marks=_marks(kernels, *case))
        for case in _CASES
        for kernels in ("cpu", "triton")
    ],
)
def test_kernels_agree_with_the_reference(kernels, rule, dtype, dims):
    """Every rule over all modes and layouts at once, with every hyperparameter.

    Not every rule is tried on all dims.
    """
    num_bags = 40
    if kernels == "triton":
        dims, num_bags = [1, 24] if rule in ("sgd", "adam") else [7], 12
    for dim in dims:
        states, norms = {}, {}
        for name in ("reference", kernels):
            with ops_backend.use(name):
                table = _table(dim, RULES[rule], dtype)
                generator = torch.Generator().manual_seed(dim)
                features = [
                    feature.fill_gradient(generator)
                    for feature in mixed_features(table, generator, num_bags)
                ]
                for _ in range(2):
                    gradients, keep = _gradients(features, HYPERS.get(rule, HYPER))
                    norms[name] = row_update.squared_norm(gradients).item()
                    row_update.update_rows_(gradients, RULES[rule])
                del keep
                states[name] = _state(table)
        assert norms[kernels] == pytest.approx(norms["reference"], rel=1e-5)
        _assert_states_agree(states[kernels], states["reference"])


@pytest.mark.parametrize("dim", [1, 7, 16])
@pytest.mark.slow_except(dict(backend=["reference", "cpu"]), dict(dim=7))
def test_gradients_are_those_of_autograd(backend, dim):
    """A row's gradient is the one that torch computes, for every mode and layout."""
    table = _table(dim)
    generator = torch.Generator().manual_seed(dim)
    features = [f.fill_gradient(generator) for f in mixed_features(table, generator, 20)]
    wanted = _dense_gradient(features, table)
    before = _state(table)["weights"].double()
    gradients, keep = _gradients(features, {HYPER_LR: 1.0, HYPER_CLIP: math.inf})
    wanted_norm = wanted.square().sum().item()
    assert row_update.squared_norm(gradients).item() == pytest.approx(wanted_norm, rel=1e-5)
    row_update.update_rows_(gradients, SGD)
    del keep
    moved = before - _state(table)["weights"].double()
    torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=1e-5)


def _train_with_torch(rule, weight, gradients):
    """Step torch's optimizer of a rule over dense gradients; return weights and state."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = {
        SGD: lambda: torch.optim.SGD([parameter], lr=0.1),
        ADAGRAD: lambda: torch.optim.Adagrad([parameter], lr=0.1, lr_decay=0.2, eps=1e-4),
        ADAM: lambda: torch.optim.SparseAdam([parameter], lr=0.1, betas=(0.8, 0.95), eps=1e-4),
        "adamw": lambda: torch.optim.AdamW(
            [parameter], lr=0.1, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3
        ),
    }[rule]()
    for gradient in gradients:
        parameter.grad = gradient.clone()
        if rule == ADAM:
            parameter.grad = gradient.to_sparse(1)
        optimizer.step()
    state = {k: v for k, v in optimizer.state[parameter].items() if k != "step"}
    return {"weights": parameter.detach(), **{k: v for k, v in state.items() if v is not None}}


def _hyper(rule, step):
    """Return the hyperparameters that make a rule the optimizer of ``_train_with_torch``."""
    bias1, root2 = 1 - 0.8**step, math.sqrt(1 - 0.95**step)
    shares = {
        HYPER_ONE_MINUS_BETA1: 0.2,
        HYPER_ONE_MINUS_BETA2: 0.05,
        HYPER_INV_SQRT_BIAS2: 1 / root2,
    }
    return {
        SGD: {HYPER_LR: 0.1},
        ADAGRAD: {HYPER_LR: 0.1 / (1 + (step - 1) * 0.2), HYPER_EPS: 1e-4},
        ADAM: {HYPER_LR: 0.1 / bias1, HYPER_EPS: 1e-4 / root2, **shares},
        "adamw": {HYPER_LR: 0.1 / bias1, HYPER_EPS: 1e-4, HYPER_DECAY: 1 - 0.1 * 0.3, **shares},
    }[rule] | {HYPER_CLIP: math.inf}


@pytest.mark.parametrize("dim", [7, 24])
@pytest.mark.parametrize("rule", [SGD, ADAGRAD, ADAM, "adamw"])
@pytest.mark.slow_except(
    dict(backend="cpu"), dict(dim=7, rule=[ADAM, "adamw"]), dict(backend="reference", dim=7)
)
def test_rules_are_those_of_torch(backend, rule, dim):
    """Weights and state after some steps are those of torch's optimizer.

    A step of AdamW touches all rows, as torch's does; the others leave rows out.
    """
    kernel_rule = ADAM if rule == "adamw" else rule
    table = HashTable(dim, initializer=Normal(), name="torch")
    table.storage.rows.relayout(SLOTS[kernel_rule](dim), 0.0)
    insert_initial(table, torch.arange(NUM_ROWS))
    weight = _state(table)["weights"]
    generator, gradients = torch.Generator().manual_seed(dim), []
    for step in range(1, 6 if backend != "triton" else 3):
        rows = random_rows(generator, 700, num_rows=400)
        if rule == "adamw":
            rows = torch.cat([rows, torch.arange(NUM_ROWS)])
        features = [Feature(table, rows, "none").fill_gradient(generator)]
        gradients.append(_dense_gradient_of_rows(features[0]))
        _update(features, kernel_rule, _hyper(rule, step))
    theirs = _train_with_torch(rule, weight, gradients)
    _assert_states_agree(_state(table), theirs, rtol=1e-4, atol=1e-5)


def _dense_gradient_of_rows(feature, num_rows=NUM_ROWS):
    known = feature.rows >= 0
    total = torch.zeros(num_rows, feature.width, dtype=torch.float64)
    gradient = feature.buffer[known, : feature.width].double()
    return total.index_add_(0, feature.rows[known], gradient).float()


def test_rowwise_adagrad_adds_up_mean_squares(backend):
    """One sum a row: the mean square of the row's whole gradient, before any weight moves."""
    table = _table(7, ROWWISE_ADAGRAD)
    before = _state(table)
    generator = torch.Generator().manual_seed(0)
    feature = Feature(table, random_rows(generator, 600), "none").fill_gradient(generator)
    _update([feature], ROWWISE_ADAGRAD, {HYPER_LR: 0.1, HYPER_EPS: 1e-3, HYPER_CLIP: math.inf})
    gradient = _dense_gradient_of_rows(feature)
    total = before["sum"] + gradient.square().mean(1, keepdim=True)
    weights = before["weights"] - 0.1 * gradient / (total.sqrt() + 1e-3)
    _assert_states_agree(_state(table), {"weights": weights, "sum": total}, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.slow_except(
    dict(backend=["reference", "cpu"]), dict(backend="triton", rule=_OTHERS_INTERPRETED)
)
def test_rows_without_a_gradient_stay_as_they_are(backend, rule):
    """Weights and state of a row that no id asked for do not change by a bit."""
    table = _table(24, RULES[rule])
    before = _state(table)
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([7, PADDING, 9, 7, UNKNOWN])
    _update([Feature(table, rows, "none").fill_gradient(generator)], RULES[rule])
    after = _state(table)
    for name in before:
        same = (before[name] == after[name]).all(1)
        assert same.logical_not().nonzero().flatten().tolist() == [7, 9]


def test_scale_comes_before_the_clip(backend):
    """A row's summed gradient is scaled, then clamped; NaN stays NaN for torch to find."""
    table = _table(4)
    before = _state(table)["weights"]
    feature = Feature(table, torch.tensor([0, 0, 1, 2]), "none")
    feature.buffer = torch.tensor([[1.0, 2, -9, 0], [1, 2, -9, 0], [3, -3, 0.1, 4], [math.nan] * 4])
    _update([feature], SGD, {HYPER_LR: 1.0, HYPER_SCALE: 0.5, HYPER_CLIP: 1.5})
    moved = before - _state(table)["weights"]
    torch.testing.assert_close(moved[0], torch.tensor([1.0, 1.5, -1.5, 0]))
    torch.testing.assert_close(moved[1], torch.tensor([1.5, -1.5, 0.05, 1.5]))
    assert moved[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow_except(dict(backend=["reference", "cpu"]), dict(dtype=torch.bfloat16))
def test_many_tables_in_one_call(backend, dtype):
    """Each table's rows move by its own hyperparameters, whatever else shares the call."""
    generator = torch.Generator().manual_seed(0)
    count = 12 if backend != "triton" else 4
    tables = [_table(7, ADAGRAD, dtype, f"{n}", num_rows=50 + 40 * n) for n in range(count)]
    alone = [_table(7, ADAGRAD, dtype, f"{n}", num_rows=50 + 40 * n) for n in range(count)]
    hyper = [
        {HYPER_LR: 0.01 * (n + 1), HYPER_EPS: 1e-3, HYPER_CLIP: math.inf} for n in range(count)
    ]
    features = []
    for number in [*range(count), 3, 3, count // 2]:
        rows = random_rows(generator, 64, num_rows=50 + 40 * number)
        feature = Feature(tables[number], rows, "sum", 4).fill_gradient(generator)
        features.append(feature)
    _update(features, ADAGRAD, hyper)
    for number, (table, single) in enumerate(zip(tables, alone, strict=True)):
        mine = [feature for feature in features if feature.table is table]
        for feature in mine:
            feature.table = single
        _update(mine, ADAGRAD, hyper[number])
        ours, theirs = _state(table, 50), _state(single, 50)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_hot_rows_and_large_batches(backend):
    """A row with 30,000 gradients among 100,000 ids gets exactly their sum."""
    count = 100_000 if backend != "triton" else 9000  # interpreted, a program takes a while
    table = _table(2, num_rows=5000)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 5000, (count,), generator=generator)
    rows[torch.randperm(count, generator=generator)[: count // 3]] = 1234
    feature = Feature(table, rows, "none")
    # Small whole numbers: float32 sums are exact in every order.
    feature.buffer = torch.randint(-3, 4, feature.buffer.shape, generator=generator).float()
    table.storage.rows.write(torch.arange(5000), torch.zeros(5000, 2), {})
    _update([feature], SGD, {HYPER_LR: 1.0, HYPER_CLIP: math.inf})
    wanted = -_dense_gradient_of_rows(feature, 5000)
    assert torch.equal(_state(table, 5000)["weights"], wanted)


@pytest.mark.parametrize(
    "counts",
    [
        [2048, 2048, 2048],  # each as many stretches as are added up together, and where they are
        [33, 4096 + 31, 1, 2047],
        [5, 0, 6100, 40],
        [100, 2100, 4300],
    ],
    ids=["aligned", "between", "to-the-end", "shifted"],
)
@pytest.mark.parametrize("is_known", [True, False], ids=["all", "some"])
@pytest.mark.slow_except(dict(backend=["reference", "cpu"]), dict(is_known=False))
def test_rows_of_very_many_gradients(backend, counts, is_known):
    """Their sums are those of all positions, wherever the row begins and ends in the order."""
    generator = torch.Generator().manual_seed(0)
    table = _table(3, num_rows=len(counts))
    rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    if not is_known:  # positions without a row come behind all others, as many as a long row
        rows = torch.cat([rows, torch.full((2500,), -1)])
    rows = rows[torch.randperm(len(rows), generator=generator)]
    feature = Feature(table, rows, "none")
    # Small whole numbers: float32 sums are exact in every order.
    feature.buffer = torch.randint(-3, 4, feature.buffer.shape, generator=generator).float()
    table.storage.rows.write(torch.arange(len(counts)), torch.zeros(len(counts), 3), {})
    _update([feature], SGD, {HYPER_LR: 1.0, HYPER_CLIP: math.inf})
    wanted = torch.zeros(len(counts), 3).index_add_(0, rows[rows >= 0], -feature.buffer[rows >= 0])
    assert torch.equal(_state(table, len(counts))["weights"], wanted)


def test_gradients_of_a_row_are_added_in_the_order_of_the_batch():
    """The kernel's float32 sum of a row is that of a plain loop, bit by bit."""
    table = _table(1, num_rows=70)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 70, (40_000,), generator=generator)
    features = [Feature(table, part, "none").fill_gradient(generator) for part in rows.split(9000)]
    table.storage.rows.write(torch.arange(70), torch.zeros(70, 1), {})
    _update(features, SGD, {HYPER_LR: 1.0, HYPER_CLIP: math.inf})
    values = torch.cat([feature.buffer[:, 0] for feature in features]).numpy()
    sums = np.zeros(70, np.float32)
    for row, value in zip(rows.tolist(), values, strict=True):
        sums[row] += value
    assert torch.equal(_state(table, 70)["weights"][:, 0], -torch.from_numpy(sums))


def test_expanded_gradients_are_read_in_place(backend):
    """A gradient whose bags share memory (stride 0) counts for every bag."""
    table = _table(3)
    before = _state(table)["weights"]
    feature = Feature(table, torch.tensor([0, 1, 0, 2]), "none")
    feature.buffer = torch.tensor([1.0, 2.0, 3.0]).expand(4, 3)
    _update([feature], SGD, {HYPER_LR: 1.0, HYPER_CLIP: math.inf})
    moved = before - _state(table)["weights"]
    torch.testing.assert_close(moved[:4, 0], torch.tensor([2.0, 1.0, 1.0, 0.0]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.slow_except(
    dict(backend=["reference", "cpu"]), dict(backend="triton", rule=["sgd", "rowwise_adam"])
)
def test_nothing_to_update(backend, rule):
    """No ids, or none with a row, is a legal update that changes nothing."""
    table = _table(24, RULES[rule])
    before = _state(table)
    empty, nowhere = torch.empty(0, dtype=torch.int64), torch.full((40,), UNKNOWN)
    generator = torch.Generator().manual_seed(0)
    for rows in (empty, nowhere):
        gradients, keep = _gradients([Feature(table, rows, "sum", 4).fill_gradient(generator)])
        assert row_update.squared_norm(gradients) == 0
        row_update.update_rows_(gradients, RULES[rule])
        del keep
    after = _state(table)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("rule", [SGD, ROWWISE_ADAM])
def test_an_update_clears_the_marks_of_its_rows(backend, rule):
    """Marks of the rows with a gradient become 0, those of other rows and tables stay."""
    tables = [_table(24, rule, name=name) for name in ("a", "b", "c")]
    rows = [torch.tensor([0, 1, UNKNOWN, 0, 130]), torch.tensor([7, PADDING, 499])]
    positions = [*rows, torch.tensor([5])]
    features = [Feature(t, r, "none") for t, r in zip(tables, positions, strict=True)]
    generator = torch.Generator().manual_seed(0)
    features = [feature.fill_gradient(generator) for feature in features]
    marks = [np.full(NUM_ROWS + 1, 255, np.uint8) for _ in rows]
    gradients, (values, _) = _gradients(features)
    base = 0
    for line, column, table in zip(values[:2], marks, tables[:2], strict=True):
        line[HYPER_MARKS : HYPER_MARKS + 2].view(np.int64)[:] = column.ctypes.data - base
        base += len(table.storage.rows.addresses) << table.storage.rows.block_shift
    row_update.update_rows_(gradients, rule)
    for column, used in zip(marks, rows, strict=True):
        assert np.flatnonzero(column == 0).tolist() == used[used >= 0].unique().tolist()
        assert (np.delete(column, used[used >= 0].unique().numpy()) == 255).all()
