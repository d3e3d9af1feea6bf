"""export_index: what each library finds is what a full search finds; what is refused."""

import sys

import numpy as np
import pytest
import torch

from recis_lightning import DynamicEmbedding, HashTable, serving
from tests.helpers.sample_tables import HIGH, LOW

LIBRARIES = ("faiss", "hnswlib", "usearch")
IDS = torch.tensor([LOW, -7, 0, 3, 2**40, HIGH, *range(100, 134)])


def filled(dim=5, dtype=torch.float32):
    table = HashTable(dim, dtype=dtype, name="item")
    generator = torch.Generator().manual_seed(0)
    table.insert(IDS, torch.randn(len(IDS), dim, generator=generator))
    return table


def search(library, path, queries, k, metric="inner_product"):
    """Return what the library finds in a file, as an int64 array of ids [n, k]."""
    if library == "faiss":
        import faiss

        return faiss.read_index(str(path)).search(queries.numpy(), k)[1]
    if library == "hnswlib":
        import hnswlib

        space = {"inner_product": "ip", "cosine": "cosine", "l2": "l2"}[metric]
        index = hnswlib.Index(space, queries.shape[1])
        index.load_index(str(path))
        index.set_ef(100)
        return index.knn_query(queries.numpy(), k)[0].view(np.int64)
    from usearch.index import Index

    return np.asarray(Index.restore(str(path)).search(queries.numpy(), k).keys).view(np.int64)


def full_search(ids, vectors, queries, k, metric):
    if metric == "l2":
        scores = -torch.cdist(queries, vectors)
    else:
        lengths = vectors.norm(dim=1) if metric == "cosine" else 1
        scores = queries @ vectors.T / lengths
    return ids[scores.topk(k).indices].numpy()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("metric", ["inner_product", "cosine", "l2"])
def test_an_index_finds_what_a_full_search_finds(library, metric, tmp_path):
    pytest.importorskip(library)
    table, path = filled(), tmp_path / "item.index"
    queries = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    path.write_bytes(b"an older file")
    assert serving.export_index(table, path, library, metric=metric) == len(IDS)
    wanted = full_search(IDS, table.embeddings(IDS), queries, 4, metric)
    np.testing.assert_array_equal(search(library, path, queries, 4, metric), wanted)
    assert [file.name for file in tmp_path.iterdir()] == ["item.index"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_vectors_of_a_tower_are_indexed(library, tmp_path, monkeypatch):
    """In chunks, in bfloat16 too, without a gradient."""
    pytest.importorskip(library)
    monkeypatch.setattr("recis_lightning.serving.vector_index._CHUNK_ROWS", 7)
    item = DynamicEmbedding(5, dtype=torch.bfloat16).eval()
    item.table.insert(IDS, filled().embeddings(IDS))
    tower = torch.nn.Linear(5, 3, dtype=torch.bfloat16)
    path = tmp_path / "item.index"
    options = {"encode": lambda ids: tower(item(ids)), "metric": "l2"}
    assert serving.export_index(item.table, path, library, **options) == len(IDS)
    vectors = tower(item(IDS)).detach().float()
    found = search(library, path, vectors, 1, "l2")
    np.testing.assert_array_equal(found[:, 0], IDS.numpy())


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_empty_table_is_an_empty_index(library, tmp_path):
    pytest.importorskip(library)
    assert serving.export_index(HashTable(4), tmp_path / "index", library) == 0
    if library == "faiss":
        assert search(library, tmp_path / "index", torch.zeros(1, 4), 2).tolist() == [[-1, -1]]


def test_faiss_trains_what_its_factory_names(tmp_path):
    pytest.importorskip("faiss")
    table, path = filled(), tmp_path / "index"
    serving.export_index(table, path, settings={"factory": "SQ8"}, metric="l2")
    found = search("faiss", path, table.embeddings(IDS), 1)
    np.testing.assert_array_equal(found[:, 0], IDS.numpy())
    with pytest.raises(TypeError, match="settings: faiss takes 'factory', got"):
        serving.export_index(table, path, settings={"M": 3})


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_is_missing_is_named_with_its_package(library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    package = {"faiss": "faiss-cpu"}.get(library, library)
    with pytest.raises(ModuleNotFoundError, match=f"'{library}' .*pip install {package}$"):
        serving.export_index(filled(), tmp_path / "index", library)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_of_the_tower_keeps_its_own_error(tmp_path):
    def encode(ids):
        import no_such_package  # noqa: F401

    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_package'"):
        serving.export_index(filled(), tmp_path / "index", encode=encode)


@pytest.mark.parametrize("library", ["faiss", "usearch"])
def test_the_id_that_stands_for_none_is_refused(library, tmp_path):
    table = filled()
    table.insert(torch.tensor([-1]), torch.ones(1, 5))
    with pytest.raises(ValueError, match=f"table 'item': {library} cannot hold its id -1"):
        serving.export_index(table, tmp_path / "index", library)


def test_what_cannot_be_indexed_is_refused_and_changes_no_file(tmp_path):
    table, path = filled(), tmp_path / "index"
    path.write_bytes(b"older")
    for options, error, words in [
        ({"library": "annoy"}, ValueError, "library: expected one of"),
        ({"metric": "dot"}, ValueError, "metric: expected one of"),
        ({"encode": lambda ids: ids}, TypeError, "encode: expected it to return a floating"),
        ({"encode": lambda ids: torch.zeros(3, 2)}, ValueError, r"encode: .*got \[3, 2\]"),
        ({"encode": lambda ids: torch.zeros(len(ids))}, ValueError, "encode: expected vectors"),
        ({"encode": lambda ids: torch.full((len(ids), 2), torch.nan)}, ValueError, "NaN or Inf"),
    ]:
        with pytest.raises(error, match=words):
            serving.export_index(table, path, **options)
    with pytest.raises(TypeError, match="expected a HashTable, got DynamicEmbedding; pass its"):
        serving.export_index(DynamicEmbedding(2), path)
    assert path.read_bytes() == b"older"
    assert len(list(tmp_path.iterdir())) == 1
