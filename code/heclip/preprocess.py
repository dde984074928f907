"""Raw -> processed, section by section: what every preprocess_<dataset>.py calls."""

import argparse
import hashlib
import json
import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd

from . import command, expression, figures, slide, sources
from .dataset import ROOT, Dataset, Processed, run_name
from .files import InputError, atomic_path, sha256, write_h5ad

DRAWING = threading.Lock()  # matplotlib is not made for threads
FORMAT = 1  # of the processed files; a higher one makes every section anew


def preprocess(dataset, argv=None):
    """Prepare a dataset for main.py: patches, log-normalised expression, gene panels, and a picture to check by eye.

    A section whose raw files and settings are unchanged is not read again. Sections are independent of each other: in
    other processes, or in other jobs on other machines, they give the same files.
    """
    flags = argparse.ArgumentParser(description=f"Prepare {dataset.name} for training.",
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--raw", metavar="DIR", default=dataset.raw,
                       help="folder of the raw files, as downloaded or as an old checkout arranged them")
    add_flags(flags, dataset.patch_px)
    prepare(dataset, flags.parse_args(argv))


def add_flags(flags, patch_px):
    """The flags that every preprocess script has."""
    flags.add_argument("--protocol", choices=["strict", "paper"], default="strict",
                       help="paper: prepare also the published panel and batch correction, over all sections")
    flags.add_argument("--workers", type=command.positive, default=1,
                       help="processes to share the sections between; a single one prepares two at a time")
    flags.add_argument("--section", nargs="+", metavar="NAME",
                       help="prepare these sections only, and no panel: for jobs that share the work. When all are "
                            "done, run once more without this flag")
    flags.add_argument("--patch_um", type=command.above_zero, metavar="UM",
                       help="side of the patches in microns, resampled to --patch_px: for sections of different "
                            "resolution. Default: --patch_px pixels of the image as they are")
    flags.add_argument("--patch_px", type=command.positive, default=patch_px, help="side of the patches in pixels")


def prepare(dataset, args):
    """What `preprocess` does, with its flags read."""
    dataset = replace(dataset, patch_um=args.patch_um, patch_px=args.patch_px)
    if unknown := set(args.section or ()) - {section.name for section in dataset.sections}:
        raise InputError(f"--section {min(unknown)}: {dataset.name} has no such section, but "
                         f"{', '.join(section.name for section in dataset.sections)}")
    processed = Processed(dataset.name)
    chosen = [section for section in dataset.sections if args.section is None or section.name in args.section]
    jobs = [(dataset, section, args.raw, processed) for section in chosen]
    rows = preprocess_sections(jobs, args.workers)
    if args.section:
        return
    table = pd.DataFrame(rows).set_index("section")
    with atomic_path(processed.sections_path) as path:
        table.to_csv(path)
    if dataset.command:
        with atomic_path(processed.command_path) as path:
            path.write_text(dataset.command + "\n")

    genes = {section.name: processed.genes(section.name) for section in dataset.sections}
    for panel_type in ("hvg", "heg"):
        write_panel(dataset, processed, genes, panel_type, "strict")
        if args.protocol == "paper":
            write_panel(dataset, processed, genes, panel_type, "paper")
            write_corrected(dataset, processed, panel_type)

    print(table[["donor", "role", "n_spots", "n_genes", "mpp", "padded"]].to_string(float_format="%.4f"))
    print(f"{len(set.intersection(*(set(var.index) for var in genes.values()))):,} genes are in every section")
    for path in sorted(processed.folder.glob("panel_*.csv")):
        name = path.stem.removeprefix("panel_")
        print(f"panel {name}: {len(processed.panel(name))} genes")
    print(f"Look at {ROOT / 'figure' / 'QC' / dataset.name}: every spot must lie on its tissue.")


def preprocess_sections(jobs, workers=1):
    """Prepare sections; jobs are the arguments of `preprocess_section`. Returns their rows of sections.csv.

    One process prepares two at a time, in threads: nearly all of the work is outside Python's lock, and a second
    process would first import everything. After an error, sections that have begun are finished.
    """
    if min(workers, len(jobs)) > 1:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    else:
        pool = ThreadPoolExecutor(2)
    try:
        return list(pool.map(preprocess_section, *zip(*jobs, strict=True)))
    finally:
        pool.shutdown(cancel_futures=True)


