"""Train the examples and RecBole's own models on the same data, split and metric: one table.

From the root of the repository, with MovieLens-100k (see ``recis-lightning demo``) in FOLDER::

    python -m examples.compare --data FOLDER --seeds 5 --recbole

Both sides take Adam with the same learning rate, batch size and number of epochs, the same examples
in the same order, and the scores of the epoch that is best on the validation part, by AUC or by
NDCG@10. RecBole 1.2.1 needs pandas below 3.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.harness import provenance
from examples import movielens
from examples.movielens import LikesSplit, Split
from examples.ranking import dcnv2, din, dlrm, mmoe
from examples.recbole_peers import Peer
from examples.retrieval import sasrec, two_towers
from recis_lightning import hash_tables
from recis_lightning.cli.movielens import Examples
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer

Scores = dict[str, dict[str, float]]  # by task, then by metric
METRICS = ("AUC", "GAUC", "HR@10", "NDCG@10")
EVALUATED = 4096  # examples in a batch


class Rival(NamedTuple):
    """A model beside ours.

    Attributes:
        by: Whose it is, as the table says it.
        make: Our model of a seed, or the name of one of RecBole's.
        tasks: As of ``Contest``.
    """

    by: str
    make: str | Callable[[int], nn.Module]
    tasks: tuple[str, ...] = ("liked",)


class Contest(NamedTuple):
    """An example, and its rivals.

    Attributes:
        make: Our model of a seed.
        rivals: Others, with the same learning rate and epochs.
        tasks: Of ratings; empty for models that rank all items.
        lr: Learning rate of Adam.
        epochs: Of which the one that is best on validation counts.
        size: Examples in a batch.
    """

    make: Callable[[int], nn.Module]
    rivals: tuple[Rival, ...]
    tasks: tuple[str, ...] = ("liked",)
    lr: float = 2e-3
    epochs: int = 3
    size: int = 1024


CONTESTS = {
    "DLRM": Contest(dlrm.model, (Rival("PNN of RecBole", "PNN"),)),
    "DCNv2": Contest(dcnv2.model, (Rival("DCNV2 of RecBole", "DCNV2"),)),
    "DIN": Contest(din.model, (Rival("DIN of RecBole", "DIN"),)),
    "MMoE": Contest(
        mmoe.model,
        tuple(Rival("ours, of one task", mmoe.one_task, (task,)) for task in movielens.TASKS),
        tuple(movielens.TASKS),
    ),
    "two towers": Contest(
        two_towers.model, (Rival("NPE of RecBole", "NPE", ()),), (), epochs=8, size=512
    ),
    "SASRec": Contest(
        sasrec.model,
        (Rival("SASRec of RecBole", "SASRec", ()),),
        (),
        lr=3e-3,
        epochs=6,
        size=512,
    ),
}


class Contender(NamedTuple):
    """A model in training.

    Attributes:
        model: The model.
        optimizer: Of its weights, and of its tables' rows.
        losses: Returns the losses of an epoch's batches.
        scores: Returns the scores of a part, "val" or "test".
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: Callable[[], Iterable[Tensor]]
    scores: Callable[[str], Scores]


def best_scores(contender: Contender, epochs: int) -> Scores:
    """Train, and return the test's scores of the epoch that is best on validation."""
    best, found = -1.0, Scores()
    for _ in range(epochs):
        contender.model.train()
        for loss in contender.losses():
            contender.optimizer.zero_grad()
            loss.backward()
            contender.optimizer.step()
        contender.model.eval()
        with torch.no_grad():
            tasks = contender.scores("val").values()
            reached = sum(scores.get("NDCG@10", scores.get("AUC", 0.0)) for scores in tasks)
            if not found or reached > best:  # NaN where a part has no AUC
                best, found = reached, contender.scores("test")
    return found


def our_contender(
    model: nn.Module, data: Split | LikesSplit, tasks: tuple[str, ...], contest: Contest, seed: int
) -> Contender:
    """Return a model of the examples: of ratings for tasks, or of likes without any."""
    dense = torch.optim.Adam(model.parameters(), lr=contest.lr)
    optimizer = SparseDenseOptimizer(dense, SparseAdam(hash_tables(model), lr=contest.lr))
    generator = torch.Generator().manual_seed(seed)
    cross_entropy = nn.functional.binary_cross_entropy_with_logits

    def losses() -> Iterator[Tensor]:
        if not isinstance(data, LikesSplit):
            for batch in movielens.batches(data.train, contest.size, generator):
                labels = movielens.labels(batch, tasks)
                yield cross_entropy(model(batch).reshape(labels.shape), labels)
            return
        for likes in movielens.batches(data.train, contest.size, generator):
            yield model.loss(likes)  # type: ignore[operator]

    def scores(part: str) -> Scores:
        batches = movielens.batches(getattr(data, part), EVALUATED, None)
        if isinstance(data, LikesSplit):
            found = [model.scores(batch, data.items) for batch in batches]  # type: ignore[operator]
        else:
            found = [model(batch) for batch in batches]
        return scores_of(torch.cat(found), data, part, tasks)

    return Contender(model, optimizer, losses, scores)


def recbole_contender(
    peer: Peer, data: Split | LikesSplit, tasks: tuple[str, ...], contest: Contest, seed: int
) -> Contender:
    """Return a model of RecBole, on the same examples in the same order."""
    model = peer.begin(seed)
    generator = torch.Generator().manual_seed(seed)
    return Contender(
        model,
        torch.optim.Adam(model.parameters(), lr=contest.lr),
        lambda: peer.losses(model, contest.size, generator),
        lambda part: scores_of(peer.scores(model, part, EVALUATED), data, part, tasks),
    )


