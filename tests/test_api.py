"""Slides without expression: predicted as infer.py predicts a section; mistakes are one line."""

import json
import subprocess
import sys
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import tifffile
from makers import QUERY, REFERENCE, prepare, untrained
from PIL import Image

import heclip
import infer
from heclip import api, prediction
from heclip.dataset import Processed, Run
from heclip.files import InputError
from heclip.slide import shrunk
from heclip.spots import lattice


@pytest.fixture(scope="module")
def run():
    """The small data set and a model of it, in the places where the scripts put them."""
    prepare("slides")
    run = Run("slides", "heg")
    untrained(run.checkpoint, "slides")
    return run


@pytest.fixture(scope="module")
def slide(run, tmp_path_factory):
    """The query section's slide as a pyramid that says its µm per pixel."""
    image = tifffile.imread(Processed("slides").folder.parent / "image" / f"{QUERY}.tiff")[..., :3]
    path = tmp_path_factory.mktemp("slide") / "case 7.tif"
    per_cm = 1e4 / mpp_of_query()
    with tifffile.TiffWriter(path) as writer:
        options = dict(photometric="rgb", tile=(256, 256), compression="deflate", metadata=None)
        writer.write(image, subifds=1, resolution=(per_cm, per_cm), resolutionunit="CENTIMETER",
                     **options)
        writer.write(shrunk(image, 2), subfiletype=1, **options)
    return path


def mpp_of_query():
    return float(Processed("slides").sections().loc[QUERY, "mpp"])


def predict(run, slide, **options):
    """The slide's prediction, of one view for speed if `options` do not say otherwise."""
    options = {"views": 1} | options
    return heclip.predict_slide((run.dataset, run.name), slide, device="cpu", batch_size=16,
                                **options)


@pytest.fixture(scope="module")
def predicted(run, slide):
    return predict(run, slide, k=10)


def query_positions():
    folder = Processed("slides").folder.parent
    return folder / "data" / "tissue_pos_matrices" / "tissue_positions_list_3.csv"


# ------------------------------------------------------------------------------- the prediction


@pytest.mark.parametrize("retrieval", ["gene", "both"])
def test_at_a_sections_own_spots_the_prediction_is_that_of_infer(run, slide, tmp_path, retrieval):
    untrained(Run("slides", "heg", tmp_path).checkpoint, "slides")
    infer.main(["--dataset", "slides", "--save_path", str(tmp_path), "--device", "cpu",
                "--k", "10", "--retrieval", retrieval, "--views", "2", "--no-figures"])
    expected = anndata.read_h5ad(tmp_path / "slides" / "heg_prediction.h5ad")
    found = predict(run, slide, positions=query_positions(), k=10, retrieval=retrieval,
                    views=2)
    assert found.n_obs == expected.n_obs
    found = found[expected.obs_names]
    np.testing.assert_allclose(found.X, expected.X, atol=2e-3)
    np.testing.assert_array_equal(found.obsm["spatial"], expected.obsm["spatial"])
    for measure in ("similarity", "spread"):
        np.testing.assert_allclose(found.obs[measure], expected.obs[measure], atol=2e-3)
    assert list(found.var_names) == list(expected.var_names)
    array = ["array_row", "array_col"]
    pd.testing.assert_frame_equal(found.obs[array], expected.obs[array], check_dtype=False)


def test_a_regression_predicts_a_slide_without_similarity_or_spread(slide, tmp_path):
    untrained(tmp_path / "model.pt", "slides", recipe="regression")
    found = heclip.predict_slide(tmp_path / "model.pt", slide, device="cpu",
                                 positions=query_positions())
    assert not {"similarity", "spread"} & set(found.obs)
    spots = Processed("slides").spots(QUERY)[:5]
    at_spots = heclip.predict(spots, slide, tmp_path / "model.pt", device="cpu")
    assert list(at_spots.obs) == list(spots.obs)


