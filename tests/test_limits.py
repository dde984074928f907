"""limits.py: a file that declares more than it can hold is refused before memory is taken."""

import gzip
import io
import zipfile

import h5py
import numpy as np
import pytest

from heclip import limits

ZEROS = gzip.compress(bytes(1 << 20), mtime=0)


def npy(shape, kind="<f4"):
    """The header of a .npy without values."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_a_file_gives_no_more_than_it_has_whatever_is_asked_for(tmp_path):
    (tmp_path / "a.png").write_bytes(b"0123456789")
    with limits.WholeFile(tmp_path / "a.png") as file:
        assert [file.read(n) for n in (4, 2**60, 1)] == [b"0123", b"456789", b""]
        file.seek(8)
        assert [file.read(), file.read(-1)] == [b"89", b""]
        file.seek(2**40)
        assert file.read(1) == b""


@pytest.mark.parametrize("zipped", [False, True])
def test_a_text_is_read_from_any_place_zipped_or_not(tmp_path, zipped):
    text = "first é\n" + "x" * 100 + "\nlast\n"
    path = tmp_path / "any.name"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    assert limits.read_text(path) == text
    with limits.open_text(path) as file:
        assert file.readline() == "first é\n"
        file.seek(0)
        assert file.read() == text


@pytest.mark.parametrize(("content", "says"), [
    (ZEROS * 40, "first line is longer than 65,536"),
    (b"1" * 70_000 + b"\n", "first line is longer than 65,536"),
    (b"a\n" + b"1" * (limits.TEXT + 1), "longer than 8,388,608 characters"),
    (gzip.compress(b"\n" * (1 << 20)) * 40, "longer than 8,388,608 characters")])
def test_a_text_that_is_longer_than_any_honest_one_is_refused(tmp_path, content, says):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        limits.read_text(tmp_path / "a.csv")


def test_a_gzip_bomb_is_stopped_at_what_a_table_may_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "TEXT_LEAST", 1 << 20)
    (tmp_path / "a.mtx").write_bytes(ZEROS * 8)
    with (limits.open_bytes(tmp_path / "a.mtx") as file,
          pytest.raises(ValueError, match="unpacks to over 1 MB")):
        file.read()


def a_billion(file):
    file.create_dataset("a/b", (10**9,), "i4", chunks=(1 << 16,))


def outside(file):
    file.create_dataset("a", (4,), "i4", external=[("other", 0, h5py.h5f.UNLIMITED)])


def virtual(file):
    layout = h5py.VirtualLayout((4,), "i4")
    layout[:] = h5py.VirtualSource("other.h5", "a", (4,))
    file.create_virtual_dataset("a", layout)


def deep(file):
    file.create_group("/".join("a" * 40))


@pytest.mark.parametrize(("fill", "says"), [
    (a_billion, "a/b would take 4.0 GB, which 0 bytes cannot hold"),
    (outside, "the values of a are in another file"),
    (virtual, "the values of a are in another file"),
    (deep, "its groups are nested over 30 deep")])
def test_an_hdf5_file_with_arrays_that_it_cannot_hold_is_refused(tmp_path, fill, says):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        fill(file)
    with pytest.raises(ValueError, match=says), limits.open_hdf5(tmp_path / "a.h5"):
        pass


def test_an_hdf5_file_of_compressed_zeros_is_read(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", data=np.zeros(1 << 20), compression="gzip", chunks=True)
        file["again"] = h5py.SoftLink("/a")
    with limits.open_hdf5(tmp_path / "a.h5") as file:
        assert file["again"].shape == (1 << 20,)


@pytest.mark.parametrize(("content", "says"), [
    (npy((10**9, 8)), r"declares an array of shape \(1000000000, 8\)"),
    (npy((2**62, 8)), "declares an array of shape"),
    (npy((-1, 8)), "declares an array of shape|Invalid|shape"),
    (b"\x93NUMPY\1\0\x10\0(((((((((((((((\n", "header"),
    (b"\x93NUMPY\7\0", r"version \(7, 0\) of .npy"), (b"", "")])
def test_an_array_that_its_file_cannot_hold_is_refused(content, says):
    with pytest.raises(ValueError, match=says):
        limits.check_npy(io.BytesIO(content), len(content))


@pytest.mark.parametrize(("change", "says"), [
    (lambda content: content[:-40], ""),
    (lambda content: content.replace(b"\0\0\xe0@", b"\0\0\xe1@"), "checksum of a.npy is wrong")])
def test_a_damaged_archive_of_arrays_is_refused(tmp_path, change, says):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(8, dtype="f4"), b=np.array(["x", "é"]))
    arrays = limits.read_arrays(path)
    np.testing.assert_array_equal(arrays["a"], np.arange(8))
    assert arrays["b"].tolist() == ["x", "é"]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises((ValueError, zipfile.BadZipFile), match=says):
        limits.read_arrays(path)


def test_an_archive_of_text_with_what_is_no_letter_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([2**21], "<u4").view("<U1"))
    with pytest.raises(ValueError, match="its text is damaged"):
        limits.read_arrays(tmp_path / "a.npz")


def test_a_compressed_archive_of_arrays_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(10))
    with pytest.raises(ValueError, match="its members are compressed"):
        limits.read_arrays(tmp_path / "a.npz")
