"""files.py: a file appears whole or not at all, whoever else writes it at the same time."""

import contextlib
import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from heclip import command, files
from heclip.files import InputError, atomic_path, locked, sha256, temporary_path, write_h5ad

CODE = Path(__file__).parents[1] / "code"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def process(code, *arguments):
    """Another process that runs `code`. It has printed one line, and waits for one on its stdin."""
    code = f"""
import sys
from heclip.files import atomic_path, locked
def pause(text="here"):
    print(text, flush=True)
    sys.stdin.readline()
{code}
"""
    with subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=CODE, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        try:
            run.first_line = run.stdout.readline().strip()
            yield run
        finally:
            run.kill()


HALF_WRITTEN = """
with atomic_path(sys.argv[1]) as path, open(path, "wb") as file:
    file.write(5_000 * b"a")
    file.flush()
    pause(str(path))
    file.write(5_000 * b"a")
"""


def test_a_finished_file_appears_under_its_name_and_its_parents_are_made(tmp_path):
    target = tmp_path / "a" / "b" / "table.csv"
    with atomic_path(target) as path:
        path.write_text("whole")
        assert not target.exists()
        assert path.parent == target.parent  # the same file system, or the renaming would copy
    assert target.read_text() == "whole"
    assert names(target.parent) == ["table.csv"]


def test_the_path_may_be_given_as_text(tmp_path):
    with atomic_path(str(tmp_path / "table.csv")) as path:
        path.write_text("whole")
    assert names(tmp_path) == ["table.csv"]


@pytest.mark.parametrize("error",
                         [ValueError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("before", [None, "the old one"])
def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path, error, before):
    target = tmp_path / "table.csv"
    if before is not None:
        target.write_text(before)

    def fail():
        with atomic_path(target) as path:
            path.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ([] if before is None else ["table.csv"])
    if before is not None:
        assert target.read_text() == before


def test_a_write_that_fails_before_its_first_byte_raises_its_own_error(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "table.csv"):
        _ = 1 / 0
    assert names(tmp_path) == []


def test_a_finished_write_replaces_the_old_file(tmp_path):
    target = tmp_path / "table.csv"
    target.write_text("the old one, which is longer")
    with atomic_path(target) as path:
        path.write_text("new")
    assert target.read_text() == "new"


def test_a_file_gets_the_mode_that_open_gives(tmp_path):
    with open(tmp_path / "plain", "w"), atomic_path(tmp_path / "table.csv") as path:
        path.write_text("whole")
    assert (tmp_path / "table.csv").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ------------------------------------------------------------------------- several writers


def test_of_two_interleaved_writers_each_writes_a_whole_file(tmp_path):
    # With one temporary name for both, the file ended as 5,000 zero bytes and 5,000 of the first.
    target = tmp_path / "table.csv"
    with atomic_path(target) as one, open(one, "wb") as first:
        first.write(5_000 * b"a")
        first.flush()
        with atomic_path(target) as two, open(two, "wb") as second:
            second.write(5_000 * b"b")
            second.flush()
            first.write(5_000 * b"a")
            first.flush()
            second.write(5_000 * b"b")
        assert target.read_bytes() == 10_000 * b"b"
    assert target.read_bytes() == 10_000 * b"a"
    assert names(tmp_path) == ["table.csv"]


def test_of_two_processes_each_writes_a_whole_file(tmp_path):
    target = tmp_path / "table.csv"
    with process(HALF_WRITTEN, target) as other:
        with atomic_path(target) as path:
            path.write_bytes(10_000 * b"b")
        assert target.read_bytes() == 10_000 * b"b"
        other.communicate("\n")
        assert other.returncode == 0
    assert target.read_bytes() == 10_000 * b"a"
    assert names(tmp_path) == ["table.csv"]


def test_what_a_killed_process_left_goes_with_the_next_write_but_a_living_ones_stays(tmp_path):
    target = tmp_path / "table.csv"
    with process(HALF_WRITTEN, target) as living, process(HALF_WRITTEN, target) as killed:
        assert len({living.first_line, killed.first_line}) == 2
        killed.kill()
        killed.wait()
        assert names(tmp_path) == sorted(Path(run.first_line).name for run in (living, killed))
        with atomic_path(target) as path:
            path.write_text("new")
        assert names(tmp_path) == [Path(living.first_line).name, "table.csv"]


def test_what_another_machine_left_goes_after_some_days(tmp_path):
    other_machine = f"{'f' * 8}-1-{'0' * 8}"
    old, new = (tmp_path / f".{name}.{other_machine}.part" for name in ("old.csv", "new.csv"))
    for path in (old, new):
        path.write_text("half")
    days = files.LEFTOVER_DAYS + 1
    os.utime(old, (time.time() - days * 86400,) * 2)
    for name in ("old.csv", "new.csv"):
        with atomic_path(tmp_path / name) as path:
            path.write_text("whole")
    assert names(tmp_path) == sorted([new.name, "new.csv", "old.csv"])


def test_only_leftovers_of_the_same_file_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "runs", lambda process: False)
    dead = f"{files.machine()}-1-{'0' * 8}"
    stems = ("table.csv", f"table.csv.gz.{dead}", f"a.table.csv.{dead}", f"tableXcsv.{dead}",
             f"table.csv.{dead}0")
    others = [f".{stem}.part" for stem in stems]
    for name in [*others, f".table.csv.{dead}.part"]:
        (tmp_path / name).write_text("half")
    with atomic_path(tmp_path / "table.csv") as path:
        path.write_text("whole")
    assert names(tmp_path) == sorted([*others, "table.csv"])


