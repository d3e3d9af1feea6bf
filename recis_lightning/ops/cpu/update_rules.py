"""Update rules of optimizers in Numba, over float vectors.

A rule is a function of some of a row's weights w and gradients g, the address of their first word
of state, and the row's ``Hyper``. It stores the state and returns the new weights;
``ops.row_update`` has the formulas. State with as many words as weights has its second part
``hyper.second`` bytes behind the first. A row-wise rule has one more function, which comes first:
of the address of the row's state, the bytes of its weights' worth of state, the address of the
hyperparameters, and the mean square of the row's whole gradient. ``DECAYS`` are functions of the
first three that return a factor of the row's decay, and come first too.
"""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

from recis_lightning.ops import layout as fields
from recis_lightning.ops.cpu.intrinsics import (
    add,
    at_least,
    at_most,
    div,
    fma,
    inlined,
    load_f32,
    load_like,
    mul,
    sign,
    splat_like,
    sqrt,
    store_f32,
    store_vector,
    sub,
)
from recis_lightning.ops.layout import (
    HYPER_ALPHA,
    HYPER_BETA,
    HYPER_INV_SQRT_BIAS2,
    HYPER_L1,
    HYPER_L2,
    HYPER_MOMENTUM,
    HYPER_OF_BUFFER,
    HYPER_OF_GRADIENT,
    HYPER_ONE_MINUS_BETA1,
    HYPER_ONE_MINUS_BETA2,
    HYPER_UPDATE,
)

_F = np.float32

# Vectors: minus the learning rate, eps, decay; addresses: of all hyperparameters, of the row's
# state; the bytes of its first part.
Hyper = namedtuple("Hyper", ["lr", "eps", "decay", "at", "state", "second"])


@inlined
def _of(g, hyper, field):
    return splat_like(g, load_f32(hyper.at + 4 * field))


@inlined
def sgd(w, g, state, hyper):
    return fma(hyper.lr, g, mul(w, hyper.decay))


@inlined
def momentum(w, g, state, hyper):
    m = fma(_of(g, hyper, HYPER_MOMENTUM), load_like(g, state), g)
    store_vector(state, m)
    u = fma(_of(g, hyper, HYPER_OF_GRADIENT), g, mul(_of(g, hyper, HYPER_OF_BUFFER), m))
    return fma(hyper.lr, u, w)


@inlined
def adagrad(w, g, state, hyper):
    s = fma(g, g, load_like(g, state))
    store_vector(state, s)
    return fma(hyper.lr, div(g, add(sqrt(s), hyper.eps)), w)


@inlined
def rowwise_adagrad_row(state, second, hyper, mean):
    store_f32(state, load_f32(state) + mean)


@inlined
def rowwise_adagrad(w, g, state, hyper):
    s = splat_like(g, load_f32(hyper.state))
    return fma(hyper.lr, div(g, add(sqrt(s), hyper.eps)), w)


@inlined
def rmsprop(w, g, state, hyper):
    v = load_like(g, state)
    v = fma(_of(g, hyper, HYPER_ONE_MINUS_BETA2), sub(mul(g, g), v), v)
    store_vector(state, v)
    return fma(hyper.lr, div(g, add(sqrt(v), hyper.eps)), w)


@inlined
def adam(w, g, state, hyper):
    share1, share2 = _of(g, hyper, HYPER_ONE_MINUS_BETA1), _of(g, hyper, HYPER_ONE_MINUS_BETA2)
    inverse = _of(g, hyper, HYPER_INV_SQRT_BIAS2)
    m, v = load_like(g, state), load_like(g, state + hyper.second)
    m = fma(share1, sub(g, m), m)
    v = fma(share2, sub(mul(g, g), v), v)
    store_vector(state, m)
    store_vector(state + hyper.second, v)
    return fma(hyper.lr, div(m, fma(sqrt(v), inverse, hyper.eps)), mul(w, hyper.decay))


