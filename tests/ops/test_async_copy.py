"""Ring of memory for copies to a device, with events in place of a GPU's."""

import threading

import numpy as np
import pytest
import torch

from recis_lightning.ops import async_copy
from recis_lightning.ops.async_copy import Ring

CPU = torch.device("cpu")


class Event:
    """Behind what was sent before it was made; waiting for it does what a device would have."""

    def __init__(self, device):
        self._device, self._upto = device, len(device.copies)

    def synchronize(self):
        self._device.num_waits += 1
        self._device.run(self._upto)


class LateDevice:
    """Copies only when somebody waits for it, as late as a GPU may."""

    def __init__(self, monkeypatch):
        self.copies, self.num_events, self.num_waits, self._done = [], 0, 0, 0
        monkeypatch.setattr(async_copy, "_copy", self._note)

    def _note(self, source, device, target):
        target = torch.zeros_like(source) if target is None else target
        self.copies.append((source, target))
        return target

    def record_event(self):
        self.num_events += 1
        return Event(self)

    def run(self, upto):
        for source, target in self.copies[self._done : upto]:
            target.copy_(source)
        self._done = max(self._done, upto)


@pytest.fixture
def device(monkeypatch):
    return LateDevice(monkeypatch)


def test_nothing_is_written_over_before_it_was_copied(device):
    """Sizes do not divide a part, and the device does nothing until the host waits."""
    ring = Ring(256, 3, device.record_event, is_pinned=False)
    rng = np.random.default_rng(0)
    sent = []
    for turn in range(200):
        values = rng.integers(0, 99, int(rng.integers(0, 33)))
        if turn % 3 == 0:
            values = values.astype(np.float32).reshape(-1, 1)
        target = (
            None if turn % 2 else torch.zeros(values.shape, dtype=torch.from_numpy(values).dtype)
        )
        sent.append((values.copy(), ring.send(values, CPU, target)))
        values[:] = -1  # the caller may
    device.run(len(device.copies))
    for wanted, found in sent:
        assert found.dtype == torch.from_numpy(wanted).dtype
        assert found.numpy().tolist() == wanted.tolist()
    assert device.num_waits == device.num_events - 2  # the first turns meet parts without any


def test_a_copy_needs_no_event_of_its_own(device):
    ring = Ring(1 << 12, 4, device.record_event, is_pinned=False)
    for _ in range(64 * 3):
        ring.send(np.arange(8), CPU, None)
    assert device.num_events == 2
    assert device.num_waits == 0


def test_threads_share_a_ring(device):
    """Each thread's arrays arrive whole."""
    ring = Ring(256, 2, device.record_event, is_pinned=False)
    sent = []

    def work(number):
        for i in range(100):
            values = np.full(5, 1000 * number + i)
            sent.append((values, ring.send(values, CPU, None)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    device.run(len(device.copies))
    assert len(sent) == 400
    assert all(np.array_equal(values, found.numpy()) for values, found in sent)


def test_copies_to_the_cpu_are_copies():
    values = np.arange(3)
    copied, target = async_copy.to_device_async(values, CPU), torch.zeros(3, dtype=torch.int64)
    async_copy.copy_async_(target, values)
    values[:] = 9
    assert copied.tolist() == target.tolist() == [0, 1, 2]
