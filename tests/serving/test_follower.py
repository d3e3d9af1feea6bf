import copy
import pickle
import threading
import time

import numpy as np
import pytest
import torch

from benchmarks.bench_following import Load, Truth, write_deltas
from recis_lightning import DynamicEmbedding, serving
from recis_lightning.serving.layered_table import Layer
from tests.helpers.delta_model import Run
from tests.helpers.served_model import Model, make_batch


def _ids(count, num_ids, seed):
    return torch.randint(0, num_ids, (count,), generator=torch.Generator().manual_seed(seed))


def scores_of(run, batch):
    run.model.eval()
    with torch.no_grad():
        found = run.model(batch)
    run.model.train()
    return found


def test_scores_are_those_of_the_model_behind_the_last_delta(tmp_path):
    """Rows that are new, changed, evicted and unknown; parameters; and whatever is compacted."""
    run = Run()
    run.step()
    batch = {"user": torch.arange(-3, 130), "item": torch.arange(-3, 130)}
    serving.export(run.model, tmp_path, example=run.batch())
    with serving.follow(tmp_path, poll_seconds=None) as model:
        assert not model.refresh()
        assert (model.step, model.nbytes) == (None, 0)
        assert model(batch).equal(scores_of(run, batch))
        mark, sink = serving.ModelMark(run.model), serving.ChainSink(tmp_path, compact_every=None)
        for step in range(20):
            run.step()
            sink.write(mark.take(step))
            if step % 7 == 5:
                serving.compact(tmp_path)
            if step % 3 == 2:  # it may fall behind, and behind a base too
                assert model.refresh()
                assert not model.refresh()
                assert model.step == step
                assert model(batch).equal(scores_of(run, batch))
        run.model.item.table.clear()
        sink.write(mark.take(20))
        model.refresh()
        assert model(batch).equal(scores_of(run, batch))
        sink.close()
        with serving.follow(tmp_path, poll_seconds=None) as late:
            assert late(batch).equal(model(batch))
            assert late.step == 20
        # The trainer starts anew, with another chain.
        mark, sink = serving.ModelMark(run.model), serving.ChainSink(tmp_path)
        run.step()
        sink.write(mark.take(0))
        assert model.refresh()
        assert model(batch).equal(scores_of(run, batch))
        sink.close()


class Wrapped(torch.nn.Module):
    """What is exported of a trained model, with a scale of its own and one that is no parameter."""

    def __init__(self, model):
        super().__init__()
        self.model, self.own = model, torch.nn.Parameter(torch.tensor(2.0))
        self.half = torch.tensor(0.5)

    def forward(self, batch):
        return (self.model(batch) * self.own * self.half).sigmoid()


def test_a_module_that_holds_the_trained_one_is_followed(tmp_path):
    """Its parameters too: rows of a delta with a tower of the export would be two versions."""
    run = Run()
    run.step()
    wrapped = Wrapped(run.model)
    serving.export(wrapped, tmp_path, example=run.batch())
    mark, sink = serving.ModelMark(run.model), serving.ChainSink(tmp_path)
    batch = {"user": torch.arange(50), "item": torch.arange(50)}
    with serving.follow(tmp_path, poll_seconds=None) as followed:
        for step in range(2):
            run.step()
            sink.write(mark.take(step))
            followed.refresh()
            assert (followed.step, followed.model.step) == (step, step)
            assert followed(batch).equal(wrapped.eval()(batch).detach())
    sink.close()


class Part(torch.nn.Module):
    """Rows and a tower."""

    def __init__(self):
        super().__init__()
        self.user, self.tower = DynamicEmbedding(4, name="t"), torch.nn.Linear(4, 1)

    def forward(self, ids):
        return self.tower(self.user(ids))


def test_a_part_of_the_trained_module_is_followed(tmp_path):
    trained = torch.nn.ModuleDict({"net": Part(), "loss": torch.nn.Linear(3, 2)})
    trained["net"](torch.arange(5))
    serving.export(trained["net"], tmp_path, example=torch.arange(3))
    mark, sink = serving.ModelMark(trained), serving.ChainSink(tmp_path)
    with torch.no_grad():
        trained["net"].tower.weight.fill_(3)
    sink.write(mark.take(0))
    with serving.follow(tmp_path, poll_seconds=None) as followed:
        assert followed(torch.arange(9)).equal(trained["net"].eval()(torch.arange(9)))
    sink.close()


