"""TqdmLoggingHandler: lines on stderr, unless an application's own handlers print them."""

import logging
import sys

from recis_lightning.callbacks.logger import TqdmLoggingHandler


def as_in_a_plain_script(monkeypatch):
    """Remove pytest's own logging handlers."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])


def test_lines_show_in_a_plain_script(monkeypatch, capsys):
    as_in_a_plain_script(monkeypatch)
    logging.getLogger("recis_lightning.callbacks.logger").info("<gstep=%d>", 1)
    assert capsys.readouterr().err == "<gstep=1>\n"


def test_lines_are_left_to_an_applications_own_handlers(monkeypatch, capsys):
    as_in_a_plain_script(monkeypatch)
    logging.getLogger().addHandler(logging.StreamHandler(sys.stdout))
    logging.getLogger("recis_lightning.callbacks.logger").info("once")
    assert capsys.readouterr() == ("once\n", "")


def test_one_handler_and_a_level_that_shows():
    ours = logging.getLogger("recis_lightning")
    assert [type(handler) for handler in ours.handlers] == [TqdmLoggingHandler]
    assert ours.isEnabledFor(logging.INFO)
    assert ours.propagate
