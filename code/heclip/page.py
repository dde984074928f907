"""One HTML page per prediction: maps of every gene, scores, checks and provenance.

The page is one file that opens by double click and fetches nothing. Bokeh draws the maps and its
script is part of the file. `page.html` is the template, and `page.js` reacts to the reader.

Symbols: n spots, G genes of the panel, g genes on the page, L steps of the stored values.
"""

import base64
import io
import json
import re
import zlib
from importlib.metadata import version
from pathlib import Path

import anndata
import jinja2
import numpy as np
import pandas as pd
from bokeh import palettes
from bokeh.embed import components
from bokeh.models import (
    Circle,
    ColumnDataSource,
    ImageURL,
    LinearColorMapper,
    PanTool,
    Plot,
    Range1d,
    ScaleBar,
    WheelZoomTool,
)
from bokeh.resources import Resources
from matplotlib.colors import to_hex
from PIL import Image
from scipy.stats import spearmanr

from . import tissue
from .checkpoint import LIBRARIES
from .figures import EXPRESSION_COLOURS, SPOT_COLOUR, _faint, _frame, _view
from .files import InputError, atomic_path, first_line
from .spots import array_of, pitch

MOST_BYTES = 21_500_000  # of the stored values; with Bokeh and the picture a page is below 25 MB
STEPS = (256, 192, 128, 96, 64, 48, 40, 32)  # of a gene's stored values, finest first
SAMPLED_GENES = 48  # to find the finest steps that fit
MAIN_SCORES = ("Pearson", "HEG-50", "HVG-50", "Pearson per spot", "Spearman", "markers", "Hit@5",
               "RMSE, log-normalised")
COLUMN_NAMES = {"both": "both retrievals", "gene": "gene retrieval", "image": "image retrieval",
                "untrained gene": "untrained, gene", "untrained image": "untrained, image",
                "untrained regression": "untrained", "random": "random spots"}
RANDOM_NAME = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
MAPS = {"slide": "Slide and spots", "measured": "Measured", "predicted": "Predicted",
        "difference": "Predicted − measured", "spread": "Spread of the retrieved spots",
        "similarity": "Similarity to the retrieved spots"}
# Dark is high in all but the difference, whose middle is pale.
COLOURS = {"expression": [to_hex(colour) for colour in EXPRESSION_COLOURS.colors],
           "difference": palettes.diverging_palette(
               palettes.Blues256, palettes.Oranges256, n=255, midpoint=0.5),
           "certainty": list(reversed(palettes.Viridis256))}
FOLDER = Path(__file__).parent


def write_page(path, prediction, scores=None, *, command="", warned=()):
    """Write the page of a prediction to `path`.

    prediction: path of the h5ad that infer.py wrote, of a section or of a slide. scores: path of
    the section's scores; None for a slide. command: the command line that made the prediction.
    warned: texts of the warnings that it gave.
    Raises InputError if a file is missing, damaged or not of this prediction.
    """
    result, about = read_prediction(prediction)
    if "true" in result.layers and not scores:
        raise InputError(f"{prediction} holds measured expression, so its page needs its scores. "
                         "Give the path of its _scores.json too")
    per_gene = gene_table(result, about)
    summary = read_scores(scores, about) if scores else None
    view = _view(result)
    kept, steps, lines, ranges = pack(result, prediction)
    script, divisions = embedded(draw_maps(view, result))
    data = {"steps": steps, "ranges": ranges, "spots": list(result.obs_names),
            "maps": list(divisions), "colours": COLOURS, "diameter": view.diameter,
            "genes": gene_columns(per_gene.iloc[kept])}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined)
    text = environment.get_template("page.html").render(
        name=view.name, about=about, dataset=about["model"]["settings"]["dataset"],
        kind=about["model"]["settings"]["type"], n_spots=result.n_obs, n_genes=result.n_vars,
        n_shown=len(kept), steps=steps, lines=lines, data=data, maps=divisions, titles=MAPS,
        bokeh=Resources("inline", components=["bokeh"]).render_js(), script=script,
        own_script=(FOLDER / "page.js").read_text("utf-8"),
        scores=score_tables(summary), sentences=sentences(view.name, about, per_gene, summary),
        checks=checks(view, result, about), warned=list(warned),
        provenance=provenance(about, view, command, prediction))
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------------- 1. read


