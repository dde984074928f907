"""Raw -> processed, section by section: what every preprocess_<dataset>.py does."""

import hashlib
import json
import multiprocessing
import shlex
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd

from . import expression, figures, identity, slide, sources
from .dataset import ROOT, Dataset, Processed, identity_of, patches_digest, section_digest
from .files import InputError, atomic_path, locked, sha256, write_h5ad
from .panel import choose_panel, read_panel
from .part import of_obs, of_places, selected
from .spots import array_of, geometry_notes, pitch

DRAWING = threading.Lock()  # matplotlib is not thread-safe
FORMAT = 3  # of the processed files; with a higher one every section is made again


def prepare(dataset, raw, protocol="strict", workers=1, only=None):
    """Write the processed files of a dataset; with `only`, those of some sections, and no panel.

    raw: the folder below which the sections' patterns are looked for; None if they are exact paths.
    protocol: "paper" adds the published panel and batch correction. workers: number of processes.
    only: section names. Raises InputError for an unknown section, or if raw files are wrong.
    """
    names = [section.name for section in dataset.sections]
    if unknown := set(only or ()) - set(names):
        raise InputError(f"--section {min(unknown)}: {dataset.name} has no such section, but "
                         f"{', '.join(names)}")
    processed = Processed(dataset.name)
    check_own(processed, dataset, part=bool(only))
    jobs = [(dataset, section, raw, processed) for section in dataset.sections
            if only is None or section.name in only]
    rows = preprocess_sections(jobs, workers)
    if only:
        return
    table = pd.DataFrame(rows).set_index("section")
    genes = {section.name: processed.genes(section.name) for section in dataset.sections}
    common = set.intersection(*(set(var.index) for var in genes.values()))
    write_fingerprints(processed, list(table.index), common)
    with atomic_path(processed.sections_path) as path:
        table.to_csv(path)

    for panel_type in ("hvg", "heg"):
        write_panel(dataset, processed, genes, panel_type, "strict")
        if protocol == "paper":
            write_panel(dataset, processed, genes, panel_type, "paper")

    shown = table[["donor", "role", "n_spots", "n_genes", "mpp", "padded"]]
    print(shown.to_string(float_format="%.4f"))
    print(f"{len(common):,} genes are in every section")
    symbols = set().union(*(var["symbol"] for var in genes.values()))
    if unknown := [marker for marker in dataset.markers if marker not in symbols]:
        print(f"warning: no section has a gene of the name {', '.join(unknown)}. These markers are "
              "not scored. Check their spelling")
    for path in sorted(processed.folder.glob("panel_*.csv")):
        panel = read_panel(path)
        absent = f", without the markers {', '.join(panel.absent)}" if panel.absent else ""
        print(f"panel {path.stem.removeprefix('panel_')}: {len(panel)} genes{absent}")
    print(f"Look at {ROOT / 'figure' / 'QC' / dataset.name}: every spot must lie on its tissue.")


def write_fingerprints(processed, names, common):
    """Write what distinguishes the sections' spots, for `Processed.check_apart`.

    names: of the sections. common: the gene ids that every section has.
    Raises InputError, before any file is written, if two sections hold the same spots.
    """
    found, sections = {}, []
    for name in names:
        adata = processed.read(name)
        found[name] = identity.fingerprints(adata.layers["counts"], adata.var_names, common)
        sections.append(identity_of(name, adata, found[name]))
    problems, notes = identity.compare(sections)
    if problems:
        more = ""
        if len(problems) > 1:
            more = f". And {len(problems) - 1} more: --check lists them all"
        raise InputError(f"dataset {processed.dataset}: {problems[0]}{more}")
    for note in notes:
        print(note)
    with atomic_path(processed.fingerprints_path) as path, open(path, "wb") as file:
        np.savez(file, **found)