def test_spots_cover_the_tissue_at_the_references_pitch(predicted):
    query = Processed("slides").spots(QUERY)
    mpp = mpp_of_query()
    xy = predicted.obsm["spatial"]
    apart = np.linalg.norm(xy[:, None] - xy, axis=2) + np.diag(np.full(len(xy), np.inf))
    assert np.median(apart.min(axis=1)) * mpp == pytest.approx(100, rel=0.01)
    assert len(xy) == pytest.approx(query.n_obs, rel=0.15)
    to_query = np.linalg.norm(query.obsm["spatial"][:, None] - xy, axis=2).min(axis=1)
    assert (to_query * mpp < 75).mean() > 0.95  # each spot of the section has a predicted one near
    assert ((predicted.obs["array_row"] + predicted.obs["array_col"]) % 2 == 0).all()


def test_pitch_sets_the_distance_of_the_spots(run, slide, predicted):
    closer = predict(run, slide, pitch=50)
    assert closer.n_obs == pytest.approx(4 * predicted.n_obs, rel=0.1)


def test_half_the_pixel_size_gives_nearly_the_same_prediction(run, slide, tmp_path):
    image = Image.fromarray(tifffile.imread(slide))
    twice = image.resize((2 * image.width, 2 * image.height), Image.BILINEAR)
    tifffile.imwrite(tmp_path / "twice.tif", np.asarray(twice))
    spots = Processed("slides").read(QUERY)[:40].copy()
    spots.obsm["spatial"] = np.rint(spots.obsm["spatial"])
    doubled = spots.copy()
    doubled.obsm["spatial"] = 2 * spots.obsm["spatial"]
    options = dict(model=("slides", "heg"), device="cpu", k=20, retrieval="gene", centre=False,
                   views=1, smoothing=0)
    once = heclip.predict(spots, slide, **options)
    again = heclip.predict(doubled, tmp_path / "twice.tif", mpp=mpp_of_query() / 2, **options)
    wrong = heclip.predict(doubled, tmp_path / "twice.tif", mpp=mpp_of_query(), **options)
    assert np.abs(again.X - once.X).mean() < 0.5 * np.abs(wrong.X - once.X).mean()


def test_predict_keeps_the_spots_and_what_is_known_of_them(run, slide, tmp_path):
    spots = Processed("slides").read(QUERY)[:30].copy()
    spots.obs["label"] = "a"
    tifffile.imwrite(tmp_path / "no_mpp.tif", tifffile.imread(slide))
    for image in (slide, tmp_path / "no_mpp.tif"):  # the second takes mpp from the AnnData
        found = heclip.predict(spots, image, ("slides", "heg"), device="cpu", views=1)
        assert list(found.obs_names) == list(spots.obs_names)
        assert list(found.obs) == [*spots.obs, "similarity", "spread"]
        np.testing.assert_array_equal(found.obsm["spatial"], spots.obsm["spatial"])
    del spots.uns["spatial"]
    with pytest.raises(InputError, match="Give it with --mpp"):
        heclip.predict(spots, tmp_path / "no_mpp.tif", ("slides", "heg"), device="cpu")
    lacking = spots.copy()
    lacking.obsm["spatial"] = np.where(np.arange(30)[:, None] == 4, np.nan, spots.obsm["spatial"])
    with pytest.raises(InputError, match="has no position for 1 of 30 spots"):
        heclip.predict(lacking, slide, ("slides", "heg"), device="cpu")
    del spots.obsm["spatial"]
    with pytest.raises(InputError, match='no obsm\\["spatial"\\]'):
        heclip.predict(spots, slide, ("slides", "heg"), device="cpu")


