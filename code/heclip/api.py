"""For notebooks: predict a slide's expression from its image alone, with a trained model.

    import heclip
    prediction = heclip.predict_slide(("MOB", "heg"), "slide.svs")

`infer.py --image` does this, and then writes a file and figures. Here only `write_spatialdata`
writes a file.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch

from . import command, sources, tissue
from .batches import encode_patches
from .checkpoint import SAME_WIDTH, load_checkpoint
from .dataset import Processed, Run
from .files import InputError, atomic_path, sha256
from .identity import Identity, same_places
from .prediction import (
    KINDS,
    Reference,
    embed_expression,
    embed_section,
    fresh_embeddings,
    predict as predict_from,
)
from .retrieval import crowded
from .settings import predicting
from .slide import (
    THUMBNAIL,
    SpotPatches,
    leave_outside,
    microns_per_pixel,
    open_slide,
    shrunk,
)
from .spots import array_of, geometry_notes, lattice, pitch as spot_pitch

VISIUM_UM = 100  # distance of neighbouring spots, if it cannot be found from the reference
FINGERPRINT = 1 << 20  # bytes at either end of a slide's file that distinguish it from others


def predict_slide(model, image, mpp=None, *, pitch=None, positions=None, whole_image=False,
                  recipe=None, name=None, batch_size=128, device="auto", compile=False,
                  save_path=None, **how):
    """Predict a slide's expression from its image alone.

    model: (dataset, "heg" or "hvg", or one of these with "_paper"), or the path of a checkpoint
    that main.py wrote. The dataset's processed files must be there, because the prediction is drawn
    from its reference spots.
    image: a whole slide, or a TIFF, JPEG or PNG.
    mpp: µm per full-resolution pixel, if the file does not say.
    pitch: distance of neighbouring spots in µm; default: the reference's.
    positions: spots to use instead of a lattice on the tissue: a position file that
    sources.read_positions can read, or a table as it returns.
    whole_image: the lattice covers all of the image, which shows tissue and no glass.
    recipe, and retrieval, k, centre, views, smoothing: as in infer.py; default: those of the
    model's recipe.
    name: of the slide in uns["spatial"]. save_path: that of main.py, if the model is given by its
    dataset. batch_size: patches at a time. device, compile: as in infer.py.

    Returns AnnData, spots x panel.
    X: predicted log-normalised expression, float32. var: symbol, marker.
    obs: in_tissue, array_row, array_col (of a lattice), and similarity and spread (see
    prediction.Predicted.certainty) unless the model is a regression.
    obsm["spatial"]: (x, y) in full-resolution pixels. uns["spatial"]: as in a processed section.
    uns["heclip"]: JSON of the model and how it predicted.
    Warns if slide and reference differ in scale. Raises InputError if a file is missing or does not
    fit the model.
    """
    run = Run(*model, save_path) if isinstance(model, tuple | list) else None
    trained = load_checkpoint(run.checkpoint if run else model)
    its_own = trained.settings.dataset, trained.name
    if run and trained.reference and (run.dataset, run.name) != its_own:
        raise InputError(f"{trained.path} was trained on {trained.settings.dataset} "
                         f"{trained.name}, not on {run.dataset} {run.name}. Train again")
    return predict_with(
        trained, image, mpp, pitch=pitch, positions=positions, whole_image=whole_image, run=run,
        name=name, how=predicting(recipe or trained.settings.recipe, how), batch_size=batch_size,
        device=device, compile=compile)


def predict(adata, image, model, mpp=None, **options):
    """Predict at the spots of an AnnData with obsm["spatial"] = (x, y) in full-resolution pixels.

    Otherwise it works as `predict_slide`. If neither the file nor `mpp` gives the µm per pixel,
    they are read from uns["spatial"], if it was written here. Returns a new AnnData: its obs are
    those of `adata`, with similarity and spread. A few spots that lie outside the picture are left
    out with a warning.
    """
    if "spatial" not in adata.obsm:
        raise InputError(f'adata has no obsm["spatial"]: x and y of each spot in pixels of {image}')
    xy = np.asarray(adata.obsm["spatial"], np.float64)[:, :2]
    if not len(xy):
        raise InputError("adata has no spots")
    if not np.isfinite(xy).all():
        lacking = adata.obs_names[~np.isfinite(xy).all(axis=1)]
        raise InputError(
            f'adata: obsm["spatial"] has no position for {len(lacking)} of {len(xy)} spots, '
            f"{lacking[0]} for one. Leave them out: adata[np.isfinite(...).all(axis=1)]")
    spots = pd.DataFrame(xy, adata.obs_names, ["x", "y"])
    spots = spots.assign(in_tissue=True, row=np.arange(len(xy)))
    if mpp is None:
        with open_slide(image) as slide:
            known = [library["metadata"]["mpp"] for library in adata.uns.get("spatial", {}).values()
                     if isinstance(library, Mapping) and "mpp" in library.get("metadata", {})]
            if slide.mpp is None and len(known) == 1:
                mpp = known[0]
    prediction = predict_slide(model, image, mpp, positions=spots, **options)
    certainty = prediction.obs.columns.intersection(["similarity", "spread"])
    own = adata.obs.iloc[prediction.obs["row"].to_numpy()]
    prediction.obs = own.assign(**prediction.obs[certainty])
    return prediction


def predict_with(trained, image, mpp, *, how, pitch=None, positions=None, whole_image=False,
                 run=None, name=None, batch_size=128, device="auto", compile=False):
    """What `predict_slide` does, with a model that has been loaded: a Trained.

    how: a Predicting. run: the Run whose saved embeddings of the reference's images may be read;
    None: they are computed.
    """
    if trained.reference is None:
        raise InputError(f"{trained.path} is a published checkpoint, which does not say what it "
                         "was trained on. A slide without expression needs a model of main.py")
    if pitch is not None and not pitch > 0:
        raise InputError(f"--pitch {pitch}: expected the distance of neighbouring spots in µm")
    processed = Processed(trained.settings.dataset)
    trained.check(processed, None)
    warn_of_widths(trained, processed)
    own = read_lattice(processed, list(trained.reference))
    with open_slide(image) as slide:
        mpp = microns_per_pixel(slide, mpp)
        crop = trained.patch_um / mpp
        warn_of_resolution(image, mpp, crop, trained.patch_px)
        thumbnail, scale = tissue.thumbnail(slide, mpp)
        pitch_um, notes = pitch or own.pitch_um, []
        if positions is None:
            found = tissue_of(thumbnail, mpp / scale, whole_image, notes)
            spots = spots_on_tissue(slide, found, scale, pitch_um / mpp, own.spot_um / mpp)
        else:
            spots = spots_inside(slide, given_spots(positions))
        notes += notes_on_slide(slide, spots, mpp, pitch_um)
        warn_of(notes, slide.path)
        xy = spots[["x", "y"]].to_numpy(np.float64)
        check_apart(processed, list(trained.reference), image, xy)
        device = command.pick_device(device)
        trained.network.to(device, memory_format=torch.channels_last)
        if compile:
            trained.network.image_encoder.compile()
        reference = read_reference(trained, processed, run, how, device, batch_size)
        if not trained.is_regression:
            warn_of(filter(None, [crowded(how.k, len(reference.expression))]), trained.path)
        patches = SpotPatches(slide, xy, crop, trained.patch_px, device)
        order = torch.from_numpy(patches.order)
        embeddings = torch.empty(len(spots), trained.network.width)
        embeddings[order] = encode_patches(
            trained.network, patches, order, batch_size, how.views).cpu()

    predicted = predict_from(embeddings, xy, reference, how, trained.is_regression)
    library = slide_library(thumbnail, scale, mpp, own.spot_um, Path(image).name, notes)
    about = {"query": slide_identity(image), "reference": list(trained.reference),
             "how": asdict(how), "unit": "log-normalised expression", "model": trained.facts()}
    return anndata.AnnData(
        predicted.expression, var=trained.panel.genes[["symbol", "marker"]],
        obs=spots.drop(columns=["x", "y"]).assign(**predicted.certainty(reference)),
        obsm={"spatial": xy},
        uns={"spatial": {name or Path(image).stem: library}, "heclip": json.dumps(about)})


def warn_of(notes, path):
    """Warn of each note, after the name of the file that it is about."""
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=4)


def slide_library(thumbnail, scale, mpp, spot_um, file_name, notes):
    """The entry of a slide in uns["spatial"]: picture, scale factors, µm per pixel, notes.

    scale: thumbnail pixels per full-resolution pixel. spot_um: diameter of a spot in µm. notes: a
    list of text on what may be wrong.
    """
    shrink = -(-max(thumbnail.shape) // THUMBNAIL)
    return {"images": {"hires": shrunk(thumbnail, shrink)},
            "scalefactors": {"tissue_hires_scalef": scale / shrink,
                             "spot_diameter_fullres": spot_um / mpp},
            "metadata": {"mpp": mpp, "source_image_path": file_name,
                         "notes": "\n".join(notes)}}


def slide_identity(image):
    """A name that distinguishes a slide's file from others of the same name, by size and contents.

    Of the contents, only both ends are read.
    """
    size = Path(image).stat().st_size
    with open(image, "rb") as file:
        ends = file.read(FINGERPRINT)
        file.seek(max(0, size - FINGERPRINT))
        ends += file.read()
    digest = hashlib.sha256(f"{size}".encode() + ends).hexdigest()
    return f"{Path(image).name} ({digest[:12]})"


# ------------------------------------------------------------------------------------ the reference


@dataclass(frozen=True)
class Lattice:
    """Mean distance of neighbouring spots, and mean diameter of a spot, in µm."""

    pitch_um: float
    spot_um: float


def read_lattice(processed, sections):
    """The Lattice of processed sections."""
    pitch_um, spot_um = [], []
    for section in sections:
        adata = processed.spots(section)
        (library,) = adata.uns["spatial"].values()
        mpp = library["metadata"]["mpp"]
        with suppress(ValueError):  # a single spot has no pitch
            pitch_um.append(spot_pitch(adata.obsm["spatial"], array_of(adata.obs)) * mpp)
        spot_um.append(library["scalefactors"]["spot_diameter_fullres"] * mpp)
    return Lattice(float(np.mean(pitch_um or [VISIUM_UM])), float(np.mean(spot_um)))


def warn_of_widths(trained, processed):
    """Warn if the patches of the reference sections differ in width; a slide has only one."""
    table = processed.sections().loc[list(trained.reference)]
    width = table["crop_px"] * table["mpp"]
    if width.max() > (1 + SAME_WIDTH) * width.min():
        sizes = ", ".join(f"{section} {size:.0f}" for section, size in width.items())
        warnings.warn(f"the reference's patches differ in size ({sizes} µm); "
                      f"{trained.patch_um:.0f} µm are cropped", stacklevel=4)


def warn_of_resolution(image, mpp, crop, patch_px):
    """Warn if a slide's patches, of `crop` pixels, are much enlarged to patch_px."""
    if crop < patch_px / 2:
        warnings.warn(
            f"{image} has {mpp:.3g} µm per pixel, coarser than the reference: {crop:.0f} pixels "
            f"are enlarged to {patch_px}, without the detail that the model learnt from",
            stacklevel=4)