def preprocess_section(dataset, section, raw, processed):
    """One section's patches, expression and picture, unless they are up to date. Returns its row of sections.csv."""
    files = {what: sources.find(raw, getattr(section, what), f"{what} of section {section.name}")
             for what in ("counts", "positions", "image")}
    if dataset.symbols:
        files["symbols"] = sources.find(raw, dataset.symbols, "gene symbols")
    section_path, patches_path = processed.section_path(section.name), processed.patches_path(section.name)
    earlier = processed.read(section.name) if section_path.exists() and patches_path.exists() else None
    with ThreadPoolExecutor(1) as thread:
        described = thread.submit(describe, dataset, section, files)
        adata = earlier or read_section(dataset, section, files)
    made_from = described.result()
    if anew := not earlier or json.loads(earlier.uns["made_from"]) != made_from:
        if earlier:
            adata = read_section(dataset, section, files)
        adata.uns["made_from"] = json.dumps(made_from)
        mpp = microns_per_pixel(section, adata, files["positions"], dataset.pitch_um)
        spot_um = dataset.spot_um * (section.pitch_um or dataset.pitch_um) / dataset.pitch_um
        # Both files appear at once, so that patches of one version never meet expression of another.
        with atomic_path(section_path) as h5ad, atomic_path(patches_path) as patches:
            thumbnail, scale = write_patches(dataset, files["image"], adata, mpp, patches,
                                             processed.folder)
            adata.uns["spatial"] = {section.name: {
                "images": {"hires": thumbnail},
                "scalefactors": {"tissue_hires_scalef": scale, "spot_diameter_fullres": spot_um / mpp},
                "metadata": {"mpp": mpp, "source_image_path": files["image"].name}}}
            write_h5ad(adata, h5ad)
            for panel_type in ("hvg", "heg"):
                drop_corrected(processed, section.name, panel_type)  # it was made from what is replaced now
    picture = ROOT / "figure" / "QC" / dataset.name / f"{section.name}.jpg"
    if anew or not picture.exists():
        with DRAWING:
            figures.spots_over_slide(adata, section.name, picture)
    return {"section": section.name, "donor": section.donor, "role": section.role, "n_spots": adata.n_obs,
            "n_genes": adata.n_vars, "mpp": adata.uns["spatial"][section.name]["metadata"]["mpp"],
            "patch_px": dataset.patch_px, "crop_px": int(adata.uns["crop_px"]), "padded": int(adata.uns["padded"]),
            "image": files["image"].name,
            "sha256": " ".join(f"{name}:{digest}" for name, digest in made_from["files"].items())}


def describe(dataset, section, files):
    """All that a section's processed files depend on: the raw files' digests, and the settings."""
    read = list(dict.fromkeys(sources.files_of(files["counts"]) + list(files.values())))
    names = [path.name for path in read]  # two files of one name keep their folder's, so that both are recorded
    hashes = {path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}": sha256(path)
              for path in read}
    return {"format": FORMAT, "files": hashes, "n_spots": section.n_spots, "patch_px": dataset.patch_px,
            "min_counts": dataset.min_counts, "pitch_um": section.pitch_um or dataset.pitch_um,
            "spot_um": dataset.spot_um, "patch_um": dataset.patch_um, "mpp": section.mpp, "scale": section.scale,
            "new_ids": hashlib.sha256(json.dumps(section.new_ids).encode()).hexdigest()}


def read_section(dataset, section, files):
    """Counts and positions of one section, joined, checked against its reported size, and log-normalised."""
    print(f"{section.name}: reading {', '.join(dict.fromkeys(path.name for path in files.values()))}", flush=True)
    counts, spots = sources.read_counts(files["counts"]), read_spots(section, files["positions"])
    counts.var_names = counts.var_names.map(lambda gene: section.new_ids.get(gene, gene))
    adata = sources.join(counts, spots, files["counts"], files["positions"])
    if files["image"].suffix == ".h5":
        adata = slide.StoredPatches(files["image"]).of(adata)
    if section.n_spots is not None and adata.n_obs != section.n_spots:
        raise InputError(f"section {section.name}: {files['counts']} with {files['positions']} gives {adata.n_obs} "
                         f"spots under tissue, but {section.name} has {section.n_spots}. One of them is another "
                         "section's file")
    if "symbols" in files:
        symbols = sources.read_symbols(files["symbols"])
        adata.var["symbol"] = symbols.reindex(adata.var_names).fillna(pd.Series(adata.var_names, adata.var_names))
    total = np.asarray(adata.X.sum(axis=1)).ravel()
    if total.max() < max(1, dataset.min_counts):
        raise InputError(f"section {section.name}: no spot of {files['counts']} has {max(1, dataset.min_counts)} "
                         f"counts or more (min_counts of dataset {dataset.name}); the fullest has {total.max()}")
    if (enough := total >= dataset.min_counts).sum() < len(total):
        adata = adata[enough].copy()
    expression.log_normalise(adata)
    expression.gene_statistics(adata)
    return adata


