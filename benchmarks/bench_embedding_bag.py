"""Training steps of embeddings (lookup, backward, update), and evaluation lookups.

Measures: ``recis_lightning.engine``, ``recis_lightning.lookup.group``,
``recis_lightning.ops.embedding_bag``, ``recis_lightning.optim.fused_update``.

26 features, Zipf 1.05, 200,000 known ids per feature. Ours is one ``EmbeddingEngine`` over dynamic
tables. The peers are ``nn.Embedding(sparse=True)`` / ``nn.EmbeddingBag`` with torch's optimizers
and, if it is installed, FBGEMM's static CPU tables, whose update runs in backward. The bandwidth
limit is the number of bytes that a step must move, divided by the machine's copy rate.

    python benchmarks/bench_embedding_bag.py [--rounds N] [--part PART] [--device D]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import (
    add_device,
    append_result,
    copy_gb_per_s,
    device,
    geometric_mean,
    is_on_gpu,
    print_table,
    time_in_turn,
    use_device,
    zipf_ranks,
)
from benchmarks.managed_collision import ManagedCollision
from benchmarks.targets import meets_targets
from recis_lightning import EmbeddingEngine, EmbeddingOption, Jagged, hash_tables
from recis_lightning.optim import SparseAdagrad, SparseAdam

NUM_IDS, EXPONENT, NUM_BATCHES = 200_000, 1.05, 8
SPREAD = 7_919_317  # ids are multiples of it: users' ids are not 0 ... n - 1
TRAIN_SHAPES = [(4096, 16), (4096, 64), (16384, 32)]  # batch, dim
PARTS = ("train", "multi_hot", "evaluation", "features", "managed_collision")
LR = 1e-3


class Data:
    """Batches of ids, row numbers for the static peers, and gradients of the outputs."""

    def __init__(
        self,
        num_features: int,
        batch: int,
        dim: int,
        bag: int = 1,
        num_ids: int | None = None,
        exponent: float = EXPONENT,
    ) -> None:
        rng = np.random.default_rng(0)
        torch.manual_seed(0)
        self.num_features, self.batch, self.dim, self.bag = num_features, batch, dim, bag
        self.num_ids = num_ids = num_ids or NUM_IDS
        self.names = [f"f{i}" for i in range(num_features)]
        permutations = [torch.randperm(num_ids) for _ in self.names]
        self.ranks: list[list[Tensor]] = []
        for _ in range(NUM_BATCHES):
            drawn = zipf_ranks(rng, exponent, num_ids, (num_features, batch * bag))
            pairs = zip(permutations, torch.from_numpy(drawn).to(device()), strict=True)
            self.ranks.append([permutation[row] for permutation, row in pairs])
        self.offsets = torch.arange(0, batch * bag + 1, bag)
        self.gradients = [torch.randn(batch, dim) for _ in self.names]

    def features(self, i: int) -> dict[str, Any]:
        ids = [ranks * SPREAD for ranks in self.ranks[i]]
        if self.bag > 1:
            return {n: Jagged(v, self.offsets) for n, v in zip(self.names, ids, strict=True)}
        return dict(zip(self.names, ids, strict=True))

    def num_unique(self) -> float:
        counts = [sum(ranks.unique().numel() for ranks in batch) for batch in self.ranks]
        return float(np.mean(counts))

    def limit_bytes(self, state_words: int) -> float:
        """Return the bytes that a step must move.

        Ids, index entries, unique rows (read, then read and written), outputs and gradients, once.
        """
        n, unique = self.num_features * self.batch * self.bag, self.num_unique()
        bags = self.num_features * self.batch
        rows = unique * 4 * self.dim * (1 + 2 * (1 + state_words))
        return 8 * n + 16 * unique + rows + 2 * bags * 4 * self.dim


def exponent_of(num_distinct: float, num_ids: int, draws: int) -> float:
    """Return the exponent of ``zipf_ranks`` at which draws have as many distinct ids, about."""
    low, high = 0.0, 4.0
    for _ in range(30):
        exponent = (low + high) / 2
        weights = np.arange(1, num_ids + 1) ** -exponent
        is_drawn = 1 - (1 - weights / weights.sum()) ** draws
        low, high = (exponent, high) if is_drawn.sum() > num_distinct else (low, exponent)
    return low


class Consumer(torch.autograd.Function):
    """Minimal model: accepts the outputs and returns prepared gradients."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.gradients)


