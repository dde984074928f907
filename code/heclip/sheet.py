"""A sample sheet -> Dataset: one section per line; its files are found in the folders it names.

Paths in the sheet are relative to it. They are exact: no character in them is a pattern. Problems
are collected instead of raised one by one, so that all of them can be fixed at once. Folders: 10x
Genomics "Spatial Outputs" (Space Ranger 1 to 4, Visium HD's `binned_outputs`); HEST-1k (hestcore
1.0.6).
"""

import csv
import json
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd

from . import identity, preprocess, slide, sources
from .dataset import ROOT, Dataset, Section
from .files import InputError, first_line, sha256
from .limits import read_text
from .part import of_obs, read_part
from .spots import array_of, staggered

NEEDED = ["section", "counts", "donor", "role"]
KNOWN = [*NEEDED, "image", "positions", "mpp", "pitch", "scale", "bin", "part"]
# Endings of file names, the preferred one first. Any prefix may come before them.
COUNTS = ["filtered_feature_bc_matrix.h5", "filtered_feature_bc_matrix", "matrix.mtx",
          "matrix.mtx.gz", "raw_feature_bc_matrix.h5", "raw_feature_bc_matrix"]
POSITIONS = ["tissue_positions.csv", "tissue_positions.csv.gz",
             "tissue_positions_list.csv", "tissue_positions_list.csv.gz",
             "tissue_positions_list.txt", "tissue_positions_list.txt.gz",
             "tissue_positions.parquet", "tissue_positions.parquet.gz"]
SCALE_FACTORS = ["scalefactors_json.json", "scalefactors_json.json.gz"]
ST_UM = 200  # distance of neighbouring spots on the array of 33 x 35 spots
ENSEMBL = re.compile(r"(ENS[A-Z]*G\d+)(\.\d+)?")


@contextmanager
def collecting(problems, section):
    """Add the error that a block raises to the list of problems, under the section's name.

    Once, if two blocks read the same file. It is an InputError, or the system's error for a file
    of the section that cannot be looked at.
    """
    try:
        yield
    except InputError as error:
        problem = f"{section}: {error}"
    except OSError as error:  # a name that is too long, a folder without permission
        problem = f"{section}: {error.filename}: {error.strerror}. Correct the path"
    else:
        return
    if problem not in problems:
        problems.append(problem)


# ---------------------------------------------------------------------------------------- the sheet


def read_sheet(path):
    """Read a sample sheet.

    path: text, one section per line, with the columns NEEDED and any others of KNOWN.
    Returns (list of Section, list of problems as text, names of columns that are not used). A
    Section has None in place of a file that is not found.
    Raises InputError if the sheet itself cannot be read, lacks a column or lists no section.
    """
    path = Path(path)
    table = read_lines(path)
    if absent := [column for column in NEEDED if column not in table]:
        raise InputError(f"{path}: lacks the column {', '.join(absent)}. Its columns are "
                         f"{', '.join(table)}; needed are {', '.join(NEEDED)}, and "
                         f"{', '.join(KNOWN[len(NEEDED):])} where they apply")
    if table.empty:
        raise InputError(f"{path}: lists no section. Give each a line")
    optional = [column for column in KNOWN if column not in table]
    table = table.reindex(columns=[*table, *optional], fill_value="")
    problems, sections = [], []
    repeated = table["section"].duplicated() & (table["section"] != "")
    for line, row in table.iterrows():
        name = row["section"] or f"line {line}"
        if not re.fullmatch(r"[^./\\\0-\x1f][^/\\\0-\x1f]*", row["section"]):
            problems.append(f"{name}: section {row['section']!r} cannot be the name of a file. "
                            "Choose another name")
        if row["section"] and (table["section"] == row["section"]).sum() > 1:
            problems.append(f"{name}: line {line} names a section that another line names too. "
                            "Give each its own name")
        if not row["donor"]:
            problems.append(f"{name}: its donor is empty. Name the person or animal that it comes "
                            "from")
        if row["role"] not in ("reference", "query"):
            problems.append(f"{name}: role {row['role']!r} is neither 'reference' nor 'query'. "
                            "Give one of the two")
        if not repeated[line]:  # a sheet may repeat a line many times
            sections.append(read_line(row, path.parent, name, problems))
    if not (table["role"] == "reference").any():
        problems.append(f"{path.name}: no section has the role 'reference', so there is nothing to "
                        "learn from. Give at least one this role")
    return sections, problems, [column for column in table if column not in KNOWN]


