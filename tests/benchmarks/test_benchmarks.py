import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import lightning
import pytest
import torch

from benchmarks import (
    bench_checkpoint,
    bench_compaction,
    bench_cuda_step,
    bench_data,
    bench_drift,
    bench_embedding_bag,
    bench_epochs,
    bench_filter,
    bench_hash_index,
    bench_in_model,
    bench_many_ranks,
    bench_mapped_rows,
    bench_memory,
    bench_row_update,
    bench_string_hash,
    bench_training,
    harness,
    summary,
)
from benchmarks.growing_peers import Static
from benchmarks.harness import ROOT, time_prepared
from benchmarks.targets import TARGETS, Target, figure, mean_of, meets_targets
from examples.deepfm.batch import Batch
from examples.deepfm.model import DeepFM
from recis_lightning import EmbeddingOption

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")


@pytest.fixture
def few_ids(monkeypatch):
    """Reduce the number of ids in the benchmarks of training steps."""
    for module in (bench_embedding_bag, bench_in_model, bench_row_update, bench_training):
        monkeypatch.setattr(module, "NUM_IDS", 300)


@pytest.mark.slow
def test_embedding_bag_agrees_with_torch(few_ids):
    for bag in (1, 3):
        bench_embedding_bag.check(bench_embedding_bag.Data(2, 32, 4, bag))


