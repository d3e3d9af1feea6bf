"""Checks of arguments: valid values come back, errors name the argument and the value."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from recis_lightning import EmbeddingOption, HashTable
from recis_lightning.admission import MinCount
from recis_lightning.arguments import (
    check_bound,
    check_dtype,
    check_embedding_dim,
    check_folder,
    check_ids,
    check_int,
    check_padding_idx,
    check_path,
    check_seed,
    check_str,
    is_plain_cpu,
)
from recis_lightning.callbacks import HashTableFilterHook, LoggerHook, TraceHook
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.initializers import Normal
from recis_lightning.optim import SparseAdam


def test_valid_values_are_returned():
    ids = torch.arange(3)
    assert check_int("n", 2, least=2) == 2
    assert check_str("name", "user") == "user"
    assert check_embedding_dim(1) == 1
    assert check_dtype("bfloat16") is check_dtype(torch.bfloat16) is torch.bfloat16
    assert check_ids(ids) is ids
    assert check_padding_idx(None) is None
    assert check_padding_idx(-(2**63)) == -(2**63)
    check_bound("p", 0.0, high=1.0)


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: check_int("n", True, 1), TypeError, r"n: expected an int >= 1, got True"),
        (lambda: check_int("n", 0, 1), ValueError, r"n: expected an int >= 1, got 0"),
        (lambda: check_int("n", 0, 1, " or None"), ValueError, r">= 1 or None, got 0"),
        (lambda: check_str("name", 3), TypeError, r"name: expected a str, got int \(3\)"),
        (lambda: check_embedding_dim(0), ValueError, r"embedding_dim: expected an int >= 1"),
        (lambda: check_dtype(torch.float16), ValueError, r"or torch.bfloat16, got torch.float16"),
        (lambda: check_ids([1]), TypeError, r"ids: expected a Tensor of int64 or int32, got list"),
        (lambda: check_ids(torch.ones(1), "keys"), TypeError, r"keys: .* got torch.float32"),
        (lambda: check_padding_idx(1.0), TypeError, r"padding_idx: expected an int or None"),
        (lambda: check_padding_idx(2**63), ValueError, r"padding_idx: expected an int64"),
        (lambda: check_bound("p", 1.0, high=1.0), ValueError, r"p: .* in \[0.0, 1.0\), got 1.0"),
        (lambda: check_bound("p", "1"), TypeError, r"p: expected a number >= 0.0, got '1'"),
        (lambda: check_bound("p", None), TypeError, r"p: expected a number >= 0.0, got None"),
        (lambda: check_embedding_dim(HashTable(2)), TypeError, "options are for an engine"),
        (lambda: check_bound("p", math.nan), ValueError, r"p: expected a number >= 0.0, got nan"),
    ],
)
def test_errors_name_argument_and_value(check, error, message):
    with pytest.raises(error, match=message):
        check()


@pytest.mark.parametrize("value", [2**63, 2**64, 10**30])
def test_ints_beyond_int64_are_refused_where_they_are_given(value):
    """Not when a kernel or a tensor gets them."""
    with pytest.raises(ValueError, match=rf"n: expected an int <= 2\*\*63 - 1, got {value}"):
        check_int("n", value, least=1)
    assert check_int("n", 2**63 - 1, least=1) == 2**63 - 1
    with pytest.raises(ValueError, match="k: expected an int <= 255, got 256"):
        check_int("k", 256, least=1, most=255)


def test_a_seed_is_one_that_torch_takes():
    assert [check_seed(seed) for seed in (-(2**63), 0, 2**64 - 1)] == [-(2**63), 0, 2**64 - 1]
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match="seed: expected an int in"):
            check_seed(seed)
    with pytest.raises(TypeError, match=r"seed: expected int, got 1\.5"):
        check_seed(1.5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GlobalStepFilter(filter_steps=3), "GlobalStepFilter .* did you mean filter_step"),
        (lambda: MinCount(), r"k: MinCount needs it; write MinCount\(k=\.\.\.\)"),
        (lambda: Normal(stdev=1.0), "stdev: Normal has none; did you mean std"),
        (lambda: HashTableFilterHook(interval=3), "interval: .* did you mean filter_interval"),
        (lambda: LoggerHook(10, 3), r"LoggerHook: expected log_step .*, got \(10, 3\)"),
        (lambda: TraceHook(["score"]), r"path: .*; write TraceHook\(\.\.\., path=\.\.\.\)"),
        (lambda: SparseAdam([HashTable(2)], learning_rate=0.1), "SparseAdam has none; write lr="),
        (lambda: SparseAdam(params=[]), r"params: .*; write tables=hash_tables\(module\)"),
        (lambda: EmbeddingOption(1000, 16), r"no num_embeddings: write EmbeddingOption\(16\)"),
    ],
)
def test_wrong_arguments_are_told_what_to_write(make, words):
    """Those of policies, hooks, optimizers and options, as those of tables."""
    with pytest.raises(TypeError, match=words):
        make()


def test_numbers_that_the_host_can_see():
    plain = torch.ones(2)
    assert is_plain_cpu(plain)
    assert not is_plain_cpu(plain.to("meta"))
    assert not is_plain_cpu(torch.nn.Parameter(plain))
    seen = []
    torch.func.vmap(lambda row: (seen.append(is_plain_cpu(row)), row)[1])(plain)
    with FakeTensorMode():
        seen.append(is_plain_cpu(plain))
    compiled = torch.compile(
        lambda row: row + 1 if is_plain_cpu(row) else row, backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(plain), plain)
    assert seen == [False, False]


def test_paths_are_checked(tmp_path):
    assert check_path("folder", str(tmp_path)) == check_folder("folder", tmp_path) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"folder: expected a folder, and .*file is"):
        check_folder("folder", tmp_path / "file")
    for wrong in (None, 3, b"x", ["a"], True):
        with pytest.raises(TypeError, match="folder: expected a path, got"):
            check_folder("folder", wrong)
