"""Saved files: round trips, and files that are corrupt or hostile."""

from __future__ import annotations

import json
import math
import operator
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphopt.errors import FileFormatError, GraphoptError, OutputError, UnsafeFileError
from graphopt.ir.capture import capture
from graphopt.ir.codec import Decoder, decode_graph, encode_graph, encode_value, register_function
from graphopt.ir.graphs import copy_graph
from graphopt.persist import load


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.fc.weight
        self.drop = nn.Dropout(0.5)
        self.register_buffer("hidden", torch.ones(4), persistent=False)
        self.width = 4

    def forward(self, x: Tensor, flag: bool = False) -> dict[str, Any]:
        y = self.drop(self.bn(self.conv(x))).mean((2, 3))
        with torch.no_grad():
            z = self.drop(y)
        y = self.tied(self.fc(y)) * self.hidden + z + torch.tensor([1.0, 2.0, 3.0, 4.0])
        return {"y": y.masked_fill(y > 10, -math.inf), "flag": flag, "rest": (None, [y.sum()])}


@pytest.fixture(scope="module")
def emitted() -> Any:
    torch.manual_seed(0)
    model = Net().to(memory_format=torch.channels_last)
    return capture(model, torch.randn(2, 3, 8, 8)).emit()


@pytest.fixture
def file(emitted: Any, tmp_path: Path) -> Path:
    path = tmp_path / "net.graphopt"
    emitted.save(path)
    return path


def test_round_trip(emitted: Any, file: Path) -> None:
    loaded: Any = load(file)
    assert loaded.code == emitted.code
    assert str(loaded) == str(emitted)
    assert list(loaded.state_dict()) == list(emitted.state_dict())
    assert loaded.fc.weight is loaded.tied.weight
    assert loaded.conv.weight.stride() == emitted.conv.weight.stride()
    assert loaded.width == 4
    x = torch.randn(3, 3, 8, 8)
    for training in (True, False):
        results = []
        for module in (emitted, loaded):
            module.train(training)
            module.zero_grad()
            torch.manual_seed(5)
            out = module(x)
            out["rest"][1][0].backward()
            results.append((out["y"], out["rest"], module.conv.weight.grad, module.bn.running_mean))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert out["flag"] is False


def test_metadata_is_derived_anew(emitted: Any, file: Path) -> None:
    def shapes(module: Any) -> list[Any]:
        values = [n.meta.get("val") for n in module.program.module.graph.nodes]
        tensors = [v for v in values if isinstance(v, Tensor)]
        return [([str(s).isdigit() for s in v.shape], v.dtype, len(v.shape)) for v in tensors]

    loaded = load(file)
    assert shapes(loaded) == shapes(emitted)
    assert isinstance(loaded.program.fake_inputs()[0].shape[0], torch.SymInt)