def read_prediction(path):
    """A prediction that infer.py wrote: (AnnData, its uns["heclip"])."""
    try:
        result = anndata.read_h5ad(path)
        about = json.loads(result.uns["heclip"])
        about["model"]["settings"], about["query"], _view(result)
    except FileNotFoundError:
        raise InputError(f"{path} is missing. Make it with infer.py") from None
    except Exception as error:  # another program's file
        raise InputError(f"{path} was not written by infer.py, or is damaged "
                         f"({first_line(error)}). Predict again") from None
    return result, about


def gene_table(result, about):
    """What is known of each gene, by gene id: symbol, marker, and numbers that may be NaN.

    expected: the correlation on the validation spots of the training, if there were any. Where
    expression was measured, reached: the correlation, and error: the root mean squared difference
    of predicted and measured values. Elsewhere, deviation: that of the predicted values.
    """
    table = pd.DataFrame({"symbol": result.var["symbol"].astype(str),
                          "marker": result.var["marker"].astype(bool)})
    if "true" in result.layers:
        table["reached"] = result.var["pearson"]
    if about["model"]["validation"] is not None:
        table["expected"] = np.array(about["model"]["validation"], np.float64)
    if "true" in result.layers:
        error = np.sqrt(((result.X - result.layers["true"]) ** 2).mean(axis=0))
        return table.assign(error=error)
    return table.assign(deviation=result.X.std(axis=0))


def read_scores(path, about):
    """The scores of a section as infer.py wrote them."""
    try:
        scores = json.loads(Path(path).read_text(encoding="utf-8"))
        scores["scores"], query = dict(scores["scores"]), scores["query"]
    except Exception as error:
        raise InputError(f"{path} is missing or damaged ({first_line(error)}). Predict "
                         "again") from None
    if query != about["query"]:
        raise InputError(f"{path} is of {query}, and the prediction of {about['query']}. Predict "
                         "again")
    return scores


# ----------------------------------------------------------------------------------------- 2. pack


def pack(result, path):
    """The values of as many genes as fit, for `page.js`: (rows of var, steps, lines, ranges).

    A line is one gene: base64 of the zlib-compressed steps of its spots, measured before predicted.
    ranges: "measured" or "predicted" -> [[lowest, highest]] of each gene. A value is
    lowest + step / (steps - 1) * (highest - lowest).
    Markers are kept first, then the panel's order counts.
    """
    layers = {"predicted": result.X}
    if "true" in result.layers:
        layers = {"measured": result.layers["true"]} | layers
    for name, values in layers.items():
        if not np.isfinite(values).all():
            raise InputError(f"{path} has {name} values that are not numbers. Predict again")
    order = np.argsort(~result.var["marker"].to_numpy(bool), kind="stable")
    sample = order[np.unique(np.linspace(0, len(order) - 1, SAMPLED_GENES).astype(int))]
    for steps in STEPS:
        size = 1 + sum(len(packed(layers, gene, steps)) for gene in sample) / len(sample)
        if size * len(order) <= MOST_BYTES:
            break
    kept, lines, left = [], [], MOST_BYTES
    for gene in order:
        line = packed(layers, gene, steps)
        if len(line) >= left:
            break
        left -= len(line) + 1
        kept.append(int(gene))
        lines.append(line)
    ranges = {name: [[float(values[:, gene].min()), float(values[:, gene].max())] for gene in kept]
              for name, values in layers.items()}
    return kept, steps, lines, ranges


def packed(layers, gene, steps):
    """One gene's values in all layers as a line of text, see `pack`."""
    rows = [quantised(values[:, gene], steps) for values in layers.values()]
    return base64.b64encode(zlib.compress(np.concatenate(rows).tobytes())).decode()


def quantised(values, steps):
    """Values (n,) as whole steps from 0 at the lowest to steps - 1 at the highest: uint8 (n,)."""
    values = np.asarray(values, np.float64)
    low, high = values.min(), values.max()
    scale = (steps - 1) / (high - low) if high > low else 0.0
    return np.rint((values - low) * scale).astype(np.uint8)


