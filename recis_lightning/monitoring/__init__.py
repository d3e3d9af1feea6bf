"""Monitoring of tables: their figures over a run, and reports of them.

The function ``report`` is ``recis_lightning.report``: under its own name it would hide the module
``monitoring.report`` here.
"""

from recis_lightning.monitoring.history import RunHistory
from recis_lightning.monitoring.report import TableReport
from recis_lightning.monitoring.watch import TableFigures, TableMonitor, TableWatch

__all__ = ["RunHistory", "TableFigures", "TableMonitor", "TableReport", "TableWatch"]