def test_a_parameter_is_followed_by_each_of_its_names(tmp_path):
    model = Part()
    model.alias = model.tower  # after it, and before it
    model._modules = {"alias": model.alias, **model._modules}
    model(torch.arange(5))
    serving.export(model, tmp_path, example=torch.arange(3))
    mark, sink = serving.ModelMark(model), serving.ChainSink(tmp_path)
    with torch.no_grad():
        model.tower.weight.fill_(3)
    sink.write(mark.take(0))
    with serving.follow(tmp_path, poll_seconds=None) as followed:
        assert followed(torch.arange(9)).equal(model.eval()(torch.arange(9)))
    sink.close()


def test_a_chain_without_the_exported_parameters_is_refused(tmp_path):
    model, other = Part(), torch.nn.ModuleDict({"user": DynamicEmbedding(4, name="t")})
    other.register_buffer("scale", torch.ones(1))
    model(torch.arange(5))
    other["user"](torch.arange(5))
    serving.export(model, tmp_path, example=torch.arange(3))
    mark, sink = serving.ModelMark(other), serving.ChainSink(tmp_path)
    sink.write(mark.take(0))
    with pytest.raises(ValueError, match=r"none of the exported parameters, such as 'tower\."):
        serving.follow(tmp_path)
    sink.close()


def test_every_kind_of_feature_is_followed(tmp_path):
    model = Model()
    batches = [make_batch(size, seed=size) for size in (7, 5, 1, 0)]
    model(batches[0])
    serving.export(model, tmp_path, example=batches[0])
    mark, sink = serving.ModelMark(model), serving.ChainSink(tmp_path)
    sink.write(mark.take(0))
    with serving.follow(tmp_path, poll_seconds=None) as followed:
        for batch in batches[:2]:
            model.train()
            model(batch)  # more ids
            sink.write(mark.take(1))
            followed.refresh()
            model.eval()
            for other in batches:
                assert followed(other).equal(model(other).detach())
    sink.close()


def test_each_answer_is_of_one_version_and_nobody_waits(tmp_path):
    """Threads that score while deltas come see rows and parameters of one delta, never two."""
    model = torch.nn.Sequential(DynamicEmbedding(4, name="t"), torch.nn.Linear(4, 1, bias=False))
    table, tower = model[0].table, model[1]
    ids = torch.arange(64)
    table.insert(ids, torch.ones(64, 4))
    with torch.no_grad():
        tower.weight.fill_(1.0)
    serving.export(model, tmp_path, example=ids)
    mark, sink = serving.ModelMark(model), serving.ChainSink(tmp_path, compact_every=8)
    sink.write(mark.take(1))
    wrong, done = [], threading.Event()

    def score(size, followed):
        while not done.is_set():
            # With rows of k and a tower of 1 / k a score is 4; of two versions it is not.
            found = followed(ids[:size])
            if not bool((found - 4).abs().max() < 1e-5):
                wrong.append(found)

    with serving.follow(tmp_path, poll_seconds=0.001) as followed:
        threads = [threading.Thread(target=score, args=(size, followed)) for size in (1, 7, 64)]
        for thread in threads:
            thread.start()
        for step in range(2, 26):
            table.insert(ids, torch.full((64, 4), float(step)))
            with torch.no_grad():
                tower.weight.fill_(1 / step)
            sink.write(mark.take(step))
        sink.close()
        done.set()
        for thread in threads:
            thread.join()
        followed.refresh()
        assert followed.step == 25
        assert followed.error is None
    assert not wrong


class _Done:
    value = 0


def test_threads_score_batches_of_mixed_sizes_while_deltas_come(tmp_path):
    """``benchmarks/bench_following.py`` in short: each score is that of the version it claims."""
    total, deltas, done = 4000, 12, _Done()

    def wait(step):
        while done.value < total * step / (deltas + 1):
            time.sleep(0.001)

    writer = threading.Thread(target=write_deltas, args=(str(tmp_path), deltas, wait))
    writer.start()
    while not (tmp_path / "manifest.json").exists():
        time.sleep(0.01)
    load = Load(str(tmp_path), Truth(deltas), total, 16, done)
    load.run()
    done.value = total
    writer.join()
    load.followed.close()
    assert load.wrong == []
    assert len(load.versions) > 1
    assert load.figures()["requests"] == total


