"""Raw files -> AnnData: count matrices and spot positions of every kind the datasets come in.

Everything is joined by barcode, genes are keyed by id with symbols beside them, and matrices stay sparse.
Formats: 10x Genomics "Feature-Barcode Matrices" (MEX and HDF5) and "Spatial Outputs"; legacy ST tables as in STUtility.
"""

import gzip
import io
import warnings
import zlib
from glob import glob
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse

from .dataset import first_line
from .files import InputError

POSITION_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
DAMAGED = (OSError, EOFError, ValueError, KeyError, OverflowError, zlib.error)


def find(raw, patterns, what):
    """The one file below `raw` that matches the first pattern with a match; the pattern with `.gz` counts too.

    Raises InputError if there is none, or if a pattern is ambiguous.
    """
    raw = Path(raw)
    if not raw.is_dir():
        raise InputError(f"{raw} is not a folder. Put the raw files there (README, 'The datasets') or name their "
                         "folder with --raw")
    for pattern in patterns:
        for suffix in ("", ".gz"):
            matches = sorted({match for match in glob(pattern + suffix, root_dir=raw, recursive=True)
                              if not (raw / match).is_dir()})
            if len(matches) > 1:
                raise InputError(f"{raw}: {len(matches)} files match {pattern + suffix} for the {what}: "
                                 f"{', '.join(matches[:4])}. Keep one of them there")
            if matches:
                return raw / matches[0]
    raise InputError(f"{raw}: no {what} found; looked for {' and '.join(patterns)}, plain or .gz. Put it there "
                     "(README, 'The datasets') or name the raw folder with --raw")