def read_lines(path):
    """Read the sheet's cells: DataFrame of text, index line number, columns in lower case.

    Columns are separated by commas, semicolons or tabs. Blank lines are left out.
    """
    try:
        lines = read_text(path).splitlines()
        skipped = 0
        if lines and re.fullmatch(r'"?sep=.?"?', lines[0].strip()):  # Excel's, for itself
            skipped = 1
        head = "".join(lines[skipped:skipped + 1])
        rows = list(csv.reader(lines[skipped:], delimiter=max(",;\t", key=head.count)))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: the sample sheet") from None
    except (OSError, ValueError, EOFError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a sample sheet ({first_line(error)}). Save it "
                         "as CSV in UTF-8") from None
    columns = [cell.strip().lower() for cell in rows[0]] if rows else []
    if len(set(columns)) < len(columns):
        raise InputError(f"{path}: a column stands twice in its first line, {head!r}. Rename one")
    cells = {}
    for line, row in enumerate(rows[1:], skipped + 2):
        if not any(map(str.strip, row)):
            continue
        if len(row) > len(columns):
            raise InputError(f"{path}: line {line} has {len(row)} cells, its first line "
                             f"{len(columns)}. Quote a cell that holds a comma")
        cells[line] = [cell.strip() for cell in row] + [""] * (len(columns) - len(row))
    return pd.DataFrame.from_dict(cells, orient="index", columns=columns)


def read_line(row, folder, name, problems):
    """The Section of one line, with exact paths; None in place of a file that is not found.

    folder: the one that paths are relative to. problems: a list that is added to.
    """
    def given(column):
        try:
            return (folder / Path(row[column]).expanduser()).resolve() if row[column] else None
        except (ValueError, RuntimeError) as error:  # a zero byte, an unknown user
            raise InputError(f"{column} is {row[column]!r}, which is no path "
                             f"({first_line(error)})") from None

    counts = positions = image = pitch_um = mpp = lattice = None
    scale, numbers, part = 1.0, {}, ()
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
    with collecting(problems, name):
        part = read_part(row["part"])
        check_part(part, counts, positions)
    if positions:
        with collecting(problems, name):
            scale = find_scale(row["scale"], positions, image, part)
        with collecting(problems, name):
            pitch_um, mpp, lattice = stated_scale(positions, asked=any(numbers.values()))
            mpp = mpp and mpp / scale
    # A pitch counts for more than the files' own mpp, because it can be measured in pixels.
    by_pitch = numbers.get("pitch") or (lattice and pitch_um)
    return Section(
        name=row["section"], donor=row["donor"], role=row["role"], counts=counts,
        positions=positions, image=image, scale=scale, stated_mpp=mpp,
        mpp=numbers.get("mpp") or (None if by_pitch else mpp),
        pitch_um=numbers.get("pitch") or pitch_um, part=part)


def check_part(part, counts, positions):
    """Raise InputError if a part asks for columns of an AnnData where there is none."""
    asked = of_obs(part)
    if asked and not any(path and path.suffix == ".h5ad" for path in (counts, positions)):
        raise InputError(f"part {asked[0]} asks for a column of an .h5ad, but its files are none. "
                         "Use array_row, array_col, x or y")


def number(text, column):
    """The number in a cell, None if it is empty. Raises InputError unless it is above 0."""
    try:
        value = float(text) if text else None
    except ValueError:
        value = 0
    if value is not None and not 0 < value < np.inf:
        raise InputError(f"{column} is {text!r}, expected a number above 0")
    return value


