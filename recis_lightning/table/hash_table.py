"""The dynamic hash table: any int64 id, rows appear on first use.

A table owns a ``Storage`` (index, rows, policy columns) and an ``Evictor``. Their tensors are plain
attributes, neither parameters nor buffers: they grow, DDP must not broadcast them, and optimizers
for dense parameters must not see them. They travel through ``state_dict`` as extra state. A
parameter without elements, the ``Anchor``, stands for them where torch freezes a module or drops
its gradients.
"""

from __future__ import annotations

import copy
import itertools
import operator
import uuid
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from recis_lightning import compiler
from recis_lightning.admission import Admission, Screening
from recis_lightning.arguments import (
    HINTS,
    check_bool,
    check_dtype,
    check_embedding_dim,
    check_exchange_dtype,
    check_ids,
    check_int,
    check_kinds,
    check_not_traced,
    check_seed,
    check_str,
    explain_arguments,
    is_fake_mode,
    refuse_fake_mode,
    refuse_recording,
    refuse_script,
)
from recis_lightning.distributed import collectives
from recis_lightning.distributed.process_group import ProcessGroup, check_process_group
from recis_lightning.eviction import Eviction
from recis_lightning.initializers import Initializer, Normal
from recis_lightning.ops import backend, embedding_bag, hash_index, row_init
from recis_lightning.ops.layout import NUM_UPDATES, STEP
from recis_lightning.table import copying, moving, settings
from recis_lightning.table import state as table_state
from recis_lightning.table.anchor import Anchor
from recis_lightning.table.evictor import Evicted, EvictionReport, Evictor, clock_of, kept_columns
from recis_lightning.table.gradient_exchange import exchange_gradients
from recis_lightning.table.insertion import insert_rows
from recis_lightning.table.lock import TableLock, read, reads, write, writes
from recis_lightning.table.pending_gradient import PendingGradient
from recis_lightning.table.reinitialization import reinitialize_rows
from recis_lightning.table.row_file import RowFile, check_rows
from recis_lightning.table.sampling import IdSample, check_policy, counts_of, draw
from recis_lightning.table.scan import RowSurvey, scan
from recis_lightning.table.statistics import Forgotten, TableStatistics
from recis_lightning.table.storage import Storage
from recis_lightning.table.undo import Undo
from recis_lightning.table.versions import layout_version, move_version


class Lookup(Protocol):
    """Lookup of a table's ids, which the room above provides."""

    def groups_of(self, table: HashTable) -> list[Any]:
        """Return the groups that look the table's ids up."""

    def look_up(self, table: HashTable, ids: Tensor) -> Tensor:
        """Return the rows of ids, [*, embedding_dim]."""


_lookup: Lookup | None = None
_live: weakref.WeakValueDictionary[int, HashTable] = weakref.WeakValueDictionary()
_birth = itertools.count()


