"""The document behind the inspector: what it says of programs, passes and memory."""

from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt import inspect, registry
from graphopt.errors import FileFormatError, GraphoptError
from graphopt.inspect import schema
from graphopt.inspect.page import MODULES
from graphopt.ir.capture import capture
from graphopt.overlays import Overlay
from graphopt.pipeline import Pass, PassResult
from tests.inspect.browser import Net, document, node, planned_net
from tests.zoo import ZOO

DEFINED = re.compile(r"^(?:export )?(?:async )?(?:function|class|const|let) (\w+)", re.M)
IMPORTED = re.compile(r"^import \{([^}]*)\} from \"\./(\w+)\.js\";", re.M)
ASSETS = Path(inspect.__file__).with_name("assets")


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 16)
        self.third = nn.Linear(16, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def nodes_of(data, snapshot=-1):
    """Name -> node as it is in a snapshot, put together as the page does."""
    present, changes = set(), {}
    stop = len(data["snapshots"]) + snapshot + 1 if snapshot < 0 else snapshot + 1
    for state in data["snapshots"][:stop]:
        present |= set(state["added"])
        present -= set(state["removed"])
        for index, fields in state["changed"].items():
            changes.setdefault(int(index), {}).update(fields)
    return {data["nodes"][i]["name"]: data["nodes"][i] | changes.get(i, {}) for i in present}


def live(line):
    """Bytes at each step of a timeline, summed naively."""
    steps = range(len(line["steps"]))
    at = [sum(s[3] for s in line["spans"] if s[1] <= i <= s[2]) for i in steps]
    return [size + extra for size, extra in zip(at, line["workspace"], strict=True)]


@pytest.fixture(scope="module")
def planned():
    return planned_net()


def test_the_timelines_are_what_the_allocator_measured(planned):
    module, data = planned
    memory = module.report["memory"]
    before, after = (data["timelines"][data["snapshots"][i]["timeline"]] for i in (0, -1))
    assert max(live(after)) == after["peak"]
    assert live(after)[after["peak_step"]] == after["peak"]
    assert after["peak"] == pytest.approx(memory["measured_peak"], rel=0.02)
    assert before["peak"] == pytest.approx(memory["eager_peak"], rel=0.1)
    assert after["budget"] == memory["budget"] >= memory["measured_peak"]
    for line in (before, after):
        phases = [data["nodes"][i]["phase"] for i in line["steps"]]
        assert "backward" not in phases[: line["boundary"]]
        assert phases[line["boundary"]] == "backward" or line is after


def test_what_is_saved_is_what_crosses_into_backward(planned):
    _, data = planned
    (saved,) = (o for o in data["overlays"] if o["name"] == "saved")
    line = data["timelines"][data["snapshots"][0]["timeline"]]
    edge = line["boundary"]
    crossing = sum(s[3] for s in line["spans"] if s[1] < edge <= s[2] and s[4] == 0)
    assert sum(saved["before"].values()) == crossing > sum(saved["values"].values())


def test_what_runs_again_is_what_the_plan_recomputes(planned):
    module, data = planned
    again = {data["nodes"][int(i)]["name"] for i in data["snapshots"][-1]["again"]}
    sites = module.report["share"]["sites"]
    assert {s["node"] for s in sites if s["rule"] == "recompute"} == again != set()
    (decision,) = (o for o in data["overlays"] if o["name"] == "decision")
    assert {n for n, rule in decision["values"].items() if rule == "recompute"} == again


def test_every_pass_has_a_snapshot(planned):
    module, data = planned
    labels = [state["label"] for state in data["snapshots"]]
    assert labels == ["capture", *module.report.pipeline.split(",")]
    assert all(state["recorded"] for state in data["snapshots"])
    assert [p["pass"] for p in data["summary"]["passes"]] == labels[1:]
    (bound,) = data["summary"]["bounds"]
    assert bound["value"] == module.report["plan"]["overhead"]
    assert bound["bound"] == module.report["plan"]["lower_bound"]


def test_without_a_recorder_passes_in_between_are_not_shown_as_if_they_were(planned):
    module, _ = planned
    before = capture(Net(), (torch.rand(64, 16),))
    data = inspect.inspection(before, module, seconds=False)
    assert [s["recorded"] for s in data["snapshots"]] == [True, False, False, True]


def test_json_reads_back(planned, tmp_path):
    _, data = planned
    file = tmp_path / "x.json"
    file.write_text(json.dumps(data))
    assert inspect.read_inspection(file) == json.loads(json.dumps(data))


@pytest.mark.parametrize("name", ["cond", "no_grad_region", "tied_weights", "odd_names"])
@pytest.mark.parametrize("view", ["program", "joint"])
def test_dumps_of_all_sorts_fit_the_schema(name, view):
    model, args, kwargs = ZOO[name]()
    program = capture(model, args, kwargs)
    data = json.loads(inspect.dump(program, "json", view=view))
    schema.check(data)
    assert data["view"] == view
    forward = [n for n in data["nodes"] if n["op"] == "call" and n["phase"] == "forward"]
    assert forward
    assert "<!doctype html>" in inspect.dump(program, "html", view=view)


class Rename(Pass):
    """Puts an op more in front, so that tracing counts otherwise."""

    name = "more"

    def run(self, program, context):
        module = graphopt.api.copied(program.module)
        first = next(n for n in module.graph.nodes if n.target is torch.ops.aten.tanh.default)
        with module.graph.inserting_before(first):
            extra = module.graph.call_function(torch.ops.aten.tanh.default, first.args)
            extra.meta = dict(first.meta)
        first.args = (extra,)
        module.recompile()
        overlays = [
            {"name": "relevance", "title": "relevance", "kind": "diverging",
             "values": {"tanh": -1.5, "tanh_1": 0.5, "gone": 1.0}},
            {"name": "share", "title": "of weights", "kind": "sequential", "unit": "fraction",
             "of": "state", "values": {"second.weight": 0.25}},
        ]  # fmt: skip
        report = {"more": {"overlays": overlays}}
        return PassResult(program.replace(module=module), True, report)


def test_nodes_keep_their_names_where_tracing_renumbers_them():
    recorder, x = inspect.Recorder(), torch.rand(4, 16)
    module = graphopt.optimize(
        Layers(), None, (x,), passes=[Rename()], instruments=[recorder], verify=False
    )
    data = inspect.inspection(recorder.programs[0], module, recorded=recorder, seconds=False)
    before, after = nodes_of(data, 0), nodes_of(data)
    new = set(after) - set(before)
    assert not set(before) - set(after)
    targets = sorted(after[name]["target"] for name in new)
    assert targets == ["aten.detach", "aten.detach", "aten.tanh", "aten.tanh_backward"]
    changed = {data["nodes"][int(i)]["name"] for i in data["snapshots"][-1]["changed"]}
    assert "tanh" in changed  # it reads the new node
    assert "addmm_2" not in changed


def test_any_pass_contributes_overlays():
    x = torch.rand(4, 16)
    module = graphopt.optimize(Layers(), None, (x,), passes=[Rename()], verify=False)
    data = inspect.inspection(capture(Layers(), (x,)), module, seconds=False)
    found = {o["name"]: o for o in data["overlays"]}
    assert found["relevance"]["kind"] == "diverging"
    assert found["relevance"]["values"] == {"tanh": -1.5, "tanh_1": 0.5}
    assert found["relevance"]["pass"] == "more"
    assert "relevance: 1 of 3 not in the graph" in data["summary"]["warnings"]
    readers = {n["name"] for n in data["nodes"] if "second.weight" in n["state"]}
    assert set(found["share"]["values"]) == readers
    assert set(found["share"]["values"].values()) == {0.25}


def test_pruned_channels_are_counted():
    x = torch.rand(8, 16)
    module = graphopt.optimize(Layers().eval(), "flops=50%", (x,), verify=False)
    before = capture(Layers().eval(), (x,))
    data = inspect.inspection(before, module, training=False, seconds=False)
    (channels,) = (o for o in data["overlays"] if o["name"] == "channels")
    width = module.first.weight.shape[0]
    assert channels["values"]["linear"] == width / 64
    assert f"first.weight: {width} of 64 × 16 of 16" in channels["notes"]["linear"]
    assert data["snapshots"][-1]["state"]["first.weight"] == [width, 16]
    assert nodes_of(data)["linear"]["shapes"] == [[8, width]]
    assert nodes_of(data, 0)["linear"]["shapes"] == [[8, 64]]


def test_overlays_refuse_what_they_cannot_draw():
    for fields in (
        {"kind": "rainbow", "values": {}},
        {"kind": "sequential", "values": {"a": "much"}},
        {"kind": "categorical", "values": {"a": 1.0}},
        {"kind": "diverging", "values": {"a": float("nan")}},
        {"kind": "diverging", "values": {}, "colour": "red"},
        {"kind": "diverging", "values": {}, "of": "everything"},
        {"kind": "diverging"},
    ):
        with pytest.raises(GraphoptError):
            Overlay.from_dict({"name": "x", "title": "x", **fields})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 1}, "schema version 1; 2 is read here"),
        ({"schema_version": True}, "schema version True"),
        ({"format": "netron"}, "no inspection"),
        ({"nodes": [node("a"), node("a")]}, "the same name"),
        ({"nodes": [node("a", "b")]}, "reads 'b', which isn't there"),
        ({"nodes": [node("a", source=0)]}, "source line"),
        ({"nodes": [node("a", op="magic")]}, r"nodes\[0\].op is 'magic'"),
        ({"nodes": [{"name": "a"}]}, r"nodes\[0\] lacks 'op'"),
        ({"nodes": [node("a", flops="1")]}, "flops is of type str, not integer"),
        ({"snapshots": []}, "no snapshot"),
        ({"timelines": []}, "timeline that isn't there"),
        ({"summary": None}, "summary is of type NoneType"),
    ],
)
def test_foreign_documents_are_refused(change, words):
    schema.check(document([node("a")]))
    with pytest.raises(FileFormatError, match=words):
        schema.check({**document([node("a")]), **change})
    with pytest.raises(FileFormatError, match=words):
        inspect.inspection_html({**document([node("a")]), **change})


