"""Figures: files that repeat to the last byte, every gene drawn, spots where the slide has them."""

import anndata
import matplotlib.colors
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import spearmanr

from heclip import figures
from heclip.figures import (
    calibration_figure,
    expression_maps,
    predicted_maps,
    spots_over_slide,
    umap_figure,
)

MAGENTA = (255, 0, 255)


def section(xy, size=(600, 300), shrink=2, diameter=60, image=None, genes=3, seed=0):
    """A section on a slide of `size` = width x height pixels, its thumbnail 1 / `shrink` of it."""
    rng = np.random.default_rng(seed)
    xy = np.array(xy, float)
    values = rng.gamma(1, 1, (len(xy), genes)).astype(np.float32)
    adata = anndata.AnnData(values, var=pd.DataFrame({"symbol": [f"Sym{g}" for g in range(genes)]},
                                                     index=[f"G{g}" for g in range(genes)]))
    adata.layers["true"] = rng.gamma(1, 1, values.shape).astype(np.float32)
    adata.obsm["spatial"] = xy
    if image is None:
        image = np.full((size[1] // shrink, size[0] // shrink, 3), 255, np.uint8)
    adata.uns["spatial"] = {"S1": {
        "images": {"hires": image}, "metadata": {"mpp": 5.0},
        "scalefactors": {"tissue_hires_scalef": 1 / shrink, "spot_diameter_fullres": diameter}}}
    return adata


def lattice(columns=8, rows=5):
    return [(50 + 60 * column, 40 + 50 * row) for row in range(rows) for column in range(columns)]


def read(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def box(mask):
    """Left, top, right, bottom of a mask's pixels."""
    y, x = np.nonzero(mask)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


def clusters(n=(18, 12), width=60):
    rng = np.random.default_rng(0)
    return {"query": rng.normal(0, 1, (n[0], width)), "reference": rng.normal(3, 1, (n[1], width))}


def drawn(monkeypatch, adata, genes):
    """The figure of the maps before it is saved, and [(label, spots)] of its maps as drawn."""
    saved_figures = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: saved_figures.append(figure))
    expression_maps(adata, genes, "unused.pdf")
    (figure,) = saved_figures
    return figure, [(axes.get_title(), axes.collections[0]) for axes in figure.axes
                    if axes.get_title() in ("measured", "predicted")]


def overlaps(places):
    """How many ordered pairs of boxes (n, 4), left, bottom, right, top, have an area in common."""
    least = np.minimum(places[:, None, 2:], places[None, :, 2:])
    across = least - np.maximum(places[:, None, :2], places[None, :, :2])
    return (across > 1e-9).all(axis=2).sum()


# ------------------------------------------------------------------------------ files


DRAW = {
    "spots": lambda path: spots_over_slide(section(lattice()), "S1", path),
    "maps": lambda path: expression_maps(section(lattice()), [("G0", "best"), ("G2", "median")],
                                         path),
    "predicted maps": lambda path: predicted_maps(section(lattice()),
                                                  [("G0", "marker"), ("G2", "")], path),
}


@pytest.mark.parametrize("suffix", ["pdf", "png"])
@pytest.mark.parametrize("what", DRAW)
def test_the_same_input_gives_the_same_bytes(what, suffix, tmp_path):
    first, second = tmp_path / "a" / f"first.{suffix}", tmp_path / f"second.{suffix}"
    DRAW[what](first)
    DRAW[what](second)
    assert first.read_bytes().startswith({"pdf": b"%PDF", "png": b"\x89PNG"}[suffix])
    assert first.read_bytes() == second.read_bytes()
    assert b"Date" not in first.read_bytes()
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_a_umap_gives_the_same_bytes_twice_and_shows_every_point_in_its_groups_colour(
        tmp_path, monkeypatch):
    # umap is imported below: compiling it takes 20 seconds, running ten points uncompiled 2.
    monkeypatch.setattr("numba.config.DISABLE_JIT", True)
    saved_figures, save = [], figures._save
    monkeypatch.setattr(figures, "_save",
                        lambda figure, path: (saved_figures.append(figure), save(figure, path)))
    for name in ("first", "second"):
        umap_figure(clusters((6, 4)), tmp_path / f"{name}.png", title="demo heg: image embeddings")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()

    points = saved_figures[0].axes[0].collections[0]
    xy, colour = points.get_offsets().data, [tuple(rgba[:3]) for rgba in points.get_facecolors()]
    blue, orange = (matplotlib.colors.to_rgb(named) for named in figures.GROUP_COLOURS[:2])
    assert (colour.count(blue), colour.count(orange)) == (6, 4)
    distance = ((xy[:, None] - xy[None]) ** 2).sum(axis=2) + 1e9 * np.eye(10)
    # the two groups lie far apart
    assert [colour[nearest] for nearest in distance.argmin(axis=1)] == colour
    labels = [text.get_text() for text in saved_figures[0].legends[0].get_texts()]
    assert labels == ["query (n = 6)", "reference (n = 4)"]


def test_too_few_points_for_a_umap_are_an_error_that_counts_them(tmp_path):
    with pytest.raises(ValueError, match="at least 5 points; query and reference have 4"):
        umap_figure(clusters((3, 1)), tmp_path / "umap.pdf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", DRAW)
def test_a_figure_that_fails_leaves_no_file(what, tmp_path, monkeypatch):
    def fail(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(figures.Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space"):
        DRAW[what](tmp_path / "figure.pdf")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------- spots over the slide


@pytest.mark.parametrize(("size", "place", "shrink"), [  # every pair of values
    ((600, 300), (0.75, 0.25), 1), ((600, 300), (0.3, 0.8), 2),
    ((300, 600), (0.75, 0.25), 2), ((300, 600), (0.3, 0.8), 1)])
def test_a_spots_circle_lies_on_its_place_in_the_slide_at_its_true_size(
        size, place, shrink, tmp_path):
    # The thumbnail shows a magenta disc where the spot is, so the ring must run around it in the
    # right half.
    x, y, radius = size[0] * place[0], size[1] * place[1], 30
    row, column = np.mgrid[:size[1] // shrink, :size[0] // shrink] * shrink + (shrink - 1) / 2 + 0.5
    image = np.full((*row.shape, 3), 255, np.uint8)
    image[(column - x) ** 2 + (row - y) ** 2 < radius**2] = MAGENTA
    spots_over_slide(section([(x, y)], size, shrink, 2 * radius, image), "S1",
                     tmp_path / "spots.png")

    picture = read(tmp_path / "spots.png")
    red, green, blue = np.moveaxis(picture, 2, 0)
    disc = (red > 200) & (green < 60) & (blue > 200)
    ring = (green > 110) & (red < 60) & (blue < 110)
    middle = picture.shape[1] // 2
    assert not ring[:, :middle].any()  # the left picture is bare ...
    assert disc[:, :middle].any()
    disc[:, :middle] = False
    inner, outer = box(disc), box(ring)
    # of the thumbnail, in the picture's pixels: 5 inches at 200 dpi
    pixel = 200 * 5 / max(size) * shrink
    np.testing.assert_allclose(inner[:2] + inner[2:], outer[:2] + outer[2:], rtol=0,
                               atol=2 * pixel + 2)
    assert np.abs(inner - outer).max() <= pixel + 4


def test_every_spot_is_drawn_and_so_is_one_beyond_the_slide(monkeypatch):
    saved_figures = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: saved_figures.append(figure))
    xy = [*lattice(), (-80, 20), (640, 350)]
    spots_over_slide(section(xy), "S1", "unused.png")
    bare, circled = saved_figures[0].axes
    assert not bare.collections
    offsets = circled.collections[0].get_offsets()
    np.testing.assert_allclose(offsets, np.array(xy) * 0.005)  # millimetres at 5 microns a pixel
    (left, right), (bottom, top) = circled.get_xlim(), circled.get_ylim()
    assert left < -80 * 0.005
    assert right > 640 * 0.005
    assert bottom > 350 * 0.005 > top  # y points down
    assert circled.get_title(loc="right") == "42 spots · 5 µm per pixel"


@pytest.mark.parametrize("size", [(600, 300), (300, 600)])
def test_what_is_wrong_with_the_scale_is_written_below_the_spots(monkeypatch, size):
    saved_figures = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: saved_figures.append(figure))
    adata = section([(100, 100)], size)
    spots_over_slide(adata, "S1", "unused.png")
    notes = ["its spots are a mirror image of the array, " * 3, "a pixel is taken to be 2 µm wide"]
    adata.uns["spatial"]["S1"]["metadata"]["notes"] = "\n".join(notes)
    spots_over_slide(adata, "S1", "unused.png")
    plain, noted = saved_figures
    assert not plain.texts
    (text,) = noted.texts
    assert text.get_text().replace("\n", " ") == " ".join(note.strip() for note in notes)
    place = text.get_window_extent()
    assert place.x1 <= noted.bbox.x1
    for axes in noted.axes:  # 0.2 inches hold the scale bar
        assert place.y1 < axes.get_window_extent().y0 - 0.2 * noted.dpi


# ------------------------------------------------------------------------------ expression maps


@pytest.mark.parametrize("genes", [1, 2, 7, 10, 12])
def test_every_gene_is_drawn_measured_next_to_predicted_with_its_own_values(genes, monkeypatch):
    adata = section(lattice(), genes=12)
    order = [(f"G{g}", f"caption {g}")
             for g in np.random.default_rng(genes).permutation(12)[:genes]]
    figure, maps = drawn(monkeypatch, adata, order)
    assert [label for label, _ in maps] == ["measured", "predicted"] * genes
    for (gene, _), (_, measured), (_, predicted) in zip(order, maps[::2], maps[1::2], strict=True):
        np.testing.assert_array_equal(measured.get_array(), adata[:, gene].layers["true"].ravel())
        np.testing.assert_array_equal(predicted.get_array(), adata[:, gene].X.ravel())
        for spots in (measured, predicted):
            np.testing.assert_allclose(spots.get_offsets(), adata.obsm["spatial"] * 0.005)
        assert measured.norm is predicted.norm
    written = [text.get_text() for axes in figure.axes for text in axes.texts]
    for gene, caption in order:
        assert caption in written
        assert adata.var.at[gene, "symbol"] in written


@pytest.mark.parametrize("genes", [1, 2, 3, 5, 8, 12])
def test_the_maps_lie_on_the_page_and_none_over_another(genes, monkeypatch):
    figure, _ = drawn(monkeypatch, section(lattice()[:9]), [("G0", "")] * genes)
    # (n, 4): left, bottom, right, top
    places = np.array([axes.get_position().extents for axes in figure.axes])
    assert len(places) == 1 + 3 * genes  # the slide; two maps and a colour bar for each gene
    assert places.min() >= 0
    assert places.max() <= 1
    assert overlaps(places) == len(places)  # each with itself alone


@pytest.mark.parametrize("genes", [1, 7])
def test_maps_of_few_and_many_genes_are_written(genes, tmp_path):
    expression_maps(section(lattice(), genes=7),
                    [(f"G{g}", "best · r = 0.50") for g in range(genes)], tmp_path / "maps.png")
    picture = read(tmp_path / "maps.png")
    assert (np.ptp(picture, axis=2) > 60).mean() > 0.01  # coloured spots


def test_dark_is_high_and_the_scale_is_the_measured_one(monkeypatch):
    adata = section(lattice(10, 20), genes=1)
    adata.X[0] = 99  # one wild prediction
    _, maps = drawn(monkeypatch, adata, [("G0", "")])
    values = np.sort(adata.layers["true"].ravel())
    norm = maps[0][1].norm
    assert (norm.vmin, norm.vmax) == (values[2], values[197])  # the 1st and 99th percentile of 200
    light = matplotlib.colors.rgb_to_hsv(maps[0][1].cmap([0.0, 0.5, 1.0])[:, :3])[:, 2]
    assert light[0] > light[1] > light[2]


def test_a_gene_found_in_one_spot_keeps_its_scale_and_a_constant_one_is_pale(monkeypatch):
    adata = section(lattice(20, 20), genes=2)
    adata.layers["true"][:, 0] = np.eye(400)[7] * 3
    adata.layers["true"][:, 1] = 1.7
    _, maps = drawn(monkeypatch, adata, [("G0", ""), ("G1", "")])
    rare, constant = maps[0][1].norm, maps[2][1].norm
    assert (rare.vmin, rare.vmax) == (0, 3)
    assert constant.vmin == pytest.approx(1.7)
    assert constant.vmax > constant.vmin


@pytest.mark.parametrize("value", [0.0, 1.7])
def test_a_constant_gene_is_drawn_too(value, tmp_path):
    adata = section(lattice())
    adata.X[:, 1] = value
    adata.layers["true"][:, 1] = value
    expression_maps(adata, [("G1", "constant")], tmp_path / "maps.pdf")
    assert (tmp_path / "maps.pdf").stat().st_size > 1000


def test_a_gene_outside_the_panel_is_a_key_error_that_names_it(tmp_path):
    with pytest.raises(KeyError, match="not in this panel of 3 genes: G7, G9"):
        expression_maps(section(lattice()), [("G1", ""), ("G7", ""), ("G9", "")],
                        tmp_path / "maps.pdf")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------- maps where nothing was measured


def drawn_without_truth(monkeypatch, adata, genes):
    """The figure of the maps before it is saved, and the spots of its maps as drawn."""
    saved_figures = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: saved_figures.append(figure))
    predicted_maps(adata, genes, "unused.pdf")
    maps = [axes for axes in saved_figures[0].axes if axes.images and axes.collections]
    return saved_figures[0], [axes.collections[0] for axes in maps]


def test_every_gene_is_drawn_in_its_own_colours_where_the_slide_has_its_spots(monkeypatch):
    adata = section(lattice(), genes=4)
    del adata.layers["true"]
    figure, maps = drawn_without_truth(monkeypatch, adata, [("G3", "marker"), ("G1", "")])
    assert len(maps) == 2
    for spots, gene in zip(maps, ("G3", "G1"), strict=True):
        values = adata.obs_vector(gene)
        np.testing.assert_array_equal(spots.get_array(), values)
        low, high = np.percentile(values, [1, 99], method="nearest")
        assert (spots.norm.vmin, spots.norm.vmax) == (low, high)
        np.testing.assert_allclose(spots.get_offsets(), adata.obsm["spatial"] * 0.005)  # mm
        assert spots.get_widths()[0] == pytest.approx(60 * 0.005)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title for title in titles if title] == ["S1 · H&E", "Sym3", "Sym1"]


@pytest.mark.parametrize("genes", [1, 2, 3, 5, 8])
def test_the_predicted_maps_lie_on_the_page_and_none_over_another(genes, monkeypatch):
    figure, _ = drawn_without_truth(monkeypatch, section(lattice()[:9]), [("G0", "")] * genes)
    places = np.array([axes.get_position().extents for axes in figure.axes])
    assert len(places) == 1 + 2 * genes  # the slide; a map and a colour bar for each gene
    assert places.min() >= 0
    assert places.max() <= 1
    assert overlaps(places) == len(places)


def test_spots_too_small_for_their_colour_to_show_are_drawn_to_touch(monkeypatch):
    square = np.array(lattice(200, 200)) * [50 / 60, 1]  # 50 pixels apart both ways
    adata = section(square, size=(12000, 10000), shrink=50, diameter=10)
    _, maps = drawn_without_truth(monkeypatch, adata, [("G0", "")])
    assert maps[0].get_widths()[0] == pytest.approx(1.1 * 50 * 0.005)


# ------------------------------------------------------------------------------ calibration


def calibrated(monkeypatch, adata):
    """The axes of the calibration figure before it is saved; None if nothing is drawn."""
    saved_figures = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: saved_figures.append(figure))
    calibration_figure(adata, "unused.png", title="demo")
    return saved_figures[0].axes if saved_figures else None


