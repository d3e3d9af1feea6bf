"""``TableMonitor``: figures of tables over the steps of a run."""

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
from recis_lightning.table.gradient_exchange import exchange_gradients
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.pending_gradient import PendingGradient
from recis_lightning.table.scan import AGE_EDGES, NORM_EDGES, RowSurvey

__all__ = ["FIGURES", "TableFigures", "TableMonitor", "TableWatch"]

_STATISTICS = ("rows", "capacity", *MEMORY, *COUNTERS)  # summed over ranks
_SUMS = (*_STATISTICS, "unique", "ids")  # of each table; the last two are those of a batch
_DERIVED = ("load", "unique_share", "ids", "distinct_ids")
FIGURES = (
    *(*_STATISTICS, "load", "unique_share", "ids", "distinct_ids", "rank_skew", "nonfinite_rows"),
    *("norm_mean", "norm_max", "age_mean", "age_max"),
)  # of a table
_statistics_of = attrgetter(*_STATISTICS)
_NUM_NORMS, _NUM_AGES = len(NORM_EDGES) - 1, len(AGE_EDGES) - 1
_SURVEY_SIZE = 6 + _NUM_NORMS + _NUM_AGES  # numbers of an encoded survey
_NO_ROWS = torch.empty(0, dtype=torch.int64, device="cpu")


class TableFigures(NamedTuple):
    """Figures of all tables at one step, over all ranks.

    Attributes:
        values: Name -> number: ``table/{name}/{figure}``, and ``tables/{figure}`` for all.
        surveyed: Names of the tables whose rows were scanned.
        nonfinite: Number of rows with NaN or Inf found by the scan, by table name.
    """

    values: dict[str, float]
    surveyed: list[str]
    nonfinite: dict[str, int]