def test_a_temporary_path_is_hidden_ignored_by_git_and_of_one_call_only(tmp_path, project):
    one, two = temporary_path(tmp_path / "a.csv"), temporary_path(tmp_path / "a.csv")
    assert one != two
    assert one.parent == tmp_path
    assert one.name.startswith(".a.csv.")
    assert one.suffix == ".part"
    ignored = (project / ".gitignore").read_text().splitlines()
    assert {"*.part", ".*.lock"} <= set(ignored)


# ------------------------------------------------------------------------- onto the disk


def test_contents_are_on_the_disk_before_the_name_is_given_and_the_name_after(
        tmp_path, monkeypatch):
    order, sync, replace = [], os.fsync, os.replace

    def recorded_sync(descriptor):
        order.append(Path(f"/proc/self/fd/{descriptor}").resolve())
        sync(descriptor)

    def recorded_replace(source, target):
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    with atomic_path(tmp_path / "table.csv") as path:
        path.write_text("whole")
    assert order == [path, "rename", tmp_path]


@pytest.mark.parametrize(("error", "says"), [
    (errno.ENOSPC, "error: the disk is full"),
    (errno.EDQUOT, "error: the disk is full"),
    (errno.EIO, r"error: .*table\.csv.*: Input/output error"),
])
def test_a_disk_that_fails_at_last_leaves_the_old_file_and_ends_in_one_line(
        tmp_path, monkeypatch, error, says):
    target = tmp_path / "table.csv"
    target.write_text("the old one")

    def fail(descriptor):
        raise OSError(error, os.strerror(error))

    def write():
        with atomic_path(target) as path:
            path.write_text("new")

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=says):
        command.run(write)
    assert names(tmp_path) == ["table.csv"]
    assert target.read_text() == "the old one"


def test_a_file_system_without_fsync_is_written_to(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    with atomic_path(tmp_path / "table.csv") as path:
        path.write_text("whole")
    assert names(tmp_path) == ["table.csv"]


# ------------------------------------------------------------------------- folders


def fill(folder):
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "chunk").write_text("whole")


def test_a_folder_appears_whole(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve()), sync(descriptor)))
    with atomic_path(tmp_path / "store.zarr") as path:
        fill(path)
        assert names(tmp_path) == [path.name]
    assert names(tmp_path) == ["store.zarr"]
    assert (tmp_path / "store.zarr/inner/chunk").read_text() == "whole"
    assert synced == [path / "inner/chunk", path / "inner", path, tmp_path]


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def fail():
        with atomic_path(tmp_path / "store.zarr") as path:
            fill(path)
            raise OSError("half")

    with pytest.raises(OSError, match="half"):
        fail()
    assert names(tmp_path) == []


@pytest.mark.parametrize("there", ["folder", "file"])
def test_a_folder_replaces_nothing(tmp_path, there):
    target = tmp_path / "store.zarr"
    fill(target) if there == "folder" else target.write_text("old")
    with pytest.raises(InputError, match=r"store\.zarr exists"), atomic_path(target) as path:
        fill(path)
    assert names(tmp_path) == ["store.zarr"]


def test_a_folder_that_a_killed_process_left_goes_with_the_next_write(tmp_path):
    code = """
with atomic_path(sys.argv[1]) as path:
    (path / "inner").mkdir(parents=True)
    pause()
"""
    with process(code, tmp_path / "store.zarr") as other:
        assert len(names(tmp_path)) == 1
        other.kill()
    with atomic_path(tmp_path / "store.zarr") as path:
        fill(path)
    assert names(tmp_path) == ["store.zarr"]


# ------------------------------------------------------------------------- one at a time


HOLDING = """
with locked(sys.argv[1]):
    pause()
    open(sys.argv[1], "w").write("made by the other")
"""


def test_who_waits_says_so_and_finds_the_others_work_done(tmp_path, when_waiting):
    target = tmp_path / "not there yet" / "cache.npy"
    with process(HOLDING, target) as other:
        stderr = when_waiting(lambda: (other.stdin.write("\n"), other.stdin.flush()))
        with locked(target):
            assert target.read_text() == "made by the other"
    assert stderr.getvalue().count("\n") == 1
    assert stderr.getvalue().startswith(f"{target}: another process is writing it; waiting")


