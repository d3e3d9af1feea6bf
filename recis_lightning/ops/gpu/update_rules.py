"""Update rules of optimizers in Triton, over the rows of a program.

A rule is a function of weights w and gradients g, [rows, COLUMNS], the addresses of the rows' state
and of their hyperparameters, int64 [rows], ``mask`` [rows] of the rows that are updated, and
``cells`` [rows, COLUMNS] of their weights, as far as it needs them. It stores the state and
returns the new weights; ``ops.row_update`` has the formulas.
"""

import triton.language as tl

from recis_lightning.ops.gpu.layout import (
    ADAGRAD,
    ADAM,
    ADAM_AR,
    FTRL,
    HYPER_ALPHA,
    HYPER_BETA,
    HYPER_DECAY,
    HYPER_EPS,
    HYPER_INV_SQRT_BIAS2,
    HYPER_L1,
    HYPER_L2,
    HYPER_LR,
    HYPER_MOMENTUM,
    HYPER_OF_BUFFER,
    HYPER_OF_GRADIENT,
    HYPER_ONE_MINUS_BETA1,
    HYPER_ONE_MINUS_BETA2,
    HYPER_UPDATE,
    LION,
    MOMENTUM,
    RMSPROP,
    ROWWISE_ADAGRAD,
    ROWWISE_ADAM,
    SGD,
)
from recis_lightning.ops.gpu.runtime import cells_at, device_function, float_at, sum_over


@device_function
def hyper_at(address, number: tl.constexpr, mask):
    """Load a hyperparameter of each row, [rows, 1]."""
    return tl.load(float_at(address + 4 * number), mask, 1)[:, None]


@device_function
def _sgd(w, g, hyper, lr, mask):
    return w * hyper_at(hyper, HYPER_DECAY, mask) - lr * g


@device_function
def _momentum(w, g, state, hyper, lr, column, mask, cells, ALIGNED: tl.constexpr):
    at = cells_at(float_at(state), column, ALIGNED)
    m = hyper_at(hyper, HYPER_MOMENTUM, mask) * tl.load(at, cells, 0) + g
    tl.store(at, m, cells)
    u = hyper_at(hyper, HYPER_OF_BUFFER, mask) * m + hyper_at(hyper, HYPER_OF_GRADIENT, mask) * g
    return w - lr * u


@device_function
def _adagrad(w, g, state, hyper, lr, column, mask, cells, ALIGNED: tl.constexpr):
    at = cells_at(float_at(state), column, ALIGNED)
    s = tl.load(at, cells, 0) + g * g
    tl.store(at, s, cells)
    return w - lr * (g / (tl.sqrt(s) + hyper_at(hyper, HYPER_EPS, mask)))


@device_function
def _rowwise_adagrad(w, g, state, hyper, lr, mask, DIM: tl.constexpr):
    s = tl.load(float_at(state), mask, 0) + sum_over(g * g, 1) / DIM
    # Warps that share a row load the same word, and only one of them stores it.
    tl.debug_barrier()
    tl.store(float_at(state), s, mask)
    return w - lr * (g / (tl.sqrt(s)[:, None] + hyper_at(hyper, HYPER_EPS, mask)))


@device_function
def _rmsprop(w, g, state, hyper, lr, column, mask, cells, ALIGNED: tl.constexpr):
    at = cells_at(float_at(state), column, ALIGNED)
    v = tl.load(at, cells, 0)
    v = v + hyper_at(hyper, HYPER_ONE_MINUS_BETA2, mask) * (g * g - v)
    tl.store(at, v, cells)
    return w - lr * (g / (tl.sqrt(v) + hyper_at(hyper, HYPER_EPS, mask)))


@device_function
def _adam(w, g, state, hyper, lr, column, mask, cells, DIM: tl.constexpr, ALIGNED: tl.constexpr):
    at1 = cells_at(float_at(state), column, ALIGNED)
    at2 = cells_at(float_at(state + 4 * DIM), column, ALIGNED)
    m, v = tl.load(at1, cells, 0), tl.load(at2, cells, 0)
    m = m + hyper_at(hyper, HYPER_ONE_MINUS_BETA1, mask) * (g - m)
    v = v + hyper_at(hyper, HYPER_ONE_MINUS_BETA2, mask) * (g * g - v)
    tl.store(at1, m, cells)
    tl.store(at2, v, cells)
    inv_sqrt_bias2 = hyper_at(hyper, HYPER_INV_SQRT_BIAS2, mask)
    root = tl.sqrt(v) * inv_sqrt_bias2 + hyper_at(hyper, HYPER_EPS, mask)
    return w * hyper_at(hyper, HYPER_DECAY, mask) - lr * (m / root)


@device_function
def _product(alpha, missed):
    """Return the product of ``max(0, 1 - alpha * j)`` over j from 1 to ``missed``, float64."""
    t = alpha * missed
    few = tl.where(t < 1, 1.0, t * 0)
    for j in tl.static_range(1, 17):
        few = tl.where(j <= missed, few * (1 - alpha * j), few)
    # Euler and Maclaurin's sum of log(1 - alpha * j): its integral, and corrections at the ends.
    u = tl.where(t < 1, 1 - t, 1.0)
    series = missed * t * (1 / 2 + t * (1 / 6 + t * (1 / 12 + t / 20)))
    integral = (u * tl.log(u) + t) / tl.where(alpha > 0, alpha, 1.0)
    integral = tl.where(t < 0.01, series, integral)
    many = tl.exp(tl.log(u) / 2 + alpha / 12 * (1 - 1 / u) - integral)
    return tl.where(t >= 1, t * 0, tl.where(missed <= 16, few, many))