def read_reference(trained, processed, run, how, device, batch_size):
    """The Reference that a slide is predicted from, with the kinds of embeddings that `how` needs.

    Image embeddings are read from ebd/ if infer.py saved them there with this model, from these
    patches and with as many views. Otherwise they are computed.
    """
    sections = list(trained.reference)
    expression = {section: processed.expression(section, trained.panel) for section in sections}
    stacked, embeddings = np.concatenate(list(expression.values())), {}
    for kind in () if trained.is_regression else KINDS[how.retrieval]:
        if kind == "gene":
            embeddings[kind] = embed_expression(trained.network, stacked, device)
        else:
            embeddings[kind] = np.concatenate([
                image_embeddings(trained, processed, run, section, how.views, device, batch_size)
                for section in sections])
    return Reference(sections, [len(rows) for rows in expression.values()], stacked, embeddings)


def image_embeddings(trained, processed, run, section, views, device, batch_size):
    """A reference section's image embeddings, read or computed: (n_spots, D)."""
    if run is not None:
        with suppress(InputError):  # absent, damaged or of another model: only time is lost
            return fresh_embeddings(run, processed, section, views, trained.digest)["image"]
    return embed_section(trained, processed, section, views, device, batch_size)


# ---------------------------------------------------------------------------------------- the spots


