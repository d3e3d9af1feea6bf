"""``export_index``: a table's vectors to an index of faiss, hnswlib or usearch."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.arguments import check_path
from recis_lightning.distributed import collectives
from recis_lightning.table.hash_table import HashTable

METRICS = ("inner_product", "cosine", "l2")
_CHUNK_ROWS = 1 << 16  # vectors made at once

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]


class _IndexWriter(Protocol):
    """Index of a library while it is filled."""

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Add vectors, float32 [n, dim]."""

    def save(self, path: str) -> None:
        """Write the index to a file."""


def export_index(
    table: HashTable,
    path: str | os.PathLike[str],
    library: str = "faiss",
    *,
    metric: str = "inner_product",
    encode: Callable[[Tensor], Tensor] | None = None,
    settings: dict[str, Any] | None = None,
) -> int:
    """Write a table's ids and vectors as an index for nearest-neighbour search.

    The file is the library's own: it is opened with ``faiss.read_index``, ``Index.load_index`` of
    hnswlib or ``usearch.index.Index.restore``. It appears whole, or not at all. faiss keeps ids as
    int64; hnswlib and usearch as uint64, of which ``keys.view(numpy.int64)`` makes ids again. Ids
    are added in ascending order, by one thread where the library lets it, so that an equal table
    gives an equal index.

    Args:
        table: The table, of one process.
        path: Of the file, which is replaced.
        library: "faiss" (exact unless ``settings`` say else), "hnswlib" or "usearch" (graphs).
        metric: "inner_product", "cosine" or "l2" (squared distance). For faiss, vectors are scaled
            to length 1 for "cosine"; scale the queries too.
        encode: Function of ids, int64 [m] on the table's device, to vectors [m, dim], such as a
            model's item tower in ``eval()``; called without gradients, and no thread may train the
            table meanwhile. None takes the rows.
        settings: For faiss ``{"factory": "Flat"}``, as ``faiss.index_factory`` takes it; for
            hnswlib arguments of ``init_index`` (``M``, ``ef_construction``, ``random_seed``); for
            usearch arguments of ``Index`` (``connectivity``, ``expansion_add``, ``dtype``).

    Returns:
        The number of vectors in the index.

    Raises:
        TypeError, ValueError: An argument is not what it should be; a vector has NaN or Inf; or the
            table has id -1, which faiss and usearch cannot hold. No file has changed.
        IsADirectoryError: ``path`` is a folder.
        ModuleNotFoundError: The library is not installed; says what to install.
        RuntimeError: The table's rows are spread over ranks.

    Example:
        >>> export_index(item.table, "item.faiss", encode=model.item_tower)  # doctest: +SKIP
        1682
        >>> index = faiss.read_index("item.faiss")  # doctest: +SKIP
        >>> scores, ids = index.search(queries.numpy(), 50)  # doctest: +SKIP
    """
    if not isinstance(table, HashTable):
        advice = "; pass its .table" if isinstance(getattr(table, "table", None), HashTable) else ""
        raise TypeError(f"table: expected a HashTable, got {type(table).__name__}{advice}")
    if library not in list(_WRITERS):
        raise ValueError(f"library: expected one of {sorted(_WRITERS)}, got {library!r}")
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {METRICS}, got {metric!r}")
    if collectives.world_size(table.process_group) > 1:
        raise RuntimeError(
            f"table {table.name!r}: its rows are spread over ranks; load its checkpoint in one "
            "process, and export there"
        )
    if encode is not None and not callable(encode):
        raise TypeError(f"encode: expected a function of ids, got {encode!r}")
    if not isinstance(settings, dict | None):
        raise TypeError(f"settings: expected a dict or None, got {settings!r}")
    needed = _WRITERS[library]
    target = check_path("path", path)
    if target.is_dir():
        raise IsADirectoryError(f"path: expected a file, and {target} is a folder")
    try:
        with torch.no_grad():
            ids, chunks = _chunks(table, encode)
            if needed.reserves_minus_one and bool((ids == -1).any()):
                raise ValueError(f"table {table.name!r}: {library} cannot hold its id -1")
            writer: _IndexWriter | None = None
            for start, vectors in chunks:
                if writer is None:
                    size = (vectors.shape[1], len(ids))
                    writer = needed.open(*size, metric, dict(settings or {}))
                writer.add(ids[start : start + len(vectors)], vectors)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != library:
            raise
        raise ModuleNotFoundError(
            f"library: {library!r} is not installed; run pip install {needed.package}",
            name=error.name,
        ) from None
    assert writer is not None  # there is a chunk of an empty table too
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        writer.save(str(temporary))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return len(ids)