@pytest.mark.parametrize(("outside", "refused"), [(3, False), (4, True)])
def test_a_few_spots_outside_the_slide_are_left_out_and_many_are_an_error(run, slide, outside,
                                                                          refused):
    spots = Processed("slides").read(QUERY)[:30].copy()
    spots.obs["number"] = np.arange(30)
    spots.obsm["spatial"][:outside] = [-5, 20]
    says = f"{outside} of 30 spots under tissue lie outside .*case 7.tif"
    if refused:
        with pytest.raises(InputError, match=says):
            heclip.predict(spots, slide, ("slides", "heg"), device="cpu", views=1)
        return
    with pytest.warns(UserWarning, match=says):
        found = heclip.predict(spots, slide, ("slides", "heg"), device="cpu", views=1)
    assert found.obs["number"].tolist() == list(range(outside, 30))
    np.testing.assert_array_equal(found.obsm["spatial"], spots.obsm["spatial"][outside:])


def test_the_image_of_a_reference_section_is_not_predicted_from_its_own_spots(run):
    """Under any name. Other places of the same image may be predicted."""
    section, processed = REFERENCE[0], Processed("slides")
    image = processed.folder.parent / "image" / f"{section}.tiff"
    mpp = float(processed.sections().loc[section, "mpp"])
    spots = processed.read(section)[:20].copy()
    with pytest.raises(InputError, match=f"is the image of {section}, .* 20 of 20 spots lie at"):
        predict(run, image, mpp=mpp, positions=table_of(spots))
    far = spots.copy()
    far.obsm["spatial"] = np.linspace([2, 2], [20, 2], 20)
    assert predict(run, image, mpp=mpp, positions=table_of(far)).n_obs == 20


def table_of(adata):
    """The positions of an AnnData as sources.read_positions returns them."""
    table = pd.DataFrame(adata.obsm["spatial"], adata.obs_names, ["x", "y"])
    return table.assign(in_tissue=True)


def test_positions_of_an_h5ad_may_lack_the_array_columns(run, slide, tmp_path):
    spots = Processed("slides").spots(QUERY)
    spots.obs = spots.obs[["in_tissue"]]
    spots.write_h5ad(tmp_path / "spots.h5ad")
    found = predict(run, slide, positions=tmp_path / "spots.h5ad", k=10)
    assert list(found.obs) == ["in_tissue", "similarity", "spread"]
    assert list(found.obs_names) == list(spots.obs_names)
    np.testing.assert_array_equal(found.obsm["spatial"], spots.obsm["spatial"])


def test_the_file_follows_the_conventions_of_the_sections(run, slide, predicted, tmp_path):
    infer.main(["--dataset", "slides", "--image", str(slide), "--k", "10", "--views", "1",
                "--device", "cpu"])
    written = anndata.read_h5ad(run.folder / "heg_slide_case 7_prediction.h5ad")
    np.testing.assert_allclose(written.X, predicted.X, atol=2e-3)
    section = Processed("slides").read(QUERY)
    (library,), (of_section,) = (a.uns["spatial"].values() for a in (written, section))
    assert set(library) == set(of_section)
    assert library["metadata"]["mpp"] == pytest.approx(mpp_of_query(), rel=1e-4)
    assert library["scalefactors"]["spot_diameter_fullres"] == pytest.approx(
        of_section["scalefactors"]["spot_diameter_fullres"], rel=1e-3)
    height, width = tifffile.imread(slide).shape[:2]
    scale = library["scalefactors"]["tissue_hires_scalef"]
    shape = library["images"]["hires"].shape[:2]
    np.testing.assert_allclose(shape, [height * scale, width * scale], atol=1)
    assert set(written.obs) == {"in_tissue", "array_row", "array_col", "similarity", "spread"}
    assert set(written.var) == {"symbol", "marker"}
    about = json.loads(written.uns["heclip"])
    assert about["reference"] == REFERENCE
    assert about["query"] == api.slide_identity(slide)
    assert about["how"]["k"] == 10
    assert about["model"]["patch_um"] == pytest.approx(39, abs=0.1)
    for picture in ("QC/slides_heg_slide_case 7.jpg", "MAP/slides_heg_slide_case 7.png"):
        assert (run.top / "figure" / picture).exists()


