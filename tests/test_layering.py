"""Who imports whom, read from the source: nobody imports from a floor above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

GROUND, IR, COST, RUNTIME, CORE, PLANNING, PASSES, DOORS = range(8)
FLOORS = {
    "charts": CORE,
    "derived": GROUND,
    "errors": GROUND,
    "files": GROUND,
    "plain": GROUND,
    "solvers": GROUND,
    "ir": IR,
    "cost": COST,
    "runtime": RUNTIME,
    "arguments": CORE,
    "batches": CORE,
    "training": CORE,
    "budget": CORE,
    "comparison": CORE,
    "graphcheck": CORE,
    "instruments": CORE,
    "measure": CORE,
    "overlays": CORE,
    "persist": CORE,
    "pipeline": CORE,
    "private": CORE,
    "registry": CORE,
    "report": CORE,
    "requests": CORE,
    "planning": PLANNING,
    "passes": PASSES,
    "api": DOORS,
    "inspect": DOORS,
    "cli": DOORS,
    "__init__": DOORS,
    "__main__": DOORS,
}


def sources() -> Iterator[tuple[str, Path]]:
    """Module name -> file, the symlinked folders under the names by which they are imported."""
    for folder, prefix in (("graphopt", ""), ("passes", "passes."), ("solvers", "solvers.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "graphopt" and parts[0] in ("passes", "solvers"):
                continue
            yield prefix + ".".join(parts), path


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module or name, dotted, with its line; `TYPE_CHECKING` blocks left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


EDGES = [
    (module, name.split(".")[1:], f"{path.relative_to(ROOT)}:{line}")
    for module, path in sources()
    for name, line in imports(path)
    if name.split(".")[0] == "graphopt"
]


def floor(module: str) -> int:
    """Where a module stands: by its own name, else by its folder's."""
    return FLOORS.get(module, FLOORS[module.split(".")[0]])


def floor_of(target: list[str]) -> int:
    """Where an imported module stands; a bare name of the package (``optimize``) is a door."""
    return FLOORS.get(target[0] if target else "__init__", FLOORS["__init__"])


def test_every_module_has_a_floor() -> None:
    unknown = {module.split(".")[0] for module, _ in sources()} - set(FLOORS)
    assert not unknown, f"say in FLOORS where these stand: {unknown}"


def test_nobody_imports_from_a_floor_above() -> None:
    wrong = [
        f"{where}: {module} imports graphopt.{'.'.join(target)}"
        for module, target, where in EDGES
        if floor(module) < floor_of(target)
    ]
    assert not wrong, "\n".join(wrong)


def test_a_pass_never_imports_another_pass() -> None:
    wrong = [
        f"{where}: {module} imports graphopt.{'.'.join(target)}"
        for module, target, where in EDGES
        if module.startswith("passes.")
        and target[:1] == ["passes"]
        and target[1:2] != module.split(".")[1:2]
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_registry_reaches_passes_and_never_by_name() -> None:
    """The doors know no pass by name: no import, and no mention in the code of `api`."""
    wrong = [
        f"{where}: {module} imports graphopt.{'.'.join(target)}"
        for module, target, where in EDGES
        if not module.startswith("passes.") and target[:1] == ["passes"]
    ]
    assert not wrong, "\n".join(wrong)
    strings = {
        node.value
        for node in ast.walk(ast.parse((ROOT / "graphopt/api.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    names = {path.stem for path in (ROOT / "passes").iterdir() if path.stem != "__init__"}
    assert not strings & names


def test_solvers_import_neither_torch_nor_anything_of_ours() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for module, path in sources()
        if module.startswith("solvers.")
        for name, line in imports(path)
        if name.split(".")[0] == "torch"
        or (name.split(".")[0] == "graphopt" and name.split(".")[1] != "solvers")
    ]
    assert not wrong, "\n".join(wrong)


def test_one_file_alone_touches_the_private_joint_api() -> None:
    users = {
        str(path.relative_to(ROOT))
        for _, path in sources()
        for name, _ in imports(path)
        if name.startswith("torch._functorch")
    }
    assert users <= {"graphopt/ir/joint.py"}


@pytest.mark.parametrize("folder", ["graphopt", "passes", "solvers", "tests", "examples"])
def test_nobody_imports_the_bare_folders(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name, line in imports(path)
        if name.split(".")[0] in ("passes", "solvers")
    ]
    assert not wrong, "\n".join(wrong)
