"""The package list, the symlinks, and what a bare `import graphopt` costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def folders() -> set[str]:
    """Every folder with Python files in it, by the name under which it is imported."""
    found = set()
    for top, prefix in (("graphopt", ""), ("passes", "graphopt."), ("solvers", "graphopt.")):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).parent.parts
            if parts[:2] not in (("graphopt", "passes"), ("graphopt", "solvers")):
                found.add(prefix + ".".join(parts))
    return found


def test_the_package_list_is_the_folders() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(folders())
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("name", ["passes", "solvers"])
def test_the_links_are_relative(name: str) -> None:
    link = ROOT / "graphopt" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert PROJECT["tool"]["setuptools"]["package-dir"][f"graphopt.{name}"] == name


def test_every_package_has_a_docstring() -> None:
    for top in ("graphopt", "passes", "solvers"):
        for path in (ROOT / top).rglob("__init__.py"):
            assert path.read_text(encoding="utf-8").startswith('"""'), path


def test_package_data_exists() -> None:
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: {pattern}"


def test_torch_is_bounded_and_not_needed_to_build() -> None:
    """A newer torch resolves to a CUDA build of gigabytes; in the build it always would."""
    (torch,) = [d for d in PROJECT["project"]["dependencies"] if d.startswith("torch")]
    assert torch == "torch>=2.9,<2.14"
    assert not any("torch" in need for need in PROJECT["build-system"]["requires"])


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def test_the_command_line_starts_without_torch() -> None:
    code = (
        "import sys, graphopt, graphopt.cli, graphopt.cli.app, graphopt.solvers\n"
        "print('torch' in sys.modules)"
    )
    assert run(code).strip() == "False"


def test_public_names_are_there() -> None:
    code = "import graphopt\nprint([n for n in graphopt.__all__ if not hasattr(graphopt, n)])"
    assert run(code).strip() == "[]"


def test_the_versions_agree() -> None:
    import graphopt

    assert graphopt.__version__ == PROJECT["project"]["version"]
