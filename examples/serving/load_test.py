"""Load test of servers on loopback: p50, p99 and scores a second, beside plain PyTorch.

From the root of the repository, after ``make demo``: ``python -m examples.serving.load_test``. Both
servers are this package's example; behind one is the served folder, behind the other a model with
the same weights in ``nn.Embedding``.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
import uvicorn


@contextmanager
def running(app: Any) -> Iterator[int]:
    """Serve an application on a free port of loopback, on a thread; yield the port."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def ask(port: int, path: str, content: Any = None) -> tuple[int, Any]:
    """Return the status and the content that a server answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        return _ask(connection, path, content)
    finally:
        connection.close()


def _ask(connection: http.client.HTTPConnection, path: str, content: Any) -> tuple[int, Any]:
    body = None if content is None else json.dumps(content)
    connection.request("GET" if body is None else "POST", path, body)
    answer = connection.getresponse()
    text = answer.read().decode()
    is_json = (answer.getheader("content-type") or "").startswith("application/json")
    return answer.status, json.loads(text) if is_json else text


def load(port: int, requests: Sequence[dict[str, list[Any]]], num_clients: int) -> dict[str, float]:
    """Send requests from several clients at once, each one after the other.

    Args:
        port: Of the server.
        requests: Columns of each.
        num_clients: Threads that share them.

    Returns:
        ``p50_ms``, ``p99_ms``, ``scores_per_s``, ``errors``.
    """
    seconds: list[float] = []
    scores, errors, lock = [0], [0], threading.Lock()

    def work(client: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for columns in requests[client::num_clients]:
            begun = time.perf_counter()
            status, content = _ask(connection, "/score", {"columns": columns})
            taken = time.perf_counter() - begun
            with lock:
                seconds.append(taken)
                if status == 200:
                    scores[0] += len(content["scores"])
                else:
                    errors[0] += 1
        connection.close()

    threads = [threading.Thread(target=work, args=(client,)) for client in range(num_clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = time.perf_counter() - start
    seconds.sort()
    return {
        "p50_ms": 1e3 * seconds[len(seconds) // 2],
        "p99_ms": 1e3 * seconds[len(seconds) * 99 // 100],
        "scores_per_s": scores[0] / whole,
        "errors": errors[0],
    }


def main(args: Sequence[str] | None = None) -> None:
    """Export the demo's model, and load both servers in turn."""
    from examples.deepfm.movielens import FEATURES, part_files
    from examples.serving.app import app_of, make_app
    from examples.serving.demo import exported
    from examples.serving.plain import PlainDeepFM

    parser = argparse.ArgumentParser("python -m examples.serving.load_test", description=__doc__)
    parser.add_argument("--root", default="data/ml-100k", help="folder of the data")
    parser.add_argument("--output-dir", default="outputs/demo")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="of a request")
    given = parser.parse_args(args)
    model, folder = exported(given.root, given.output_dir)
    table = pyarrow.parquet.read_table(part_files(Path(given.root))[90]).drop(["rating"])

    draw = random.Random(0)
    requests = [
        table.take([draw.randrange(len(table)) for _ in range(given.rows)]).to_pydict()
        for _ in range(given.requests)
    ]
    torch.set_num_threads(1)
    # Clients in a process of their own: they would share Python's lock with the server.
    clients = get_context("spawn").Pool(1)
    served = app_of(str(folder))
    plain = make_app(PlainDeepFM(model, FEATURES.without_labels()), {"model": "plain PyTorch"})
    for name, app in (("served folder", served), ("plain PyTorch", plain)):
        with running(app) as port:
            clients.apply(load, (port, requests[:100], given.clients))  # warm-up
            found = clients.apply(load, (port, requests, given.clients))
        print(
            f"{name}: p50 {found['p50_ms']:.1f} ms, p99 {found['p99_ms']:.1f} ms, "
            f"{found['scores_per_s']:,.0f} scores/s, {found['errors']} errors"
        )
    clients.close()
    clients.join()


if __name__ == "__main__":
    main()