def open_text(path):
    """Open a text file, gzipped or not, by its content."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt") if zipped else open(path)


# ---------------------------------------------------------------------------------------------- counts


def read_counts(path):
    """Read a count matrix of any known kind, told from its name.

    path: `*matrix.mtx` (its barcodes and features lie beside it under the same prefix), `*.h5` or `*.tsv`; `.gz` may
    follow. Returns AnnData, spots x genes: X counts (CSR int32), obs index barcode, var index gene id,
    var["symbol"]. Raises InputError for a damaged or contradictory file.
    """
    path = Path(path)
    name = path.name.removesuffix(".gz")
    if name.endswith("matrix.mtx"):
        adata = read_mtx(path)
    elif name.endswith(".h5"):
        adata = read_h5(path)
    elif name.endswith(".tsv"):
        adata = read_st_table(path)
    else:
        raise InputError(f"{path}: not a count matrix of a known kind (…matrix.mtx, ….h5 or ….tsv, .gz or not)")
    counts = adata.X.data
    if np.isnan(counts).any():
        raise InputError(f"{path}: some of its values are empty. Download it again")
    if counts.size and (counts.min() < 0 or counts.max() > np.iinfo(np.int32).max or (counts != np.rint(counts)).any()):
        raise InputError(f"{path}: holds values that are not counts (whole numbers from 0). Give the raw counts, "
                         "not normalised expression")
    adata.X = adata.X.astype(np.int32)
    return adata


def files_of(path):
    """The files that `read_counts` reads for a matrix: itself, and its barcodes and features if they lie beside it."""
    path = Path(path)
    name = path.name.removesuffix(".gz")
    if not name.endswith("matrix.mtx"):
        return [path]
    prefix = name.removesuffix("matrix.mtx")
    return [path, beside(path, prefix, "barcodes.tsv"), beside(path, prefix, "features.tsv", "genes.tsv")]


def read_mtx(path):
    """The 10x trio matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv), plain or gzipped, with any prefix."""
    _, barcodes_path, features_path = files_of(path)
    barcodes = read_table(barcodes_path)[0].astype(str)
    features = read_table(features_path)
    try:
        opener = gzip.open if path.name.endswith(".gz") else open
        with opener(path, "rb") as file, io.BufferedReader(file, 1 << 20) as buffered:
            matrix = scipy.io.mmread(buffered)  # genes x spots; it asks for little at a time
    except DAMAGED as error:
        raise damaged(path, error) from None
    if matrix.shape != (len(features), len(barcodes)):
        raise InputError(f"{path}: {matrix.shape[0]} x {matrix.shape[1]} entries, but {features_path.name} has "
                         f"{len(features)} genes and {barcodes_path.name} {len(barcodes)} barcodes. "
                         "They belong to different sections or one is incomplete: download the three again")
    symbols = features[1 if features.shape[1] > 1 else 0].astype(str)
    kinds = features[2].to_numpy() if features.shape[1] > 2 else None
    return build(path, matrix.T, barcodes, features[0].astype(str), symbols, kinds)


def beside(path, prefix, *names):
    """The file of one of these names next to the matrix, plain or gzipped."""
    for name in names:
        for suffix in ("", ".gz"):
            if (candidate := path.with_name(prefix + name + suffix)).exists():
                return candidate
    raise InputError(f"{path.with_name(prefix + names[0])} is missing; it must lie beside {path.name}, plain or .gz")


def read_table(path):
    """A headerless tab-separated text table."""
    try:
        with open_text(path) as file:
            return pd.read_csv(file, sep="\t", header=None, dtype=str, keep_default_na=False)
    except DAMAGED as error:
        raise damaged(path, error) from None


def read_h5(path):
    """A 10x feature-barcode matrix in HDF5; read by scanpy."""
    import scanpy

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(Variable|Observation) names are not unique")  # `build` looks at ids
            adata = scanpy.read_10x_h5(path)
    except OSError as error:
        raise damaged(path, error) from None
    except Exception:  # of many kinds, where a group or a column is not there
        raise InputError(f"{path} is HDF5, but not a 10x feature-barcode matrix. Give the …feature_bc_matrix.h5 that "
                         "Space Ranger wrote") from None
    kinds = adata.var["feature_types"].to_numpy() if "feature_types" in adata.var else None
    return build(path, adata.X, adata.obs_names, adata.var["gene_ids"], adata.var_names, kinds)


def read_st_table(path):
    """A legacy Spatial Transcriptomics table: tab-separated spots x genes, row names `XxY`, header of gene ids."""
    try:
        with open_text(path) as file:
            table = pd.read_csv(file, sep="\t", index_col=0)
        matrix = scipy.sparse.csr_matrix(table.to_numpy(dtype=np.float64))
    except DAMAGED as error:
        raise damaged(path, error) from None
    with open_text(path) as file:  # pandas renames a repeated column, and so hides it
        genes = [gene.strip('"') for gene in file.readline().rstrip("\n").split("\t")]
    genes = genes[len(genes) - table.shape[1]:]  # the corner above the row names is optional
    return build(path, matrix, table.index.astype(str), genes, genes)


def build(path, matrix, barcodes, gene_ids, symbols, kinds=None):
    """AnnData from a spots x genes matrix and its names, gene-expression features only."""
    matrix = scipy.sparse.csr_matrix(matrix)
    obs = pd.DataFrame(index=pd.Index(barcodes, name="barcode"))
    var = pd.DataFrame({"symbol": np.asarray(symbols)}, index=pd.Index(gene_ids, name="gene_id"))
    if kinds is not None and (kinds != "Gene Expression").any():
        matrix, var = matrix[:, kinds == "Gene Expression"], var[kinds == "Gene Expression"]
    if 0 in matrix.shape:
        raise InputError(f"{path}: holds {matrix.shape[0]} spots x {matrix.shape[1]} genes of gene expression. "
                         "Download it again")
    for what, names in (("barcode", obs.index), ("gene id", var.index)):
        if not names.is_unique:
            twice = names[names.duplicated()][0]
            raise InputError(f"{path}: {what} {twice} occurs more than once; each must be unique. "
                             "Download the matrix again or mend its table")
    return anndata.AnnData(matrix, obs=obs, var=var)


def read_symbols(path):
    """Gene symbols by id, from a table with the columns gene_id and gene_name."""
    try:
        with open_text(path) as file:
            table = pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False)
    except DAMAGED as error:
        raise damaged(path, error) from None
    if not {"gene_id", "gene_name"} <= set(table.columns):
        raise InputError(f"{path}: not a table of gene symbols: its first line lacks gene_id or gene_name")
    table = table.drop_duplicates(["gene_id", "gene_name"]).set_index("gene_id")
    if not table.index.is_unique:
        twice = table.index[table.index.duplicated()][0]
        raise InputError(f"{path}: gene id {twice} occurs more than once, with different symbols. Keep one of them")
    return table["gene_name"]


# ---------------------------------------------------------------------------------------------- positions


def read_positions(path):
    """Spot positions of any known version, told from the content, not from the name.

    Space Ranger's with or without header, and STUtility's alignment tables. Returns a DataFrame by barcode:
    in_tissue (bool), array_row, array_col (int), x, y (float, full-resolution pixels: image column and row).
    """
    path = Path(path)
    try:
        with open_text(path) as file:
            first = file.readline()
            file.seek(0)
            if "pixel_x" in first.split():
                table = pd.read_csv(file, sep="\t")
                return positions(path, table["x"].astype(str) + "x" + table["y"].astype(str), table["selected"],
                                 table["y"], table["x"], table["pixel_x"], table["pixel_y"])
            if not first:
                raise InputError(f"{path} is empty. Download it again")
            headed = first.split(",")[0].strip('"') == "barcode"
            if first.count(",") != 5:
                raise InputError(f"{path}: not a position file: its first line has {first.count(',') + 1} columns, "
                                 f"expected the six of Space Ranger ({', '.join(POSITION_COLUMNS)}). "
                                 "Download it again")
            table = pd.read_csv(file, header=0 if headed else None, names=None if headed else POSITION_COLUMNS)
            if absent := set(POSITION_COLUMNS) - set(table.columns):
                raise InputError(f"{path}: its header lacks {', '.join(sorted(absent))}; expected the columns of Space "
                                 f"Ranger ({', '.join(POSITION_COLUMNS)})")
            return positions(path, *(table[column] for column in (
                "barcode", "in_tissue", "array_row", "array_col", "pxl_col_in_fullres", "pxl_row_in_fullres")))
    except DAMAGED as error:
        raise damaged(path, error) from None


def positions(path, barcode, in_tissue, array_row, array_col, x, y):
    """The position table from its columns."""
    numbers = {"in_tissue": in_tissue, "array_row": array_row, "array_col": array_col, "x": x, "y": y}
    table = pd.DataFrame({name: column.to_numpy(dtype=np.float64) for name, column in numbers.items()},
                         index=pd.Index(barcode.astype(str), name="barcode"))
    if not table.index.is_unique:
        twice = table.index[table.index.duplicated()][0]
        raise InputError(f"{path}: barcode {twice} occurs more than once. Download it again")
    if not (complete := np.isfinite(table.to_numpy()).all(axis=1)).all():
        raise InputError(f"{path}: the line of {table.index[~complete][0]} is incomplete. Download it again")
    return table.assign(in_tissue=table["in_tissue"] == 1).astype({"array_row": np.int64, "array_col": np.int64})


def lattice_pitch(spots):
    """Distance of neighbouring spots in pixels, from a least-squares fit of the lattice.

    spots: array_row, array_col, x, y. On a staggered lattice (array_row + array_col is always even: Visium, later
    Spatial Transcriptomics arrays) neighbours lie two steps along a row or column, or diagonally; else one step
    along. The mean over the directions in which they are nearest, to 10 %.
    Raises ValueError if the spots lie on a line.
    """
    lattice = np.column_stack([spots["array_row"], spots["array_col"], np.ones(len(spots))])
    (row, col, _), _, rank, _ = np.linalg.lstsq(lattice, spots[["x", "y"]].to_numpy(), rcond=None)
    if rank < 3:
        raise ValueError("the spots lie on a line, or are too few, to tell their pitch")
    along_row, along_col = np.linalg.norm(col), np.linalg.norm(row)
    if ((spots["array_row"] + spots["array_col"]) % 2 == 0).all():
        diagonal = (np.linalg.norm(row + col) + np.linalg.norm(row - col)) / 2
        distances = np.array([2 * along_row, 2 * along_col, diagonal])
    else:
        distances = np.array([along_row, along_col])
    return float(distances[distances < 1.1 * distances.min()].mean())


def join(counts, spots, counts_path, positions_path):
    """Counts and positions of the spots under tissue, joined by barcode, in the matrix's order.

    Returns AnnData: X counts, obs in_tissue, array_row, array_col, obsm["spatial"] = (x, y) in full-resolution pixels.
    Raises InputError unless every spot under tissue is in the matrix: otherwise the two files are not of one section.
    """
    under_tissue = spots.index[spots["in_tissue"]]
    if not len(under_tissue):
        raise InputError(f"{positions_path}: no spot is under tissue (in_tissue == 1 nowhere). Check that this is the "
                         "section's own position file")
    absent = under_tissue.difference(counts.obs_names)
    if len(absent):
        raise InputError(f"{counts_path} lacks {len(absent)} of the {len(under_tissue)} spots that {positions_path} "
                         f"has under tissue, {absent[0]} for one; its own begin {', '.join(counts.obs_names[:2])}. "
                         "They belong to different sections, or the matrix is incomplete")
    adata = counts[counts.obs_names.isin(under_tissue)].copy()
    spots = spots.loc[adata.obs_names]
    adata.obs[["in_tissue", "array_row", "array_col"]] = spots[["in_tissue", "array_row", "array_col"]]
    adata.obsm["spatial"] = spots[["x", "y"]].to_numpy()
    return adata


def damaged(path, error):
    """The error for a file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} is missing")
    return InputError(f"{path} is damaged or incomplete ({first_line(error)}). Download it again")
