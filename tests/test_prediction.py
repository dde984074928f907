"""prediction.py: a slide without expression gets what infer.py predicts for a section, and mistakes one clear line."""

import re
import subprocess
import sys
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image

import heclip
import infer
import preprocess_demo
from heclip import prediction
from heclip.checkpoint import save_checkpoint
from heclip.dataset import Processed, Run
from heclip.files import InputError
from heclip.model import HECLIP, configure
from heclip.preprocess import preprocess
from heclip.slide import shrunk

REFERENCE = ["DEMO_A1", "DEMO_B1", "DEMO_D1"]


def untrained(path, dataset="slides", name="heg", seed=0, **facts):
    """A checkpoint as main.py writes it, of a model as it was drawn."""
    panel = Processed("slides").panel(name)
    torch.manual_seed(seed)
    model = HECLIP(configure("test_resnet", name, len(panel), 32))
    save_checkpoint(path, model, **({"dataset": dataset, "name": name, "panel": list(panel.index),
                                     "panel_name": name, "reference": REFERENCE,
                                     "arguments": {"recipe": "heclip"}} | facts))


@pytest.fixture(scope="module")
def run():
    """A small dataset and a model of it, in the places where the scripts put them."""
    sections = [replace(section, n_spots=None) for section in preprocess_demo.DATASET.sections]
    dataset = replace(preprocess_demo.DATASET, name="slides", sections=sections, n_hvg=60, n_heg=60, patch_px=32)
    preprocess_demo.generate(dataset.raw, grid=(14, 12), n_genes=150)
    preprocess(dataset, [])
    run = Run("slides", "heg")
    untrained(run.checkpoint)
    return run


@pytest.fixture(scope="module")
def slide(run, tmp_path_factory):
    """The query section's slide as a pyramid that says its µm per pixel."""
    image = tifffile.imread(Processed("slides").folder.parent / "image" / "DEMO_C1.tiff")[..., :3]
    path = tmp_path_factory.mktemp("slide") / "case 7.tif"
    per_cm = 1e4 / mpp_of_query()
    with tifffile.TiffWriter(path) as writer:
        options = dict(photometric="rgb", tile=(256, 256), compression="deflate", metadata=None)
        writer.write(image, subifds=1, resolution=(per_cm, per_cm), resolutionunit="CENTIMETER", **options)
        writer.write(shrunk(image, 2), subfiletype=1, **options)
    return path


def mpp_of_query():
    return float(Processed("slides").sections().loc["DEMO_C1", "mpp"])


def predict(run, slide, **options):
    return heclip.predict_slide((run.dataset, run.name), slide, device="cpu", batch_size=16, **options)


@pytest.fixture(scope="module")
def predicted(run, slide):
    return predict(run, slide, k=10)


def query_positions():
    folder = Processed("slides").folder.parent
    return folder / "data" / "tissue_pos_matrices" / "tissue_positions_list_3.csv"


def test_at_a_sections_own_spots_the_prediction_is_that_of_infer(run, slide, tmp_path):
    untrained(Run("slides", "heg", tmp_path).checkpoint)
    for retrieval in ("gene", "image", "both"):
        infer.main(["--dataset", "slides", "--save_path", str(tmp_path), "--device", "cpu", "--k", "10",
                    "--retrieval", retrieval, "--no-figures"])
        expected = anndata.read_h5ad(tmp_path / "slides" / "heg_prediction.h5ad")
        found = predict(run, slide, positions=query_positions(), k=10, retrieval=retrieval)
        assert found.n_obs == expected.n_obs
        found = found[expected.obs_names]
        np.testing.assert_allclose(found.X, expected.X, atol=2e-3)
        np.testing.assert_array_equal(found.obsm["spatial"], expected.obsm["spatial"])
        for measure in ("similarity", "spread"):
            np.testing.assert_allclose(found.obs[measure], expected.obs[measure], atol=2e-3)
        assert list(found.var_names) == list(expected.var_names)
        pd.testing.assert_frame_equal(found.obs[["array_row", "array_col"]], expected.obs[["array_row", "array_col"]],
                                      check_dtype=False)


def test_spots_cover_the_tissue_at_the_references_pitch(predicted):
    query = Processed("slides").read("DEMO_C1")
    mpp = mpp_of_query()
    xy = predicted.obsm["spatial"]
    apart = np.linalg.norm(xy[:, None] - xy, axis=2) + np.diag(np.full(len(xy), np.inf))
    assert np.median(apart.min(axis=1)) * mpp == pytest.approx(100, rel=0.01)
    assert len(xy) == pytest.approx(query.n_obs, rel=0.15)
    to_query = np.linalg.norm(query.obsm["spatial"][:, None] - xy, axis=2).min(axis=1)
    assert (to_query * mpp < 75).mean() > 0.95  # each spot of the section has a predicted one beside it
    assert ((predicted.obs["array_row"] + predicted.obs["array_col"]) % 2 == 0).all()


