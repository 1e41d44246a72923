"""Writing files so that nothing half-written is ever left behind."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from graphopt.errors import OutputError


def ensure_writable_folder(folder: str | os.PathLike[str]) -> Path:
    """Make a folder if needed and check that files can be written to it.

    Raises:
        OutputError: It can't be made or written to.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(
            f"can't write to folder {path}: {error.strerror or error}",
            hint="choose another folder or change its permissions",
        ) from None
    return path


def ensure_writable(file: str | os.PathLike[str]) -> Path:
    """Check, before long work, that a file can be written; the file itself is not touched.

    Raises:
        OutputError: Its folder doesn't exist or can't be written to, or it is a folder.
    """
    path = Path(file)
    if path.is_dir():
        raise OutputError(f"{path} is a folder, not a file")
    if not path.parent.is_dir():
        raise OutputError(f"folder {path.parent} doesn't exist", hint="create it first")
    if not path.exists() or path.is_file():
        ensure_writable_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise OutputError(f"can't write to {path}: permission denied")
    return path


@contextlib.contextmanager
def replacing(file: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a temporary neighbour that replaces ``file`` on success.

    On any exception, Ctrl-C included, the neighbour is removed and ``file`` stays as it was.

    Raises:
        OutputError: The file can't be written.
    """
    path = ensure_writable(Path(file).resolve())
    special = path.exists() and not path.is_file()  # a pipe or a device is written to, not replaced
    folder = None if special else path.parent
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if special:
            path.write_bytes(temporary.read_bytes())
        else:
            os.chmod(temporary, _mode(path))
            os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_text(file: str | os.PathLike[str], text: str) -> None:
    """Write text to a file, whole or not at all.

    Raises:
        OutputError: The file can't be written.
    """
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_with(file: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary path that then replaces ``file``.

    Raises:
        OutputError: The file can't be written.
    """
    with replacing(file) as temporary:
        write(temporary)


def _mode(path: Path) -> int:
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
