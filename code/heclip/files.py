"""Writing files whole or not at all, and the one kind of error that a user can mend."""

import hashlib
import io
import os
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """A fault in what the user gave: names the file, what is wrong with it and the mend. Shown without a traceback."""


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
    """Write an AnnData as h5ad. It is composed in memory first: on a full disk HDF5 itself crashes the process."""
    import anndata
    import h5py

    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        anndata.io.write_elem(file, "/", adata)
    with open(path, "wb") as file:
        file.write(content.getbuffer())


def sha256(path):
    """SHA-256 of a file's bytes, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
