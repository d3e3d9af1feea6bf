"""Public names, signatures and defaults, and the example of a whole model."""

import dataclasses
import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import lightning as L
import pytest
import torch

import recis_lightning
from recis_lightning import (
    DynamicEmbedding,
    DynamicEmbeddingBag,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
    Jagged,
    add_metric,
    admission,
    callbacks,
    eviction,
    hash_tables,
    initializers,
    optim,
)
from recis_lightning.callbacks import HashTableFilterHook, LoggerHook, ProfilerHook
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.initializers import Normal
from recis_lightning.optim import SparseAdamW, SparseDenseOptimizer

EXPORTS = [
    (
        callbacks,
        [
            "AutoProfilerHook",
            "HashTableFilterHook",
            "Hook",
            "LoggerHook",
            "MLTrackerHook",
            "MemoryAccessHook",
            "MetricReportHook",
            "ModuleFlopsHook",
            "ProfilerHook",
            "TraceHook",
        ],
    ),
    (
        eviction,
        ["AllOf", "AnyOf", "GlobalStepFilter", "MaxRows", "MinNorm", "RowColumns", "TimeToLive"],
    ),
    (admission, ["BloomCount", "MinCount", "Probability", "ReadOnly"]),
    (initializers, ["Constant", "Normal", "TruncatedNormal", "Uniform"]),
    (
        optim,
        [
            "SparseAdagrad",
            "SparseAdam",
            "SparseAdamAR",
            "SparseAdamW",
            "SparseDenseOptimizer",
            "SparseFTRL",
            "SparseLion",
            "SparseRMSprop",
            "SparseRowwiseAdagrad",
            "SparseRowwiseAdam",
            "SparseSGD",
        ],
    ),
]


@pytest.mark.parametrize(("module", "names"), EXPORTS, ids=lambda x: getattr(x, "__name__", ""))
def test_names_are_where_they_belong(module, names):
    """Every name is exported by its module."""
    assert set(names) <= set(module.__all__)


def test_package_exports():
    """__all__ has each name once, and each exists."""
    assert len(set(recis_lightning.__all__)) == len(recis_lightning.__all__)
    assert {"DynamicEmbedding", "DynamicEmbeddingBag", "EmbeddingEngine", "EmbeddingOption"} <= set(
        recis_lightning.__all__
    )
    assert {"HashTable", "Jagged", "add_metric", "hash_tables", "GAUC"} <= set(
        recis_lightning.__all__
    )
    for name in recis_lightning.__all__:
        assert getattr(recis_lightning, name).__doc__


@pytest.mark.parametrize(
    "module",
    [
        name
        for _, name, _ in pkgutil.walk_packages(recis_lightning.__path__, "recis_lightning.")
        if ".ops.gpu." not in name and not name.endswith("__main__")
    ],
)
def test_all_is_true(module):
    """Every name in a module's __all__ exists."""
    found = import_module(module)
    for name in getattr(found, "__all__", []):
        assert hasattr(found, name)


SLOW_IMPORTS = {
    *("lightning", "lightning.pytorch", "matplotlib", "numba", "pandas", "pyarrow", "sympy"),
    *("torch._dynamo", "torchmetrics", "triton"),
}


