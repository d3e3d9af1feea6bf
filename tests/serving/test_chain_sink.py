import json
import multiprocessing
import os
import random
import re
import signal

import pytest
import torch

from recis_lightning import HashTable, serving
from recis_lightning.serving import checked_json
from recis_lightning.serving.chain import chain_folder, links_of, read_head
from recis_lightning.serving.chain_link import Head, is_chain_file
from recis_lightning.serving.merging import merge
from tests.helpers.delta_model import Run

_FORK = multiprocessing.get_context("fork")


def rows_of(folder):
    """Return step and rows of the one table behind a chain's last delta, as a dict by id."""
    path = chain_folder(folder)
    links = links_of(path, read_head(path))
    delta = merge(path, links, 0)
    table = delta.tables["t"]
    return delta.step, dict(zip(table.ids.tolist(), table.weights.tolist(), strict=True))


def recorded(count=4):
    """Return deltas of a table, and its rows behind each."""
    table = HashTable(2, name="t")
    mark = serving.ModelMark([table])
    random = torch.Generator().manual_seed(0)
    deltas, states = [], []
    for step in range(count):
        ids = torch.randint(0, 50, (20,), generator=random)
        table.insert(ids, torch.rand(20, 2, generator=random))
        table.delete(torch.randint(0, 50, (5,), generator=random))
        deltas.append(mark.take(step))
        known = table.ids()
        states.append(dict(zip(known.tolist(), table.embeddings(known).tolist(), strict=True)))
    mark.close()
    return deltas, states


def strays(folder):
    path = chain_folder(folder)
    links = links_of(path, read_head(path))
    kept = {name for link in links for name in link.file_names()} | {"head.json"}
    return [name for name in os.listdir(path) if is_chain_file(name) and name not in kept]


def test_a_chain_has_the_rows_behind_its_last_delta(tmp_path):
    """Whatever was written, overwritten and deleted; compacted or not."""
    deltas, states = recorded(6)
    sink = serving.ChainSink(tmp_path, compact_every=None)
    for step, delta in enumerate(deltas):
        sink.write(delta)
        assert rows_of(tmp_path) == (step, states[step])
        if step in (2, 4):
            assert serving.compact(tmp_path) == 2
            assert rows_of(tmp_path) == (step, states[step])
    sink.close()
    assert not strays(tmp_path)
    assert serving.compact(tmp_path) == 1
    assert serving.compact(tmp_path) == 0
    assert rows_of(tmp_path) == (5, states[5])


def test_a_new_run_takes_the_place_of_an_older_chain(tmp_path):
    deltas, states = recorded(3)
    for _ in range(2):
        sink = serving.ChainSink(tmp_path)
        for delta in deltas:
            sink.write(delta)
        with pytest.raises(RuntimeError, match="another writer"):
            serving.ChainSink(tmp_path).write(deltas[0])
        sink.close()
        assert rows_of(tmp_path) == (2, states[2])
    assert read_head(chain_folder(tmp_path)).seq == 5
    assert not strays(tmp_path)


def test_the_first_delta_must_be_whole(tmp_path):
    deltas, _ = recorded(2)
    sink = serving.ChainSink(tmp_path)
    with pytest.raises(ValueError, match="all rows"):
        sink.write(deltas[1])
    sink.write(deltas[0])
    sink.close()
    assert not strays(tmp_path)


def test_a_sink_compacts_by_itself(tmp_path):
    deltas, states = recorded(9)
    sink = serving.ChainSink(tmp_path, compact_every=2)
    for delta in deltas:
        sink.write(delta)
        sink._end_compaction()
    sink.close()
    head = read_head(chain_folder(tmp_path))
    assert head.seq - head.base_seq <= 2
    assert rows_of(tmp_path) == (8, states[8])
    with pytest.raises(TypeError, match="compact_every"):
        serving.ChainSink(tmp_path, compact_every=1.5)


@pytest.mark.parametrize("failing", range(5))
def test_a_delta_that_cannot_be_written_is_not_there(tmp_path, monkeypatch, failing):
    """A full disk at any write leaves the chain before it; the next delta has all changes."""
    table = HashTable(2, name="t")
    mark, sink = serving.ModelMark([table]), serving.ChainSink(tmp_path)
    table.insert(torch.arange(5), torch.ones(5, 2))
    sink.write(mark.take(0))
    table.insert(torch.arange(3), torch.zeros(3, 2))
    table.delete(torch.tensor([4]))
    calls = 0

    def fsync(file, real=os.fsync):
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise OSError(28, "No space left on device")
        real(file)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        delta = mark.take(1)
        with pytest.raises(OSError, match="No space"):
            sink.write(delta)
        mark.put_back()
    assert rows_of(tmp_path)[0] == 0
    assert not strays(tmp_path)
    table.insert(torch.tensor([9]), torch.ones(1, 2))
    sink.write(mark.take(2))
    sink.close()
    ids = table.ids()
    wanted = dict(zip(ids.tolist(), table.embeddings(ids).tolist(), strict=True))
    assert rows_of(tmp_path) == (2, wanted)


def _write_and_die(folder, deltas, at, words):
    """Write deltas, compact after each second one, and be killed at the at-th system call."""
    torch.set_num_threads(1)
    calls = 0

    def counted(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "unlink", "open"):
        setattr(os, name, counted(getattr(os, name)))
    path = type(folder)
    path.unlink, path.replace = counted(path.unlink), counted(path.replace)
    path.open = counted(path.open)
    sink = serving.ChainSink(folder, compact_every=None)
    for step, delta in enumerate(deltas):
        sink.write(delta)
        words.send(step)
        if step % 2:
            serving.compact(folder)
    words.send("done")
    os._exit(0)


