"""Hooks of an optimizer's step, and its region for profilers, as torch has them."""

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.optim import SparseDenseOptimizer, SparseSGD


def sparse():
    user = DynamicEmbedding(2, name="user")
    user(torch.arange(3)).sum().backward()
    return SparseSGD(hash_tables(user), lr=0.1)


def joined():
    weight = torch.nn.Parameter(torch.ones(1))
    return SparseDenseOptimizer(torch.optim.SGD([weight], lr=0.1), sparse())


@pytest.mark.parametrize("make", [sparse, joined])
def test_hooks_are_called_in_torch_s_order(make):
    optimizer, called = make(), []

    def note(name):
        return lambda one, args, kwargs: called.append(name) if one is optimizer else None

    handles = [
        optimizer.register_step_post_hook(note("own after")),
        optimizer.register_step_pre_hook(note("own before")),
        register_optimizer_step_pre_hook(note("before")),
        register_optimizer_step_post_hook(note("after")),
    ]
    optimizer.step()
    assert called == ["before", "own before", "own after", "after"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(called) == 4


def test_a_profiler_sees_the_step_as_torch_names_it():
    optimizer = sparse()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert any(event.key == "Optimizer.step#SparseSGD.step" for event in profile.key_averages())
    assert getattr(type(optimizer).step, "hooked", False)


def test_a_step_without_hooks_opens_no_region(monkeypatch):
    optimizer = sparse()
    monkeypatch.setattr(torch.autograd.profiler, "record_function", None)
    optimizer.step()


def test_a_schedule_knows_that_the_optimizer_stepped(recwarn):
    optimizer = sparse()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert not recwarn.list