def test_pitch_sets_the_distance_of_the_spots(run, slide, predicted):
    assert predict(run, slide, pitch=50).n_obs == pytest.approx(4 * predicted.n_obs, rel=0.1)


def test_similarity_and_spread_follow_their_definitions():
    rng = np.random.default_rng(0)
    embeddings, nearest = rng.normal(size=(7, 5)).astype(np.float32), rng.normal(size=(40, 5)).astype(np.float32)
    expression = rng.gamma(1, 1, (40, 6)).astype(np.float32)
    x, index, similarity = prediction.retrieve_expression(torch.from_numpy(embeddings), [[torch.from_numpy(nearest)]],
                                                          expression, 4, centred=False)
    cosine = np.array([[e @ n / np.linalg.norm(e) / np.linalg.norm(n) for n in nearest] for e in embeddings])
    for spot in range(7):
        rows = np.argsort(-cosine[spot])[:4]
        np.testing.assert_array_equal(index[spot], rows)
        np.testing.assert_allclose(similarity[spot], cosine[spot, rows], atol=1e-6)
        np.testing.assert_allclose(x[spot], expression[rows].mean(axis=0), rtol=1e-5)
    expected = [expression[rows].std(axis=0).mean() for rows in index]
    np.testing.assert_allclose(prediction.spread(index, expression), expected, rtol=1e-4)
    np.testing.assert_allclose(prediction.spread(index, expression, block=2), expected, rtol=1e-4)
    assert prediction.spread(index[:, :1], expression) == pytest.approx(np.zeros(7), abs=1e-3)


def test_half_the_pixel_size_gives_nearly_the_same_prediction(run, slide, tmp_path):
    image = Image.fromarray(tifffile.imread(slide))
    twice = image.resize((2 * image.width, 2 * image.height), Image.BILINEAR)
    tifffile.imwrite(tmp_path / "twice.tif", np.asarray(twice))
    spots = Processed("slides").read("DEMO_C1")[:40].copy()
    spots.obsm["spatial"] = np.rint(spots.obsm["spatial"])
    doubled = spots.copy()
    doubled.obsm["spatial"] = 2 * spots.obsm["spatial"]
    options = dict(model=("slides", "heg"), device="cpu", k=20, retrieval="gene", centre=False, views=1,
                   smoothing=0)
    once = heclip.predict(spots, slide, **options)
    again = heclip.predict(doubled, tmp_path / "twice.tif", mpp=mpp_of_query() / 2, **options)
    wrong = heclip.predict(doubled, tmp_path / "twice.tif", mpp=mpp_of_query(), **options)
    assert np.abs(again.X - once.X).mean() < 0.5 * np.abs(wrong.X - once.X).mean()


def test_predict_keeps_the_spots_and_what_is_known_of_them(run, slide, tmp_path):
    spots = Processed("slides").read("DEMO_C1")[:30].copy()
    spots.obs["label"] = "a"
    tifffile.imwrite(tmp_path / "no_mpp.tif", tifffile.imread(slide))
    for image in (slide, tmp_path / "no_mpp.tif"):  # the second takes µm per pixel from the AnnData
        found = heclip.predict(spots, image, ("slides", "heg"), device="cpu")
        assert list(found.obs_names) == list(spots.obs_names)
        assert list(found.obs) == [*spots.obs, "similarity", "spread"]
        np.testing.assert_array_equal(found.obsm["spatial"], spots.obsm["spatial"])
    del spots.uns["spatial"]
    with pytest.raises(InputError, match="Give it with --mpp"):
        heclip.predict(spots, tmp_path / "no_mpp.tif", ("slides", "heg"), device="cpu")
    del spots.obsm["spatial"]
    with pytest.raises(InputError, match='no obsm\\["spatial"\\]'):
        heclip.predict(spots, slide, ("slides", "heg"), device="cpu")


