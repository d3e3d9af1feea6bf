"""``TableWatch``: what tables hold and who comes and goes, over the steps of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import add, attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from recis_lightning.arguments import check_int
from recis_lightning.distributed import collectives
from recis_lightning.monitoring.charts import COUNTERS, MEMORY
from recis_lightning.monitoring.history import RunHistory
from recis_lightning.ops import distinct_rows
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.pending_gradient import PendingGradient
from recis_lightning.table.scan import AGE_EDGES, NORM_EDGES, RowSurvey

__all__ = ["TableFigures", "TableWatch"]

_SUMS = ("rows", "capacity", *MEMORY, *COUNTERS)
_READ = (*_SUMS, "unique", "ids")  # of each table; the last two of a batch
_of_statistics = attrgetter(*_SUMS)
_NUM_SURVEYED = 6
_SURVEY_SIZE = _NUM_SURVEYED + len(NORM_EDGES) + len(AGE_EDGES) - 2


class TableFigures(NamedTuple):
    """What one look at all tables found, over all ranks.

    Attributes:
        values: Name -> number: ``table/{name}/{figure}``, and ``tables/{figure}`` for all.
        surveyed: Names of the tables whose rows were looked at.
        nonfinite: Of these, rows with NaN or Inf by table name.
    """

    values: dict[str, float]
    surveyed: list[str]
    nonfinite: dict[str, int]


class TableWatch:
    """Reads the figures of tables at moments of a run, and keeps them in a ``RunHistory``.

    Each look reads every table's ``statistics()`` and surveys about ``survey_rows`` rows of one
    table, one after the other, so that its cost does not grow with the tables. The first look
    surveys as many rows of every table, so that each figure is there from the start, as files with
    a column a figure like it; a full look surveys all rows of all tables. On several ranks figures
    are those of all, and every rank looks at the same moments.

    Figures of a table: ``rows``, ``capacity``, ``load``, ``index_bytes``, ``weight_bytes``,
    ``state_bytes``, ``column_bytes``; counts since the run began ``admitted``, ``refused``,
    ``evicted``, ``readmitted``; ``unique_share`` of the ids of a batch (on several ranks each
    sends an id once, and it is the share of what was sent); of the rows surveyed
    ``norm_mean``, ``norm_max``, ``age_mean``, ``age_max`` (steps since seen) and
    ``nonfinite_rows``; on several ranks ``rank_skew``, the rows of the fullest rank over the mean.

    Args:
        tables: With different names.
        survey_rows: Rows surveyed in a look that is not full, at least 1.
        max_points: Points of the history.

    Attributes:
        tables: As given.
        history: What was read so far.

    Example:
        >>> table = HashTable(2, name="user")
        >>> watch = TableWatch([table])
        >>> table.insert(torch.tensor([7, 8]), torch.ones(2, 2))
        >>> figures = watch.look(step=10, more={"loss": 0.5})
        >>> figures.values["table/user/rows"], figures.values["tables/rows"]
        (2, 2)
        >>> watch.history.steps, watch.history.last("loss")
        ([10], 0.5)
    """

    def __init__(
        self, tables: Sequence[HashTable], survey_rows: int = 1024, max_points: int = 512
    ) -> None:
        self.survey_rows = check_int("survey_rows", survey_rows, least=1)
        self.history = RunHistory(max_points)
        self.tables: list[HashTable] = []
        self._before: dict[str, int] = {}  # counts of the run before these tables were made
        self.watch(tables)

    def watch(self, tables: Sequence[HashTable], resumed: bool = False) -> None:
        """Watch these tables from now on.

        Args:
            tables: With different names.
            resumed: Whether their counts go on from the history's.

        Raises:
            ValueError: Two tables have the same name.
        """
        names = [table.name for table in tables]
        if len(set(names)) < len(names):
            raise ValueError(f"tables: expected different names, got {names}")
        self.tables = list(tables)
        self._turn: int | None = None  # all tables'
        self._positions = [0.0] * len(tables)
        self._batch: list[list[int]] = [[0, 0]] * len(tables)  # distinct ids, and all
        self._num_records = [0] * len(tables)
        self._names = [_names(f"table/{name}") for name in names]
        for table in tables if resumed else ():
            now = table.statistics()._asdict()
            for counter in COUNTERS:
                known = self.history.last(f"table/{table.name}/{counter}", 0.0)
                self._before[f"table/{table.name}/{counter}"] = int(known) - now[counter]
        self._earlier = [
            self._before.get(f"table/{name}/{figure}", 0) for name in names for figure in _READ
        ]

    def start_batch(self) -> None:
        """Prepare for ``note_batch``, before the batch's backward pass."""
        self._num_records = [len(table.pending) for table in self.tables]

    def note_batch(self) -> None:
        """Count the ids of a batch and the unique among them, after its backward pass.

        Looks at what it left for the optimizer since ``start_batch``; ids without a row, and
        padding, are not counted.
        """
        numbers: dict[PendingGradient, dict[object, int]] = defaultdict(dict)
        for number, table in enumerate(self.tables):
            for record in table.pending[self._num_records[number] :]:
                numbers[record][table] = number
        lookups = [(record.rows, record.lines_of(asked)) for record, asked in numbers.items()]
        self._batch = distinct_rows.count_distinct(lookups, len(self.tables)).tolist()

    def look(
        self, step: int, more: Mapping[str, float] | None = None, full: bool = False
    ) -> TableFigures:
        """Read all figures and add them to the history.

        Args:
            step: Of the history's point.
            more: Name -> number, to be kept with them.
            full: Survey all rows of all tables.

        Returns:
            The tables' figures.
        """
        chosen = range(len(self.tables)) if full else self._next()
        surveys = {number: self._survey(number, full) for number in chosen}
        figures = self._read(surveys)
        for number in surveys:
            table = self.tables[number].name
            found = figures.distributions[number]
            self.history.distributions[f"table/{table}/norms"] = found.norms
            if found.ages is not None:
                self.history.distributions[f"table/{table}/ages"] = found.ages
        self.history.append(step, {**figures.values, **(more or {})})
        names = [self.tables[number].name for number in surveys]
        return TableFigures(
            figures.values,
            names,
            {n: int(figures.values[f"table/{n}/nonfinite_rows"]) for n in names},
        )

    def nonfinite_ids(self, table: HashTable) -> Tensor:
        """Return this rank's ids of rows with NaN or Inf in a table, int64 [n]; a full survey."""
        ids, places = table.ids_map()
        return ids[torch.isin(places, table.survey().nonfinite_rows.to(places.device))]

    def _next(self) -> Sequence[int]:
        number, every = self._turn, range(len(self.tables))
        self._turn = 0 if number is None else (number + 1) % max(len(every), 1)
        return every if number is None else every[number : number + 1]

    def _survey(self, number: int, full: bool) -> RowSurvey:
        table = self.tables[number]
        if full:
            return table.survey()
        start = self._positions[number]
        stop = min(1.0, start + self.survey_rows / max(len(table), 1))
        self._positions[number] = 0.0 if stop == 1 else stop
        return table.survey(start, stop)

    def _read(self, surveys: Mapping[int, RowSurvey]) -> _Reading:
        mine: list[float] = []
        for table, batch in zip(self.tables, self._batch, strict=True):
            mine += _of_statistics(table.statistics())
            mine += batch
        self._batch = [[0, 0]] * len(self.tables)
        for survey in surveys.values():
            mine += _numbers(survey)
        ranks, width = collectives.gather_numbers(mine), len(_READ)
        sums = [*map(sum, zip(*ranks, strict=True))] if len(ranks) > 1 else mine
        sums = [*map(add, sums, self._earlier)]  # and no more than these: surveys have their own
        values: dict[str, float] = {}
        for number, names in enumerate(self._names):
            _derive(values, names, sums[number * width : (number + 1) * width])
        _derive(values, _names("tables"), [sum(sums[place::width]) for place in range(width)])
        if len(ranks) > 1:
            rows = [rank[: len(sums) : width] for rank in ranks]
            for table, parts in zip(self.tables, zip(*rows, strict=True), strict=True):
                values[f"table/{table.name}/rank_skew"] = _skew(parts)
            values["tables/rank_skew"] = _skew([*map(sum, rows)])
        distributions, first = {}, width * len(self.tables)
        for place, number in enumerate(surveys):
            start = first + place * _SURVEY_SIZE
            found = _merged([rank[start : start + _SURVEY_SIZE] for rank in ranks])
            distributions[number] = found
            prefix = f"table/{self.tables[number].name}"
            values[f"{prefix}/nonfinite_rows"] = found.num_nonfinite
            values[f"{prefix}/norm_mean"] = found.norm_sum / max(sum(found.norms), 1)
            values[f"{prefix}/norm_max"] = found.norm_max
            if found.ages is not None:
                values[f"{prefix}/age_mean"] = found.age_sum / max(found.num_rows, 1)
                values[f"{prefix}/age_max"] = found.age_max
        values["tables/nonfinite_rows"] = sum(
            found.num_nonfinite for found in distributions.values()
        )
        return _Reading(values, distributions)


