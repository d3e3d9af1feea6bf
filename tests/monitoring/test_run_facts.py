"""run_facts: date, host, versions and settings as text."""

import datetime
import socket

from recis_lightning.monitoring.run_facts import run_facts


def test_facts_and_settings():
    settings = {"seed": 3, "none": None, "model": {"sizes": [1, 2], "deep": {"lr": 0.1}}}
    facts = run_facts({**settings, "long": "x" * 1000})
    date = datetime.datetime.strptime(facts["date"], "%Y-%m-%d %H:%M:%S %z")
    assert abs(datetime.datetime.now(datetime.timezone.utc) - date).total_seconds() < 60
    assert facts["host"] == socket.gethostname()
    assert {"system", "device", "python", "torch", "lightning", "numpy"} <= facts.keys()
    assert (facts["seed"], facts["model.sizes"], facts["model.deep.lr"]) == ("3", "[1, 2]", "0.1")
    assert "none" not in facts
    assert len(facts["long"]) == 201
