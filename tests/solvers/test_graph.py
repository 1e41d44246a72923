"""Task graphs: reading, writing, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphopt.solvers import Task, TaskGraph, TaskGraphError, Value, check
from tests.solvers import graphs

PLAIN = {
    "nodes": [
        {"id": "a", "duration": 1, "bytes": 10},
        {"id": "b", "duration": 2, "bytes": 20},
        {"id": "c", "duration": 3, "bytes": 30},
    ],
    "edges": [["a", "b"], ["b", "c"], ["a", "c"]],
}


def test_plain_form_without_order() -> None:
    graph = TaskGraph.from_json(PLAIN)
    assert graph.ids == ("a", "b", "c")
    assert [t.inputs for t in graph.tasks] == [(), (0,), (0, 1)]
    assert graph.duration == 6
    assert check(graph, [0, 1, 2]).peak == 60


def test_plain_form_with_order(tmp_path: Path) -> None:
    nodes = [{"id": i, "duration": 1, "bytes": 1} for i in range(3)]
    path = tmp_path / "graph.json"
    path.write_text(json.dumps({"nodes": nodes, "edges": [[2, 0]], "order": [1, 2, 0]}))
    graph = TaskGraph.from_json(path)
    assert graph.ids == (1, 2, 0)
    assert graph.tasks[2].inputs == (1,)


def test_general_form_round_trip() -> None:
    for seed in range(20):
        graph = graphs.tiny(seed)
        again = TaskGraph.from_json(json.loads(json.dumps(graph.to_json())))
        assert again == graph


def test_reordered() -> None:
    tasks = (Task(1, (), (0,)), Task(2, (), (1,)), Task(3, (0, 1), (2,)))
    graph = TaskGraph(
        tasks, (Value(1, 0), Value(2, 1), Value(3, 2, keep=True)), ids=("x", "y", "z")
    )
    other = graph.reordered([1, 0, 2])
    assert other.ids == ("y", "x", "z")
    assert check(other, [0, 1, 2]).peak == check(graph, [0, 1, 2]).peak == 6
    with pytest.raises(TaskGraphError, match="exactly once"):
        graph.reordered([0, 0, 2])
    with pytest.raises(TaskGraphError, match="depends on"):
        graph.reordered([2, 0, 1])


def _plain(**changes: object) -> dict[str, object]:
    return {**json.loads(json.dumps(PLAIN)), **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "not a task graph"),
        (_plain(nodes=[], edges=[]), "no tasks"),
        (_plain(nodes={"a": 1}), "'nodes' must be a list"),
        (_plain(nodes=[{"id": "a", "bytes": 1}]), "edge"),
        (_plain(nodes=[{"id": "a", "bytes": 1}], edges=[]), "'duration' of node 'a'"),
        (_plain(nodes=[{"id": "a", "bytes": -1, "duration": 1}], edges=[]), "between 0"),
        (_plain(nodes=[{"id": "a", "bytes": 1.5, "duration": 1}], edges=[]), "whole number"),
        (_plain(nodes=[{"id": "a", "bytes": True, "duration": 1}], edges=[]), "whole number"),
        (_plain(nodes=[{"id": "a", "bytes": 2**70, "duration": 1}], edges=[]), "between 0"),
        (_plain(nodes=PLAIN["nodes"] * 2), "two nodes"),
        (_plain(edges=[["a", "a"]]), "depends on itself"),
        (_plain(edges=[["a", "q"]]), "does not join"),
        (_plain(edges=[["a"]]), "does not join"),
        (_plain(edges=[["a", "b"], ["b", "a"]]), "cycle: (a -> b -> a|b -> a -> b)"),
        (_plain(order=["a", "b"]), "exactly once"),
        (_plain(order=["c", "b", "a"]), "depends on"),
        ({"tasks": [{"duration": 1, "outputs": [0]}], "values": []}, "not its producer"),
        ({"tasks": [{"duration": 1}], "values": [{"bytes": 1, "producer": 0}]}, "not list it"),
        ({"tasks": [{"duration": 1}], "values": [{"bytes": 1, "producer": 7}]}, "index 7"),
        (_plain(nodes=[{"id": "a", "bytes": 1, "duration": 2**53}], edges=[]), "coarser"),
        (_plain(nodes=[{"id": i, "bytes": 2**61, "duration": 1} for i in "ab"], edges=[]), "bytes"),
        ({"tasks": [{"duration": 1, "inputs": [3]}], "values": []}, "no value"),
        ({"tasks": [{"duration": 1}], "values": [], "after": [[0]]}, "pairs"),
        ({"tasks": [{"duration": 1}], "values": [], "after": [[0, 0]]}, "depends on"),
    ],
)
def test_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(TaskGraphError, match=message):
        TaskGraph.from_json(data)


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000, "\x00\xff"])
def test_corrupt_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "graph.json"
    path.write_text(content)
    with pytest.raises(TaskGraphError):
        TaskGraph.from_json(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TaskGraphError, match="can't read"):
        TaskGraph.from_json(tmp_path / "none.json")


def test_error_is_a_value_error() -> None:
    assert issubclass(TaskGraphError, ValueError)