def gene_columns(table):
    """The gene table for `page.js`: names, and the numbers that the reader can sort by."""
    titles = {"reached": ("reached r", "Pearson correlation of predicted and measured here"),
              "expected": ("expected r", "Pearson correlation on the training's validation spots"),
              "error": ("error", "root mean squared difference of predicted and measured values"),
              "deviation": ("SD", "standard deviation of the predicted values over the spots")}
    shown = [name for name in titles if name in table]
    numbers = [{"name": name, "label": titles[name][0], "title": titles[name][1],
                "values": [None if np.isnan(value) else round(float(value), 4)
                           for value in table[name]]} for name in shown]
    return {"ids": list(table.index), "symbols": list(table["symbol"]),
            "markers": [bool(marker) for marker in table["marker"]], "numbers": numbers}


# ----------------------------------------------------------------------------------------- 3. maps


def draw_maps(view, result):
    """The maps as Bokeh figures, name -> figure. They move together.

    `page.js` fills the source "gene" with the chosen gene's values.
    """
    (left, right, bottom, top), shape = _frame(view)
    ranges = {"x_range": Range1d(left, right, name="x"), "y_range": Range1d(bottom, top, name="y")}
    x, y = view.spots.T
    zeros = np.zeros(len(x), np.float32)
    certainty = {name: result.obs[name].to_numpy(np.float32)
                 for name in ("spread", "similarity") if name in result.obs}
    names = ["measured", "predicted", "difference"] if "true" in result.layers else ["predicted"]
    gene = ColumnDataSource({"x": x, "y": y} | dict.fromkeys(names, zeros), name="gene")
    fixed = ColumnDataSource({"x": x, "y": y} | certainty, name="fixed")
    pictures = {faint: picture_source(view, faint) for faint in (False, True)}
    radius = max(view.diameter, least_diameter(view, right - left)) / 2
    maps = {}
    for name in ["slide", *names, *certainty]:
        plot = empty_map(ranges, shape)
        plot.add_glyph(pictures[name != "slide"],
                       ImageURL(url="url", x=0, y=0, w="w", h="h", anchor="top_left"))
        thin = len(x) >= 5000  # thick circles would hide the tissue
        colour = {"fill_color": None, "line_color": SPOT_COLOUR, "line_width": 0.4 if thin else 1.3}
        if name != "slide":
            mapper = LinearColorMapper(palette_of(name), name=f"{name} colours", **limits(
                certainty.get(name)))
            colour = {"fill_color": {"field": name, "transform": mapper}, "line_color": None}
        spots = plot.add_glyph(fixed if name in certainty else gene, Circle(
            x="x", y="y", radius=radius, **colour), name=f"{name} spots")
        # Nothing is selected, so one glyph is enough.
        spots.selection_glyph = spots.nonselection_glyph = spots.muted_glyph = None
        maps[name] = plot
    maps["slide"].add_layout(scale_bar())
    return maps


def embedded(maps):
    """The maps for the template: (Bokeh's script, name -> HTML).

    Bokeh's random names are numbered, so that the same prediction gives the same page.
    """
    script, divisions = components(maps)
    for count, name in enumerate(dict.fromkeys(RANDOM_NAME.findall(script))):
        script = script.replace(name, f"bokeh-{count}")
        divisions = {key: text.replace(name, f"bokeh-{count}") for key, text in divisions.items()}
    return script, divisions


def palette_of(name):
    """The colours of a map, from low to high."""
    if name == "difference":
        return COLOURS["difference"]
    return COLOURS["certainty" if name in ("spread", "similarity") else "expression"]


def limits(values):
    """The ends of a colour scale, if the values are known now."""
    if values is None:
        return {"low": 0, "high": 1}
    low, high = (float(value) for value in np.percentile(values, [1, 99]))
    return {"low": low, "high": high if high > low else low + 1}


def least_diameter(view, width):
    """The diameter in mm below which spots are drawn wider, so that their colour can be seen."""
    seen = view.diameter / width * 380  # in pixels of a map on a desktop
    return 1.1 * pitch(view.spots) if seen < 4 and len(view.spots) > 1 else 0


