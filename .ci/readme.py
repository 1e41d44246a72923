"""Print a command of the README: the code block after the comment ``<!-- command: NAME -->``."""

import re
import sys
from pathlib import Path


def command(name: str, text: str) -> str:
    """The shell command that the README marks with ``name``."""
    pattern = rf"<!-- command: {re.escape(name)} -->\s*```(?:sh|bash)\n(.*?)```"
    found = re.findall(pattern, text, flags=re.DOTALL)
    if len(found) != 1:
        raise SystemExit(f"README.md marks {len(found)} commands as {name!r}, not one")
    return found[0].strip()


if __name__ == "__main__":
    readme = Path(__file__).parents[1] / "README.md"
    print(command(sys.argv[1], readme.read_text(encoding="utf-8")))
