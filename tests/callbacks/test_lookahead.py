"""Lookahead: training under Lightning is as without it, to the bit."""

import pytest
import torch

from recis_lightning import EmbeddingEngine, EmbeddingOption
from recis_lightning.callbacks import Lookahead
from tests.helpers import rank_ahead_trainers as checks
from tests.helpers.lightning_model import Model


def test_fits_are_the_same_to_the_bit(ranks, tmp_path):
    """On two ranks; all batches but the first of an epoch are exchanged ahead."""
    ranks.run(2, checks.same_under_lightning, tmp_path, timeout_s=120)


def test_a_run_resumes_within_an_epoch(ranks, tmp_path):
    """From a checkpoint made with a batch read ahead."""
    ranks.run(2, checks.resumed, tmp_path, timeout_s=120)


def test_it_says_that_nothing_comes_of_it(ranks, tmp_path):
    """Where a hook changes all ids, and on one rank."""
    first, second = ranks.run(2, checks.useless, tmp_path)
    assert [text[:42] for text in first] == ["Lookahead: of 18 lookups begun ahead in 10"]
    assert second == []
    (alone,) = ranks.run(1, checks.useless, tmp_path)
    assert alone == ["Lookahead does nothing on one rank: there is no exchange of ids"]


def test_inputs_are_found_or_asked_for():
    """One engine, given the batch or an item of it; else an error says what is wanted."""
    engine = EmbeddingEngine({"a": EmbeddingOption(2), "b": EmbeddingOption(2)})
    one = torch.nn.ModuleDict({"engine": engine, "other": torch.nn.Linear(1, 1)})
    batch = {"a": torch.tensor([1]), "label": torch.tensor([1.0])}
    lookups_of = Lookahead()._bind(one)
    for given in (batch, (torch.ones(1), batch), [batch]):
        assert lookups_of(given) == [(engine, {"a": batch["a"]})]
    with pytest.raises(ValueError, match=r"inputs: expected a batch .* \(a, b\), got Tensor"):
        lookups_of(torch.ones(1))
    with pytest.raises(TypeError, match="inputs: expected a function, a method's name or None"):
        Lookahead(3)
    both = torch.nn.ModuleList([one, EmbeddingEngine({"c": EmbeddingOption(2)})])
    with pytest.raises(ValueError, match="for a module with 2 EmbeddingEngines; got None"):
        Lookahead()._bind(both)
    with pytest.raises(ValueError, match="name of a method of Model, got 'lookups'"):
        Lookahead("lookups")._bind(Model())
