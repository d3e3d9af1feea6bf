"""TableReport: a self-contained page of a run, a module or a checkpoint, and its layout."""

import html
import json
import math
import re
import shutil
import subprocess

import pytest
import torch

from recis_lightning import DynamicEmbedding, TableReport, checkpoint, report
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.monitoring.history import RunHistory
from tests.helpers.monitored_tables import filled, monitored_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def test_page_shows_every_table_and_needs_nothing_else():
    page = TableReport.of_monitor(monitored_run(), "Tables of <i>M</i>").html()
    for title in (
        *("Training batches a second", "Evaluation batches a second", "Loss", "Rows"),
        *("Came and went between reports", "Memory by kind", "Steps since a row was seen"),
        *("L2 norm of a row",),
    ):
        assert f"<figcaption>{title}" in page
    assert page.count("<section>") == 2
    assert "user &lt;b&gt;" in page
    assert "<b>" not in re.sub(r"<b>[\d.]+ ?[kMGT]?B?</b>", "", page)
    assert "&lt;i&gt;M" in page
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(", page)
    assert "steps 10 to 300, 30 points" in page


def test_start_of_a_run_does_not_hide_the_rest():
    """The first report admits 1000 rows, the others 10: scale and title are made for those."""
    history = RunHistory()
    for step in range(20):
        history.append(step, {"tables/admitted": 1000 + 10 * step, "tables/evicted": 9 * step})
    page = TableReport(history, []).html()
    assert "Came and went between reports, the start off the scale" in page
    figure = page[page.index("Came and went") :]
    assert float(
        re.search(r'class="end">(\d+)</text></svg>|class="end">15</text>', figure)[0][-9:-7]
    )


def test_report_of_everything_it_takes(tmp_path):
    module = torch.nn.ModuleDict({"user": DynamicEmbedding(2), "item": DynamicEmbedding(2)})
    module["user"](torch.arange(5))
    page = report(module, tmp_path / "new folder" / "a.html")
    assert page == tmp_path / "new folder" / "a.html"
    assert "Tables of ModuleDict" in page.read_text()
    assert "one look, 1 point" in page.read_text()
    assert "user" in report([filled("user")], tmp_path / "b.html").read_text()
    assert [path.name for path in sorted((tmp_path / "new folder").iterdir())] == ["a.html"]


def test_report_of_a_checkpoint(tmp_path):
    table = filled("t", 50, eviction=GlobalStepFilter(9))
    table.insert(torch.tensor([3]), torch.full((1, 2), math.nan))
    table.update_step(4)
    state = {"state_dict": {"embedding.table._extra_state": table.get_extra_state()}}
    old, new = tmp_path / "old.ckpt", tmp_path / "deep" / "new.ckpt"
    torch.save({"state_dict": {}}, old)
    new.parent.mkdir()
    torch.save({**state, "global_step": 70}, new)
    saved = TableReport.of_checkpoint(tmp_path)
    assert saved.title == "Tables of new.ckpt"
    assert saved.history.steps == [70]
    assert saved.history.last("table/t/rows") == 50
    assert saved.history.last("tables/weight_bytes") == 50 * 2 * 4
    assert saved.history.last("tables/column_bytes") == 50 * 8
    assert saved.history.last("table/t/nonfinite_rows") == 1
    assert sum(saved.history.distributions["table/t/norms"]) == 49
    assert saved.history.distributions["table/t/ages"][3] == 50
    page = saved.html()
    assert "class=bad" in page
    assert "float32" in page

    monitor = monitored_run(5)
    callbacks = {"MetricReportHook": {"history": monitor.history.state_dict()}}
    torch.save({**state, "callbacks": callbacks}, new)
    assert TableReport.of_checkpoint(new).history.steps == [10, 20, 30, 40, 50]


def test_report_of_a_folder_that_save_wrote_to(tmp_path):
    """Its tables, at their step; the newest *.ckpt in it is another run's."""
    tables = [filled("t", 50, eviction=GlobalStepFilter(9)), filled("u", 5)]
    tables[0].update_step(4)
    checkpoint.save(tmp_path, tables)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    saved = TableReport.of_checkpoint(tmp_path)
    assert saved.title == f"Tables of {tmp_path.name}"
    assert saved.history.steps == [tables[0].step]
    assert saved.history.last("table/t/rows") == 50
    assert saved.history.last("table/u/rows") == 5
    assert report(tmp_path, tmp_path / "r.html").read_text().count("<section>") == 2
    shard = next(tmp_path.glob("t.*.safetensors"))
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name}: this file of the checkpoint is missing"):
        report(tmp_path, tmp_path / "r.html")


