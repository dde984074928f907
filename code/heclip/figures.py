"""Figures: the spots over their slide, UMAPs, measured and predicted expression over the tissue.

They are drawn on `Figure` objects and never through pyplot, so that a caller's own figures are left
alone. The same input gives the same bytes, because files carry no date and everything random is
seeded.
"""

from math import ceil, log
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.collections import EllipseCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.stats import spearmanr

from .files import atomic_path
from .spots import pitch

SPOT_COLOUR = "#009540"  # far from every colour of haematoxylin and eosin
# Dark is high, so that on white paper the eye finds what is expressed. The palest end is left out
# because it would be lost on the slide's white.
EXPRESSION_COLOURS = ListedColormap(colormaps["magma_r"](np.linspace(0.07, 1, 256)))
# Okabe and Ito's, which colour-blind readers tell apart.
GROUP_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]
NOTE_COLOUR = "#B00020"
DPI = 200  # of the parts drawn in pixels
NO_DATES = {".pdf": {"CreationDate": None, "ModDate": None}, ".svg": {"Date": None}}


def spots_over_slide(section, name, path):
    """Draw a section's thumbnail, bare and with every spot as an open circle of its true diameter.

    A wrong alignment, a swapped x and y or a flipped image is seen at a glance, because the circles
    leave the tissue.

    What is said to be wrong with the section's places and scale is written below.

    section: AnnData with obsm["spatial"] (n_spots, 2), x and y in full-resolution pixels, and
    uns["spatial"]. name: the title. path: of the picture; its suffix sets the format.
    """
    view = _view(section)
    # Spots off the slide stay in the picture, because it is there to show them.
    left, top = np.minimum(view.spots.min(0) - view.diameter, 0)
    right, bottom = np.maximum(view.spots.max(0) + view.diameter, view.size)
    extent = np.array([right - left, bottom - top])
    width, height = 5 * extent / extent.max()  # inches
    across = 2 * width + 0.3
    # A letter is 0.075 inches wide on average, and a line 0.16 inches high.
    lines = [line for note in view.notes for line in wrap(note, max(20, int(across / 0.075)))]
    figure = Figure(figsize=(across, height + 0.65 + 0.16 * len(lines)))
    if lines:
        figure.text(0.1 / across, 0.05 / figure.get_figheight(), "\n".join(lines), va="bottom",
                    fontsize=8, linespacing=1.3, color=NOTE_COLOUR)
    bare, circled = (_axes(figure, x, 0.35, width, height) for x in (0.1, width + 0.2))
    for axes in (bare, circled):
        _draw_slide(axes, view, view.image, (left, right, bottom, top))
    _draw_spots(circled, view, facecolors="none", edgecolors=SPOT_COLOUR, linewidths=0.6)
    _scale_bar(bare)
    bare.set_title(name, loc="left", fontsize=11)
    circled.set_title(f"{section.n_obs:,} spots · {view.mpp:.3g} µm per pixel", loc="right",
                      fontsize=11)
    _save(figure, path)