# ---------------------------------------------------------------------------------------- its files


def find_counts(given, section, bin_um):
    """The path of the count matrix: the given file, or the one in the given folder.

    given: Path or None. section: the id of the sample in a HEST folder. bin_um: the bin size of
    Visium HD as text; empty: 8.
    Raises InputError if there is no matrix or if several could be meant.
    """
    if given is None:
        raise InputError("its counts are empty. Name a matrix, or a folder that holds it")
    if given.is_file():
        return given
    if not given.is_dir():
        raise InputError(f"{given} is missing: its counts. Correct the path")
    folder = given / "outs" if (given / "outs").is_dir() else given
    if (folder / "binned_outputs").is_dir():
        folder = bin_folder(folder / "binned_outputs", bin_um or "8")
    elif bin_um:
        raise InputError(f"bin is {bin_um!r}, but {folder} has no binned_outputs. Leave bin empty")
    if (folder / "st").is_dir():
        if not (file := folder / "st" / f"{section}.h5ad").exists():
            raise InputError(f"{file} is missing. In a HEST folder, the column section must be the "
                             "id of the sample")
        return file
    found = one_of(folder, COUNTS)
    if found is not None and found.is_dir():
        found = one_of(found, ["matrix.mtx", "matrix.mtx.gz"])
    if found is None:
        raise InputError(f"{given}: no count matrix in it; looked for …{', …'.join(COUNTS)}. Name "
                         "the file")
    return found


def bin_folder(folder, bin_um):
    """The folder of one bin size of Visium HD."""
    size = re.fullmatch(r"(?:square_)?0*(\d+)(?:um)?", bin_um)
    if size is None or not (chosen := folder / f"square_{int(size[1]):03d}um").is_dir():
        existing = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise InputError(f"{folder} has no bins of {bin_um!r} microns, but {existing}. Choose one "
                         "in the column bin")
    return chosen


def find_positions(given, counts):
    """The path of the position file.

    given: a file, a folder that holds it, or None. None: an AnnData's own positions, otherwise the
    file at the place where Space Ranger puts it, relative to the counts.
    Raises InputError if there is none or if several could be meant.
    """
    if given is not None and not given.exists():
        raise InputError(f"{given} is missing: its positions. Correct the path")
    if given is not None and given.is_file():
        return given
    if given is None and counts.suffix == ".h5ad":
        return counts
    top = given or counts.parent
    prefix = ""
    if counts is not None:
        prefix = re.sub(r"((filtered|raw)_feature_bc_)?matrix\.\w+(\.gz)?$", "", counts.name)
    tops = [top]
    if given is None and top.name.endswith("feature_bc_matrix"):
        tops.append(top.parent)
    for top in tops:
        for folder in (top, top / "spatial"):
            if found := one_of(folder, POSITIONS, prefix):
                return found
    raise InputError(f"{top}: no positions of its spots in it or in its folder spatial; looked for "
                     f"…{', …'.join(POSITIONS[::2])}. Name the file in the column positions")


def find_image(given, counts):
    """The path of the image: the given file; or in a HEST folder the slide, or else the patches.

    Raises InputError if there is none.
    """
    if given is not None:
        if not given.is_file():
            fault = "is a folder" if given.is_dir() else "is missing"
            raise InputError(f"{given} {fault}: its image. Name the file")
        return given
    if counts.suffix == ".h5ad" and counts.parent.name in ("st", "adata"):
        top = counts.parent.parent
        for image in (top / "wsis" / f"{counts.stem}.tif", top / "patches" / f"{counts.stem}.h5"):
            if image.exists():
                return image
        raise InputError(f"{image} is missing, and the slide in wsis too. Download one of them, or "
                         "name another image")
    raise InputError("its image is empty. Name the full-resolution image. Without it, name Space "
                     "Ranger's tissue_hires_image.png and write hires in the column scale")


