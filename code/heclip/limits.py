"""What a file may declare: its claims are compared with its size before memory is taken for them.

A damaged or hostile file may promise a billion entries in a kilobyte, or unpack to gigabytes. Every
reader opens files through this module. All errors here are ValueErrors, which the readers turn into
an InputError that names the file.
"""

import io
import os
import pickletools
import sys
import tokenize
import zipfile
from contextlib import contextmanager

import h5py
import numpy as np
from isal import igzip  # gzip, at two to three times its speed

LEAST = 64 << 20  # bytes that a file of any size may unpack to
RATIO = 1100  # the most that deflate packs into one byte is 1032
TEXT_LEAST, TEXT_RATIO = 32 << 20, 50  # the same for tables; count matrices reach 10
LINE = 1 << 16  # characters of a table's first line
DEEP = 30  # groups in groups of an HDF5 file
WORD = 4096  # characters of a text in a torch file
TEXT = 8 << 20  # characters of a text that is read whole


def check_declared(what, size, stored):
    """Raise ValueError if something of `size` bytes cannot come from `stored` bytes of a file."""
    if size > LEAST + RATIO * stored:
        raise ValueError(f"{what} would take {size / 1e9:,.1f} GB, which {stored:,} bytes cannot "
                         "hold")


class WholeFile(io.FileIO):
    """A file that takes no memory for more bytes than it has, whatever number is asked for.

    Decoders ask for as many as a damaged header says, and Python takes memory for them first.
    """

    def read(self, size=-1):
        """The next bytes, at most `size` of them."""
        rest = max(os.fstat(self.fileno()).st_size - self.tell(), 0)
        return super().read(rest if size is None or size < 0 else min(size, rest))


# -------------------------------------------------------------------------------------------- text


class Unpacked(io.RawIOBase):
    """The content of a gzip file, up to a length that no honest table of its size has."""

    def __init__(self, path):
        self.file = igzip.open(path)
        self.limit = text_room(path)

    def readinto(self, block):
        """Read the next bytes. Raises ValueError beyond the limit."""
        n_read = self.file.readinto(block)
        if self.file.tell() > self.limit:
            raise ValueError(f"it unpacks to over {self.limit / 1e6:.0f} MB")
        return n_read

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=0):
        return self.file.seek(offset, whence)

    def close(self):
        self.file.close()
        super().close()


def is_zipped(path):
    """Whether a file's content is gzip."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def text_room(path):
    """The most bytes that a text file may hold, unpacked if it is gzip."""
    size = os.path.getsize(path)
    return TEXT_LEAST + TEXT_RATIO * size if is_zipped(path) else size


def open_bytes(path):
    """Open a file for reading. It is unzipped if its content is gzip, whatever its name is."""
    return io.BufferedReader(Unpacked(path), 1 << 20) if is_zipped(path) else open(path, "rb")


def open_text(path, line=LINE):
    """Open a text file, zipped or not. Raises ValueError if its first line is longer than `line`.

    Parsers keep a line in memory, and a column for each of its cells.
    """
    file = open_bytes(path)
    try:
        if len(file.readline(line + 1)) > line:
            raise ValueError(f"its first line is longer than {line:,} characters")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return io.TextIOWrapper(file, encoding="utf-8-sig")


def read_text(path):
    """The whole of a small text file, zipped or not. Raises ValueError if it is not small."""
    with open_text(path) as file:
        text = file.read(TEXT + 1)
    if len(text) > TEXT:
        raise ValueError(f"it is longer than {TEXT:,} characters")
    return text


# -------------------------------------------------------------------------------------------- HDF5


@contextmanager
def open_hdf5(path):
    """Open an HDF5 file in which no array is larger than the file can hold."""
    with h5py.File(path) as file:
        size = os.path.getsize(path)

        def check(name, about):
            if name.count(b"/") > DEEP:
                raise ValueError(f"its groups are nested over {DEEP} deep")
            if about.type == h5py.h5o.TYPE_DATASET:
                check_array(name.decode(errors="replace"), file[name], size)

        h5py.h5o.visit(file.id, check, info=True)
        yield file


def check_array(name, array, size):
    """Raise ValueError unless an HDF5 array can be stored in its file, of `size` bytes."""
    if array.external or array.is_virtual:
        raise ValueError(f"the values of {name} are in another file")
    stored = array.id.get_storage_size()
    if stored > size:
        raise ValueError(f"{name} takes {stored:,} bytes of a file of {size:,}")
    check_declared(name, array.nbytes, stored)


def check_indices(matrix):
    """Raise ValueError unless the indices of a CSR or CSC matrix lie inside it.

    With others, scipy reads and writes other memory.
    """
    matrix.check_format()
    if (np.diff(matrix.indptr) < 0).any():  # which scipy does not check if the last one is 0
        raise ValueError("its index pointers do not increase")


# --------------------------------------------------------------------------------------------- zip


def check_zip(path):
    """Raise ValueError unless a zip file is whole, and stores its members uncompressed.

    torch and numpy write such files, and torch does not check the checksums.
    """
    with zipfile.ZipFile(path) as file:
        if any(member.compress_type != zipfile.ZIP_STORED for member in file.infolist()):
            raise ValueError("its members are compressed")
        if wrong := file.testzip():
            raise ValueError(f"the checksum of {wrong} is wrong")


def check_words(path):
    """Raise ValueError if a text in a torch file is longer than any that the file should hold.

    torch searches its own message about a damaged file in a time that grows with the square of the
    longest word.
    """
    with zipfile.ZipFile(path) as file:
        pickled, = (name for name in file.namelist() if name.endswith("/data.pkl"))
        for _, value, _ in pickletools.genops(file.read(pickled)):
            if isinstance(value, str) and len(value) > WORD:
                raise ValueError(f"it holds a text of {len(value):,} characters")


def read_arrays(path):
    """The arrays in a .npz that numpy.savez wrote: name -> array."""
    check_zip(path)
    arrays = {}
    with zipfile.ZipFile(path) as file:
        for member in file.infolist():
            with file.open(member) as content:
                check_npy(content, member.file_size)
            with file.open(member) as content:
                array = np.lib.format.read_array(content)
            check_letters(array)
            arrays[member.filename.removesuffix(".npy")] = array
    return arrays


def check_letters(array):
    """Raise ValueError if an array of text holds what is no letter, of which numpy makes a str."""
    if array.dtype.kind == "U":
        letters = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
        if letters.size and letters.max() > sys.maxunicode:
            raise ValueError("its text is damaged")


def check_npy(file, size):
    """Raise ValueError unless an open .npy of `size` bytes holds the array that it declares."""
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0,
                   (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read_header is None:
        raise ValueError(f"version {version} of .npy")
    try:
        shape, _, kind = read_header(file)
    except tokenize.TokenError as error:  # numpy lets it through
        raise ValueError(f"its header is damaged ({error.args[0]})") from None
    n_values = 1
    for side in shape:  # numpy's product would overflow
        n_values *= side
    if min(shape, default=1) < 0 or n_values * kind.itemsize > size:
        raise ValueError(f"it declares an array of shape {shape}, which {size:,} bytes cannot hold")