def test_memory_stays_flat_over_many_deltas(tmp_path):
    """Rows that change over and over, and ids that come and go, take no more memory."""
    module = DynamicEmbedding(4, name="t")
    table = module.table
    table.insert(torch.arange(2000), torch.ones(2000, 4))
    serving.export(module, tmp_path, example=torch.arange(3))
    mark, sink = serving.ModelMark(module), serving.ChainSink(tmp_path, compact_every=None)
    sink.write(mark.take(0))
    with serving.follow(tmp_path, poll_seconds=None) as followed:
        sizes = []
        for step in range(1, 60):
            ids = _ids(30, 200, step)
            table.insert(ids, torch.full((30, 4), float(step)))
            table.insert(torch.tensor([10**6 + step]), torch.ones(1, 4))
            table.delete(torch.tensor([10**6 + step - 1]))
            sink.write(mark.take(step))
            followed.refresh()
            sizes.append(followed.nbytes)
        # 200 ids and what has come since they were merged last.
        assert max(sizes) < 2 * (8 + 1 + 16) * 200
        found = followed.model.tables["t"].look_up(table.ids(), None, None, "none", 0, None)
        assert found.equal(table.embeddings(table.ids()))
    sink.close()


def test_another_model_s_chain_is_refused(tmp_path):
    """The version before goes on answering, and says what is wrong."""
    one, other = DynamicEmbedding(4, name="t"), DynamicEmbedding(3, name="t")
    one(torch.arange(3))
    other(torch.arange(3))
    serving.export(one, tmp_path, example=torch.arange(3))
    with serving.follow(tmp_path, poll_seconds=0.001) as followed:
        sink, mark = serving.ChainSink(tmp_path), serving.ModelMark(other)
        sink.write(mark.take(0))
        with pytest.raises(ValueError, match="looks up 4 x float32 of table 't'"):
            followed.refresh()
        assert followed(torch.arange(3)).equal(one.eval()(torch.arange(3)).detach())
        assert followed.step is None
        with pytest.raises(ValueError, match="looks up 4 x float32"):
            serving.follow(tmp_path)
        sink.close()
    with pytest.raises(TypeError, match="poll_seconds"):
        serving.follow(tmp_path, poll_seconds="fast")


def test_a_damaged_delta_leaves_the_version_before(tmp_path):
    run = Run()
    run.step()
    serving.export(run.model, tmp_path, example=run.batch())
    mark, sink = serving.ModelMark(run.model), serving.ChainSink(tmp_path)
    sink.write(mark.take(0))
    batch = {"user": torch.arange(50), "item": torch.arange(50)}
    with serving.follow(tmp_path, poll_seconds=None) as followed:
        before = followed(batch)
        run.step()
        sink.write(mark.take(1))
        (file,) = (tmp_path / "deltas").glob("delta-*.rows")
        content = bytearray(file.read_bytes())
        content[10] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            followed.refresh()
        assert followed.step == 0
        assert followed(batch).equal(before)
    sink.close()


def test_layers_answer_as_a_dict_would():
    """Layers over layers, with tombstones of ids that are there and that are not."""
    random = np.random.default_rng(0)
    truth, layer = {}, Layer.of(np.empty(0, np.int64), torch.empty(0, 2), np.empty(0, np.int64))
    for step in range(20):
        ids = random.choice(60, 15, replace=False)
        gone = random.choice(60, 9, replace=False)
        weights = torch.full((15, 2), float(step))
        layer = Layer.of(ids, weights, gone).over(layer)
        for id in gone.tolist():
            truth[id] = None
        truth.update(dict.fromkeys(ids.tolist(), float(step)))
        decided, places = layer.find(np.arange(-1, 61))
        for id, is_known, place in zip(range(-1, 61), decided, places, strict=True):
            assert is_known == (id in truth)
            if is_known:
                value = None if place < 0 else float(layer.weights[place, 0])
                assert value == truth[id]


def test_a_pickled_model_follows_where_it_is_loaded(tmp_path):
    model = DynamicEmbedding(2, name="user")
    serving.export(model, tmp_path, example=torch.arange(3))
    with serving.follow(tmp_path) as followed:
        data = pickle.dumps(followed)
        with pickle.loads(data) as other, copy.deepcopy(followed) as third:
            assert other(torch.arange(3)).equal(third(torch.arange(3)))
            assert other._thread is not None
    closed = pickle.loads(pickle.dumps(followed))
    assert closed._thread is None
