"""std.py: an h5 matrix and the trio it is converted to are one and the same to every reader."""

import numpy as np
import pytest
import std
from makers import run_script
from test_sources import a_matrix, assert_holds, write_h5

from heclip import sources
from heclip.files import InputError

NAME = "151507_filtered_feature_bc_matrix.h5"


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("genome", [None, "GRCh38"])
def test_the_trio_reads_back_as_the_h5(tmp_path, genome):
    matrix = a_matrix()
    std.main(
        [str(write_h5(tmp_path / NAME, *matrix, genome=genome)), "--out", str(tmp_path / "new/1")])
    assert files(tmp_path / "new/1") == ["barcodes.tsv", "features.tsv", "matrix.mtx"]
    assert_holds(sources.read_counts(tmp_path / "new/1/matrix.mtx"), *matrix)


def test_without_a_folder_the_trio_lies_next_to_the_h5_under_its_name(tmp_path):
    matrix = a_matrix()
    std.main([str(write_h5(tmp_path / NAME, *matrix))])
    assert files(tmp_path) == sorted(
        [NAME, "151507_barcodes.tsv", "151507_features.tsv", "151507_matrix.mtx"])
    assert_holds(sources.read_counts(tmp_path / "151507_matrix.mtx"), *matrix)


def test_the_trio_is_genes_x_spots_with_ids_symbols_and_kinds(tmp_path):
    counts, barcodes, ids, symbols = a_matrix()
    std.main(
        [str(write_h5(tmp_path / NAME, counts, barcodes, ids, symbols)), "--out", str(tmp_path)])
    assert (tmp_path / "barcodes.tsv").read_text().split() == barcodes
    rows = [line.split("\t") for line in (tmp_path / "features.tsv").read_text().splitlines()]
    assert rows == [[gene, symbol, "Gene Expression"]
                    for gene, symbol in zip(ids, symbols, strict=True)]
    header = (tmp_path / "matrix.mtx").read_text().splitlines()
    assert header[0] == "%%MatrixMarket matrix coordinate integer general"
    size = next(line for line in header if not line.startswith("%"))
    assert size == f"5 7 {np.count_nonzero(counts)}"


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:900])],
    ids=["missing", "truncated"])
def test_a_bad_h5_writes_nothing(tmp_path, damage):
    path = write_h5(tmp_path / NAME, *a_matrix())
    damage(path)
    with pytest.raises(InputError, match=NAME):
        std.main([str(path), "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_as_a_script_a_bad_h5_ends_in_one_line_and_exit_code_1(tmp_path, project):
    (tmp_path / NAME).write_text("<html>404</html>")
    done = run_script(project / "GSE/std.py", NAME, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {NAME} is damaged or incomplete")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert files(tmp_path) == [NAME]
