"""Update rules of optimizers in plain torch.

A rule is a function of weights w and reduced gradients g, float64 [n, dim], a view of the rows'
state, float32 [n, words], and hyperparameters h, float64 [HYPER_SIZE, n, 1]. It changes the state
and returns the new weights; ``ops.row_update`` has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recis_lightning.ops import layout as fields

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def sgd(w: Tensor, g: Tensor, state: Tensor, h: Tensor) -> Tensor:
    return w * h[fields.HYPER_DECAY] - h[fields.HYPER_LR] * g


def momentum(w: Tensor, g: Tensor, state: Tensor, h: Tensor) -> Tensor:
    m = h[fields.HYPER_MOMENTUM] * state.double() + g
    state.copy_(m)
    u = h[fields.HYPER_OF_BUFFER] * m + h[fields.HYPER_OF_GRADIENT] * g
    return w - h[fields.HYPER_LR] * u


def adagrad(w: Tensor, g: Tensor, state: Tensor, h: Tensor) -> Tensor:
    s = state.double() + g.square()
    state.copy_(s)
    return w - h[fields.HYPER_LR] * g / (s.sqrt() + h[fields.HYPER_EPS])


def rowwise_adagrad(w: Tensor, g: Tensor, state: Tensor, h: Tensor) -> Tensor:
    s = state.double() + g.square().mean(1, keepdim=True)
    state.copy_(s)
    return w - h[fields.HYPER_LR] * g / (s.sqrt() + h[fields.HYPER_EPS])


def rmsprop(w: Tensor, g: Tensor, state: Tensor, h: Tensor) -> Tensor:
    v = state.double()
    v = v + h[fields.HYPER_ONE_MINUS_BETA2] * (g.square() - v)
    state.copy_(v)
    return w - h[fields.HYPER_LR] * g / (v.sqrt() + h[fields.HYPER_EPS])


def _adam(w: Tensor, g: Tensor, state: Tensor, h: Tensor, squares: Tensor) -> Tensor:
    dim = w.shape[1]
    m, v = state[:, :dim].double(), state[:, dim:].double()
    m = m + h[fields.HYPER_ONE_MINUS_BETA1] * (g - m)
    v = v + h[fields.HYPER_ONE_MINUS_BETA2] * (squares - v)
    state.copy_(torch.cat([m, v], 1))
    root = v.sqrt() * h[fields.HYPER_INV_SQRT_BIAS2] + h[fields.HYPER_EPS]
    return w * h[fields.HYPER_DECAY] - h[fields.HYPER_LR] * m / root


def adam(w: Tensor, g: Tensor, state: Tensor, h: Tensor) -> Tensor:
    return _adam(w, g, state, h, g.square())


def rowwise_adam(w: Tensor, g: Tensor, state: Tensor, h: Tensor) -> Tensor:
    return _adam(w, g, state, h, g.square().mean(1, keepdim=True))


def adam_ar(w: Tensor, g: Tensor, state: Tensor, h: Tensor) -> Tensor:
    last, now = state[:, -1:].double(), h[fields.HYPER_UPDATE]
    missed = torch.where(last > 0, now - last - 1, 0.0)
    shrink = torch.ones_like(missed)
    for j in range(1, int(missed.max()) + 1 if len(missed) else 0):
        factor = (1 - h[fields.HYPER_ALPHA] * j).clamp(min=0)
        shrink = torch.where(missed >= j, shrink * factor, shrink)
    state[:, -1:] = now
    return _adam(w * shrink, g, state[:, :-1], h, g.square())


def ftrl(w: Tensor, g: Tensor, state: Tensor, h: Tensor) -> Tensor:
    dim, lr, l1 = w.shape[1], h[fields.HYPER_LR], h[fields.HYPER_L1]
    s, z = state[:, :dim].double(), state[:, dim:].double()
    before, s = s.sqrt(), s + g.square()
    z = z + g - (s.sqrt() - before) / lr * w
    state.copy_(torch.cat([s, z], 1))
    excess = z - torch.minimum(torch.maximum(z, -l1), l1)
    return -lr * excess / (h[fields.HYPER_BETA] + s.sqrt() + lr * h[fields.HYPER_L2])


def lion(w: Tensor, g: Tensor, state: Tensor, h: Tensor) -> Tensor:
    m = state.double()
    u = (m + h[fields.HYPER_ONE_MINUS_BETA1] * (g - m)).sign()
    state.copy_(m + h[fields.HYPER_ONE_MINUS_BETA2] * (g - m))
    return w * h[fields.HYPER_DECAY] - h[fields.HYPER_LR] * u


RULES: dict[int, Rule] = {
    fields.SGD: sgd,
    fields.MOMENTUM: momentum,
    fields.ADAGRAD: adagrad,
    fields.ROWWISE_ADAGRAD: rowwise_adagrad,
    fields.RMSPROP: rmsprop,
    fields.ADAM: adam,
    fields.ROWWISE_ADAM: rowwise_adam,
    fields.FTRL: ftrl,
    fields.LION: lion,
    fields.ADAM_AR: adam_ar,
}

__all__ = ["RULES"]
