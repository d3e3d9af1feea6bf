"""The demo, served: the Trainer's scores from raw rows, and by HTTP."""

import asyncio
import math
import time

import pyarrow as pa
import pytest
import torch

from examples.deepfm import criteo, movielens
from examples.deepfm.train import criteo_model, movielens_model
from examples.serving.batcher import Batcher
from examples.serving.demo import Probability
from recis_lightning import hash_tables, serving
from tests.examples.test_deepfm import trainer
from tests.helpers.deepfm_data import criteo_rows, write_criteo, write_movielens


@pytest.mark.parametrize("data_set", ["movielens", "criteo"])
def test_served_scores_are_those_that_the_trainer_predicts(data_set, tmp_path):
    """Bit for bit, from raw rows without labels, some of whose ids no training row had."""
    torch.manual_seed(0)
    if data_set == "movielens":
        model, example = movielens_model(lr=0.05), movielens
        data = movielens.MovieLensDataModule(str(write_movielens(tmp_path)), batch_size=16)
        data.prepare_data()
        parts = movielens.part_files(tmp_path)[80:]
        table = pa.concat_tables(pa.parquet.read_table(path) for path in parts)
    else:
        model, example = criteo_model(lr=0.05), criteo
        for index in range(2):
            write_criteo(tmp_path / f"part-{index}.parquet", 60, first=50 * index)
        parts = {"train": ["part-0.*"], "test": ["part-1.*"]}
        data = criteo.CriteoDataModule(str(tmp_path), **parts, batch_size=16, hash=None)
        table = pa.parquet.read_table(tmp_path / "part-1.parquet")
        assert criteo_rows(60, 50)["c1"] == table["c1"].to_pylist()
    runner = trainer(max_epochs=2, num_sanity_val_steps=0)
    runner.fit(model, data)
    predicted = runner.predict(model, data.test_dataloader())

    served = tmp_path / "served"
    options = {"features": data.features, "convert": example.to_batch}
    serving.export(Probability(model), served, example=table[:4].to_pydict(), **options)
    loaded, first = serving.load(served), 0
    table = table.drop(["rating" if data_set == "movielens" else "label"])
    assert len(set(torch.cat(predicted).tolist())) > 5
    for scores in predicted:
        raw = table[first : first + len(scores)]
        assert loaded(raw.to_pydict()).equal(scores)
        assert loaded(raw).equal(scores)
        first += len(scores)
    assert first == len(table)


def run(score, *requests, **options):
    """Return the answers of concurrent requests, and the batcher."""

    async def main():
        batcher = Batcher(score, **options)
        asked = [batcher.score(columns) for columns in requests]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        batcher.close()
        return answers, batcher

    return asyncio.run(main())


def double(columns):
    if "x" not in columns:
        raise ValueError("no x")
    return torch.tensor(columns["x"], dtype=torch.float64) * 2


def test_concurrent_requests_are_scored_together():
    answers, batcher = run(double, {"x": [1, 2]}, {"x": []}, {"x": [3]})
    assert answers == [[2.0, 4.0], [], [6.0]]
    assert (batcher.num_batches, batcher.num_rows) == (1, 3)
    answers, batcher = run(double, *({"x": [n, n]} for n in range(5)), max_rows=4)
    assert answers == [[2.0 * n] * 2 for n in range(5)]
    assert batcher.num_batches == 3


def test_a_request_that_cannot_be_scored_fails_alone():
    answers, _ = run(double, {"x": [1]}, {"x": ["a"]}, {"y": [1]}, {"x": [1], "y": []}, {"x": [4]})
    assert answers[0] == [2.0]
    assert answers[4] == [8.0]
    assert [type(answer) for answer in answers[1:4]] == [ValueError, ValueError, ValueError]
    assert "equally many rows" in str(answers[3])


