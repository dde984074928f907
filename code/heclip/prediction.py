"""A slide without expression: predict the genes of a trained model's panel at spots laid over its tissue.

    import heclip
    prediction = heclip.predict_slide(("MOB", "heg"), "slide.svs")

`infer.py --image` is this, then a file and figures.
"""

import shutil
import sys
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd
import torch

from . import command, figures, sources, tissue
from .batches import Patches, encode_patches
from .checkpoint import check_fits, load_checkpoint
from .dataset import Processed, Run, run_name
from .files import InputError, atomic_path, write_h5ad
from .recipes import PREDICTION
from .retrieval import average_expression, centre, retrieve, smooth, spread
from .slide import THUMBNAIL, SpotPatches, microns_per_pixel, open_slide, shrunk

MAPPED_GENES = 6  # where the dataset names no markers
VISIUM_UM = 100  # of neighbouring spots, where the reference's lie on no lattice


def predict_slide(model, image, mpp=None, *, pitch=None, positions=None, retrieval=None, k=None, centre=None,
                  views=None, smoothing=None, batch_size=128, device="auto", compile=False, save_path=None):
    """Predict a slide's expression from its image alone. Writes nothing.

    model: (dataset, "heg" or "hvg", with "_paper" where it applies), or the path of a checkpoint that main.py wrote.
    The dataset's processed files must be there: the prediction is drawn from its reference spots.
    image: a whole slide, or a TIFF, JPEG or PNG. mpp: µm per full-resolution pixel, if the file does not say.
    pitch: distance of neighbouring spots in µm; default: the reference's. positions: instead of a lattice on the
    tissue, a position file that sources.read_positions knows, or such a table.
    retrieval, k, centre, views, smoothing: as in infer.py; default: as the model's recipe has them. save_path: as
    main.py's, where the model is given by its dataset.

    Returns AnnData, spots x panel: X predicted log-normalised expression, float32; var symbol, marker; obs in_tissue,
    array_row, array_col, similarity (mean cosine similarity of the k retrieved spots) and spread (standard deviation
    over the retrieved spots, its mean over genes); obsm["spatial"] = (x, y) in full-resolution pixels; uns["spatial"]
    as in a processed section. Warns where slide and reference differ in scale. Raises InputError.
    """
    path, run = checkpoint_of(model, save_path)
    network, facts = load_checkpoint(path)
    if not facts:
        raise InputError(f"{path} is a published checkpoint, which does not say what it was trained on: a slide "
                         "without expression needs a model of main.py")
    dataset, name = (facts["dataset"], facts["name"]) if run is None else (run.dataset, run.name)
    processed = Processed(dataset)
    if absent := sorted(set(facts["reference"]) - set(processed.sections().index)):
        raise InputError(f"{path} was trained on {', '.join(absent)}, which {processed.sections_path} lacks. "
                         "Train again")
    panel = processed.panel_for(facts["panel_name"], facts["reference"])
    check_fits(path, facts, dataset, name, panel)
    asked = {"retrieval": retrieval, "k": k, "centre": centre, "views": views, "smoothing": smoothing}
    how = PREDICTION[facts["arguments"]["recipe"]] | {key: value for key, value in asked.items() if value is not None}
    if pitch is not None and not pitch > 0:
        raise InputError(f"--pitch {pitch}: expected the spots' distance in µm")
    reference = read_reference(processed, facts["reference"], facts["panel_name"], panel)

    with open_slide(image) as slide:
        mpp = microns_per_pixel(slide, mpp)
        crop = reference.patch_um / mpp
        if crop < reference.patch_px / 2:
            warnings.warn(f"{image} has {mpp:.3g} µm a pixel, coarser than the reference: {crop:.0f} pixels are "
                          f"enlarged to {reference.patch_px}, without the detail that the model learnt from",
                          stacklevel=2)
        thumbnail, thumbnail_scale = tissue.thumbnail(slide, mpp)
        spots = (spots_on_tissue(slide, thumbnail, thumbnail_scale, mpp, pitch or reference.pitch_um, reference.spot_um)
                 if positions is None else given_spots(positions))
        device = command.pick_device(device)
        network.to(device, memory_format=torch.channels_last)
        if compile:
            network.image_encoder.compile()
        nearest = [reference_embeddings(network, processed, reference, run, panel, kind, device, batch_size,
                                        how["views"])
                   for kind in ("gene", "image") if how["retrieval"] in (kind, "both")]
        patches = SpotPatches(slide, spots[["x", "y"]].to_numpy(), crop, reference.patch_px, device)
        order = patches.order
        embeddings = torch.empty(len(spots), network.width)
        embeddings[order] = encode_patches(network, patches, torch.from_numpy(order), batch_size, how["views"]).cpu()

    predicted, index, similarity = retrieve_expression(embeddings, nearest, reference.expression, how["k"],
                                                       how["centre"])
    if network.config.kind == "regression":
        predicted = embeddings.numpy()
    xy = spots[["x", "y"]].to_numpy(np.float64)
    predicted = smooth(predicted, xy, how["smoothing"])
    stem = Path(image).stem
    shrink = -(-max(thumbnail.shape) // THUMBNAIL)
    return anndata.AnnData(
        predicted, var=panel[["symbol", "marker"]],
        obs=spots[["in_tissue", "array_row", "array_col"]].assign(
            similarity=similarity.mean(axis=1), spread=spread(index, reference.expression)),
        obsm={"spatial": xy},
        uns={"spatial": {stem: {
            "images": {"hires": shrunk(thumbnail, shrink)},
            "scalefactors": {"tissue_hires_scalef": thumbnail_scale / shrink,
                             "spot_diameter_fullres": reference.spot_um / mpp},
            "metadata": {"mpp": mpp, "source_image_path": Path(image).name}}},
            "prediction": {"dataset": dataset, "model": name, "reference": reference.sections,
                           "patch_um": reference.patch_um, **how}})


def predict(adata, image, model, mpp=None, **options):
    """Predict at the spots of an AnnData with obsm["spatial"] = (x, y) in the image's full-resolution pixels.

    Otherwise as `predict_slide`. Where neither the file nor `mpp` gives the µm per pixel, uns["spatial"] does if it
    was written here. Returns another AnnData, its obs those of `adata` with similarity and spread added.
    """
    if "spatial" not in adata.obsm:
        raise InputError(f'adata has no obsm["spatial"]: x and y of each spot in pixels of {image}')
    spots = pd.DataFrame(np.asarray(adata.obsm["spatial"])[:, :2], adata.obs_names, ["x", "y"])
    spots = spots.assign(in_tissue=True, array_row=-1, array_col=-1)
    if mpp is None:
        with open_slide(image) as slide:
            known = [library.get("metadata", {}).get("mpp") for library in adata.uns.get("spatial", {}).values()]
            if slide.mpp is None and len(known) == 1:
                mpp = known[0]
    prediction = predict_slide(model, image, mpp, positions=spots, **options)
    prediction.obs = adata.obs.assign(**prediction.obs[["similarity", "spread"]])
    return prediction


def checkpoint_of(model, save_path):
    """(path of the checkpoint, its Run if the model is given by its dataset)."""
    if isinstance(model, tuple | list):
        run = Run(*model, save_path)
        return run.checkpoint, run
    return Path(model), None


class Reference(NamedTuple):
    """What a prediction is drawn from: N spots, G genes; lengths are means over the sections."""

    sections: list
    expression: np.ndarray  # float32 (N, G), section after section
    sizes: list  # spots of each section
    patch_px: int
    patch_um: float
    pitch_um: float  # of neighbouring spots
    spot_um: float  # diameter


def read_reference(processed, sections, name, panel):
    """The reference sections that the model was trained on. Warns where their patches differ in size."""
    table = processed.sections().loc[sections]
    patch_um = table["crop_px" if "crop_px" in table else "patch_px"] * table["mpp"]
    if patch_um.max() > 1.1 * patch_um.min():
        sizes = ", ".join(f"{section} {size:.0f}" for section, size in patch_um.items())
        warnings.warn(f"the reference's patches differ in size ({sizes} µm); {patch_um.mean():.0f} µm are cropped",
                      stacklevel=3)
    expression, pitch_um, spot_um = [], [], []
    for section in sections:  # one at a time: a section holds all genes, and only the panel is kept
        adata = processed.read(section)
        expression.append(processed.expression(section, name, panel, adata))
        (library,) = adata.uns["spatial"].values()
        mpp, (x, y) = library["metadata"]["mpp"], adata.obsm["spatial"].T
        with suppress(ValueError, KeyError):  # spots that lie on no lattice
            pitch_um.append(sources.spot_pitch(adata.obs.assign(x=x, y=y)) * mpp)
        spot_um.append(library["scalefactors"]["spot_diameter_fullres"] * mpp)
    return Reference(sections, np.concatenate(expression), [len(part) for part in expression],
                     int(table["patch_px"].iloc[0]), float(patch_um.mean()),
                     float(np.mean(pitch_um or [VISIUM_UM])), float(np.mean(spot_um)))


def spots_on_tissue(slide, thumbnail, scale, mpp, pitch_um, spot_um):
    """The lattice's spots that lie on tissue. `scale`: pixels of the thumbnail per full-resolution pixel."""
    found = tissue.find_tissue(thumbnail, mpp / scale)
    spots = tissue.lattice(slide.width, slide.height, pitch_um / mpp)
    share = tissue.share_on_tissue(spots, found, scale, spot_um / mpp)
    spots = spots[share >= tissue.ON_TISSUE]
    if not len(spots):
        raise InputError(f"{slide.path}: no tissue found. Is it a bright-field image of a stained section? If so, "
                         "give the spots with --positions")
    return spots.assign(in_tissue=True)


def given_spots(positions):
    """The spots under tissue of a position file, or of a table as sources.read_positions makes it."""
    given = isinstance(positions, pd.DataFrame)
    spots = positions if given else sources.read_positions(positions)
    spots = spots[spots["in_tissue"]]
    if not len(spots):
        raise InputError(f"{'positions' if given else positions}: no spot is under tissue (in_tissue == 1 nowhere)")
    return spots


def retrieve_expression(embeddings, reference, expression, k, centred):
    """Each patch's prediction: the mean expression of the k reference spots nearest by each kind of embedding.

    embeddings: image embeddings (n, D); reference: for each kind, a list of the sections' (N_s, D); expression (N, G);
    centred: whether sections are centred first (`retrieval.centre`).
    Returns (predicted float32 (n, G), rows of the reference (n, K), their cosine similarities (n, K)).
    """
    found = [retrieve(*centre(embeddings, sections), k) if centred else retrieve(embeddings, torch.cat(sections), k)
             for sections in reference]
    index, similarity = (np.hstack(parts) for parts in zip(*found, strict=True))
    return average_expression(index, expression), index, similarity


def reference_embeddings(network, processed, reference, run, panel, kind, device, batch_size, views):
    """What the slide's patches are compared with: the reference's genes, or its images, a list of (N_s, D).

    Images come from ebd/, where infer.py has saved those of this very model; else they are embedded anew.
    """
    if kind == "gene":
        with torch.inference_mode():
            return network.encode_expression(torch.from_numpy(reference.expression).to(device)).cpu().split(
                reference.sizes)
    embeddings = []
    for section in reference.sections:
        patches = Patches([processed.patches(section)], device)
        n = len(patches.sections[0])
        saved = saved_images(run, section, panel)
        probe = torch.arange(min(n, 8))
        if saved is None or len(saved) != n or not torch.allclose(
                saved[probe], encode_patches(network, patches, probe, len(probe), views).cpu(), atol=0.05):
            saved = encode_patches(network, patches, torch.arange(n), batch_size, views).cpu()
        embeddings.append(saved)
    return embeddings


def saved_images(run, section, panel):
    """Image embeddings of a section that infer.py saved, (n_spots, D), or None."""
    try:
        with np.load(run.embeddings(section)) as file:
            return torch.from_numpy(file["image"]) if np.array_equal(file["panel"], panel.index) else None
    except (OSError, AttributeError, KeyError, ValueError, zipfile.BadZipFile):
        return None  # absent, unknown or damaged: nothing is lost but time


# ---------------------------------------------------------------------------------------------- as a command


def predict_slide_command(args):
    """What `infer.py --image` does: predict, then write <name>_slide_<stem>_prediction.h5ad and two figures."""
    run = Run(args.dataset, run_name(args.type, args.protocol), args.save_path)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        prediction = predict_slide(
            args.checkpoint or (args.dataset, run.name), args.image, args.mpp, pitch=args.pitch,
            positions=args.positions, retrieval=args.retrieval, k=args.k, centre=args.centre,
            views=args.views, smoothing=args.smoothing, batch_size=args.batch_size, device=args.device,
            compile=args.compile, save_path=args.save_path)
    ((stem, library),) = prediction.uns["spatial"].items()
    path = run.folder / f"{run.name}_slide_{stem}_prediction.h5ad"
    with atomic_path(path) as temporary:
        write_h5ad(prediction, temporary)
    print(f"{args.image}, {library['metadata']['mpp']:.4g} µm a pixel: {prediction.n_obs:,} spots, "
          f"{prediction.n_vars:,} genes predicted in {path}\nmean over spots: similarity to those retrieved "
          f"{prediction.obs['similarity'].mean():.3f}, their spread {prediction.obs['spread'].mean():.3f}")
    if args.spatialdata:
        write_spatialdata(prediction, args.spatialdata)
    if args.figures:
        spots, maps = (run.top / "figure" / kind / f"{run.dataset}_{run.name}_slide_{stem}.{end}"
                       for kind, end in (("QC", "jpg"), ("MAP", "png")))
        figures.spots_over_slide(prediction, stem, spots)
        figures.predicted_maps(prediction, telling_genes(prediction), maps)
        print(f"Look at {spots}: spots on all tissue, and on nothing else. Maps in {maps}")


def telling_genes(prediction):
    """The dataset's markers, or else the genes whose predictions vary most: [(gene id, caption)]."""
    markers = prediction.var_names[prediction.var["marker"]]
    if len(markers):
        return [(gene, "marker") for gene in markers]
    order = np.argsort(-prediction.X.var(axis=0), kind="stable")[:MAPPED_GENES]
    return [(gene, "most varied") for gene in prediction.var_names[order]]


# ---------------------------------------------------------------------------------------------- SpatialData


def to_spatialdata(prediction):
    """A prediction as SpatialData: the picture, the spots as circles, and the table. Needs the spatialdata package.

    Coordinates are full-resolution pixels ("global").
    """
    try:
        from spatialdata import SpatialData
        from spatialdata.models import Image2DModel, ShapesModel, TableModel
        from spatialdata.transformations import Identity, Scale
    except ImportError:
        raise InputError("the package spatialdata is not installed: pip install spatialdata") from None
    (library,) = prediction.uns["spatial"].values()
    factors = library["scalefactors"]
    table = prediction.copy()
    del table.uns["spatial"]
    table.obs = table.obs.assign(region=pd.Categorical(["spots"] * table.n_obs), spot=np.arange(table.n_obs))
    full = 1 / factors["tissue_hires_scalef"]
    return SpatialData(
        images={"hires": Image2DModel.parse(library["images"]["hires"], dims=("y", "x", "c"), c_coords=["r", "g", "b"],
                                            transformations={"global": Scale([full, full], axes=("x", "y"))})},
        shapes={"spots": ShapesModel.parse(np.asarray(prediction.obsm["spatial"]), geometry=0,
                                           radius=factors["spot_diameter_fullres"] / 2,
                                           transformations={"global": Identity()})},
        tables={"table": TableModel.parse(table, region="spots", region_key="region", instance_key="spot")})


def write_spatialdata(prediction, folder):
    """Write `to_spatialdata(prediction)` as the Zarr store `folder`, whole or not at all."""
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists. Name another folder with --spatialdata, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        to_spatialdata(prediction).write(temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