def test_maps_show_the_markers_or_else_the_genes_that_vary_most(predicted):
    shown = infer.genes_to_map(predicted)
    assert [gene for gene, _ in shown] == list(predicted.var_names[predicted.var["marker"]])
    assert len(shown) > 0
    plain = predicted.copy()
    plain.var["marker"] = False
    shown = [gene for gene, _ in infer.genes_to_map(plain)]
    assert shown == list(plain.var_names[np.argsort(-plain.X.var(axis=0))[:6]])


def test_saved_image_embeddings_are_used_only_if_they_are_this_models(run, slide, tmp_path,
                                                                      monkeypatch):
    here = Run("slides", "heg", tmp_path)
    untrained(here.checkpoint, "slides")
    infer.main(["--dataset", "slides", "--save_path", str(tmp_path), "--device", "cpu",
                "--ebd_only", "--views", "2"])
    embedded, embed = [], api.embed_section
    monkeypatch.setattr(api, "embed_section", lambda trained, processed, section, *how:
                        embedded.append(section) or embed(trained, processed, section, *how))
    options = dict(model=("slides", "heg"), image=slide, positions=query_positions(), k=10,
                   retrieval="image", device="cpu", views=2, save_path=tmp_path)
    heclip.predict_slide(**options)
    assert embedded == []
    heclip.predict_slide(**options | {"views": 1})  # two were saved
    assert embedded == REFERENCE
    embedded.clear()
    untrained(here.checkpoint, "slides", seed=1)
    other = heclip.predict_slide(**options)
    assert embedded == REFERENCE
    here.embeddings("DEMO_A1").write_bytes(b"damaged")
    np.testing.assert_array_equal(heclip.predict_slide(**options).X, other.X)


def test_a_checkpoint_by_its_path_gives_the_same(slide, predicted, tmp_path):
    untrained(tmp_path / "model.pt", "slides")
    by_path = heclip.predict_slide(tmp_path / "model.pt", slide, device="cpu", batch_size=16, k=10,
                                   views=1)
    np.testing.assert_array_equal(by_path.X, predicted.X)


def test_the_crop_is_as_wide_as_the_patches_that_the_model_saw(slide, tmp_path, monkeypatch):
    crops, original = [], api.SpotPatches
    monkeypatch.setattr(api, "SpotPatches", lambda slide, xy, crop, *rest:
                        crops.append(crop) or original(slide, xy, crop, *rest))
    for patch_um in (39.0, 78.0):
        untrained(tmp_path / "model.pt", "slides", patch_um=patch_um)
        heclip.predict_slide(tmp_path / "model.pt", slide, device="cpu", views=1,
                             positions=query_positions())
    assert crops == pytest.approx([32, 64], rel=0.01)


def test_a_difference_of_scale_is_said(run, slide, monkeypatch):
    coarse = "case 7.tif has 3 µm per pixel, coarser than the reference: 13 pixels"
    with pytest.warns(UserWarning, match=coarse):
        predict(run, slide, mpp=3)
    sections = Processed.sections
    monkeypatch.setattr(Processed, "sections", lambda self: sections(self).assign(
        mpp=lambda table: table["mpp"] * np.where(table.index == "DEMO_B1", 1.5, 1)))
    differ = r"patches differ in size \(DEMO_A1 39, DEMO_B1 59, DEMO_D1 39 µm\); 39 µm"
    with pytest.warns(UserWarning, match=differ):
        predict(run, slide)


# ----------------------------------------------------------------- predictions are not mixed up


