"""Rules of structure that no linter knows: imports by string, inheritance, docstrings, mirrors.

CONTRIBUTING names the rules; each list here holds the exceptions, with a reason.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "recis_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# Files that may import a module by its name as a string: such imports escape import-linter.
IMPORTERS_BY_NAME = {
    "ops/backend.py": "loads the kernels of the tensors' device, only when they are needed",
}

# Base classes of ours that have state, or are not abstract.
BASES_WITH_STATE = {
    "Hook": "base class of users' hooks; Lightning needs attributes set in its constructor",
    "RecisCLI": "base class of users' command lines, as LightningCLI is",
}

# Functions that may raise NotImplementedError.
STUBS: dict[str, str] = {}

# Parts that are tested through another file of tests/, in place of one of their own name.
TESTED_BY = {
    "__main__.py": "cli/test_commands.py",
    "cli/command_parser.py": "cli/test_commands.py",
    "callbacks/hook_points.py": "callbacks/test_hook.py",
    "data/filter_syntax.py": "data/test_filter.py",
    "callbacks/windows.py": "callbacks/test_progressive_validation.py",
    "callbacks/window_checkpoint.py": "callbacks/test_progressive_validation.py",
    "callbacks/left_out.py": "checkpoint/test_part_filter.py",
    "callbacks/inspection_hook.py": "callbacks/test_step_inspection.py",
    "callbacks/memory_access.py": "callbacks/test_step_inspection.py",
    "callbacks/module_flops.py": "callbacks/test_step_inspection.py",
    "callbacks/shard_io.py": "callbacks/test_checkpoint.py",
    "callbacks/timeline.py": "callbacks/test_profiler.py",
    "callbacks/trainer_progress.py": "callbacks/test_checkpoint.py",
    "callbacks/training_clock.py": "callbacks/test_logger.py",
    "checkpoint/array_tables.py": "checkpoint/test_array_files.py",
    "checkpoint/commit.py": "checkpoint/test_ranks.py",
    "checkpoint/export.py": "checkpoint/test_checkpoint.py",
    "checkpoint/mapped_file.py": "checkpoint/test_checkpoint.py",
    "checkpoint/owned_rows.py": "checkpoint/test_checkpoint.py",
    "checkpoint/loading_file.py": "callbacks/test_checkpoint.py",
    "checkpoint/progress.py": "checkpoint/test_checkpoint.py",
    "checkpoint/reader.py": "checkpoint/test_checkpoint.py",
    "checkpoint/regular_file.py": "checkpoint/test_shard_check.py",
    "checkpoint/row_merge.py": "checkpoint/test_source_loader.py",
    "checkpoint/saved_tables.py": "checkpoint/test_checkpoint.py",
    "callbacks/level_fetcher.py": "callbacks/test_uneven_batches.py",
    "checkpoint/shard_tables.py": "checkpoint/test_checkpoint.py",
    "checkpoint/source_content.py": "checkpoint/test_source_loader.py",
    "checkpoint/source_plan.py": "checkpoint/test_source_loader.py",
    "checkpoint/state_tables.py": "checkpoint/test_checkpoint.py",
    "checkpoint/tensor_group.py": "checkpoint/test_shard_file.py",
    "data/conversion.py": "data/test_columns.py",
    "distributed/digest.py": "distributed/test_heads.py",
    "lookup/agreement.py": "lookup/test_gradient_exchange.py",
    "lookup/announcing.py": "lookup/test_gradient_exchange.py",
    "lookup/counted_ids.py": "lookup/test_together.py",
    "lookup/gradient_sums.py": "lookup/test_gradient_exchange.py",
    "lookup/lost_rows.py": "lookup/test_gradient_exchange.py",
    "lookup/node_gradients.py": "lookup/test_node_exchange.py",
    "lookup/owned_ids.py": "lookup/test_exchange.py",
    "lookup/pooled_bags.py": "lookup/test_pooled_rows.py",
    "distributed/message_memory.py": "lookup/test_exchange.py",
    "distributed/nodes.py": "lookup/test_node_exchange.py",
    "lookup/table_bits.py": "lookup/test_together.py",
    "data/entries.py": "data/test_transforms.py",
    "data/lanes.py": "data/test_dataset.py",
    "data/new_files.py": "data/test_follow.py",
    "data/rows.py": "data/test_dataset.py",
    "lookup/autograd.py": "test_engine.py",
    "lookup/current_groups.py": "test_engine.py",
    "lookup/evaluation.py": "lookup/test_sharded_lightning.py",
    "lookup/features.py": "test_engine.py",
    "lookup/local.py": "test_engine.py",
    "lookup/named_tables.py": "lookup/test_operator.py",
    "lookup/prepared.py": "lookup/test_lookahead.py",
    "lookup/recording.py": "lookup/test_operator.py",
    "lookup/row_source.py": "test_engine.py",
    "eviction_policy.py": "test_eviction.py",
    "row_ranking.py": "test_eviction.py",
    "lookup/surroundings.py": "test_trainer_bridge.py",
    "lookup/table_call.py": "table/test_hash_table.py",
    "lookup/transfer.py": "ops/gpu/test_on_gpu.py",
    "table/gradient_exchange.py": "lookup/test_gradient_exchange.py",
    "monitoring/checkpoint_history.py": "monitoring/test_report.py",
    "ops/backend.py": "ops/gpu/test_no_host_sync.py",
    "ops/cpu/gradient_sort.py": "ops/test_row_update.py",
    "ops/cpu/hash_insert.py": "ops/test_hash_index.py",
    "ops/cpu/hash_partition.py": "ops/cpu/test_hash_bulk.py",
    "ops/cpu/plan.py": "ops/test_embedding_bag.py",
    "ops/cpu/probe.py": "distributed/test_ownership.py",
    "ops/cpu/row_access.py": "table/test_eviction.py",
    "ops/cpu/row_blocks.py": "ops/test_embedding_bag.py",
    "ops/cpu/update_rules.py": "ops/test_row_update.py",
    "ops/gpu/gradient_sort.py": "ops/test_row_update.py",
    "ops/gpu/piece_sums.py": "ops/test_row_update.py",
    "ops/gpu/update_rules.py": "ops/test_row_update.py",
    "ops/reference/update_rules.py": "ops/test_row_update.py",
    "ops/gpu/layout.py": "ops/gpu/test_compiled_kernels.py",
    "ops/gpu/segments.py": "ops/test_hash_index.py",
    "ops/gpu/prefix_sum.py": "ops/test_row_update.py",
    "ops/gpu/row_access.py": "table/test_eviction.py",
    "ops/layout.py": "ops/test_hash_index.py",
    "ops/reference/index.py": "ops/test_hash_index.py",
    "ops/reference/row_access.py": "table/test_eviction.py",
    "ops/reference/storage.py": "ops/test_embedding_bag.py",
    "ops/row_access.py": "table/test_eviction.py",
    "ops/table_memory.py": "ops/test_hash_index.py",
    "optim/adagrad.py": "optim/test_sparse_optimizer.py",
    "optim/adam.py": "optim/test_sparse_optimizer.py",
    "optim/ftrl.py": "optim/test_update_rules.py",
    "optim/lion.py": "optim/test_update_rules.py",
    "optim/rmsprop.py": "optim/test_update_rules.py",
    "optim/fused_update.py": "optim/test_sparse_optimizer.py",
    "optim/sgd.py": "optim/test_sparse_optimizer.py",
    "optim/table_updater.py": "optim/test_sparse_optimizer.py",
    "serving/binding.py": "lookup/test_operator.py",
    "serving/chain.py": "serving/test_chain_sink.py",
    "serving/chain_link.py": "serving/test_chain_sink.py",
    "serving/checked_json.py": "serving/test_chain_sink.py",
    "serving/compaction.py": "serving/test_chain_sink.py",
    "serving/delta.py": "callbacks/test_delta.py",
    "serving/delta_file.py": "serving/test_chain_sink.py",
    "serving/feature_lookup.py": "serving/test_served_table.py",
    "serving/layered_table.py": "serving/test_follower.py",
    "serving/merging.py": "serving/test_restoring.py",
    "serving/manifest.py": "serving/test_model.py",
    "data/window_batches.py": "data/test_module_windows.py",
    "serving/recording.py": "serving/test_raw_records.py",
    "serving/values.py": "serving/test_model.py",
    "table/admission_counter.py": "test_admission.py",
    "table/copying.py": "table/test_state.py",
    "table/insertion.py": "table/test_hash_table.py",
    "table/row_changes.py": "table/test_change_mark.py",
    "table/pending_gradient.py": "table/test_hash_table_machine.py",
    "table/segment.py": "ops/test_find_and_gather.py",
    "table/versions.py": "table/test_moving.py",
}

# Benchmarks -> the module that each measures.


def name_of(path):
    """Return a file's path below the package, with slashes."""
    return path.relative_to(PACKAGE).as_posix()


