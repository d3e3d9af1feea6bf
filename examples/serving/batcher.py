"""``Batcher``: rows of concurrent requests, scored together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from torch import Tensor

Columns = Mapping[str, list[Any]]


class _Asked(NamedTuple):
    columns: Columns
    num_rows: int
    scores: asyncio.Future[list[float]]


class Batcher:
    """Scorer of requests that arrive at about the same time, in one call of the model.

    A request never waits for others that are not there yet: while a batch is scored, those that
    come are collected, and they are the next batch. One that cannot be scored fails alone.

    Args:
        score: Returns the scores of columns, [rows]; called on one thread.
        max_rows: Most rows of a batch of several requests.

    Attributes:
        num_batches: Calls of ``score`` so far.
        num_rows: Rows in them.
    """

    def __init__(self, score: Callable[[Columns], Tensor], max_rows: int = 1024) -> None:
        self._score, self._max_rows = score, max_rows
        self._waiting: list[_Asked] = []
        self._thread = ThreadPoolExecutor(1, "scores")
        self._running: asyncio.Task[None] | None = None
        self.num_batches = self.num_rows = 0

    async def score(self, columns: Columns) -> list[float]:
        """Return the scores of a request's rows.

        Raises:
            TypeError, ValueError: They do not fit the model.
        """
        sizes = {name: len(values) for name, values in columns.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"expected columns of equally many rows, got {sizes}")
        asked = _Asked(
            columns, next(iter(sizes.values()), 0), asyncio.get_running_loop().create_future()
        )
        self._waiting.append(asked)
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await asked.scores

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                batch = self._next_batch()
                answers = await loop.run_in_executor(self._thread, self._answer, batch)
                for asked, answer in zip(batch, answers, strict=True):
                    if asked.scores.done():  # the client has gone
                        continue
                    if isinstance(answer, Exception):
                        asked.scores.set_exception(answer)
                    else:
                        asked.scores.set_result(answer)
        finally:
            self._running = None

    def _next_batch(self) -> list[_Asked]:
        """Take requests of the same columns, one at least, as they came."""
        first = self._waiting[0]
        rows, taken = 0, 0
        for asked in self._waiting:
            rows += asked.num_rows
            if taken and (rows > self._max_rows or asked.columns.keys() != first.columns.keys()):
                break
            taken += 1
        batch, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return batch

    def _answer(self, batch: list[_Asked]) -> list[list[float] | Exception]:
        """Return each request's scores, or why it has none."""
        try:
            columns = {
                name: [value for asked in batch for value in asked.columns[name]]
                for name in batch[0].columns
            }
            scores = self._score(columns).tolist()
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [answer for asked in batch for answer in self._answer([asked])]
        self.num_batches += 1
        self.num_rows += len(scores)
        answers: list[list[float] | Exception] = []
        for asked in batch:
            answers.append(scores[: asked.num_rows])
            scores = scores[asked.num_rows :]
        return answers

    def close(self) -> None:
        """End its thread, once what it scores is done."""
        self._thread.shutdown()


__all__ = ["Batcher", "Columns"]
