"""held_gradients: what the caller can still overwrite is copied, and nothing else."""

import numpy as np
import pytest
import torch

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption, Jagged, hash_tables
from recis_lightning.initializers import Constant
from recis_lightning.optim import SparseSGD

IDS = torch.arange(12)
KEPT = []


def backward(out):
    gradient = torch.ones_like(out)
    out.backward(gradient)
    return gradient


def backward_of_a_view(out):
    gradient = torch.ones(out.numel())
    out.view(-1).backward(gradient)
    return gradient


def backward_with_a_view(out):
    gradient = torch.ones(2, *out.shape)
    out.backward(gradient[1])
    return gradient


def backward_with_a_view_of_nothing_held(out):
    gradient = torch.ones(out.numel()).view(out.shape)
    out.backward(gradient)
    return gradient


def backward_with_memory_of_numpy(out):
    gradient = np.ones(out.numel(), np.float32)
    out.backward(torch.from_numpy(gradient).view(out.shape))
    return torch.from_numpy(gradient)


def backward_of_several(out):
    gradient = torch.ones(2, *out.shape)
    torch.autograd.backward([out, out], list(gradient * 0.5), retain_graph=True)
    held = torch.zeros_like(out)
    torch.autograd.backward([out], [held])
    return held.fill_(7)


def hook_of_a_pass_with_a_graph(out):
    KEPT.clear()
    out.register_hook(KEPT.append)
    (out * torch.ones(4, requires_grad=True)).sum().backward(create_graph=True)
    return KEPT[0].detach()


def hook(out):
    KEPT.clear()
    out.register_hook(KEPT.append)
    (out * 1.0).sum().backward()
    return KEPT[0]


WAYS = [
    *(backward, backward_of_a_view, backward_with_a_view, backward_of_several, hook),
    *(backward_with_a_view_of_nothing_held, backward_with_memory_of_numpy),
    hook_of_a_pass_with_a_graph,
]


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_what_the_caller_holds_may_be_overwritten(way, shape):
    """The update is that of the gradient when it was handed over."""
    module = DynamicEmbedding(4, initializer=Constant(0.0), name="held")
    optimizer = SparseSGD([module.table], lr=1.0)
    held = way(module(IDS.view(shape)))
    held.zero_()
    optimizer.step()
    assert (module.table.embeddings(IDS) == -1).all()


class Own(torch.autograd.Function):
    """Function whose backward returns a buffer of its own."""

    buffer = torch.ones(12, 4)

    @staticmethod
    def forward(ctx, out):
        return out.sum()

    @staticmethod
    def backward(ctx, gradient):
        return Own.buffer.detach()


def a_detached_view(out):
    out.register_hook(lambda gradient: KEPT.append(gradient.detach()))
    (out * 1.0).sum().backward()
    return KEPT.pop()


def a_buffer_of_a_function(out):
    Own.apply(out).backward()
    return Own.buffer


@pytest.mark.parametrize("way", [a_detached_view, a_buffer_of_a_function])
def test_what_is_changed_all_the_same_is_an_error(way):
    """Never an update with other numbers than backward gave."""
    KEPT.clear()
    engine = EmbeddingEngine({n: EmbeddingOption(4, initializer=Constant(0.0)) for n in "ab"})
    optimizer = SparseSGD(hash_tables(engine), lr=1.0)
    out = engine(dict.fromkeys("ab", IDS))
    out["b"].sum().backward()
    held = way(out["a"])
    held.zero_()
    with pytest.raises(RuntimeError, match="table 'a': a gradient was changed in place between"):
        optimizer.step()
    assert all((table.embeddings(IDS) == 0).all() for table in hash_tables(engine))
    optimizer.zero_grad()
    engine(dict.fromkeys("ab", IDS))["a"].sum().backward()
    optimizer.step()
    assert (engine.tables["a"].embeddings(IDS) == -1).all()


def test_gradients_of_an_engine():
    """Of several outputs' gradients, those are copied that are held."""
    engine = EmbeddingEngine({n: EmbeddingOption(4, initializer=Constant(0.0)) for n in "abc"})
    optimizer = SparseSGD(hash_tables(engine), lr=1.0)
    out = engine(dict.fromkeys("abc", IDS))
    held = torch.ones(2, 12, 4)
    loss = (out["c"] * 1.0).sum()
    torch.autograd.backward([out["a"], out["b"], loss], [held[0], held[1], None])
    held.zero_()
    optimizer.step()
    assert all((table.embeddings(IDS) == -1).all() for table in hash_tables(engine))


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b, c: torch.stack([a, b, c]) * 2,
        lambda a, b, c: [a * 2, b * 3, c.view(4, 12) * 2],
        lambda a, b, c: [torch.cat([a, b]) * 2, c.view(4, 12) * 2],
        lambda a, b, c: [a.view(4, 12) * 2, b.view(48) * 2, c.view(2, 24) * 2],
        lambda a, b, c: [c * 2],
    ],
)
def test_no_gradient_of_autograd_is_copied(loss, monkeypatch):
    """Of one base or several, and none."""
    engine = EmbeddingEngine({name: EmbeddingOption(4) for name in "abc"})
    parts = loss(*engine(dict.fromkeys("abc", IDS)).values())
    total = sum(part.sum() for part in parts)
    monkeypatch.setattr(torch.Tensor, "clone", None)
    total.backward()
    assert hash_tables(engine)[2].pending


def test_what_autograd_made_is_not_copied():
    """Views of a joint gradient lie in its memory, and a layer's gradient is taken as it is."""
    engine = EmbeddingEngine({name: EmbeddingOption(4) for name in "abc"})
    out = engine(dict.fromkeys("abc", IDS))
    (torch.cat(list(out.values()), 1) * 2).sum().backward()
    tensors = hash_tables(engine)[0].pending[0].keep
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1

    module, seen = DynamicEmbedding(4), []
    out = module(IDS)
    out.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    torch.nn.Linear(4, 2)(out).sum().backward()
    assert module.table.pending[0].keep[0].data_ptr() == seen[0]


def test_negated_views_keep_their_sign():
    """A gradient may be a view whose memory holds the negative values."""
    module = DynamicEmbedding(4, initializer=Constant(0.0), name="negative")
    optimizer = SparseSGD([module.table], lr=1.0)
    module(IDS).backward(torch._neg_view(torch.ones(12, 4)))
    optimizer.step()
    assert (module.table.embeddings(IDS) == 1).all()


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_gradient_is_not_differentiated_again():
    """Only the first derivative is known: torch says so, and does not take it for zero."""
    engine = EmbeddingEngine({"bag": EmbeddingOption(4, mode="sum")})
    SparseSGD(hash_tables(engine), lr=1.0)
    weights = torch.ones(12, requires_grad=True)
    factor = torch.ones(4, requires_grad=True)
    batch = {"bag": Jagged(IDS, torch.tensor([0, 5, 12]), weights)}
    (engine(batch)["bag"] * factor).sum().backward(create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        weights.grad.sum().backward()
