"""sheet.py, preprocess_custom.py: the processed files are the same whatever form a section has."""

import json
import re
import warnings
from dataclasses import replace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from PIL import Image
from test_preprocess import GENES, HEIGHT, STEP, SYMBOLS, WIDTH, raw_section, snapshot, under
from test_slide import obvious_patches
from test_sources import write_h5, write_mtx, write_positions

import preprocess_custom
from heclip import figures, sheet
from heclip.dataset import Processed
from heclip.files import InputError

SECTIONS = {"A1": "reference", "C1": "query"}
PATCH = 16
SMALL = ["--n_hvg", "8", "--n_heg", "12", "--patch_px", str(PATCH)]
FACTORS = {"tissue_hires_scalef": 0.5, "tissue_lowres_scalef": 0.25, "spot_diameter_fullres": 11.0}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Where every stage writes; without the pictures to check by eye, which take most time."""
    under(tmp_path / "root", monkeypatch)
    monkeypatch.setattr(sheet, "ROOT", tmp_path / "root")
    monkeypatch.setattr(figures, "spots_over_slide", lambda *_: None)
    return tmp_path / "root"


def write_sheet(folder, rows, separator=","):
    """rows: section -> dict of cells; donor and role are filled in."""
    rows = [{"section": name, "donor": "D", "role": SECTIONS.get(name, "reference")} | cells
            for name, cells in rows.items()]
    path = folder / "mine.csv"
    pd.DataFrame(rows).to_csv(path, index=False, sep=separator)
    return path


def run(path, *flags):
    preprocess_custom.main([str(path), *SMALL, *flags])


def write_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def to_anndata(name, ids="index"):
    """A section as others store it. ids: in var's index with a column of symbols, or a column."""
    counts, table, _ = raw_section(name)
    spots = table.loc[counts.index]
    var = pd.DataFrame({"gene_symbols": SYMBOLS}, index=GENES) if ids == "index" else (
        pd.DataFrame({"gene_ids": GENES}, index=pd.Index(SYMBOLS)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Variable names are not unique")
        return anndata.AnnData(scipy.sparse.csr_matrix(counts.to_numpy(np.float32)), var=var,
                               obs=spots[["in_tissue", "array_row", "array_col"]],
                               obsm={"spatial": spots[["pxl_col_in_fullres",
                                                       "pxl_row_in_fullres"]].to_numpy(float)})


# ---------------------------------------------------------------- the same section in every form
# Each writes one section below a folder, and returns its cells of the sheet.


def space_ranger(folder, name, positions="tissue_positions_list.csv", header=False, matrix="h5",
                 prefix="", outs="outs"):
    counts, table, image = raw_section(name)
    top = folder / f"{name} [1]" / outs
    if matrix == "h5":
        write_h5(top / f"{prefix}filtered_feature_bc_matrix.h5", counts, counts.index, GENES,
                 SYMBOLS)
    else:
        write_mtx(top / f"{prefix}filtered_feature_bc_matrix", counts.to_numpy(), counts.index,
                  GENES, SYMBOLS, suffix=".gz")
    write_positions(top / "spatial" / f"{prefix}{positions}", table.reset_index(), header)
    (top / "spatial" / "scalefactors_json.json").write_text(json.dumps(FACTORS))
    write_image(top / "spatial" / "tissue_hires_image.png", image[::2, ::2])
    write_image(folder / f"{name}.tif", image)
    return {"counts": f"{name} [1]/outs", "image": f"{name}.tif"}


def visium_hd(folder, name):
    pytest.importorskip("pyarrow")
    _, table, _ = raw_section(name)
    cells = space_ranger(folder, name, outs="outs/binned_outputs/square_016um")
    bins = folder / f"{name} [1]" / "outs" / "binned_outputs" / "square_016um"
    (bins / "spatial" / "tissue_positions_list.csv").unlink()
    typed = table.reset_index().astype(
        {"in_tissue": np.uint8, "array_row": np.uint32, "array_col": np.uint32})
    typed.to_parquet(bins / "spatial" / "tissue_positions.parquet")
    (bins.parent / "square_002um").mkdir()
    return cells | {"bin": "16", "pitch": "100"}  # the lattice here is Visium's


def stated_files(folder, name):
    cells = space_ranger(folder, name)
    outs = f"{name} [1]/outs"
    return cells | {"counts": f"{outs}/filtered_feature_bc_matrix.h5",
                    "positions": f"{outs}/spatial/tissue_positions_list.csv"}


def one_flat_folder(folder, name):
    """As on GEO: all sections' files side by side, distinguished by how their names begin."""
    counts, table, image = raw_section(name)
    write_mtx(folder / "flat", counts.to_numpy(), counts.index, GENES, SYMBOLS,
              prefix=f"GSM_{name}_", suffix=".gz")
    write_positions(folder / "flat" / f"GSM_{name}_tissue_positions_list.csv.gz",
                    table.reset_index())
    write_image(folder / "flat" / f"{name}.png", image)
    return {"counts": f"flat/GSM_{name}_matrix.mtx.gz", "image": f"flat/{name}.png"}


def scanpy_file(folder, name):
    adata = to_anndata(name, ids="column")
    adata.layers["counts"], adata.X = adata.X.copy(), adata.X.log1p()
    adata.obs["in_tissue"] = adata.obs["in_tissue"].astype(bool)
    adata.write_h5ad(folder / f"{name}.h5ad")
    write_image(folder / f"{name}.tif", raw_section(name)[2])
    return {"counts": f"{name}.h5ad", "image": f"{name}.tif"}


def no_array(folder, name):
    """Without array_row and array_col: the pitch is measured."""
    adata = to_anndata(name)
    adata.obs = adata.obs[["in_tissue"]].astype(str).astype("category")
    adata.write_h5ad(folder / f"{name}.h5ad")
    write_image(folder / f"{name}.tif", raw_section(name)[2])
    return {"counts": f"{name}.h5ad", "image": f"{name}.tif"}


def hest(folder, name, image=True):
    top = folder / "hest"
    for part in ("st", "metadata", "patches"):
        (top / part).mkdir(parents=True, exist_ok=True)
    adata = to_anndata(name)
    adata.write_h5ad(top / "st" / f"{name}.h5ad")
    (top / "metadata" / f"{name}.json").write_text(
        json.dumps({"pixel_size_um_estimated": 3.0, "inter_spot_dist": 100}))
    if image:
        write_image(top / "wsis" / f"{name}.tif", raw_section(name)[2])
    return {"counts": "hest"}


def hest_patches(folder, name):
    """No slide, but patches as hestcore writes them: in another order, and only those on tissue."""
    cells = hest(folder, name, image=False)
    _, table, image = raw_section(name)
    table = table[table["in_tissue"] == 1].sample(frac=1, random_state=5)
    xy = table[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()
    with h5py.File(folder / "hest" / "patches" / f"{name}.h5", "w") as file:
        file["img"] = obvious_patches(image, xy, PATCH)
        file["coords"] = np.rint(xy).astype(np.int64) - PATCH // 2
        file.create_dataset("barcode", data=np.array(table.index, object)[:, None],
                            dtype=h5py.string_dtype())
    return cells


FORMS = {
    "Space Ranger 1": space_ranger,
    "Space Ranger 2": lambda *a: space_ranger(*a, positions="tissue_positions.csv", header=True),
    "a headed _list": lambda *a: space_ranger(*a, header=True),
    "mtx": lambda *a: space_ranger(*a, matrix="mtx"),
    "mtx with prefixes": lambda *a: space_ranger(*a, matrix="mtx", prefix=f"{a[1]}_"),
    "Visium HD": visium_hd, "files": stated_files, "flat folder": one_flat_folder,
    "scanpy": scanpy_file,
    "no array": no_array, "HEST": hest, "HEST patches": hest_patches}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The processed files of the plainest form."""
    folder = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as monkeypatch:
        under(folder / "root", monkeypatch)
        run(write_sheet(folder, {name: stated_files(folder, name) for name in SECTIONS}))
    return folder / "root"


@pytest.mark.parametrize("form", FORMS)
def test_a_section_gives_the_same_processed_files_in_every_form(
        root, expected, tmp_path, form, monkeypatch):
    run(write_sheet(tmp_path, {name: FORMS[form](tmp_path, name) for name in SECTIONS}))
    ours = Processed("mine")
    with monkeypatch.context() as there:
        under(expected, there)
        theirs = Processed("mine")
    for name in ("panel_hvg.csv", "panel_heg.csv"):
        assert (ours.folder / name).read_bytes() == (theirs.folder / name).read_bytes()
    for name in SECTIONS:
        assert ours.patches_path(name).read_bytes() == theirs.patches_path(name).read_bytes()
        one, two = ours.read(name), theirs.read(name)
        pd.testing.assert_frame_equal(one.var, two.var)
        pd.testing.assert_frame_equal(one.obs, two.obs[one.obs.columns])
        assert (one.X != two.X).nnz == (one.layers["counts"] != two.layers["counts"]).nnz == 0
        np.testing.assert_array_equal(one.obsm["spatial"], two.obsm["spatial"])
    table, other = ours.sections(), theirs.sections()
    assert table["mpp"].to_numpy() == pytest.approx(other["mpp"].to_numpy(), rel=1e-3)
    same = ["donor", "role", "n_spots", "n_genes", "patch_px", "crop_px"]
    pd.testing.assert_frame_equal(table[same], other[same])
    # And both are right, on a slide that is not square.
    _, raw, image = raw_section("A1")
    xy = raw.loc[one.obs_names if name == "A1" else ours.read("A1").obs_names,
                 ["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()
    np.testing.assert_array_equal(ours.patches("A1"), obvious_patches(image, xy, PATCH))
    assert table.loc["A1", "mpp"] == pytest.approx(100 / STEP, rel=1e-3)


def test_the_picture_to_check_by_eye_is_drawn_from_stored_patches_too(tmp_path, monkeypatch):
    under(tmp_path / "root", monkeypatch)
    run(write_sheet(tmp_path, {name: hest_patches(tmp_path, name) for name in SECTIONS}))
    assert (tmp_path / "root/figure/QC/mine/A1.jpg").stat().st_size > 10_000
    entry = Processed("mine").read("A1").uns["spatial"]["A1"]
    thumbnail, (_, table, image) = entry["images"]["hires"], raw_section("A1")
    x, y = table.loc[table["in_tissue"] == 1,
                     ["pxl_col_in_fullres", "pxl_row_in_fullres"]].round().astype(int).iloc[7]
    np.testing.assert_array_equal(thumbnail[y, x], image[y, x])
    assert entry["scalefactors"]["tissue_hires_scalef"] == 1


def test_a_spot_without_a_stored_patch_is_left_out(root, tmp_path):
    path = write_sheet(tmp_path, {name: hest_patches(tmp_path, name) for name in SECTIONS})
    with h5py.File(tmp_path / "hest/patches/A1.h5", "a") as file:
        kept = {key: file[key][2:] for key in file}
        for key, values in kept.items():
            del file[key]
            file[key] = values
    run(path)
    adata = Processed("mine").read("A1")
    assert adata.n_obs == len(Processed("mine").patches("A1")) == 22
    # the median is that of the spots that are left
    counts = adata.layers["counts"].toarray().astype(float)
    total = counts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(adata.X.toarray(), np.log1p(counts / total * np.median(total)),
                               rtol=1e-5)


@pytest.mark.parametrize(("damage", "says"), [
    (lambda file: file["coords"].__setitem__(slice(None), file["coords"][:][::-1]),
     "do not lie around"),
    (lambda file: file.__delitem__("barcode"), "not a file of patches"),
    (lambda file: file["barcode"].__setitem__(slice(None), [[f"x{i}"] for i in range(24)]),
     "24 of 24 spots under tissue have no patch in"),
    (lambda file: file["barcode"].__setitem__(0, file["barcode"][1]), "occurs more than once")])
def test_stored_patches_that_do_not_fit_are_refused(root, tmp_path, damage, says):
    path = write_sheet(tmp_path, {name: hest_patches(tmp_path, name) for name in SECTIONS})
    with h5py.File(tmp_path / "hest/patches/A1.h5", "a") as file:
        damage(file)
    with pytest.raises(InputError, match=says):
        run(path)
    assert not list(root.rglob("A1*"))


# -------------------------------------------------------------------- where files are looked for


def test_the_positions_of_another_section_are_not_taken_when_ones_own_are_absent(root, tmp_path):
    rows = {name: one_flat_folder(tmp_path, name) for name in SECTIONS}
    (tmp_path / "flat" / "GSM_A1_tissue_positions_list.csv.gz").unlink()
    with pytest.raises(InputError,
                       match=r"mine\.csv, A1: .*flat: no positions of its spots.*column positions"):
        run(write_sheet(tmp_path, rows))


def test_several_files_that_could_be_meant_are_named(root, tmp_path):
    rows = {name: one_flat_folder(tmp_path, name) for name in SECTIONS}
    rows["A1"]["counts"] = "flat"
    with pytest.raises(InputError,
                       match=r"GSM_A1_matrix.mtx.gz, GSM_C1_matrix.mtx.gz could each be meant"):
        run(write_sheet(tmp_path, rows))


@pytest.mark.parametrize(("size", "folder"),
                         [("", "008"), ("8", "008"), ("square_016um", "016"), ("2", "002")])
def test_bins_of_visium_hd_are_8_microns_unless_chosen(tmp_path, size, folder):
    pytest.importorskip("pyarrow")
    for um in ("002", "008", "016"):
        space_ranger(tmp_path, "A1", outs=f"outs/binned_outputs/square_{um}um")
    chosen = tmp_path / f"A1 [1]/outs/binned_outputs/square_{folder}um"
    path = write_sheet(tmp_path, {"A1": {"counts": "A1 [1]/outs", "bin": size, "image": "A1.tif"},
                                  "B1": {"counts": str(chosen), "image": "A1.tif"}})
    (by_column, by_folder), problems, _ = sheet.read_sheet(path)
    assert not problems
    assert by_column.counts == chosen / "filtered_feature_bc_matrix.h5"
    assert replace(by_column, name="B1") == by_folder
    assert by_column.pitch_um == float(folder)


def test_bins_that_are_not_there_are_an_error_that_lists_those_that_are(tmp_path):
    space_ranger(tmp_path, "A1", outs="outs/binned_outputs/square_008um")
    _, problems, _ = sheet.read_sheet(
        write_sheet(tmp_path, {"A1": {"counts": "A1 [1]/outs", "bin": "16"}}))
    assert "no bins of '16' microns, but square_008um" in problems[0]


def test_hests_own_pixel_size_counts_where_there_is_no_lattice(tmp_path):
    cells = hest(tmp_path, "A1")
    with_array, = sheet.read_sheet(write_sheet(tmp_path, {"A1": cells}))[0]
    assert (with_array.pitch_um, with_array.mpp) == (100, None)
    path = tmp_path / "hest/st/A1.h5ad"
    adata = anndata.read_h5ad(path)
    del adata.obs["array_row"]
    adata.write_h5ad(path)
    without, = sheet.read_sheet(write_sheet(tmp_path, {"A1": cells}))[0]
    assert (without.pitch_um, without.mpp) == (100, 3.0)
    stated, = sheet.read_sheet(write_sheet(tmp_path, {"A1": cells | {"mpp": "2.5"}}))[0]
    assert stated.mpp == 2.5
    pitched, = sheet.read_sheet(write_sheet(tmp_path, {"A1": cells | {"pitch": "200"}}))[0]
    assert (pitched.pitch_um, pitched.mpp, pitched.stated_mpp) == (200, None, 3.0)


@pytest.mark.parametrize("array", [True, False], ids=["lattice", "no lattice"])
def test_hests_pixel_size_is_compared_with_its_distance_of_spots(root, tmp_path, capsys, array):
    cells = hest(tmp_path, "A1")
    if not array:
        adata = to_anndata("A1")
        del adata.obs["array_row"]
        adata.write_h5ad(tmp_path / "hest/st/A1.h5ad")
    run(write_sheet(tmp_path, {"A1": cells}), "--check")
    used, source, other = (5, "the section's own files", 3) if array else (
        3, "neighbouring spots, if they are 100 µm apart,", 5)
    assert f"to be {used} µm wide, but {source} say {other}" in capsys.readouterr().out


@pytest.mark.parametrize("first", ["sep=,\n", '"sep=,"\n'])
def test_excels_own_first_line_is_passed_over(tmp_path, first):
    path = write_sheet(tmp_path, {"A1": stated_files(tmp_path, "A1") | {"donor": ""}})
    path.write_text(first + path.read_text())
    sections, problems, _ = sheet.read_sheet(path)
    assert [section.name for section in sections] == ["A1"]
    assert len(problems) == 1  # about the donor
    path.write_text(path.read_text().replace("A1", "A1,extra,cells,and,more,cells,and,more", 1))
    with pytest.raises(InputError, match="line 3 has"):
        sheet.read_sheet(path)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_sheet_from_any_spreadsheet_is_read(tmp_path, separator):
    path = write_sheet(tmp_path, {name: stated_files(tmp_path, name) | {"Age": "7"}
                                  for name in SECTIONS}, separator)
    path.write_text(
        "\ufeff" + path.read_text().replace("section", " Section ", 1) + separator * 3 + "\n\n")
    sections, problems, ignored = sheet.read_sheet(path)
    assert [section.name for section in sections] == list(SECTIONS)
    assert (problems, ignored) == ([], ["age"])


@pytest.mark.parametrize(("text", "says"), [
    ("", "lacks the column section, counts, donor, role"),
    ("section,counts,role\n", "lacks the column donor"),
    ("section,counts,donor,role\n", "lists no section"),
    ("section,counts,donor,role\nA,b,c,d,e\n", "line 2 has 5"),
    ("section,role,counts,donor,role\n", "stands twice"),
    (b"\xff\xfe\x00\xd8", "cannot be read as a sample sheet")])
def test_an_unreadable_sheet_is_one_error(tmp_path, text, says):
    path = tmp_path / "mine.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=says) as error:
        sheet.read_sheet(path)
    assert str(path) in str(error.value)


# ------------------------------------------------------------------------- resolution


@pytest.mark.parametrize(("scale", "factor"), [("hires", 0.5), ("lowres", 0.25), ("0.5", 0.5)])
def test_positions_are_scaled_to_a_smaller_image(root, tmp_path, scale, factor):
    rows, step = {name: space_ranger(tmp_path, name) for name in SECTIONS}, round(1 / factor)
    for name, cells in rows.items():
        write_image(tmp_path / f"{name}.tif", raw_section(name)[2][::step, ::step])
        cells["scale"] = scale
    run(write_sheet(tmp_path, rows), "--patch_px", "4")
    adata = Processed("mine").read("A1")
    _, table, image = raw_section("A1")
    xy = table.loc[adata.obs_names,
                   ["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy() * factor
    np.testing.assert_allclose(adata.obsm["spatial"], xy)
    np.testing.assert_array_equal(Processed("mine").patches("A1"),
                                  obvious_patches(image[::step, ::step], xy, 4))
    assert Processed("mine").sections().loc["A1", "mpp"] == pytest.approx(100 / STEP / factor)


def test_an_anndatas_own_scale_factors_are_used(root, tmp_path):
    adata = to_anndata("A1")
    adata.uns["spatial"] = {"lib": {"scalefactors": FACTORS}}
    adata.write_h5ad(tmp_path / "A1.h5ad")
    write_image(tmp_path / "A1.png", raw_section("A1")[2][::2, ::2])
    section, = sheet.read_sheet(write_sheet(
        tmp_path, {"A1": {"counts": "A1.h5ad", "image": "A1.png", "scale": "hires"}}))[0]
    assert section.scale == 0.5


def test_patches_in_microns_are_alike_at_any_resolution(root, tmp_path):
    """The same section scanned twice as finely: other pixels, the same tissue."""
    counts, table, image = raw_section("A1")
    # so coarse that resampling shows little
    image = np.repeat(np.repeat(image[::8, ::8], 8, axis=0), 8, axis=1)
    for name, factor in (("A1", 1), ("C1", 2)):
        write_h5(tmp_path / f"{name}.h5", counts + factor, counts.index, GENES, SYMBOLS)
        pixels = ["pxl_row_in_fullres", "pxl_col_in_fullres"]
        write_positions(tmp_path / f"{name}.csv",
                        table.assign(**table[pixels].round() * factor).reset_index())
        write_image(tmp_path / f"{name}.tif",
                    np.repeat(np.repeat(image, factor, axis=0), factor, axis=1))
    rows = {name: {"counts": f"{name}.h5", "positions": f"{name}.csv", "image": f"{name}.tif"}
            for name in SECTIONS}
    run(write_sheet(tmp_path, rows), "--patch_um", "80")
    table = Processed("mine").sections()
    assert table["mpp"].tolist() == pytest.approx([5, 2.5], rel=0.01)
    assert table["crop_px"].tolist() == [16, 32]
    assert (table["patch_px"] == PATCH).all()
    coarse, fine = (Processed("mine").patches(name).astype(float) for name in SECTIONS)
    assert coarse.shape == fine.shape == (24, PATCH, PATCH, 3)
    assert np.abs(coarse - fine).mean() < 0.1 * np.abs(coarse - fine[::-1]).mean()


def test_stored_patches_are_cut_to_microns_and_never_enlarged_beyond_their_tissue(root, tmp_path):
    path = write_sheet(tmp_path, {name: hest_patches(tmp_path, name) for name in SECTIONS})
    run(path, "--patch_um", "40", "--patch_px", "8")  # 8 of the 16 pixels, at 5 um each
    adata = Processed("mine").read("A1")
    image = raw_section("A1")[2]
    np.testing.assert_array_equal(Processed("mine").patches("A1"),
                                  obvious_patches(image, adata.obsm["spatial"], 8))
    with pytest.raises(InputError, match="patches show 80 µm, less than --patch_um 100"):
        run(path, "--patch_um", "100")


# ------------------------------------------------------------------------- genes


def genes(**symbols):
    return pd.DataFrame({"symbol": list(symbols.values())},
                        index=pd.Index(list(symbols), name="gene_id"))


def versioned(table, version):
    return table.set_axis(table.index + f".{version}")


A = genes(ENSG1="ACTB", ENSG2="MATR3", ENSG3="MATR3", ENSG4="PAX7")


def test_versions_of_ensembl_ids_are_left_out_only_where_they_keep_sections_apart():
    same = {"A": versioned(A, 1), "B": versioned(A.iloc[:3], 1)}
    assert sheet.agree(same) == ({"A": {}, "B": {}}, [])
    new, report = sheet.agree({"A": versioned(A, 1), "B": versioned(A, 2), "C": A.iloc[1:]})
    assert new["A"]["ENSG4.1"] == new["B"]["ENSG4.2"] == "ENSG4"
    assert new["C"] == {}
    assert "share 3 genes without them, 0 with them" in report[0]


def test_an_id_that_would_occur_twice_keeps_its_version():
    twice = pd.concat(
        [versioned(A.iloc[:1], 1), versioned(A.iloc[:1], 2), versioned(A.iloc[1:], 1)])
    new, _ = sheet.agree({"A": twice, "B": A})
    assert set(new["A"]) == {"ENSG2.1", "ENSG3.1", "ENSG4.1"}


def test_symbols_bridge_to_ids_only_where_they_stand_for_one_gene():
    by_symbol = genes(**{symbol: symbol for symbol in ("ACTB", "MATR3", "PAX7", "NEW1")})
    new, report = sheet.agree({"A": A, "B": by_symbol})
    # MATR3 is two genes, NEW1 none
    assert new == {"A": {}, "B": {"ACTB": "ENSG1", "PAX7": "ENSG4"}}
    assert "B names genes by symbol alone: 2 of its 4" in report[0]
    # Another section that means another gene by a symbol makes it ambiguous everywhere.
    new, _ = sheet.agree({"A": A, "B": by_symbol, "C": genes(ENSG1="ACTB", ENSG9="PAX7")})
    assert new["B"] == {"ACTB": "ENSG1"}
    # Two symbols for one gene, an old and a new one, cannot both become its id.
    new, _ = sheet.agree(
        {"A": A, "B": genes(ACTB="ACTB", PAX7="PAX7", PAX7B="PAX7B"), "C": genes(ENSG4="PAX7B")})
    assert new["B"] == {"ACTB": "ENSG1"}


def test_sections_that_all_name_genes_by_symbol_are_left_alone():
    assert sheet.agree({"A": genes(ACTB="ACTB"), "B": genes(ACTB="ACTB", PAX7="PAX7")}) == (
        {"A": {}, "B": {}}, [])


@pytest.mark.parametrize("first", ["ids", "symbols"])
def test_sections_with_versions_symbols_or_plain_ids_have_one_panel(root, tmp_path, first, capsys):
    """Alike counts under three namings: panels and expression by id, whichever comes first."""
    counts, table, image = raw_section("A1")
    namings = {"A1": ([f"{gene}.3" for gene in GENES], SYMBOLS), "C1": (GENES, SYMBOLS),
               "S1": ([f"{symbol}{'-1' if symbol in SYMBOLS[:i] else ''}"
                       for i, symbol in enumerate(SYMBOLS)],) * 2}
    for number, (name, (ids, symbols)) in enumerate(namings.items()):
        write_h5(tmp_path / f"{name}.h5", counts + number, counts.index, ids, symbols)
        write_image(tmp_path / f"{name}.tif", image ^ number)
    write_positions(tmp_path / "spots.csv", table.reset_index())
    order = sorted(namings, reverse=first == "symbols")
    path = write_sheet(tmp_path, {name: {"counts": f"{name}.h5", "positions": "spots.csv",
                                         "image": f"{name}.tif"} for name in order})
    run(path)
    said = capsys.readouterr().out
    assert "share 60 genes without them, 0 with them" in said
    # GENE0 and GENE1 occur twice, and so does -1
    assert "S1 names genes by symbol alone: 56 of its 60" in said
    assert "56 genes are in every section" in said
    panel = Processed("mine").panel("heg")
    assert set(panel.ids) <= set(GENES[2:58])
    matrices = [Processed("mine").read(name)[:, panel.ids].layers["counts"].toarray()
                for name in namings]
    np.testing.assert_array_equal(matrices[0], matrices[1] - 1)
    np.testing.assert_array_equal(matrices[0], matrices[2] - 2)

    before = snapshot(root)
    # a job of its own comes to the same names, and makes nothing again
    run(path, "--section", "S1")
    assert snapshot(root) == before


def test_a_section_that_joins_the_sheet_changes_the_ids_of_those_it_must(root, tmp_path):
    counts, table, image = raw_section("A1")
    for number, (name, end) in enumerate((("A1", ".3"), ("C1", ".3"), ("D1", ""))):
        write_h5(tmp_path / f"{name}.h5", counts + number, counts.index,
                 [gene + end for gene in GENES], SYMBOLS)
        write_image(tmp_path / f"{name}.tif", image ^ number)
    write_positions(tmp_path / "spots.csv", table.reset_index())
    rows = {name: {"counts": f"{name}.h5", "positions": "spots.csv", "image": f"{name}.tif"}
            for name in ("A1", "C1", "D1")}
    run(write_sheet(tmp_path, {name: rows[name] for name in SECTIONS}))
    assert Processed("mine").read("A1").var_names[0] == "ENSG00000.3"
    run(write_sheet(tmp_path, rows))
    assert Processed("mine").read("A1").var_names[0] == "ENSG00000"
    assert len(Processed("mine").panel("heg")) == 12


# ------------------------------------------------------------------------- --check


def test_check_shows_what_there_is_and_writes_nothing(root, tmp_path, capsys):
    path = write_sheet(tmp_path, {"A1": space_ranger(tmp_path, "A1") | {"age": 7},
                                  "C1": hest_patches(tmp_path, "C1")})
    before = snapshot(tmp_path)
    run(path, "--check")
    assert snapshot(tmp_path) == before
    said = capsys.readouterr().out
    total = raw_section("A1")[0].sum(axis=1)[raw_section("A1")[1]["in_tissue"] == 1]
    for fact in ("reference", "query", "24", "60", f"{round(np.median(total))}", "5", "80",
                 f"{WIDTH} x {HEIGHT}", "csv, no header", "24 of 24", "h5ad", "patches of 16 px"):
        assert fact in said
    assert "60 genes are in every section" in said
    assert "columns not used: age" in said
    assert "?" not in said
    assert "warning: C1: a pixel is taken to be 5 µm wide, but the section's own files" in said
    assert "Nothing must be fixed, but read the warnings" in said


def test_check_finds_everything_that_is_wrong_at_once_and_writes_nothing(root, tmp_path, capsys):
    rows = {name: stated_files(tmp_path, name) for name in ("A1", "C1")}
    good = rows["A1"]
    counts, table, image = raw_section("A1")
    write_mtx(tmp_path / "logged", np.log1p(counts.to_numpy()), counts.index, GENES, SYMBOLS)
    write_h5(tmp_path / "mouse.h5", counts, counts.index, [f"MOUSE{i}" for i in range(60)], SYMBOLS)
    write_positions(tmp_path / "elsewhere.csv", table.assign(in_tissue=0).reset_index())
    one_place = table.assign(pxl_row_in_fullres=90, pxl_col_in_fullres=90)
    write_positions(tmp_path / "one_place.csv", one_place.reset_index())
    write_image(tmp_path / "gone.tif", image).write_bytes(b"II*\0")
    bad = {
        "C1": {"role": "test"}, "no counts": {"counts": "nowhere"}, "empty": {"counts": ""},
        "no positions": {"positions": "nowhere.csv"}, "no image": {"image": ""},
        "no donor": {"donor": ""}, "a/b": {}, "mpp": {"mpp": "half"}, "scale": {"scale": "big"},
        "logged": {"counts": "logged/matrix.mtx"},
        "outside": {"image": "A1 [1]/outs/spatial/tissue_hires_image.png"},
        "off tissue": {"positions": "elsewhere.csv"}, "one place": {"positions": "one_place.csv"},
        "damaged": {"image": "gone.tif"}, "mouse": {"counts": "mouse.h5"}}
    path = write_sheet(tmp_path, {"A1": good} | {name: good | cells for name, cells in bad.items()})
    path.write_text(path.read_text() + "A1,D,reference\n")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=r"to fix, listed above\. Nothing was written"):
        run(path, "--check")
    assert snapshot(tmp_path) == before
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()
             and ". " in line[:4]]
    for section, says in [
            ("C1", "role 'test' is neither"), ("no counts", "nowhere is missing: its counts"),
            ("empty", "counts are empty"),
            ("no positions", "nowhere.csv is missing: its positions"),
            ("no image", "its image is empty"),
            ("no donor", "its donor is empty"), ("a/b", "cannot be the name of a file"),
            ("mpp", "mpp is 'half'"),
            ("scale", "scale is 'big'"), ("logged", "not counts"),
            ("outside", "With hires in the column scale all"),
            ("off tissue", "no spot is under tissue"), ("one place", "at the place of another one"),
            ("damaged", "cannot be read as an image"),
            ("A1", "another line names too")]:
        assert any(f". {section}: " in line and says in line for line in lines), section
    assert any("no gene is in all of them" in line for line in lines)
    assert [int(line.split(".")[0]) for line in lines] == list(range(1, len(lines) + 1))
    with pytest.raises(InputError, match=r"mine\.csv, .* more: --check lists them all"):
        run(path)
    assert not root.exists()


def test_check_suggests_microns_where_patches_show_different_widths(root, tmp_path, capsys):
    rows = {name: stated_files(tmp_path, name) for name in SECTIONS}
    rows["C1"]["pitch"] = "200"
    path = write_sheet(tmp_path, rows)
    run(path, "--check")
    assert "a patch shows 80 µm of A1 and 160 µm of C1: --patch_um 80" in capsys.readouterr().out
    run(path, "--check", "--patch_um", "80")
    assert "a patch shows" not in capsys.readouterr().out


def test_an_mpp_that_the_lattice_contradicts_is_noted(root, tmp_path, capsys):
    rows = {name: stated_files(tmp_path, name) | {"mpp": "2.5"} for name in SECTIONS}
    run(write_sheet(tmp_path, rows), "--check")
    said = capsys.readouterr().out
    assert ("a pixel is taken to be 2.5 µm wide, but neighbouring spots, if they are 100 µm apart, "
            "say 5.") in said


def test_a_mirrored_lattice_is_said_by_check_and_preprocess_and_recorded(root, tmp_path, capsys):
    rows = {name: scanpy_file(tmp_path, name) for name in SECTIONS}
    path = tmp_path / rows["A1"]["counts"]
    adata = anndata.read_h5ad(path)
    adata.obsm["spatial"] = adata.obsm["spatial"][:, ::-1]
    adata.write_h5ad(path)
    square = np.pad(raw_section("A1")[2], ((0, 60), (0, 60), (0, 0)), mode="edge")
    write_image(tmp_path / rows["A1"]["image"], square)
    sheet_path = write_sheet(tmp_path, rows)
    run(sheet_path, "--check")
    assert "- warning: A1: its spots are a mirror image of the array" in capsys.readouterr().out
    run(sheet_path)
    said = capsys.readouterr().out
    assert said.count("mirror image") == 1
    assert "warning: A1: its spots are a mirror image of the array" in said
    notes = {name: Processed("mine").spots(name).uns["spatial"][name]["metadata"]["notes"]
             for name in SECTIONS}
    assert notes["A1"].startswith("its spots are a mirror image")
    assert notes["C1"] == ""


@pytest.mark.parametrize(("facts", "cells", "expected"), [
    ({"bin_size_um": 8.0, "microns_per_pixel": 0.4}, {}, (8, None, 0.4)),
    ({"microns_per_pixel": 0.4}, {}, (None, 0.4, 0.4)),
    ({"microns_per_pixel": 0.4}, {"scale": "0.5"}, (None, 0.8, 0.8)),
    ({"bin_size_um": 8.0, "microns_per_pixel": 0.4}, {"mpp": "0.5"}, (8, 0.5, 0.4)),
    ({"bin_size_um": 8.0, "microns_per_pixel": 0.4}, {"pitch": "2"}, (2, None, 0.4)),
    ({"spot_diameter_fullres": 11.0}, {}, (None, None, None)),
])
@pytest.mark.parametrize("place", ["json", "h5ad"])
def test_what_space_ranger_states_of_the_scale_is_read_from_json_and_h5ad(tmp_path, place, facts,
                                                                          cells, expected):
    if place == "json":
        rows = space_ranger(tmp_path, "A1")
        (tmp_path / "A1 [1]/outs/spatial/scalefactors_json.json").write_text(json.dumps(facts))
    else:
        rows = scanpy_file(tmp_path, "A1")
        path = tmp_path / rows["counts"]
        adata = anndata.read_h5ad(path)
        adata.uns["spatial"] = {"is_single": True, "A1": {"images": {}, "scalefactors": facts}}
        adata.write_h5ad(path)
    (section,), problems, _ = sheet.read_sheet(write_sheet(tmp_path, {"A1": rows | cells}))
    assert not problems
    assert (section.pitch_um, section.mpp, section.stated_mpp) == expected


def test_an_image_that_states_another_scale_is_noted(root, tmp_path, capsys):
    rows = {name: stated_files(tmp_path, name) for name in SECTIONS}
    image = Image.open(tmp_path / rows["A1"]["image"])
    image.save(tmp_path / rows["A1"]["image"], dpi=(25400 / 0.5,) * 2)
    run(write_sheet(tmp_path, rows), "--check")
    said = capsys.readouterr().out
    assert "A1: a pixel is taken to be 5 µm wide, but facts in the image file say 0.5" in said
    assert "C1: a pixel" not in said


@pytest.mark.parametrize(("array", "cells", "pitch_um"), [
    ([(1, 1), (2, 1), (1, 2)], {}, 200), ([(1, 1), (2, 1), (1, 2)], {"pitch": "150"}, 150),
    ([(1, 1), (3, 1), (2, 2)], {}, None), ([(1, 1), (2, 1), (1, 64)], {}, None),
    ([(1, 1), (2, 1), (1, 64)], {"pitch": "150"}, 150)],
    ids=["of 33 x 35", "of 33 x 35, stated", "staggered", "large", "large, stated"])
def test_an_st_table_has_200_microns_or_is_asked_for_them(tmp_path, array, cells, pitch_um):
    lines = [f"{x}\t{y}\t{100 * x}\t{100 * y}\t1\n" for x, y in array]
    (tmp_path / "spots.tsv").write_text("x\ty\tpixel_x\tpixel_y\tselected\n" + "".join(lines))
    rows = {"A1": stated_files(tmp_path, "A1") | {"positions": "spots.tsv"} | cells}
    (section,), problems, _ = sheet.read_sheet(write_sheet(tmp_path, rows))
    assert section.pitch_um == pitch_um
    assert len(problems) == (pitch_um is None)
    if problems:
        assert "Give the distance of neighbouring spots in the column pitch" in problems[0]


def test_a_table_of_symbols_bridges_ids_without_symbols_to_symbols(root, tmp_path, capsys):
    names = [f"GENE_{i}" for i in range(len(GENES))]
    for name, ids in (("A1", GENES), ("C1", names)):
        counts, table, image = raw_section(name)
        write_h5(tmp_path / f"{name}.h5", counts, counts.index, ids, ids)
        write_positions(tmp_path / f"{name}.csv", table.reset_index())
        write_image(tmp_path / f"{name}.tif", image)
    pd.DataFrame({"gene_id": GENES, "gene_name": names}).to_csv(tmp_path / "names.tsv", sep="\t",
                                                                index=False)
    path = write_sheet(tmp_path, {name: {"counts": f"{name}.h5", "positions": f"{name}.csv",
                                         "image": f"{name}.tif"} for name in SECTIONS})
    with pytest.raises(InputError, match="1 to fix"):
        run(path, "--check")
    for flags in (["--check"], []):
        capsys.readouterr()
        run(path, *flags, "--symbols", str(tmp_path / "names.tsv"))
        assert "60 genes are in every section" in capsys.readouterr().out
    genes = Processed("mine").genes("C1")
    assert genes.index.tolist() == GENES
    assert genes["symbol"].tolist() == names


def test_features_that_are_no_genes_are_counted_and_left_out(root, tmp_path, capsys):
    rows = {name: stated_files(tmp_path, name) for name in SECTIONS}
    counts, *_ = raw_section("A1")
    kinds = ["Antibody Capture"] * 2 + ["Gene Expression"] * (len(GENES) - 2)
    write_h5(tmp_path / rows["A1"]["counts"], counts, counts.index,
             [*GENES[:-1], "NegControlProbe_1"], SYMBOLS, kinds)
    path = write_sheet(tmp_path, rows)
    for flags in (["--check"], []):
        run(path, *flags, "--markers", "GENE5", "NOSUCH")
        said = capsys.readouterr().out
        assert "A1: 2 Antibody Capture, 1 control are no genes and are left out" in said
        assert "57 genes are in every section" in said
    assert "no section has a gene of the name NOSUCH" in said
    assert len(Processed("mine").genes("A1")) == 57


# ------------------------------------------------------------------------- names and commands


@pytest.mark.parametrize("name", ["MOB", "custom", "a/b", ".hidden"])
def test_a_dataset_takes_no_name_of_another(root, tmp_path, name):
    path = write_sheet(tmp_path, {"A1": stated_files(tmp_path, "A1")})
    with pytest.raises(InputError, match=r"cannot be called.*--name"):
        run(path, "--name", name)


def test_errors_of_later_stages_name_the_command_that_made_the_dataset(root, tmp_path):
    path = write_sheet(tmp_path, {name: stated_files(tmp_path, name) for name in SECTIONS})
    run(path, "--name", "other", "--markers", "GENE3")
    processed = Processed("other")
    assert processed.panel("heg").markers == ["GENE3"]
    processed.patches_path("A1").unlink()
    with pytest.raises(InputError) as error:
        processed.patches("A1")
    command = str(error.value).split("Make it with: ")[1]
    assert command == (
        f"python code/preprocess_custom.py {path} {' '.join(SMALL)} --name other --markers GENE3")
    with pytest.raises(InputError, match="--protocol paper"):
        processed.panel("heg", "paper")
    preprocess_custom.main(command.split()[2:])
    assert len(processed.patches("A1")) == 24


def test_a_dataset_that_nobody_made_is_told_how(root):
    with pytest.raises(InputError,
                       match=r"MOB.*python code/preprocess_custom\.py SHEET --name mine") as error:
        Processed("mine").sections()
    assert "custom," not in str(error.value)


def test_an_unknown_section_is_refused(root, tmp_path):
    path = write_sheet(tmp_path, {name: stated_files(tmp_path, name) for name in SECTIONS})
    with pytest.raises(InputError, match="no such section, but A1, C1"):
        run(path, "--section", "B1")


# ------------------------------------------------------------------------- real data


def test_muscle_sections_are_prepared_with_their_hires_picture(root, tmp_path, real_data, capsys):
    data = real_data("scMuscle") / "visium_data"
    path = write_sheet(tmp_path, {name: {
        "counts": data / folder, "image": data / folder / "spatial/aligned_fiducials.jpg",
        "scale": scale, "role": role} for name, folder, role, scale in (
            ("Vis5A", "Vis5A_2dpi", "reference", "hires"),
                                                        ("Vis7B", "Vis7B_5dpi", "query", "hires"))})
    run(path, "--check")
    run(path, "--patch_um", "200")
    table = Processed("mine").sections()
    assert table["n_spots"].tolist() == [982, 1011]
    np.testing.assert_allclose(table["mpp"], [0.3599 / 0.090057634, 0.3591 / 0.090057634],
                               rtol=1e-3)
    assert table["crop_px"].tolist() == [50, 50]
    # Spots lie on tissue: in this picture it is darker than the glass around it.
    patches = Processed("mine").patches("Vis5A")[:, 7:9, 7:9].mean(axis=(1, 2, 3))
    assert np.median(patches) < 160
    assert (patches < 200).mean() > 0.9


@pytest.mark.parametrize("text", [
    "[" * 100_000, '{"a":' * 100_000, '[["tissue_hires_scalef", {}]]', "[1]", "1", "",
    *(f'{{"tissue_hires_scalef": {value}}}'
      for value in ("NaN", "1e999", "-1", "0", "null", "true", '"x"', "[1]", "{}"))])
def test_scale_factors_that_are_no_numbers_are_problems(root, tmp_path, text):
    rows = {name: stated_files(tmp_path, name) | {"scale": "hires"} for name in SECTIONS}
    path = write_sheet(tmp_path, rows)
    for name in SECTIONS:
        (tmp_path / rows[name]["positions"]).with_name("scalefactors_json.json").write_text(text)
    _, problems, _ = sheet.read_sheet(path)
    assert any("scalefactors_json.json" in problem for problem in problems)


@pytest.mark.parametrize(("column", "value", "says"), [
    ("counts", "a\0b", "counts is 'a?x00b', which is no path|no path"),
    ("image", "a" * 300, "File name too long"), ("section", "a\x1fb", "cannot be the name"),
    ("positions", "~nobody.here/a", "no path|is missing")])
def test_a_cell_that_is_no_path_is_a_problem(root, tmp_path, column, value, says):
    rows = {name: stated_files(tmp_path, name) for name in SECTIONS}
    path = write_sheet(tmp_path, rows)
    text = path.read_text().splitlines()
    cells = text[1].split(",")
    cells[text[0].split(",").index(column)] = value
    path.write_text("\n".join([text[0], ",".join(cells), *text[2:]]))
    _, problems, _ = sheet.read_sheet(path)
    assert any(re.search(says, problem) for problem in problems), problems