@device_function
def _adam_ar(w, g, state, hyper, lr, column, mask, cells, DIM: tl.constexpr, ALIGNED: tl.constexpr):
    at = float_at(state + 8 * DIM)
    last = tl.load(at, mask, 0)
    now = tl.load(float_at(hyper + 4 * HYPER_UPDATE), mask, 1)
    missed = now - last - 1
    missed = tl.where((last > 0) & (missed > 0), missed, 0.0).to(tl.float64)
    alpha = tl.load(float_at(hyper + 4 * HYPER_ALPHA), mask, 0).to(tl.float64)
    w = w * _product(alpha, missed).to(tl.float32)[:, None]
    tl.debug_barrier()  # as above
    tl.store(at, now, mask)
    return _adam(w, g, state, hyper, lr, column, mask, cells, DIM, ALIGNED)


@device_function
def _rowwise_adam(
    w, g, state, hyper, lr, column, mask, cells, DIM: tl.constexpr, ALIGNED: tl.constexpr
):
    at = cells_at(float_at(state), column, ALIGNED)
    at_row = float_at(state + 4 * DIM)
    m, v = tl.load(at, cells, 0), tl.load(at_row, mask, 0)[:, None]
    m = m + hyper_at(hyper, HYPER_ONE_MINUS_BETA1, mask) * (g - m)
    mean = (sum_over(g * g, 1) / DIM)[:, None]
    v = v + hyper_at(hyper, HYPER_ONE_MINUS_BETA2, mask) * (mean - v)
    tl.debug_barrier()  # as above
    tl.store(at, m, cells)
    tl.store(at_row[:, None], v, mask[:, None])
    inv_sqrt_bias2 = hyper_at(hyper, HYPER_INV_SQRT_BIAS2, mask)
    root = tl.sqrt(v) * inv_sqrt_bias2 + hyper_at(hyper, HYPER_EPS, mask)
    return w * hyper_at(hyper, HYPER_DECAY, mask) - lr * (m / root)


@device_function
def _ftrl(w, g, state, hyper, lr, column, mask, cells, DIM: tl.constexpr, ALIGNED: tl.constexpr):
    at1 = cells_at(float_at(state), column, ALIGNED)
    at2 = cells_at(float_at(state + 4 * DIM), column, ALIGNED)
    before, z = tl.load(at1, cells, 0), tl.load(at2, cells, 0)
    s = before + g * g
    root = tl.sqrt(s)
    # The difference of the roots, without cancellation; the bound is against 0 / 0.
    growth = (g * g) / tl.maximum(root + tl.sqrt(before), 1e-30)
    z = z + g - growth / lr * w
    tl.store(at1, s, cells)
    tl.store(at2, z, cells)
    l1 = hyper_at(hyper, HYPER_L1, mask)
    excess = tl.where(z > l1, z - l1, tl.where(z < -l1, z + l1, z * 0))
    l2 = hyper_at(hyper, HYPER_L2, mask)
    return -lr * excess / (hyper_at(hyper, HYPER_BETA, mask) + root + lr * l2)


@device_function
def _lion(w, g, state, hyper, lr, column, mask, cells, ALIGNED: tl.constexpr):
    at = cells_at(float_at(state), column, ALIGNED)
    m = tl.load(at, cells, 0)
    u = m + hyper_at(hyper, HYPER_ONE_MINUS_BETA1, mask) * (g - m)
    u = tl.where(u > 0, 1.0, tl.where(u < 0, -1.0, u))  # NaN stays
    tl.store(at, m + hyper_at(hyper, HYPER_ONE_MINUS_BETA2, mask) * (g - m), cells)
    return w * hyper_at(hyper, HYPER_DECAY, mask) - lr * u


@device_function
def apply_rule(
    w,
    g,
    state,
    hyper,
    column,
    mask,
    cells,
    RULE: tl.constexpr,
    DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Return the new weights, and store the new state, of a program's rows."""
    lr = hyper_at(hyper, HYPER_LR, mask)
    if RULE == SGD:
        w = _sgd(w, g, hyper, lr, mask)
    if RULE == MOMENTUM:
        w = _momentum(w, g, state, hyper, lr, column, mask, cells, ALIGNED)
    if RULE == ADAGRAD:
        w = _adagrad(w, g, state, hyper, lr, column, mask, cells, ALIGNED)
    if RULE == ROWWISE_ADAGRAD:
        w = _rowwise_adagrad(w, g, state, hyper, lr, mask, DIM)
    if RULE == RMSPROP:
        w = _rmsprop(w, g, state, hyper, lr, column, mask, cells, ALIGNED)
    if RULE == ADAM:
        w = _adam(w, g, state, hyper, lr, column, mask, cells, DIM, ALIGNED)
    if RULE == ROWWISE_ADAM:
        w = _rowwise_adam(w, g, state, hyper, lr, column, mask, cells, DIM, ALIGNED)
    if RULE == FTRL:
        w = _ftrl(w, g, state, hyper, lr, column, mask, cells, DIM, ALIGNED)
    if RULE == LION:
        w = _lion(w, g, state, hyper, lr, column, mask, cells, ALIGNED)
    if RULE == ADAM_AR:
        w = _adam_ar(w, g, state, hyper, lr, column, mask, cells, DIM, ALIGNED)
    return w


__all__ = ["apply_rule", "hyper_at"]