def umap_figure(groups, path, seed=42, title=""):
    """Draw one UMAP of all groups together, each in its colour.

    groups: name → (n, D) array, with the same D for all. If D is above 50, the first 50 principal
    components are used. Raises ValueError if the groups have fewer than 5 points together.
    """
    stacked = np.concatenate([np.asarray(rows, np.float32) for rows in groups.values()])  # (N, D)
    if len(stacked) < 5:
        raise ValueError(f"a UMAP needs at least 5 points; {' and '.join(groups)} have "
                         f"{len(stacked)}")
    if stacked.shape[1] > 50:
        from sklearn.decomposition import PCA

        stacked = PCA(min(50, len(stacked)), random_state=seed).fit_transform(stacked)  # (N, ≤ 50)
    from umap import UMAP  # here, because this import takes seconds

    umap = UMAP(n_neighbors=min(15, len(stacked) - 1), random_state=seed, n_jobs=1)
    points = umap.fit_transform(stacked)  # (N, 2)

    sizes = [len(rows) for rows in groups.values()]
    palette = GROUP_COLOURS if len(groups) <= len(GROUP_COLOURS) else colormaps["tab20"].colors
    colours = [palette[i % len(palette)] for i in range(len(groups))]
    colour_of = np.repeat(np.arange(len(groups)), sizes)  # (N,)
    # In random order, so that no group lies on top of another.
    order = np.random.default_rng(seed).permutation(len(points))

    figure = Figure(figsize=(4.6, 4.9), layout="constrained")
    axes = figure.add_subplot(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    axes.scatter(*points[order].T, c=[colours[i] for i in colour_of[order]], alpha=0.8,
                 linewidths=0, s=np.clip(2e4 / len(points), 2, 16), rasterized=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    handles = [Line2D([], [], linestyle="", marker="o", color=colour, label=f"{name} (n = {n:,})")
               for name, n, colour in zip(groups, sizes, colours, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(2, len(groups)),
                  fontsize=8, frameon=False, handletextpad=0.1)
    _save(figure, path)


def expression_maps(prediction, genes, path):
    """Draw the slide, and for each gene its measured and its predicted expression over the tissue.

    The two maps of a gene share one colour scale, from the 1st to the 99th percentile of its
    measured values.

    prediction: AnnData, spots × panel. X is the predicted and layers["true"] the measured
    log-normalised expression; var["symbol"], obsm["spatial"] and uns["spatial"] are as in a
    section.
    genes: [(gene id, caption)] in the order to draw. Raises KeyError for an id outside the panel.
    """
    unknown = [gene for gene, _ in genes if gene not in prediction.var_names]
    if unknown:
        raise KeyError(f"not in this panel of {prediction.n_vars} genes: {', '.join(unknown)}")
    view = _view(prediction)
    box, shape = _frame(view)

    # In inches. A cell is a title, two maps and their colour bar. The slide takes two cells, one
    # above the other. Next to a single gene it takes the place of one map.
    edge, gap, head, foot, bar_room, map_height = 0.1, 0.08, 0.46, 0.2, 0.62, 1.9
    map_width = map_height * shape
    cell_width, cell_height = 2 * map_width + 2 * gap + bar_room, head + map_height + foot
    slide_rows = min(2, len(genes))
    first_width = cell_width if slide_rows == 2 else map_width + 3 * gap
    columns, rows = _grid(len(genes) + slide_rows, cell_width / cell_height)
    figure = Figure(figsize=(edge + first_width + (columns - 1) * cell_width, rows * cell_height))

    slide_width = min((slide_rows * cell_height - head - foot) * shape, first_width - 3 * gap)
    axes = _axes(figure, edge, head, slide_width, slide_width / shape)
    _draw_slide(axes, view, view.image, box)
    _scale_bar(axes)
    axes.set_title(f"{view.name} · H&E", loc="left", fontsize=9.5)

    faint = _faint(view.image)
    cells = [(row, column) for row in range(rows) for column in range(columns)
             if column or row >= slide_rows]
    for (row, column), (gene, caption) in zip(cells, genes, strict=False):
        x = edge
        if column:
            x = edge + (first_width + (column - 1) * cell_width)
        y = head + row * cell_height
        places = [(x + i * (map_width + gap), y, map_width, map_height) for i in range(2)]
        values = {"measured": prediction.obs_vector(gene, layer="true"),
                  "predicted": prediction.obs_vector(gene)}
        first, spots = _pair_of_maps(figure, places, view, (faint, box), values)
        _caption(first, prediction.var.at[gene, "symbol"], caption)
        _colour_bar(figure, spots, _axes(figure, x + 2 * (map_width + gap), y, 0.07, map_height),
                    np.concatenate(list(values.values())))
    _save(figure, path)


def _pair_of_maps(figure, places, view, background, values):
    """Draw a gene's measured and predicted map with one colour scale: (first axes, last spots).

    places: (x, y, width, height) of each map, in inches. background: the slide's picture and what
    the maps show of it. values: "measured" and "predicted" -> (n_spots,).
    """
    scale, every = _robust_scale(values["measured"]), []
    for place, (label, expression) in zip(places, values.items(), strict=True):
        axes = _axes(figure, *place)
        every.append(axes)
        _draw_slide(axes, view, *background)
        spots = _draw_spots(axes, view, array=expression, norm=scale, cmap=EXPRESSION_COLOURS,
                            linewidths=0)
        axes.set_title(label, fontsize=7.5, color="0.35", pad=3)
    return every[0], spots


def _caption(axes, symbol, caption):
    """Write a gene's symbol above its first map, and the caption to the right of the symbol."""
    above = {"textcoords": "offset points", "va": "baseline"}
    text = axes.annotate(symbol, (0, 1), (0, 16), "axes fraction", style="italic", fontsize=9.5,
                         **above)
    axes.annotate(caption, (1, 1), (6, 16), (text, "axes fraction"), fontsize=8.5, **above)


def predicted_maps(prediction, genes, path):
    """Draw the slide, and for each gene its predicted expression, where none was measured.

    Each map's colours run from the 1st to the 99th percentile of its own values.

    prediction, genes: as for `expression_maps`; no layer is needed.
    """
    view = _view(prediction)
    box, shape = _frame(view)
    edge, head, foot, bar_room, map_height = 0.1, 0.3, 0.25, 0.62, 2.4  # inches
    map_width = map_height * shape
    cell_width, cell_height = map_width + bar_room, head + map_height + foot
    columns, rows = _grid(len(genes) + 1, cell_width / cell_height)
    figure = Figure(figsize=(edge + columns * cell_width, rows * cell_height))
    cells = [(edge + column * cell_width, head + row * cell_height)
             for row in range(rows) for column in range(columns)]

    axes = _axes(figure, *cells[0], map_width, map_height)
    _draw_slide(axes, view, view.image, box)
    _scale_bar(axes)
    axes.set_title(f"{view.name} · H&E", loc="left", fontsize=9.5)
    faint = _faint(view.image)
    # A circle of fewer than 4 pixels would look paler than its colour.
    if view.diameter / (box[1] - box[0]) * map_width * DPI < 4:
        if len(view.spots) > 1:
            view = view._replace(diameter=max(view.diameter, 1.1 * pitch(view.spots)))
    for (x, y), (gene, caption) in zip(cells[1:], genes, strict=False):
        values = prediction.obs_vector(gene)
        axes = _axes(figure, x, y, map_width, map_height)
        _draw_slide(axes, view, faint, box)
        spots = _draw_spots(axes, view, array=values, norm=_robust_scale(values),
                            cmap=EXPRESSION_COLOURS, linewidths=0)
        axes.set_title(prediction.var.at[gene, "symbol"], loc="left", style="italic", fontsize=9.5)
        axes.set_title(caption, loc="right", fontsize=7.5, color="0.35")
        _colour_bar(figure, spots, _axes(figure, x + map_width + 0.08, y, 0.07, map_height), values)
    _save(figure, path)


def calibration_figure(prediction, path, title=""):
    """Draw each measure of uncertainty against what it should predict.

    Per spot, that is the root mean squared error over genes, drawn for tenths of each measure. Per
    gene, it is the correlation reached.
    prediction: AnnData, spots x panel, as infer.py writes it, with layers["true"]. A regression
    lacks obs["similarity"] and obs["spread"]. A model without validation spots lacks
    var["expected_pearson"]; other models have it and var["pearson"]. If all measures are absent,
    nothing is drawn.
    """
    labels = {"similarity": "similarity to", "spread": "spread of"}
    measures = [measure for measure in labels if measure in prediction.obs]
    has_expected = "expected_pearson" in prediction.var
    n_panels = len(measures) + has_expected
    if not n_panels:
        return
    error = np.sqrt(((prediction.X - prediction.layers["true"]) ** 2).mean(axis=1))  # (n,)
    figure = Figure(figsize=(3.1 * n_panels, 3.2), layout="constrained")
    panels = list(figure.subplots(1, n_panels, squeeze=False)[0])
    for axes, measure in zip(panels, measures, strict=False):
        value = prediction.obs[measure].to_numpy()
        tenths = np.array_split(np.argsort(value, kind="stable"), min(10, len(value)))
        axes.scatter(value, error, s=4, linewidths=0, color="0.8", rasterized=True)
        means = [(value[rows].mean(), error[rows].mean()) for rows in tenths]
        axes.plot(*zip(*means, strict=True), "o-", ms=4, color=GROUP_COLOURS[0])
        axes.set(xlabel=f"{labels[measure]} the retrieved spots", ylabel="RMSE of the spot")
        axes.set_title(f"ρ = {_rank_correlation(value, error):.2f}", loc="right", fontsize=9)
    if has_expected:
        expected, reached = (prediction.var[column].to_numpy()
                             for column in ("expected_pearson", "pearson"))
        panels[-1].axline((0, 0), slope=1, color="0.6", linewidth=0.8)
        panels[-1].scatter(expected, reached, s=6, linewidths=0, color=GROUP_COLOURS[0], alpha=0.6,
                           rasterized=True)
        panels[-1].set(xlabel="Pearson of the gene, expected", ylabel="reached")
        panels[-1].set_title(f"ρ = {_rank_correlation(expected, reached):.2f}", loc="right",
                             fontsize=9)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    _save(figure, path)


def _rank_correlation(x, y):
    """Spearman's correlation of the values that are finite in both x and y, (n,) each."""
    both = np.isfinite(x) & np.isfinite(y)
    return spearmanr(x[both], y[both]).statistic


class _View(NamedTuple):
    """What the figures show of a section, in millimetres, so that all resolutions draw alike."""

    name: str
    image: np.ndarray  # uint8 (H, W, 3), the thumbnail
    size: np.ndarray  # (2,), its width and height
    spots: np.ndarray  # (n_spots, 2), x and y of the centres from the top left corner
    diameter: float
    mpp: float  # microns per full-resolution pixel
    notes: list  # what is said to be wrong with its places and scale


def _view(section):
    """The _View of a section."""
    ((name, library),) = section.uns["spatial"].items()
    image, factors = library["images"]["hires"], library["scalefactors"]
    mpp = library["metadata"]["mpp"]
    mm = mpp / 1000  # width of one full-resolution pixel
    size = np.array(image.shape[1::-1]) / factors["tissue_hires_scalef"] * mm
    spots, diameter = section.obsm["spatial"] * mm, factors["spot_diameter_fullres"] * mm
    notes = library["metadata"].get("notes", "").splitlines()  # other programs write none
    return _View(name, image, size, spots, diameter, mpp, notes)


def _frame(view):
    """The part of a slide that the maps show, (left, right, bottom, top), and its width/height."""
    low, high = view.spots.min(0), view.spots.max(0)
    extent = high - low + 4 * view.diameter
    extent = np.maximum(extent, extent[::-1] / 1.5)  # so that a sliver leaves room for a colour bar
    (left, top), (right, bottom) = (low + high - extent) / 2, (low + high + extent) / 2
    return (left, right, bottom, top), extent[0] / extent[1]


def _faint(image):
    """The image, grey and faint: the tissue under a spot shows, and is not taken for expression."""
    return (255 - 0.3 * (255 - image.mean(2, keepdims=True))).astype(np.uint8).repeat(3, axis=2)


def _axes(figure, x, y, width, height):
    """Bare axes, placed in inches from the figure's top left corner."""
    across, down = figure.get_size_inches()
    axes = figure.add_axes((x / across, 1 - (y + height) / down, width / across, height / down))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def _draw_slide(axes, view, image, box):
    """Draw a picture of the slide; box: the part that is shown, (left, right, bottom, top)."""
    axes.imshow(image, extent=(0, view.size[0], view.size[1], 0))
    axes.set(xlim=box[:2], ylim=box[2:])  # y points down, as in the image


def _draw_spots(axes, view, **style):
    """Circles in the slide's own units, which keep their true size at any size of the figure."""
    # With one width for all spots, a PDF holds one circle, stamped n_spots times.
    circles = EllipseCollection([view.diameter], [view.diameter], [0], units="xy",
                                offsets=view.spots, offset_transform=axes.transData, **style)
    return axes.add_collection(circles, autolim=False)


def _colour_bar(figure, spots, axes, values):
    """The key to a map's colours, with arrows where `values` lie outside its scale."""
    scale = spots.norm
    below, above = values.min() < scale.vmin, values.max() > scale.vmax
    extend = ["neither", "min", "max", "both"][below + 2 * above]
    bar = figure.colorbar(spots, cax=axes, ticks=MaxNLocator(4, steps=[1, 2, 5, 10]), extend=extend,
                          extendfrac=0.04)
    bar.set_label("log-normalised expression", fontsize=7)
    bar.ax.tick_params(labelsize=6.5, length=2, pad=1.5, width=0.5)
    bar.outline.set(edgecolor="0.7", linewidth=0.4)


def _scale_bar(axes):
    """One millimetre, below the lower left corner where it hides no tissue."""
    left = axes.get_xlim()[0]
    below = axes.get_xaxis_transform()  # x in millimetres, y in heights of the axes
    axes.plot([left, left + 1], [-0.02, -0.02], color="black", linewidth=2, solid_capstyle="butt",
              transform=below, clip_on=False)
    axes.text(left + 1, -0.02, "  1 mm", va="center", fontsize=8, transform=below)


def _robust_scale(measured):
    """A colour scale from the 1st to the 99th percentile of a gene's values."""
    low, high = np.percentile(measured, [1, 99], method="nearest")
    if low == high:  # a gene found in fewer than one spot in a hundred
        low, high = measured.min(), measured.max()
    if not high > low:
        high = low + 1
    return Normalize(low, high)


def _grid(cells, shape):
    """(columns, rows) for `cells` cells of width / height `shape`: near 3 : 2, few left empty."""
    if cells == 2:  # the slide and one gene
        return 2, 1
    grids = [(columns, max(2, ceil(cells / columns))) for columns in range(2, cells)]

    def cost(grid):
        columns, rows = grid
        return abs(log(columns / rows * shape / 1.5)) + 0.15 * (columns * rows - cells)

    return min(grids, key=cost)


def _save(figure, path):
    """Write a figure in the format of the path's suffix."""
    path = Path(path)
    # TrueType keeps text editable. The salt gives an SVG the same ids every time. Zlib's best level
    # would take four times as long as its fastest on these large pictures, and save a tenth.
    options = {".png": {"pil_kwargs": {"compress_level": 1}},
               ".jpg": {"pil_kwargs": {"quality": 92}}}
    with rc_context({"pdf.fonttype": 42, "svg.hashsalt": "heclip"}), atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=DPI,
                       metadata=NO_DATES.get(path.suffix), **options.get(path.suffix, {}))
