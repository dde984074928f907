"""A sample sheet -> Dataset: one line a section, its files found in the folders that others' programs left them in.

Paths in the sheet are relative to it and exact: no character in them is a pattern. Whatever is wrong is collected, not
raised at the first, so that a sheet can be mended in one go. Folders: 10x Genomics "Spatial Outputs" (Space Ranger 1 to
4, Visium HD's `binned_outputs`); HEST-1k (hestcore 1.0.6).
"""

import csv
import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd

from . import preprocess, slide, sources
from .dataset import ROOT, Section
from .files import InputError, first_line
from .spots import array_of

NEEDED = ["section", "counts", "donor", "role"]
KNOWN = [*NEEDED, "image", "positions", "mpp", "pitch", "scale", "bin"]
COUNTS = ["filtered_feature_bc_matrix.h5", "filtered_feature_bc_matrix", "matrix.mtx", "matrix.mtx.gz",
          "raw_feature_bc_matrix.h5", "raw_feature_bc_matrix"]  # the better first; any prefix may stand before
POSITIONS = [name + end for name in ("tissue_positions.csv", "tissue_positions_list.csv", "tissue_positions_list.txt",
                                     "tissue_positions.parquet") for end in ("", ".gz")]
SCALE_FACTORS = ["scalefactors_json.json", "scalefactors_json.json.gz"]
ENSEMBL = re.compile(r"(ENS[A-Z]*G\d+)(\.\d+)?")


@contextmanager
def collecting(problems, section):
    """What is wrong in this block goes to the list of problems, under the section's name."""
    try:
        yield
    except InputError as error:
        problems.append(f"{section}: {error}")


# ---------------------------------------------------------------------------------------------- the sheet


def read_sheet(path):
    """Read a sample sheet. Returns (sections, problems, names of columns that are not used).

    A section of which a file is not found has None in its place. Raises InputError if the sheet itself is unreadable.
    """
    path = Path(path)
    table = read_lines(path)
    if absent := [column for column in NEEDED if column not in table]:
        raise InputError(f"{path}: lacks the column {', '.join(absent)}. Its columns are {', '.join(table)}; needed "
                         f"are {', '.join(NEEDED)}, and {', '.join(KNOWN[len(NEEDED):])} where they apply")
    if table.empty:
        raise InputError(f"{path}: lists no section. Give each a line")
    table = table.reindex(columns=[*table, *(column for column in KNOWN if column not in table)], fill_value="")
    problems, sections = [], []
    for line, row in table.iterrows():
        name = row["section"] or f"line {line}"
        if not re.fullmatch(r"[^./\\][^/\\]*", row["section"]):
            problems.append(f"{name}: section {row['section']!r} cannot be the name of a file. Name it otherwise")
        if row["section"] and (table["section"] == row["section"]).sum() > 1:
            problems.append(f"{name}: line {line} names a section that another line names too. Give each its own name")
        if not row["donor"]:
            problems.append(f"{name}: its donor is empty. Name the person or animal that it comes from")
        if row["role"] not in ("reference", "query"):
            problems.append(f"{name}: role {row['role']!r} is neither 'reference' nor 'query'")
        sections.append(read_line(row, path.parent, name, problems))
    if not (table["role"] == "reference").any():
        problems.append(f"{path.name}: no section has the role 'reference': nothing to learn from")
    return sections, problems, [column for column in table if column not in KNOWN]


def read_lines(path):
    """The sheet as text, by line number; columns separated by commas, semicolons or tabs."""
    try:
        with sources.open_text(path) as file:
            text = file.read()
        head = text.split("\n")[0]
        rows = list(csv.reader(text.splitlines(), delimiter=max(",;\t", key=head.count)))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: the sample sheet") from None
    except (OSError, ValueError, EOFError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a sample sheet ({first_line(error)}). Save it as CSV in "
                         "UTF-8") from None
    columns = [cell.strip().lower() for cell in rows[0]] if rows else []
    if len(set(columns)) < len(columns):
        raise InputError(f"{path}: a column stands twice in its first line, {head!r}")
    cells = {line: [cell.strip() for cell in row] for line, row in enumerate(rows[1:], 2) if any(map(str.strip, row))}
    for line, row in cells.items():
        if len(row) > len(columns):
            raise InputError(f"{path}: line {line} has {len(row)} cells, its first line {len(columns)}. Quote a cell "
                             "that holds a comma")
        row += [""] * (len(columns) - len(row))
    return pd.DataFrame.from_dict(cells, orient="index", columns=columns)


