"""StepCosts: text, JSON and a part of a page."""

import json

from recis_lightning import TableReport
from recis_lightning.monitoring.history import RunHistory
from recis_lightning.monitoring.step_costs import ModuleCost, OperatorCost, StepCosts

COSTS = StepCosts(
    1234,
    [ModuleCost("", "Model<i>", 2_000_000, 4_000_000, 1.5, 2.25, 0.75, 5000)],
    [OperatorCost("aten::mm", 3, 2_000_000, 0.5), OperatorCost("recis::gather", 1, 999, 0.0)],
)


def test_text():
    title, head, line = COSTS.modules_text().splitlines()
    assert "batch 1234" in title
    assert len(head) == len(line)
    assert line.split() == [
        "(model)",
        "Model<i>",
        "2M",
        "4M",
        "1.500",
        "2.250",
        "0.750",
        "5.00",
        "kB",
    ]
    *_, gather, total = COSTS.operators_text().splitlines()
    assert gather.split() == ["recis::gather", "1", "999", "B", "0.000", "0.00"]
    assert total.split() == ["total", "4", "2.00", "MB", "0.500", "4.00"]


def test_json():
    found = json.loads(COSTS.as_json("modules", "operators"))
    assert found["step"] == 1234
    assert found["modules"] == [COSTS.modules[0]._asdict()]
    assert found["operators"][0]["gb_per_sec"] == 4.0
    assert "modules" not in json.loads(COSTS.as_json("operators"))


def test_a_part_of_the_page():
    history = RunHistory()
    history.append(1, {"loss": 1.0})
    page = TableReport(history, [], costs=[COSTS._replace(modules=[]), COSTS]).html()
    assert page.count("<h2>Operators <small>") == 2
    assert page.count("<h2>Modules <small>of the step that ended with batch 1,234") == 1
    assert "Model&lt;i&gt;" in page
    assert StepCosts(1, [], []).html() == ""
