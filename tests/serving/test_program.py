"""Programs of served models: what they may call, and how they run."""

import json
import math

import pytest
import torch
from torch import nn

from recis_lightning import DynamicEmbedding, serving
from recis_lightning.serving.manifest import Manifest
from recis_lightning.serving.program import Program, encode, without_dead_calls


def recorded(module, *arguments):
    """Return a module's program, and its weights by name."""
    module.eval()
    exported = torch.export.export(module, arguments, strict=False)
    signature = exported.graph_signature
    given = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    given |= {name: number for number, name in enumerate(signature.user_inputs)}
    given |= signature.inputs_to_lifted_tensor_constants
    graph = without_dead_calls(exported.graph)
    names = [
        [node.name for node in one.nodes if node.op == "placeholder"]
        for one in (exported.graph, graph)
    ]  # a copy may have others
    given = {new: given[old] for old, new in zip(*names, strict=True) if old in given}
    state = encode(graph, given)
    return json.loads(json.dumps(state)), {**exported.state_dict, **exported.constants}


class Everything(nn.Module):
    """Layers that models have, constants, and several outputs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5)
        )
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("shift", torch.arange(8.0))

    def forward(self, x):
        x = self.norm(self.layers(x) + self.shift)
        attended, _ = self.attention(x[None], x[None], x[None])
        mask = torch.full((x.shape[0],), -math.inf).masked_fill(x[:, 0] > 0, 0.5)
        scaled = attended[0].softmax(1) * torch.tensor([2.0]) + torch.ones_like(x)
        return scaled, mask, x.bfloat16().to(torch.float32)


def test_a_program_computes_what_its_module_does():
    torch.manual_seed(0)
    module, x = Everything(), torch.randn(5, 6)
    state, constants = recorded(module, x)
    outputs = Program(state, 1, constants, {}).run([x])
    assert len(outputs) == 3
    for one, other in zip(outputs, module(x), strict=True):
        assert one.equal(other)


def test_values_are_freed_after_their_last_use():
    module = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    state, constants = recorded(module, torch.ones(2, 3))
    program = Program(state, 1, constants, {})
    assert sum(map(len, program._frees)) == len(state["inputs"]) + len(state["calls"]) - 1


@pytest.mark.parametrize(
    "shape", [[-1], [-1, 2], [2, -1], [-1, 3], [-1, 1, 3], [-1, 0], [6], [], [2, 3]]
)
@pytest.mark.parametrize("size", [(6,), (2, 3), (0, 3), (2, 0), (0,), ()])
def test_what_is_done_without_torch_is_what_torch_does(shape, size):
    call = ["aten::reshape.default", [{"value": 0}, shape], {}]
    state = {"inputs": [0], "calls": [call], "outputs": [{"value": 1}]}
    program, tensor = Program(state, 1, {}, {}), torch.rand(size)
    try:
        expected = tensor.reshape(shape)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            program.run([tensor])
    else:
        (found,) = program.run([tensor])
        assert found.shape == expected.shape
        assert found.equal(expected)


@pytest.mark.parametrize(
    "call",
    [
        ["aten::from_file.default", ["/etc/passwd", False, 10], {}],
        ["aten::set_.source_Tensor", [{"value": 0}, {"value": 0}], {}],
        ["aten::as_strided.default", [{"value": 0}, [9], [1]], {}],
        ["aten::empty.memory_format", [[9]], {}],
        ["aten::resize_.default", [{"value": 0}, [10**6]], {}],
        ["aten::_reinterpret_tensor.default", [{"value": 0}], {}],
        ["aten::unsafe_chunk.default", [{"value": 0}, 2], {}],
        ["aten::__class__.mro", [], {}],
        ["aten::add.__init__", [], {}],
        ["aten::nothing.default", [], {}],
        ["python::eval", ["1"], {}],
        ["builtins::exec", ["1"], {}],
        ["os::system.default", ["true"], {}],
        ["recis_lightning::look_up", [], {}],
        ["aten::relu.default", [{"value": 1}], {}],
        ["aten::relu.default", [{"value": -1}], {}],
        ["aten::relu.default", [{"code": "x"}], {}],
        [["aten::relu.default"], [{"value": 0}], {}],
        ["aten::relu.default", [{"value": 0}]],
        None,
    ],
)
def test_a_hostile_program_is_refused_before_it_runs(call):
    state = {"inputs": [0], "calls": [call], "outputs": [{"value": 0}]}
    with pytest.raises(ValueError, match="program"):
        Program(state, 1, {}, {})


@pytest.mark.parametrize(
    "changed",
    [{"inputs": [1]}, {"inputs": ["weight"]}, {"outputs": [{"value": 5}]}, {"calls": 3}, {"x": 1}],
)
def test_a_damaged_program_is_refused(changed):
    state = {"inputs": [0], "calls": [], "outputs": [{"value": 0}]}
    Program(state, 1, {}, {})
    with pytest.raises(ValueError, match="program"):
        Program({**state, **changed}, 1, {}, {})


class Table:
    embedding_dim, dtype = 4, torch.float32


@pytest.mark.parametrize(
    "changed",
    [
        {3: ["other"]},
        {3: [{"value": 0}]},
        {4: [8]},
        {5: ["bfloat16"]},
        {6: ["max"]},
        {7: [-1]},
        {7: [1 << 40]},
        {8: ["zero"]},
        {9: [1]},
        {10: []},
        {0: []},
        {0: [3]},
        {9: [True]},
    ],
)
def test_a_lookup_of_other_rows_than_its_tables_is_refused(changed):
    arguments = [[{"value": 0}], [], [], ["t"], [4], ["float32"], ["none"], [0], [""]]
    arguments += [[False], [False]]
    state = {"inputs": [0], "outputs": []}
    Program({**state, "calls": [["recis_lightning::look_up", arguments, {}]]}, 1, {}, {"t": Table})
    for place, value in changed.items():
        arguments[place] = value
    with pytest.raises(ValueError, match="program"):
        Program(
            {**state, "calls": [["recis_lightning::look_up", arguments, {}]]}, 1, {}, {"t": Table}
        )


def test_a_module_that_changes_its_buffers_is_not_recorded():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count.add_(1)
            return x + self.count

    with pytest.raises(ValueError, match="changes count in evaluation"):
        recorded(Counter(), torch.ones(2))


def test_a_module_that_branches_on_values_is_not_recorded():
    class Branch(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    with pytest.raises(ValueError, match="program"):
        recorded(Branch(), torch.ones(2))


def test_a_program_looks_up_on_the_cpu_and_computes_on_its_device(tmp_path):
    """``meta`` stands for a GPU: it computes shapes."""
    model = nn.Sequential(DynamicEmbedding(3, name="user"), Scaled(), nn.Linear(3, 2))
    model(torch.arange(5))
    serving.export(model, tmp_path, example=torch.arange(4))
    manifest, tables = Manifest.read(tmp_path), serving.load(tmp_path).tables
    device, cpu = torch.device("meta"), torch.device("cpu")
    sizes = {name: place.shape for name, place in manifest.dense.arrays.items()}
    constants = {name: torch.empty(size, device=device) for name, size in sizes.items()}
    program = Program(manifest.program, 1, constants, tables, device)
    (found,) = program.run([torch.arange(7, device=cpu)])
    assert (found.device, found.shape) == (device, (7, 2))
    with pytest.raises(RuntimeError):  # tables answer on the CPU, weights are not there
        Program(manifest.program, 1, constants, tables).run([torch.arange(7, device=cpu)])


class Scaled(nn.Module):
    """Multiplies by a tensor that forward makes."""

    def forward(self, rows):
        return rows * torch.ones(3, device=rows.device)
