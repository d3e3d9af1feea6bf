"""Traces for tests: reading a data set back, and a disk that is soon full."""

import contextlib
import resource

import pyarrow.dataset


def read_trace(path):
    """Return the whole data set, in the order of its steps, as columns."""
    table = pyarrow.dataset.dataset(path, partitioning="hive").to_table()
    return table.sort_by([("step", "ascending"), ("rank", "ascending")]).to_pydict()


@contextlib.contextmanager
def limited_file_size(num_bytes=20_000):
    """Let no file of this process grow beyond ``num_bytes``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