def read_line(row, folder, name, problems):
    """The Section of one line, with exact paths; None for a file that is not found."""
    def given(column):
        return (folder / Path(row[column]).expanduser()).resolve() if row[column] else None

    numbers, counts, positions, image, scale, pitch, mpp = {}, None, None, None, 1.0, None, None
    for column in ("mpp", "pitch"):
        with collecting(problems, name):
            numbers[column] = number(row[column], column)
    with collecting(problems, name):
        counts = find_counts(given("counts"), row["section"], row["bin"])
    if counts or row["positions"]:
        with collecting(problems, name):
            positions = find_positions(given("positions"), counts)
    if counts or row["image"]:
        with collecting(problems, name):
            image = find_image(given("image"), counts)
    if positions:
        with collecting(problems, name):
            scale = find_scale(row["scale"], positions, image)
        with collecting(problems, name):
            pitch, mpp = stated_pitch(counts, positions)
    if numbers.get("pitch"):
        mpp = None
    return Section(name=row["section"], donor=row["donor"], role=row["role"], counts=counts, positions=positions,
                   image=image, scale=scale, mpp=numbers.get("mpp") or mpp, pitch_um=numbers.get("pitch") or pitch)


def number(text, column):
    """A cell that holds a number above 0, or nothing: None."""
    try:
        value = float(text) if text else None
    except ValueError:
        value = 0
    if value is not None and not 0 < value < np.inf:
        raise InputError(f"{column} is {text!r}, expected a number above 0")
    return value


# ---------------------------------------------------------------------------------------------- its files


def find_counts(given, section, bin_um):
    """The count matrix that a file or a folder stands for."""
    if given is None:
        raise InputError("its counts are empty. Name a matrix, or a folder that holds it")
    if given.is_file():
        return given
    if not given.is_dir():
        raise InputError(f"{given} is missing: its counts")
    folder = given / "outs" if (given / "outs").is_dir() else given
    if (folder / "binned_outputs").is_dir():
        folder = square(folder / "binned_outputs", bin_um or "8")
    elif bin_um:
        raise InputError(f"bin is {bin_um!r}, but {folder} has no binned_outputs. Leave bin empty")
    if (folder / "st").is_dir():
        if not (file := folder / "st" / f"{section}.h5ad").exists():
            raise InputError(f"{file} is missing; in a HEST folder, section is the id of the sample")
        return file
    found = one_of(folder, COUNTS)
    if found is not None and found.is_dir():
        found = one_of(found, ["matrix.mtx", "matrix.mtx.gz"])
    if found is None:
        raise InputError(f"{given}: no count matrix in it; looked for …{', …'.join(COUNTS)}. Name the file")
    return found


def square(folder, bin_um):
    """The folder of one bin size of Visium HD."""
    size = re.fullmatch(r"(?:square_)?0*(\d+)(?:um)?", bin_um)
    if size is None or not (chosen := folder / f"square_{int(size[1]):03d}um").is_dir():
        there = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise InputError(f"{folder} has no bins of {bin_um!r} microns, but {there}. Choose one in the column bin")
    return chosen


def find_positions(given, counts):
    """The position file: named, or lying where Space Ranger puts it beside the counts; an AnnData's own otherwise."""
    if given is not None and not given.exists():
        raise InputError(f"{given} is missing: its positions")
    if given is not None and given.is_file():
        return given
    if given is None and counts.suffix == ".h5ad":
        return counts
    top = given or counts.parent
    prefix = "" if counts is None else re.sub(r"((filtered|raw)_feature_bc_)?matrix\.\w+(\.gz)?$", "", counts.name)
    folders = [top, top.parent] if given is None and top.name.endswith("feature_bc_matrix") else [top]
    for folder in folders:
        if found := one_of(folder, POSITIONS, prefix) or one_of(folder / "spatial", POSITIONS, prefix):
            return found
    raise InputError(f"{folders[-1]}: no positions of its spots in it or in its folder spatial; looked for "
                     f"…{', …'.join(POSITIONS[::2])}. Name the file in the column positions")


