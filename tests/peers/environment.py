"""The environment of other tools for relevance propagation: `python -m tests.peers.environment`.

LXT needs transformers 4 where graphopt's tests use 5, and both LXT and zennit import torchvision,
whose wheel does not fit a CPU build of torch.  So they get an environment of their own: theirs is
whatever is installed there, torch is a link to the one that runs this file (the same build: times
and bytes can be compared), and torchvision is a stub with the three names that are imported.

The folder is the first argument, else `GRAPHOPT_PEERS`, else one under the user's cache folder.  A
complete environment of the same versions is left as it is.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

# tokenizers, huggingface_hub and the like follow from transformers
RESOLVED = ("transformers==4.52.4", "click>=8", "matplotlib>=3.8", "pillow>=10", "tabulate")
# these ask for torch, torchvision, bitsandbytes, open_clip: what they use of it is there
ALONE = ("zennit==0.5.1", "lxt==2.1", "captum==0.9.0")
STUB = {
    "__init__.py": "",
    "models/__init__.py": "",
    "models/resnet.py": "class BasicBlock:\n    pass\n\n\nclass Bottleneck:\n    pass\n",
    "models/vision_transformer.py": "from torch import nn\n",
}


def folder() -> Path:
    """Where the environment is or will be."""
    given = os.environ.get("GRAPHOPT_PEERS")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "graphopt" / "peers"


def python(where: Path) -> Path:
    """The interpreter of the environment, whether it is there or not."""
    return where / "bin" / "python"


def is_complete(where: Path) -> bool:
    """Whether the environment is there, with the versions asked for and torch still in place."""
    stamp = where / "complete"
    return python(where).is_file() and stamp.is_file() and stamp.read_text() == _stamp()


def build(where: Path) -> None:
    """Make the environment, unless it is complete.

    Raises:
        subprocess.CalledProcessError: pip fails; it has said why.
    """
    if is_complete(where):
        return
    shutil.rmtree(where, ignore_errors=True)
    try:
        venv.create(where, with_pip=True, symlinks=True)
        for options in (RESOLVED, ("--no-deps", *ALONE)):
            _pip(where, *options)
        # After pip: it must never meet the links, or it could replace what they point to.
        packages = _packages(where)
        there = {_key(d.name) for d in importlib.metadata.distributions(path=[str(packages)])}
        for name in _closure("torch", there):
            _link(name, packages)
        for name, text in STUB.items():
            path = packages / "torchvision" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        subprocess.run([python(where), "-I", "-c", "import zennit, lxt.efficient"], check=True)
        (where / "complete").write_text(_stamp(), encoding="utf-8")
    except BaseException:
        shutil.rmtree(where, ignore_errors=True)
        raise


def _stamp() -> str:
    torch = importlib.metadata.distribution("torch")
    lines = [*RESOLVED, *ALONE, f"torch {torch.version} {torch.locate_file('torch')}"]
    return "\n".join([*lines, sys.version, ""])


def _pip(where: Path, *options: str) -> None:
    command = [python(where), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*command, *options], check=True)


def _packages(where: Path) -> Path:
    (found,) = (where / "lib").glob("python3*/site-packages")
    return found


def _key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _closure(name: str, seen: set[str]) -> Iterator[str]:
    """A distribution and all that it requires and that is installed here, but for those seen."""
    if _key(name) in seen:
        return
    seen.add(_key(name))
    try:
        requires = importlib.metadata.distribution(name).requires or []
    except importlib.metadata.PackageNotFoundError:
        return  # of another platform
    yield name
    for line in requires:
        needed = re.match(r"[\w.-]+", line)
        if needed and "extra ==" not in line:
            yield from _closure(needed.group(), seen)


def _link(name: str, packages: Path) -> None:
    """Link what a distribution has installed, but for scripts and what is there already."""
    distribution = importlib.metadata.distribution(name)
    tops = {file.parts[0] for file in distribution.files or ()}
    for top in tops - {"..", "__pycache__", "distutils-precedence.pth"}:
        source = Path(str(distribution.locate_file(top))).resolve()
        if source.exists() and not (packages / top).exists():
            (packages / top).symlink_to(source)


def main() -> None:
    """Build the environment that the first argument names, or the default one."""
    where = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else folder()
    build(where)
    print(where)


if __name__ == "__main__":
    main()