def find_scale(text, positions, image, part=()):
    """The factor that turns positions into pixels of the image.

    text: a number; hires or lowres, whose factor Space Ranger states; empty: 1. part: conditions,
    of which one may name a library of an AnnData.
    Raises InputError if the factor cannot be read or is not stated.
    """
    if text not in ("hires", "lowres"):
        try:
            return number(text, "scale") or 1.0
        except InputError:
            raise InputError(f"scale is {text!r}, expected a number above 0, hires or "
                             "lowres") from None
    if positions.suffix == ".h5ad":
        factors = sources.scale_facts(positions, part)
        where = f"{positions}: uns['spatial']"
    else:
        where = scale_factors_file(positions, image)
        if where is None:
            raise InputError(f"{positions.parent}: no scalefactors_json.json, in which scale "
                             f"{text} is looked up. Put it there, or give the number")
        factors = read_json(where)
    if f"tissue_{text}_scalef" not in factors:
        raise InputError(f"{where} states no tissue_{text}_scalef. Give the number as scale")
    return number(str(factors[f"tissue_{text}_scalef"]), f"tissue_{text}_scalef of {where}")


def scale_factors_file(positions, image):
    """Space Ranger's file of scale factors next to the positions or the image, or None."""
    prefix = re.sub(r"tissue_positions.*", "", positions.name)
    for folder in dict.fromkeys(path.parent for path in (positions, image) if path is not None):
        if found := one_of(folder, SCALE_FACTORS, prefix):
            return found
    return None


def stated_scale(positions, asked=True):
    """The resolution that the files themselves state.

    asked: whether the sheet states a resolution. If it does not, and the positions are an ST table,
    the spots of an array of 33 x 35 are 200 µm apart; those of other arrays are unknown.
    Returns (distance of neighbouring spots in microns or None, microns per pixel of the positions
    or None, whether there is a lattice, in which the distance can be measured).
    Raises InputError for an ST table of unknown resolution.
    """
    pitch_um = mpp = size = None
    lattice = True
    if positions.suffix == ".h5ad":
        metadata = positions.parent.parent / "metadata" / f"{positions.stem}.json"
        facts, where = sources.scale_facts(positions), positions
        with sources.opened_h5ad(positions) as file:
            lattice = array_of(anndata.io.read_elem(file["obs"])) is not None
        if metadata.exists():  # HEST's
            row = read_json(metadata)
            pitch_um, mpp = (number(str(row.get(key) or ""), f"{key} of {metadata}")
                             for key in ("inter_spot_dist", "pixel_size_um_estimated"))
    else:
        where = scale_factors_file(positions, None)
        facts = read_json(where) if where else {}
        size = re.search(r"square_(\d{3})um", positions.parent.parent.name)
        if not asked and not size and is_st_table(positions):
            pitch_um = ST_UM
    bin_um, of_facts = (number(str(facts.get(key) or ""), f"{key} of {where}")
                        for key in ("bin_size_um", "microns_per_pixel"))
    pitch_um = pitch_um or bin_um or (float(size[1]) if size else None)
    return pitch_um, mpp or of_facts, lattice


def is_st_table(positions):
    """Whether a position file is the alignment table of an ST array of 33 x 35 spots.

    Raises InputError if it is that of another array, whose distance of spots is unknown.
    """
    try:
        spots = sources.read_positions(positions)
    except InputError:  # it is reported where positions are read
        return False
    if spots.attrs["kind"] != "alignment table":
        return False
    array = spots[["array_row", "array_col"]].to_numpy()
    if array.max() <= 36 and not staggered(array):
        return True
    raise InputError(f"{positions} is an ST alignment table, but not of the array of 33 x 35 spots "
                     f"that are {ST_UM} µm apart. Give the distance of neighbouring spots in the "
                     "column pitch")