def find_image(given, counts):
    """The image: named, or that of a HEST folder: its slide, or else its patches."""
    if given is not None:
        if not given.is_file():
            raise InputError(f"{given} {'is a folder' if given.is_dir() else 'is missing'}: its image. Name the file")
        return given
    if counts.suffix == ".h5ad" and counts.parent.name in ("st", "adata"):
        top = counts.parent.parent
        for image in (top / "wsis" / f"{counts.stem}.tif", top / "patches" / f"{counts.stem}.h5"):
            if image.exists():
                return image
        raise InputError(f"{image} is missing, and the slide in wsis too. Get one of them, or name another image")
    raise InputError("its image is empty. Name the full-resolution image; for want of it Space Ranger's "
                     "tissue_hires_image.png, with scale hires")


def find_scale(text, positions, image):
    """What positions are multiplied by to be pixels of the image: 1, a number, or hires or lowres by Space Ranger."""
    if text not in ("hires", "lowres"):
        try:
            return number(text, "scale") or 1.0
        except InputError:
            raise InputError(f"scale is {text!r}, expected a number above 0, hires or lowres") from None
    if positions.suffix == ".h5ad":
        with sources.opened_h5ad(positions) as file:
            libraries = list(file["uns/spatial"].values()) if "spatial" in file.get("uns", ()) else []
            factors = dict(anndata.io.read_elem(libraries[0]["scalefactors"])) if len(libraries) == 1 else {}
        where = f"{positions}: uns['spatial']"
    else:
        where = scale_factors_file(positions, image)
        if where is None:
            raise InputError(f"{positions.parent}: no scalefactors_json.json, in which scale {text} is looked up. Put "
                             "it there, or give the number")
        factors = read_json(where)
    if f"tissue_{text}_scalef" not in factors:
        raise InputError(f"{where} states no tissue_{text}_scalef. Give the number as scale")
    return float(factors[f"tissue_{text}_scalef"])


def scale_factors_file(positions, image):
    """Space Ranger's scale factors beside the positions or the image, or None."""
    for folder in dict.fromkeys(path.parent for path in (positions, image) if path is not None):
        prefix = re.sub(r"tissue_positions.*", "", positions.name)
        if found := one_of(folder, SCALE_FACTORS, prefix):
            return found
    return None


def stated_pitch(counts, positions):
    """What the files themselves state: distance of neighbouring spots in microns, microns per pixel; or None.

    The bin size of Visium HD; HEST's metadata, of which the distance is preferred where there is a lattice to measure.
    """
    if positions.suffix != ".h5ad":
        size = re.search(r"square_(\d{3})um", positions.parent.parent.name)
        where = scale_factors_file(positions, None)
        stated = read_json(where).get("bin_size_um") if where else None
        return stated or (float(size[1]) if size else None), None
    metadata = positions.parent.parent / "metadata" / f"{positions.stem}.json"
    if not metadata.exists():
        return None, None
    facts = read_json(metadata)
    with sources.opened_h5ad(positions) as file:
        lattice = {"array_row", "array_col"} <= set(file["obs"])
    pitch_um, mpp = (number(str(facts.get(key) or ""), f"{key} of {metadata}")
                     for key in ("inter_spot_dist", "pixel_size_um_estimated"))
    return (pitch_um, None) if lattice and pitch_um else (None, mpp)


def read_json(path):
    """The facts in a JSON file."""
    try:
        with sources.open_text(path) as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise InputError(f"{path} is damaged ({first_line(error)}). Get it again") from None


