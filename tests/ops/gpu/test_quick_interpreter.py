"""The interpreter of the tests computes what Triton's own does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.ops import backend
from recis_lightning.optim import SparseAdam
from tests.helpers import interpreting

pytestmark = pytest.mark.interpreted


def _train(dtype):
    torch.manual_seed(0)
    model = DynamicEmbedding(5, dtype=dtype)
    optimizer = SparseAdam(hash_tables(model), lr=0.1)
    with backend.use("triton"):
        for _ in range(2):
            ids = torch.randint(-(2**63), 2**63 - 1, (70,)) // 2**58
            model(ids).float().square().sum().backward()
            optimizer.step()
        rows = model(torch.arange(-32, 32)).detach()
    return rows.float().tolist()


def rows_of_dtypes():
    return [_train(dtype) for dtype in (torch.float32, torch.bfloat16)]


def test_rows_are_those_of_tritons_own_to_the_bit():
    interpreting.quicken_interpreter()
    script = (
        f"import json; from {__name__} import rows_of_dtypes; print(json.dumps(rows_of_dtypes()))"
    )
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert rows_of_dtypes() == json.loads(done.stdout)