def read_spots(section, path):
    """The position table of a section, in pixels of its image."""
    spots = sources.read_positions(path)
    spots[["x", "y"]] *= section.scale
    return spots


def crop_size(dataset, mpp, stored, adata):
    """The side of what a patch shows, in full-resolution pixels. stored: the patches of a section that has no image."""
    if dataset.patch_um is None:
        return stored.crop_px(adata) if stored else dataset.patch_px
    crop_px = max(1, round(dataset.patch_um / mpp))
    if stored and crop_px > stored.crop_px(adata) + 1:
        raise InputError(f"{stored.path}: its patches show {stored.crop_px(adata) * mpp:.0f} µm, less than --patch_um "
                         f"{dataset.patch_um:g}. Give a smaller one, or the section's image")
    return crop_px


def write_patches(dataset, image, adata, mpp, path, scratch):
    """Write the patches of a section's spots, cropped from its image or taken from a file of patches.

    Adds to adata.uns crop_px, what a patch shows in full-resolution pixels, and padded. Returns the thumbnail and its
    pixels per full-resolution pixel.
    """
    stored = slide.StoredPatches(image) if image.suffix == ".h5" else None
    adata.uns["crop_px"] = crop_px = crop_size(dataset, mpp, stored, adata)
    if stored:
        adata.uns["padded"] = 0
        return stored.write(adata, crop_px, dataset.patch_px, path)
    with slide.open_slide(image, scratch) as opened:
        thumbnail, scale, adata.uns["padded"] = slide.crop_patches(
            opened, adata.obsm["spatial"], crop_px, path, dataset.patch_px)
    return thumbnail, scale


def microns_per_pixel(section, adata, positions_path, pitch_um=Dataset.pitch_um):
    """Of a section's image: as stated, or by the distance of neighbouring spots."""
    x, y = adata.obsm["spatial"].T
    try:
        return section.mpp or (section.pitch_um or pitch_um) / sources.spot_pitch(adata.obs.assign(x=x, y=y))
    except ValueError as error:
        raise InputError(f"{positions_path}: {error}. Check that this is the section's own position file") from None


def write_panel(dataset, processed, genes, panel_type, protocol):
    """Choose one panel and write it by gene id. In the strict protocol the query sections choose nothing."""
    choosing = [s.name for s in dataset.sections if protocol == "paper" or s.role == "reference"]
    n_top = dataset.n_hvg if panel_type == "hvg" else dataset.n_heg
    panel = expression.choose_panel(panel_type, {name: genes[name] for name in choosing}, n_top,
                                    present_in=[table.index for table in genes.values()])
    panel.insert(1, "marker", panel["symbol"].isin(dataset.markers))
    how = {"type": panel_type, "protocol": protocol, "sections": choosing, "n_top": n_top,
           "ranked_by": "normalised dispersion" if panel_type == "hvg" else "mean log-normalised expression",
           "markers": list(dataset.markers),
           "markers_not_in_panel": sorted(set(dataset.markers) - set(panel["symbol"]))}
    with atomic_path(processed.panel_path(run_name(panel_type, protocol))) as path, open(path, "w") as file:
        file.write(f"# {json.dumps(how)}\n")
        panel.to_csv(file)
        if protocol == "paper":
            for section in dataset.sections:
                drop_corrected(processed, section.name, panel_type)  # its columns are those of the panel replaced now


def drop_corrected(processed, section, panel_type):
    """Remove corrected expression that no longer fits, so that no later stage takes it for today's."""
    processed.corrected_path(section, run_name(panel_type, "paper")).unlink(missing_ok=True)


def write_corrected(dataset, processed, panel_type):
    """Harmony-correct the panel's expression over all sections, as published, and write one file a section."""
    name = run_name(panel_type, "paper")
    panel = processed.panel(name)
    corrected = expression.harmonise({section.name: processed.expression(section.name, panel_type, panel)
                                      for section in dataset.sections})
    for section, matrix in corrected.items():
        with atomic_path(processed.corrected_path(section, name)) as path, open(path, "wb") as file:
            np.save(file, matrix)
