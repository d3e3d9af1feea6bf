"""Model of a GPU that runs the programs of a launch in any order, element by element.

Triton's interpreter runs one program after the other. Here each program is a thread, one of them
runs at a time, and at each element of a load, store or atomic another may go on. A plain load may
return an older value of this launch, as from a line of a cache that other processors do not keep
up to date; but never one older than what the program itself has read or stored there.

``install`` changes the interpreter of this process for good: use it in a process of its own.
"""

from __future__ import annotations

import inspect
import random
import threading

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

_AT_ONCE = 6  # programs of a launch that are under way

MUTANTS = ("cas", "minimum")
"""Faults to plant: a compare-and-swap whose answer is ignored; a minimum that is not atomic."""


class _Failed(BaseException):
    """Ends the other programs of a launch when one has failed."""


class _Program(threading.Thread):
    def __init__(self, launch, number):
        super().__init__(daemon=True)
        self.launch, self.number, self.turn = launch, number, threading.Lock()
        self.turn.acquire()
        self.seen = {}  # address -> number of older values that this program cannot read any more

    def run(self):
        self.turn.acquire()
        try:
            if self.launch.error is None:
                self.launch.work()
        except _Failed:
            pass
        except BaseException as error:
            self.launch.error = self.launch.error or error
        self.launch.leave(self)


class Launch:
    """One launch: its programs, and the older values of what it has written."""

    def __init__(self, model, num_programs, work):
        self.model, self.work, self.error = model, work, None
        self.older = {}  # address -> values that it had before, in this launch
        self.waiting = [_Program(self, number) for number in range(num_programs)]
        self.waiting.reverse()
        self.active, self.is_over = [], threading.Lock()

    def run(self):
        self.is_over.acquire()
        self._fill_up()
        self.model.random.choice(self.active).turn.release()
        self.is_over.acquire()
        if self.error is not None:
            raise self.error

    def _fill_up(self):
        while self.waiting and len(self.active) < _AT_ONCE:
            program = self.waiting.pop()
            self.active.append(program)
            program.start()

    def leave(self, program):
        self.active.remove(program)
        self._fill_up()
        if self.active:
            self.model.random.choice(self.active).turn.release()
        else:
            self.is_over.release()

    def switch(self):
        """Let some program go on, perhaps another one."""
        current = threading.current_thread()
        following = self.model.random.choice(self.active)
        if following is not current:
            self.model.num_switches += 1
            following.turn.release()
            current.turn.acquire()
        if self.error is not None:
            raise _Failed


