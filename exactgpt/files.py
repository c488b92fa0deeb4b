"""Read files that are not trusted and write files whole or not at all; lock the folder of a run; know what is ours.

A file gets its final name only when it is complete. A folder that a run uses has a `.lock` with the folder's mark, a
random word by which later starts recognize what earlier ones wrote. Nothing else is deleted, and no link is followed.
"""
import contextlib
import errno
import fnmatch
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
import time
from pathlib import Path

from exactgpt import formats
from exactgpt.config import RunFailed, UserError

MARK = "(old-)?[0-9a-f]{16}"       # of a folder, see FolderLock; "old-": it holds checkpoints without a mark, too


def sync(path):
    """Wait until a file or a folder is on the disk."""
    if os.name == "posix":               # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder):
    """Create a folder, and those above it, if it is not there, and wait until they are on the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


@contextlib.contextmanager
def _whole_or_not_at_all(path, make, remove):
    """Yield what make(temporary path) opens, for the block to fill; then rename it to `path`. Raises UserError."""
    # The order is write, fsync, rename, fsync of the parent: after kill -9 or a power cut `path` is the complete old or
    # the complete new one. make() fails if the temporary name is taken, so nobody else's file is written or removed.
    made = None
    FolderLock.check(path)
    try:
        make_folder(path.parent)
        temporary = path.with_name(f"{path.name}.{FolderLock.mark_of(path.parent) or secrets.token_hex(8)}.tmp")
        made = make(temporary)
        with made as opened:
            yield opened
        for written in (*temporary.rglob("*"), temporary):
            sync(written)
        FolderLock.check(path)           # again, since large files take minutes
        os.replace(temporary, path)      # after the fsync: a power cut must not leave the name on half of the data
        sync(path.parent)                # it holds the name
    except FolderLost:                   # with the temporary file in it
        raise
    except BaseException as error:
        if made is not None:
            with contextlib.suppress(OSError):
                remove(temporary)
        if isinstance(error, OSError):
            FolderLock.check(path)       # it may be the reason
            raise UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
                            ) from error
        raise


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a file that gets its name only when it is complete and flushed to disk. Raises UserError."""
    def make(temporary):
        return open(temporary, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8")
    with _whole_or_not_at_all(Path(path), make, Path.unlink) as f:
        yield f


@contextlib.contextmanager
def new_folder(path, replaces=()):
    """Yield a temporary folder that becomes `path` when it is complete. Raises UserError, also if `path` is in use.

    replaces: names of files; a folder at `path` that contains nothing else is an older version, and is replaced.
    """
    def make(temporary):
        temporary.mkdir()
        return contextlib.nullcontext(temporary)
    FolderLock.check(path)
    path, old = Path(os.path.abspath(path)), []
    if replaces and path.is_dir() and not path.is_symlink():
        old = list(path.iterdir())
        others = sorted({p.name for p in old} - set(replaces))
        if others:
            raise UserError(f"{path} will not be replaced, because it also contains {others[0]}; move that away")
    else:
        check_new(path, folder=True)
    with _whole_or_not_at_all(path, make, shutil.rmtree) as temporary:
        yield temporary
        for file in old:
            file.unlink()


def write_json(path, value):
    """Write a value as indented JSON, atomically; see as_json."""
    with atomic_write(path, "w") as f:
        json.dump(as_json(value), f, indent=1)
        f.write("\n")


def as_json(value):
    """Return a value as JSON can hold it: null for NaN and infinity, Python's numbers and lists for NumPy's."""
    if isinstance(value, dict):
        return {key: as_json(v) for key, v in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def reading(path):
    """Turn the errors of reading and decoding a file into UserErrors that name it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(formats.advise_not_utf8(error.object[error.start], path)) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def open_file(path):
    """Open a file for reading bytes. Raises OSError, and UserError for pipes and devices, which may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"cannot read {path}: it is a folder, a pipe or a device; name a file")
    return open(path, "rb")


def read_text(path):
    """Return the text of a UTF-8 file (None: standard input), without a byte-order mark. Raises UserError."""
    with (reading(path or formats.STDIN),
          open_file(path) if path else contextlib.nullcontext(sys.stdin.buffer) as f):
        data = f.read()
        mismatch = formats.find_mismatch(data[:formats.HEAD], path or formats.STDIN)
        if mismatch:
            raise UserError(mismatch)
        return data.decode("utf-8-sig").replace("\r\n", "\n")


def read_json(path, kind=dict):
    """Return the JSON value of type `kind` in a file. Raises UserError naming the file."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} must hold a JSON {kind.__name__}, but holds a {type(value).__name__}")
    return value


def check_new(path, folder=False):
    """Raise UserError if `path` exists already, or cannot be created. folder: it may be an empty folder."""
    path = Path(path).absolute()
    if os.path.lexists(path) and not (folder and path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        raise UserError(f"{path} already exists and will not be overwritten; choose another name or move it away")
    here = next(parent for parent in path.parents if parent.exists())
    if not (here.is_dir() and os.access(here, os.W_OK)):
        raise UserError(f"cannot write {path}: {here} is not a folder that you may write in; choose another path")


def find_visible(folder, pattern):
    """Return the paths below a folder whose names match a pattern, but not in hidden folders, such as a dry run's."""
    return [Path(here, name) for here, _, names in os.walk(Path(folder)) for name in fnmatch.filter(names, pattern)
            if "/." not in here.removeprefix(str(Path(folder)))]      # os.walk follows no links


class FolderLost(RunFailed):
    """The folder that this process has locked was deleted, moved or recreated."""


class FolderLock:
    """An exclusive lock on FOLDER/.lock, until its `with` block or the process ends, even by kill -9.

    The file contains the folder's mark, a random word by which later starts recognize what earlier ones wrote: it is in
    the temporary names of files and in checkpoints.
    """

    held = []      # all of this process

    def __init__(self, folder, wait_s):
        """Create the folder if needed, and wait for its lock. Raises UserError after wait_s seconds."""
        self._folder, self._path = Path(folder).absolute(), Path(folder).absolute() / ".lock"
        self._open()
        begin, waits = time.monotonic(), False
        while not self._try_to_lock():
            if time.monotonic() > begin + wait_s:
                self._close()
                raise UserError(f"another run is using {folder} (it holds {self._path}); stop it or use another folder")
            if not waits:
                print(f"another run is using {folder}; waiting up to {wait_s:g} s for it to finish", flush=True)
            waits = True
            time.sleep(0.2)
        words = self._file.read(100).decode(errors="replace").split()
        self._is_new = len(words) != 2 or words[0] != "exactgpt" or not re.fullmatch(MARK, words[1])
        self.mark = secrets.token_hex(8) if self._is_new else words[1]
        for leftover in self._folder.glob(f"*.{self.mark}.tmp"):      # of a process of ours that was killed
            with contextlib.suppress(OSError):
                leftover.unlink() if leftover.is_symlink() or not leftover.is_dir() else shutil.rmtree(leftover)
        self.held.append(self)

    def claim(self, names=(), mark=None):
        """Write the mark into .lock, if no run of ours has been here. Raises UserError if a file of these names is.

        names: what runs write. mark: the one to take over from a checkpoint.
        """
        if not self._is_new:
            return
        taken = [name for name in names if os.path.lexists(self._folder / name)]
        if taken:
            raise UserError(f"{self._folder} contains {taken[0]}, which no run of exactgpt has written there, or one "
                            "whose .lock was deleted; move it away or use another folder")
        self.mark, self._is_new = mark if re.fullmatch(MARK, str(mark)) else self.mark, False
        if not os.fstat(self._file.fileno()).st_size:      # else it is somebody else's file, which stays as it is
            self._file.write(b"exactgpt %s\n" % self.mark.encode())
            sync(self._path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.held.remove(self)
        self._close()

    def _open(self):
        try:
            with contextlib.suppress(FileExistsError):      # it may be a file: the next line says so
                make_folder(self._folder)
            if os.path.lexists(self._path) and (self._path.is_symlink() or not self._path.is_file()):
                raise UserError(f"{self._path} is a link or no file at all; delete it or use another folder")
            # Not truncated: it may be the file of another program.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = open(os.open(self._path, flags, 0o666), "r+b", buffering=0)
            self._directory = os.open(self._folder, os.O_RDONLY)      # kept open, so that its inode is not used again
        except OSError as error:
            raise UserError(f"cannot write in {self._folder}: {error.strerror}") from error

    def _close(self):
        self._file.close()
        os.close(self._directory)

    def _try_to_lock(self):
        import fcntl  # Unix only
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):      # the latter on some network file systems
            return False
        except OSError as error:       # the file system has no locks
            print(f"warning: cannot lock {self._path} ({error.strerror}); make sure only one run uses {self._folder}",
                  flush=True)
        if self._is_ours():
            return True
        self._close()      # its holder was waited for, and the folder deleted meanwhile
        self._open()
        return False

    def _is_ours(self):
        def is_at(path, descriptor, if_missing):
            try:
                return os.path.samestat(os.stat(path), os.fstat(descriptor))
            except (FileNotFoundError, NotADirectoryError):
                return if_missing
            except OSError as error:      # a network file system may not answer at the moment
                return error.errno != errno.ESTALE      # NFS: deleted on another machine
        # Somebody may have deleted .lock alone, as "stale". Whoever locks the folder then makes a new one.
        return is_at(self._folder, self._directory, False) and is_at(self._path, self._file.fileno(), True)

    @classmethod
    def of(cls, folder):
        """Return the lock that this process holds on a folder, or None."""
        return next((lock for lock in cls.held if os.path.realpath(lock._folder) == os.path.realpath(folder)), None)

    @classmethod
    def mark_of(cls, folder):
        """Return the mark of a folder that this process has locked, else None."""
        lock = cls.of(folder)
        return lock and lock.mark

    @classmethod
    def check(cls, path):
        """Raise FolderLost if `path` is in a folder that this process has locked, but that is not the same any more."""
        try:
            path = Path(path).absolute()
        except FileNotFoundError:      # the working directory itself was deleted
            path = None
        for lock in cls.held:
            if path is None or (lock._folder in (path, *path.parents) and not lock._is_ours()):
                raise FolderLost(f"the folder {lock._folder} was deleted, moved, or taken over by another run, so this "
                                 "run ends; nothing was written there")