def test_files_that_are_no_json_are_refused(tmp_path):
    file = tmp_path / "x.json"
    for content in (b"{", b"\xff\xfe", b"[1]", b'{"format": "graphopt.inspection"}'):
        file.write_bytes(content)
        with pytest.raises(FileFormatError):
            inspect.read_inspection(file)
    with pytest.raises(FileFormatError, match="can't be read"):
        inspect.read_inspection(tmp_path / "missing.json")


class Parts(HTMLParser):
    """Collects tags, and the content of the page's policy."""

    def __init__(self):
        super().__init__()
        self.tags, self.policy = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        named = dict(attrs)
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"]


def test_the_page_is_one_file_with_a_strict_policy():
    hostile = "</script><img src=http://x onerror=1><!--"
    text = inspect.inspection_html(document([node(hostile)], title=hostile))
    parts = Parts()
    parts.feed(text)
    assert parts.tags.count("script") == 3
    assert "img" not in parts.tags
    assert "link" not in parts.tags
    assert parts.policy.startswith("default-src 'none'")
    assert "unsafe" not in parts.policy
    assert "connect-src" not in parts.policy
    assert "sourceMappingURL" not in text


def test_vendored_libraries_are_what_was_published():
    """dagre 3.1.3 from npm, MIT; the file as published."""
    known = {"dagre.min.js": "54a503e346f93ca0bb10abe7999587e037262935687aca45eb4e4b0f64bbb578"}
    folder = ASSETS / "vendor"
    listed = re.findall(r"^(\w{64})  (\S+)$", (folder / "SHA256SUMS").read_text(), re.M)
    assert {name: digest for digest, name in listed} == known
    for name, digest in known.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        assert "Permission is hereby granted" in (folder / "dagre.LICENSE").read_text()