class Ours:
    """Engine whose tables know all ids, and its optimizer."""

    def __init__(self, data: Data, make_optimizer: Callable[..., Any]) -> None:
        mode = "sum" if data.bag > 1 else "none"
        self.data, self.num_calls = data, 0
        self.engine = EmbeddingEngine(
            {name: EmbeddingOption(data.dim, mode=mode) for name in data.names}
        )
        self.optimizer = make_optimizer(hash_tables(self.engine), lr=LR)
        known = torch.arange(data.num_ids) * SPREAD
        for table in hash_tables(self.engine):
            table.insert(known, torch.zeros(data.num_ids, data.dim))
        self.batches = [data.features(i) for i in range(NUM_BATCHES)]

    def step(self) -> None:
        out = self.engine(self.batches[self.num_calls % NUM_BATCHES])
        torch.autograd.backward([*out.values()], self.data.gradients)
        self.optimizer.step()
        self.num_calls += 1

    def look_up(self) -> None:
        self.engine(self.batches[self.num_calls % NUM_BATCHES])
        self.num_calls += 1

    def bare_step(self) -> None:
        out = self.engine(self.batches[self.num_calls % NUM_BATCHES])
        Consumer.apply(self.data.gradients, *out.values()).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.num_calls += 1

    def concat_step(self, gradient: Tensor) -> None:
        out = self.engine.concat(self.batches[self.num_calls % NUM_BATCHES])
        Consumer.apply([gradient], out).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.num_calls += 1

    def joined_step(self, gradient: Tensor) -> None:
        out = self.engine(self.batches[self.num_calls % NUM_BATCHES])
        torch.cat([*out.values()], 1).backward(gradient)  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.num_calls += 1

    def read(self) -> None:
        with torch.no_grad():
            self.engine(self.batches[self.num_calls % NUM_BATCHES])
        self.num_calls += 1


class Static:
    """One ``nn.Embedding`` or ``nn.EmbeddingBag`` per feature, with a torch optimizer."""

    def __init__(self, data: Data, make_optimizer: Callable[..., Any]) -> None:
        self.data, self.num_calls = data, 0
        kind = nn.EmbeddingBag if data.bag > 1 else nn.Embedding
        extra = {"mode": "sum"} if data.bag > 1 else {}
        self.tables = [kind(data.num_ids, data.dim, sparse=True, **extra) for _ in data.names]
        for table in self.tables:
            nn.init.zeros_(table.weight)
        self.optimizer = make_optimizer([table.weight for table in self.tables], lr=LR)

    def _out(self) -> list[Tensor]:
        ranks = self.data.ranks[self.num_calls % NUM_BATCHES]
        self.num_calls += 1
        if self.data.bag == 1:
            return [table(rank) for table, rank in zip(self.tables, ranks, strict=True)]
        starts = self.data.offsets[:-1]
        return [table(rank, starts) for table, rank in zip(self.tables, ranks, strict=True)]

    def step(self) -> None:
        torch.autograd.backward(self._out(), self.data.gradients)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Fused:
    """One static ``nn.Embedding`` for all features, the peer of an evaluation lookup."""

    def __init__(self, data: Data) -> None:
        self.data, self.num_calls = data, 0
        self.table = nn.Embedding(data.num_ids * data.num_features, data.dim)
        starts = torch.arange(data.num_features) * data.num_ids
        self.batches = [
            torch.cat([rank + start for rank, start in zip(batch, starts, strict=True)])
            for batch in data.ranks
        ]

    def read(self) -> None:
        with torch.no_grad():
            self.table(self.batches[self.num_calls % NUM_BATCHES])
        self.num_calls += 1


