"""Writing files whole or not at all, and the one kind of error that a user can mend."""

import hashlib
import io
import os
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """A fault in what the user gave: names the file, what is wrong with it and the mend. Shown without a traceback."""


def first_line(error):
    """The first line of an error's text, for use inside another error."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, remove it if not.

    A run that is killed outright may leave the temporary file `.<name>.part`: no stage reads it, and the
    next write of the same file replaces it. Parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_h5ad(adata, path):
    """Write an AnnData as h5ad. Raises OSError on a full disk."""
    import anndata
    import h5py

    with FileForHDF5(path, "w+") as file:
        try:
            with h5py.File(file, "w") as content:
                anndata.io.write_elem(content, "/", adata)
        finally:
            if file.error:
                raise file.error


class FileForHDF5(io.FileIO):
    """A file whose writes never fail, for a library that crashes the process when one does; see `error` afterwards."""

    error = None  # the first; nothing is written after it

    def write(self, block):
        rest = memoryview(block)
        try:
            while not self.error and len(rest):
                rest = rest[super().write(rest):]
        except OSError as error:
            self.error = error
        return len(block)

    def truncate(self, size):
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size


def sha256(path):
    """SHA-256 of a file's bytes, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