def _kill_at(folder, deltas, states, at):
    """Kill a writer at a system call; return whether it was done before."""
    ours, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_write_and_die, args=(folder, deltas, at, theirs))
    process.start()
    theirs.close()
    said = []
    while ours.poll(60):
        try:
            said.append(ours.recv())
        except EOFError:
            break
    process.join()
    if said[-1:] == ["done"]:
        return True
    published = said[-1] if said else -1
    if published == -1 and Head.read(chain_folder(folder)) is None:
        return False
    step, rows = rows_of(folder)
    assert step in (published, published + 1)
    assert rows == states[step]
    return False


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_killed_writer_leaves_a_chain_that_loads(tmp_path):
    """Killed before each system call that changes files; the next run goes on, and cleans up."""
    _kill_everywhere(tmp_path, range(1, 400, 31))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_killed_writer_leaves_a_chain_that_loads_wherever(tmp_path):
    assert _kill_everywhere(tmp_path, range(1, 10**6), 8) >= 200


def _kill_everywhere(tmp_path, moments, num_deltas=4):
    deltas, states = recorded(num_deltas)
    kills = 0
    for at in moments:
        folder = tmp_path / str(at)
        folder.mkdir()
        if _kill_at(folder, deltas, states, at):
            break
        kills += 1
        sink = serving.ChainSink(folder)
        sink.write(deltas[0])
        sink.write(deltas[1])
        sink.close()
        assert rows_of(folder) == (1, states[1])
        assert not strays(folder)
    else:
        pytest.fail("more system calls than thought")
    return kills


def _edit(path, change):
    """Change a file of JSON as somebody would who can compute checksums."""
    state = json.loads(path.read_text())
    state.pop("checksum")
    change(state)
    path.unlink()
    checked_json.write_checked(path, state)


def _array(state, name, field, value):
    state["files"][0]["arrays"][name][field] = value


_HOSTILE = {
    "a path": lambda link: link["files"][0].update(file="../secret"),
    "another file": lambda link: link["files"][0].update(file="head.json"),
    "a size": lambda link: link["files"][0].update(size=1 << 47),
    "a dtype": lambda link: _array(link, "0/removed", 0, "object"),
    "a shape": lambda link: _array(link, "0/removed", 1, [1 << 40]),
    "an offset": lambda link: _array(link, "0/removed", 2, 1 << 40),
    "a number of rows": lambda link: link["tables"][0]["parts"][0].update(rows=1 << 32),
    "a dim": lambda link: link["tables"][0].update(embedding_dim=3),
    "no dim": lambda link: link["tables"][0].update(embedding_dim=0),
    "a table's dtype": lambda link: link["tables"][0].update(dtype="int64"),
    "a circle": lambda link: link.update(parent=link["id"]),
    "no parent": lambda link: link.update(parent=""),
    "a seq": lambda link: link.update(seq=0),
    "a kind": lambda link: link.update(kind="base", parent=""),
    "ranks": lambda link: link.update(files=link["files"] * 2),
    "no files": lambda link: link.update(files=[]),
    "a time": lambda link: link.update(time="now"),
    "an unknown field": lambda link: link.update(code="import os"),
    "nothing": lambda link: link.clear(),
}


@pytest.mark.parametrize("what", _HOSTILE)
def test_a_hostile_link_is_refused(tmp_path, what):
    deltas, _ = recorded(3)
    sink = serving.ChainSink(tmp_path)
    for delta in deltas:
        sink.write(delta)
    sink.close()
    path = chain_folder(tmp_path)
    link = links_of(path, read_head(path))[-1]
    _edit(path / link.file, _HOSTILE[what])
    with pytest.raises(ValueError, match=r"damaged|expected|link"):
        rows_of(tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_file_is_refused(tmp_path, seed):
    """Any changed byte, and any file that is missing, cut or a pipe, is an error that names it."""
    deltas, _ = recorded(2)
    sink = serving.ChainSink(tmp_path)
    for delta in deltas:
        sink.write(delta)
    sink.close()
    path = chain_folder(tmp_path)
    draw = random.Random(seed)
    names = sorted(name for name in os.listdir(path) if is_chain_file(name))
    for name in names:
        content = (path / name).read_bytes()
        at = draw.randrange(len(content))
        bad = bytearray(content)
        bad[at] ^= 1 << draw.randrange(8)
        for damaged in (bytes(bad), content[:at]):
            (path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=re.escape(str(path))):
                rows_of(tmp_path)  # padding between arrays is covered by the checksums too
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(ValueError, match=r"regular file|missing"):
            rows_of(tmp_path)
        (path / name).unlink()
        (path / name).write_bytes(content)
    rows_of(tmp_path)


def test_two_marks_write_two_chains(tmp_path):
    """Each consumer gets all changes, at its own pace."""
    run = Run()
    fast, slow = (serving.ModelMark(run.model), serving.ModelMark(run.model))
    sinks = serving.ChainSink(tmp_path / "fast"), serving.ChainSink(tmp_path / "slow")
    for step in range(9):
        run.step()
        sinks[0].write(fast.take(step))
        if step % 4 == 0:
            sinks[1].write(slow.take(step))
    for sink in sinks:
        sink.close()
    states = []
    for name in ("fast", "slow"):
        path = chain_folder(tmp_path / name)
        states.append(merge(path, links_of(path, read_head(path)), 0))
    for table in run.tables:
        of_fast, of_slow = (state.tables[table.name] for state in states)
        assert of_fast.ids.tolist() == of_slow.ids.tolist() == table.ids().tolist()
        assert of_fast.weights.equal(of_slow.weights)
        assert of_fast.weights.equal(table.embeddings(table.ids()))
    assert states[0].dense["tower.weight"].equal(run.model.tower.weight)