class TableMonitor:
    """Reads the figures of tables at chosen steps of a run, and keeps them in a ``RunHistory``.

    Each record reads every table's ``statistics()`` and scans about ``survey_rows`` rows of one
    table, in turn, so that its cost does not grow with the tables. The first record scans as many
    rows of every table, so that each figure is there from the start, as loggers with one column for
    each figure need it; a full record scans all rows of all tables. On several ranks figures are
    those of all ranks, and every rank records at the same steps.

    Figures of a table: ``rows``, ``capacity``, ``load``, ``index_bytes``, ``weight_bytes``,
    ``state_bytes``, ``column_bytes``; counts since the run began ``admitted``, ``refused``
    (occurrences of ids that admission rejected), ``evicted``, ``readmitted``; of a batch ``ids``,
    ``distinct_ids`` and their ratio ``unique_share`` (on several ranks each sends an id once, and
    these are the ids sent); of the rows scanned ``norm_mean``, ``norm_max``, ``age_mean``,
    ``age_max`` (steps since the row was last seen) and ``nonfinite_rows``; on several ranks
    ``rank_skew``, the rows of the fullest rank over the mean.

    Args:
        tables: With different names.
        survey_rows: Rows scanned in a record that is not full, at least 1.
        max_points: Points of the history.

    Attributes:
        tables: As given.
        history: Figures recorded so far.

    Example:
        >>> table = HashTable(2, name="user")
        >>> monitor = TableMonitor([table])
        >>> table.insert(torch.tensor([7, 8]), torch.ones(2, 2))
        >>> figures = monitor.record(step=10, more={"loss": 0.5})
        >>> figures.values["table/user/rows"], figures.values["tables/rows"]
        (2, 2)
        >>> monitor.history.steps, monitor.history.last("loss")
        ([10], 0.5)
    """

    def __init__(
        self, tables: Sequence[HashTable], survey_rows: int = 1024, max_points: int = 512
    ) -> None:
        self.survey_rows = check_int("survey_rows", survey_rows, least=1)
        self.history = RunHistory(max_points)
        self.tables: list[HashTable] = []
        self._offsets: dict[str, int] = {}  # counts of the run before these tables were made
        self.watch(tables)

    def counts(self) -> dict[str, int]:
        """Return the counts since the run began, by figure; {} on several ranks, which do not ask.

        A checkpoint keeps them: after the newest record, ids were admitted and evicted too.
        """
        if collectives.world_size() > 1:
            return {}
        found = {}
        for table in self.tables:
            counts = table.statistics()._asdict()
            for counter in COUNTERS:
                figure = f"table/{table.name}/{counter}"
                found[figure] = counts[counter] + self._offsets.get(figure, 0)
        return found

    def watch(
        self,
        tables: Sequence[HashTable],
        resumed: bool = False,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Monitor these tables from now on.

        Args:
            tables: With different names.
            resumed: Whether their counts continue those of the history.
            counts: Those that ``counts`` returned, which are newer than the history.

        Raises:
            ValueError: Two tables have the same name.
        """
        newest = counts or {}
        names = [table.name for table in tables]
        if len(set(names)) < len(names):
            raise ValueError(f"tables: expected different names, got {names}")
        self.tables = list(tables)
        self._turn: int | None = None  # the table to scan next; None: all
        self._scan_starts = [0.0] * len(tables)
        self._batch: list[list[int]] = [[0, 0]] * len(tables)  # unique ids and ids of a batch
        self._num_pending = [0] * len(tables)
        self._names = [_figure_names(f"table/{name}") for name in names]
        for table in tables if resumed else ():
            now = table.statistics()._asdict()
            for counter in COUNTERS:
                figure = f"table/{table.name}/{counter}"
                known = newest.get(figure, self.history.last(figure, 0.0))
                self._offsets[figure] = int(known) - now[counter]
        self._offset_of_sums = [
            self._offsets.get(f"table/{name}/{figure}", 0) for name in names for figure in _SUMS
        ]

    def start_batch(self) -> None:
        """Prepare for ``note_batch``, before the batch's backward pass."""
        exchange_gradients(self.tables, lambda: "reports on its tables", is_due=False)
        self._num_pending = [len(table.pending) for table in self.tables]

    def note_batch(self) -> None:
        """Count the ids of a batch and the unique among them, after its backward pass.

        Reads the pending gradients since ``start_batch``; ids without a row, and padding, are not
        counted.
        """
        exchange_gradients(self.tables, lambda: "reports on its tables", is_due=False)
        by_record: dict[PendingGradient, dict[object, int]] = defaultdict(dict)
        for index, table in enumerate(self.tables):
            for record in table.pending[self._num_pending[index] :]:
                by_record[record][table] = index
        lookups = [(record.rows, record.lines_of(tables)) for record, tables in by_record.items()]
        self._batch = distinct_rows.count_distinct(lookups, len(self.tables)).tolist()

    def record(
        self, step: int, more: Mapping[str, float] | None = None, full: bool = False
    ) -> TableFigures:
        """Read all figures and add them to the history.

        Args:
            step: Of the history's point.
            more: Name -> number, to be kept with them.
            full: Whether to scan all rows of all tables.

        Returns:
            The tables' figures.
        """
        chosen = range(len(self.tables)) if full else self._next_tables()
        figures, surveys = self._read({index: self._survey(index, full) for index in chosen})
        for name, survey in surveys.items():
            self.history.distributions[f"table/{name}/norms"] = survey.norms
            if survey.ages is not None:
                self.history.distributions[f"table/{name}/ages"] = survey.ages
        self.history.append(step, {**figures.values, **(more or {})})
        return figures

    look = record  # an alias

    def nonfinite_ids(self, table: HashTable) -> Tensor:
        """Return this rank's ids of rows with NaN or Inf in a table, int64 [n]; scans all rows."""
        ids, rows = table.ids_map()
        return ids[torch.isin(rows, table.survey().nonfinite_rows.to(rows.device))]

    def _next_tables(self) -> Sequence[int]:
        """Return the indices of the tables to scan in a record that is not full."""
        turn, indices = self._turn, range(len(self.tables))
        self._turn = 0 if turn is None else (turn + 1) % max(len(indices), 1)
        return indices if turn is None else indices[turn : turn + 1]

    def _survey(self, index: int, full: bool) -> RowSurvey:
        table = self.tables[index]
        if full:
            return table.survey()
        start = self._scan_starts[index]
        stop = min(1.0, start + self.survey_rows / max(len(table), 1))
        self._scan_starts[index] = 0.0 if stop == 1 else stop
        return table.survey(start, stop)

    def _read(self, surveys: Mapping[int, RowSurvey]) -> tuple[TableFigures, dict[str, RowSurvey]]:
        """Return the figures of all ranks, and their surveys by table name."""
        mine: list[float] = []
        for table, batch in zip(self.tables, self._batch, strict=True):
            mine += _statistics_of(table.statistics())
            mine += batch
        self._batch = [[0, 0]] * len(self.tables)
        for survey in surveys.values():
            mine += _encode(survey)
        ranks, width = collectives.gather_numbers(mine), len(_SUMS)
        sums = [*map(sum, zip(*ranks, strict=True))] if len(ranks) > 1 else mine
        sums = [*map(add, sums, self._offset_of_sums)]  # this cuts off the encoded surveys
        values: dict[str, float] = {}
        for index, names in enumerate(self._names):
            _enter(values, names, sums[index * width : (index + 1) * width])
        totals = [sum(sums[column::width]) for column in range(width)]
        _enter(values, _figure_names("tables"), totals)
        if len(ranks) > 1:
            rows = [rank[: len(sums) : width] for rank in ranks]
            for table, parts in zip(self.tables, zip(*rows, strict=True), strict=True):
                values[f"table/{table.name}/rank_skew"] = _skew(parts)
            values["tables/rank_skew"] = _skew([*map(sum, rows)])
        merged: dict[str, RowSurvey] = {}
        nonfinite: dict[str, int] = {}
        for position, index in enumerate(surveys):
            name, start = self.tables[index].name, len(sums) + position * _SURVEY_SIZE
            decoded = [_decode(rank[start : start + _SURVEY_SIZE]) for rank in ranks]
            nonfinite[name] = sum(num_nonfinite for num_nonfinite, _ in decoded)
            merged[name] = _merge([survey for _, survey in decoded])
            _enter_survey(values, f"table/{name}", merged[name], nonfinite[name])
        values["tables/nonfinite_rows"] = sum(nonfinite.values())
        return TableFigures(values, [*merged], nonfinite), merged


TableWatch = TableMonitor  # an alias


def _figure_names(prefix: str) -> list[str]:
    return [f"{prefix}/{name}" for name in (*_STATISTICS, *_DERIVED)]


def _enter(values: dict[str, float], names: Sequence[str], sums: Sequence[float]) -> None:
    """Enter figures under ``_figure_names``, from ``_SUMS``."""
    *statistics, unique, ids = sums
    values.update(zip(names, statistics, strict=False))
    load, *of_batch = names[-len(_DERIVED) :]
    values[load] = statistics[0] / max(statistics[1], 1)
    if ids:
        values.update(zip(of_batch, (unique / ids, ids, unique), strict=True))


def _enter_survey(
    values: dict[str, float], prefix: str, survey: RowSurvey, num_nonfinite: int
) -> None:
    values[f"{prefix}/nonfinite_rows"] = num_nonfinite
    values[f"{prefix}/norm_mean"] = survey.norm_mean
    values[f"{prefix}/norm_max"] = survey.norm_max
    if survey.ages is not None:
        values[f"{prefix}/age_mean"] = survey.age_mean
        values[f"{prefix}/age_max"] = survey.age_max


def _skew(rows: Sequence[float]) -> float:
    """Return the rows of the fullest rank over the mean; 1 if there are none."""
    return max(rows) * len(rows) / sum(rows) if sum(rows) else 1.0


def _encode(survey: RowSurvey) -> list[float]:
    """Return a survey as ``_SURVEY_SIZE`` numbers; of non-finite rows only how many they are."""
    ages = survey.ages
    return [
        *(survey.num_rows, survey.nonfinite_rows.numel(), survey.norm_sum, survey.norm_max),
        *(survey.age_sum, survey.age_max),
        *survey.norms,
        *([-1] * _NUM_AGES if ages is None else ages),
    ]


def _decode(numbers: Sequence[float]) -> tuple[int, RowSurvey]:
    """Return the number of non-finite rows and the survey, which has none of them."""
    num_rows, num_nonfinite, norm_sum, norm_max, age_sum, age_max, *bins = numbers
    norms, ages = bins[:_NUM_NORMS], bins[_NUM_NORMS:]
    survey = RowSurvey(
        num_rows=int(num_rows),
        nonfinite_rows=_NO_ROWS,
        norms=[*map(int, norms)],
        norm_sum=norm_sum,
        norm_max=norm_max,
        ages=None if ages[0] < 0 else [*map(int, ages)],
        age_sum=int(age_sum),
        age_max=int(age_max),
    )
    return int(num_nonfinite), survey


def _merge(parts: Sequence[RowSurvey]) -> RowSurvey:
    """Return the survey of all rows of several surveys; at least one, all with ages or none."""
    norms = [part.norms for part in parts]
    ages = [part.ages for part in parts if part.ages is not None]
    return RowSurvey(
        num_rows=sum(part.num_rows for part in parts),
        nonfinite_rows=torch.cat([part.nonfinite_rows for part in parts]),
        norms=[*map(sum, zip(*norms, strict=True))],
        norm_sum=sum(part.norm_sum for part in parts),
        norm_max=max(part.norm_max for part in parts),
        ages=[*map(sum, zip(*ages, strict=True))] if ages else None,
        age_sum=sum(part.age_sum for part in parts),
        age_max=max(part.age_max for part in parts),
    )