def test_a_slide_of_the_same_file_name_does_not_replace_another(run, slide, tmp_path):
    (tmp_path / "other").mkdir()
    image = tifffile.imread(slide)
    paths = [tmp_path / "slide.tif", tmp_path / "other" / "slide.tif"]
    for path, pixels in zip(paths, (image, image[::-1]), strict=True):
        tifffile.imwrite(path, pixels)

    def infer_slide(path, *flags):
        infer.main(["--dataset", "slides", "--image", str(path), "--mpp", str(mpp_of_query()),
                    "--device", "cpu", "--no-figures", "--views", "1", *flags])

    infer_slide(paths[0])
    written = run.slide_prediction("slide")
    first = written.read_bytes()
    with pytest.raises(InputError, match=r"holds another prediction: it is of slide.tif .*, not of "
                                         r"slide.tif .*--overwrite"):
        infer_slide(paths[1])
    assert written.read_bytes() == first
    infer_slide(paths[0], "--k", "20")  # the same slide may be predicted again, in another way
    assert written.read_bytes() != first
    infer_slide(paths[1], "--name", "slide B")  # or the other kept under another name
    assert run.slide_prediction("slide B").exists()
    infer_slide(paths[1], "--overwrite")
    assert json.loads(anndata.read_h5ad(written).uns["heclip"])["query"] == api.slide_identity(
        paths[1])


def test_another_model_does_not_replace_the_prediction_of_a_slide(slide, tmp_path):
    for name, recipe in (("heclip", "heclip"), ("bleep", "bleep")):
        untrained(tmp_path / f"{name}.pt", "slides", recipe=recipe)
    flags = ["--image", str(slide), "--save_path", str(tmp_path), "--device", "cpu",
             "--no-figures", "--views", "1"]
    infer.main([*flags, "--checkpoint", str(tmp_path / "heclip.pt")])
    with pytest.raises(InputError, match="holds another prediction: --recipe was heclip, is bleep"):
        infer.main([*flags, "--checkpoint", str(tmp_path / "bleep.pt")])


@pytest.mark.parametrize(("glass", "whole_image", "note"), [
    (False, False, "no glass is seen on it"), (True, False, None), (True, True, None)])
def test_a_picture_without_glass_or_with_whole_image_has_spots_everywhere(glass, whole_image, note):
    rng = np.random.default_rng(0)
    level = rng.normal(130, 40, (80, 100, 1)) + np.array([30, -30, 10])
    thumbnail = np.clip(level, 0, 255).astype(np.uint8)
    if glass:
        thumbnail[:, 50:] = 244
    notes = []
    found = api.tissue_of(thumbnail, 8, whole_image, notes)
    assert found[:, :45].all()
    assert found[:, 55:].all() == (whole_image or not glass)
    assert len(notes) == (note is not None)
    assert all(note in text for text in notes)


@pytest.mark.parametrize(("mpp", "exchanged", "says"), [
    (2.5, False, None), (2.5, True, "mirror image"),
    (2.0, False, "but facts in the image file say 2.5")])
def test_what_contradicts_the_spots_of_a_slide_is_said(mpp, exchanged, says):
    spots = lattice(400, 300, 40)
    if exchanged:
        spots = spots.rename(columns={"x": "y", "y": "x"})
    slide = SimpleNamespace(stated_mpp=2.5)
    notes = api.notes_on_slide(slide, spots, mpp, 40 * mpp)
    assert len(notes) == (says is not None)
    assert all(says in text for text in notes)


# ------------------------------------------------------------------------------------- mistakes


def broken(tmp_path, kind):
    path = tmp_path / f"{kind}.png"
    if kind == "glass":
        Image.fromarray(np.full((300, 300, 3), 240, np.uint8)).save(path)
    elif kind == "text":
        path.write_text("no image")
    return path


@pytest.mark.parametrize(("flags", "says"), [
    (["--image", "glass"], "does not say how many µm a pixel is wide. Give it with --mpp"),
    (["--image", "glass", "--mpp", "1"], r"no tissue found.*--whole_image"),
    (["--image", "glass", "--mpp", "0.01"], "from 0.05 to 20"),
    (["--image", "text"], "cannot be read as an image"),
    (["--image", "absent"], "is missing"),
    (["--image", "glass", "--mpp", "1", "--positions", "text"], "not a position file"),
    (["--image", "glass", "--mpp", "1", "--pitch", "0"], r"--pitch 0.0: expected"),
    (["--image", "glass", "--mpp", "1", "--type", "hvg"], "hvg_best.pt is missing"),
    (["--image", "glass", "--mpp", "1", "--dataset", "nowhere"], "Train it with main.py"),
])
def test_a_users_mistake_is_one_clear_line_and_writes_nothing(run, tmp_path, flags, says):
    flags = [str(broken(tmp_path, flag)) if flag in ("glass", "text", "absent") else flag
             for flag in flags]
    before = sorted(run.top.glob("[sf][ai][vg]*/**/*"))
    with pytest.raises(InputError, match=says) as error:
        infer.main(["--dataset", "slides", "--device", "cpu", *flags])
    assert "\n" not in str(error.value)
    assert sorted(run.top.glob("[sf][ai][vg]*/**/*")) == before


