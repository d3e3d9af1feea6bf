"""Order and deals: every row once, for any ranks, lanes, batches and interruptions."""

import random

import pytest
import torch

from recis_lightning.data.order import Deal, Span, blocks_of, row_order, whole


def rows_in(spans):
    """List the rows of spans."""
    return [(span.block, row) for span in spans for row in range(span.start, span.stop)]


def test_order_is_a_function_of_seed_and_epoch():
    sizes = [5, 3, 8, 2, 2, 7]
    orders = {
        (seed, epoch): str(blocks_of(sizes, 6, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert orders[1, 1] == str(blocks_of(sizes, 6, 1, 1))
    # NumPy keeps this stream, and resuming a run of an older version relies on it.
    assert [block.splits for block in blocks_of(sizes, 6, 0, 0)] == [(3, 2), (5,), (4, 0), (1,)]
    assert row_order(1, 6, 6, 0, 3).tolist() == [5, 3, 0, 4, 2, 1]
    assert row_order(1, 6, 0, 0, 3) is None


@pytest.mark.parametrize("shuffle_rows", [0, 1, 6, 1000])
def test_blocks_hold_every_split_once(shuffle_rows):
    sizes = [5, 3, 8, 2, 2, 7]
    blocks = blocks_of(sizes, shuffle_rows, 3, 4)
    assert sorted(index for block in blocks for index in block.splits) == list(range(6))
    assert [block.num_rows for block in blocks] == [sum(sizes[i] for i in b.splits) for b in blocks]
    assert all(block.num_rows >= shuffle_rows for block in blocks[:-1])
    assert blocks_of([], shuffle_rows, 0, 0) == []


@pytest.mark.parametrize("total", [0, 1, 2, 5, 12, 13, 24, 25])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_deal_gives_each_row_to_one_batch(total, num_ranks, lanes, drop_last):
    """All ranks take equally many batches; lanes hold exactly the rows of theirs."""
    spans = whole(blocks_of([size for size in (total // 3, total - total // 3) if size], 0, 0, 0))
    deal = Deal(spans, num_ranks, 4, lanes, drop_last)
    taken = []
    for rank in range(num_ranks):
        sizes = deal.batch_sizes(rank)
        assert len(sizes) == deal.num_batches
        assert all(size == 4 for size in sizes[:-1])
        if total >= num_ranks and sizes:
            assert sizes[-1] == 4 if drop_last else 1 <= sizes[-1] <= 5
        for lane, lane_spans in enumerate(deal.lanes_of(rank)):
            assert len(rows_in(lane_spans)) == sum(sizes[lane::lanes])
            taken += rows_in(lane_spans)
    assert len(set(taken)) == len(taken)
    if drop_last:
        assert total - len(taken) < 4 * num_ranks + num_ranks
    else:
        assert sorted(taken) == sorted(rows_in(spans))
        assert rows_in(deal.left_after(deal.num_batches)) == []
    assert sorted(rows_in(deal.left_after(0))) == sorted(taken)


def test_any_sequence_of_interruptions_leaves_each_row_once():
    """Ranks, batch sizes and lanes change at random places, as when a run is resumed elsewhere."""
    draw = random.Random(5)
    for _ in range(300):
        sizes = [draw.randint(1, 9) for _ in range(draw.randint(1, 9))]
        everything = whole(blocks_of(sizes, draw.choice([0, 5]), draw.randint(0, 9), 0))
        spans, seen = everything, []
        while spans:
            deal = Deal(spans, draw.randint(1, 4), draw.randint(1, 5), draw.randint(1, 3))
            steps = draw.randint(0, deal.num_batches)
            left = deal.left_after(steps)
            taken = set(rows_in(spans)) - set(rows_in(left))
            assert len(taken) + len(rows_in(left)) == len(rows_in(spans))
            seen += taken
            spans = left
        assert sorted(seen) == sorted(rows_in(everything))


def test_rows_stay_in_order_on_each_rank():
    deal = Deal([Span(0, 2, 9), Span(3, 0, 4)], num_ranks=3, batch_size=2)
    runs = [rows_in(deal.lanes_of(rank)[0]) for rank in range(3)]
    assert [row for run in runs for row in run] == rows_in([Span(0, 2, 9), Span(3, 0, 4)])
    assert [len(run) for run in runs] == [3, 4, 4]


def test_row_orders_of_blocks_differ():
    orders = {tuple(row_order(block, 50, 1, 0, 0).tolist()) for block in range(4)}
    assert len(orders) == 4
    assert torch.equal(row_order(0, 50, 1, 0, 0).sort().values, torch.arange(50))
