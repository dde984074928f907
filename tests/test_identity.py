"""identity.py, part.py: a section is never predicted from its own spots, whatever it is called."""

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from test_preprocess import GENES, SYMBOLS, raw_section
from test_sheet import root, run, stated_files, to_anndata, write_image, write_sheet
from test_sources import write_h5, write_positions

from heclip.dataset import Processed
from heclip.files import InputError
from heclip.identity import Identity, compare, fingerprints, shared
from heclip.missing import SMALL_SHARE, leave_out
from heclip.part import read_part, selected

__all__ = ["root"]  # a fixture


# ------------------------------------------------------------------------- few and many


@pytest.mark.parametrize(("n", "refused"), [(0, False), (1, False), (10, False), (11, True),
                                            (100, True)])
def test_up_to_a_tenth_of_the_spots_is_left_out_and_more_is_an_error(n, refused):
    assert SMALL_SHARE == 0.1
    missing = np.arange(100) < n
    if refused:
        with pytest.raises(InputError, match=f"{n} of 100 spots under tissue are odd; at most 10% "
                                             r"may be left out\. Look"):
            leave_out(missing, "are odd", "Look")
    else:
        note = leave_out(missing, "are odd", "Look")
        assert note == (f"{n} of 100 spots under tissue are odd; left out" if n else None)


# ------------------------------------------------------------------------- parts


@pytest.mark.parametrize(("text", "rows"), [
    ("", [0, 1, 2, 3]), ("array_col<3", [0, 1]), ("array_col >= 2 and array_col!=3", [1, 3]),
    ("name=NA", [0]), ("name == 007", [1]), ("name!=NA", [1, 2]), ("array_col=1e0", [0]),
    ("good=True", [0, 2])])
def test_a_part_is_the_rows_that_meet_all_conditions(text, rows):
    """A missing value meets no condition, and NA and 007 are names."""
    table = pd.DataFrame({"array_col": [1, 2, 3, 4], "name": ["NA", "007", "7", None],
                          "good": [True, False, True, False]})
    assert np.flatnonzero(selected(table, read_part(text), "a.h5ad")).tolist() == rows


@pytest.mark.parametrize(("text", "says"), [
    ("left half", "expected conditions such as"), ("array_col<", "expected conditions such as"),
    ("array_col<x", "'x' is not a number"), ("lib=A", r"a\.h5ad has no column lib, .* but "),
    ("name<B", "holds text"), ("size=big", "Give a number"), ("array_col>9", "no spot is in")])
def test_a_part_that_cannot_be_is_one_clear_error(text, says):
    table = pd.DataFrame({"array_col": [1, 2], "name": ["A", "B"], "size": [1.5, 2]})
    with pytest.raises(InputError, match=says):
        selected(table, read_part(text), "a.h5ad")


# ------------------------------------------------------------------------- the same spots


def a_section(name, spots, image, seed=0, genes=60, crop_px=4):
    """The Identity of some spots of a section of 10 x 10 spots, 10 pixels apart."""
    counts = np.random.default_rng(seed).poisson(2, (100, 60))[spots]
    ids = [f"G{i}" for i in range(60)]
    row, col = np.divmod(np.asarray(spots), 10)
    array = np.column_stack([row, col]).astype(float)
    found = fingerprints(scipy.sparse.csr_matrix(counts[:, :genes]), ids[:genes], ids[:30])
    return Identity(name, found, image, 10 * array[:, ::-1], crop_px, array)


EVERY = np.arange(100)
LEFT, RIGHT = EVERY[EVERY % 10 < 5], EVERY[EVERY % 10 >= 5]