def empty_map(ranges, shape):
    """A bare Bokeh figure whose frame is all of it, so that places on the page are easy to find."""
    plot = Plot(width=400, height=round(400 / shape), sizing_mode="scale_width", min_border=0,
                toolbar_location=None, outline_line_color=None, **ranges)
    # The wheel alone scrolls the page. A trackpad's pinch is a wheel with Ctrl.
    pan, zoom = PanTool(), WheelZoomTool(modifiers={"ctrl": True})
    plot.add_tools(pan, zoom)
    plot.toolbar.active_drag, plot.toolbar.active_scroll = pan, zoom
    return plot


def scale_bar():
    """A bar of a round number of millimetres or microns."""
    return ScaleBar(range="auto", unit="mm", location="bottom_left", background_fill_alpha=0.7,
                    border_line_color=None, bar_length=0.15, margin=3, padding=3,
                    label_standoff=1, label_text_font_size="11px")


def picture_source(view, faint):
    """The slide's picture as a JPEG in a data URL, and its size in mm."""
    image = Image.fromarray(_faint(view.image) if faint else view.image)
    with io.BytesIO() as file:
        (image.convert("L") if faint else image).save(file, "JPEG", quality=60 if faint else 85)
        url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    width, height = view.size
    return ColumnDataSource({"url": [url], "w": [width], "h": [height]})


# ------------------------------------------------------------------------------- 4. tables and text


def score_tables(scores):
    """The main scores and the others as tables, {"columns", "main", "others"}; None for a slide.

    A row is a name and one text per column.
    """
    if not scores:
        return None
    table = pd.DataFrame(scores["scores"], dtype=object)
    rows = [(name, [number(value) for value in row]) for name, row in
            zip(table.index, table.to_numpy(), strict=True)]
    main = [row for name in MAIN_SCORES for row in rows if row[0] == name]
    return {"columns": [COLUMN_NAMES.get(name, name) for name in table.columns], "main": main,
            "others": [row for row in rows if row[0] not in MAIN_SCORES]}


def number(value, digits=3):
    """A score as text; "undefined" without one."""
    if value is None or not np.isfinite(value):
        return "undefined"
    return f"{value:.{digits}f}" if value % 1 else f"{value:.0f}"


def sentences(name, about, genes, scores):
    """What one may write from this page, and what one may not: a list of sentences."""
    if scores is None:
        said = [f"No expression was measured on {name}. Nothing on this page shows how right its "
                "maps are."]
        return said + expected_sentences(genes) + [spread_sentence(about)]
    by_column = {column: values["Pearson"] for column, values in scores["scores"].items()}
    first, chance = next(iter(by_column.values())), by_column.get("random")
    seen = "which the model did not see in training"
    if about["model"]["reference"] is None:
        seen = "and whether the published model has seen it is not known"
    said = [f"Over {scores['n_genes']:,} genes, predicted and measured expression correlate at a "
            f"mean Pearson r of {number(first)} across {scores['n_spots']:,} spots of {name}, "
            f"{seen}; random reference spots, averaged alike, give {number(chance)}."]
    if scores["protocol"] == "paper":
        said.append("The protocol is `paper`: the query's own expression helped to choose the "
                    "genes and to correct the values. These are not scores of an unseen section.")
    said += untrained_sentences(first, by_column)
    reached = genes["reached"].dropna()
    if len(reached):
        said.append(f"{(reached >= 0.5).sum():,} of {len(reached):,} genes reach r = 0.5; the "
                    f"median gene reaches {number(reached.median())}.")
    said += expected_sentences(genes)
    said.append("No ceiling was measured: how much of the rest is noise of the measurement, which "
                "no model could predict, is not known.")
    said.append("This is one section and one trained model. How much the scores vary between "
                "sections and trainings is shown by evaluate.py, not here.")
    return [*said, spread_sentence(about)]


def untrained_sentences(reached, by_column):
    """How the trained model compares with the same network before training, as a list."""
    before = [value for column, value in by_column.items()
              if column.startswith("untrained") and value is not None]
    if not before:
        return ["What training adds is not known; infer.py --untrained shows it."]
    if reached is None:
        return []
    return [f"The same network before training reaches {number(max(before))} at best, so training "
            f"changes the mean r by {reached - max(before):+.3f}."]