@pytest.mark.slow
def test_embeddings_in_a_model_agree_with_torch(few_ids, monkeypatch, capfd):
    """Rows after some steps, and a run of all contenders, each of whose parts takes time."""
    bench_in_model.check(size=16)
    monkeypatch.setattr(bench_in_model, "copy_gb_per_s", lambda: 10.0)
    assert bench_in_model.main(["--run", "8", "4", "--rounds", "2"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert {"ours", "alone", "fused", "26 tables"} <= found["ms"].keys()
    assert all(0 < part <= step for part, step in found["ms"].values())
    assert found["limit"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_ranks_are_played(num_ranks, capfd):
    """Each part of a step takes time, whatever the number of ranks, and no group is left behind."""
    assert bench_many_ranks.main(["--run", str(num_ranks), "5", "2"]) == 0
    parts = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert len(parts) == 3
    assert min(parts) > 0
    assert not torch.distributed.is_initialized()


def test_batches_in_a_model_are_fresh(few_ids):
    """No batch repeats, and a seed gives the same ones."""
    one, other = bench_in_model.Batches(32, 0), bench_in_model.Batches(32, 0)
    first = one.draw()
    assert not torch.equal(torch.stack(first), torch.stack(one.draw()))
    assert torch.equal(torch.stack(first), torch.stack(other.draw()))


@pytest.mark.slow
def test_row_update_agrees_with_torch(few_ids):
    bench_row_update.check(bench_embedding_bag.Data(2, 64, 4))


@pytest.mark.filterwarnings("ignore")  # Lightning's advice for long runs
def test_training_agrees_with_static_tables(few_ids):
    bench_training.check(batch=8, dim=4)


def test_training_times_every_step_after_the_warmup(few_ids, monkeypatch):
    clock = bench_training.Clock()
    monkeypatch.setattr(bench_training, "WARMUP", 1)
    for start in (0.0, 5.0, 5.5, 6.5):
        clock.starts.append(start)
    assert clock.step_ms() == [500.0, 1000.0]


@pytest.mark.slow
def test_cuda_step_agrees_with_the_cpu_and_needs_a_gpu(capsys):
    bench_cuda_step.check(torch.device("cpu"), num_rows=50, lookups=40)
    assert bench_cuda_step.main(["--device", "cpu"]) == 0
    assert "no GPU" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") and shutil.which("ninja")), reason="no C++ compiler")
def test_hash_index_agrees_with_the_map_and_a_dict(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    library = bench_hash_index.build()
    assert library is not None
    bench_hash_index.check(library, 1000)


def test_hash_index_runs_without_the_map(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(bench_hash_index, "SOURCE", "no C++")
    assert bench_hash_index.build() is None
    assert "skipped" in capsys.readouterr().out
    bench_hash_index.check(None, 1000)
    line = bench_hash_index.find(None, 1000, 1)
    assert line["figures"] == {}
    assert meets_targets("bench_hash_index", line)


def test_filter_evicts_old_ids_and_keeps_young_ones():
    bench_filter.check(2000)


def test_checkpoint_loses_nothing():
    bench_checkpoint.check(500)


@pytest.mark.slow
def test_memory_grows_as_torch_trains():
    bench_memory.check()


@pytest.mark.slow
def test_drift_learns_with_every_policy(tmp_path):
    bench_drift.check()
    line, runs = bench_drift.measure(num_events=8000, batch=1000)
    assert [row[0] for row in line["rows"]] == [*bench_drift.POLICIES]
    assert abs(line["figures"]["auc_lost"]) < 0.5
    bench_drift.chart(runs, 1000, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 5000


@pytest.mark.slow
def test_epochs_are_tested_with_every_cure():
    """Every cure has figures after each epoch; MEDA's first epoch is plain Adam's."""
    user = torch.arange(16).view(2, 8).square() % 5
    batches = [
        Batch(features={"user": ids}, dense=torch.zeros(8, 0), label=ids % 2.0, group=-1 - ids)
        for ids in user
    ]

    class Data(lightning.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(batches, batch_size=None)

        val_dataloader = train_dataloader

    task = bench_epochs.Task(
        "few ids", lambda: DeepFM({"user": EmbeddingOption(3)}), lambda *_: Data(), 0.1, 0.5
    )
    figures = bench_epochs.compare(task, bench_epochs.kinds(task.alpha), 1, is_search=False)
    for metric in ("auc", "log_loss"):
        curves = {name: runs[0] for name, runs in figures[metric].items()}
        assert [len(curve) for curve in curves.values()] == [bench_epochs.NUM_EPOCHS] * 4
        assert curves["MEDA"][0] == curves["Adam"][0]
    assert len({curve[0][-1] for curve in figures["log_loss"].values()}) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", [*bench_compaction.POLICIES])
@pytest.mark.slow_except(dict(name=next(iter(bench_compaction.POLICIES))))
def test_compaction_frees_memory_and_keeps_the_rest(name):
    shrunk = bench_compaction.shrink(300_000, name)
    assert shrunk["counted"] > 0.8


def test_a_table_that_is_doubled_trains_as_one_that_had_its_size():
    sized, doubled = Static(70, 10, 4), Static(70, 10, 4, grows=True)
    for _ in range(7):
        doubled.step()
        sized.table.weight.data.zero_()
        sized.step()
    assert doubled.table.num_embeddings == 80
    for name in ("exp_avg", "exp_avg_sq"):
        of_sized, of_doubled = (
            peer.optimizer.state[peer.table.weight][name] for peer in (sized, doubled)
        )
        assert torch.equal(of_sized, of_doubled[:70])
        assert of_sized.count_nonzero() == 280


def test_memory_leaves_out_peers_that_are_not_installed(monkeypatch):
    def missing(num_ids, batch):
        raise ImportError("No module named 'fbgemm_gpu'")

    monkeypatch.setattr(bench_memory, "peers", lambda dim, spread: {"FBGEMM": (1, missing)})
    assert "fbgemm" in bench_memory.grow_peer("FBGEMM", 10, 5)["missing"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_memory_measures_a_child():
    grown = bench_memory.run_child(3000, 1000)
    assert len(grown["peaks"]) == len(grown["seconds"]) == 3
    assert grown["nbytes"] > 3000 * bench_memory.PAYLOAD


def test_time_prepared_excludes_preparation(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("benchmarks.harness.time.perf_counter", lambda: now[0])

    def prepare(seconds):
        def prepare_run():
            now[0] += 100

            def timed():
                now[0] += seconds

            return timed

        return prepare_run

    assert time_prepared({"a": prepare(1), "b": prepare(2)}, 3) == {"a": 1e3, "b": 2e3}


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


def test_a_gpu_is_timed_with_events(monkeypatch):
    def take(ms):
        FakeEvent.now += ms

    monkeypatch.setattr(harness, "_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch, "set_default_device", lambda device: None)
    in_turn = harness.time_in_turn({"a": lambda: take(3), "b": lambda: take(5)}, 3)
    assert in_turn == {"a": 3, "b": 5}
    prepared = harness.time_prepared({"a": lambda: take(100) or (lambda: take(7))}, 3)
    assert prepared == {"a": 7}
    assert bench_cuda_step.event_ms(lambda: take(2), 20) == 2


def test_bounds_of_a_cpu_do_not_apply_to_a_gpu(monkeypatch, capsys, tmp_path):
    line = {"part": "evict", "figures": {"seconds": 100.0}}
    assert not meets_targets("bench_filter", line)
    monkeypatch.setattr(harness, "_device", torch.device("cuda"))
    assert meets_targets("bench_filter", line)
    lines = [{**line, "device": "cpu"}, {**line, "device": "cuda", "figures": {"seconds": 0.1}}]
    text = "\n".join(json.dumps(one) for one in lines)
    (tmp_path / "bench_filter.jsonl").write_text(text)
    assert summary.newest_lines(tmp_path)["bench_filter", "evict"] == lines[0]
    capsys.readouterr()
    assert harness.is_on_gpu("FBGEMM")
    assert capsys.readouterr().out == "FBGEMM: skipped, it runs on the CPU only\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "bench",
    [
        bench_checkpoint,
        bench_embedding_bag,
        bench_filter,
        bench_hash_index,
        bench_memory,
        bench_row_update,
        bench_training,
    ],
    ids=lambda bench: bench.__name__.removeprefix("benchmarks."),
)
def test_without_a_gpu_there_is_nothing_to_time_on_one(bench):
    with pytest.raises(SystemExit, match="--device cuda: torch finds no GPU here"):
        bench.main(["--device", "cuda"])


def test_targets_read_figures_and_tables():
    line = {"figures": {"ratio": 2}, "rows": [["a", 2.0], ["b", 8.0]]}
    assert figure("ratio")(line) == 2
    assert figure("peer")(line) is None
    assert mean_of(1)(line) == pytest.approx(4)
    assert mean_of(1)({"rows": [["a", float("nan")]]}) is None
    assert Target("a", "", "", mean_of(1), 2, False).is_met(2)
    assert not Target("a", "", "", mean_of(1), 2).is_met(1.9)
    assert len({(target.benchmark, target.part, target.label) for target in TARGETS}) == len(
        TARGETS
    )


def test_summary_shows_the_newest_lines(tmp_path):
    known = {"commit": "c0ffee", "dirty": True, "cpu": "a CPU", "threads": 2, "torch": "2"}
    find = {**known, "part": "find", "figures": {"ratio_one": 3.0}}
    lines = [{**find, "figures": {"ratio": 1.5}}, {**find, "figures": {"ratio": 2.5}}]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "bench_hash_index.jsonl").write_text(text)
    evict = {**known, "part": "evict", "figures": {"seconds": 0.75}}
    (tmp_path / "bench_filter.jsonl").write_text(json.dumps(evict))
    command = [sys.executable, "-m", "benchmarks.summary", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    shown = done.stdout.splitlines()
    newest = [line.split()[-5:] for line in shown if "2.5x" in line]
    assert newest == [["2.5x", ">=", "2", "met", "c0ffee+"]]
    assert any("0.75 s" in line and "MISSED" in line for line in shown)
    assert not any("1.5x" in line for line in shown)
    assert "not measured: insert 10M ids / C++ map (bench_hash_index)" in done.stdout
    assert (tmp_path / "benchmarks.png").stat().st_size > 5000


def test_missed_targets_are_printed(capsys):
    line = {"part": "evict", "figures": {"seconds": torch.tensor(0.75).item()}}
    assert not meets_targets("bench_filter", line)
    assert "0.75 s, target <= 0.5: MISSED" in capsys.readouterr().out
    assert summary.entries({}) == []


def test_string_hash_agrees_with_the_reference():
    pytest.importorskip("pyarrow")
    rates = bench_string_hash.measure(2000)["million_per_s"]
    assert set(bench_string_hash.HASHES) <= set(rates)
    assert min(rates.values()) > 0


def test_benchmarks_name_the_modules_they_measure():
    measured, listed = {}, {}
    for path in sorted((ROOT / "benchmarks").glob("bench_*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        paragraphs = [p for p in docstring.split("\n\n") if p.startswith("Measures: ")]
        assert len(paragraphs) == 1, path.name
        measured[path.stem] = re.findall(r"``recis_lightning\.([\w.]+)``", paragraphs[0])
    for row in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").splitlines():
        if row.startswith("| `bench_"):
            name, _, modules = row.strip("| ").split(" | ")
            listed[name.strip("`")] = re.findall(r"`([\w.]+)`", modules)
    assert listed == measured
    named = {module for modules in measured.values() for module in modules}
    for module in named:
        assert importlib.util.find_spec(f"recis_lightning.{module}") is not None, module
    ops = ROOT / "recis_lightning" / "ops"
    contracts = {path.stem for path in (ops / "reference").glob("*.py")}
    contracts &= {path.stem for path in ops.glob("*.py")} - {"__init__"}
    assert {f"ops.{name}" for name in contracts} <= named


def test_data_readers_agree(tmp_path):
    """All readers make the same batches; the measurement runs on a small file."""
    paths = bench_data.write(bench_data.sample(tmp_path).slice(0, 300), 700, tmp_path)
    for kind, path in paths.items():
        expected = bench_data.summary(bench_data.ours(path, kind))
        assert expected[0] == 700
        for make in (bench_data.arrow_loop, lambda p, k: iter(bench_data.Frames(p, k))):
            assert bench_data.summary(make(path, kind)) == expected


def test_traffic_of_mapped_rows_brings_frequent_ids_first():
    traffic = bench_mapped_rows._Traffic(1000, 1.2)
    ranks = torch.from_numpy(traffic.first_seen)
    assert torch.equal(ranks.sort().values, torch.arange(1000))
    assert ranks[:100].double().mean() < 250 < ranks[900:].double().mean()
    ids = traffic.batch(5000)
    assert set((ids % bench_mapped_rows.SPREAD).tolist()) == {0}
    assert (ids == 0).double().mean() > 0.2


def test_expected_misses_of_mapped_rows_are_those_of_traffic():
    """By drawing batches; no choice of rows misses fewer than the most frequent ones."""
    traffic = bench_mapped_rows._Traffic(2000, 1.05)
    expected = traffic.misses(800, 200)
    drawn = [traffic.batch(800) // bench_mapped_rows.SPREAD for _ in range(200)]
    kept = torch.from_numpy(traffic.first_seen[:200])
    distinct = [ranks.unique() for ranks in drawn]
    means = {
        "distinct": [len(ranks) for ranks in distinct],
        "missed_at_best": [int((ranks >= 200).sum()) for ranks in distinct],
        "missed_first_come": [int((~torch.isin(ranks, kept)).sum()) for ranks in distinct],
        "hits_at_best": [float((ranks < 200).double().mean()) for ranks in drawn],
    }
    for name, values in means.items():
        assert sum(values) / len(values) == pytest.approx(expected[name], rel=0.03), name
    assert expected["missed_at_best"] < expected["missed_first_come"] < expected["distinct"]


@pytest.mark.slow
def test_mapped_rows_are_measured(tmp_path, monkeypatch, capsys):
    """Both processes step and agree, where a limit of memory can be set."""
    arguments = ["--rows", "20000", "--dim", "32", "--batch", "500", "--steps", "3"]
    # So small a table needs more than its size: the allocator's and Python's memory changes.
    arguments += ["--warmup", "1", "--share", "60", "--folder", str(tmp_path), "--dry"]
    monkeypatch.setattr(sys, "argv", ["bench_mapped_rows.py", *arguments])
    monkeypatch.setattr(bench_mapped_rows, "busy_share", lambda: 0.3)
    bench_mapped_rows.main()
    said = capsys.readouterr().out
    if "skipped: no control group" not in said:
        assert "speed of the mapped table" in said
        assert "not recorded: others used 30% of the processors" in said


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_others_share_of_the_processors():
    assert 0 <= bench_mapped_rows.busy_share(0.05) <= 1