def test_the_file_follows_the_conventions_of_the_sections(run, slide, predicted, tmp_path):
    infer.main(["--dataset", "slides", "--image", str(slide), "--k", "10", "--device", "cpu"])
    path = run.folder / "heg_slide_case 7_prediction.h5ad"
    written = anndata.read_h5ad(path)
    np.testing.assert_allclose(written.X, predicted.X, atol=2e-3)
    section = Processed("slides").read("DEMO_C1")
    (library,), (of_section,) = (adata.uns["spatial"].values() for adata in (written, section))
    assert set(library) == set(of_section)
    assert library["metadata"]["mpp"] == pytest.approx(mpp_of_query(), rel=1e-4)
    assert library["scalefactors"]["spot_diameter_fullres"] == pytest.approx(
        of_section["scalefactors"]["spot_diameter_fullres"], rel=1e-3)
    height, width = tifffile.imread(slide).shape[:2]
    scale = library["scalefactors"]["tissue_hires_scalef"]
    np.testing.assert_allclose(library["images"]["hires"].shape[:2], [height * scale, width * scale], atol=1)
    assert {"in_tissue", "array_row", "array_col", "similarity", "spread"} == set(written.obs)
    assert {"symbol", "marker"} == set(written.var)
    assert list(written.uns["prediction"]["reference"]) == REFERENCE
    for picture in ("QC/slides_heg_slide_case 7.jpg", "MAP/slides_heg_slide_case 7.png"):
        assert (run.top / "figure" / picture).exists()


def test_maps_show_the_markers_or_else_the_genes_that_vary_most(predicted):
    shown = prediction.telling_genes(predicted)
    assert [gene for gene, _ in shown] == list(predicted.var_names[predicted.var["marker"]])
    assert len(shown) > 0
    plain = predicted.copy()
    plain.var["marker"] = False
    shown = [gene for gene, _ in prediction.telling_genes(plain)]
    assert shown == list(plain.var_names[np.argsort(-plain.X.var(axis=0))[:6]])


def test_saved_image_embeddings_are_used_only_if_they_are_this_models(run, slide, tmp_path, monkeypatch):
    here = Run("slides", "heg", tmp_path)
    untrained(here.checkpoint)
    infer.main(["--dataset", "slides", "--save_path", str(tmp_path), "--device", "cpu", "--ebd_only"])
    encoded, encode = [], prediction.encode_patches
    monkeypatch.setattr(prediction, "encode_patches", lambda model, patches, index, *how:
                        encoded.append(len(index)) or encode(model, patches, index, *how))
    options = dict(model=("slides", "heg"), image=slide, positions=query_positions(), retrieval="image", k=10,
                   device="cpu", save_path=tmp_path)
    with_saved = heclip.predict_slide(**options)
    assert encoded == [8, 8, 8, with_saved.n_obs]
    untrained(here.checkpoint, seed=1)
    other = heclip.predict_slide(**options)
    assert len(encoded) == 4 + 7
    here.embeddings("DEMO_A1").write_bytes(b"damaged")
    np.testing.assert_array_equal(heclip.predict_slide(**options).X, other.X)


def test_a_checkpoint_by_its_path_gives_the_same(run, slide, predicted, tmp_path):
    untrained(tmp_path / "model.pt")
    by_path = heclip.predict_slide(tmp_path / "model.pt", slide, device="cpu", batch_size=16, k=10)
    np.testing.assert_array_equal(by_path.X, predicted.X)


def test_the_crop_is_the_references_whatever_its_patches_were_made_from(run, slide, monkeypatch):
    crops, original = [], prediction.SpotPatches
    monkeypatch.setattr(prediction, "SpotPatches", lambda slide, xy, crop, *rest:
                        crops.append(crop) or original(slide, xy, crop, *rest))
    sections = Processed.sections
    predict(run, slide)
    monkeypatch.setattr(Processed, "sections", lambda self: sections(self).assign(crop_px=64))
    predict(run, slide)
    assert crops == pytest.approx([32, 64], rel=0.01)


def test_a_difference_of_scale_is_said(run, slide, monkeypatch):
    with pytest.warns(UserWarning, match="case 7.tif has 3 µm a pixel, coarser than the reference: 13 pixels"):
        predict(run, slide, mpp=3)
    sections = Processed.sections
    monkeypatch.setattr(Processed, "sections", lambda self: sections(self).assign(
        mpp=lambda table: table["mpp"] * np.where(table.index == "DEMO_B1", 1.5, 1)))
    with pytest.warns(UserWarning, match=r"patches differ in size \(DEMO_A1 39, DEMO_B1 59, DEMO_D1 39 µm\); 46 µm"):
        predict(run, slide)


# ------------------------------------------------------------------------------ mistakes


def broken(tmp_path, kind):
    path = tmp_path / f"{kind}.png"
    if kind == "glass":
        Image.fromarray(np.full((300, 300, 3), 240, np.uint8)).save(path)
    elif kind == "text":
        path.write_text("no image")
    return path