def fbgemm(data: Data) -> Callable[[], None] | None:
    """Return a training step of FBGEMM's static CPU tables with Adagrad; None if not installed."""
    if is_on_gpu("FBGEMM"):
        return None
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except ImportError:
        return None
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(data.num_ids, data.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * data.num_features,
        optimizer=EmbOptimType.EXACT_ADAGRAD,
        learning_rate=LR,
    )
    indices = [torch.cat(batch) for batch in data.ranks]
    offsets = torch.arange(0, indices[0].numel() + 1, data.bag)
    gradient = torch.cat(data.gradients, dim=1)
    num_calls = 0

    def step() -> None:
        nonlocal num_calls
        tables(indices[num_calls % NUM_BATCHES], offsets).backward(gradient)
        num_calls += 1

    return step


def check(data: Data) -> None:
    """Check three training steps against torch."""
    ours, static = Ours(data, SparseAdam), Static(data, torch.optim.SparseAdam)
    for _ in range(3):
        ours.step()
        static.step()
    known = torch.arange(data.num_ids)
    for table, peer in zip(hash_tables(ours.engine), static.tables, strict=True):
        torch.testing.assert_close(table.embeddings(known * SPREAD), peer.weight.data)


def finish(part: str, columns: list[str], rows: list[list[Any]]) -> bool:
    """Append a line of results; return whether it meets its targets."""
    line = {"part": part, "columns": columns, "rows": rows}
    append_result("bench_embedding_bag", line)
    return meets_targets("bench_embedding_bag", line)


def train(rounds: int, rate: float) -> bool:
    """Time training steps with one id per feature."""
    rows, ratios = [], []
    for batch, dim in TRAIN_SHAPES:
        data = Data(26, batch, dim)
        check(Data(3, 512, dim))
        adam = time_in_turn(
            {
                "ours": Ours(data, SparseAdam).step,
                "torch": Static(data, torch.optim.SparseAdam).step,
            },
            rounds,
        )
        limit = data.limit_bytes(2) / rate / 1e6
        contenders = {"ours": Ours(data, SparseAdagrad).step}
        if peer := fbgemm(data):
            contenders["fbgemm"] = peer
        adagrad = time_in_turn(contenders, rounds)
        fbgemm_ratio = adagrad["fbgemm"] / adagrad["ours"] if peer else float("nan")
        ratios.append(adam["torch"] / adam["ours"])
        row = [f"{batch} x 26, dim {dim}", adam["ours"], adam["torch"], ratios[-1], limit]
        row += [
            adam["ours"] / limit,
            adagrad["ours"],
            adagrad.get("fbgemm", float("nan")),
            fbgemm_ratio,
        ]
        rows.append(row)
    columns = ["training step", "Adam ms", "torch ms", "ratio", "limit ms", "of limit"]
    columns += ["Adagrad ms", "FBGEMM ms", "ratio"]
    print_table("One id per feature, Zipf 1.05, 200,000 ids per feature", columns, rows)
    adagrad_mean = geometric_mean([row[-1] for row in rows])
    print(f"  geometric means: torch {geometric_mean(ratios):.2f}, FBGEMM {adagrad_mean:.2f}")
    return finish("train", columns, rows)


def multi_hot(rounds: int) -> bool:
    """Time training steps with summed bags of 20 ids."""
    data = Data(26, 1024, 32, bag=20)
    check(Data(3, 128, 32, bag=20))
    times = time_in_turn(
        {
            "ours": Ours(data, SparseAdam).step,
            "torch": Static(data, torch.optim.SparseAdam).step,
        },
        rounds,
    )
    row = ["1024 x 26 x 20, dim 32", times["ours"], times["torch"], times["torch"] / times["ours"]]
    columns = ["training step", "ours ms", "torch ms", "ratio"]
    print_table("Bags of 20 ids, summed", columns, [row])
    return finish("multi_hot", columns, [row])


def evaluation(rounds: int) -> bool:
    """Time a lookup in evaluation mode."""
    rows = []
    for batch, dim in TRAIN_SHAPES:
        data = Data(26, batch, dim)
        ours = Ours(data, SparseAdam)
        ours.engine.eval()
        times = time_in_turn({"ours": ours.read, "static": Fused(data).read}, 3 * rounds)
        cost = times["ours"] / times["static"]
        rows.append([f"{batch} x 26, dim {dim}", times["ours"], times["static"], cost])
    columns = ["evaluation lookup", "ours ms", "static ms", "cost"]
    print_table("Engine compared with one fused nn.Embedding", columns, rows)
    return finish("evaluation", columns, rows)