@inlined
def _product(alpha, missed):
    """Return the product of ``max(0, 1 - alpha * j)`` over j from 1 to ``missed``, float64."""
    t = alpha * missed
    if t >= 1:
        return 0.0
    if missed <= 16:
        product, j = 1.0, 1.0
        while j <= missed:
            product *= 1 - alpha * j
            j += 1
        return product
    # Euler and Maclaurin's sum of log(1 - alpha * j): its integral, and corrections at the ends.
    u = 1 - t
    if t < 0.01:
        integral = missed * t * (1 / 2 + t * (1 / 6 + t * (1 / 12 + t / 20)))
    else:
        integral = (u * math.log(u) + t) / alpha
    return math.exp(math.log(u) / 2 + alpha / 12 * (1 - 1 / u) - integral)


@inlined
def adam_ar_decay(state, second, hyper):
    at, now = state + 2 * second, load_f32(hyper + 4 * HYPER_UPDATE)
    last = load_f32(at)
    store_f32(at, now)
    missed = now - last - _F(1)
    if last > 0 and missed > 0:
        return _F(_product(np.float64(load_f32(hyper + 4 * HYPER_ALPHA)), np.float64(missed)))
    return _F(1)


@inlined
def rowwise_adam_row(state, second, hyper, mean):
    v = load_f32(state + second)
    share = load_f32(hyper + 4 * HYPER_ONE_MINUS_BETA2)
    store_f32(state + second, v + share * (mean - v))


@inlined
def rowwise_adam(w, g, state, hyper):
    m = load_like(g, state)
    m = fma(_of(g, hyper, HYPER_ONE_MINUS_BETA1), sub(g, m), m)
    store_vector(state, m)
    root = sqrt(splat_like(g, load_f32(hyper.state + hyper.second)))
    divisor = fma(root, _of(g, hyper, HYPER_INV_SQRT_BIAS2), hyper.eps)
    return fma(hyper.lr, div(m, divisor), mul(w, hyper.decay))


@inlined
def ftrl(w, g, state, hyper):
    before = load_like(g, state)
    s = fma(g, g, before)
    root = sqrt(s)
    # The difference of the roots, without cancellation; the bound is against 0 / 0.
    growth = div(mul(g, g), at_least(add(root, sqrt(before)), splat_like(g, _F(1e-30))))
    z = add(load_like(g, state + hyper.second), g)
    z = fma(div(growth, hyper.lr), w, z)  # lr is negative
    store_vector(state, s)
    store_vector(state + hyper.second, z)
    l1, minus = _of(g, hyper, HYPER_L1), splat_like(g, -load_f32(hyper.at + 4 * HYPER_L1))
    excess = sub(z, at_least(at_most(z, l1), minus))
    divisor = sub(add(_of(g, hyper, HYPER_BETA), root), mul(hyper.lr, _of(g, hyper, HYPER_L2)))
    return div(mul(hyper.lr, excess), divisor)


@inlined
def lion(w, g, state, hyper):
    m = load_like(g, state)
    u = sign(fma(_of(g, hyper, HYPER_ONE_MINUS_BETA1), sub(g, m), m))
    store_vector(state, fma(_of(g, hyper, HYPER_ONE_MINUS_BETA2), sub(g, m), m))
    return fma(hyper.lr, u, mul(w, hyper.decay))


RULES = {
    fields.SGD: sgd,
    fields.MOMENTUM: momentum,
    fields.ADAGRAD: adagrad,
    fields.ROWWISE_ADAGRAD: rowwise_adagrad,
    fields.RMSPROP: rmsprop,
    fields.ADAM: adam,
    fields.ROWWISE_ADAM: rowwise_adam,
    fields.FTRL: ftrl,
    fields.LION: lion,
    fields.ADAM_AR: adam,
}
ROW_RULES = {
    fields.ROWWISE_ADAGRAD: rowwise_adagrad_row,
    fields.ROWWISE_ADAM: rowwise_adam_row,
}
DECAYS = {fields.ADAM_AR: adam_ar_decay}

__all__ = ["DECAYS", "ROW_RULES", "RULES", "Hyper"]
