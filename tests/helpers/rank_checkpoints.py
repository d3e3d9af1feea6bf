"""Functions that ranks run in tests of checkpoints, each in every process of a group."""

import contextlib
import errno
import io
import os
import time
from dataclasses import replace

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import distributed

from recis_lightning import HashTable, checkpoint, hash_tables
from recis_lightning.admission import MinCount
from recis_lightning.callbacks import CheckpointHook
from recis_lightning.checkpoint import shard_file
from recis_lightning.checkpoint.commit import Commit
from recis_lightning.distributed import collectives
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.ops.layout import NUM_UPDATES
from recis_lightning.optim import SparseAdagrad, SparseAdam
from recis_lightning.table import state as table_state
from tests.helpers.click_data import loader
from tests.helpers.lightning_model import Model, trainer
from tests.helpers.rank_trainers import as_torchrun, train_loader
from tests.helpers.sample_tables import settings_of


def owned(ids):
    rank, world_size = collectives.rank(), collectives.world_size()
    return ids[owner_of(ids, world_size) == rank]


def tables():
    """Return empty tables of two kinds, with their optimizers."""
    adam = HashTable(5, name="adam", eviction=GlobalStepFilter(100))
    adagrad = HashTable(3, name="bf16", dtype=torch.bfloat16, admission=MinCount(50), seed=4)
    optimizers = SparseAdam([adam], lr=0.1), SparseAdagrad([adagrad], lr=0.1)
    return [adam, adagrad], optimizers