def test_the_archive_holds_no_pickle_and_tied_weights_once(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        assert sorted(archive.namelist()) == ["graphopt.json", "weights.safetensors"]
        header = archive.read("weights.safetensors")
    assert header.count(b'"fc.weight"') == 1
    assert b"tied.weight" not in header


def test_an_unwritable_place_leaves_nothing(emitted: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        emitted.save(tmp_path / "absent" / "x.graphopt")
    with pytest.raises(OutputError):
        emitted.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def opaque(x: Tensor) -> Tensor:
    return x


def test_what_cannot_be_saved_is_named_and_no_file_is_left(emitted: Any, tmp_path: Path) -> None:
    module = copy_graph(emitted.program.module)
    last = module.graph.output_node().args[0][0]
    with module.graph.inserting_after(last):
        new = module.graph.call_function(opaque, (last,))
    last.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    changed = emitted.program.replace(module=module).emit()
    changed(torch.randn(2, 3, 8, 8))
    with pytest.raises(GraphoptError, match="opaque"):
        changed.save(tmp_path / "x.graphopt")
    assert list(tmp_path.iterdir()) == []
    register_function("tests.opaque", opaque)
    changed.save(tmp_path / "x.graphopt")
    assert load(tmp_path / "x.graphopt").code == changed.code


def rewritten(file: Path, change: Any) -> Path:
    """The file with its JSON document changed."""
    with zipfile.ZipFile(file) as archive:
        document = json.loads(archive.read("graphopt.json"))
        weights = archive.read("weights.safetensors")
    change(document)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("graphopt.json", json.dumps(document), zipfile.ZIP_DEFLATED)
        archive.writestr("weights.safetensors", weights)
    return file


def nodes(document: Any) -> list[Any]:
    return document["program"]["module"]["graph"]["nodes"]


def first_call(document: Any) -> Any:
    return next(n for n in nodes(document) if n["op"] == "call_function")


HOSTILE = {
    "an op that reads files": lambda d: first_call(d).update(target="op:aten::from_file.default"),
    "a builtin": lambda d: first_call(d).update(target="py:builtins.eval"),
    "a function of os": lambda d: first_call(d).update(target="py:os.system"),
    "another library": lambda d: first_call(d).update(target="op:c10d::broadcast_.default"),
    "no bounds checks": lambda d: first_call(d).update(target="op:aten::_unsafe_index.Tensor"),
    "a higher-order op": lambda d: first_call(d).update(
        target="hop:triton_kernel_wrapper_mutation"
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_graphs_are_refused(file: Path, name: str) -> None:
    with pytest.raises(UnsafeFileError, match="not known to be harmless"):
        load(rewritten(file, HOSTILE[name]))


WRITES = "\nopen('owned', 'w').close()\ndef after():\n    "
INJECTIONS = {
    "keyword": lambda d: first_call(d).update(kwargs={"dict": [["a=0)" + WRITES + "dict(b", 1]]}),
    "input": lambda d: next(n for n in nodes(d) if n["op"] == "placeholder").update(
        target="x): pass" + WRITES + "(x"
    ),
    "attribute": lambda d: next(n for n in nodes(d) if n["op"] == "get_attr").update(
        target='a")' + WRITES + '("b'
    ),
    "backslash": lambda d: next(n for n in nodes(d) if n["op"] == "get_attr").update(
        target="a\\.);open('owned', 'w')#"
    ),
}


@pytest.mark.parametrize("where", INJECTIONS)
def test_names_that_are_code_are_refused(
    file: Path, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileFormatError, match="no name in Python"):
        load(rewritten(file, INJECTIONS[where]))
    assert not (tmp_path / "owned").exists()


def tree(document: Any, **changes: Any) -> None:
    document["program"]["signature"]["out_spec"].update(changes)


BROKEN = {
    "an unknown op": lambda d: first_call(d).update(target="op:aten::no_such_op.default"),
    "an unknown library": lambda d: first_call(d).update(target="op:nobody::op.default"),
    "a bad name": lambda d: first_call(d).update(name="x; import os"),
    "a node of another kind": lambda d: first_call(d).update(op="call_module"),
    "a use before": lambda d: first_call(d).update(args={"tuple": [{"node": "later"}]}),
    "a missing tensor": lambda d: next(n for n in nodes(d) if n["op"] == "get_attr").update(
        target="conv.absent"
    ),
    "a method for a tensor": lambda d: next(n for n in nodes(d) if n["op"] == "get_attr").update(
        target="conv.forward"
    ),
    "a class that isn't imported": lambda d: tree(d, kind="node", type="evil.module:Thing"),
    "any object": lambda d: tree(d, kind="object", type="tempfile:_TemporaryFileCloser"),
    "a dataclass that is none": lambda d: tree(d, kind="dataclass", type="subprocess:Popen"),
    "a guard that is code": lambda d: d["program"]["signature"].update(
        guards=[["x", "__import__('os').system('true')"]]
    ),
    "another version": lambda d: d.update(version=99),
    "another format": lambda d: d.update(format="zip"),
    "a missing part": lambda d: d.pop("program"),
    "no modules": lambda d: d["program"]["skeleton"].update(containers=[]),
    "a wrong type": lambda d: d["program"].update(module=[1, 2]),
    "a path that is code": lambda d: first_call(d).update(
        meta={"mode": {"mode": ["a'); import os #", {"dict": [["args.0", {"tuple": [1, 2]}]]}]}}
    ),
}


def test_names_in_files_do_not_become_code(file: Path, tmp_path: Path) -> None:
    """Module paths show up as comments of the generated code, ties as expressions."""
    bad = tmp_path / "bad"
    code = f"open({str(bad)!r}, 'w')"

    def stack(document: Any) -> None:
        for node in nodes(document):
            node["meta"]["nn_module_stack"] = [[f"x\n    {code}", f"y\r    {code}"]]

    rewritten(file, stack)
    load(file)(torch.randn(2, 3, 8, 8))

    def tie(document: Any) -> None:
        tied = {"dict": [["args.0", {"tie": [code, "dtype", True]}]]}
        first_call(document)["meta"]["ties"] = tied

    with pytest.raises(FileFormatError):
        load(rewritten(file, tie))
    assert not bad.exists()


@pytest.mark.parametrize("name", BROKEN)
def test_broken_documents_are_refused(file: Path, name: str) -> None:
    with pytest.raises(FileFormatError):
        load(rewritten(file, BROKEN[name]))


def test_damaged_files_are_refused(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 30):
        file.write_bytes(content[:size])
        with pytest.raises(FileFormatError):
            load(file)
    file.write_bytes(content.replace(b"fc.weight", b"fc.wright"))
    with pytest.raises(FileFormatError):
        load(file)
    with pytest.raises(FileFormatError):
        load(tmp_path / "absent.graphopt")
    with pytest.raises(FileFormatError):
        load(tmp_path)


def test_unknown_members_and_bombs_are_refused(file: Path) -> None:
    content = file.read_bytes()
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("data.pkl", b"cos\nsystem\n")
    with pytest.raises(UnsafeFileError, match=r"data\.pkl"):
        load(file)
    file.write_bytes(content)
    with zipfile.ZipFile(file) as archive:
        weights = archive.read("weights.safetensors")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("graphopt.json", b" " * (1 << 24), zipfile.ZIP_DEFLATED)
        archive.writestr("weights.safetensors", weights)
    with pytest.raises(UnsafeFileError, match="unpacks"):
        load(file)


def test_third_party_ops_work_where_they_are_registered(tmp_path: Path) -> None:
    @torch.library.custom_op("graphopt_tests::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    twice.register_fake(lambda x: torch.empty_like(x))
    twice.register_autograd(lambda ctx, g: g * 2, setup_context=lambda ctx, inputs, output: None)

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return twice(self.fc(x))

    model = Uses()
    emitted = capture(model, torch.randn(2, 3)).emit()
    emitted.save(tmp_path / "x")
    loaded = load(tmp_path / "x")
    x = torch.randn(4, 3)
    torch.testing.assert_close(loaded(x), model(x))


VALUES = [
    None, True, 3, -2.5, math.inf, -math.inf, 1 + 2j, "text", torch.float16, torch.strided,
    torch.channels_last, torch.device("cuda", 1), slice(1, None, 2), [1, [2, (3,)]], (1,),
    {"a": (1, 2)}, torch.Size([2, 3]), range(3), Ellipsis, {1: [None]}, frozenset({1}),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_values_come_back(value: Any) -> None:
    data = json.loads(json.dumps(encode_value(value), allow_nan=False))
    back = Decoder().value(data)
    assert back == value
    assert type(back) is type(value)


def test_graphs_come_back() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
    double = graph.call_function(operator.mul, (size, 2))
    zeros = graph.call_function(
        torch.ops.aten.zeros.default,
        ([double, 3],),
        {"dtype": torch.float64, "device": torch.device("cpu")},
    )
    least = graph.call_function(torch.sym_max, (size, 1))
    part = graph.call_function(torch.ops.aten.slice.Tensor, (zeros, 0, 0, least))
    graph.output((part, [zeros, None], {"n": size}))
    data = json.loads(json.dumps(encode_graph(graph)))
    back = decode_graph(data)
    assert str(back) == str(graph)
    module = fx.GraphModule(nn.Module(), back)
    out = module(torch.ones(4, 2))
    assert (out[0].shape, out[1][0].shape, out[2]["n"]) == ((4, 3), (8, 3), 4)
    assert json.loads(json.dumps(encode_graph(back))) == data


@pytest.mark.parametrize("training", [True, False])
def test_a_loaded_module_is_in_the_mode_it_was_saved_in(tmp_path: Path, training: bool) -> None:
    class Dropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.dropout(x, 0.5, self.training)

    module = capture(Dropping(), (torch.ones(4, 3),)).emit().train(training)
    module.save(tmp_path / "module.gopt")
    loaded = load(tmp_path / "module.gopt")
    assert loaded.training is training
    assert bool((loaded(torch.ones(50, 3)) == 1).all()) is not training