def test_threads_of_one_process_take_turns_too(tmp_path, when_waiting):
    order, held, go_on = [], threading.Event(), threading.Event()

    def first():
        with locked(tmp_path / "a"):
            held.set()
            go_on.wait(60)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    held.wait(60)
    when_waiting(go_on.set)
    with locked(tmp_path / "a"):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_different_files_do_not_wait_for_each_other(tmp_path, capsys):
    with locked(tmp_path / "a"), locked(tmp_path / "b"):
        pass
    assert capsys.readouterr().err == ""


def test_the_lock_of_a_killed_process_is_free(tmp_path, capsys):
    with process(HOLDING, tmp_path / "a") as other:
        other.kill()
        other.wait()
        with locked(tmp_path / "a"):
            pass
    assert capsys.readouterr().err == ""


def test_a_lock_is_free_after_an_error(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a"):
        _ = 1 / 0
    with locked(tmp_path / "a"):
        pass
    assert capsys.readouterr().err == ""


def test_other_users_of_a_shared_folder_may_take_the_lock(tmp_path):
    with locked(tmp_path / "a"):
        assert names(tmp_path) == [".a.lock"]
        assert (tmp_path / ".a.lock").stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, 524])
def test_a_file_system_without_locks_has_a_file_as_the_lock(
        tmp_path, monkeypatch, when_waiting, error):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    test_threads_of_one_process_take_turns_too(tmp_path, when_waiting)
    assert not [name for name in names(tmp_path) if "soft" in name]


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / ".a.lock").mkdir()
    with pytest.raises(OSError, match="Is a directory"), locked(tmp_path / "a"):
        pass


# ------------------------------------------------------------------------- contents


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"spots\n" * 100_000)
    assert sha256(tmp_path / "file") == hashlib.sha256(b"spots\n" * 100_000).hexdigest()


def test_a_written_h5ad_reads_back_as_it_was(tmp_path):
    one = anndata.AnnData(
        scipy.sparse.csr_matrix(np.array([[0, 1.5, 0], [2, 0, 0]], np.float32)),
        obs=pd.DataFrame({"in_tissue": [True, False]},
                         index=pd.Index(["AAC-1", "GGT-1"], name="barcode")),
        var=pd.DataFrame({"symbol": ["A", "B", "A"]},
                         index=pd.Index(["E1", "E2", "E3"], name="gene_id")),
        obsm={"spatial": np.array([[1.0, 2.0], [3.0, 4.0]])},
        uns={"spatial": {"C73_A1": {"images": {"hires": np.zeros((2, 3, 3), np.uint8)},
                                    "metadata": {"mpp": 0.3}}}})
    one.layers["counts"] = scipy.sparse.csr_matrix(np.array([[0, 3, 0], [4, 0, 0]], np.int32))
    write_h5ad(one, tmp_path / "a.h5ad")
    two = anndata.read_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_frame_equal(one.obs, two.obs)
    pd.testing.assert_frame_equal(one.var, two.var)
    for before, after in ((one.X, two.X), (one.layers["counts"], two.layers["counts"])):
        assert isinstance(after, scipy.sparse.csr_matrix)
        assert after.dtype == before.dtype
        assert (before != after).nnz == 0
    np.testing.assert_array_equal(one.obsm["spatial"], two.obsm["spatial"])
    entry = two.uns["spatial"]["C73_A1"]
    assert entry["images"]["hires"].shape == (2, 3, 3)
    assert entry["metadata"]["mpp"] == 0.3


@pytest.mark.parametrize("room", ["checked", "unknown"])
def test_an_h5ad_on_a_full_disk_raises_the_first_error(tmp_path, room):
    code = """
import resource, sys, anndata, numpy
from heclip import files
from heclip.files import write_h5ad
if sys.argv[2] == "unknown":  # as on macOS, or where others fill the disk meanwhile
    files.check_room = lambda *_: None
one = anndata.AnnData(numpy.ones((300, 200), numpy.float32))
for limit in (0, 100, 5000, 200_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_h5ad(one, sys.argv[1])
    except OSError as error:
        print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.h5ad", room],
                          cwd=Path(__file__).parent.parent / "code", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == 4 * "File too large\n"  # EFBIG, as of any file beyond its limit


def test_an_error_that_quotes_a_damaged_file_is_one_line_that_a_terminal_shows():
    error = str(InputError(f"a.csv: holds 'x\n\x1b[2J\u2028{'y' * 10_000}'. Download it again"))
    assert error.startswith("a.csv: holds 'x??[2J?yyy")
    assert error.endswith("yyy'. Download it again")
    assert len(error) < 2000