class _Merged(NamedTuple):
    """A survey of all ranks."""

    num_rows: int
    num_nonfinite: int
    norms: list[int]
    norm_sum: float
    norm_max: float
    ages: list[int] | None
    age_sum: int
    age_max: int


class _Reading(NamedTuple):
    values: dict[str, float]
    distributions: dict[int, _Merged]


def _names(prefix: str) -> list[str]:
    return [f"{prefix}/{name}" for name in (*_SUMS, "load", "unique_share")]


def _derive(values: dict[str, float], names: Sequence[str], read: Sequence[float]) -> None:
    """Enter figures under ``_names``, from those of ``_READ``."""
    *known, unique, ids = read
    values.update(zip(names, known, strict=False))
    values[names[-2]] = known[0] / max(known[1], 1)
    if ids:
        values[names[-1]] = unique / ids


def _skew(rows: Sequence[float]) -> float:
    """Return the rows of the fullest rank over the mean; 1 if there are none."""
    return max(rows) * len(rows) / sum(rows) if sum(rows) else 1.0


def _numbers(survey: RowSurvey) -> list[float]:
    ages = survey.ages
    return [
        *(survey.num_rows, survey.nonfinite_rows.numel(), survey.norm_sum, survey.norm_max),
        *(survey.age_sum, survey.age_max),
        *survey.norms,
        *([-1] * (len(AGE_EDGES) - 1) if ages is None else ages),
    ]


def _merged(ranks: Sequence[Sequence[float]]) -> _Merged:
    sums = [*map(sum, zip(*ranks, strict=True))] if len(ranks) > 1 else ranks[0]
    norms, ages = (
        sums[_NUM_SURVEYED:][: len(NORM_EDGES) - 1],
        sums[_SURVEY_SIZE - len(AGE_EDGES) + 1 :],
    )
    return _Merged(
        num_rows=int(sums[0]),
        num_nonfinite=int(sums[1]),
        norms=[int(count) for count in norms],
        norm_sum=sums[2],
        norm_max=max(rank[3] for rank in ranks),
        ages=None if ages[0] < 0 else [int(count) for count in ages],
        age_sum=int(sums[4]),
        age_max=int(max(rank[5] for rank in ranks)),
    )
