"""Train ranking models and RecBole's own on the same data, split and metric, and print a table.

From the root of the repository, with MovieLens-100k (see ``recis-lightning demo``) in FOLDER::

    python -m examples.ranking.compare --data FOLDER --seeds 5 --recbole

Both sides take Adam with the same learning rate, batch size and number of epochs, the same examples
in the same order, and the scores of the epoch that is best by AUC on the validation part. The test
part comes after that in time. RecBole 1.2.1 needs pandas below 3.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from examples.ranking import dcnv2, din
from examples.ranking.data import Split, batches, load, scores
from recis_lightning import hash_tables
from recis_lightning.cli.movielens import Examples
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer

MODELS: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "DCNv2": (dcnv2.model, "DCNV2"),
    "DIN": (din.model, "DIN"),
}
_LR, _EVALUATED = 1e-3, 4096


def train_ours(
    make: Callable[[int], nn.Module], split: Split, seed: int, epochs: int, size: int
) -> Any:
    """Return test AUC and GAUC of a model on dynamic tables."""
    model = make(seed)
    optimizer = SparseDenseOptimizer(
        torch.optim.Adam(model.parameters(), lr=_LR), SparseAdam(hash_tables(model), lr=_LR)
    )
    generator = torch.Generator().manual_seed(seed)
    loss = nn.functional.binary_cross_entropy_with_logits
    return _best(
        model,
        epochs,
        lambda: (loss(model(b), b.label) for b in batches(split.train, size, generator)),
        optimizer,
        lambda part: _logits(model, part),
        split,
    )


def train_recbole(name: str, split: Split, seed: int, epochs: int, size: int) -> Any:
    """Return test AUC and GAUC of a model of RecBole."""
    from examples.ranking.recbole_peers import Peer

    peer = Peer(name, split, seed)
    generator = torch.Generator().manual_seed(seed)

    def predict(part: Examples) -> Tensor:
        which = "val" if part is split.val else "test"
        found = [peer.probabilities(b) for b in peer.batches(which, _EVALUATED, None)]
        return torch.cat(found).logit(1e-7)

    return _best(
        peer.model,
        epochs,
        lambda: (peer.loss(batch) for batch in peer.batches("train", size, generator)),
        torch.optim.Adam(peer.model.parameters(), lr=_LR),
        predict,
        split,
    )


def _logits(model: nn.Module, part: Examples) -> Tensor:
    return torch.cat([model(batch) for batch in batches(part, _EVALUATED, None)])


def _best(
    model: nn.Module,
    epochs: int,
    losses: Callable[[], Iterable[Tensor]],
    optimizer: torch.optim.Optimizer,
    predict: Callable[[Examples], Tensor],
    split: Split,
) -> tuple[float, float]:
    """Train, and return the test's scores of the epoch that is best on validation."""
    best, found = -1.0, (0.0, 0.0)
    for _ in range(epochs):
        model.train()
        for loss in losses():
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            auc, _ = scores(predict(split.val), split.val)
            if auc > best:
                best, found = auc, scores(predict(split.test), split.test)
    return found


def line(name: str, found: Sequence[tuple[float, float]]) -> str:
    """Return a row of the table: means over seeds, and ranges.

    Example:
        >>> line("DIN", [(0.5, 0.25), (0.7, 0.75)])
        '| DIN | 0.6000 (0.5000 to 0.7000) | 0.5000 (0.2500 to 0.7500) | 2 |'
    """
    cells = [
        f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})"
        for values in zip(*found, strict=True)
    ]
    return f"| {name} | {' | '.join(cells)} | {len(found)} |"


def main(args: Sequence[str] | None = None) -> None:
    """Train models for each seed, and print the table."""
    parser = argparse.ArgumentParser("python -m examples.ranking.compare", description=main.__doc__)
    parser.add_argument("--data", help="folder of MovieLens-100k as recbole's wheel has it")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rows", type=int, help="ratings to take; default: all")
    parser.add_argument("--recbole", action="store_true", help="train RecBole's own models, too")
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    split = load(given.data, given.rows)
    print("| model | test AUC | test GAUC | seeds |\n|---|---|---|---|", flush=True)
    for name in given.models:
        make, peer = MODELS[name]
        how = (split, given.epochs, given.batch_size)
        ours = [train_ours(make, how[0], seed, *how[1:]) for seed in range(given.seeds)]
        print(line(f"{name}, ours", ours), flush=True)
        if given.recbole:
            theirs = [train_recbole(peer, how[0], seed, *how[1:]) for seed in range(given.seeds)]
            print(line(f"{peer}, RecBole", theirs), flush=True)


if __name__ == "__main__":
    main()
