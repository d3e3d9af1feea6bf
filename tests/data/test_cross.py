"""Cross: hashes of words, and combinations of bags, against plain Python."""

import itertools

import pytest
import torch

from recis_lightning import Jagged
from recis_lightning.data import Cross, Features, Id, IdList, Number
from recis_lightning.data.cross import hash_words, hash_words_on_device

MASK = 2**64 - 1


def murmur(words):
    """MurmurHash64A of eight-byte words with seed 0, as RecIS combines the ids of a row."""
    m = 0xC6A4A7935BD1E995
    h = 8 * len(words) * m & MASK
    for word in words:
        k = (word & MASK) * m & MASK
        k = (k ^ (k >> 47)) * m & MASK
        h = (h ^ k) * m & MASK
    h = (h ^ (h >> 47)) * m & MASK
    h ^= h >> 47
    return h - 2**64 if h >= 2**63 else h


def expected(rows):
    """Return the crosses of rows of bags, each a list for each source."""
    return [
        [murmur(words) for words in itertools.product(*map(dict.fromkeys, bags))] for bags in rows
    ]


@pytest.mark.parametrize("width", [2, 3, 4])
def test_words(width):
    """On the CPU's kernel and by torch, with the ends of int64."""
    ends = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])
    random = torch.randint(-(2**63), 2**63 - 1, (50,), generator=torch.Generator().manual_seed(0))
    column = torch.cat([ends, random])
    columns = [column.roll(i) for i in range(width)]
    wanted = [murmur(words) for words in zip(*(c.tolist() for c in columns), strict=True)]
    assert hash_words(columns).tolist() == wanted
    assert hash_words_on_device(columns).tolist() == wanted
    assert hash_words([c[:0] for c in columns]).tolist() == []


def test_exact():
    """A vector that may never change: rows in tables are found by it."""
    cross = Features([Id("a"), Id("b")], [Cross("c", ["a", "b"])])
    assert cross({"a": [1, 2], "b": [10, -3]})["c"].tolist() == [murmur([1, 10]), murmur([2, -3])]
    assert murmur([1, 10]) == -719714192661687475


def test_bags():
    """Distinct ids of a row, in the order of first occurrence, the last source's fastest."""
    a = [[3, 1, 3], [], [5], [2, 2]]
    b = [[7, 8], [9], [], [4, 6, 4]]
    c = [1, 2, 3, 4]
    features = Features(
        [IdList("a"), IdList("b"), Id("c")],
        [Cross("ab", ["a", "b"]), Cross("bac", ["b", "a", "c"]), Cross("cc", ["c", "c"])],
    )
    assert features.num_passes == 1
    found = features({"a": a, "b": b, "c": c})
    for name, rows in {
        "ab": zip(a, b, strict=True),
        "bac": zip(b, a, [[x] for x in c], strict=True),
    }.items():
        wanted = expected(rows)
        assert found[name].lengths().tolist() == [len(row) for row in wanted]
        assert found[name].values.tolist() == [x for row in wanted for x in row]
        assert found[name].weights is None
    assert found["cc"].tolist() == [murmur([x, x]) for x in c]


def test_weights_multiply():
    """The first weight of an id that occurs twice; a source without weights counts 1."""
    features = Features(
        [IdList("a", weights="aw"), IdList("b", weights="bw"), Id("c")],
        [Cross("ab", ["a", "b"]), Cross("ac", ["c", "a"])],
    )
    found = features(
        {"a": [[3, 1, 3]], "aw": [[2.0, 3.0, 9.0]], "b": [[7, 8]], "bw": [[10.0, 100.0]], "c": [1]}
    )
    assert found["ab"].weights.tolist() == [20.0, 200.0, 30.0, 300.0]
    assert found["ac"].weights.tolist() == [2.0, 3.0]


def test_random_bags():
    generator = torch.Generator().manual_seed(1)

    def draw():
        lengths = torch.randint(0, 5, (40,), generator=generator)
        return [torch.randint(0, 4, (n,), generator=generator).tolist() for n in lengths.tolist()]

    a, b = draw(), draw()
    found = Features([IdList("a"), IdList("b")], [Cross("c", ["a", "b"])])({"a": a, "b": b})["c"]
    wanted = expected(zip(a, b, strict=True))
    assert found.values.tolist() == [x for row in wanted for x in row]
    assert found.lengths().tolist() == [len(row) for row in wanted]


def test_bad_arguments():
    for sources in (["a"], "ab", []):
        with pytest.raises(ValueError, match="sources: expected two or more names"):
            Cross("c", sources)
    features = Features([Id("a"), Number("b")], [Cross("c", ["a", "b"])])
    with pytest.raises(TypeError, match="transform Cross of 'c': expected int64 ids"):
        features({"a": [1], "b": [1]})
    features = Features([Id("a"), Id("b")], [Cross("c", ["a", "b"])])
    for shape in (2, 3), (2, 1):
        grid = torch.arange(shape[0] * shape[1]).view(shape)
        with pytest.raises(ValueError, match=r"Cross of 'c': expected one id a row, \[B\]"):
            features({"a": grid, "b": grid})
    features = Features([Id("a"), IdList("b")], [Cross("c", ["a", "b"])])
    with pytest.raises(ValueError, match=r"as many rows in all columns, got .*1.*2"):
        features({"a": torch.tensor([1]), "b": Jagged(torch.tensor([1]), torch.tensor([0, 0, 1]))})
