"""preprocess.py: what later stages rely on. Bad input or a killed run leaves nothing to misread."""

import dataclasses
import gzip
import importlib
import itertools
import json
import os
import resource
import shutil
import signal
import threading
from functools import partial
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from makers import Fresh
from PIL import Image
from test_slide import an_image, obvious_patches
from test_sources import write_h5, write_mtx, write_positions

import preprocess_spatialLIBD_1
from heclip import (
    command,
    dataset as dataset_module,
    expression,
    figures,
    preprocess as preprocess_module,
    slide,
    sources,
)
from heclip.dataset import Dataset, Processed, Section
from heclip.files import InputError, sha256
from heclip.panel import Panel
from heclip.script import preprocess

# ------------------------------------------------------- a tiny data set, arranged as published

SECTIONS = {"A1": 1, "B1": 2, "C1": 3}  # and its folder's number; C1 is the query
GENES = [f"ENSG{i:05d}" for i in range(60)]
SYMBOLS = [f"GENE{i % 58}" for i in range(60)]  # two of them occur twice
STEP, PATCH, HEIGHT, WIDTH = 20.0, 16, 190, 150


def dataset(first=None, **changes):
    """The tiny dataset; `first`: the section to begin with, to see what exists when it fails."""
    names = sorted(SECTIONS, key=lambda name: (name != first, name))
    sections = [Section(
        name=name, donor="D", role="query" if name == "C1" else "reference",
        counts=[f"data/filtered_expression_matrices/{SECTIONS[name]}/*matrix.mtx",
                f"**/{name}_*.h5"],
        positions=[f"data/tissue_pos_matrices/tissue_positions_list_{SECTIONS[name]}.csv"],
        image=[f"image/{name}.tif", f"image/{name}.png"]) for name in names]
    facts = {"name": "tiny", "n_hvg": 8, "n_heg": 12, "markers": ("GENE3", "NOSUCH"),
             "patch_px": PATCH, "sections": sections}
    return Dataset(**facts | changes)


def some_counts(n_spots, seed):
    """Counts (spots x GENES) whose means and variances differ from gene to gene."""
    random = np.random.default_rng(seed)
    mean = random.permutation(np.geomspace(0.2, 30, len(GENES)))
    return random.negative_binomial(2, 2 / (2 + mean), (n_spots, len(GENES)))


def some_positions(seed):
    """A staggered lattice of 36 spots in random order, 24 under tissue; row 0 is near the edge."""
    rows, cols = (grid.ravel() for grid in np.mgrid[:6, :12])
    staggered = (rows + cols) % 2 == 0
    table = pd.DataFrame(
        {"in_tissue": 1, "array_row": rows[staggered], "array_col": cols[staggered]})
    table["pxl_row_in_fullres"] = 5 + table["array_row"] * STEP * np.sqrt(3) / 2
    table["pxl_col_in_fullres"] = 10 + table["array_col"] * STEP / 2
    table.insert(0, "barcode", [f"SPOT{i:02d}-1" for i in range(len(table))])
    table.loc[table.index % 3 == 2, "in_tissue"] = 0
    return table.sample(frac=1, random_state=seed)


def counts_file(raw, name):
    folder = raw / "data/filtered_expression_matrices" / str(SECTIONS[name])
    return folder / {"A1": "matrix.mtx", "B1": "matrix.mtx.gz",
                     "C1": "C1_raw_feature_bc_matrix.h5"}[name]


def positions_file(raw, name):
    return raw / f"data/tissue_pos_matrices/tissue_positions_list_{SECTIONS[name]}.csv"


def image_file(raw, name):
    return raw / "image" / {"A1": "A1.tif", "B1": "B1.tif.gz", "C1": "C1.png"}[name]


def write_counts(raw, name, counts, barcodes, ids=GENES):
    """A1 has a plain trio, B1 a gzipped one, C1 an h5."""
    path = counts_file(raw, name)
    if name == "C1":
        write_h5(path, counts, barcodes, ids, SYMBOLS)
    else:
        write_mtx(path.parent, counts, barcodes, ids, SYMBOLS,
                  suffix=path.name.removeprefix("matrix.mtx"))


def raw_section(name):
    """What a section's raw files hold: counts of all spots, positions, both by barcode; image."""
    table = some_positions(seed=SECTIONS[name])
    barcodes = sorted(table["barcode"], reverse=True)  # not the order of the positions
    return (pd.DataFrame(some_counts(len(table), SECTIONS[name]), barcodes, GENES),
            table.set_index("barcode"), an_image(HEIGHT, WIDTH, seed=SECTIONS[name]))


def write_raw(raw, name):
    counts, table, image = raw_section(name)
    write_counts(raw, name, counts.to_numpy(), counts.index)
    write_positions(positions_file(raw, name), table.reset_index())
    path = image_file(raw, name)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(image).save(plain := path.with_name(path.name.removesuffix(".gz")))
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()


def run(raw, *flags, first=None, **changes):
    preprocess(dataset(first, **changes), ["--raw", str(raw), *flags])


