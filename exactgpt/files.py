"""Files that have their final name only when they are complete, and a lock on a folder."""
import contextlib
import errno
import fnmatch
import json
import os
import time
from pathlib import Path

from exactgpt.config import UserError


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file beside `path`; on a clean exit it is on the disk and carries the name `path`.

    Write, fsync, rename, fsync of the folder: after kill -9 or a power cut `path` is the old file or the new
    one, never a part. The temporary name is fixed (PATH.tmp), so that the next try writes over a left-over.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder):
    """Make the names in a folder durable (a rename is a change of the folder, not of the file)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path, value):
    """Write a value as indented JSON, atomically."""
    with atomic_write(path, "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")


def read_json(path, kind=dict):
    """The JSON value in a file, of the type `kind`. Raises UserError that names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} must hold a JSON {kind.__name__}, but holds a {type(value).__name__}")
    return value


def check_new_file(path, name):
    """Raise UserError unless a file can be made at `path`, the flag `name`: nothing is written over."""
    path = Path(path).absolute()
    if path.exists():
        raise UserError(f"{name} {path} exists already, and nothing is written over; choose another")
    here = next(folder for folder in path.parents if folder.exists())
    if not (here.is_dir() and os.access(here, os.W_OK)):
        raise UserError(f"{name} {path}: cannot write in {here}; choose another")


def find_visible(folder, pattern):
    """The paths of files below a folder whose names match a pattern. Hidden folders, such as a dry run's, do not count,
    and what goes away meanwhile is left out."""
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(here, name) for name in fnmatch.filter(names, pattern)]
    return found


class FolderLock:
    """An exclusive lock on FOLDER/.lock, held until the end of the `with` or of the process, however it ends."""

    def __init__(self, folder, wait_s):
        """Wait up to `wait_s` seconds for the lock. Raises UserError when another process keeps it."""
        import fcntl  # Unix only
        path = Path(folder) / ".lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "w")
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{folder} cannot be a folder: {error.filename} is a file") from error
        except OSError as error:
            raise UserError(f"cannot write in {folder}: {error.strerror}") from error
        deadline, waits = time.monotonic() + wait_s, False
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):    # a file system without locks
                    print(f"warning: cannot lock {path} ({error.strerror}); see to it that one run at a time uses "
                          f"{folder}", flush=True)
                    return
                if time.monotonic() > deadline:
                    raise UserError(f"another run is using {folder} (it holds {path}); stop it or use another folder")
                if not waits:
                    print(f"another run is using {folder}; waiting up to {wait_s:g} s for its end", flush=True)
                waits = True
                time.sleep(0.2)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
