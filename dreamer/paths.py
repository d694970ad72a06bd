"""Users' paths, made absolute and tried before anything slow begins; files written whole or not at all.

Every path from a command line, a YAML file or another program goes through `absolute` on arrival. If the working folder
changes afterwards (in an environment, say), no file of ours moves.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

#: Starts this very program in a process of its own, whatever modules the working folder has.
PROGRAM = (sys.executable, "-P", str(Path(__file__).resolve().with_name("__main__.py")))
#: The environment variable for Python's option -P: import nothing from the working folder.
SAFE_PATH = "PYTHONSAFEPATH"


class PathError(ValueError):
    """A user's path cannot serve its purpose; the message says why, and what to do."""


def absolute(path: str | os.PathLike[str], beside: Path | None = None) -> Path:
    """The path from the root, with `~` expanded. Links and `..` in it stay as they are.

    beside: the folder that a relative path starts from; None: the working folder. PathError if there is no such home or
    working folder, or if no file can have this name.
    """
    text = os.fsdecode(path)
    if not text:
        raise PathError("expected a path, got an empty text")
    if "\0" in text or _undecodable(text):
        raise PathError(f"expected a path in UTF-8 without NUL characters, got {text!r}; name another")
    if text.startswith("~"):
        text = _with_home(text)
    if os.path.isabs(text):
        return Path(text)
    return (working_folder(text) if beside is None else beside) / text


def working_folder(wanted: str = "it") -> Path:
    """The working folder. PathError, naming the relative path that needs it, if it was deleted."""
    try:
        return Path(os.getcwd())
    except OSError as error:
        text = f"expected a working folder for a relative path, but it is gone ({error.strerror}), got {wanted!r}"
        raise PathError(f"{text}; change to another one, or give the path in full") from None


def brief(path: Path) -> str:
    """The path as people write it: relative to the working folder, if it is inside it."""
    try:
        short = str(path.relative_to(os.getcwd()))
    except (OSError, ValueError):  # it is gone, or the path is elsewhere
        return str(path)
    return f"./{short}" if short.startswith(("-", "~")) else short


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Python processes started within import nothing from the working folder: a random.py there, say, would be taken
    for the standard library's."""
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        del os.environ[SAFE_PATH]
        if before is not None:
            os.environ[SAFE_PATH] = before


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, and tries to write there. PathError, in one line, if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _refused(folder, error) from None


def check_folder(folder: Path) -> None:
    """For a folder that is made later: PathError if it could not be, as far as one can tell without making it."""
    try:
        os.lstat(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _refused(folder, error) from None
    above = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
        raise _refused(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def check_file(path: Path) -> None:
    """For a file that is written later: makes its folder and tries its name. PathError if that fails."""
    make_folder(path.parent)
    try:
        os.lstat(_partial(path))  # the longest name it has while being written
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise PathError(f"expected the name of a file to write, got {str(path)!r}: {error}; name another") from None
    if os.path.isdir(path):
        raise PathError(f"expected the name of a file to write, got the folder {str(path)!r}; add a name")


@contextlib.contextmanager
def whole_file(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write to, which replaces `path` at the end of the block; its folder is made.

    Readers see the old contents or all of the new. If the block raises, or on OSError, no trace is left. Without `sync`
    the contents may be lost if the machine stops; so may the name, until `make_durable` of its folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def make_durable(path: Path) -> None:
    """Force the contents of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial(path: Path) -> Path:
    """The name of a file while it is being written: hidden, and used by this process alone."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _undecodable(text: str) -> bool:
    """Whether it holds bytes that are not UTF-8, which neither YAML nor JSON could record."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _with_home(text: str) -> str:
    """`~/x` and `~name/x` with the home folder filled in."""
    user, slash, rest = text.partition("/")
    try:
        if user == "~":
            home = os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
        else:
            home = pwd.getpwnam(user[1:]).pw_dir
    except KeyError:
        what = "your home folder (HOME is not set)" if user == "~" else f"the home folder of a user {user[1:]!r}"
        remedy = f"give the path in full, or ./{text} for a name that begins with ~"
        raise PathError(f"expected {what}, found none, got {text!r}; {remedy}") from None
    return home.rstrip("/") + slash + rest or "/"


def _refused(folder: Path, error: OSError) -> PathError:
    """A folder that cannot be made or written to, and why."""
    text = f"expected a folder that can be written to, got {str(folder)!r}: {_reason(folder, error)}"
    return PathError(f"{text}; name another")


def _reason(folder: Path, error: OSError) -> str:
    for place in (folder, *folder.parents):
        if os.path.islink(place) and not os.path.exists(place):
            return f"{place} is a link to {os.readlink(place)}, which is not there"
        if os.path.exists(place):
            return f"{place} is a file" if not os.path.isdir(place) else error.strerror or str(error)
    return error.strerror or str(error)