def scores_of(found: Tensor, data: Split | LikesSplit, part: str, tasks: tuple[str, ...]) -> Scores:
    """Return the metrics of logits [N] or [N, tasks], or of scores [num_users, num_items]."""
    if isinstance(data, LikesSplit):
        return {"": dict(zip(METRICS[2:], movielens.hit_and_ndcg(found, data, part), strict=True))}
    examples: Examples = getattr(data, part)
    labels = movielens.labels(examples, tasks)
    return {
        task: dict(zip(METRICS, movielens.auc_and_gauc(logits, label, examples), strict=False))
        for task, logits, label in zip(tasks, found.reshape(labels.shape).T, labels.T, strict=True)
    }


@cache
def _data(folder: str | None, num_rows: int | None, of_likes: bool) -> Split | LikesSplit:
    return (movielens.load_likes if of_likes else movielens.load)(folder, num_rows)


@cache
def _peer(name: str, folder: str | None, num_rows: int | None, of_likes: bool) -> Peer:
    return Peer(name, _data(folder, num_rows, of_likes))


class Job(NamedTuple):
    """One training: of a contest's own model, or of a rival, with a seed."""

    contest: str
    rival: int | None
    seed: int
    folder: str | None
    num_rows: int | None
    epochs: int | None

    def run(self) -> tuple[Scores, float]:
        """Return the test's scores, and seconds."""
        torch.set_num_threads(1)
        start, contest = time.perf_counter(), CONTESTS[self.contest]
        own = Rival("ours", contest.make, contest.tasks)
        rival = own if self.rival is None else contest.rivals[self.rival]
        where = (self.folder, self.num_rows, not rival.tasks)
        data, how = _data(*where), (rival.tasks, contest, self.seed)
        if isinstance(rival.make, str):
            contender = recbole_contender(_peer(rival.make, *where), data, *how)
        else:
            contender = our_contender(rival.make(self.seed), data, *how)
        found = best_scores(contender, self.epochs or contest.epochs)
        return found, time.perf_counter() - start


def rows_of(jobs: Sequence[Job], found: Sequence[tuple[Scores, float]]) -> list[dict[str, Any]]:
    """Return the rows of the table, each with its figures of every seed by metric."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for job, (scores, seconds) in zip(jobs, found, strict=True):
        contest = CONTESTS[job.contest]
        by = "ours" if job.rival is None else contest.rivals[job.rival].by
        for task, metrics in scores.items():
            example = f"{job.contest}, {task}" if len(contest.tasks) > 1 else job.contest
            row = rows.setdefault((example, by), {"example": example, "model": by, "seconds": []})
            row["seconds"].append(round(seconds, 1))
            for metric, value in metrics.items():
                row.setdefault(metric, []).append(round(value, 5))
    names = [row["example"] for row in rows.values()]
    return sorted(rows.values(), key=lambda row: names.index(row["example"]))


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return rows as a table of medians, and of ranges over seeds.

    Example:
        >>> print(table([{"example": "DIN", "model": "ours", "AUC": [0.5, 0.75, 0.625]}]))
        | example | model | AUC | GAUC | HR@10 | NDCG@10 |
        |---|---|---|---|---|---|
        | DIN | ours | 0.6250 (0.5000 to 0.7500) | | | |
    """
    lines = [f"| example | model | {' | '.join(METRICS)} |", "|---" * (2 + len(METRICS)) + "|"]
    for row in rows:
        cells = [row["example"], row["model"]]
        for metric in METRICS:
            seeds = row.get(metric)
            cells.append(
                f"{median(seeds):.4f} ({min(seeds):.4f} to {max(seeds):.4f})" if seeds else ""
            )
        lines.append("".join(f"| {cell} " if cell else "| " for cell in cells) + "|")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    """Train models for each seed, and print the table."""
    parser = argparse.ArgumentParser("python -m examples.compare", description=main.__doc__)
    parser.add_argument("--data", help="folder of MovieLens-100k as recbole's wheel has it")
    parser.add_argument("--models", nargs="+", default=list(CONTESTS), choices=list(CONTESTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="default: each example's own")
    parser.add_argument("--rows", type=int, help="ratings to take; default: all")
    parser.add_argument("--recbole", action="store_true", help="train RecBole's own models, too")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--output", type=Path, help="write figures of every seed there, as JSON")
    given = parser.parse_args(args)
    if given.recbole and find_spec("recbole") is None:
        parser.error("--recbole: it is not installed; pip install recbole==1.2.1 'pandas<3'")
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(name, rival, seed, given.data, given.rows, given.epochs)
        for name in given.models
        for rival in (None, *range(len(CONTESTS[name].rivals)))
        if rival is None or given.recbole or not isinstance(CONTESTS[name].rivals[rival].make, str)
        for seed in range(given.seeds)
    ]
    done: list[tuple[Scores, float]] = []
    facts = provenance() | {"threads": 1, "seeds": given.seeds}
    with ExitStack() as stack:
        run: Callable[..., Iterable[tuple[Scores, float]]] = map
        if given.jobs > 1:
            pool = ProcessPoolExecutor(given.jobs, get_context("spawn"))
            run = stack.enter_context(pool).map
        for result in tqdm(run(Job.run, jobs), total=len(jobs), unit="training", disable=None):
            done.append(result)
            rows = rows_of(jobs[: len(done)], done)
            if given.output:
                given.output.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