def check(found, allowed=()):
    """Fail and name what was found and is not allowed, or is allowed and was not found."""
    more, fewer = sorted(set(found) - set(allowed)), sorted(set(allowed) - set(found))
    assert not more, "not allowed:\n" + "\n".join(more)
    assert not fewer, "listed, but not there any more:\n" + "\n".join(fewer)


def test_modules_are_imported_by_name_in_one_file_only():
    found = {
        name_of(path)
        for path in FILES
        for words in ("import_module(", "__import__(")
        if words in path.read_text(encoding="utf-8")
    }
    check(found, IMPORTERS_BY_NAME)


# Functions of torch that make a tensor on the default device if no device is given.
MAKERS = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace"),
    *("logspace", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor"),
    "zeros",
}


def test_every_new_tensor_names_its_device():
    """Kernels are given addresses: a tensor on another default device would be overwritten."""
    found = {
        f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {f"torch.{name}" for name in MAKERS}
        and "device" not in {keyword.arg for keyword in node.keywords}
    }
    check(found)


def our_bases(tree, node):
    """Return the names of a class's bases that this package defines."""
    ours = {inner.name for inner in ast.walk(tree) if isinstance(inner, ast.ClassDef)}
    for inner in ast.walk(tree):
        if isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith("recis_lightning"):
            ours |= {alias.asname or alias.name for alias in inner.names}
    names = []
    for base in node.bases:
        words = ast.unparse(base).partition("[")[0].split(".")
        if words[0] in ours:
            names.append(words[-1])
    return names


