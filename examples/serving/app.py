"""HTTP server of a served folder: scores, health, version and metrics.

``python -m examples.serving.app FOLDER --port 8000``; ``--follow`` takes up deltas meanwhile.
See docs/serving.md. FastAPI answers: LitServe, which is built on it, copies a model to processes of
its own, and a served model is mapped and takes any number of threads, so that a ``Batcher`` of one
file does what is left.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request, Response

from examples.serving.batcher import Batcher
from recis_lightning import serving

_MAX_BYTES, _MAX_ROWS = 1 << 22, 4096
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)  # seconds


class Metrics:
    """Counts of requests by their status, and a histogram of their seconds."""

    def __init__(self) -> None:
        self._requests: dict[int, int] = {}
        self._counts = [0] * (len(_BUCKETS) + 1)
        self._seconds = 0.0

    def add(self, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests[status] = self._requests.get(status, 0) + 1
        self._counts[bisect_left(_BUCKETS, seconds)] += 1
        self._seconds += seconds

    def text(self, **counters: int) -> str:
        """Return them, and other counters, in the text format of Prometheus."""
        lines = ["# TYPE score_requests_total counter"]
        for status, count in sorted(self._requests.items()):
            lines.append(f'score_requests_total{{status="{status}"}} {count}')
        lines.append("# TYPE score_seconds histogram")
        total = 0
        for limit, count in zip((*map(str, _BUCKETS), "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'score_seconds_bucket{{le="{limit}"}} {total}')
        lines += [f"score_seconds_sum {self._seconds}", f"score_seconds_count {total}"]
        for name, value in counters.items():
            lines += [f"# TYPE {name}_total counter", f"{name}_total {value}"]
        return "\n".join(lines) + "\n"


def make_app(
    score: Any,
    version: dict[str, Any],
    state: Callable[[], dict[str, Any]] = dict,
    close: Callable[[], None] = lambda: None,
) -> Any:
    """Return the application.

    Args:
        score: Returns the scores of a dict of columns, as a served model does.
        version: What ``/version`` answers, and ``/health`` of its entry "version".
        state: Returns what both say beside it, as it is now.
        close: Called when the server ends.
    """
    batcher, metrics = Batcher(score), Metrics()

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        batcher.close()
        close()

    app = FastAPI(title="recis_lightning", lifespan=lifespan)

    async def answer(request: Request) -> Response:
        """Score ``{"columns": {name: [value, ...]}}``: ``{"scores": [...]}``, null for NaN."""
        start = time.perf_counter()
        status, content = await _answer(request, batcher)
        metrics.add(status, time.perf_counter() - start)
        return Response(json.dumps(content), status, media_type="application/json")

    async def tell_health() -> dict[str, Any]:
        return {"status": "ok", "version": version.get("version"), **state()}

    async def tell_version() -> dict[str, Any]:
        return {**version, **state()}

    async def tell_metrics() -> Response:
        counters = {"batches": batcher.num_batches, "scores": batcher.num_rows}
        return Response(metrics.text(**counters), media_type="text/plain; version=0.0.4")

    app.add_api_route("/score", answer, methods=["POST"])
    app.add_api_route("/health", tell_health)
    app.add_api_route("/version", tell_version)
    app.add_api_route("/metrics", tell_metrics)
    return app


async def _answer(request: Any, batcher: Batcher) -> tuple[int, dict[str, Any]]:
    """Return the status and content of an answer."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BYTES:
            return 413, {"error": f"expected at most {_MAX_BYTES} bytes"}
    try:
        columns = json.loads(body)["columns"]
        if not isinstance(columns, dict) or not all(isinstance(c, list) for c in columns.values()):
            raise TypeError
    except (KeyError, RecursionError, TypeError, ValueError):
        return 400, {"error": 'expected {"columns": {name: [value, ...]}} as JSON'}
    if any(len(column) > _MAX_ROWS for column in columns.values()):
        return 413, {"error": f"expected at most {_MAX_ROWS} rows"}
    try:
        scores = await batcher.score(columns)
        # JSON has no NaN and no infinity.
        return 200, {"scores": [score if math.isfinite(score) else None for score in scores]}
    except (TypeError, ValueError) as error:
        return 422, {"error": str(error)}
    except asyncio.CancelledError:
        raise
    except Exception as error:  # one request of many: the server goes on
        return 500, {"error": type(error).__name__}


def app_of(folder: str, follow: bool = False) -> Any:
    """Return the application of a served folder, ready for its first request.

    Args:
        folder: The folder.
        follow: Whether it takes up the deltas that come to the folder. Then ``/health`` and
            ``/version`` have the step of the last one, and what keeps it from newer ones.
    """
    model = serving.load(folder)
    if not model.columns:
        raise ValueError(f"{folder}: it has no transforms; export with features=")
    manifest = model.manifest
    version = {"version": manifest.save_id, "model": manifest.model, "columns": model.columns}
    version |= manifest.versions
    if not follow:
        return make_app(model.score_records, version)
    followed = serving.follow(folder)

    def state() -> dict[str, Any]:
        error = followed.error
        return {"step": followed.step, "error": None if error is None else str(error)}

    return make_app(followed.score_records, version, state, followed.close)


def main(args: Sequence[str] | None = None) -> None:
    """Serve a folder."""
    parser = argparse.ArgumentParser("python -m examples.serving.app", description=main.__doc__)
    parser.add_argument("folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--follow", action="store_true", help="take up deltas as they come")
    given = parser.parse_args(args)
    torch.set_num_threads(1)  # batches of some hundred rows gain nothing from a second
    app = app_of(given.folder, given.follow)
    gc.collect()
    gc.freeze()  # a collection over all of torch would stop requests for tens of ms
    uvicorn.run(app, host=given.host, port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