def tissue_of(thumbnail, um, whole_image, notes):
    """Where a slide shows tissue: bool (h, w), all True with whole_image.

    thumbnail: uint8 (h, w, 3), `um` microns a pixel. notes: a list of text that is added to, if all
    of it is taken for tissue, or if what is taken for glass does not look like it.
    """
    if whole_image:
        return np.ones(thumbnail.shape[:2], bool)
    found = tissue.find_tissue(thumbnail, um)
    if found.any() and (doubt := tissue.doubt_about(thumbnail, um, found)):
        notes.append(doubt)
    return found


def notes_on_slide(slide, spots, mpp, pitch_um):
    """What contradicts the places and the scale of spots on a slide: a list of text."""
    stated = {"facts in the image file": slide.stated_mpp}
    return geometry_notes(spots[["x", "y"]].to_numpy(np.float64), array_of(spots), mpp, pitch_um,
                          stated)


def spots_on_tissue(slide, found, scale, pitch, diameter):
    """The spots of a lattice that lie on tissue: a table of x, y, array_row, array_col, in_tissue.

    found: bool (h, w), the tissue, `scale` of its pixels per full-resolution pixel. pitch and
    diameter of the spots are in full-resolution pixels. Raises InputError if none lies on tissue.
    """
    spots = lattice(slide.width, slide.height, pitch)
    share = tissue.share_on_tissue(spots, found, scale, diameter)
    spots = spots[share >= tissue.ON_TISSUE]
    if not len(spots):
        raise InputError(f"{slide.path}: no tissue found. Is it a bright-field image of a stained "
                         "section? If so, predict all of it with --whole_image, or give the spots "
                         "with --positions")
    return spots.assign(in_tissue=True)


