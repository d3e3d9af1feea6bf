"""Run the code of docs/hooks.md, and put what it gives under each block as its picture.

    python docs/make_pictures.py

Every ``<!-- picture -->`` gets the output and the log lines of the block before it. The page of
``MetricReportHook`` is photographed by Chromium, the trace of ``ProfilerHook`` drawn by
matplotlib, into docs/pictures/.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib as mpl
import torch

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "hooks.md"
PICTURES = DOCS / "pictures"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"<!-- picture -->\n(?:\n```text\n.*?^```\n)?", re.DOTALL | re.MULTILINE)
KINDS = ("cpu_op", "user_annotation")
COLOURS = {"user_annotation": "#8a8a8a", "cpu_op": "#2a78d6", "recis": "#eb6834"}


def main() -> None:
    """Run the page in a new folder, and write its pictures."""
    warnings.simplefilter("ignore")
    mpl.use("Agg")
    torch.set_num_threads(1)  # tiny steps: times are steadier
    text = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        outputs = run_blocks(text)
        photograph(Path("report.html"), PICTURES / "report.png")
        draw_trace(next(Path("timeline").glob("*.json")), PICTURES / "timeline.png")
        os.chdir(DOCS)
    pieces, end = [], 0
    for match in PICTURE.finditer(text):
        before = [block for block in BLOCK.finditer(text) if block.end() <= match.start()]
        shown = outputs[len(before) - 1].strip("\n")
        pieces += [text[end : match.start()], f"<!-- picture -->\n\n```text\n{shown}\n```\n"]
        end = match.end()
    PAGE.write_text("".join([*pieces, text[end:]]), encoding="utf-8")


def run_blocks(text: str) -> list[str]:
    """Return what each block printed and logged; the one for ranks runs on two."""
    names = {"__name__": "hooks"}
    blocks = [match[1] for match in BLOCK.finditer(text)]
    outputs = []
    for block in blocks:
        if "WORLD_SIZE" in block:
            outputs.append(run_on_two_ranks(blocks[0] + block))
            continue
        written = io.StringIO()
        log = logging.StreamHandler(written)
        logger = logging.getLogger("recis_lightning")
        logger.addHandler(log)
        with contextlib.redirect_stdout(written):
            exec(block, names)
        logger.removeHandler(log)
        outputs.append(without_noise(written.getvalue()))
    return outputs


def run_on_two_ranks(program: str) -> str:
    """Return the lines that the ranks print, in order of ranks."""
    Path("ranks.py").write_text(program, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "ranks.py"]
    run = subprocess.run(launch, capture_output=True, text=True, check=True)
    return "\n".join(sorted(line for line in run.stdout.splitlines() if line.startswith("rank ")))


def without_noise(output: str) -> str:
    """Return lines of at most 100 characters, without those of the compiler."""
    lines = [line.rstrip() for line in output.splitlines()]
    return "\n".join(line for line in lines if not line.startswith("Compiling kernels"))


def photograph(page: Path, picture: Path) -> None:
    """Write a picture of a page as Chromium shows it."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print("Chromium is missing: the picture of the report stays as it is")
        return
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1000,900"]
    subprocess.run(
        [chromium, *options, f"--screenshot={picture}", page.resolve().as_uri()],
        check=True,
        capture_output=True,
    )


def draw_trace(trace: Path, picture: Path) -> None:
    """Draw the shortest batch of a Chrome trace by time, what is nested below what it is in."""
    from matplotlib import pyplot as plt

    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    spans = [e for e in events if e.get("ph") == "X" and e.get("cat") in KINDS]
    batches = (e for e in spans if "run_training_batch" in e["name"])
    batch = min(batches, key=lambda e: e["dur"])  # the one that other processes disturbed least
    start, stop = batch["ts"], batch["ts"] + batch["dur"]
    own = [e for e in spans if e["tid"] == batch["tid"] and start <= e["ts"] < stop]
    figure, axes = plt.subplots(figsize=(10, 3.8), layout="constrained")
    ends: list[float] = []
    for event in sorted(own, key=lambda e: (e["ts"], -e["dur"])):
        while ends and ends[-1] <= event["ts"]:
            ends.pop()
        left, width = (event["ts"] - start) / 1000, event["dur"] / 1000
        name = event["name"]
        kind = "recis" if name.startswith("recis") else event["cat"]
        axes.barh(len(ends), width, 0.9, left, align="center", color=COLOURS[kind])
        room = int(150 * width / (stop - start) * 1000)  # characters that its bar is wide
        if room > 5:
            shown = re.sub(r"^\[\w+\]", "", name)[:room]
            at = {"ha": "left", "va": "center", "fontsize": 7, "clip_on": True}
            axes.text(left + 0.01, len(ends), shown, color="white", **at)
        ends.append(event["ts"] + event["dur"])
    axes.set_xlim(0, (stop - start) / 1000)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.spines[["left", "top", "right"]].set_visible(False)
    legend = {"user_annotation": "regions", "cpu_op": "torch", "recis": "tables"}
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in legend]
    place = {"loc": "lower right", "frameon": False, "fontsize": 8}
    axes.legend(handles, list(legend.values()), **place)
    figure.savefig(picture, dpi=110)
    print(f"{picture.name}: {batch['dur'] / 1000:.1f} ms")


if __name__ == "__main__":
    main()
