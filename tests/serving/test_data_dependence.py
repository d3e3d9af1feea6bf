"""Errors of models whose program would depend on values."""

import inspect

import pytest
import torch
from torch import nn

from recis_lightning import DynamicEmbedding, serving
from recis_lightning.serving.data_dependence import explain_dependence


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x


class Items(nn.Module):
    def forward(self, x):
        return x[: int(x.argmax())].sum(0) + x


class Listed(nn.Module):
    def forward(self, x):
        return x * torch.tensor([1.0 if v > 0 else 2.0 for v in x[:, 0].tolist()])[:, None]


class OfNumpy(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy() * 2)


class Model(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.user, self.gate = DynamicEmbedding(4, name="user"), nn.Sequential(nn.Identity(), part)
        self.user(torch.arange(5))

    def forward(self, ids):
        return self.gate(self.user(ids)).sum(1)


@pytest.mark.parametrize(
    ("part", "code", "advice"),
    [
        (Branch(), "if x.sum() > 0:", "write both ways with torch.where"),
        (Items(), "return x[: int(x.argmax())].sum(0) + x", "write both ways with torch.where"),
        (Listed(), "for v in x[:, 0].tolist()])[:, None]", "write both ways with torch.where"),
        (OfNumpy(), "return torch.from_numpy(x.numpy() * 2)", "cannot leave torch for numpy"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_line_and_the_module_are_named_and_nothing_is_printed(
    part, code, advice, tmp_path, capfd
):
    with pytest.raises(ValueError, match=r"^model: ") as refused:
        serving.export(Model(part), tmp_path / "served", example=torch.arange(3))
    lines, first = inspect.getsourcelines(type(part))
    line = first + next(n for n, text in enumerate(lines) if code in text)
    message = str(refused.value)
    assert f"{__file__}, line {line} (in 'gate.1', a {type(part).__name__}): " in message
    assert code in message
    assert advice in message
    assert capfd.readouterr().err == ""
    assert not list((tmp_path / "served").glob("*"))


def test_other_errors_are_left_alone():
    assert explain_dependence(RuntimeError("shapes differ"), Branch()) is None
    error = type("GuardOnDataDependentSymNode", (RuntimeError,), {})("u0")
    assert "its forward" in str(explain_dependence(error, Branch()))