@pytest.mark.parametrize(("a", "b", "says"), [
    pytest.param((EVERY, "1"), (EVERY, "2"), "100 of the 100 spots of A have the counts",
                 id="another name and image"),
    pytest.param((EVERY, "1"), (EVERY, "2", 0, 40), "100 of the 100 spots of A have the counts",
                 id="fewer genes"),
    pytest.param((EVERY, "1"), (EVERY[:50], "2"), "50 of the 100 spots", id="half of the spots"),
    pytest.param((EVERY, "1"), (EVERY[7:8], "2"), "1 of the 100 spots", id="one spot"),
    pytest.param((EVERY, "1"), (EVERY, "1", 1), "100 .* lie at the places of spots of B",
                 id="other counts at the same places"),
    pytest.param((EVERY, "1"), (EVERY, "2", 1), None, id="the same places of another image"),
    pytest.param((LEFT, "1"), (RIGHT, "1"), None, id="two parts of one image"),
    pytest.param((LEFT, "1", 0, 60, 11), (RIGHT, "1", 0, 60, 11),
                 r"10 spots of A show tissue .* array_col 4 to 4 of A or array_col 5 to 5 of B",
                 id="two parts whose patches meet"),
    pytest.param((LEFT, "1", 0, 60, 10), (RIGHT, "1", 0, 60, 10), None,
                 id="two parts whose patches touch"),
    pytest.param((EVERY, "1", 0, 19), (EVERY, "2", 0, 19), None, id="too few genes to tell")])
def test_sections_with_the_same_spots_are_recognised(a, b, says):
    a, b = a_section("A", *a), a_section("B", *b)
    problem = shared(a, b)
    if says is None:
        assert problem is None
    else:
        with pytest.raises(AssertionError, match=says):
            raise AssertionError(problem)
    problems, notes = compare([a, b])
    assert problems == ([problem] if problem else [])
    assert len(notes) == (problem is None and a.image == b.image)


def test_a_copy_of_a_section_is_an_error_in_preprocess_and_in_check(root, tmp_path, capsys):
    """An AnnData of two thirds of its spots and half of its genes, on a picture of its own."""
    rows = {"A1": stated_files(tmp_path, "A1")}
    copy = to_anndata("A1")
    copy = copy[copy.obs["in_tissue"].to_numpy() == 1][:16, :40].copy()
    copy.obs_names = [f"x{i}" for i in range(16)]
    copy.write_h5ad(tmp_path / "copy.h5ad")
    write_image(tmp_path / "copy.tif", 255 - raw_section("A1")[2])
    rows["C1"] = {"counts": "copy.h5ad", "image": "copy.tif"}
    path = write_sheet(tmp_path, rows)
    says = "A1 and C1 hold the same spots: 16 of the 24 spots of A1 have the counts of spots of C1"
    with pytest.raises(InputError, match="1 to fix"):
        run(path, "--check")
    assert says in capsys.readouterr().out
    with pytest.raises(InputError, match=f"dataset mine: {says}"):
        run(path)
    assert not Processed("mine").sections_path.exists()


# ------------------------------------------------------------------------- one file, two sections


