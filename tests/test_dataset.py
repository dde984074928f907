"""Processed files are read as they are: rows, columns and names, and only files made together."""

from dataclasses import replace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from makers import panel_of

from heclip import dataset as dataset_module
from heclip.dataset import Processed, patches_digest, read_columns
from heclip.files import InputError, write_h5ad

GENES = ["G5", "NA", "G1", "007", "G3", "nan"]


@pytest.fixture
def processed(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "ROOT", tmp_path)
    return Processed("by_hand")


def write(processed, name="A", spots=11, seed=0, write_file=write_h5ad):
    """One processed section, written by hand. Returns (AnnData, patches)."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.6, (spots, len(GENES))).astype(np.float32)
    counts[spots // 2] = 0  # a spot without any
    x = scipy.sparse.csr_matrix(counts)
    patches = rng.integers(0, 256, (spots, 5, 5, 3), dtype=np.uint8)
    # Barcodes that a careless reader would take for numbers or for missing values.
    barcodes = ["NA", "007", "1e3", *(f"SPOT{i}" for i in range(spots))][:spots]
    adata = anndata.AnnData(
        x, obs=pd.DataFrame({"in_tissue": True}, index=barcodes),
        var=pd.DataFrame({"symbol": [gene.lower() for gene in GENES]}, index=GENES),
        obsm={"spatial": rng.uniform(0, 900, (spots, 2))}, layers={"counts": x.astype(np.int32)},
        uns={"patches_digest": patches_digest(patches),
             "spatial": {name: {"metadata": {"mpp": 0.5}}}})
    processed.folder.mkdir(parents=True, exist_ok=True)
    write_file(adata, processed.section_path(name))
    np.save(processed.patches_path(name), patches)
    return adata, patches


# ------------------------------------------------------------------------------ columns of X


@pytest.mark.parametrize("ids", [["G1"], ["007", "G5", "NA"], GENES, GENES[::-1], []])
def test_columns_are_those_of_the_whole_matrix_whatever_the_blocks(processed, ids):
    adata, _ = write(processed)
    for rows in (1, 2, 3, 10, 11, 12, 1024):
        with processed.opened("A") as file:
            found = read_columns(file, pd.Index(ids, dtype=object), rows)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, adata[:, ids].X.toarray())


@pytest.mark.parametrize("spots", [1, 3, 4])
def test_expression_is_that_of_the_panel_in_its_order(processed, spots):
    adata, _ = write(processed, spots=spots)
    found = processed.expression("A", panel_of("nan", "G1", "007"))
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, adata[:, ["nan", "G1", "007"]].X.toarray())


def test_a_gene_that_a_section_lacks_is_an_error_that_names_file_and_gene(processed):
    write(processed)
    with pytest.raises(InputError, match=r"A\.h5ad lacks 2 genes of the panel, G8 first"):
        processed.expression("A", panel_of("G1", "G8", "G9"))


def test_the_paper_protocol_reads_its_own_corrected_matrix(processed):
    write(processed)
    corrected = np.random.default_rng(1).normal(0, 1, (11, 2)).astype(np.float32)
    panel = panel_of("G1", "G3", protocol="paper")
    with pytest.raises(InputError, match=r"A\.heg_paper\.npy is missing"):
        processed.expression("A", panel)
    np.save(processed.corrected_path("A", "heg"), corrected)
    np.testing.assert_array_equal(processed.expression("A", panel), corrected)
    strict = processed.expression("A", replace(panel, protocol="strict"))
    assert not np.array_equal(strict, corrected)


# ------------------------------------------------------------------------------ parts of a section


@pytest.mark.parametrize("write_file", [write_h5ad, lambda adata, path: adata.write_h5ad(path)],
                         ids=["ours", "anndata's"])
def test_each_part_is_that_of_the_whole_section(processed, write_file):
    adata, _ = write(processed, write_file=write_file)
    whole, spots = processed.read("A"), processed.spots("A")
    assert (whole.X != adata.X).nnz == 0
    barcodes = processed.barcodes("A")
    assert barcodes.dtype.kind == "U"
    assert barcodes.tolist() == whole.obs_names.tolist() == adata.obs_names.tolist()
    assert barcodes[:3].tolist() == ["NA", "007", "1e3"]
    assert processed.xy("A").dtype == np.float64
    np.testing.assert_array_equal(processed.xy("A"), whole.obsm["spatial"])
    np.testing.assert_array_equal(processed.xy("A"), adata.obsm["spatial"])
    pd.testing.assert_frame_equal(processed.genes("A"), whole.var)
    pd.testing.assert_frame_equal(spots.obs, whole.obs)
    assert spots.shape == (11, 0)
    np.testing.assert_array_equal(spots.obsm["spatial"], whole.obsm["spatial"])
    assert spots.uns["spatial"]["A"]["metadata"]["mpp"] == 0.5


@pytest.mark.parametrize("part", ["read", "spots", "xy", "barcodes", "genes", "patches"])
def test_a_damaged_section_is_an_error_that_names_its_file(processed, part):
    write(processed)
    path = processed.section_path("A")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"A\.h5ad is damaged .*Delete it and run"):
        getattr(processed, part)("A")
    path.unlink()
    with pytest.raises(InputError, match=r"A\.h5ad is missing"):
        getattr(processed, part)("A")


# ------------------------------------------------------------------------------ patches


def test_patches_are_mapped_as_they_were_made(processed):
    _, patches = write(processed)
    found = processed.patches("A")
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, patches)


def another_size(patches):
    return np.ascontiguousarray(patches[:, 1:, 1:])


@pytest.mark.parametrize("change", [lambda patches: patches[:-1], lambda patches: patches[::-1],
                                    lambda patches: 255 - patches, another_size])
def test_patches_that_were_not_made_with_the_expression_are_refused(processed, change):
    _, patches = write(processed)
    np.save(processed.patches_path("A"), change(patches))
    with pytest.raises(InputError, match=r"A\.patches\.npy and .*A\.h5ad were not made together"):
        processed.patches("A")


def test_expression_that_was_not_made_with_the_patches_is_refused(processed):
    write(processed)
    _, patches = write(processed, seed=1)
    other = patches_digest(255 - patches)
    adata = processed.read("A")
    adata.uns["patches_digest"] = other
    write_h5ad(adata, processed.section_path("A"))
    with pytest.raises(InputError, match="were not made together"):
        processed.patches("A")


def test_the_patches_of_one_section_are_not_taken_for_anothers(processed):
    write(processed, "A")
    write(processed, "B", seed=1)
    processed.patches_path("A").write_bytes(processed.patches_path("B").read_bytes())
    with pytest.raises(InputError, match="were not made together"):
        processed.patches("A")
    assert len(processed.patches("B")) == 11


@pytest.mark.parametrize("keep", [0, 60, 300])
def test_damaged_patches_are_an_error_that_names_their_file(processed, keep):
    write(processed)
    path = processed.patches_path("A")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"A\.patches\.npy is damaged"):
        processed.patches("A")


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 400])
def test_the_digest_of_patches_sees_their_number_size_first_and_last(n):
    patches = np.random.default_rng(n).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    whole = patches_digest(patches)
    assert patches_digest(patches.copy()) == whole
    assert patches_digest(np.asfortranarray(patches)) == whole
    assert patches_digest(patches.reshape(n, 2, 8, 3)) != whole
    assert patches_digest(np.concatenate([patches, patches[:1]])) != whole
    for row in (0, n - 1):
        changed = patches.copy()
        changed[row, 0, 0, 0] ^= 1
        assert patches_digest(changed) != whole


# ------------------------------------------------------------------------------ the section table


COLUMNS = {"donor": "D", "role": "reference", "n_spots": 24, "mpp": 0.5, "patch_px": 8,
           "crop_px": 8, "digest": "12345678"}


def write_table(processed, names, **columns):
    processed.folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(COLUMNS | columns, index=pd.Index(names, name="section"))
    table.to_csv(processed.sections_path)


def test_names_that_look_like_numbers_or_like_nothing_stay_text(processed):
    names = ["NA", "007", "7", "nan", "1e3", "null"]
    write_table(processed, names, donor=names[::-1], digest=["0012", "1e10", "7", "8", "9", "10"],
                role=["reference"] * 5 + ["query"])
    table = processed.sections()
    assert table.index.tolist() == names
    assert table["donor"].tolist() == names[::-1]
    assert table["digest"].tolist() == ["0012", "1e10", "7", "8", "9", "10"]
    assert table["n_spots"].dtype.kind == "i"
    assert table["mpp"].dtype.kind == "f"
    assert processed.roles() == (names[:5], ["null"])
    assert processed.roles(["NA", "7"]) == (["007", "nan", "1e3", "null"], ["NA", "7"])


def test_roles_are_those_of_the_table_unless_sections_are_held_out(processed):
    write_table(processed, ["A", "B", "C"], role=["reference", "query", "reference"])
    assert processed.roles() == (["A", "C"], ["B"])
    assert processed.roles(("C",)) == (["A", "B"], ["C"])
    assert processed.roles([]) == (["A", "B", "C"], [])
    with pytest.raises(InputError, match=r"--query D: .*has no such section, but A, B, C"):
        processed.roles(["D"])
    with pytest.raises(InputError, match="no section is left to learn from"):
        processed.roles(["A", "B", "C"])


def test_a_table_of_an_older_version_or_with_a_name_twice_is_refused(processed):
    write_table(processed, ["A", "A"])
    with pytest.raises(InputError, match="names a section twice"):
        processed.sections()
    write_table(processed, ["A"])
    pd.read_csv(processed.sections_path).drop(columns="digest").to_csv(
        processed.sections_path, index=False)
    with pytest.raises(InputError, match="was written by an older version"):
        processed.sections()


def test_corrected_expression_of_another_panel_is_refused(processed):
    write(processed)
    corrected = np.arange(22, dtype=np.float32).reshape(11, 2)
    np.save(processed.corrected_path("A", "heg"), corrected)
    panel = panel_of("G1", "G5", protocol="paper")
    np.testing.assert_array_equal(processed.expression("A", panel), corrected)
    fault = r"A\.heg_paper\.npy is of shape \(11, 2\), and its panel has 3 genes"
    with pytest.raises(InputError, match=fault):
        processed.expression("A", panel_of("G1", "G5", "G3", protocol="paper"))


@pytest.mark.parametrize(("change", "says"), [
    (lambda text: text.replace("query", "que ry"), "a role is neither"),
    (lambda text: text.replace("mpp", "mp p"), "it lacks mpp"),
    (lambda text: text.replace(",0.5,", ",-1,"), "a size is not a number above 0"),
    (lambda text: text.replace(",0.5,", ",x,"), "a size is not a number above 0"),
    (lambda text: text.replace(",0.5,", ",inf,"), "a size is not a number above 0"),
    (lambda text: "," * 100_000, "first line is longer"),
    (lambda text: "x" + text, ""), (lambda text: text.replace("\n", '\n"', 1), "")])
def test_a_damaged_table_is_an_error_that_names_it(processed, change, says):
    write_table(processed, ["A", "B"], role=["reference", "query"], mpp=0.5)
    text = processed.sections_path.read_text()
    assert change(text) != text
    processed.sections_path.write_text(change(text))
    with pytest.raises(InputError, match=rf"sections\.csv .*{says}"):
        processed.sections()


def test_indices_outside_a_section_are_an_error_that_names_it(processed):
    write(processed)
    with h5py.File(processed.section_path("A"), "r+") as file:
        file["X/indices"][0] = 10**6
    for read in (lambda: processed.read("A"),
                 lambda: processed.expression("A", panel_of("nan", "G1"))):
        with pytest.raises(InputError, match=r"A\.h5ad is damaged"):
            read()


@pytest.mark.parametrize("array", [
    np.zeros((11, 4, 4, 3), np.int8), np.zeros((0, 4, 4, 3), np.uint8), np.zeros(3, np.uint8)])
def test_an_array_that_holds_no_patches_is_refused(processed, array):
    write(processed)
    np.save(processed.patches_path("A"), array)
    with pytest.raises(InputError, match=r"A\.patches\.npy holds .*expected patches"):
        processed.patches("A")
