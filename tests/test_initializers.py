import math

import pytest
import torch

from recis_lightning import HashTable
from recis_lightning.initializers import (
    Constant,
    KaimingNormal,
    KaimingUniform,
    Normal,
    TruncatedNormal,
    Uniform,
    XavierNormal,
    XavierUniform,
)
from tests.helpers.sample_tables import insert_initial

ROWS, DIM = 8192, 16
IDS = {
    "consecutive": torch.arange(ROWS),
    "negative": -torch.arange(ROWS) - 1,
    "multiples of 2^32": torch.arange(ROWS) << 32,
    "multiples of 2^50": torch.arange(ROWS) << 50,
    "spread": torch.arange(ROWS) * 1_000_000_007,
}


def _sample(initializer, ids=IDS["consecutive"], dim=DIM):
    """Return float64 [ids, dim], first weights of a table."""
    table = HashTable(dim, initializer=initializer, name="sample")
    insert_initial(table, ids)
    return table.embeddings(ids).double()


def _normal_cdf(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _truncated_cdf(mean, std, a, b):
    low, high = (_normal_cdf(torch.tensor((bound - mean) / std).double()) for bound in (a, b))
    return lambda x: (_normal_cdf((x - mean) / std) - low) / (high - low)


def _distance(values, cdf):
    """Return the Kolmogorov-Smirnov distance of values from a distribution, in units of 1/sqrt n.

    Of independent values it is over 1.63 once in a hundred, over 1.95 once in a thousand.
    """
    values = values.flatten().sort().values
    n = values.numel()
    theory, steps = cdf(values), torch.arange(n + 1, dtype=torch.float64) / n
    gap = torch.maximum((theory - steps[:-1]).abs().max(), (theory - steps[1:]).abs().max())
    return gap.item() * math.sqrt(n)


def _truncated(mean, std, a, b):
    """Return an initializer, its cdf, mean and std (Johnson, Kotz and Balakrishnan, 13.10.1)."""
    law = torch.distributions.Normal(0.0, 1.0)
    low, high = torch.tensor([(a - mean) / std, (b - mean) / std], dtype=torch.float64)
    share = _normal_cdf(high) - _normal_cdf(low)
    at_low, at_high = law.log_prob(low).exp(), law.log_prob(high).exp()
    shift = (at_low - at_high) / share
    variance = 1 + (low * at_low - high * at_high) / share - shift**2
    moments = (mean + std * shift.item(), std * variance.sqrt().item())
    return TruncatedNormal(mean, std, a, b), _truncated_cdf(mean, std, a, b), *moments


DISTRIBUTIONS = [
    (Uniform(), lambda x: x, 0.5, math.sqrt(1 / 12)),
    (Uniform(-0.05, 0.15), lambda x: (x + 0.05) / 0.2, 0.05, 0.2 / math.sqrt(12)),
    (Normal(), _normal_cdf, 0.0, 1.0),
    (Normal(3.0, 0.01), lambda x: _normal_cdf((x - 3) / 0.01), 3.0, 0.01),
    _truncated(0.0, 1.0, -2.0, 2.0),
    _truncated(1.0, 2.0, 0.0, 9.0),
    _truncated(0.0, 1.0, 2.0, 3.0),
]


@pytest.mark.parametrize("ids", IDS)
def test_every_column_is_uniform_whatever_the_ids(ids):
    """Patterned ids get as uniform values as random ids do; other distributions use these."""
    values = _sample(Uniform(), IDS[ids])
    assert _distance(values, lambda x: x) < 1.95
    assert max(_distance(column, lambda x: x) for column in values.T) < 2.3


@pytest.mark.parametrize(
    ("initializer", "cdf", "mean", "std"), DISTRIBUTIONS, ids=[repr(d[0]) for d in DISTRIBUTIONS]
)
def test_weights_follow_the_distribution(initializer, cdf, mean, std):
    """Distance, mean, std and both tails are those of independent draws."""
    values = _sample(initializer)
    count = values.numel()
    assert _distance(values, cdf) < 1.95
    assert values.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(count))
    assert values.std().item() == pytest.approx(std, rel=0.01)
    below, above = (cdf(values) < 1e-3).sum().item(), (cdf(values) > 1 - 1e-3).sum().item()
    expected = count / 1000
    assert abs(below - expected) < 4.5 * math.sqrt(expected)
    assert abs(above - expected) < 4.5 * math.sqrt(expected)


@pytest.mark.parametrize("ids", IDS)
def test_columns_and_neighbouring_ids_are_independent(ids):
    """No two columns, consecutive ids or seeds are correlated, nor are their squares."""
    values = _sample(Normal(), IDS[ids])
    for sample in (values, (values.square() - 1) / math.sqrt(2)):
        scaled = sample.T @ sample / ROWS - torch.eye(DIM)
        off_diagonal = scaled - torch.diag(scaled.diagonal())
        assert off_diagonal.abs().max() < 5 / math.sqrt(ROWS)
        for lag in (1, 2, 64):
            product = (sample[:-lag] * sample[lag:]).mean()
            assert product.abs() < 4 / math.sqrt(ROWS * DIM)
            shifted = (sample[:-lag, 1:] * sample[lag:, :-1]).mean()
            assert shifted.abs() < 4 / math.sqrt(ROWS * DIM)