def filled(seed=0, count=20_000):
    """Return tables with this rank's part of rows that all ranks draw alike."""
    made, optimizers = tables()
    for table in made:
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
        for step, part in enumerate(draws.split(count // 3)):
            ids = owned(part)
            table.insert(ids, torch.randn(len(ids), table.embedding_dim))
            rows = table.ids_map()[1]
            weights, slots = table.storage.rows.read(rows)
            slots = {name: torch.rand_like(slot) for name, slot in slots.items()}
            table.storage.rows.write(rows, weights, slots)
            table.update_step(step + 3)
            table.storage.header.fields[NUM_UPDATES] += 1
    waiting = owned(draws + 1)
    table.storage.admission_counter.load_state(
        {
            "num_lookups": 9,
            "pending_ids": waiting,
            "pending_counts": waiting % 49 + 1,
            "pending_lookups": waiting % 9,
        },
        "bf16",
    )
    return made, optimizers


def held(made):
    """Return the state of tables, as NumPy arrays in the order of ids."""
    states = {}
    for table in made:
        ids, rows = table.ids_map()
        weights, slots = table.storage.rows.read(rows)
        fields = table_state.saved_fields(table, rows)
        state = {"ids": ids, "weights": weights.float(), **slots}
        state |= {key: value for key, value in fields.items() if isinstance(value, torch.Tensor)}
        order = {True: ids.argsort()}
        if "pending_ids" in state:
            order[False] = state["pending_ids"].argsort()
        for key, value in state.items():
            states[table.name, key] = value[order[not key.startswith("pending")]].numpy()
        states[table.name, "settings"] = (settings_of(table), fields.get("num_lookups"))
    return states


def joined(answers):
    """Put the ranks' answers of ``held`` together."""
    whole = {}
    for key, first in answers[0].items():
        if key[1] == "settings":
            assert all(answer[key] == first for answer in answers)
            whole[key] = first
            continue
        ids = "pending_ids" if key[1].startswith("pending") else "ids"
        order = np.concatenate([answer[key[0], ids] for answer in answers]).argsort()
        whole[key] = np.concatenate([answer[key] for answer in answers])[order]
    return whole


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_equal(value, other[key], err_msg=str(key))
    return True


def make_and_save(folder):
    torch.manual_seed(collectives.rank())
    made, _optimizers = filled()
    checkpoint.save(folder, made)
    return held(made)


def load_and_save(folder, target=None):
    made, _optimizers = tables()
    checkpoint.load(folder, made)
    for table in made:
        assert len(owned(table.ids())) == len(table)
    if target is not None:
        checkpoint.save(target, made)
    return held(made)


def refused(folder, rank_with_tables=None):
    """Load a damaged checkpoint; check that nothing changed, and return the error."""
    made, _optimizers = filled(seed=1, count=300)
    before = held(made)
    own = made[:1] if collectives.rank() == rank_with_tables else made
    try:
        checkpoint.load(folder, own)
    except (ValueError, RuntimeError) as error:
        same(held(made), before)
        return f"{type(error).__name__}: {error}"
    return "loaded"


def save_with_full_disk(folder, full_rank):
    """Save where one rank's disk is full; return the error and the files of the folder."""
    made, _optimizers = filled(seed=1, count=300)
    reserve = shard_file.reserve
    if collectives.rank() == full_rank:

        def full(file, size):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        shard_file.reserve = full
    try:
        checkpoint.save(folder, made)
    except (OSError, RuntimeError) as error:
        distributed.barrier()
        return f"{type(error).__name__}: {error}", sorted(os.listdir(folder))
    finally:
        shard_file.reserve = reserve
    return "saved", []


def save_to_own_disks(path, under_trainer):
    """Save where each rank has a folder of its own at "the same" path; return the error, and files.

    Then save to a folder that all share.
    """
    own, rank = path / f"disk of {collectives.rank()}", collectives.rank()
    error = ""
    with as_torchrun() as settings:
        if under_trainer:
            run = trainer(own, CheckpointHook(), **settings)
            run.fit(Model(), train_loader(8))
            save = run.save_checkpoint
        else:
            made, _optimizers = filled(seed=rank, count=300)

            def save(folder):
                checkpoint.save(folder, made)

        try:
            save(own / "a.ckpt")
        except RuntimeError as caught:
            error = str(caught)
        save(path / "shared.ckpt")
    return error, [file.name for file in own.rglob("*") if file.is_file()]


def save_other_tables(folder):
    rank = collectives.rank()
    try:
        checkpoint.save(folder, [HashTable(2, name=f"of {rank}")])
    except ValueError as error:
        return str(error)
    return "saved"


def load_state_dict(file):
    """Load a one-process state_dict, as Lightning does without the hook."""
    made, _optimizers = tables()
    states = torch.load(file, weights_only=True)
    for table in made:
        table.set_extra_state(states[table.name])
    return held(made)


def load_file_where_one_rank_fails(file, failing_rank):
    """Return the error of a load of Lightning's file, the second table of which fails on a rank."""
    made, _optimizers = filled(seed=1, count=3000)
    before = held(made)
    if collectives.rank() == failing_rank:
        made[1].storage.set_slots = lambda *_: (_ for _ in ()).throw(MemoryError("no room"))
    try:
        checkpoint.load(file, made)
    except (MemoryError, RuntimeError) as error:
        assert same(held(made), before)
        return f"{type(error).__name__}: {error}"
    return "loaded"


def load_what_differs(folders, arguments):
    """Return the error of ranks that load other folders, or with other arguments; none changes."""
    made, _optimizers = filled(seed=1, count=300)
    before, rank = held(made), collectives.rank()
    try:
        checkpoint.load(folders[rank], made, **arguments[rank])
    except ValueError as error:
        assert same(held(made), before)
        return str(error)
    return "loaded"


def state_dict_alone():
    return filled(count=30)[0][0].get_extra_state()


def fit(path, ckpt_path=None, max_epochs=1, **kept):
    """Train an epoch under Lightning, saving every second step; return this rank's tables."""
    model = Model()
    keep = ModelCheckpoint(
        path, "{step}", every_n_train_steps=2, monitor="step", mode="max", **kept
    )
    with as_torchrun() as settings:
        settings |= {"enable_checkpointing": True, "max_epochs": max_epochs}
        run = trainer(path, keep, CheckpointHook(), **settings)
        run.fit(model, train_loader(16 // collectives.world_size()), ckpt_path=ckpt_path)
    return held(hash_tables(model)), run.global_step


def save_where_the_main_file_fails(path):
    """Save with no room for Lightning's file, and again; return the error and how long it took."""
    write = TorchCheckpointIO.save_checkpoint

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with as_torchrun() as settings:
        run = trainer(path, CheckpointHook(), **settings)
        run.fit(Model(), train_loader(8))
        run.save_checkpoint(path / "a.ckpt")
        start, error = time.monotonic(), ""
        TorchCheckpointIO.save_checkpoint = full
        try:
            run.save_checkpoint(path / "a.ckpt")
        except (OSError, RuntimeError) as caught:
            error = f"{type(caught).__name__}: {caught}"
        finally:
            TorchCheckpointIO.save_checkpoint = write
        waited = time.monotonic() - start
        run.save_checkpoint(path / "b.ckpt")
    return error, waited


def save_where_a_hook_fails(path, failing_rank, of_module):
    """Save while a hook raises on one rank, and again; return the error and how long it took."""

    def on_save_checkpoint(*args):
        raise KeyError("no state")

    with as_torchrun() as settings:
        model, callback = Model(), Callback()
        run = trainer(path, CheckpointHook(), callback, **settings)
        run.fit(model, train_loader(8))
        run.save_checkpoint(path / "a.ckpt")
        asked = model if of_module else callback
        if collectives.rank() == failing_rank:
            asked.on_save_checkpoint = on_save_checkpoint
        start, error = time.monotonic(), ""
        try:
            run.save_checkpoint(path / "a.ckpt")
        except (KeyError, RuntimeError) as caught:
            error = f"{type(caught).__name__}: {caught}"
        waited = time.monotonic() - start
        vars(asked).pop("on_save_checkpoint", None)
        run.save_checkpoint(path / "b.ckpt")
    return error, waited


def load_where_the_folder_is_missing(path, blind_rank):
    """Load where one rank does not see the shards; return the error and how long it took."""
    find_folder, error = Commit.find_folder, ""
    if collectives.rank() == blind_rank:

        def find_none(commit, file):
            hidden = replace(commit, folder="elsewhere", location="elsewhere")
            return find_folder(hidden, file.with_name("elsewhere.ckpt"))

        Commit.find_folder = find_none
    start = time.monotonic()
    try:
        load_in_trainer(path)
    except (ValueError, RuntimeError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    finally:
        Commit.find_folder = find_folder
    return error, time.monotonic() - start


def load_in_trainer(path, hook=True):
    """Let a Trainer load a checkpoint; return this rank's tables."""
    model = Model(seed=1)
    with as_torchrun() as settings:
        run = trainer(path.parent / "x", *([CheckpointHook()] if hook else []), **settings)
        run.validate(model, loader(8), ckpt_path=path, verbose=False)
    return held(hash_tables(model))


def fit_without_hook(path):
    with as_torchrun() as settings:
        run = trainer(path, **settings)
        run.fit(Model(), train_loader(8))
        run.save_checkpoint(path / "a.ckpt")


def load_from_sources(path):
    """Load a folder and an npz file on top of it; then again where rank 1 fails on the way."""
    made, _optimizers = tables()
    model, said = torch.nn.ModuleList(made), io.StringIO()
    sources = [
        checkpoint.Source(path / "whole"),
        checkpoint.Source(path / "adam.npz", clear=False),
    ]
    with contextlib.redirect_stdout(said):
        checkpoint.load_sources(model, sources)
    ids = made[0].ids()
    found = list(zip(ids.tolist(), made[0].embeddings(ids)[:, 0].tolist(), strict=True))
    assert torch.equal(owned(ids), ids)
    before, error = held(made), ""
    if collectives.rank() == 1:
        made[1].storage.set_slots = lambda *_: (_ for _ in ()).throw(MemoryError("no room"))
    try:
        checkpoint.load_sources(model, sources)
    except (MemoryError, RuntimeError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    return {
        "rows": found,
        "printed": "Loading from 2 sources" in said.getvalue(),
        "unchanged": same(held(made), before),
        "error": error,
    }
