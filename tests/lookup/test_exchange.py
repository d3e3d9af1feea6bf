"""Headers over rows that came from other ranks, and the bytes that travel in a step."""

import pytest
import torch

from recis_lightning.distributed.message_memory import MessageMemory
from recis_lightning.lookup.exchange import header_over
from recis_lightning.ops import backend, embedding_bag
from recis_lightning.ops import layout as fields
from tests.helpers import rank_traffic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 4, 33])
@pytest.mark.parametrize("kind", ["cpu", "triton"])
def test_received_rows_are_found_as_those_of_a_table(kind, dim, dtype):
    """Beside a GPU each begins at a multiple of 16 bytes, and is none of the sender's memory."""
    rows = torch.arange(5 * dim).view(5, dim).to(dtype)
    with backend.use(kind):
        header, memory = header_over(rows)
        row_bytes = int(header.fields[fields.ROW_BYTES])
        wanted = torch.tensor([4, 0, -1, 4])
        found = embedding_bag.gather_rows(header, wanted, dim, dtype)
    assert (memory[0].data_ptr() != rows.data_ptr()) == (row_bytes != dim * dtype.itemsize)
    assert kind != "triton" or row_bytes % 16 == 0
    assert found.equal(torch.cat([rows[[4, 0]], torch.zeros(1, dim), rows[[4]]]).to(dtype))


def test_messages_have_the_bytes_that_the_page_names(ranks):
    """On two nodes of two ranks, by the formulas on the page."""
    ranks.run(4, rank_traffic.all_cases, timeout_s=200)


def test_memory_of_a_message_is_taken_again():
    """As soon as nobody has it; messages of another width have their own."""
    memory, cpu, rows = MessageMemory(), torch.device("cpu"), 1 << 20
    first = memory.empty(rows, 2, torch.float32, cpu)
    other = memory.empty(rows, 3, torch.float32, cpu)
    assert (first.shape, other.shape) == ((rows, 2), (rows, 3))
    first.fill_(1), other.fill_(2)
    assert bool((first == 1).all())
    address = first.data_ptr()
    second = memory.empty(rows, 2, torch.float32, cpu)
    assert second.data_ptr() != address
    del first
    assert memory.empty(rows - 1, 2, torch.float32, cpu).data_ptr() == address
    assert memory.empty(0, 2, torch.int64, cpu).shape == (0, 2)