def test_the_modules_of_the_page_share_one_scope_without_clashes():
    names: list[str] = []
    for module in MODULES:
        text = (ASSETS / f"{module}.js").read_text(encoding="utf-8")
        names += re.findall(
            r"^(?:export )?(?:async )?(?:function|class|const|let) (\w+)", text, re.M
        )
        for imported, source in re.findall(
            r"^import \{([^}]*)\} from \"\./(\w+)\.js\";", text, re.M
        ):
            exported = (ASSETS / f"{source}.js").read_text(encoding="utf-8")
            for name in filter(None, map(str.strip, imported.split(","))):
                assert re.search(rf"^export (?:\w+ )+{name}\b", exported, re.M), (module, name)
            assert source in MODULES
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)
    assert {path.stem for path in ASSETS.glob("*.js")} == {*MODULES, "layout"}


def test_passes_say_which_sites_they_kept():
    sites = [
        {"node": "relu", "kept": 8, "total": 8, "choice": "keep", "reason": "it is last"},
        {"node": "relu_1", "kept": 2, "total": 8, "choice": "poly2", "reason": None},
        {"node": "relu_2", "kept": 0, "total": 8, "choice": "identity", "reason": None},
    ]
    decisions, shares = registry.get("linearize").facts({"linearize": {"sites": sites}})
    assert decisions.values == {"relu": "kept", "relu_1": "in part", "relu_2": "replaced"}
    assert shares.values == {"relu": 1.0, "relu_1": 0.25, "relu_2": 0.0}
    assert decisions.notes["relu_1"] == "2 of 8 elements kept, the others by poly2"
    assert decisions.notes["relu"].endswith("it is last")
    matrices = [["fc.weight", 100, 40]]
    (kept,) = registry.get("rematerialize").facts({"sparsify": {"matrices": matrices}})
    assert (kept.of, kept.values) == ("state", {"fc.weight": 0.4})
