"""files.py: a file appears whole or not at all."""

import hashlib
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from heclip.files import atomic_path, sha256, write_h5ad


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit])
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


def test_what_a_killed_run_left_is_replaced(tmp_path):
    (tmp_path / ".table.csv.part").write_text("left by a run that was killed outright")
    with atomic_path(tmp_path / "table.csv") as path:
        assert path == tmp_path / ".table.csv.part"
        path.write_text("new")
    assert names(tmp_path) == ["table.csv"]
    assert (tmp_path / "table.csv").read_text() == "new"


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"spots\n" * 100_000)
    assert sha256(tmp_path / "file") == hashlib.sha256(b"spots\n" * 100_000).hexdigest()


def test_a_written_h5ad_reads_back_as_it_was(tmp_path):
    one = anndata.AnnData(
        scipy.sparse.csr_matrix(np.array([[0, 1.5, 0], [2, 0, 0]], np.float32)),
        obs=pd.DataFrame({"in_tissue": [True, False]}, index=pd.Index(["AAC-1", "GGT-1"], name="barcode")),
        var=pd.DataFrame({"symbol": ["A", "B", "A"]}, index=pd.Index(["E1", "E2", "E3"], name="gene_id")),
        obsm={"spatial": np.array([[1.0, 2.0], [3.0, 4.0]])},
        uns={"spatial": {"C73_A1": {"images": {"hires": np.zeros((2, 3, 3), np.uint8)}, "metadata": {"mpp": 0.3}}}})
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


def test_an_h5ad_on_a_full_disk_raises_the_first_error(tmp_path):
    code = """
import resource, sys, anndata, numpy
from heclip.files import write_h5ad
one = anndata.AnnData(numpy.ones((300, 200), numpy.float32))
for limit in (0, 100, 5000, 200_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_h5ad(one, sys.argv[1])
    except OSError as error:
        print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.h5ad"], cwd=Path(__file__).parent.parent / "code",
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == 4 * "File too large\n"  # EFBIG, as of any file beyond its limit