def expected_sentences(genes):
    """What the validation in training says about each gene, as a list."""
    if "expected" not in genes or not (expected := genes["expected"].dropna()).size:
        return ["The model was not validated in training, so no correlation is expected of a gene."]
    said = ("On the validation spots of its training, the model reached a median r of "
            f"{number(expected.median())} over {len(expected):,} genes (expected r). A slide of "
            "other tissue, stain or scanner may do worse.")
    if "reached" in genes:
        both = genes[["expected", "reached"]].dropna()
        if (both.nunique() > 1).all():
            rho = spearmanr(both["expected"], both["reached"]).statistic
            said += f" Here the rank correlation of expected and reached r is {number(rho, 2)}."
    return [said]


def spread_sentence(about):
    """What the two measures of uncertainty are, and what they are not."""
    if about["model"]["settings"]["loss"] == "regression":
        return "A regression retrieves no spots, so it has no measure of uncertainty per spot."
    return ("The spread is the standard deviation of the retrieved reference spots, averaged over "
            "all genes. It compares spots with each other. It is not a confidence interval of one "
            "gene.")


def checks(view, result, about):
    """Facts that show whether the spots lie where they should: [(what, value)]."""
    mm = view.mpp / 1000
    low, high = view.spots.min(0), view.spots.max(0)
    inside = ((view.spots >= 0) & (view.spots <= view.size)).all(axis=1).sum()
    rows = [("spots", f"{result.n_obs:,}"),
            ("spots inside the picture", f"{inside:,} of {result.n_obs:,}"),
            ("spots on tissue", on_tissue(view, mm)),
            ("area of the spots", "{:.1f} × {:.1f} mm".format(*(high - low))),
            ("spot diameter", f"{view.diameter * 1000:.0f} µm")]
    if len(view.spots) > 1:
        between = pitch(view.spots, array_of(result.obs)) * 1000
        rows.append(("distance of neighbouring spots", f"{between:.0f} µm"))
    rows.append(("resolution", f"{view.mpp:.3g} µm per full-resolution pixel"))
    if about["model"]["patch_um"]:
        rows.append(("patch that the model sees", f"{about['model']['patch_um']:.0f} µm wide"))
    if "true" in result.layers:
        constant = (np.ptp(result.layers["true"], axis=0) == 0).sum()
        rows.append(("genes without any measured difference", f"{constant:,}, without a score"))
    return rows


def on_tissue(view, mm):
    """How many spots lie on the tissue that the picture shows, as text."""
    scale = view.image.shape[1] / (view.size[0] / mm)  # picture pixels per full-resolution pixel
    found = tissue.find_tissue(view.image, view.mpp / scale)
    if not found.any():
        return "not known: no tissue is recognised in the picture"
    spots = pd.DataFrame(view.spots / mm, columns=["x", "y"])
    share = tissue.share_on_tissue(spots, found, scale, view.diameter / mm)
    return f"{(share >= tissue.ON_TISSUE).sum():,} of {len(spots):,}, judged from the picture"


def provenance(about, view, command, prediction):
    """Where the prediction is from: [(what, text)]."""
    model = about["model"]
    panel = model["panel"] or {}
    rows = [("command", command or "not recorded"),
            ("prediction", Path(prediction).name),
            ("query", about["query"]),
            ("reference", ", ".join(about["reference"])),
            ("panel", f"{panel.get('kind', model['settings']['type'])}, protocol "
                      f"{model['settings']['protocol']}"),
            ("unit", about["unit"]),
            ("how it was predicted", listed(about["how"])),
            ("model digest", model["digest"] or "unknown"),
            ("epoch of the weights", model["epoch"]),
            ("training settings", listed(model["settings"])),
            ("versions at training", listed(model["versions"]) or "unknown"),
            ("versions now", listed({name: version(name) for name in (*LIBRARIES, "bokeh")}))]
    return [(what, str(text)) for what, text in rows]


def listed(facts):
    """A dict as one line of text, without what is not set."""
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
