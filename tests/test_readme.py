"""The README's commands are the ones that `.ci/run` runs, and what it names exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.cli.app import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def command(name: str) -> str:
    """The command as `.ci/run` extracts it."""
    script = [sys.executable, str(ROOT / ".ci" / "readme.py"), name]
    return subprocess.run(script, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("name", ["main", "tests"])
def test_ci_runs_the_command_of_the_readme(name: str) -> None:
    text = command(name)
    assert text
    assert text in README
    assert "\n" not in text, "one command"
    assert f'bash -euo pipefail -c "$(readme {name})"' in CI


def test_the_main_command_installs_runs_and_dumps() -> None:
    text = command("main")
    assert 'pip install ".[demo]"' in text
    assert "--budget memory=50%" in text
    assert "--dump-dir" in text
    (script,) = re.findall(r"(\S+\.py):build", text)
    assert (ROOT / script).is_file()


def test_the_test_command_installs_what_the_tests_need() -> None:
    text = command("tests")
    assert ".[test]" in text
    assert re.search(r"python -m pytest( -n \d+)?$", text), (
        "the whole default run, nothing deselected"
    )


def test_ci_is_executable_and_valid() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    for check in ("ruff check", "pyright", "examples/*.py", "-m venv"):
        assert check in CI


def test_every_command_in_the_readme_exists() -> None:
    named = re.findall(r"^    graphopt ([\w-]+)", README, flags=re.MULTILINE)
    assert named
    assert set(named) <= set(COMMANDS)


def test_every_link_in_the_readme_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_extras_in_the_readme_exist() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in ("main", "tests"):
        for word in shlex.split(command(name)):
            for extra in re.findall(r"^\.\[(.+)\]$", word):
                assert extra in project["optional-dependencies"]
