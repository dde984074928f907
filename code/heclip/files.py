"""Files that appear whole or not at all, locks, and the one kind of error that a user can fix."""

import errno
import hashlib
import io
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import filelock

LONGEST = 2000  # characters of an error's text
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
LEFTOVER_DAYS = 7  # after these, a temporary file of another machine counts as abandoned
# Errors of a network file system that does not support locks or fsync. 524 is Linux's internal
# ENOTSUPP, which it should not show but does.
NOT_SUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, 524}


class InputError(Exception):
    """An error in what the user gave.

    The text names the file, says what is wrong with it and how to fix it. It is shown without a
    traceback. It is one line that a terminal can show, even if it quotes a damaged file.
    """

    def __init__(self, text):
        if len(text) > LONGEST:
            half = LONGEST // 2 - 2
            text = f"{text[:half]} … {text[-half:]}"
        super().__init__(UNPRINTABLE.sub("?", text))


# ------------------------------------------------------------------------- whole or not at all


def first_line(error):
    """The first line of an error's text, for use inside another error."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def atomic_path(path):
    """Yield a temporary path next to `path`; make it `path` if the block succeeds, else remove it.

    The block writes a file there, or makes a folder. Its contents are on the disk before it gets
    its name, so that not even a power cut leaves half of it. A file replaces an existing file; a
    folder does not replace one. Parent folders are made. Each call has a temporary path of its own,
    so any number of processes may write the same file. The last to finish wins.

    Raises OSError if the disk is full, InputError if a folder is in the way.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        yield temporary
        flush(temporary)
        rename(temporary, path)
        flush_names(path.parent)
    except BaseException:
        remove(temporary)
        raise


def temporary_path(path):
    """A path next to `path` that no other call gets: `.<name>.<machine>-<process>-<random>.part`.

    It makes only the parent folder. It removes temporary files of the same `path` that killed
    processes left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    own = f"{machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{own}.part")


@cache
def machine():
    """Eight characters that stand for this machine, on which a process number means one process.

    Containers may share a machine's name without seeing each other's processes. The system's number
    for the set of visible processes distinguishes them.
    """
    try:
        visible = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        visible = ""
    return hashlib.sha256(f"{platform.node()} {visible}".encode()).hexdigest()[:8]


def remove_leftovers(path):
    """Remove the temporary files of `path` whose writer no longer runs.

    On this machine the process number shows it. A file of another machine is removed if nothing was
    written to it for LEFTOVER_DAYS.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.([0-9a-f]{{8}})-(\d+)-[0-9a-f]{{8}}\.part")
    for other in path.parent.iterdir():
        if not (found := name.fullmatch(other.name)):
            continue
        with suppress(OSError):  # another process removed it first, or it is another user's
            if found[1] == machine():
                abandoned = not runs(int(found[2]))
            else:
                abandoned = time.time() - other.stat().st_mtime > LEFTOVER_DAYS * 86400
            if abandoned:
                remove(other)


def runs(process):
    """Whether a process of this machine runs. If the system cannot say, the answer is True."""
    if os.name != "posix":  # os.kill would end the process on Windows
        return True
    try:
        os.kill(process, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def remove(path):
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def rename(temporary, path):
    """Give a temporary file or folder its name. Raises InputError if a folder is in the way."""
    try:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise InputError(f"{path} exists. Remove it or choose another name") from None
        raise


def flush(path):
    """Write a file, or a folder with everything in it, from the system's memory to the disk.

    Raises OSError with the path if the disk is full or fails.
    """
    if path.is_dir():
        for inner in path.iterdir():
            flush(inner)
        flush_names(path)
    else:
        sync(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)


def flush_names(folder):
    """Write the list of a folder's files to the disk, if the system can."""
    if os.name == "posix":
        with suppress(PermissionError):  # a folder may be writable, but not readable
            sync(folder, os.O_RDONLY)


def sync(path, flags):
    """Call fsync on a path opened with `flags`. Raises OSError with the path."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            # The error of fsync does not name the file.
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------- one at a time


@contextmanager
def locked(path):
    """Let one process at a time into the block that makes `path`. The others wait and say so.

    Use it if two processes would do the same work, or change the same file in place. A process that
    has waited must look again, because the file may exist by then. Do not nest it for one path.

    The lock is on the file `.<name>.lock` next to `path`. The file may stay. Without a process that
    holds it, it means nothing, even if that process was killed. A file system without locks gets
    `.<name>.soft.lock`, whose existence is the lock. After a crash, the next process on the same
    machine removes it. If it belongs to another machine, remove it by hand.

    Raises OSError if the lock file cannot be made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Everyone may lock the file, which stays empty, because a folder may be shared between users.
    # filelock has a fallback of its own, which before 4.1 admits two processes at once.
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), mode=0o666,
                             fallback_to_soft=False)
    try:
        acquire(lock, path)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        lock = filelock.SoftFileLock(path.with_name(f".{path.name}.soft.lock"))
        acquire(lock, path)
    try:
        yield
    finally:
        lock.release()


def acquire(lock, path):
    """Get a lock. Print a line if another process holds it."""
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"{path}: another process is writing it; waiting (the lock is {lock.lock_file})",
              file=sys.stderr, flush=True)
        lock.acquire(poll_interval=0.2)


# ------------------------------------------------------------------------- contents


def write_h5ad(adata, path):
    """Write an AnnData as h5ad. Raises OSError on a full disk."""
    import anndata
    import h5py

    with FileForHDF5(path, "w+") as file:
        check_room(file, adata.__sizeof__() + array_bytes(adata.uns))
        try:
            with h5py.File(file, "w") as content:
                anndata.io.write_elem(content, "/", adata)
        finally:
            if file.error:
                raise file.error


def check_room(file, size):
    """Raise OSError if the disk has no room for `size` bytes in an empty, open file.

    It is checked first because HDF5 may crash the process if a write fails.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS, Windows
        return
    try:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    os.ftruncate(file.fileno(), 0)


def array_bytes(values):
    """Total bytes of the arrays in a nested dict."""
    if isinstance(values, Mapping):
        return sum(map(array_bytes, values.values()))
    return getattr(values, "nbytes", 0)


class FileForHDF5(io.FileIO):
    """A file whose writes never fail, for a library that crashes the process if a write does.

    See `error` afterwards.
    """

    error = None  # the first; nothing is written after it

    def write(self, block):
        """Write what fits, and return the length of the whole block."""
        rest = memoryview(block)
        try:
            while not self.error and len(rest):
                rest = rest[super().write(rest):]
        except OSError as error:
            self.error = error
        return len(block)

    def truncate(self, size):
        """Set the size of the file, and return it."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size


def sha256(path):
    """SHA-256 of a file's bytes, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