def both_sections(path, index_unique):
    """One AnnData of two sections, as concatenated; the barcodes may be the same in both."""
    parts = {}
    for name in ("A1", "C1"):
        parts[name] = to_anndata(name)
        parts[name].obs_names = [f"B{i}" for i in range(parts[name].n_obs)]
        parts[name].uns["spatial"] = {name: {"scalefactors": {"tissue_hires_scalef": 0.5}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = anndata.concat(parts, label="library_id", uns_merge="unique", merge="same",
                              index_unique=index_unique)
        both.write_h5ad(path)


@pytest.mark.parametrize("index_unique", ["-", None])
def test_an_anndata_of_two_sections_is_split_by_its_libraries(root, tmp_path, index_unique):
    both_sections(tmp_path / "both.h5ad", index_unique)
    rows = {name: {"counts": "both.h5ad", "image": f"{name}.tif", "part": f"library_id={name}"}
            for name in ("A1", "C1")}
    for name in rows:
        write_image(tmp_path / f"{name}.tif", raw_section(name)[2])
    run(write_sheet(tmp_path, rows))
    for name in rows:
        counts, table, _ = raw_section(name)
        under_tissue = table.loc[counts.index, "in_tissue"].to_numpy() == 1
        np.testing.assert_array_equal(
            Processed("mine").read(name).layers["counts"].toarray(), counts[under_tissue])
        del rows[name]["part"]
    with pytest.raises(InputError, match=r"both\.h5ad holds several sections, library_id A1, C1"):
        run(write_sheet(tmp_path, rows))


def halves(folder, left="array_col<10", right="array_col>=10", **cells):
    """A sheet of the two halves of one section."""
    files = stated_files(folder, "A1")
    rows = {"left": files | {"part": left}, "right": files | {"part": right, "role": "query"}}
    return write_sheet(folder, {name: row | cells for name, row in rows.items()})


def test_one_section_is_split_by_position_with_a_gap_between_the_patches(root, tmp_path, capsys):
    _, table, _ = raw_section("A1")
    table = table[table["in_tissue"] == 1]
    middle = int(table["array_col"].median())
    with pytest.raises(InputError, match=r"parts of one image, .* leave out array_col"):
        run(halves(tmp_path, f"array_col<{middle}", f"array_col>={middle}"), "--patch_px", "40")
    run(halves(tmp_path, f"array_col<{middle}", f"array_col>={middle + 1}"), "--patch_px", "8")
    assert "left and right are parts of one image without common spots" in capsys.readouterr().out
    expected = {"left": table["array_col"] < middle, "right": table["array_col"] > middle}
    for name, rows in expected.items():
        assert sorted(Processed("mine").barcodes(name)) == sorted(table.index[rows])


@pytest.mark.parametrize(("part", "says"), [("library_id=A", "its files are none"),
                                            ("half", "expected conditions")])
def test_a_part_that_the_files_do_not_have_is_refused(root, tmp_path, part, says):
    with pytest.raises(InputError, match=f"left: .*{says}"):
        run(halves(tmp_path, left=part))


# ------------------------------------------------------------------------- after preprocessing


def test_a_section_that_was_copied_after_preprocessing_is_refused(root, tmp_path):
    """Whatever is called otherwise, its spots are recognised; and by name, and by files."""
    run(write_sheet(tmp_path, {name: stated_files(tmp_path, name) for name in ("A1", "C1")}))
    processed = Processed("mine")
    processed.check_apart("C1", ["A1"])
    with pytest.raises(InputError, match="C1 is in its own reference, A1, C1"):
        processed.check_apart("C1", ["A1", "C1"])
    table = processed.sections()
    table.assign(digest="same").to_csv(processed.sections_path)
    with pytest.raises(InputError, match="C1 and A1 were made from the same files"):
        processed.check_apart("C1", ["A1"])
    table.to_csv(processed.sections_path)
    kept = processed.fingerprints()
    np.savez(processed.fingerprints_path, **kept | {"A1": kept["C1"]})
    with pytest.raises(InputError, match="C1 and A1 hold the same spots"):
        processed.check_apart("C1", ["A1"])
    np.savez(processed.fingerprints_path, A1=kept["A1"])
    with pytest.raises(InputError, match=r"fingerprints\.npz is not of .*C1\.h5ad"):
        processed.check_apart("C1", ["A1"])
    processed.fingerprints_path.write_bytes(b"")
    with pytest.raises(InputError, match=r"fingerprints\.npz is damaged"):
        processed.check_apart("C1", ["A1"])


def test_a_few_spots_outside_the_picture_are_left_out_with_their_patches(root, tmp_path, capsys):
    rows = {name: stated_files(tmp_path, name) for name in ("A1", "C1")}
    counts, table, image = raw_section("A1")
    out = table.index[table["in_tissue"] == 1][:2]
    table.loc[out, "pxl_col_in_fullres"] = [-3, image.shape[1] + 2]
    write_positions(tmp_path / "moved.csv", table.reset_index())
    write_h5(tmp_path / "A1.h5", counts, counts.index, GENES, SYMBOLS)
    rows["A1"] |= {"positions": "moved.csv", "counts": "A1.h5"}
    path = write_sheet(tmp_path, rows)
    says = "A1: 2 of 24 spots under tissue lie outside"
    run(path, "--check")
    assert f"- {says}" in capsys.readouterr().out
    for _ in range(2):  # the second run reads nothing, and says so again
        run(path)
        assert says in capsys.readouterr().out
    adata = Processed("mine").read("A1")
    assert adata.n_obs == len(Processed("mine").patches("A1")) == 22
    assert not adata.obs_names.isin(out).any()
    assert (adata.var["n_expressed"] == (adata.layers["counts"] > 0).sum(axis=0).A1).all()