def test_rows_are_no_shorter_or_longer_than_chance_has_it():
    """Norms of rows follow the chi-squared law: the columns of a row are jointly independent."""
    norms = _sample(Normal()).square().sum(1)
    law = torch.distributions.Chi2(torch.tensor(float(DIM), dtype=torch.float64))
    assert _distance(norms, law.cdf) < 1.95


@pytest.mark.parametrize(
    "initializer",
    [
        TruncatedNormal(0.0, 1.0, -0.5, 0.25),
        TruncatedNormal(0.0, 0.01, -0.02, 0.02),
        TruncatedNormal(5.0, 1.0, -2.0, 2.0),
        TruncatedNormal(0.0, 1.0, 4.5, 6.0),
        TruncatedNormal(0.0, 1.0, -100.0, -4.9),
        TruncatedNormal(0.0, 1.0, -1e30, 1e30),
        TruncatedNormal(1.0, 1e-3, 0.9999, 1.0001),
        Uniform(-0.1, 0.1),
        Uniform(1000.0, 1000.001),
        Uniform(2.0, 2.0),
    ],
    ids=repr,
)
def test_bounds_hold(initializer):
    """Every weight is finite and within [a, b], to the last float32."""
    values = _sample(initializer).float()
    low, high = torch.tensor([initializer.a, initializer.b]).float()
    assert values.isfinite().all()
    assert (values >= low).all()
    assert (values <= high).all()


@pytest.mark.parametrize("dim", [1, 7, 64])
@pytest.mark.parametrize("gain", [0.5, 1.0])
@pytest.mark.parametrize("fan_in", [1, 100])
def test_xavier_spreads_as_torch_does(dim, gain, fan_in):
    """Bound and std are those of ``torch.nn.init`` for a layer of these fans."""
    layer = torch.empty(dim, fan_in, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    bound = gain * math.sqrt(6 / (dim + fan_in))
    torch.nn.init.xavier_uniform_(layer, gain, generator=generator)
    assert layer.abs().max() <= bound
    uniform = _sample(XavierUniform(gain, fan_in), torch.arange(4000), dim)
    assert uniform.abs().max() <= bound * (1 + 1e-6)
    assert uniform.abs().max() > 0.998 * bound
    normal = _sample(XavierNormal(gain, fan_in), torch.arange(4000), dim)
    assert normal.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"a": 0.5, "fan_in": 3},
        {"mode": "fan_out", "nonlinearity": "relu"},
        {"mode": "fan_out", "nonlinearity": "tanh", "fan_in": 9},
    ],
)
def test_kaiming_spreads_as_torch_does(settings):
    """The bound of one, the spread of the other, for a lookup as a one-hot product."""
    dim, given = 12, dict(settings)
    layer = torch.empty(dim, given.pop("fan_in", 1))  # [fan_out, fan_in], as of nn.Linear
    layer = layer.repeat(4000, 1).view(4000, dim, -1)
    generator = torch.Generator().manual_seed(0)
    for part in layer:
        torch.nn.init.kaiming_uniform_(part, **given, generator=generator)
    bound = layer.abs().max().item()
    uniform = _sample(KaimingUniform(**settings), torch.arange(4000), dim)
    assert uniform.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert uniform.std().item() == pytest.approx(layer.std().item(), rel=0.02)
    normal = _sample(KaimingNormal(**settings), torch.arange(4000), dim)
    assert normal.std().item() == pytest.approx(layer.std().item(), rel=0.02)
    assert normal.abs().max().item() > 1.5 * bound


def test_constant_is_exact():
    """Every weight is the given value."""
    assert (_sample(Constant(0.1)).float() == torch.tensor(0.1)).all()


def test_a_std_of_zero_gives_the_mean():
    """``Normal(mean, 0)`` is a constant, as in torch."""
    assert (_sample(Normal(0.3, 0.0)).float() == torch.tensor(0.3)).all()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "named"),
    [
        (Constant, {"val": NAN}, ValueError, "val"),
        (Constant, {"val": "0"}, TypeError, "val"),
        (Constant, {"val": True}, TypeError, "val"),
        (Uniform, {"a": 1.0, "b": 0.0}, ValueError, "b: .*a=1.0.*got 0.0"),
        (Uniform, {"b": INF}, ValueError, "b"),
        (Normal, {"std": -1.0}, ValueError, "std: .*-1.0"),
        (Normal, {"mean": None}, TypeError, "mean"),
        (TruncatedNormal, {"std": 0.0}, ValueError, "std"),
        (TruncatedNormal, {"a": 2.0, "b": 2.0}, ValueError, "b"),
        (TruncatedNormal, {"a": 6.0, "b": 7.0}, ValueError, "within 5 std"),
        (TruncatedNormal, {"a": -7.0, "b": -6.0}, ValueError, "within 5 std"),
        (XavierUniform, {"gain": -1.0}, ValueError, "gain"),
        (XavierNormal, {"fan_in": -1}, ValueError, "fan_in"),
        (XavierNormal, {"gain": "1"}, TypeError, "gain"),
        (KaimingUniform, {"fan_in": 0}, ValueError, "fan_in"),
        (KaimingNormal, {"mode": "fan"}, ValueError, "mode"),
        (KaimingNormal, {"nonlinearity": "gelus"}, ValueError, "nonlinearity"),
        (KaimingUniform, {"a": "1"}, TypeError, "a"),
    ],
)
def test_bad_arguments_are_named(kind, arguments, error, named):
    """The error names the argument and its value."""
    with pytest.raises(error, match=named):
        kind(**arguments)