def test_sources_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source: .*: no checkpoint: .*, and no "):
        report(tmp_path, tmp_path / "r.html")
    (tmp_path / "torn.ckpt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ValueError, match=r"torn.ckpt is no checkpoint that can be read"):
        report(tmp_path, tmp_path / "r.html")
    torch.save({"weights": 1}, tmp_path / "torn.ckpt")
    with pytest.raises(ValueError, match="is no checkpoint of Lightning"):
        report(tmp_path, tmp_path / "r.html")
    torch.save({"state_dict": {}}, tmp_path / "torn.ckpt")
    with pytest.raises(ValueError, match="holds no tables"):
        report(tmp_path, tmp_path / "r.html")
    with pytest.raises(TypeError, match=r"source: expected a Trainer, a module, .* got int"):
        report(3, tmp_path / "r.html")
    with pytest.raises(ValueError, match=r"path: expected .* got 'x'"):
        report([filled()], "x")


def test_a_notebook_shows_the_page_in_a_frame():
    """Its source is the page, and neither scripts nor styles get out of it."""
    shown = report([filled("user")])
    frame = shown._repr_html_()
    assert isinstance(shown, TableReport)
    source = re.fullmatch(r'<iframe srcdoc="([^"]*)" sandbox="" [^<>]*></iframe>', frame)[1]
    assert html.unescape(source) == shown.html()


# What a page measures of itself, once it is laid out.
MEASURE = """
<script>
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.width, r.height]; };
const marks = [...document.querySelectorAll("svg")].map(svg => {
  const drawn = [...svg.querySelectorAll("polyline, polygon, rect, circle")];
  return [...box(svg), drawn.length, Math.max(0, ...drawn.map(e => box(e)[1])),
          drawn.length ? getComputedStyle(drawn[0]).fill + getComputedStyle(drawn[0]).stroke : ""];
});
const text = [...document.querySelectorAll("svg text")].map(e => box(e)[2]);
parent.document.body.dataset.found = JSON.stringify({marks, width: innerWidth,
  scroll: document.documentElement.scrollWidth, text: Math.min(...text)});
</script>
"""


def run_chromium(tmp_path, *args):
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"),
            *args,
        ],
        capture_output=True,
        timeout=100,
        check=True,
    )
    return done.stdout.decode()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.slow
def test_plots_are_there_in_chromium(tmp_path):
    """On a phone, a desktop and paper each plot is drawn, in colour, and none overflows."""
    from PIL import Image

    monitor = monitored_run()
    page = TableReport.of_monitor(monitor).write(tmp_path / "report.html")
    inner = html.escape(page.read_text().replace("</body>", f"{MEASURE}</body>"), quote=True)
    frame = tmp_path / "frame.html"
    for width, columns in ((360, 1), (1200, 3)):
        # A window of Chromium is at least 500 pixels wide; a frame is as wide as it is told.
        frame.write_text(f'<body><iframe width="{width}" style="border:0" srcdoc="{inner}">')
        dom = run_chromium(tmp_path, "--window-size=1300,900", "--dump-dom", frame.as_uri())
        found = re.search(r'data-found="([^"]*)"', dom)[1].replace("&quot;", '"')
        found = json.loads(found)
        assert found["width"] == width
        assert found["scroll"] <= width
        assert len(found["marks"]) == page.read_text().count("<svg")
        for left, svg_width, height, num_drawn, drawn_width, colour in found["marks"]:
            assert left >= 0
            assert left + svg_width <= width
            assert 0.8 * width / columns - 40 < svg_width <= width / columns
            assert height > 100
            assert num_drawn
            assert drawn_width > 20
            assert "rgb(42, 120, 214)" in colour
        assert found["text"] > 9  # pixels: it can be read

    shot = tmp_path / "shot.png"
    run_chromium(tmp_path, "--window-size=360,1600", f"--screenshot={shot}", page.as_uri())
    with Image.open(shot) as picture:
        colours = dict((c, n) for n, c in picture.convert("RGB").getcolors(1 << 20))
    for colour in ((42, 120, 214), (235, 104, 52), (27, 175, 122)):
        assert colours.get(colour, 0) > 50, colour

    paper = tmp_path / "paper.pdf"
    run_chromium(tmp_path, f"--print-to-pdf={paper}", page.as_uri())
    pages = len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes()))
    assert 1 < pages < 8