def _chunks(
    table: HashTable, encode: Callable[[Tensor], Tensor] | None
) -> tuple[Ids, Iterator[tuple[int, Vectors]]]:
    """Return a table's ids, ascending, and pairs of a place in them and the vectors from there."""
    if encode is None:
        ids, rows = table.gather()  # of one moment
        read: Callable[[slice], Any] = lambda part: rows[part]  # noqa: E731
        dim: int | None = table.embedding_dim
    else:
        ids = table.ids(all_ranks=True)
        read, dim = lambda part: encode(ids[part]), None

    def vectors() -> Iterator[tuple[int, Vectors]]:
        for start in range(0, max(len(ids), 1), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            yield start, _checked(read(part), len(ids[part]), dim, table.name)

    return ids.cpu().numpy(), vectors()


def _checked(vectors: Any, count: int, dim: int | None, name: str) -> Vectors:
    """Return vectors as float32 [count, dim], or raise."""
    if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
        raise TypeError(f"encode: expected it to return a floating Tensor, got {type(vectors)}")
    if vectors.dim() != 2 or len(vectors) != count or (dim or vectors.shape[1]) < 1:
        raise ValueError(f"encode: expected vectors [{count}, dim], got {list(vectors.shape)}")
    found = vectors.detach().float().cpu().contiguous()
    if not bool(found.isfinite().all()):
        raise ValueError(f"table {name!r}: a vector has NaN or Inf, which no index can order")
    return found.numpy()


class _Faiss:
    """Index of faiss."""

    def __init__(self, dim: int, count: int, metric: str, settings: dict[str, Any]) -> None:
        import faiss

        self._normalize = faiss.normalize_L2 if metric == "cosine" else None
        kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        factory = settings.pop("factory", "Flat")
        if settings:
            raise TypeError(f"settings: faiss takes 'factory', got {sorted(settings)} too")
        self._index = faiss.index_factory(dim, f"IDMap2,{factory}", kind)
        self._write, self._parts = faiss.write_index, list[tuple[Ids, Vectors]]()

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Keep vectors; an index that must be trained is trained with all of them."""
        if self._normalize is not None:
            vectors = vectors.copy()
            self._normalize(vectors)
        if self._index.is_trained:
            self._index.add_with_ids(vectors, ids)
        else:
            self._parts.append((ids, vectors))

    def save(self, path: str) -> None:
        """Train the index if need be, and write it."""
        if self._parts:
            ids, vectors = (np.concatenate(arrays) for arrays in zip(*self._parts, strict=True))
            self._index.train(vectors)
            self._index.add_with_ids(vectors, ids)
        self._write(self._index, path)


class _Hnswlib:
    """Index of hnswlib."""

    def __init__(self, dim: int, count: int, metric: str, settings: dict[str, Any]) -> None:
        import hnswlib

        space = {"inner_product": "ip", "cosine": "cosine", "l2": "l2"}[metric]
        self._index = hnswlib.Index(space, dim)
        self._index.init_index(max_elements=count, **settings)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Add vectors, in order."""
        if len(ids):
            self._index.add_items(vectors, ids.view(np.uint64), num_threads=1)

    def save(self, path: str) -> None:
        """Write the index."""
        self._index.save_index(path)


class _Usearch:
    """Index of usearch."""

    def __init__(self, dim: int, count: int, metric: str, settings: dict[str, Any]) -> None:
        import usearch.index

        kind = {"inner_product": "ip", "cosine": "cos", "l2": "l2sq"}[metric]
        self._index = usearch.index.Index(ndim=dim, metric=kind, **{"dtype": "f32", **settings})

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Add vectors, in order."""
        if len(ids):
            self._index.add(ids.view(np.uint64), vectors, threads=1)

    def save(self, path: str) -> None:
        """Write the index."""
        self._index.save(path)


class _Library(NamedTuple):
    """Library of indexes.

    Attributes:
        open: Class of its writer.
        package: To install.
        reserves_minus_one: Whether id -1 stands for none.
    """

    open: Callable[[int, int, str, dict[str, Any]], _IndexWriter]
    package: str
    reserves_minus_one: bool


_WRITERS = {
    "faiss": _Library(_Faiss, "faiss-cpu", True),
    "hnswlib": _Library(_Hnswlib, "hnswlib", False),
    "usearch": _Library(_Usearch, "usearch", True),
}

__all__ = ["METRICS", "export_index"]
