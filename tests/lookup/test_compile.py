"""``torch.compile`` of a module that holds tables: right results, and compiled once."""

import pytest
import torch
from torch import nn

from recis_lightning import DynamicEmbeddingBag, hash_tables
from recis_lightning.optim import SparseDenseOptimizer, SparseSGD
from tests.helpers.click_data import loader
from tests.helpers.lightning_model import Model, differences, everything, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    # torch 2.13 looks at .grad while it traces a resumed function.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_lightning_module_trains_as_it_would_without(tmp_path, backend):
    """Lightning fits a compiled module to the same bits; the tables are the module's own."""
    plain, compiled = Model(), Model()
    trainer(tmp_path).fit(plain, loader())
    trainer(tmp_path).fit(torch.compile(compiled, backend=backend), loader())
    assert len(hash_tables(compiled)) == 3
    assert differences(everything(compiled), everything(plain)) == []


def test_later_steps_compile_nothing():
    """Other ids, in bags of other lengths, run what the first steps compiled."""
    torch.manual_seed(0)
    tags = DynamicEmbeddingBag(4, mode="sum", name="tags")
    model = nn.Sequential(tags, nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = SparseDenseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), SparseSGD(hash_tables(model), lr=0.1)
    )
    compiled = torch.compile(model, backend="eager")
    for step in range(8):
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            ids = torch.randint(-50, 50 * step + 1, (6, 3 + step % 3))
            optimizer.zero_grad()
            compiled(ids).square().mean().backward()
            optimizer.step()
    assert tags.table.num_updates == 8