@explain_arguments({**HINTS, "mode": "a table does not pool: use DynamicEmbeddingBag"})
class HashTable(nn.Module):
    """Table of rows by id.

    Args:
        embedding_dim: Weights in a row.
        initializer: How a new row starts.
        admission: Which unknown ids get a row; None admits all.
        eviction: Which rows ``evict`` removes; None none.
        dtype: torch.float32 or torch.bfloat16; optimizer state is float32.
        device: Where the table lives: "cpu", and there it stays when its module moves to a GPU, or
            "cuda". By default it is made on torch's default device and moves with its module.
        seed: With ``name`` and the id, what a new row's values depend on; None takes torch's
            initial seed, as ``seed_everything`` sets it.
        name: For logs and checkpoints. An unnamed table is named by ``hash_tables`` after its
            place in the module; trained before, it is "table", "table_2" and so on until then.
        trainable: Whether lookups leave gradients, as ``requires_grad`` of a parameter.
        process_group: Ranks that the table is sharded over; None means all of them.
        exchange_dtype: "bfloat16" sends rows and gradients between ranks in half of the bytes,
            rounded; None sends rows in ``dtype`` and gradients in float32.
        ranks_per_node: Ranks that share a node, one after the other: an id that several of them
            ask for travels once between nodes. None sends each rank's by themselves.
        rows: "file:/folder" lets the table grow beyond memory: rows that find no room there lie in
            a file of its own in the folder, which is gone when the table is. As many rows as leave
            half of the memory free stay in it, or "file:/folder?memory=8GiB" bytes. CPU only.
            The folder must be there, for each copy too. None keeps all rows in memory.

    Attributes:
        anchor: Parameter without elements that stands for the rows: ``requires_grad_``,
            ``zero_grad`` and freezing by Lightning reach them through it.
        storage: Ids, rows and columns; another one once the table has moved.
        evictor: Eviction of rows: policy, pins, listeners and counts.
        pending: Gradients that no optimizer step has used, always the same list.
        lock: By which threads read at once and change one after the other; tables that are looked
            up together share one.
        needs_reshard: Whether rows came that no lookup brought; of several ranks, others may own
            them.
        groups: Groups that look its ids up when it is called, as ``Lookup`` left them.
        shard_reference: While a checkpoint is written whose rows are in files of their own: the
            state that names these files.

    Raises:
        TypeError, ValueError: An argument is not what it should be.
        FileNotFoundError: The folder of ``rows`` is not there.

    Example:
        >>> table = HashTable(2, initializer=Normal(std=0.1), name="user")
        >>> table.insert(torch.tensor([7, -1]), torch.ones(2, 2))
        >>> len(table), table.embeddings(torch.tensor([7, 8])).tolist()
        (2, [[1.0, 1.0], [0.0, 0.0]])
    """

    _process_group: ProcessGroup | None = None
    _exchange_dtype: torch.dtype | None = None
    _ranks_per_node: int | None = None
    _rows: str | None = None
    default_name: str | None = None  # what it is called until it is named, once it was trained
    begun_as: str | None = None  # name by which new rows begin, if not by the table's

    def __init__(
        self,
        embedding_dim: int,
        *,
        initializer: Initializer | None = None,
        admission: Admission | None = None,
        eviction: Eviction | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
        seed: int | None = 0,
        name: str | None = None,
        trainable: bool = True,
        process_group: ProcessGroup | None = None,
        exchange_dtype: torch.dtype | str | None = None,
        ranks_per_node: int | None = None,
        rows: str | None = None,
    ) -> None:
        super().__init__()
        check_not_traced("HashTable", ())
        initializer = Normal(std=0.01) if initializer is None else initializer
        seed = torch.initial_seed() if seed is None else seed
        check_policies(initializer, admission, eviction)
        if not isinstance(seed, int):
            raise TypeError(f"seed: expected int, got {seed!r}")
        if name is not None:
            check_str("name", name)
        dim, dtype = check_embedding_dim(embedding_dim), check_dtype(dtype)
        check_seed(seed)
        check_bool("trainable", trainable)
        check_process_group(process_group)
        self._process_group = process_group
        self._exchange_dtype = check_exchange_dtype(exchange_dtype)
        if ranks_per_node is not None:
            self._ranks_per_node = check_int("ranks_per_node", ranks_per_node, least=1)
        self._rows = check_rows(rows)
        self.initializer, self.admission = initializer, admission
        made_on = backend.check_device(
            torch.get_default_device() if device is None else torch.device(device)
        )
        self._stays = device is not None and made_on.type == "cpu"
        self.seed, self.given_name = seed, name
        self._start(dim, dtype, made_on, eviction, trainable)

    def _start(
        self,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        eviction: Eviction | None,
        trainable: bool,
    ) -> None:
        """Make the parts of an empty table."""
        screening = None if self.admission is None else self.admission.screening
        self.lock = TableLock()
        self.storage = self._new_storage(
            dim, dtype, device, kept_columns(eviction), screening, clock_of(eviction)
        )
        self.pending: list[PendingGradient] = []
        # A table that stays on the CPU has an anchor that goes where its module's parameters go.
        place = torch.get_default_device() if self._stays else device
        self.anchor = Anchor.of(self.pending, place, trainable)
        self.evictor = Evictor(eviction, self.storage, self.pending)
        self.needs_reshard = False
        self.shard_reference: dict[str, Any] | None = None
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._originals: tuple[weakref.ref[HashTable], ...] = ()  # the nearest first
        # Shared with copies of copies and with pickled ones, whose state has it by now.
        self.family: str = vars(self).get("family") or uuid.uuid4().hex
        self.lock.streams.watch(self)
        self.groups: Any = None
        _live[next(_birth)] = self

    def _new_storage(
        self,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        columns: tuple[str, ...],
        screening: Screening | None,
        now: Callable[[], float],
    ) -> Storage:
        """Return an empty storage whose new rows start as this table's do."""
        if self._rows is not None and device.type != "cpu":
            raise ValueError(
                f"rows: table {self.name!r} has its rows in a file, {self._rows!r}, and cannot be "
                f"on {device}; give it device='cpu', or no rows"
            )
        storage = Storage(
            *(dim, dtype, device),
            kept_columns=columns,
            screening=screening,
            now=now,
            name=self.name,
            row_file=None if self._rows is None else RowFile(self._rows),
        )
        row_init.write_distribution(storage.header, *self.initializer.distribution(dim))
        storage.set_key(*self._key())
        return storage

    # ---- identity and settings

    @property
    def name(self) -> str:
        """The table's name, "table" as long as it has none."""
        return (self.default_name or "table") if self.given_name is None else self.given_name

    def _key(self) -> tuple[int, str, str | None]:
        """Return what new rows depend on: seed, name, and the name by which they begin."""
        return self.seed, self.name, self.begun_as

    def set_default_name(self, name: str) -> None:
        """Name the table unless it has a name; new rows begin as those do that it has."""
        if self.given_name is None:
            has_begun = self.default_name is not None and self.storage.rows.num_rows > 0
            self.begun_as = self.default_name if has_begun else None
            self.given_name = name

    def set_key(self, name: str | None, seed: int, begun_as: str | None = None) -> None:
        """Name the table, and let new rows depend on name and seed, or on another name."""
        self.begun_as = begun_as
        self.given_name, self.seed = name, seed

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        # Policies and the like may be changed at any time: the next lookup goes by them.
        if not settings.is_setting(name) or "storage" not in self.__dict__:
            super().__setattr__(name, value)
            return
        settings.check(name, value, self.storage)
        with self.storage.undo(self):
            super().__setattr__(name, value)
            settings.take_effect(name, value, self._key(), self.storage)

    @property
    def embedding_dim(self) -> int:
        """Weights in a row."""
        return self.storage.embedding_dim

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.storage.dtype

    @property
    def device(self) -> torch.device:
        """Where ids and rows are."""
        return self.storage.device

    @property
    def eviction(self) -> Eviction | None:
        """Policy by which ``evict`` removes rows; None removes none."""
        return self.evictor.policy

    @eviction.setter
    def eviction(self, policy: Eviction | None) -> None:
        self.evictor.policy = policy

    @property
    def trainable(self) -> bool:
        """Whether lookups leave gradients: ``requires_grad`` of the anchor."""
        anchor: Any = self._parameters["anchor"]  # __getattr__ takes longer
        return bool(anchor.requires_grad)

    @trainable.setter
    def trainable(self, trainable: bool) -> None:
        check_bool("trainable", trainable)
        self.anchor.requires_grad = trainable

    @property
    def process_group(self) -> ProcessGroup | None:
        """Ranks that the table is sharded over; None means all. A pickle leaves it out."""
        return self._process_group

    @property
    def exchange_dtype(self) -> torch.dtype | None:
        """Data type in which rows and gradients travel between ranks; None means their own."""
        return self._exchange_dtype

    @property
    def ranks_per_node(self) -> int | None:
        """Ranks of a node that ask other nodes together; None if each asks by itself."""
        return self._ranks_per_node

    @property
    def rows(self) -> str | None:
        """Where rows lie that find no room in memory, "file:/folder"; None: all are in memory."""
        return self._rows

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The sparse optimizer that updates this table, if one does."""
        return None if self._optimizer is None else self._optimizer()

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        layout_version.advance()

    @property
    def has_optimizer(self) -> bool:
        """Whether an optimizer has laid out the rows, even if it is gone."""
        return self._optimizer is not None

    @override
    def extra_repr(self) -> str:
        policies = {"admission": self.admission, "eviction": self.eviction}
        shown = [f"{key}={policy}" for key, policy in policies.items() if policy is not None]
        return ", ".join([f"{self.embedding_dim}", f"name={self.name!r}", *shown])

    # ---- steps

    @property
    def step(self) -> int:
        """Step with which training lookups mark rows; ``HashTableFilterHook`` advances it."""
        return self.storage.step

    def update_step(self, n: int = 1) -> None:
        """Advance ``step`` by ``n``; counts decay if the eviction policy has a ``half_life``.

        Raises:
            TypeError: ``n`` is no int.
            ValueError: ``step`` would not be an int64.
        """
        fields, halving = self.storage.header.fields, self.evictor.halving_steps
        before = fields.item(STEP)
        try:
            step = before + operator.index(n)
        except TypeError:
            raise TypeError(f"n: expected an int, got {n!r}") from None
        try:
            if halving is None or step // halving <= before // halving:
                fields[STEP] = step
            else:
                times = step // halving - before // halving
                write((self.lock,), self.storage.halve_counts, times, step)
        except OverflowError:
            raise ValueError(
                f"n: expected an int that keeps the step below 2**63, got {n!r} at {self.step}"
            ) from None

    @property
    def num_updates(self) -> int:
        """Optimizer steps that found a gradient for this table; Adam's bias correction counts."""
        count: int = self.storage.header.fields.item(NUM_UPDATES)
        return count

    @reads
    def last_seen(self, ids: Tensor) -> Tensor:
        """Return the step of each id's last training lookup, -1 for an unknown id.

        Args:
            ids: int64 [*].

        Returns:
            int64 [*].

        Raises:
            RuntimeError: No policy of this table keeps the step.
        """
        storage = self.storage
        if not storage.keeps_last_seen:
            raise RuntimeError(
                f"table {self.name!r} keeps no last_seen; give it a policy that does, such as "
                "eviction=GlobalStepFilter(filter_step=...)"
            )
        rows, last_seen = self._find(ids), storage.columns["last_seen"]
        steps, is_known = torch.full_like(rows, -1), rows >= 0
        steps[is_known] = last_seen[rows[is_known]]
        return steps.view(ids.shape)

    # ---- sizes

    def __len__(self) -> int:
        return len(self.storage)

    def __bool__(self) -> bool:
        return True  # an empty table is still a table

    @property
    def capacity(self) -> int:
        """Entries of the index; it grows before they are full."""
        return self.storage.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of index, rows (weights and optimizer state) and what policies keep."""
        return self.storage.nbytes + self.evictor.nbytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the rows that lie in a file; see ``rows``."""
        return self.storage.rows.mapped_bytes

    def statistics(self) -> TableStatistics:
        """Return sizes now, and counts since the table was made.

        Example:
            >>> table = HashTable(2)
            >>> table.insert(torch.tensor([7, 8, 9]), torch.ones(3, 2))
            >>> statistics = table.statistics()
            >>> statistics.rows, statistics.capacity, statistics.admitted
            (3, 64, 3)
        """
        return self.evictor.statistics()

    @reads
    def survey(
        self, start: float = 0.0, stop: float = 1.0, rows: Tensor | None = None
    ) -> RowSurvey:
        """Scan all rows, or some, for their ages and norms and for NaN and Inf.

        Ids lie in the index in the order of their hashes: those of a part of it are a random sample
        of all. Memory stays flat, however many rows are scanned.

        Args:
            start: Where in the index to begin, in [0, 1].
            stop: Where to end, in [start, 1].
            rows: int64 [n], scan these rows instead; negative ones are passed over.

        Raises:
            ValueError: ``start`` and ``stop`` are out of range.

        Example:
            >>> table = HashTable(2)
            >>> table.insert(torch.tensor([7, 8]), torch.tensor([[3.0, 4.0], [0.0, torch.nan]]))
            >>> survey = table.survey()
            >>> survey.num_rows, survey.norm_max, table.ids()[survey.nonfinite_rows].tolist()
            (2, 5.0, [8])
        """
        return scan(self.storage, start, stop, rows)

    # ---- lookups

    def current_groups(self) -> list[Any]:
        """Return the group by which the table is looked up when it is called."""
        assert _lookup is not None
        return _lookup.groups_of(self)

    @compiler.disable  # a lookup changes the table
    def forward(self, ids: Tensor) -> Tensor:
        """Look ids up as ``DynamicEmbedding`` does.

        In training mode an unknown id gets a row and gradients flow; ``embeddings`` only reads.

        Args:
            ids: int64 [*].

        Returns:
            [*, embedding_dim] in the table's dtype.

        Raises:
            TypeError: ``ids`` is not int64.
        """
        assert _lookup is not None
        return _lookup.look_up(self, ids)

    def __prepare_scriptable__(self) -> None:
        """Refuse ``torch.jit.script``, which asks for this."""
        refuse_script(f"table {self.name!r}")

    # ---- reading and writing rows

    def _find(self, ids: Tensor) -> Tensor:
        """Return int64 [n], the row of each id, negative where there is none."""
        check_not_traced(f"table {self.name!r}", [ids])
        return self.storage.find(check_ids(ids))

    @reads
    def ids_map(self) -> tuple[Tensor, Tensor]:
        """Return all ids and their rows, int64 [len] each, by row."""
        storage = self.storage
        ids, occupied = hash_index.id_of_row(storage.header, storage.rows.num_rows)
        if occupied.all():
            return ids, torch.arange(len(ids), device=ids.device)
        rows = occupied.nonzero().squeeze(1)
        return ids[rows], rows

    def ids(self, all_ranks: bool = False) -> Tensor:
        """Return all ids, int64 [len], in the order of their rows.

        Args:
            all_ranks: Those of all ranks' shards, ascending: the same on any number of ranks. A
                collective operation.

        Raises:
            TypeError: ``all_ranks`` is no bool.

        Example:
            >>> table = HashTable(2)
            >>> table.insert(torch.tensor([5, -1]), torch.zeros(2, 2))
            >>> table.ids().tolist(), table.ids(all_ranks=True).tolist()
            ([5, -1], [-1, 5])
        """
        check_bool("all_ranks", all_ranks)
        own = self.ids_map()[0]
        if not all_ranks:
            return own
        shards = collectives.gather(own.cpu(), self._process_group)
        found: Tensor = torch.cat(shards).unique()
        return found.to(own.device)

    def gather(self) -> tuple[Tensor, Tensor]:
        """Return the ids and rows of all ranks' shards, ascending by id: the same on every rank.

        A collective operation. Every rank then holds all rows, on the table's device: to search
        them, or to compare them with an unsharded table.

        Returns:
            int64 [n], and [n, embedding_dim] in the table's dtype; carries no gradient.

        Example:
            >>> table = HashTable(2)
            >>> table.insert(torch.tensor([5, -1]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
            >>> table.gather()
            (tensor([-1,  5]), tensor([[3., 4.],
                    [1., 2.]]))
        """
        shards = collectives.gather(self._own_rows(), self._process_group)
        ids = torch.cat([ids for ids, _ in shards])
        ids, order = ids.sort(stable=True)
        first = torch.ones_like(ids, dtype=torch.bool)  # rows that were inserted on all ranks
        first[1:] = ids[1:] != ids[:-1]
        rows = torch.cat([rows for _, rows in shards])[order[first]]
        return ids[first].to(self.device), rows.to(self.device)

    @reads
    def _own_rows(self) -> tuple[Tensor, Tensor]:
        """Return ids and rows of this rank's shard, on the CPU."""
        ids = self.ids_map()[0]
        return ids.cpu(), self.embeddings(ids).cpu()

    @reads
    def embeddings(self, ids: Tensor) -> Tensor:
        """Read rows and change nothing.

        Args:
            ids: int64 [*].

        Returns:
            [*, embedding_dim] in the table's dtype, zeros for unknown ids; carries no gradient.
        """
        rows = self._find(ids)
        weights = embedding_bag.gather_rows(
            self.storage.header, rows, self.embedding_dim, self.dtype
        )
        return weights.view(*ids.shape, self.embedding_dim)

    @reads
    def sample(
        self, n: int, by: str = "count", generator: torch.Generator | None = None
    ) -> IdSample:
        """Draw ids that have a row, with replacement: negatives to train a retrieval model with.

        The draws depend on the ids, their counts and the generator, not on where rows are. On
        several ranks each draws from its own shard. A call takes time in proportion to the table's
        rows, so draw for many batches at once if there are millions of them.

        Args:
            n: How many, an int >= 0.
            by: "count", in proportion to the occurrences of ids in training lookups (an ``insert``
                counts as one), which a policy such as ``MaxRows(n, by="count")`` keeps;
                "uniform", all ids alike.
            generator: Of the draws, on any device; None takes torch's of the CPU.

        Returns:
            ``ids``, int64 [n], and ``probabilities``, float64 [n], of each to be drawn (from this
            rank's shard).

        Raises:
            TypeError, ValueError: An argument is not what it should be.
            RuntimeError: The table keeps no counts, no id has one, or there are no rows.

        Example:
            >>> table = HashTable(2)
            >>> table.insert(torch.tensor([7, 8, 9, 10]), torch.zeros(4, 2))
            >>> sample = table.sample(3, by="uniform", generator=torch.Generator().manual_seed(0))
            >>> len(sample.ids), sample.probabilities.tolist()
            (3, [0.25, 0.25, 0.25])
        """
        check_not_traced(f"table {self.name!r}", ())
        return draw(self.storage, check_int("n", n, least=0), by, generator)

    def sampling_probabilities(self, ids: Tensor, by: str = "count") -> Tensor:
        """Return with what probability ``sample`` would draw each id: its share of all counts.

        Over all ranks' shards together, whatever the number of ranks; there it is a collective
        operation, to which each rank brings ids of its own.

        Args:
            ids: int64 [*]; each rank may have another number of them.
            by: As for ``sample``.

        Returns:
            float64 [*], 0 for an id without a row or a count.

        Raises:
            ValueError: ``by`` is something else.
            RuntimeError: The table keeps no counts.

        Example:
            >>> table = HashTable(2)
            >>> table.insert(torch.tensor([7, 8]), torch.zeros(2, 2))
            >>> table.sampling_probabilities(torch.tensor([7, 9]), by="uniform").tolist()
            [0.5, 0.0]
        """
        check_not_traced(f"table {self.name!r}", [ids])
        flat, group = check_ids(ids).reshape(-1), self._process_group
        check_policy(self.storage, by)
        parts = collectives.gather(flat.cpu(), group)
        start = sum(map(len, parts[: collectives.rank(group)]))
        counts = read((self.lock,), counts_of, self.storage, torch.cat(parts), by)
        counts = collectives.sum_over_ranks(counts, group)
        shares = counts[:-1].double() / counts[-1].clamp(min=1)
        return shares[start : start + flat.numel()].view(ids.shape)

    @writes
    def insert(self, ids: Tensor, embeddings: Tensor) -> None:
        """Set the weights of ids, giving the unknown ones a row whatever the admission policy.

        Known ids keep their optimizer state; new ones start with an empty one. All count as seen
        at ``step``. Of an id that occurs twice, the last row counts.

        Args:
            ids: int64 [*].
            embeddings: [*, embedding_dim], any floating dtype.

        Raises:
            TypeError: An argument is no tensor, or of another dtype.
            ValueError: The shapes do not fit.
        """
        check_not_traced(f"table {self.name!r}", [ids])
        flat = check_ids(ids).reshape(-1).to(self.device).contiguous()
        if not isinstance(embeddings, Tensor) or embeddings.is_complex():
            got = getattr(embeddings, "dtype", type(embeddings).__name__)
            raise TypeError(f"embeddings: expected a Tensor of a floating dtype, got {got}")
        if tuple(embeddings.shape) != (*ids.shape, self.embedding_dim):
            raise ValueError(
                f"embeddings: expected shape {(*ids.shape, self.embedding_dim)}, "
                f"got {tuple(embeddings.shape)}"
            )
        weights = embeddings.detach().to(self.device, self.dtype).resolve_neg()
        weights = weights.reshape(-1, self.embedding_dim)
        self.needs_reshard = True
        insert_rows(self.storage, self.evictor.readmissions, flat, weights)

    @writes
    def reinitialize(self, seed: int | None = None) -> None:
        """Give all rows other initial weights and an empty optimizer state.

        Ids, and what policies keep of them, stay; pending gradients are dropped, and the count of
        optimizer steps starts from 0. New ids start from the same seed from now on. On several
        ranks all call it.

        Args:
            seed: Of the new weights; None takes the one after the table's.

        Raises:
            TypeError, ValueError: ``seed`` is no int, or out of range; nothing has changed.

        Example:
            >>> table = HashTable(2, seed=5)
            >>> table.insert(torch.tensor([7]), torch.ones(1, 2))
            >>> table.reinitialize()
            >>> table.seed, table.embeddings(torch.tensor([7])).abs().max() < 0.1
            (6, tensor(True))
        """
        seed = check_seed((self.seed + 1 if self.seed < 2**64 - 1 else 0) if seed is None else seed)
        ids, rows = self.ids_map()
        reinitialize = partial(reinitialize_rows, self, ids, rows, seed)
        try:
            reinitialize()
        except BaseException:  # there is no way back: a second time from the beginning
            reinitialize()
            raise

    # ---- removing rows

    @writes
    def delete(self, ids: Tensor) -> int:
        """Remove ids, their rows and their pending gradients; return how many were known.

        Args:
            ids: int64 [*]; unknown ids are passed over.
        """
        storage, rows = self.storage, self._find(ids)
        gone = torch.zeros(storage.rows.num_rows, dtype=torch.bool, device=self.device)
        gone[rows[rows >= 0]] = True
        with storage.undo() as undo:
            for record in self.pending:
                undo.on_failure(partial(record.rows.copy_, record.rows.clone()))
                record.forget(storage.header, gone)
            return storage.remove_rows(gone, undo)

    @writes
    def forget(self, ids: Tensor) -> Forgotten:
        """Remove ids and all that is kept of them: rows, pending gradients, pins and counts.

        Beyond ``delete`` it overwrites the rows' memory, and removes pins, admission counts and
        the memory of evicted ids. Files that were written before keep what they have: write them
        anew, and let ``serving.find_traces`` look. On several ranks all call it with the same ids.

        Args:
            ids: int64 [*]; unknown ids are passed over.

        Returns:
            How many rows this rank removed, and whether a sketch still counts the ids.

        Example:
            >>> table = HashTable(2)
            >>> table.insert(torch.tensor([7, 8]), torch.ones(2, 2))
            >>> table.forget(torch.tensor([8, 9]))
            Forgotten(rows=1, sketch_counts_them=False)
        """
        rows = self._find(ids)
        flat = ids.reshape(-1).to(self.device).contiguous()
        removed = self.delete(ids)
        self.storage.erase(rows[rows >= 0].unique())
        self.unpin(ids)
        if self.evictor.readmissions is not None:
            self.evictor.readmissions.forget(flat.cpu())
        counter = self.storage.admission_counter
        return Forgotten(removed, counter is not None and not counter.forget(flat))

    @writes
    def clear(self) -> None:
        """Remove all ids, admission counts and pending gradients; step and optimizer stay."""
        with self.undo():
            self.pending.clear()  # a record may still serve other tables, and a retained graph
            self.storage.clear()

    def undo(self) -> Undo:
        """Return a context in which a change of the table is undone if it does not succeed."""
        undo, pending = self.storage.undo(self, self.evictor), list(self.pending)
        undo.on_failure(lambda: self.pending.__setitem__(slice(None), pending))
        return undo

    @writes
    def compact(self) -> None:
        """Give back the memory of rows and entries that are not needed for the ids there are.

        Rows get other numbers; so there must be no pending gradient.

        Raises:
            RuntimeError: There is one.
        """
        if self.pending:
            raise RuntimeError(
                f"table {self.name!r}: compact moves rows, and gradients of some wait for the "
                "optimizer's step; step or zero_grad first"
            )
        self.storage.compact()

    def evict(self, policy: Eviction | None = None, dry_run: bool = False) -> EvictionReport:
        """Remove the rows that the eviction policy names.

        Weights, optimizer state and columns of an evicted id are gone; when it returns it must be
        admitted again, and starts from its initial row. Pinned ids stay, and rows with a pending
        gradient until the optimizer has stepped. When half of the blocks of rows (256 kB each)
        would do for those that are left, memory is given back, unless gradients are pending or the
        rows come back each time (docs/policies.md); rows then have other numbers.

        With several ranks, all of them evict together.

        Args:
            policy: Used instead of the table's own; it may ask only for columns that the table
                keeps for its own policy, or that need not be kept ("ids", "norms").
            dry_run: Change nothing, and report what would go.

        Returns:
            How many rows went, an int, with ``by_policy``, ``bytes_freed``, ``bytes_returned``.

        Raises:
            TypeError: ``policy`` is no policy.
            ValueError: It asks for a column that the table does not keep.
        """
        if is_fake_mode():
            refuse_fake_mode(f"table {self.name!r}")
        # A gradient keeps its row, on whatever rank it is.
        exchange_gradients([self], lambda: f"evicts from table {self.name!r}", is_due=False)
        return write((self.lock,), self.evictor.evict, policy, dry_run, self._process_group)

    @property
    def pinned(self) -> Tensor:
        """int64 [n], the ids that are never evicted, ascending."""
        pinned = self.evictor.pinned
        return torch.empty(0, dtype=torch.int64, device="cpu") if pinned is None else pinned

    def pin(self, ids: Tensor) -> None:
        """Never evict these ids; ``delete`` and ``clear`` still remove their rows.

        An id need not have a row yet. Pins are part of a saved table.

        Args:
            ids: int64 [*].
        """
        self.evictor.pin(check_ids(ids).reshape(-1).cpu())

    def unpin(self, ids: Tensor) -> None:
        """Let these ids be evicted again; those that are not pinned are passed over.

        Args:
            ids: int64 [*].
        """
        self.evictor.unpin(check_ids(ids).reshape(-1).cpu())

    def on_evict(
        self, callback: Callable[[Evicted], None], with_rows: bool = False
    ) -> RemovableHandle:
        """Have ``callback`` called with the rows that an eviction is about to remove.

        It is called before rows go, not for a dry run or where nothing goes; if it raises, all
        rows stay. It must leave the table alone. Copies of the table do not have it.

        Args:
            callback: Gets an ``Evicted``.
            with_rows: Whether it gets weights and optimizer state too.

        Returns:
            A handle whose ``remove()`` ends it.
        """
        return self.evictor.listen(callback, with_rows)

    def track_readmissions(self, capacity: int = 1 << 20) -> None:
        """Count from now on how many evicted ids come back, for ``statistics().readmitted``.

        Args:
            capacity: Evicted ids remembered, at about 17 bytes each; of more, those evicted first
                are forgotten. A call that changes nothing keeps what is remembered.

        Raises:
            TypeError, ValueError: ``capacity`` is no int >= 1.
        """
        self.evictor.track_readmissions(check_int("capacity", capacity, least=1))

    # ---- saving, copying and moving

    @reads
    def get_extra_state(self) -> dict[str, Any]:
        """Return everything the table holds, as tensors and primitives, ids by row.

        Raises:
            RuntimeError: Several ranks train; only rank 0's rows would be saved.
        """
        if torch.onnx.is_in_onnx_export():
            refuse_recording(f"table {self.name!r}", "torch.onnx.export")
        if self.shard_reference is not None:
            return self.shard_reference
        table_state.refuse_many_ranks("saving a table")
        return table_state.with_checksum(table_state.export(self))

    @writes
    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Replace everything the table holds.

        Seed and step come from ``state``, the name too if the table has none, so that a resumed
        run goes on exactly as the saved one would have. Weights are converted to the table's
        dtype, as those of a parameter are.

        Raises:
            ValueError: ``state`` is of another kind of table; the table is as it was.
        """
        table_state.check_and_load(self, state)

    @override
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}anchor", None)  # it has nothing to save

    @override
    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            *(state_dict, prefix, local_metadata, strict),
            *(missing_keys, unexpected_keys, error_msgs),
        )
        if f"{prefix}anchor" in missing_keys:
            missing_keys.remove(f"{prefix}anchor")

    @property
    def original(self) -> HashTable | None:
        """The table that this one is a deep copy of, or if that is gone, the one before it."""
        alive = (original() for original in self._originals)
        return next((table for table in alive if table is not None), None)

    @reads
    def __getstate__(self) -> dict[str, Any]:
        """Return what pickling and deepcopy take: rows and state, but no pending gradients.

        A pickled ``nn.Parameter`` leaves its ``grad`` behind in the same way.
        """
        return copying.pack(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> HashTable:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        older = (original for original in self._originals if original() is not None)
        copied._originals = (weakref.ref(self), *older)
        copied._process_group = self._process_group
        return copied

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        attributes, parts, saved = copying.unpack(state)
        super().__setstate__(attributes)  # type: ignore[no-untyped-call]
        self._start(*parts)
        table_state.load(self, saved)

    @override
    @writes
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HashTable:
        move_version.advance()
        device, dtype = moving.destination(self, fn, self._stays)
        if device != self.device:
            self._move(device)
        if dtype is not self.dtype:
            moving.convert(self, dtype)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def share_lock(self, lock: TableLock) -> None:
        """Take a lock that other tables have too, which a lookup of all of them takes once."""
        self.lock = lock
        lock.streams.watch(self)

    def memory(self) -> Iterator[Tensor]:
        """Yield all tensors on the table's device that kernels reach by it."""
        yield from self.storage.memory()
        for record in self.pending:
            yield from (record.rows, *record.keep)

    def _move(self, device: torch.device) -> None:
        old, counter = self.storage, self.storage.admission_counter
        screening = None if counter is None else counter.screening
        new = self._new_storage(
            self.embedding_dim, self.dtype, device, old.kept_columns, screening, old.now
        )
        moving.move(self, new)
        self.lock.streams.watch(self)


def set_lookup(lookup: Lookup) -> None:
    """Register how tables look ids up when they are called."""
    global _lookup
    _lookup = lookup


def check_policies(
    initializer: Initializer | None, admission: Admission | None, eviction: Eviction | None
) -> None:
    """Raise a TypeError that says what to write, unless all are what they should be."""
    check_kinds(
        initializer=(initializer, Initializer),
        admission=(admission, Admission),
        eviction=(eviction, Eviction),
    )


def live_hash_tables() -> list[HashTable]:
    """List every table alive in this process, in the order of creation."""
    return [table for _, table in sorted(_live.items())]


__all__ = ["HashTable", "live_hash_tables"]