@pytest.mark.parametrize(("flags", "says"), [
    (["--image", "glass"], "does not say how many µm a pixel is wide. Give it with --mpp"),
    (["--image", "glass", "--mpp", "1"], "no tissue found"),
    (["--image", "glass", "--mpp", "0.01"], "from 0.05 to 20"),
    (["--image", "text"], "cannot be read as an image"),
    (["--image", "absent"], "is missing"),
    (["--image", "glass", "--mpp", "1", "--positions", "text"], "not a position file"),
    (["--image", "glass", "--mpp", "1", "--pitch", "0"], r"--pitch 0.0: expected"),
    (["--image", "glass", "--mpp", "1", "--type", "hvg"], "hvg_best.pt is missing"),
    (["--image", "glass", "--mpp", "1", "--dataset", "nowhere"], "Train it with main.py"),
])
def test_a_users_mistake_is_one_clear_line_and_writes_nothing(run, tmp_path, flags, says):
    flags = [str(broken(tmp_path, flag)) if flag in ("glass", "text", "absent") else flag for flag in flags]
    before = sorted(run.top.glob("[sf][ai][vg]*/**/*"))
    with pytest.raises(InputError, match=says) as error:
        infer.main(["--dataset", "slides", "--device", "cpu", *flags])
    assert "\n" not in str(error.value)
    assert sorted(run.top.glob("[sf][ai][vg]*/**/*")) == before


def test_a_checkpoint_that_does_not_fit_is_refused(run, slide, tmp_path):
    here = Run("slides", "heg", tmp_path)
    for facts, says in [({"dataset": "other"}, "was trained on other heg, not on slides heg"),
                        ({"panel": ["a"]}, "another gene panel"), ({"reference": ["X9"]}, "was trained on X9, which")]:
        untrained(here.checkpoint, **facts)
        with pytest.raises(InputError, match=says):
            predict(run, slide, save_path=tmp_path)
    with pytest.raises(InputError, match=r"not a checkpoint of main.py"):
        heclip.predict_slide(slide, slide, device="cpu")


def test_positions_of_glass_only_are_refused(run, slide, tmp_path):
    (tmp_path / "positions.csv").write_text("AAAC-1,0,0,0,50,60\nAAAG-1,0,0,2,50,90\n")
    with pytest.raises(InputError, match=r"positions.csv: no spot is under tissue"):
        predict(run, slide, positions=tmp_path / "positions.csv")


@pytest.mark.parametrize("flags", [["--image", "x.tif", "--from_ebd"], ["--image", "x.tif", "--untrained"],
                                   ["--mpp", "0.5"], ["--positions", "x.csv"], ["--spatialdata", "x"]])
def test_flags_that_do_not_go_together_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        infer.parse(flags)
    assert re.search("go(es)? with", capsys.readouterr().err)


def test_importing_heclip_is_cheap_and_finds_the_functions(project):
    code = "import heclip, sys; assert not {'torch', 'numpy', 'heclip.prediction'} & set(sys.modules)"
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=project / "code")
    assert heclip.predict_slide is prediction.predict_slide
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = heclip.nothing


# ------------------------------------------------------------------------------ SpatialData


def test_without_spatialdata_the_error_says_what_to_install(predicted, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    with pytest.raises(InputError, match="pip install spatialdata"):
        prediction.write_spatialdata(predicted, tmp_path / "store.zarr")
    assert not list(tmp_path.iterdir())


def test_a_prediction_as_spatialdata(predicted, tmp_path):
    spatialdata = pytest.importorskip("spatialdata")
    prediction.write_spatialdata(predicted, tmp_path / "store.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["store.zarr"]
    with pytest.raises(InputError, match=r"store.zarr exists"):
        prediction.write_spatialdata(predicted, tmp_path / "store.zarr")
    stored = spatialdata.read_zarr(tmp_path / "store.zarr")
    np.testing.assert_array_equal(stored["table"].X, predicted.X)
    circles = stored["spots"]
    np.testing.assert_allclose(circles.geometry.x, predicted.obsm["spatial"][:, 0])
    (library,) = predicted.uns["spatial"].values()
    assert circles["radius"].iloc[0] == pytest.approx(library["scalefactors"]["spot_diameter_fullres"] / 2)
    extent = spatialdata.get_extent(stored["hires"])
    scale = library["scalefactors"]["tissue_hires_scalef"]
    assert extent["x"][1] == pytest.approx(library["images"]["hires"].shape[1] / scale)
    assert extent["y"][1] == pytest.approx(library["images"]["hires"].shape[0] / scale)
    joined, table = spatialdata.join_spatialelement_table(stored, "spots", table_name="table")
    assert len(joined["spots"]) == table.n_obs == predicted.n_obs