def many_features(rounds: int) -> bool:
    """Time 400 features against 26, with the same number of ids per batch and of rows in total.

    And of distinct ids per batch: 260 draws repeat fewer ids than 4,000 from the same distribution,
    and a distinct id is what a step costs. Four variants: without a model (lookup, backward and
    update only); with the outputs as one tensor by ``concat``; with outputs concatenated to one
    matrix by torch, which makes 400 narrow copies in forward and in backward; and with
    ``torch.autograd.backward`` of 400 outputs, each of which torch checks in Python.
    """
    few, num_ids = Data(26, 4000, 16), NUM_IDS * 26 // 400
    exponent = exponent_of(few.num_unique() / 400, num_ids, 260)
    many = Data(400, 260, 16, num_ids=num_ids, exponent=exponent)
    ours = {"26": Ours(few, SparseAdam), "400": Ours(many, SparseAdam)}
    joined = {name: torch.cat(engine.data.gradients, 1) for name, engine in ours.items()}
    rows = []
    for label, steps in (
        ("no model", {name: engine.bare_step for name, engine in ours.items()}),
        ("concat", {name: partial(e.concat_step, joined[name]) for name, e in ours.items()}),
        ("joined", {name: partial(e.joined_step, joined[name]) for name, e in ours.items()}),
        ("separate", {name: engine.step for name, engine in ours.items()}),
    ):
        times = time_in_turn(steps, rounds)
        cost = times["400"] / times["26"]
        rows.append([f"104,000 ids, dim 16, {label}", times["26"], times["400"], cost])
    columns = ["training step", "26 features ms", "400 features ms", "cost"]
    print_table("Many features", columns, rows)
    return finish("features", columns, rows)


def managed_collision(rounds: int) -> bool:
    """Time lookups against TorchRec's managed-collision collection, if it is installed."""
    if is_on_gpu("managed_collision"):
        return True
    data = Data(26, 1024, 16, num_ids=2000)
    batches = [[ranks * SPREAD for ranks in batch] for batch in data.ranks[:2]]
    try:
        peer = ManagedCollision(data.names, data.dim, data.num_ids, batches)
    except ImportError as error:
        print(f"managed_collision: skipped, {error}")
        return True
    ours = Ours(data, SparseAdam)
    # Both look up known ids: each id has its own row in ours and its own slot in the peer.
    for ids, slots in zip(batches[0], peer.num_slots(batches[0]), strict=True):
        if slots != ids.unique().numel():
            raise RuntimeError(f"the peer has {slots} slots for {ids.unique().numel()} ids")
    peer.module.train()
    rows = []
    for label, contenders in (
        ("training", {"ours": ours.look_up, "torchrec": peer.look_up}),
        ("evaluation", {"ours": ours.read, "torchrec": peer.reader()}),
    ):
        ours.engine.train(label == "training")
        times = time_in_turn(contenders, min(rounds, 5))
        ratio = times["torchrec"] / times["ours"]
        rows.append([f"1024 x 26, dim 16, {label}", times["ours"], times["torchrec"], ratio])
    columns = ["lookup", "ours ms", "TorchRec ms", "ratio"]
    print_table("TorchRec's managed-collision EmbeddingBagCollection", columns, rows)
    return finish("managed_collision", columns, rows)


def main(given: list[str] | None = None) -> int:
    """Run all parts, or one; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description="Training steps and lookups of embeddings")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--part", choices=list(PARTS))
    add_device(parser)
    arguments = parser.parse_args(given)
    use_device(arguments.device)
    rate = copy_gb_per_s()
    print(f"copy rate {rate:.1f} GB/s, {torch.get_num_threads()} threads")
    parts: dict[str, Callable[[], bool]] = {
        "train": lambda: train(arguments.rounds, rate),
        "multi_hot": lambda: multi_hot(arguments.rounds),
        "evaluation": lambda: evaluation(arguments.rounds),
        "features": lambda: many_features(arguments.rounds),
        "managed_collision": lambda: managed_collision(arguments.rounds),
    }
    met = [part() for name, part in parts.items() if arguments.part in (None, name)]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