def test_the_demo_is_served_by_http(tmp_path):
    """Scores, health, version, metrics; bad requests; a load beside plain PyTorch."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from examples.serving.app import app_of, make_app
    from examples.serving.load_test import ask, load, running
    from examples.serving.plain import PlainDeepFM

    torch.manual_seed(0)
    model = movielens_model(lr=0.05)
    data = movielens.MovieLensDataModule(str(write_movielens(tmp_path)), batch_size=16)
    data.prepare_data()
    trainer(max_epochs=1, num_sanity_val_steps=0, limit_val_batches=0).fit(model, data)
    table = pa.parquet.read_table(movielens.part_files(tmp_path)[90])
    example = pa.concat_tables([table] * 4).to_pydict()
    folder = tmp_path / "served"
    options = {"features": movielens.FEATURES, "convert": movielens.to_batch}
    serving.export(Probability(model), folder, example=example, **options)
    raw = table.drop(["rating"]).to_pydict()
    expected = serving.load(folder)(raw).tolist()
    plain = PlainDeepFM(model, movielens.FEATURES.without_labels())
    assert plain(raw).tolist() == pytest.approx(expected, rel=1e-5)

    with running(app_of(str(folder))) as port:
        status, version = ask(port, "/version")
        assert ask(port, "/health") == (200, {"status": "ok", "version": version["version"]})
        assert (status, version["model"]) == (200, "Probability")
        assert sorted(version["columns"]) == sorted(raw)
        assert ask(port, "/score", {"columns": raw}) == (200, {"scores": expected})
        for columns, wanted, words in [
            ({**raw, "gender": [3.5]}, 422, "column 'gender'"),
            ({"user": [1]}, 422, "expected"),
            ({**raw, "user": [1, 2]}, 422, "equally many rows"),
            ({"user": 3}, 400, "as JSON"),
            ({"user": [1] * 5000}, 413, "4096 rows"),
        ]:
            status, answer = ask(port, "/score", {"columns": columns})
            assert status == wanted
            assert words in answer["error"]
        assert ask(port, "/score", [1])[0] == 400
        found = load(port, [{**raw, "user": [user]} for user in range(24)], 3)
        assert found["errors"] == 0
        assert 0 < found["p50_ms"] <= found["p99_ms"]
        status, text = ask(port, "/metrics")
        assert 'score_requests_total{status="200"} 25' in text
        assert 'score_requests_total{status="422"} 3' in text
        assert "scores_total 25" in text
        assert 'score_seconds_bucket{le="+Inf"} 31' in text
    with running(make_app(plain, {"model": "plain"})) as port:
        answer = ask(port, "/score", {"columns": raw})[1]["scores"]
    assert answer == pytest.approx(expected, rel=1e-5)
    with running(make_app(lambda columns: torch.tensor([math.nan, 0.5]), {})) as port:
        assert ask(port, "/score", {"columns": {"a": [1, 2]}})[1] == {"scores": [None, 0.5]}

    mark, sink = serving.ModelMark(model), serving.ChainSink(folder)
    with torch.no_grad():
        for table in hash_tables(model):
            table.insert(table.ids(), 2 * table.embeddings(table.ids()))
        for parameter in model.perceptron.parameters():
            parameter.mul_(1.5)
    with running(app_of(str(folder), follow=True)) as port:
        assert ask(port, "/health")[1]["step"] is None
        assert ask(port, "/score", {"columns": raw}) == (200, {"scores": expected})
        sink.write(mark.take(7))
        for _ in range(1000):
            status, health = ask(port, "/health")
            if health["step"] is not None:
                break
            time.sleep(0.01)
        assert (status, health["status"], health["step"], health["error"]) == (200, "ok", 7, None)
        assert health["version"] == ask(port, "/version")[1]["version"]
        changed = ask(port, "/score", {"columns": raw})[1]["scores"]
        batch = movielens.to_batch(movielens.FEATURES.without_labels()(raw))
        with torch.no_grad():
            assert changed == model.eval()(batch).sigmoid().tolist()
        assert changed != expected
    sink.close()