def under(root, monkeypatch):
    """Let every stage write below `root`."""
    for module in ("dataset", "preprocess"):
        monkeypatch.setattr(f"heclip.{module}.ROOT", root)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The tiny data set, preprocessed once with both protocols: (root, raw). Not to be changed."""
    root, raw = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("raw")
    for name in SECTIONS:
        write_raw(raw, name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        under(root, monkeypatch)
        run(raw, "--protocol", "paper")
    return root, raw


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """A copy of it to change: root and raw."""
    for source, name in zip(made, ("root", "raw"), strict=True):
        shutil.copytree(source, tmp_path / name)
    under(tmp_path / "root", monkeypatch)
    return tmp_path / "root", tmp_path / "raw"


@pytest.fixture
def processed(made, monkeypatch):
    under(made[0], monkeypatch)
    return Processed("tiny")


def snapshot(root):
    """Every file below a folder with its bytes and the time it was written. Not the locks."""
    return {str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(root.rglob("*")) if path.is_file() and path.suffix != ".lock"}


def written(root):
    """The names of the processed files. Not the locks."""
    return {path.name for path in (root / "GSE/tiny/processed").glob("*") if path.suffix != ".lock"}


FILES = {"sections.csv", "fingerprints.npz",
         *(f"panel_{name}.csv" for name in ("hvg", "heg", "hvg_paper", "heg_paper")),
         *(f"{section}.{suffix}" for section in SECTIONS
           for suffix in ("h5ad", "patches.npy", "hvg_paper.npy", "heg_paper.npy"))}

# ------------------------------------------------------------------------- what a good run writes


def test_a_run_writes_these_files_and_no_other(made):
    root, _ = made
    assert written(root) == FILES
    pictures = sorted((root / "figure").rglob("*"))
    assert [path.name for path in pictures if path.is_file()] == ["A1.jpg", "B1.jpg", "C1.jpg"]
    assert Image.open(root / "figure/QC/tiny/A1.jpg").size > (300, 100)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_holds_its_spots_under_tissue_in_the_matrix_order(processed, name):
    counts, table, _ = raw_section(name)
    kept = [barcode for barcode in counts.index if table.loc[barcode, "in_tissue"]]
    adata = processed.read(name)
    assert adata.obs_names.tolist() == kept
    np.testing.assert_array_equal(adata.layers["counts"].toarray(), counts.loc[kept])
    assert adata.obs["in_tissue"].all()
    assert adata.obs[["array_row", "array_col"]].to_numpy().tolist() == table.loc[
        kept, ["array_row", "array_col"]].to_numpy().tolist()
    np.testing.assert_array_equal(  # x, y
        adata.obsm["spatial"], table.loc[kept, ["pxl_col_in_fullres", "pxl_row_in_fullres"]])
    assert adata.var_names.tolist() == GENES
    assert adata.var["symbol"].tolist() == SYMBOLS


@pytest.mark.parametrize("name", SECTIONS)
def test_expression_is_normalised_and_logged_once_and_stays_sparse(processed, name):
    adata = processed.read(name)
    assert isinstance(adata.X, scipy.sparse.csr_matrix)
    assert isinstance(adata.layers["counts"], scipy.sparse.csr_matrix)
    assert adata.X.dtype == np.float32
    counts = adata.layers["counts"].toarray().astype(float)
    total = counts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(adata.X.toarray(), np.log1p(counts / total * np.median(total)),
                               rtol=1e-5)


@pytest.mark.parametrize("name", SECTIONS)
def test_patch_i_is_the_crop_around_spot_i(processed, name):
    _, table, image = raw_section(name)
    adata, patches = processed.read(name), processed.patches(name)
    xy = table.loc[adata.obs_names, ["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()
    assert patches.shape == (adata.n_obs, PATCH, PATCH, 3)
    assert patches.dtype == np.uint8
    np.testing.assert_array_equal(patches, obvious_patches(image, xy, PATCH))


@pytest.mark.parametrize("name", SECTIONS)
def test_the_spatial_entry_is_what_scanpy_and_squidpy_expect(processed, name):
    adata = processed.read(name)
    (library, entry), = adata.uns["spatial"].items()
    assert library == name
    # smaller than the limit, so not shrunk
    assert entry["images"]["hires"].shape == (HEIGHT, WIDTH, 3)
    assert entry["images"]["hires"].dtype == np.uint8
    assert entry["scalefactors"]["tissue_hires_scalef"] == 1
    assert entry["metadata"]["mpp"] == pytest.approx(100 / STEP)
    assert entry["scalefactors"]["spot_diameter_fullres"] == pytest.approx(55 / 100 * STEP)
    assert entry["metadata"]["source_image_path"] == image_file(Path(), name).name


def test_the_section_table_says_where_each_section_came_from(made, processed):
    _, raw = made
    table = processed.sections()
    assert table.index.tolist() == list(SECTIONS)
    assert table["donor"].tolist() == ["D"] * 3
    assert table["role"].tolist() == ["reference", "reference", "query"]
    assert (table["n_spots"] == 24).all()
    np.testing.assert_allclose(table["mpp"], 100 / STEP)
    assert (table["patch_px"] == PATCH).all()
    for name, row in table.iterrows():
        y = processed.read(name).obsm["spatial"][:, 1]
        assert row["padded"] == (np.rint(y) < PATCH // 2).sum() > 0
        assert row["image"] == image_file(raw, name).name
        recorded = dict(entry.rsplit(":", 1) for entry in row["sha256"].split(" "))
        trio = list(counts_file(raw, name).parent.iterdir())
        read = [*trio, positions_file(raw, name), image_file(raw, name)]
        assert recorded == {path.name: sha256(path) for path in read}


@pytest.mark.parametrize(("panel_type", "protocol", "choosing"), [
    ("hvg", "strict", ["A1", "B1"]), ("heg", "strict", ["A1", "B1"]),
    ("hvg", "paper", ["A1", "B1", "C1"]), ("heg", "paper", ["A1", "B1", "C1"])])
def test_a_panel_is_the_union_of_the_top_genes_of_its_sections(
        processed, panel_type, protocol, choosing):
    panel = processed.panel(panel_type, protocol)
    n_top = {"hvg": 8, "heg": 12}[panel_type]
    column = {"hvg": "dispersion", "heg": "mean"}[panel_type]
    ranks = {name: processed.read(name).var[column].rank(ascending=False, method="first")
             for name in choosing}

    genes = panel.genes
    assert genes.columns.tolist() == ["symbol", "marker", *(f"rank_{name}" for name in choosing)]
    assert genes.index.tolist() == [
        gene for gene in GENES if any(ranks[name][gene] <= n_top for name in choosing)]
    for name in choosing:
        np.testing.assert_array_equal(genes[f"rank_{name}"], ranks[name][genes.index])
        if panel_type == "heg":
            np.testing.assert_allclose(processed.read(name).X.toarray().mean(axis=0),
                                       processed.read(name).var["mean"], rtol=1e-5)
    assert genes["symbol"].tolist() == [SYMBOLS[GENES.index(gene)] for gene in genes.index]
    assert genes["marker"].tolist() == [symbol == "GENE3" for symbol in genes["symbol"]]
    assert panel.sections == choosing
    assert (panel.kind, panel.protocol, panel.n_top) == (panel_type, protocol, n_top)
    assert panel.markers == ["GENE3", "NOSUCH"]
    first_line = processed.panel_path(panel_type, protocol).read_text().split("\n")[0]
    assert "NOSUCH" in json.loads(first_line.removeprefix("# "))["markers_not_in_panel"]


@pytest.mark.parametrize("panel_type", ["hvg", "heg"])
def test_corrected_expression_has_the_spots_and_genes_in_order(processed, panel_type):
    panel = processed.panel(panel_type, "paper")
    plain = {name: processed.read(name)[:, panel.ids].X.toarray() for name in SECTIONS}
    expected = expression.harmonise(plain)
    for name in SECTIONS:
        corrected = np.load(processed.corrected_path(name, panel_type))
        np.testing.assert_array_equal(processed.expression(name, panel), corrected)
        assert corrected.dtype == np.float32
        np.testing.assert_allclose(corrected, expected[name], atol=1e-5)
        # Correction moves each section as a whole, mostly; rows or columns in another order would
        # not resemble it.
        before, after = (matrix - matrix.mean(axis=0) for matrix in (plain[name], corrected))
        assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.95


def test_a_section_below_min_counts_loses_spots_and_their_patches_alike(copy):
    _, raw = copy
    totals = raw_section("A1")[0].sum(axis=1)
    least = int(totals.median())
    run(raw, min_counts=least)
    adata, patches = Processed("tiny").read("A1"), Processed("tiny").patches("A1")
    assert 0 < adata.n_obs < 24
    assert (totals[adata.obs_names] >= least).all()
    np.testing.assert_array_equal(
        patches, obvious_patches(raw_section("A1")[2], adata.obsm["spatial"], PATCH))


def test_a_symbol_table_names_the_genes_it_knows_and_the_others_keep_their_id(copy):
    _, raw = copy
    (raw / "genes.tsv").write_text("gene_id\tgene_name\nENSG00003\tPenk\n")
    run(raw, symbols=("**/genes.tsv",), markers=("Penk",))
    symbol = Processed("tiny").read("B1").var["symbol"]
    assert symbol["ENSG00003"] == "Penk"
    assert (symbol.drop("ENSG00003") == symbol.index.drop("ENSG00003")).all()


# ------------------------------------------------------------------------- running again


def section_files(root, name):
    return {path: seen for path, seen in snapshot(root).items()
            if Path(path).name in (f"{name}.h5ad", f"{name}.patches.npy")}


def files_of_all(root):
    return {name: section_files(root, name) for name in SECTIONS}


@pytest.fixture
def read(monkeypatch):
    """The files whose counts were read, in a list that grows."""
    paths, original = [], sources.read_counts
    monkeypatch.setattr(sources, "read_counts",
                        lambda path, part: paths.append(path) or original(path, part))
    return paths


def test_an_unchanged_section_is_not_read_and_not_made_again(copy, read, monkeypatch):
    root, raw = copy
    before, table = files_of_all(root), Processed("tiny").sections()
    monkeypatch.setattr(slide, "open_slide", pytest.fail)
    monkeypatch.setattr(figures, "spots_over_slide", pytest.fail)
    run(raw)
    assert read == []
    assert before == files_of_all(root)
    pd.testing.assert_frame_equal(Processed("tiny").sections(), table)


def test_a_picture_that_was_removed_is_drawn_again_without_reading_counts(copy, read):
    root, raw = copy
    picture = root / "figure/QC/tiny/B1.jpg"
    before = picture.read_bytes()
    picture.unlink()
    run(raw)
    assert read == []
    assert picture.read_bytes() == before


def test_a_section_that_changed_is_read_once(copy, read):
    root, raw = copy
    rewrite_counts(raw)
    run(raw)
    assert read == [counts_file(raw, "A1")]
    shutil.rmtree(root)
    run(raw)
    assert sorted(read[1:]) == sorted(counts_file(raw, name) for name in SECTIONS)


def test_files_of_an_older_format_are_made_again(copy, read, monkeypatch):
    root, raw = copy
    before, table = files_of_all(root), Processed("tiny").sections()
    monkeypatch.setattr(preprocess_module, "FORMAT", preprocess_module.FORMAT + 1)
    run(raw)
    assert sorted(read) == sorted(counts_file(raw, name) for name in SECTIONS)
    for name in SECTIONS:
        after = section_files(root, name)
        assert all(after[path][1] > when for path, (_, when) in before[name].items())
        made_from = json.loads(Processed("tiny").spots(name).uns["made_from"])
        assert made_from["format"] == preprocess_module.FORMAT
    assert not (Processed("tiny").sections()["digest"] == table["digest"]).any()


def test_a_section_of_the_first_format_is_made_again_and_the_others_are_not(copy, read):
    """Version 1 kept no digest of the patches: nothing may be read from such a file."""
    root, raw = copy
    path = root / "GSE/tiny/processed/A1.h5ad"
    adata = anndata.read_h5ad(path)
    del adata.uns["patches_digest"]
    adata.uns["made_from"] = json.dumps(json.loads(adata.uns["made_from"]) | {"format": 1})
    adata.write_h5ad(path)
    before = files_of_all(root)
    run(raw)
    assert read == [counts_file(raw, "A1")]
    assert (section_files(root, "B1"), section_files(root, "C1")) == (before["B1"], before["C1"])
    assert len(Processed("tiny").patches("A1")) == 24


def test_the_digest_of_a_section_names_what_it_was_made_from(copy):
    _, raw = copy
    before = Processed("tiny").sections()["digest"]
    assert before.is_unique
    rewrite_image(raw)
    run(raw)
    after = Processed("tiny").sections()["digest"]
    assert (after == before).tolist() == [False, True, True]
    run(raw, patch_px=8)
    assert not (Processed("tiny").sections()["digest"] == after).any()
    Image.fromarray(raw_section("A1")[2]).save(image_file(raw, "A1"))
    run(raw)
    pd.testing.assert_series_equal(Processed("tiny").sections()["digest"], before)


def rewrite_counts(raw):
    write_counts(raw, "A1", some_counts(36, 99), sorted(raw_section("A1")[0].index))


def rewrite_barcodes(raw):
    path = counts_file(raw, "A1").with_name("barcodes.tsv")
    path.write_text("\n".join(reversed(path.read_text().split())) + "\n")


def rewrite_features(raw):
    path = counts_file(raw, "A1").with_name("features.tsv")
    path.write_text(path.read_text().replace("GENE7", "OTHER"))


def rewrite_positions(raw):
    table = some_positions(seed=1)
    write_positions(positions_file(raw, "A1"),
                    table.assign(pxl_col_in_fullres=table["pxl_col_in_fullres"] + 3))


def rewrite_image(raw):
    Image.fromarray(an_image(HEIGHT, WIDTH, seed=99)).save(image_file(raw, "A1"))


CHANGES = [rewrite_counts, rewrite_barcodes, rewrite_features, rewrite_positions, rewrite_image]


@pytest.mark.parametrize("change", CHANGES)
def test_a_section_is_made_again_when_one_of_its_files_changed_and_the_others_are_not(copy, change):
    root, raw = copy
    before = {name: section_files(root, name) for name in SECTIONS}
    change(raw)
    run(raw)
    after = {name: section_files(root, name) for name in SECTIONS}
    for path, (_, when) in before["A1"].items():
        assert after["A1"][path][1] > when
    assert (after["B1"], after["C1"]) == (before["B1"], before["C1"])
    recorded = Processed("tiny").sections().loc["A1", "sha256"]
    assert sha256(counts_file(raw, "A1").with_name("barcodes.tsv")) in recorded


@pytest.mark.parametrize("lost", ["A1.h5ad", "A1.patches.npy"])
def test_half_of_a_section_is_no_section(copy, lost):
    root, raw = copy
    (root / "GSE/tiny/processed" / lost).unlink()
    run(raw)
    assert written(root) | {"A1.hvg_paper.npy", "A1.heg_paper.npy"} == FILES


@pytest.mark.parametrize(
    "change", [dict(patch_px=8), dict(min_counts=1), dict(pitch_um=200), dict(spot_um=100)])
def test_a_changed_setting_makes_the_sections_again(copy, change):
    root, raw = copy
    before = section_files(root, "B1")
    run(raw, **change)
    assert all(section_files(root, "B1")[path][1] > when for path, (_, when) in before.items())


@pytest.mark.parametrize("panel_type", ["hvg", "heg"])
def test_the_query_chooses_nothing_in_the_strict_protocol(copy, panel_type):
    root, raw = copy
    strict, paper = (root / f"GSE/tiny/processed/panel_{panel_type}{end}.csv"
                     for end in ("", "_paper"))
    before = strict.read_bytes(), paper.read_bytes()
    query = root / "GSE/tiny/processed/C1.h5ad"
    changed = some_counts(36, seed=1234)
    changed[:, :40] = 0  # also genes that nothing in the query expresses
    write_counts(raw, "C1", changed, raw_section("C1")[0].index)
    query_before = query.read_bytes()
    run(raw, "--protocol", "paper")
    assert query.read_bytes() != query_before
    assert strict.read_bytes() == before[0]
    assert paper.read_bytes() != before[1]  # so the change was large enough to show


def test_a_reference_does_choose(copy):
    root, raw = copy
    before = (root / "GSE/tiny/processed/panel_heg.csv").read_bytes()
    rewrite_counts(raw)
    run(raw)
    assert (root / "GSE/tiny/processed/panel_heg.csv").read_bytes() != before


def test_corrected_expression_of_a_section_that_changed_is_not_left_to_be_used(copy):
    root, raw = copy
    rewrite_counts(raw)
    run(raw)
    stale = {"A1.hvg_paper.npy", "A1.heg_paper.npy"}
    assert written(root) == FILES - stale
    processed = Processed("tiny")
    with pytest.raises(InputError, match=r"A1\.heg_paper\.npy is missing"):
        processed.expression("A1", processed.panel("heg", "paper"))
    run(raw, "--protocol", "paper")
    assert written(root) == FILES


def test_corrected_expression_of_another_panel_is_not_left_when_the_correction_fails(
        copy, monkeypatch):
    root, raw = copy

    def fails(matrices):
        raise KeyboardInterrupt

    monkeypatch.setattr(expression, "harmonise", fails)
    with pytest.raises(KeyboardInterrupt):
        run(raw, "--protocol", "paper", n_hvg=5)
    assert written(root) == FILES - {f"{name}.hvg_paper.npy" for name in SECTIONS}


def test_a_panel_is_never_replaced_while_the_expression_of_the_earlier_one_is_there(
        copy, monkeypatch):
    root, raw = copy

    def fails(panel, path):
        if panel.protocol == "paper":
            raise KeyboardInterrupt

    monkeypatch.setattr(Panel, "write", fails)
    with pytest.raises(KeyboardInterrupt):
        run(raw, "--protocol", "paper")
    assert written(root) == FILES - {f"{name}.hvg_paper.npy" for name in SECTIONS}


# ------------------------------------------------------------------------- bad input


def edit_text(path, change):
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt") as file:
        text = file.read()
    with opened(path, "wt") as file:
        file.write(change(text))


def half(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def next_to_counts(raw, name, file):
    return counts_file(raw, name).with_name(file)


def replace_counts(raw, name, change):
    counts, _, _ = raw_section(name)
    write_counts(raw, name, change(counts.to_numpy().astype(float)), counts.index)


def set_first(value):
    def change(counts):
        counts[0, 0] = value
        return counts
    return change


def change_positions(raw, **columns):
    write_positions(positions_file(raw, "A1"), some_positions(1).assign(**columns))


BAD = {  # case: section, what happens to the raw folder, what the error says, the file it names
    "no matrix": ("A1", lambda raw: counts_file(raw, "A1").unlink(),
                  "no counts of section A1 found", "matrix.mtx"),
    "no barcodes": ("A1", lambda raw: next_to_counts(raw, "A1", "barcodes.tsv").unlink(),
                    "is missing", "barcodes.tsv"),
    "no positions": ("B1", lambda raw: positions_file(raw, "B1").unlink(),
                     "no positions of section B1 found", "tissue_positions_list_2.csv"),
    "no image": ("C1", lambda raw: image_file(raw, "C1").unlink(), "no image of section C1 found",
                 "image/C1.tif"),
    "truncated mtx": ("A1", lambda raw: half(counts_file(raw, "A1")), "damaged or incomplete",
                      "1/matrix.mtx"),
    "truncated mtx.gz": ("B1", lambda raw: half(counts_file(raw, "B1")), "damaged or incomplete",
                         "2/matrix.mtx.gz"),
    "corrupt mtx.gz": ("B1", lambda raw: flip(counts_file(raw, "B1")), "damaged or incomplete",
                       "2/matrix.mtx.gz"),
    "corrupt barcodes.gz": ("B1", lambda raw: half(next_to_counts(raw, "B1", "barcodes.tsv.gz")),
                            "damaged or incomplete", "2/barcodes.tsv.gz"),
    "truncated h5": ("C1", lambda raw: half(counts_file(raw, "C1")), "damaged or incomplete",
                     "C1_raw_feature_bc_matrix.h5"),
    "fewer barcodes than columns": (
        "A1",
        lambda raw: edit_text(next_to_counts(raw, "A1", "barcodes.tsv"), lambda text: text[:27]),
        "60 x 36 entries, but features.tsv has 60 genes and barcodes.tsv 3 barcodes",
        "1/matrix.mtx"),
    "fewer features than rows": (
        "B1", lambda raw: edit_text(next_to_counts(raw, "B1", "features.tsv.gz"),
                                    lambda text: text.split("\n")[0]),
        "60 x 36 entries, but features.tsv.gz has 1 genes", "2/matrix.mtx.gz"),
    "foreign barcodes": (
        "A1", lambda raw: edit_text(next_to_counts(raw, "A1", "barcodes.tsv"),
                                    lambda text: text.replace("SP", "XX")),
        "24 of 24 spots under tissue of", "tissue_positions_list_1.csv"),
    "nothing under tissue": (
        "A1", lambda raw: change_positions(raw, in_tissue=0),
        "no spot is under tissue", "tissue_positions_list_1.csv"),
    "barcode twice": (
        "A1", lambda raw: edit_text(next_to_counts(raw, "A1", "barcodes.tsv"),
                                    lambda text: text.replace("SPOT07", "SPOT08")),
        "barcode SPOT08-1 occurs more than once", "1/matrix.mtx"),
    "position twice": (
        "A1", lambda raw: edit_text(positions_file(raw, "A1"),
                                    lambda text: text.replace("SPOT07", "SPOT08")),
        "barcode SPOT08-1 occurs more than once", "tissue_positions_list_1.csv"),
    "gene id twice": (
        "B1", lambda raw: edit_text(next_to_counts(raw, "B1", "features.tsv.gz"),
                                    lambda text: text.replace("ENSG00007", "ENSG00008")),
        "gene id ENSG00008 occurs more than once", "2/matrix.mtx.gz"),
    "normalised values": ("A1", lambda raw: replace_counts(raw, "A1", np.log1p), "not counts",
                          "1/matrix.mtx"),
    "a negative value": ("A1", lambda raw: replace_counts(raw, "A1", set_first(-1)), "not counts",
                         "1/matrix.mtx"),
    "truncated positions": (
        "A1", lambda raw: edit_text(positions_file(raw, "A1"), lambda text: text[:-30]),
        "is incomplete", "tissue_positions_list_1.csv"),
    "a web page for positions": (
        "A1", lambda raw: positions_file(raw, "A1").write_text("<html>404</html>"),
        "not a position file", "tissue_positions_list_1.csv"),
    "spots at one place": (
        "A1", lambda raw: change_positions(raw, pxl_row_in_fullres=50, pxl_col_in_fullres=50),
        "at the place of another one", "tissue_positions_list_1.csv"),
    "a text file for an image": ("C1", lambda raw: image_file(raw, "C1").write_text("404"),
                                 "cannot be read as an image", "image/C1.png"),
    "truncated tif": ("A1", lambda raw: half(image_file(raw, "A1")), "cannot be read as an image",
                      "image/A1.tif"),
    "truncated tif.gz": ("B1", lambda raw: half(image_file(raw, "B1")),
                         "cannot be read as an image", "image/B1.tif.gz"),
    "truncated png": ("C1", lambda raw: half(image_file(raw, "C1")), "cannot be read as an image",
                      "image/C1.png"),
    "the wrong image": (
        "C1", lambda raw: Image.fromarray(an_image(80, 80)).save(image_file(raw, "C1")),
        "which has 80 x 80 pixels", "image/C1.png"),
}


def assert_nothing_happens(root, raw, says, names, first, **changes):
    """A run fails with an error that says this, and changes no file, over earlier results or none.

    Over none, of the section alone: another that is prepared at the same time is finished.
    """
    before = snapshot(root)
    for flags in ([], ["--section", first]):
        if flags:
            shutil.rmtree(root)
            before = {}
        with pytest.raises(InputError) as error:
            run(raw, *flags, first=first, **changes)
        assert says in str(error.value)
        assert names in str(error.value)
        assert "\n" not in str(error.value)
        assert snapshot(root) == before
    return str(error.value)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_changes_no_file(copy, case):
    section, damage, says, names = BAD[case]
    damage(copy[1])
    message = assert_nothing_happens(*copy, says, names, first=section)
    assert str(copy[1]) in message


@pytest.mark.parametrize(("change", "says", "names"), [
    (lambda sections: [dataclasses.replace(sections[0], n_spots=25), *sections[1:]],
     "gives 24 spots under tissue, but A1 has 25", "1/matrix.mtx"),
    (lambda sections: [dataclasses.replace(sections[0], image=["image/?1.*"]), *sections[1:]],
     "3 files match image/?1.* for the image of section A1", "image/B1.tif.gz"),
], ids=["expected number of spots", "ambiguous pattern"])
def test_files_that_contradict_the_stated_facts_change_no_file(copy, change, says, names):
    assert_nothing_happens(*copy, says, names, first="A1", sections=change(dataset().sections))


def test_a_min_counts_that_no_spot_reaches_changes_no_file(copy):
    assert_nothing_happens(*copy, "has 1000000 counts or more", "1/matrix.mtx", first="A1",
                           min_counts=1_000_000)


def test_a_wrong_folder_is_named_with_the_way_out_and_changes_no_file(copy):
    root, raw = copy
    message = assert_nothing_happens(root, raw / "nowhere", "is not a folder", "nowhere",
                                     first="A1")
    assert "--raw" in message


def test_a_folder_with_other_files_is_named_with_the_way_out_and_changes_no_file(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    message = assert_nothing_happens(copy[0], tmp_path / "empty", "no counts of section A1 found",
                                     "empty", first="A1")
    assert "--raw" in message


@pytest.mark.parametrize(("change", "says"), [
    (lambda sections: [*sections, sections[0]], "section A1 is named twice"),
    (lambda sections: [dataclasses.replace(sections[0], role="test")], "role 'test' is neither"),
    (lambda sections: sections[2:], "no section has the role 'reference'")])
def test_a_dataset_that_contradicts_itself_is_refused_before_any_file_is_read(change, says):
    with pytest.raises(InputError, match=says):
        dataset(sections=change(dataset().sections))


def test_sections_without_a_gene_in_common_have_no_panel(copy):
    root, raw = copy
    counts, _, _ = raw_section("A1")
    write_counts(raw, "A1", counts.to_numpy(), counts.index, ids=[f"MOUSE{i}" for i in range(60)])
    before = {name: (root / "GSE/tiny/processed" / name).read_bytes() for name in written(root)
              if "panel" in name}
    with pytest.raises(InputError, match=r"the hvg panel of A1, B1 is empty.*same gene ids"):
        run(raw)
    assert before == {name: (root / "GSE/tiny/processed" / name).read_bytes() for name in before}
    assert written(root) <= FILES


@pytest.mark.parametrize("positions_of", ["151507", "151669"])
def test_the_matrix_of_another_cortex_section_under_151507s_name_is_refused(
        real_data, tmp_path, monkeypatch, positions_of):
    """Only 151669's matrix in the place of 151507's gives the published spatialLIBD_1 sizes."""
    under(tmp_path / "root", monkeypatch)
    cortex, raw = real_data("spatialLIBD"), tmp_path / "raw"
    positions = cortex / "151669/tissue_positions_list.txt"
    table = pd.read_csv(positions, header=None)
    barcodes = table.loc[table[1] == 1, 0].tolist()
    write_h5(raw / "151507_filtered_feature_bc_matrix.h5", np.ones((len(barcodes), 2), int),
             barcodes, ["E1", "E2"], ["A", "B"])
    (raw / "151507").mkdir()
    shutil.copy(cortex / positions_of / "tissue_positions_list.txt", raw / "151507")
    Image.fromarray(an_image(20, 30)).save(raw / "151507_full_image.tif")
    says = "gives 3661 spots under tissue, but 151507 has 4226"
    if positions_of == "151507":
        says = " of 4,226 spots under tissue .* have no counts"
    with pytest.raises(InputError, match=says) as error:
        preprocess(preprocess_spatialLIBD_1.DATASET, ["--raw", str(raw)])
    assert "151507_filtered_feature_bc_matrix.h5" in str(error.value)
    assert snapshot(tmp_path / "root") == {}


def test_the_matrix_of_a_smaller_section_under_anothers_name_is_refused(copy):
    root, raw = copy
    counts, table, _ = raw_section("A1")
    under_tissue = table.index[table["in_tissue"] == 1][:-5]
    write_counts(raw, "A1", counts.loc[under_tissue].to_numpy(), under_tissue)
    assert_nothing_happens(root, raw, "5 of 24 spots under tissue of", "1/matrix.mtx", first="A1")


# ------------------------------------------------------------------------- the machine fails


def as_script(root, raw, flags, kill):
    """Preprocess as a script does, below `root`, after `kill` was called."""
    for module in (dataset_module, preprocess_module):
        module.ROOT = root
    kill()
    command.run(lambda: run(raw, *flags))


def ends_with(main, largest_file=None):
    """The line that a script of this main() exits with. largest_file: bytes, for a full disk."""
    handler, limits = signal.getsignal(signal.SIGTERM), resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limits[1]))
    try:
        with pytest.raises(SystemExit) as end:
            command.run(main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGTERM, handler)
    assert "\n" not in end.value.code  # text: Python prints it to stderr and exits with 1
    return end.value.code


@pytest.mark.parametrize("full_at", ["patches", "expression"])
def test_a_full_disk_ends_in_one_line_and_damages_nothing(copy, full_at):
    root, raw = copy
    patches, section = (root / f"GSE/tiny/processed/A1.{end}" for end in ("patches.npy", "h5ad"))
    assert patches.stat().st_size + 4096 < section.stat().st_size
    limit = patches.stat().st_size + (-4096 if full_at == "patches" else 4096)
    rewrite_counts(raw)
    before = snapshot(root)

    message = ends_with(lambda: run(raw), limit)
    assert message.startswith("error: the disk is full")
    assert snapshot(root) == before


def kill_when_called(function, number, call=1):
    """Have this process get a signal at the n-th call of a function, which then goes on."""
    module, name = function.rsplit(".", 1)
    module, calls = importlib.import_module(module), itertools.count(1)
    original = getattr(module, name)

    def killed(*arguments):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments)

    setattr(module, name, killed)


def test_a_terminated_run_finishes_the_sections_it_has_begun(copy):
    root, raw = copy
    shutil.rmtree(root)
    kill = partial(kill_when_called, "heclip.slide.repeat_edge", signal.SIGTERM)
    done = Fresh(as_script, root, raw, [], kill).wait()
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == ""
    begun = {line.split(":")[0] for line in done.stdout.splitlines()}
    assert written(root) == {f"{name}.{end}" for name in begun for end in ("h5ad", "patches.npy")}


@pytest.mark.parametrize(("function", "call", "may_exist"), [
    ("heclip.slide.repeat_edge", 1, set()),  # while the patches are written
    ("os.replace", 2, {"A1.patches.npy"}),  # between the renaming of a section's two files
])
def test_after_a_run_was_killed_outright_the_next_one_completes_all(
        copy, made, function, call, may_exist):
    root, raw = copy
    shutil.rmtree(root)
    kill = partial(kill_when_called, function, signal.SIGKILL, call)
    done = Fresh(as_script, root, raw, ["--section", "A1"], kill).wait()
    assert done.returncode == -signal.SIGKILL
    left = written(root)
    assert any(name.endswith(".part") for name in left)
    assert {name for name in left if not name.endswith(".part")} == may_exist

    run(raw, "--protocol", "paper")
    assert written(root) == FILES
    for name in SECTIONS:
        undisturbed, completed = (base / "GSE/tiny/processed" for base in (made[0], root))
        assert (completed / f"{name}.patches.npy").read_bytes() == (
            undisturbed / f"{name}.patches.npy").read_bytes()
        one, two = (anndata.read_h5ad(folder / f"{name}.h5ad")
                    for folder in (undisturbed, completed))
        assert (one.X != two.X).nnz == 0
        assert one.uns["made_from"] == two.uns["made_from"]


def test_two_runs_at_once_do_the_work_once_and_give_the_files_of_one(
        copy, made, monkeypatch, when_waiting):
    root, raw = copy
    shutil.rmtree(root)
    begun, go_on, reads = threading.Event(), threading.Event(), []
    original = preprocess_module.read_section

    def read_section(dataset, section, files):
        reads.append(section.name)
        if not begun.is_set():
            begun.set()
            go_on.wait(60)
        return original(dataset, section, files)

    monkeypatch.setattr(preprocess_module, "read_section", read_section)
    first = threading.Thread(target=run, args=(raw, "--section", "A1"))
    first.start()
    begun.wait(60)
    stderr = when_waiting(go_on.set)
    try:
        run(raw, "--protocol", "paper")
    finally:
        go_on.set()
        first.join()
    assert sorted(reads) == ["A1", "B1", "C1"]
    assert "A1.h5ad: another process is writing it; waiting" in stderr.getvalue()
    assert written(root) == FILES
    for name in FILES:
        alone, together = (base / "GSE/tiny/processed" / name for base in (made[0], root))
        if name.endswith(".h5ad"):
            one, two = (anndata.read_h5ad(path) for path in (alone, together))
            assert (one.X != two.X).nnz == 0
            assert one.uns["made_from"] == two.uns["made_from"]
        else:
            assert together.read_bytes() == alone.read_bytes()


def test_a_slide_is_unpacked_to_a_file_of_this_run_only(copy, monkeypatch):
    root, raw = copy
    unpacked, original = [], slide.vendor
    monkeypatch.setattr(slide, "vendor", lambda file: (unpacked.append(file), original(file))[1])
    for _ in range(2):
        shutil.rmtree(root)
        run(raw, "--section", "B1")
    assert len(set(unpacked)) == 2
    assert {path.suffix for path in unpacked} == {".part"}
    assert written(root) == {"B1.h5ad", "B1.patches.npy"}


def test_a_users_mistake_ends_in_one_line(copy):
    message = ends_with(lambda: run(copy[1] / "nowhere"))
    assert message.startswith("error: ")
    assert "nowhere is not a folder" in message


def test_the_record_of_a_section_can_be_read_without_this_package(made):
    adata = anndata.read_h5ad(made[0] / "GSE/tiny/processed/A1.h5ad")
    assert set(json.loads(adata.uns["made_from"])["files"]) == {
        "matrix.mtx", "barcodes.tsv", "features.tsv", "tissue_positions_list_1.csv", "A1.tif"}