def read_json(path):
    """Read the row in a JSON file: dict. Raises InputError if it is damaged."""
    try:
        return dict(json.loads(read_text(path)))
    except (OSError, ValueError, TypeError, EOFError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({first_line(error)}). Download it again") from None


def one_of(folder, endings, prefix=""):
    """The one file or folder in `folder` whose name has the first ending that any name has.

    prefix: the text before the ending in the names of the section's other files. A name with a
    different prefix is of another section. Returns a Path, or None if there is no match.
    Raises InputError if several could be meant.
    """
    if not folder.is_dir():
        return None
    names = sorted(path.name for path in folder.iterdir() if path.name[0] != ".")
    for ending in endings:
        matches = [name for name in names if name.endswith(ending)]
        if prefix:
            matches = [name for name in matches if prefix.startswith(name.removesuffix(ending))]
            matches = sorted(matches, key=len)[-1:]
        if len(matches) > 1:
            raise InputError(f"{folder}: {', '.join(matches[:4])} could each be meant. Name the "
                             "file itself")
        if matches:
            return folder / matches[0]
    return None


# -------------------------------------------------------------------------------------------- genes


def share_genes(sections, problems, symbols=()):
    """Give the same ids to sections that name the same genes in different ways.

    problems: a list that is added to. symbols: the Path of a table of gene symbols, as --symbols
    names it, whose symbols count for more than those of the sections; or ().
    Returns (sections, lines that report the changes).
    """
    tables, known = {}, None
    if symbols:
        with collecting(problems, "--symbols"):
            known = sources.read_symbols(symbols)
    for section in sections:
        if section.counts:
            with collecting(problems, section.name):
                table = tables[section.name] = sources.read_genes(section.counts)
                if known is not None:
                    table["symbol"] = known.reindex(table.index).fillna(table["symbol"])
    new_ids, report = agree(tables)
    sections = [replace(section, new_ids=new_ids.get(section.name, {})) for section in sections]
    return sections, report


def agree(tables):
    """New gene ids for sections that would otherwise not share the genes they have in common.

    tables: section -> DataFrame, index gene id, column symbol. Ensembl ids lose their version if
    sections then share more genes. A section with symbols alone gets the ids that the others have
    for them; only symbols that mean the same single gene in all the others are used.
    Returns (section -> {old id: new id}, lines that report the changes).
    """
    report = []
    if len({tuple(table.index) for table in tables.values()}) < 2:
        return {}, report
    ids = {name: table.index.to_series() for name, table in tables.items()}  # new ids by old ids
    by_symbol = [name for name, table in tables.items() if has_symbols_alone(table)]
    by_id = [name for name in tables if name not in by_symbol]

    plain = {name: without_version(ids[name]) for name in by_id}
    before = len(shared(ids[name] for name in by_id))
    after = len(shared(plain.values()))
    if after > before:
        ids |= plain
        report.append(f"the versions of Ensembl ids are left out: {', '.join(by_id)} share "
                      f"{after:,} genes without them, {before:,} with them")

    if by_symbol and by_id:
        id_of = ids_by_symbol(tables, ids, by_id)
        for name in by_symbol:
            found = ids[name].map(id_of)
            found[found.duplicated(keep=False)] = np.nan  # two symbols for one gene
            ids[name] = found.fillna(ids[name])
            if found.notna().any():
                report.append(f"{name} names genes by symbol alone: {found.notna().sum():,} of its "
                              f"{len(found):,} got the ids of {', '.join(by_id)}, through symbols "
                              "that stand for one gene only")
    return {name: changes(series) for name, series in ids.items()}, report


def has_symbols_alone(table):
    """Whether a gene table's index holds symbols instead of ids."""
    if not (table.index == table["symbol"]).all():
        return False
    return table.index.str.fullmatch(ENSEMBL.pattern).mean() < 0.5


def ids_by_symbol(tables, ids, sections):
    """Series of gene ids by symbol, of the symbols that mean one gene in all these sections."""
    pairs = [pd.DataFrame({"symbol": tables[name]["symbol"], "id": ids[name]}) for name in sections]
    pairs = pd.concat(pairs).drop_duplicates()
    return pairs.drop_duplicates("symbol", keep=False).set_index("symbol")["id"]


def changes(ids):
    """The entries of a Series of new ids by old ids in which the two differ: dict."""
    return {old: new for old, new in ids.items() if old != new}


def without_version(ids):
    """Ensembl ids without `.version`, except where a section would then have an id twice."""
    plain = ids.str.replace(rf"^{ENSEMBL.pattern}$", r"\1", regex=True)
    return plain.where(~plain.duplicated(keep=False), ids)


def shared(collections):
    """The set of genes that every one of several collections of ids holds."""
    sets = [set(ids) for ids in collections]
    return set.intersection(*sets) if sets else set()


# ------------------------------------------------------------------------------------------ --check


class Cut(NamedTuple):
    """The settings of a Dataset that say how patches are cut and which spots are used."""

    patch_px: int  # side of a patch
    patch_um: float | None  # what it shows, in microns; None: patch_px pixels of the slide
    min_counts: int  # spots with fewer counts are dropped
    pitch_um: float = Dataset.pitch_um  # of sections that have none of their own


def check(sections, cut, problems):
    """Read everything that preprocessing reads, and write nothing.

    sections: as `read_sheet` returns them. cut: a Cut. problems: a list that is added to.
    Returns (DataFrame of what was found, index section; notes as a list of text).
    """
    rows, notes, identities = [], [], []
    genes = read_all_genes(sections)
    common = shared(genes.values())
    for section in sections:
        row, found = inspect(section, cut, common, problems, notes)
        rows.append(row)
        identities += [found] if found else []
    table = pd.DataFrame(rows).set_index("section")
    same, apart = identity.compare(identities)
    problems += same
    notes += apart
    if genes and not common:
        problems.append(f"{', '.join(genes)}: no gene is in all of them. Check that they are of "
                        "one species, and that their genes have Ensembl ids or symbols")
    elif genes:
        notes.append(f"{len(common):,} genes are in every section")
    widths = table["patch µm"].dropna()
    if cut.patch_um is None and len(widths) and widths.max() > 1.2 * widths.min():
        notes.append(f"a patch shows {widths.min():.0f} µm of {widths.idxmin()} and "
                     f"{widths.max():.0f} µm of {widths.idxmax()}: --patch_um {widths.min():.0f} "
                     "would make them alike")
    size = table["spots"].sum() * cut.patch_px**2 * 3 / 1e9  # GB
    free = shutil.disk_usage(ROOT if ROOT.exists() else Path()).free / 1e9
    notes.append(f"the patches will take {size:,.2f} GB")
    if size > free:
        problems.append(f"the patches need {size:,.0f} GB, but {ROOT} has {free:,.0f} GB free. "
                        "Choose a smaller --patch_px, fewer sections or larger bins")
    return table, notes


def read_all_genes(sections):
    """Section -> the ids of its genes, of the sections whose gene table can be read."""
    genes = {}
    for section in sections:
        with suppress(InputError):  # `inspect` reads the counts too, and reports it
            ids = sources.read_genes(section.counts).index if section.counts else None
            if ids is not None:
                genes[section.name] = ids.map(lambda gene, new=section.new_ids: new.get(gene, gene))
    return genes


def inspect(section, cut, common, problems, notes):
    """One section's row of the table that `check` returns, as a dict, and its Identity or None.

    common: the genes that every section has. problems, notes: lists that are added to.
    """
    name, found = section.name, None
    row = {"section": name, "donor": section.donor, "role": section.role, "spots": np.nan,
           "genes": np.nan, "median counts": np.nan, "mpp": np.nan, "patch µm": np.nan,
           "image": "", "positions": "", "inside": ""}
    counts = spots = adata = picture = None
    if section.counts:
        with collecting(problems, name):
            counts = preprocess.read_counts(section, section.counts)
            row["genes"] = counts.n_vars
            if left_out := counts.uns["no_genes"]:
                notes.append(f"{name}: {left_out} are no genes and are left out")
    if section.positions:
        with collecting(problems, name):
            spots = preprocess.read_spots(section, section.positions)
            row["positions"] = spots.attrs["kind"]
    if counts is not None and spots is not None:
        with collecting(problems, name):
            adata = sources.join(counts, spots, section.counts, section.positions)
    if adata is not None:
        with collecting(problems, name):
            files = {"counts": section.counts, "positions": section.positions}
            preprocess.check_spots(cut.min_counts, section, adata, files)
    if section.image:
        with collecting(problems, name), slide.open_picture(section.image) as picture:
            adata = inspect_picture(section, picture, spots, adata, row)
    if adata is not None:
        total = np.asarray(adata.X.sum(axis=1)).ravel()
        row["spots"] = (total >= cut.min_counts).sum()
        row["median counts"] = round(np.median(total))
        notes += [f"{name}: {note}" for note in adata.uns["left_out"].splitlines()]
        with collecting(problems, name):
            mpp = row["mpp"] = preprocess.section_mpp(section, adata, section.positions,
                                                      cut.pitch_um)
            crop_px = preprocess.crop_size(cut, mpp, picture, adata)
            row["patch µm"] = crop_px * mpp
            stated = picture and picture.stated_mpp
            doubts = preprocess.geometry_notes_of(section, adata, mpp, stated, cut.pitch_um)
            notes += [f"warning: {name}: {doubt}" for doubt in doubts]
            if section.image:
                fingerprints = identity.fingerprints(adata.X, adata.var_names, common)
                found = identity.Identity(name, fingerprints, file_digest(section.image),
                                          adata.obsm["spatial"], crop_px, array_of(adata.obs))
    return row, found


def inspect_picture(section, picture, spots, adata, row):
    """Fill a section's `row` with what its image is, and how many spots lie inside it.

    picture: see `slide.open_picture`. spots, adata: the section's positions, and its spots with
    counts; None if they cannot be read. Returns the spots of adata that have a patch.
    """
    if isinstance(picture, slide.StoredPatches):
        row["image"] = f"patches of {picture.side} px"
    else:
        row["image"] = f"{picture.width} x {picture.height}"
        if spots is not None:
            xy = spots.loc[spots["in_tissue"], ["x", "y"]].to_numpy()
            row["inside"] = f"{len(xy) - slide.outside(picture, xy).sum()} of {len(xy)}"
            check_spots_inside(section, picture, xy)
    if adata is None:
        return None
    n_obs = adata.n_obs
    adata = picture.of(adata)
    row["inside"] = row["inside"] or f"{adata.n_obs} of {n_obs}"
    return adata


def check_spots_inside(section, opened, xy):
    """Raise an InputError if many spots lie outside the slide.

    opened: a Slide. xy: (n_spots, 2) pixels of it. The error names the scale, hires or lowres, with
    which all spots would lie inside, if there is one.
    """
    try:
        slide.leave_outside(opened, xy)
    except InputError as error:
        for word in ("hires", "lowres"):
            try:
                factor = find_scale(word, section.positions, section.image)
            except InputError:
                continue
            if not slide.outside(opened, xy / section.scale * factor).any():
                raise InputError(f"{error}. With {word} in the column scale all would lie "
                                 "inside") from None
        raise


file_digest = cache(sha256)  # of each file once


# ------------------------------------------------------------------------------ what check prints


def report(path, sections, cut, problems, notes):
    """Check sections, and print what was found and every problem.

    path: the sheet, or the folder of the raw files. problems, notes: lines to print; more are found
    here. Raises InputError if there is any problem.
    """
    table, found = check(sections, cut, problems)

    def shown(value):
        return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"

    print(table.to_string(float_format=shown, na_rep="?"))
    for line in [*notes, *found]:
        print(f"- {line}")
    if problems:
        print()
        for number, problem in enumerate(problems, 1):
            print(f"{number}. {problem}")
        raise InputError(f"{path}: {len(problems)} to fix, listed above. Nothing was written")
    warned = any(line.startswith("warning: ") for line in [*notes, *found])
    print("Nothing must be fixed, but read the warnings." if warned else "All is well.",
          "Next: the same command without --check")