def given_spots(positions):
    """The spots under tissue of a position file, or of a table as sources.read_positions returns.

    Raises InputError if there are none.
    """
    is_table = isinstance(positions, pd.DataFrame)
    spots = positions if is_table else sources.read_positions(positions)
    spots = spots[spots["in_tissue"]]
    if not len(spots):
        name = "positions" if is_table else positions
        raise InputError(f"{name}: no spot is under tissue (in_tissue == 1 nowhere)")
    return spots


def spots_inside(slide, spots):
    """The spots that lie inside the slide; a few others are left out, with a warning."""
    inside, note = leave_outside(slide, spots[["x", "y"]].to_numpy())
    if note:
        warnings.warn(note, stacklevel=4)
    return spots[inside]


def check_apart(processed, reference, image, xy):
    """Raise InputError if the spots of a slide, at `xy`, are those of a reference section."""
    of_slide = Identity(Path(image).name, np.zeros(len(xy), np.uint64), sha256(image), xy, 0)
    for name in reference:
        if (same := same_places(of_slide, processed.identity(name))).any():
            raise InputError(
                f"{image} is the image of {name}, which the model was trained on: {same.sum():,} "
                f"of {len(same):,} spots lie at the places of its spots and would be predicted "
                "from themselves. Hold the section out, or give other spots with --positions")


# -------------------------------------------------------------------------------------- SpatialData


def to_spatialdata(prediction):
    """A prediction as SpatialData: picture, spots as circles, table.

    Coordinates are full-resolution pixels ("global"). Raises InputError if the package spatialdata
    is not installed.
    """
    try:
        from spatialdata import SpatialData
        from spatialdata.models import Image2DModel, ShapesModel, TableModel
        from spatialdata.transformations import Identity, Scale
    except ImportError:
        raise InputError("the package spatialdata is not installed: pip install "
                         "spatialdata") from None
    (library,) = prediction.uns["spatial"].values()
    factors = library["scalefactors"]
    table = prediction.copy()
    del table.uns["spatial"]
    region = pd.Categorical(["spots"] * table.n_obs)
    table.obs = table.obs.assign(region=region, spot=np.arange(table.n_obs))
    full = 1 / factors["tissue_hires_scalef"]
    picture = Image2DModel.parse(
        library["images"]["hires"], dims=("y", "x", "c"), c_coords=["r", "g", "b"],
        transformations={"global": Scale([full, full], axes=("x", "y"))})
    circles = ShapesModel.parse(
        np.asarray(prediction.obsm["spatial"]), geometry=0,
        radius=factors["spot_diameter_fullres"] / 2, transformations={"global": Identity()})
    table = TableModel.parse(table, region="spots", region_key="region", instance_key="spot")
    return SpatialData(images={"hires": picture}, shapes={"spots": circles},
                       tables={"table": table})


def write_spatialdata(prediction, folder):
    """Write `to_spatialdata(prediction)` as the Zarr store `folder`, whole or not at all.

    Raises InputError if the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists. Name another folder with --spatialdata, or remove it")
    with atomic_path(folder) as temporary:
        to_spatialdata(prediction).write(temporary)