class Model:
    """Interpreter whose programs interleave.

    Args:
        seed: Of all choices: which program goes on, and which loads are stale.
        mutant: One of MUTANTS to plant, or None.
        stale: Probability that a load returns an older value where there is one.
    """

    def __init__(self, seed, mutant=None, stale=0.5):
        self.random, self.mutant, self.stale = random.Random(seed), mutant, stale
        self.num_launches = self.num_switches = self.num_stale = 0
        self._builder = interpreter.interpreter_builder
        self._launch = None

    def install(self):
        """Have all kernels of this process run by this model from now on."""
        builder = self._builder
        self._load, self._store = builder.create_masked_load, builder.create_masked_store
        self._cas, self._rmw = builder.create_atomic_cas, builder.create_atomic_rmw
        self._program_id = builder.create_get_program_id
        builder.create_get_program_id = self.program_id
        builder.create_masked_load, builder.create_masked_store = self.load, self.store
        builder.create_atomic_cas, builder.create_atomic_rmw = self.cas, self.rmw
        model = self

        def call(executor, *args, **kwargs):
            model.launch(executor, args, kwargs)

        interpreter.GridExecutor.__call__ = call

    def launch(self, executor, args, kwargs):
        """Run one launch of a kernel, as ``GridExecutor`` does."""
        function = executor.fn
        known = inspect.getfullargspec(function).args
        given = inspect.getcallargs(
            function, *args, **{name: value for name, value in kwargs.items() if name in known}
        )
        scope = interpreter._patch_lang(function)
        try:
            given = {
                name: value if name in executor.constexprs else interpreter._implicit_cvt(value)
                for name, value in given.items()
            }
            (num_programs,) = executor.grid
            self._builder.set_grid_dim(num_programs, 1, 1)
            self.num_launches += 1
            self._launch = Launch(self, num_programs, lambda: function(**given))
            self._launch.run()
        finally:
            self._launch = None
            scope.restore()

    def program_id(self, axis):
        number = threading.current_thread().number if axis == 0 else 0
        return TensorHandle(np.array([number], np.int32), tl.int32)

    def _parts(self, mask):
        """Yield which elements come next, until all have come; others may come between."""
        left = np.flatnonzero(mask)
        order = list(left)
        self.random.shuffle(order)
        while order:
            self._launch.switch()
            count = 1 if len(order) < 2 else self.random.randint(1, len(order))
            yield order[:count]
            order = order[count:]

    def load(self, pointers, mask, other, *policy):
        result = self._load(pointers, _none(mask), other, *policy)
        found, addresses = result.data.copy(), pointers.data
        flat, at = found.reshape(-1), addresses.reshape(-1)
        element = pointers.get_element_ty()
        on = np.broadcast_to(mask.data, addresses.shape).reshape(-1)
        for part in self._parts(on):
            now = self._load(_pointers(at[part], pointers), _all(len(part)), None, *policy).data
            for i, value in zip(part, now, strict=True):
                flat[i] = self._seen(int(at[i]), value)
        return TensorHandle(found, element)

    def _seen(self, address, now):
        """Return what a program reads at an address: its value, or an older one."""
        older, program = self._launch.older.get(address), threading.current_thread()
        if not older:
            return now
        first = program.seen.get(address, 0)
        if first < len(older) and self.random.random() < self.stale:
            chosen = self.random.randrange(first, len(older))
            program.seen[address] = chosen
            self.num_stale += 1
            return older[chosen]
        program.seen[address] = len(older)
        return now

    def _note(self, pointers):
        """Keep the values of some elements that are about to change."""
        before = self._load(pointers, _all(pointers.data.size), None, None, False).data
        for address, value in zip(pointers.data.tolist(), before, strict=True):
            self._launch.older.setdefault(address, []).append(value)

    def store(self, pointers, value, mask, *policy):
        shape = np.broadcast_shapes(pointers.data.shape, value.data.shape, mask.data.shape)
        at, values, on = (
            np.broadcast_to(handle.data, shape).reshape(-1) for handle in (pointers, value, mask)
        )
        for part in self._parts(on):
            cells = _pointers(at[part], pointers)
            self._note(cells)
            self._store(cells, TensorHandle(values[part], value.dtype), _all(len(part)), *policy)
            program = threading.current_thread()
            for address in at[part].tolist():
                program.seen[address] = len(self._launch.older[address])

    def cas(self, pointer, expected, value, *policy):
        shape = np.broadcast_shapes(pointer.data.shape, expected.data.shape, value.data.shape)
        at, old, new = (
            np.broadcast_to(handle.data, shape).reshape(-1) for handle in (pointer, expected, value)
        )
        found = np.empty_like(old)
        for part in self._parts(np.ones(at.size, bool)):
            for i in part:
                cell = _pointers(at[i : i + 1], pointer)
                self._note(cell)
                one = slice(i, i + 1)
                answer = self._cas(
                    cell,
                    TensorHandle(old[one].copy(), expected.dtype),
                    TensorHandle(new[one].copy(), value.dtype),
                    *policy,
                )
                found[i] = answer.data[0]
        if self.mutant == "cas":
            found = old.copy()
        return TensorHandle(found.reshape(shape), expected.dtype.scalar)

    def rmw(self, operation, pointer, value, mask, *policy):
        shape = np.broadcast_shapes(pointer.data.shape, value.data.shape, mask.data.shape)
        at, values, on = (
            np.broadcast_to(handle.data, shape).reshape(-1) for handle in (pointer, value, mask)
        )
        found = np.zeros(at.size, values.dtype)
        for part in self._parts(on):
            for i in part:
                cell, one = _pointers(at[i : i + 1], pointer), slice(i, i + 1)
                given = TensorHandle(values[one].copy(), value.dtype)
                if self.mutant == "minimum" and "MIN" in str(operation):
                    before = self.load(cell, _all(1), None, None, False).data
                    self.store(
                        cell,
                        TensorHandle(np.minimum(before, values[one]), value.dtype),
                        _all(1),
                        None,
                    )
                    continue
                self._note(cell)
                found[i] = self._rmw(operation, cell, given, _all(1), *policy).data[0]
        return TensorHandle(found.reshape(shape), value.dtype.scalar)


def _pointers(addresses, like):
    return TensorHandle(np.ascontiguousarray(addresses), like.dtype)


def _all(count):
    return TensorHandle(np.ones(count, bool), tl.int1)


def _none(mask):
    return TensorHandle(np.zeros_like(mask.data), tl.int1)


__all__ = ["MUTANTS", "Model"]