def has_state(node):
    """Return whether a class has a constructor, or assigns to fields.

    A field that an abstract class only annotates is one that its heirs must have.
    """
    for member in node.body:
        is_field = isinstance(member, ast.AnnAssign) and member.value is not None
        if is_field and "ClassVar" not in ast.unparse(member.annotation):
            return True
        if isinstance(member, ast.FunctionDef) and member.name in ("__init__", "__new__"):
            return True
    return any(
        isinstance(inner, ast.Attribute)
        and isinstance(inner.ctx, ast.Store)
        and isinstance(inner.value, ast.Name)
        and inner.value.id == "self"
        for inner in ast.walk(node)
    )


def test_classes_inherit_from_abstract_classes_without_state_only():
    classes = {
        node.name: (tree, node)
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }

    def is_abstract(name):
        tree, node = classes[name]
        words = {word for base in node.bases for word in ast.unparse(base).split(".")}
        return bool(words & {"ABC", "Protocol"}) or any(map(is_abstract, our_bases(tree, node)))

    found = set()
    for name, (tree, node) in classes.items():
        for base in set(our_bases(tree, node)) - set(BASES_WITH_STATE):
            if has_state(classes[base][1]) or not is_abstract(base):
                found.add(f"{name}({base})")
    check(found)


def functions(tree, prefix=""):
    """Yield each function of a module with its qualified name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}{node.name}"
            if not isinstance(node, ast.ClassDef):
                yield name, node
            yield from functions(node, f"{name}.")
        else:
            yield from functions(node, prefix)


def test_only_methods_that_users_implement_raise_not_implemented_error():
    found = {
        f"{name_of(path)}::{name}"
        for path, tree in TREES.items()
        for name, node in functions(tree)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name) and inner.id == "NotImplementedError"
    }
    check(found, STUBS)


@pytest.mark.parametrize("folder", ["recis_lightning", "examples"])
def test_docstrings_begin_with_a_noun_or_a_verb(folder):
    found = set()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = (ast.get_docstring(node) if isinstance(node, kinds) else "") or "-"
            if text.split()[0].strip(".,:;`") in {"What", "Which", "Whose", "How", "See"}:
                found.add(f"{path.relative_to(ROOT)}:{node.body[0].lineno}: {text.splitlines()[0]}")
    check(found)


def possible_tests(path):
    """Return the test files that a file of the package may have.

    The kernels of an op have a test of their backend, or that of the op, which runs over all.
    """
    folder, name = path.relative_to(PACKAGE).parent, f"test_{path.stem}.py"
    found = [ROOT / "tests" / folder / name]
    if folder.parts[:1] == ("ops",):
        found.append(ROOT / "tests" / "ops" / name)
    return found


def test_every_file_has_a_test_file_of_its_name():
    missing = {
        name_of(path)
        for path in FILES
        if path.name != "__init__.py" and not any(test.exists() for test in possible_tests(path))
    }
    check(missing, TESTED_BY)
    assert not [test for test in TESTED_BY.values() if not (ROOT / "tests" / test).exists()]


def test_every_benchmark_names_the_modules_that_it_measures():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    rows = re.findall(r"^\| `(bench_\w+)` \|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    listed = {name: set(re.findall(r"`([\w.]+)`", modules)) for name, modules in rows}
    benchmarks = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    check([path.stem for path in benchmarks], listed)
    for path in benchmarks:
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        measured = docstring.split("Measures:")[1].split("\n\n")[0]
        modules = set(re.findall(r"`recis_lightning\.([\w.]+)`", measured))
        assert modules == listed[path.stem], path.stem
        for module in modules:
            place = PACKAGE / module.replace(".", "/")
            assert place.is_dir() or place.with_suffix(".py").exists(), module