def test_importing_takes_no_slow_packages_along():
    """Each takes up to more than a second, and is imported when something needs it."""
    program = (
        "import torch, sys; from recis_lightning import DynamicEmbedding, hash_tables\n"
        "from recis_lightning.optim import SparseAdam\n"
        "print(*sys.modules)\n"
        "SparseAdam(hash_tables(DynamicEmbedding(4)), lr=0.1).zero_grad()\n"
        "assert 'torch._dynamo' not in sys.modules"  # nor does an optimizer of tables need it
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    imported = set(run.stdout.split())
    assert "recis_lightning.engine" in imported
    assert not imported & SLOW_IMPORTS


def parameters(function):
    signature = inspect.signature(function)
    return {name: value.default for name, value in signature.parameters.items()}


COMMON = {
    "initializer": Normal(std=0.01),
    "admission": None,
    "eviction": None,
    "padding_idx": None,
    "dtype": torch.float32,
    "device": None,
    "seed": 0,
    "name": None,
}


def test_signatures():
    """Arguments and defaults are those that users, YAML files and checkpoints rely on."""
    empty = inspect.Parameter.empty
    own = {
        "mode": "none",
        "trainable": True,
        "process_group": None,
        "exchange_dtype": None,
        "ranks_per_node": None,
        "rows": None,
    }
    assert parameters(DynamicEmbedding) == {"embedding_dim": empty, **COMMON, **own}
    bag = parameters(DynamicEmbeddingBag)
    assert {"embedding_dim": empty, "mode": "mean", **COMMON}.items() <= bag.items()
    assert parameters(DynamicEmbeddingBag.forward) == {
        "self": empty,
        "ids": empty,
        "offsets": None,
        "per_sample_weights": None,
    }
    option = {
        f.name: f.default
        for f in dataclasses.fields(EmbeddingOption)
        if f.default is not dataclasses.MISSING
    }
    expected = {"table": None, "mode": "none", "trainable": True, "tile_len": None}
    shared = ("admission", "eviction", "padding_idx", "dtype")
    assert (expected | {name: COMMON[name] for name in shared}).items() <= option.items()
    assert parameters(HashTableFilterHook) == {"filter_interval": 100}
    assert parameters(LoggerHook) == {"log_step": 10}
    assert parameters(ProfilerHook) == {
        "wait": 1,
        "warmup": 48,
        "active": 1,
        "repeat": 4,
        "output_dir": "./",
    }


def test_what_a_table_offers():
    """Methods and attributes of a table return the documented values."""
    table = HashTable(2, eviction=GlobalStepFilter(1), name="t")
    table.insert(torch.tensor([4, 9]), torch.ones(2, 2))
    assert len(table) == 2
    assert table.ids().tolist() == [4, 9]
    assert [part.tolist() for part in table.ids_map()] == [[4, 9], [0, 1]]
    assert table.embeddings(torch.tensor([4, 5])).tolist() == [[1.0, 1.0], [0.0, 0.0]]
    table.delete(torch.tensor([9]))
    table.update_step()
    table.update_step(n=2)
    assert table.step == 3
    assert table.last_seen(torch.tensor([4])).tolist() == [0]
    assert table.evict() == 1
    table.clear()
    assert table.nbytes > 0
    assert table.capacity > 0


def test_the_package_alone_imports_neither_lightning_nor_triton():
    """Only callbacks and the command line need Lightning, only tables on a GPU Triton.

    torch itself imports Triton where it is installed, so here the import is made to fail.
    """
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import recis_lightning.optim\n"
        "assert not {'lightning', 'pytorch_lightning'} & set(sys.modules)\n"
        "assert not [name for name in sys.modules if name.startswith('recis_lightning.ops.gpu')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


class Model(L.LightningModule):
    """Model of the documented example, with a tower and data."""

    def __init__(self):
        super().__init__()
        self.user = DynamicEmbedding(16, eviction=GlobalStepFilter(filter_step=2000), name="user")
        self.tags = DynamicEmbeddingBag(16, mode="mean", name="tags")
        self.engine = EmbeddingEngine(
            {
                "item": EmbeddingOption(embedding_dim=16, table="item"),
                "history": EmbeddingOption(embedding_dim=16, table="item", mode="sum"),
            }
        )
        self.tower = torch.nn.Linear(64, 1)

    def training_step(self, batch, batch_idx):
        found = self.engine({"item": batch["item"], "history": batch["history"]})
        parts = [self.user(batch["user"]), self.tags(batch["tags"]), *found.values()]
        loss = self.tower(torch.cat(parts, 1)).pow(2).mean()
        add_metric("square", loss.detach())
        return loss

    def configure_optimizers(self):
        return SparseDenseOptimizer(
            torch.optim.AdamW(self.parameters(), lr=1e-3),
            SparseAdamW(hash_tables(self), lr=1e-3),
        )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*number of training batches")
def test_the_example_trains(tmp_path):
    """Train with all three hooks, all kinds of embeddings and a shared table."""
    batch = {
        "user": torch.arange(4) - 2,
        "item": torch.arange(4),
        "tags": torch.arange(8).view(4, 2),
        "history": Jagged(torch.arange(6), torch.tensor([0, 2, 2, 5, 6])),
    }
    model = Model()
    hooks = [
        HashTableFilterHook(filter_interval=100),
        LoggerHook(log_step=2),
        ProfilerHook(wait=1, warmup=1, active=1, repeat=1, output_dir=str(tmp_path)),
    ]
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=hooks,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader([batch] * 4, batch_size=None))
    assert {table.name: len(table) for table in hash_tables(model)} == {
        "user": 4,
        "tags": 8,
        "item": 6,
    }
    assert "square" in trainer.callback_metrics
    assert len(list(tmp_path.glob("*-timeline-*.json"))) == 1