@pytest.mark.parametrize(("changes", "says"), [
    ({"dataset": "other"}, "was trained on other heg, not on slides heg"),
    ({"kind": "hvg"}, "was trained on slides hvg, not on slides heg"),
    ({"reference": {"X9": "digest"}}, "was trained on X9, which"),
    ({"reference": {name: "digest" for name in REFERENCE}, "patch_um": 60.0},
     "was trained on patches of 60 µm in 32 px, and .* made again since.* 39 µm in 32 px"),
])
def test_a_checkpoint_that_does_not_fit_is_refused(run, slide, tmp_path, changes, says):
    if changes.get("dataset") == "other":
        prepare("other")
    untrained(Run("slides", "heg", tmp_path).checkpoint, **{"dataset": "slides"} | changes)
    with pytest.raises(InputError, match=says):
        predict(run, slide, save_path=tmp_path)


def test_a_slide_is_no_checkpoint(slide):
    with pytest.raises(InputError, match=r"not a checkpoint of main.py"):
        heclip.predict_slide(slide, slide, device="cpu")


def test_positions_of_glass_only_are_refused(run, slide, tmp_path):
    (tmp_path / "positions.csv").write_text("AAAC-1,0,0,0,50,60\nAAAG-1,0,0,2,50,90\n")
    with pytest.raises(InputError, match=r"positions.csv: no spot is under tissue"):
        predict(run, slide, positions=tmp_path / "positions.csv")


def test_importing_heclip_is_cheap_and_finds_the_functions(project):
    code = "import heclip, sys; assert not {'torch', 'numpy', 'heclip.api'} & set(sys.modules)"
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=project / "code")
    assert heclip.predict_slide is api.predict_slide
    assert heclip.predict is api.predict is not prediction.predict
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = heclip.nothing


# ---------------------------------------------------------------------------------- SpatialData


def test_without_spatialdata_the_error_says_what_to_install(predicted, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    with pytest.raises(InputError, match="pip install spatialdata"):
        api.write_spatialdata(predicted, tmp_path / "store.zarr")
    assert not list(tmp_path.iterdir())


def test_a_prediction_as_spatialdata(predicted, tmp_path):
    spatialdata = pytest.importorskip("spatialdata")
    api.write_spatialdata(predicted, tmp_path / "store.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["store.zarr"]
    with pytest.raises(InputError, match=r"store.zarr exists"):
        api.write_spatialdata(predicted, tmp_path / "store.zarr")
    stored = spatialdata.read_zarr(tmp_path / "store.zarr")
    np.testing.assert_array_equal(stored["table"].X, predicted.X)
    circles = stored["spots"]
    np.testing.assert_allclose(circles.geometry.x, predicted.obsm["spatial"][:, 0])
    (library,) = predicted.uns["spatial"].values()
    diameter = library["scalefactors"]["spot_diameter_fullres"]
    assert circles["radius"].iloc[0] == pytest.approx(diameter / 2)
    extent = spatialdata.get_extent(stored["hires"])
    scale = library["scalefactors"]["tissue_hires_scalef"]
    height, width = library["images"]["hires"].shape[:2]
    assert extent["x"][1] == pytest.approx(width / scale)
    assert extent["y"][1] == pytest.approx(height / scale)
    joined, table = spatialdata.join_spatialelement_table(stored, "spots", table_name="table")
    assert len(joined["spots"]) == table.n_obs == predicted.n_obs
