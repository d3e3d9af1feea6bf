"""A report as a picture by matplotlib."""

import sys

import pytest

from recis_lightning import TableReport, report
from tests.helpers.monitored_tables import filled, monitored_run


def test_picture(tmp_path, monkeypatch):
    path = TableReport.of_monitor(monitored_run()).write(tmp_path / "r.png")
    from PIL import Image

    with Image.open(path) as picture:
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = r"needs matplotlib: pip install 'recis-lightning\[report\]'"
    with pytest.raises(ImportError, match=words):
        report([filled()], tmp_path / "s.png")
