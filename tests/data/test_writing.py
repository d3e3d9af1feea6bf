"""Rows back to Parquet: layouts, and a file that is there when it is complete."""

import pyarrow.parquet as pq
import pytest
import torch

from recis_lightning import Jagged, NestedJagged
from recis_lightning.data.writing import RowFile, to_arrow


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor([1, 2**62]), [1, 2**62]),
        (torch.tensor([True, False]), [True, False]),
        (torch.tensor([0.5, -1.0], dtype=torch.bfloat16), [0.5, -1.0]),
        (torch.arange(8.0).view(2, 2, 2).requires_grad_(), [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]),
        (torch.arange(6).view(3, 2).T, [[0, 2, 4], [1, 3, 5]]),
        (Jagged(torch.tensor([1, 2, 3]), torch.tensor([0, 2, 2, 3])), [[1, 2], [], [3]]),
        (torch.zeros(0), []),
    ],
)
def test_values(value, expected):
    assert to_arrow(value).to_pylist() == expected


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ([1], TypeError, "x: expected a Tensor or Jagged, got list"),
        (torch.tensor(1), ValueError, r"x: expected shape \[B, ...\]"),
        (torch.zeros(2, 0), ValueError, r"x: expected shape .* got \(2, 0\)"),
        (torch.zeros(2, dtype=torch.complex64), TypeError, "x: expected real numbers"),
    ],
)
def test_values_that_do_not_fit(tmp_path, value, error, words):
    with pytest.raises(error, match=words):
        RowFile(tmp_path / "a.parquet").append({"x": value})


def test_a_file_is_there_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "a.parquet"
    file = RowFile(path)
    file.append({"x": torch.tensor([1, 2])})
    file.append({"x": torch.tensor([3])})
    assert not path.exists()
    with pytest.raises(ValueError, match="columns: expected those of the first batch"):
        file.append({"x": torch.tensor([0.5])})
    with pytest.raises(ValueError, match=r"equally many rows, got \{'x': 1, 'y': 2\}"):
        file.append({"x": torch.tensor([1]), "y": torch.tensor([1, 2])})
    file.finish()
    assert pq.read_table(path)["x"].to_pylist() == [1, 2, 3]
    with pytest.raises(FileExistsError, match=r"a\.parquet exists"):
        RowFile(path)
    other = RowFile(tmp_path / "b.parquet")
    other.append({"x": torch.tensor([1])})
    other.abandon()
    assert [file.name for file in tmp_path.rglob("*.parquet*")] == ["a.parquet"]


def test_bags_of_bags_become_lists_of_lists():
    found = NestedJagged.from_lengths(
        torch.tensor([1, 2, 3]), torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1])
    )
    assert to_arrow(found).to_pylist() == [[[1, 2], []], [], [[3]]]