def one_of(folder, endings, prefix=""):
    """The one file or folder below `folder` whose name ends so, by the first ending with a match; None without.

    prefix: what stands before the ending in the name of the section's other files: what has a different one is another
    section's. Raises InputError if several could be meant.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    for ending in endings:
        matches = [name for name in names if name.endswith(ending)]
        if prefix:
            matches = [name for name in matches if prefix.startswith(name.removesuffix(ending))]
            matches = sorted(matches, key=len)[-1:]
        if len(matches) > 1:
            raise InputError(f"{folder}: {', '.join(matches[:4])} could each be meant. Name the file itself")
        if matches:
            return folder / matches[0]
    return None


# ---------------------------------------------------------------------------------------------- genes


def share_genes(sections, problems):
    """Give sections that name the same genes otherwise the same ids. Returns (sections, lines that report it)."""
    tables = {}
    for section in sections:
        if section.counts:
            with collecting(problems, section.name):
                tables[section.name] = sources.read_genes(section.counts)
    new_ids, report = agree(tables)
    return [replace(section, new_ids=new_ids.get(section.name, {})) for section in sections], report


def agree(tables):
    """New gene ids where sections would otherwise not share genes that they have in common.

    tables: section -> DataFrame, index gene id, symbol. Ensembl ids lose their version if sections then share more. A
    section that has symbols alone gets the ids that others have for them, through symbols that stand for one gene
    everywhere. Returns (section -> {old id: new id}, lines that report what was done).
    """
    report = []
    if len({tuple(table.index) for table in tables.values()}) < 2:
        return {}, report
    ids = {name: table.index.to_series() for name, table in tables.items()}  # section -> new id by old id
    by_symbol = [name for name, table in tables.items() if (table.index == table["symbol"]).all()
                 and table.index.str.fullmatch(ENSEMBL.pattern).mean() < 0.5]
    by_id = [name for name in tables if name not in by_symbol]

    plain = {name: without_version(ids[name]) for name in by_id}
    before, after = (len(shared(each[name] for name in by_id)) for each in (ids, plain))
    if after > before:
        ids |= plain
        report.append(f"the versions of Ensembl ids are left out: {', '.join(by_id)} share {after:,} genes without "
                      f"them, {before:,} with them")

    if by_symbol and by_id:
        pairs = pd.concat([pd.DataFrame({"symbol": tables[name]["symbol"], "id": ids[name]}) for name in by_id])
        known = pairs.drop_duplicates().drop_duplicates("symbol", keep=False).set_index("symbol")["id"]
        for name in by_symbol:
            bridged = ids[name].map(known)
            bridged[bridged.duplicated(keep=False)] = np.nan  # two symbols for one gene
            ids[name] = bridged.fillna(ids[name])
            if bridged.notna().any():
                report.append(f"{name} names genes by symbol alone: {bridged.notna().sum():,} of its {len(bridged):,} "
                              f"got the ids of {', '.join(by_id)}, through symbols that stand for one gene only")
    return {name: {old: new for old, new in series.items() if old != new} for name, series in ids.items()}, report


def without_version(ids):
    """Ensembl ids without `.version`, but where that would leave one section with an id twice."""
    plain = ids.str.replace(rf"^{ENSEMBL.pattern}$", r"\1", regex=True)
    return plain.where(~plain.duplicated(keep=False), ids)


def shared(many):
    """The genes that all of some series of ids hold."""
    sets = [set(ids) for ids in many]
    return set.intersection(*sets) if sets else set()


# ---------------------------------------------------------------------------------------------- --check


class Cut(NamedTuple):
    """The settings of a Dataset that say how patches are cut and which spots are kept."""

    patch_px: int
    patch_um: float | None
    min_counts: int


def check(sections, cut, problems):
    """Read all that preprocessing reads, and write nothing.

    cut: a Cut. problems: a list that what is wrong is added to.
    Returns (DataFrame of what was found, a line a section; notes).
    """
    rows, genes, notes = [], {}, []
    for section in sections:
        facts, ids = inspect(section, cut, problems, notes)
        rows.append(facts)
        if ids is not None:
            genes[section.name] = ids
    table = pd.DataFrame(rows).set_index("section")
    common = shared(genes.values())
    if genes and not common:
        problems.append(f"{', '.join(genes)}: no gene is in all of them. Check that they are of one species, and that "
                        "their genes have Ensembl ids or symbols")
    elif genes:
        notes.append(f"{len(common):,} genes are in every section")
    widths = table["patch µm"].dropna()
    if cut.patch_um is None and len(widths) and widths.max() > 1.2 * widths.min():
        notes.append(f"a patch shows {widths.min():.0f} µm of {widths.idxmin()} and {widths.max():.0f} µm of "
                     f"{widths.idxmax()}: --patch_um {widths.min():.0f} would make them alike")
    size = table["spots"].sum() * cut.patch_px**2 * 3 / 1e9
    free = shutil.disk_usage(ROOT if ROOT.exists() else Path()).free / 1e9
    notes.append(f"the patches will take {size:,.2f} GB")
    if size > free:
        problems.append(f"the patches need {size:,.0f} GB, but {ROOT} has {free:,.0f} GB free. Choose a smaller "
                        "--patch_px, fewer sections or larger bins")
    return table, notes


def inspect(section, cut, problems, notes):
    """One section's line of the table that `check` returns, and its gene ids."""
    name = section.name
    facts = {"section": name, "donor": section.donor, "role": section.role, "spots": np.nan, "genes": np.nan,
             "median counts": np.nan, "mpp": np.nan, "patch µm": np.nan, "image": "", "positions": "", "inside": ""}
    counts = spots = adata = stored = None
    if section.counts:
        with collecting(problems, name):
            counts = sources.read_counts(section.counts)
            facts["genes"] = counts.n_vars
    if section.positions:
        with collecting(problems, name):
            spots = preprocess.read_spots(section, section.positions)
            facts["positions"] = spots.attrs["kind"]
    if counts is not None and spots is not None:
        with collecting(problems, name):
            adata = sources.join(counts, spots, section.counts, section.positions)
            if lacking := spots["in_tissue"].sum() - adata.n_obs:
                notes.append(f"{name}: {section.counts.name} lacks {lacking:,} of the {spots['in_tissue'].sum():,} "
                             f"spots under tissue in {section.positions.name}; they are left out")
    if section.image and section.image.suffix == ".h5" and adata is not None:
        with collecting(problems, name):
            stored = slide.StoredPatches(section.image)
            with_patch = stored.of(adata)
            facts["image"] = f"patches of {stored.side} px"
            facts["inside"] = f"{with_patch.n_obs} of {adata.n_obs}"
            adata = with_patch
    elif section.image:
        with collecting(problems, name), slide.open_slide(section.image) as opened:
            facts["image"] = f"{opened.width} x {opened.height}"
            if spots is not None:
                xy = spots.loc[spots["in_tissue"], ["x", "y"]].to_numpy()
                facts["inside"] = f"{len(xy) - slide.outside(opened, xy).sum()} of {len(xy)}"
                with_mend(section, opened, xy)
    if adata is not None:
        with collecting(problems, name):
            total = np.asarray(adata.X.sum(axis=1)).ravel()
            least = max(1, cut.min_counts)
            facts["spots"], facts["median counts"] = (total >= cut.min_counts).sum(), round(np.median(total))
            if total.max() < least:
                raise InputError(f"no spot of {section.counts} has {least} counts or more (--min_counts); the fullest "
                                 f"has {total.max()}")
        with collecting(problems, name):
            mpp = facts["mpp"] = preprocess.section_mpp(section, adata, section.positions)
            crop_px = preprocess.crop_size(cut, mpp, stored, adata)
            facts["patch µm"] = crop_px * mpp
            if section.mpp and array_of(adata.obs) is not None:
                by_pitch = preprocess.section_mpp(replace(section, mpp=None), adata, section.positions)
                if abs(by_pitch / mpp - 1) > 0.1:
                    notes.append(f"{name}: mpp is {mpp:.4g} as stated, but {by_pitch:.4g} if neighbouring spots are "
                                 f"{section.pitch_um or 100:.4g} µm apart (column pitch)")
    new = None if counts is None else counts.var_names.map(lambda gene: section.new_ids.get(gene, gene))
    return facts, new


def with_mend(section, opened, xy):
    """Raise the slide's own error if spots lie outside it, with what would bring them in if that can be told."""
    try:
        slide.check_inside(opened, xy)
    except InputError as error:
        for word in ("hires", "lowres"):
            try:
                factor = find_scale(word, section.positions, section.image)
            except InputError:
                continue
            if not slide.outside(opened, xy / section.scale * factor).any():
                raise InputError(f"{error}. With {word} in the column scale all would lie inside") from None
        raise
