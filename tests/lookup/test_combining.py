"""Combiners of the user's own, in the engine's outputs and in concat."""

import copy
import io

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from recis_lightning import EmbeddingEngine, EmbeddingOption, Jagged, hash_tables
from recis_lightning.optim import SparseSGD

IDS, OFFSETS = torch.tensor([7, 9, 7, 8, 3, 3]), torch.tensor([0, 2, 2, 6])
RAGGED = Jagged(IDS, OFFSETS)


def segment_max(rows, offsets):
    return torch.segment_reduce(rows, "max", offsets=offsets, initial=0.0)


def sums(rows, offsets):
    return torch.segment_reduce(rows, "sum", offsets=offsets)


class Attention(nn.Module):
    """Softmax-weighted sum of each bag, with a weight of its own."""

    def __init__(self, dim):
        super().__init__()
        self.query = nn.Parameter(torch.linspace(-1, 1, dim))

    def forward(self, rows, offsets):
        scores = (rows @ self.query).exp()[:, None]
        both = torch.segment_reduce(torch.cat([rows * scores, scores], 1), "sum", offsets=offsets)
        return both[:, :-1] / both[:, -1:].clamp(min=1e-9)


def engine_of(combiner, **more):
    options = {
        "tags": EmbeddingOption(4, table="item", combiner=combiner, **more),
        "item": EmbeddingOption(4, table="item"),
    }
    return EmbeddingEngine(options)


def test_a_sum_by_hand_is_mode_sum():
    """Values and updates of the rows, with weights and padding; ragged, dense and flat."""
    for feature in (RAGGED, RAGGED._replace(weights=torch.arange(6.0)), IDS.view(2, 3), IDS):
        engines = [
            EmbeddingEngine({"tags": EmbeddingOption(4, padding_idx=8, combiner=sums)}),
            EmbeddingEngine({"tags": EmbeddingOption(4, padding_idx=8, mode="sum")}),
        ]
        for engine in engines:
            sparse = SparseSGD(hash_tables(engine), lr=0.5)
            out = engine({"tags": feature})["tags"]
            (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
            sparse.step()
            engine.eval()
        found, expected = (engine({"tags": feature})["tags"] for engine in engines)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(2, 3), (6,), (1, 2, 3), (0, 3)])
def test_shapes_of_dense_ids(shape):
    """The last dimension of two or more is the bag; ids [B, S, L] give [B, S, ...]."""
    ids = IDS[: int(torch.tensor(shape).prod())].view(shape)
    out = engine_of(segment_max)({"tags": ids})["tags"]
    assert out.shape == (*(shape if len(shape) == 1 else shape[:-1]), 4)
    given = []
    engine_of(lambda rows, offsets: given.append((rows.shape[0], offsets.tolist())) or rows)(
        {"tags": torch.tensor([4, 5, 6])}
    )
    assert given == [(3, [0, 1, 2, 3])]


def test_concat_puts_it_at_its_columns():
    """Where its width is known; the gradient is that of the dictionary's outputs."""
    engine = engine_of(lambda rows, offsets: sums(rows, offsets)[:, :3], combiner_width=3)
    batch = {"tags": RAGGED, "item": torch.tensor([7, 8, 9])}
    assert engine.widths == {"tags": 3, "item": 4}
    joined, found = engine.concat(batch), engine(batch)
    assert torch.equal(joined, torch.cat([found["tags"], found["item"]], 1))
    assert engine.concat({**batch, "label": 3}).requires_grad
    known = len(engine.tables["item"])
    with pytest.raises(
        ValueError, match=r"item: concat needs as many samples .* 'tags' has 3; got"
    ):
        engine.concat({**batch, "item": torch.tensor([70, 80])})
    with pytest.raises(ValueError, match="item: concat needs one id a sample of a feature of mode"):
        engine.concat({**batch, "item": torch.tensor([[70, 80]] * 3)})
    assert len(engine.tables["item"]) == known
    with pytest.raises(ValueError, match="tags: its combiner may return any width"):
        engine_of(sums).concat(batch)


def test_a_module_trains_with_the_engine():
    """Its parameters are the engine's; copies, pickles and state dicts have their own."""
    engine = engine_of(Attention(4), combiner_width=4)
    assert [name for name, _ in engine.named_parameters() if "anchor" not in name] == [
        "combiners.tags.query"
    ]
    batch = {"tags": RAGGED}
    engine(batch)["tags"].sum().backward()
    assert engine.combiners["tags"].query.grad.abs().sum() > 0
    engine.zero_grad()
    file = io.BytesIO()
    torch.save(engine, file)
    file.seek(0)
    twins = [copy.deepcopy(engine), torch.load(file, weights_only=False), engine_of(Attention(4))]
    twins[2].load_state_dict(engine.state_dict())
    expected = engine.eval()(batch)["tags"]
    for twin in twins:
        assert torch.equal(twin.eval()(batch)["tags"], expected)
        with torch.no_grad():
            twin.combiners["tags"].query.zero_()
        assert not torch.equal(twin(batch)["tags"], expected)
    assert torch.equal(engine(batch)["tags"], expected)


def test_missing_features_call_no_combiner():
    """Nor does a batch without any of its ids fail."""
    engine = engine_of(sums)
    assert list(engine({"item": torch.tensor([1])})) == ["item"]
    empty = Jagged(IDS[:0], torch.tensor([0, 0]))
    assert engine({"tags": empty})["tags"].tolist() == [[0.0] * 4]
    assert engine({"tags": Jagged(IDS[:0], torch.tensor([0]))})["tags"].shape == (0, 4)


@pytest.mark.parametrize(
    ("combiner", "error", "words"),
    [
        (lambda rows, offsets: 3, TypeError, "tags: its combiner must return a Tensor, got int"),
        (
            lambda rows, offsets: rows,
            ValueError,
            r"tags: its combiner must return \[3, 2\], got \[6",
        ),
        (sums, ValueError, r"tags: its combiner must return \[3, 2\], got \[3, 4\]"),
        (lambda rows, offsets: rows.sum(), ValueError, r"must return \[3, 2\], got \[\]"),
    ],
)
def test_wrong_outputs(combiner, error, words):
    """The error names the feature, what was wanted and what came."""
    with pytest.raises(error, match=words):
        engine_of(combiner, combiner_width=2)({"tags": RAGGED})


def test_yaml_names_a_function():
    """By its import path, as jsonargparse does."""
    parser = ArgumentParser()
    parser.add_class_arguments(EmbeddingOption, "option")
    option = parser.instantiate_classes(
        parser.parse_string(
            "option: {embedding_dim: 4, combiner: torch.atleast_2d, combiner_width: 4}"
        )
    ).option
    assert option.combiner is torch.atleast_2d