def check_own(processed, dataset, part):
    """Raise InputError if another sample sheet made the processed files, else record the command.

    part: whether only some sections are prepared. Then a recorded command stays.
    """
    if dataset.command is None:
        return
    path = processed.command_path
    earlier = path.read_text().strip() if path.exists() else dataset.command
    if sheet_of(earlier) != sheet_of(dataset.command):
        raise InputError(f"{processed.folder} was made from {sheet_of(earlier)}, not from "
                         f"{sheet_of(dataset.command)}. Give this dataset another name with "
                         "--name, or delete that folder")
    if part and path.exists():
        return  # so that the recorded command is one that makes all sections
    with atomic_path(path) as temporary:
        temporary.write_text(dataset.command + "\n")


def sheet_of(text):
    """The sample sheet in a command of preprocess_custom.py."""
    return shlex.split(text)[2]


def preprocess_sections(jobs, workers=1):
    """Prepare sections and return their rows of sections.csv.

    jobs: the arguments of each call of `preprocess_section`. A single process prepares two at a
    time in threads, because nearly all of the work is outside Python's lock and a second process
    would first import everything. After an error, sections that have begun are finished.
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
    """Write one section's patches, expression and picture, unless they are up to date.

    Of several processes that prepare the same section, one works. The others wait, and then find it
    up to date. Returns the section's row of sections.csv.
    Raises InputError if a raw file is missing, damaged or does not fit the others.
    """
    files = {what: find_file(dataset, section, raw, what) for what in files_needed(dataset)}
    with locked(processed.section_path(section.name)):
        return update_section(dataset, section, files, processed)


def files_needed(dataset):
    """What the raw files of a section are."""
    return ("counts", "positions", "image", *(["symbols"] if dataset.symbols else []))


def find_file(dataset, section, raw, what):
    """The path of one raw file of a section. what: see `files_needed`."""
    if what == "symbols":
        return sources.find(raw, dataset.symbols, "gene symbols")
    return sources.find(raw, getattr(section, what), f"{what} of section {section.name}")


def update_section(dataset, section, files, processed):
    """What `preprocess_section` does once its raw files are found and its lock is held."""
    earlier = read_earlier(processed, section.name)
    with ThreadPoolExecutor(1) as thread:
        described = thread.submit(describe, dataset, section, files)
        adata = earlier or read_section(dataset, section, files)
    made_from = described.result()
    changed = not earlier or json.loads(earlier.uns["made_from"]) != made_from
    if changed:
        if earlier:
            adata = read_section(dataset, section, files)
        adata.uns["made_from"] = json.dumps(made_from)
        adata = write_section(dataset, section, files, adata, processed)
    for note in adata.uns["left_out"].splitlines():
        print(f"{section.name}: {note}")
    picture = ROOT / "figure" / "QC" / dataset.name / f"{section.name}.jpg"
    if changed or not picture.exists():
        with DRAWING:
            figures.spots_over_slide(adata, section.name, picture)
    digests = " ".join(f"{name}:{digest}" for name, digest in made_from["files"].items())
    return {"section": section.name, "donor": section.donor, "role": section.role,
            "n_spots": adata.n_obs, "n_genes": len(processed.genes(section.name)),
            "mpp": adata.uns["spatial"][section.name]["metadata"]["mpp"],
            "patch_px": dataset.patch_px, "crop_px": int(adata.uns["crop_px"]),
            "padded": int(adata.uns["padded"]), "image": files["image"].name,
            "digest": section_digest(adata.uns["made_from"]), "sha256": digests}


def read_earlier(processed, section):
    """The spots of a section as it was made earlier, or None if it must be made again.

    They are None, too, if patches and expression were not made together, as after a run that was
    killed between giving the two their names.
    """
    if not processed.section_path(section).exists() or not processed.patches_path(section).exists():
        return None
    spots = processed.spots(section)
    try:
        processed.patches(section)
    except InputError:
        return None
    return spots


def write_section(dataset, section, files, adata, processed):
    """Write a section's expression, with the picture of its slide in it, and its patches.

    adata: as `read_section` returns it. Returns its spots that have a patch, log-normalised.
    """
    spot_um = dataset.spot_um * (section.pitch_um or dataset.pitch_um) / dataset.pitch_um
    section_path = processed.section_path(section.name)
    patches_path = processed.patches_path(section.name)
    image = files["image"]
    # Both get their names at the very end, one right after the other, so that the patches of one
    # version do not meet the expression of another.
    with (atomic_path(section_path) as h5ad, atomic_path(patches_path) as patches,
          slide.open_picture(image, processed.folder) as picture):
        adata = normalised(picture.of(adata), dataset)
        mpp = section_mpp(section, adata, files["positions"], dataset.pitch_um)
        adata.uns["crop_px"] = crop_px = crop_size(dataset, mpp, picture, adata)
        thumbnail, scale, adata.uns["padded"] = picture.write(
            adata, crop_px, dataset.patch_px, patches)
        notes = geometry_notes_of(section, adata, mpp, picture.stated_mpp, dataset.pitch_um)
        for note in notes:
            print(f"warning: {section.name}: {note}", flush=True)
        adata.uns["patches_digest"] = patches_digest(np.load(patches, mmap_mode="r"))
        adata.uns["spatial"] = {section.name: {
            "images": {"hires": thumbnail},
            "scalefactors": {"tissue_hires_scalef": scale, "spot_diameter_fullres": spot_um / mpp},
            "metadata": {"mpp": mpp, "source_image_path": image.name,
                         "notes": "\n".join(notes)}}}
        write_h5ad(adata, h5ad)
        for kind in ("hvg", "heg"):  # these were corrected from the expression replaced now
            processed.corrected_path(section.name, kind).unlink(missing_ok=True)
    return adata


def normalised(adata, dataset):
    """The spots with enough counts, log-normalised, with statistics of the genes."""
    enough = np.asarray(adata.X.sum(axis=1)).ravel() >= dataset.min_counts
    if not enough.all():
        adata = adata[enough].copy()
    expression.log_normalise(adata)
    expression.gene_statistics(adata)
    return adata


def describe(dataset, section, files):
    """All that a section's processed files depend on: its raw files' digests, and the settings."""
    read = list(dict.fromkeys(sources.files_of(files["counts"]) + list(files.values())))
    names = [path.name for path in read]
    digests = {}
    for path in read:
        # Two files with one name are recorded with their folders' names.
        unique = names.count(path.name) == 1
        digests[path.name if unique else f"{path.parent.name}/{path.name}"] = sha256(path)
    image = digests.get(files["image"].name) or sha256(files["image"])
    return {"format": FORMAT, "files": digests, "image": image, "n_spots": section.n_spots,
            "patch_px": dataset.patch_px, "min_counts": dataset.min_counts,
            "pitch_um": section.pitch_um or dataset.pitch_um, "spot_um": dataset.spot_um,
            "patch_um": dataset.patch_um, "mpp": section.mpp, "scale": section.scale,
            "part": [str(condition) for condition in section.part],
            "new_ids": hashlib.sha256(json.dumps(section.new_ids).encode()).hexdigest()}


def read_section(dataset, section, files):
    """Counts and positions of one section, joined and checked: AnnData, X counts.

    Raises InputError if the number of spots is not the reported one, or if all spots are too empty.
    """
    names = dict.fromkeys(path.name for path in files.values())
    print(f"{section.name}: reading {', '.join(names)}", flush=True)
    counts = read_counts(section, files["counts"])
    if left_out := counts.uns.pop("no_genes"):
        print(f"{section.name}: {left_out} are no genes and are left out", flush=True)
    adata = sources.join(counts, read_spots(section, files["positions"]), files["counts"],
                         files["positions"])
    if "symbols" in files:
        symbols = sources.read_symbols(files["symbols"]).reindex(adata.var_names)
        adata.var["symbol"] = symbols.fillna(pd.Series(adata.var_names, adata.var_names))
    check_spots(dataset.min_counts, section, adata, files)
    return adata


def check_spots(min_counts, section, adata, files):
    """Raise InputError if the spots are not as many as reported, or none has enough counts."""
    if section.n_spots is not None and adata.n_obs != section.n_spots:
        raise InputError(f"section {section.name}: {files['counts']} with {files['positions']} "
                         f"gives {adata.n_obs} spots under tissue, but {section.name} has "
                         f"{section.n_spots}. One of them is another section's file")
    fullest, least = adata.X.sum(axis=1).max(), max(1, min_counts)
    if fullest < least:
        raise InputError(f"section {section.name}: no spot of {files['counts']} has {least} counts "
                         f"or more (min_counts); the fullest has {fullest}")


def read_counts(section, path):
    """The counts of a section, with the gene ids that the sections share."""
    counts = sources.read_counts(path, of_obs(section.part) if path.suffix == ".h5ad" else ())
    counts.var_names = counts.var_names.map(lambda gene: section.new_ids.get(gene, gene))
    return counts


def read_spots(section, path):
    """The position table of a section, in pixels of its image."""
    spots = sources.read_positions(path, of_obs(section.part))
    spots[["x", "y"]] *= section.scale
    return spots[selected(spots, of_places(section.part), path)]


def crop_size(dataset, mpp, picture, adata):
    """The side of what a patch shows, in full-resolution pixels.

    picture: see `slide.open_picture`. Raises InputError if stored patches show too little.
    """
    stored = picture if isinstance(picture, slide.StoredPatches) else None
    if dataset.patch_um is None:
        return stored.crop_px(adata) if stored else dataset.patch_px
    crop_px = max(1, round(dataset.patch_um / mpp))
    if stored and crop_px > stored.crop_px(adata) + 1:
        raise InputError(f"{stored.path}: its patches show {stored.crop_px(adata) * mpp:.0f} µm, "
                         f"less than --patch_um {dataset.patch_um:g}. Give a smaller one, or the "
                         "section's image")
    return crop_px


def section_mpp(section, adata, positions_path, pitch_um=Dataset.pitch_um):
    """Microns per pixel of a section's image: as stated, or found from the spots' pitch.

    pitch_um: that of the dataset, used if the section has none of its own. adata: obsm["spatial"]
    in pixels of the image, obs with or without array_row and array_col. Raises InputError if the
    pitch in pixels cannot be found from the spots.
    """
    if section.mpp:
        return section.mpp
    try:
        return (section.pitch_um or pitch_um) / pitch(adata.obsm["spatial"], array_of(adata.obs))
    except ValueError as error:
        raise InputError(f"{positions_path}: {error}. Check that this is the section's own "
                         "position file") from None


def geometry_notes_of(section, adata, mpp, image_mpp, pitch_um=Dataset.pitch_um):
    """What contradicts a section's places and scale: a list of text (see `geometry_notes`).

    image_mpp: microns per pixel that the image file states, or None.
    """
    stated = {"the section's own files": section.stated_mpp, "facts in the image file": image_mpp}
    return geometry_notes(adata.obsm["spatial"], array_of(adata.obs), mpp,
                          section.pitch_um or pitch_um, stated)


def write_panel(dataset, processed, genes, kind, protocol):
    """Choose one panel and write it. In the strict protocol the query sections choose nothing."""
    choosing = [section.name for section in dataset.sections
                if protocol == "paper" or section.role == "reference"]
    n_top = dataset.n_hvg if kind == "hvg" else dataset.n_heg
    panel = choose_panel(kind, {name: genes[name] for name in choosing}, n_top,
                         [table.index for table in genes.values()], dataset.markers, protocol)
    if protocol == "paper":
        # Removed first, because their columns are those of the panel replaced now.
        for section in dataset.sections:
            processed.corrected_path(section.name, kind).unlink(missing_ok=True)
    panel.write(processed.panel_path(kind, protocol))
    if protocol == "paper":
        write_corrected(dataset, processed, panel)


def write_corrected(dataset, processed, panel):
    """Write the panel's expression, Harmony-corrected over all sections: one file per section.

    This is the published correction.
    """
    paths = {section.name: processed.corrected_path(section.name, panel.kind)
             for section in dataset.sections}
    uncorrected = replace(panel, protocol="strict")  # for which expression is not corrected
    corrected = expression.harmonise({section: processed.expression(section, uncorrected)
                                      for section in paths})
    for section, path in paths.items():
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, corrected[section])