def certain(adata, obs=(), var=()):
    """A prediction with these measures of how far to trust it, and what its genes reached."""
    rng = np.random.default_rng(3)
    for name in obs:
        adata.obs[name] = rng.uniform(0, 1, adata.n_obs)
    for name in ("pearson", *var):
        adata.var[name] = rng.uniform(0, 1, adata.n_vars)
    return adata


BOTH, EXPECTED = ("similarity", "spread"), ("expected_pearson",)


@pytest.mark.parametrize(("obs", "var", "shown"), [
    (BOTH, EXPECTED, ["similarity to the retrieved spots", "spread of the retrieved spots",
                      "Pearson of the gene, expected"]),
    (BOTH, (), ["similarity to the retrieved spots", "spread of the retrieved spots"]),
    ((), EXPECTED, ["Pearson of the gene, expected"])])  # a regression retrieves nothing
def test_calibration_shows_the_measures_that_there_are(obs, var, shown, monkeypatch):
    adata = certain(section(lattice()), obs, var)
    panels = calibrated(monkeypatch, adata)
    assert [axes.get_xlabel() for axes in panels] == shown
    for axes, name in zip(panels, obs, strict=False):
        value, error = axes.collections[0].get_offsets().data.T
        np.testing.assert_allclose(value, adata.obs[name])
        expected = [np.sqrt(np.mean((predicted - true) ** 2))
                    for predicted, true in zip(adata.X, adata.layers["true"], strict=True)]
        np.testing.assert_allclose(error, expected, rtol=1e-5)
        assert axes.get_title(loc="right") == f"ρ = {spearmanr(value, error).statistic:.2f}"
        tenths = np.stack(axes.lines[0].get_data(), axis=1)
        assert len(tenths) == 10
        lowest = np.argsort(value)[:4]  # of 40 spots
        first = [value[lowest].mean(), error[lowest].mean()]
        np.testing.assert_allclose(tenths[0], first, rtol=1e-5)
    if var:
        points = panels[-1].collections[0].get_offsets()
        np.testing.assert_allclose(points, adata.var[["expected_pearson", "pearson"]])


def test_calibration_draws_nothing_where_nothing_is_known(monkeypatch):
    assert calibrated(monkeypatch, certain(section(lattice()))) is None


def test_calibration_is_written_and_takes_fewer_spots_than_tenths(tmp_path):
    few = certain(section(lattice()[:3]), BOTH, EXPECTED)
    calibration_figure(few, tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").stat().st_size > 1000
