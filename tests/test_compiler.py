"""Functions that Dynamo leaves alone, next to those of ``torch.compiler.disable``."""

from sys import getrefcount

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from recis_lightning import compiler

WAYS = [compiler.disable, torch.compiler.disable]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _double(x):
    return x * 2


@pytest.mark.parametrize("disable", WAYS)
def test_a_traced_caller_breaks_its_graph_there(disable):
    """What comes before and after is compiled; neither the function nor what it calls is."""
    seen = []

    def quadruple(x):
        seen.append((torch.compiler.is_compiling(), type(x)))
        return _double(_double(x))

    disabled = disable(quadruple)
    counter = CompileCounter()
    compiled = torch.compile(lambda x: disabled(x + 1) + 1, backend=counter)
    for _ in range(3):
        assert compiled(torch.ones(2)).tolist() == [9, 9]
    assert (counter.frame_count, counter.op_count) == (2, 2)
    assert seen == [(False, torch.Tensor)] * 3


@pytest.mark.parametrize("disable", WAYS)
def test_a_whole_graph_is_refused(disable):
    disabled = disable(_double)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
        torch.compile(lambda x: disabled(x) + 1, backend="eager", fullgraph=True)(torch.ones(2))


@pytest.mark.parametrize("disable", WAYS)
def test_a_module_with_a_disabled_forward_is_not_traced(disable):
    class Doubled(torch.nn.Module):
        @disable
        def forward(self, x):
            return _double(x)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.doubled = Doubled()

        def forward(self, x):
            return self.doubled(x + 1) + 1

    counter = CompileCounter()
    assert torch.compile(Model(), backend=counter)(torch.ones(2)).tolist() == [5, 5]
    assert (counter.frame_count, counter.op_count) == (2, 2)


def test_the_compiler_is_on_again_after_an_error():
    @compiler.disable
    def fail(x):
        raise KeyError(x)

    def caller(x):
        try:
            fail(1)
        except KeyError:
            x = x + 1
        return _double(x)

    counter = CompileCounter()
    assert torch.compile(caller, backend=counter)(torch.ones(2)).tolist() == [4, 4]
    assert counter.frame_count > 0


def test_arguments_have_as_many_references_as_with_torchs_own():
    """A backward pass counts them to know whether somebody else holds a gradient."""

    def count(*tensors):
        return getrefcount(tensors[0])

    own, torchs = (disable(count)(torch.ones(1)) for disable in WAYS)
    assert own == torchs > count(torch.ones(1)) - 1


def test_a_disabled_function_keeps_its_name():
    assert compiler.disable(_double).__qualname__ == "_double"
    assert compiler.disable(_double)(3) == 6
