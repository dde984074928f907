"""Raw files -> AnnData: count matrices and spot positions of every kind the datasets come in.

Everything is joined by barcode, genes are keyed by id with symbols beside them, and matrices stay sparse.
Formats: 10x Genomics "Feature-Barcode Matrices" (MEX and HDF5) and "Spatial Outputs" of Space Ranger 1 to 4, Visium
HD's bins among them; legacy ST tables as in STUtility; AnnData as scanpy, squidpy and HEST write it.
"""

import io
import warnings
from contextlib import contextmanager
from glob import glob
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse
from isal import igzip, isal_zlib  # gzip, at two to three times its speed

from .files import InputError, first_line

POSITION_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
ID_COLUMNS = ["gene_ids", "gene_id"]  # names that others give to these columns of an AnnData's gene table
SYMBOL_COLUMNS = ["symbol", "gene_symbols", "gene_symbol", "gene_name", "feature_name"]
DAMAGED = (OSError, EOFError, ValueError, KeyError, OverflowError, isal_zlib.error)


def find(raw, patterns, what):
    """The one file below `raw` that matches the first pattern with a match; the pattern with `.gz` counts too.

    A Path in place of patterns is that very file. Raises InputError if there is none, or if a pattern is ambiguous.
    """
    if isinstance(patterns, Path):
        if not patterns.exists():
            raise InputError(f"{patterns} is missing: the {what}")
        return patterns
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
    return igzip.open(path, "rt", encoding="utf-8-sig") if zipped else open(path, encoding="utf-8-sig")


# ---------------------------------------------------------------------------------------------- counts


def read_counts(path):
    """Read a count matrix of any known kind, told from its name.

    path: `*matrix.mtx` (its barcodes and features lie beside it under the same prefix), `*.h5` or `*.tsv`; `.gz` may
    follow; or `*.h5ad`. Returns AnnData, spots x genes: X counts (CSR int32), obs index barcode, var index gene id,
    var["symbol"]. Raises InputError for a damaged or contradictory file.
    """
    path = Path(path)
    name = path.name.removesuffix(".gz")
    if name.endswith("matrix.mtx"):
        return read_mtx(path)
    if name.endswith(".h5"):
        return read_h5(path)
    if name.endswith(".tsv"):
        return read_st_table(path)
    if name.endswith(".h5ad"):
        return read_h5ad(path)
    raise InputError(f"{path}: not a count matrix of a known kind (…matrix.mtx, ….h5, ….h5ad or ….tsv, .gz or not)")


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
        opener = igzip.open if path.name.endswith(".gz") else open
        with opener(path, "rb") as file, io.BufferedReader(file, 1 << 20) as buffered:
            matrix = scipy.io.mmread(buffered)  # genes x spots; it asks for little at a time
    except DAMAGED as error:
        raise damaged(path, error) from None
    if matrix.shape != (len(features), len(barcodes)):
        raise InputError(f"{path}: {matrix.shape[0]} x {matrix.shape[1]} entries, but {features_path.name} has "
                         f"{len(features)} genes and {barcodes_path.name} {len(barcodes)} barcodes. "
                         "They belong to different sections or one is incomplete: download the three again")
    return build(path, matrix.T, barcodes, *mtx_features(features))


def mtx_features(features):
    """Gene ids, symbols and kinds of features.tsv or genes.tsv; kinds None where it has none."""
    symbols = features[1 if features.shape[1] > 1 else 0].astype(str)
    return features[0].astype(str), symbols, features[2].to_numpy() if features.shape[1] > 2 else None


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
        raise no_10x(path) from None
    kinds = adata.var["feature_types"].to_numpy() if "feature_types" in adata.var else None
    return build(path, adata.X, adata.obs_names, adata.var["gene_ids"], adata.var_names, kinds)


def h5_features(path):
    """Gene ids, symbols and kinds of a 10x HDF5 matrix in either layout, without its counts."""
    try:
        with h5py.File(path) as file:
            if "matrix" in file:
                features = file["matrix/features"]
                columns = [features[name] for name in ("id", "name", "feature_type")]
            else:
                genome, = file.values()
                columns = [genome["genes"], genome["gene_names"]]
            ids, symbols, *kinds = (column.asstr()[:] for column in columns)
    except OSError as error:
        raise damaged(path, error) from None
    except Exception:
        raise no_10x(path) from None
    return ids, symbols, kinds[0] if kinds else None


def no_10x(path):
    return InputError(f"{path} is HDF5, but not a 10x feature-barcode matrix. Give the …feature_bc_matrix.h5 that "
                      "Space Ranger wrote")


def read_h5ad(path):
    """Counts of an AnnData file: layers["counts"] where there is such a layer, otherwise X."""
    with opened_h5ad(path) as file:
        barcodes, var = anndata.io.read_elem(file["obs"]).index, anndata.io.read_elem(file["var"])
        matrix = anndata.io.read_elem(file["layers/counts"] if "counts" in file.get("layers", ()) else file["X"])
    return build(path, matrix, barcodes.astype(str), *h5ad_features(var))


def h5ad_features(var):
    """Gene ids, symbols and kinds of an AnnData's gene table: the index is the id, or the symbol of an id beside it."""
    index = var.index.astype(str)
    ids = next((var[column].astype(str) for column in ID_COLUMNS if column in var), index)
    symbols = next((var[column].astype(str) for column in SYMBOL_COLUMNS if column in var), index)
    return ids, symbols, var["feature_types"].astype(str).to_numpy() if "feature_types" in var else None


@contextmanager
def opened_h5ad(path):
    """An open AnnData file; whatever its reading raises names the file."""
    try:
        with h5py.File(path) as file:
            yield file
    except InputError:
        raise
    except OSError as error:
        raise damaged(path, error) from None
    except Exception as error:  # of many kinds, where a group or a column is not there
        raise InputError(f"{path} is HDF5, but not an AnnData file that can be read ({first_line(error)}). Write it "
                         "again with anndata") from None


def read_st_table(path):
    """A legacy Spatial Transcriptomics table: tab-separated spots x genes, row names `XxY`, header of gene ids."""
    try:
        with open_text(path) as file:
            table = pd.read_csv(file, sep="\t", index_col=0)
        matrix = scipy.sparse.csr_matrix(table.to_numpy(dtype=np.float64))
    except DAMAGED as error:
        raise damaged(path, error) from None
    genes = st_genes(path)  # pandas renames a repeated column, and so hides it
    return build(path, matrix, table.index.astype(str), genes, genes)


def st_genes(path):
    """The gene ids in the first line of an ST table."""
    with open_text(path) as file:
        header, row = ([cell.strip('"') for cell in file.readline().rstrip("\n").split("\t")] for _ in range(2))
    return header[len(header) - (len(row) - 1):]  # the corner above the row names is optional


def read_genes(path):
    """The genes of a count matrix, without its counts: DataFrame, index gene id, symbol; as in `read_counts`."""
    path = Path(path)
    name = path.name.removesuffix(".gz")
    if name.endswith("matrix.mtx"):
        return gene_table(*mtx_features(read_table(files_of(path)[2])))
    if name.endswith(".h5"):
        return gene_table(*h5_features(path))
    if name.endswith(".h5ad"):
        with opened_h5ad(path) as file:
            return gene_table(*h5ad_features(anndata.io.read_elem(file["var"])))
    if name.endswith(".tsv"):
        try:
            genes = st_genes(path)
        except DAMAGED as error:
            raise damaged(path, error) from None
        return gene_table(genes, genes)
    return read_counts(path).var


def build(path, matrix, barcodes, gene_ids, symbols, kinds=None):
    """AnnData (X: CSR int32) from a spots x genes matrix of counts and its names, gene-expression features only.

    Raises InputError for values that are not counts, for repeated names, and where nothing is left.
    """
    if not scipy.sparse.issparse(matrix):
        matrix = scipy.sparse.csr_matrix(matrix)
    matrix.data = whole_counts(path, matrix.data)  # the smaller values first, that fewer are copied
    matrix = matrix.tocsr()
    obs = pd.DataFrame(index=pd.Index(barcodes, name="barcode"))
    var = gene_table(gene_ids, symbols, kinds)
    if kinds is not None and (kinds != "Gene Expression").any():
        matrix = matrix[:, kinds == "Gene Expression"]
    if 0 in matrix.shape:
        raise InputError(f"{path}: holds {matrix.shape[0]} spots x {matrix.shape[1]} genes of gene expression. "
                         "Download it again")
    for what, names in (("barcode", obs.index), ("gene id", var.index)):
        if not names.is_unique:
            twice = names[names.duplicated()][0]
            raise InputError(f"{path}: {what} {twice} occurs more than once; each must be unique. "
                             "Download the matrix again or mend its table")
    return anndata.AnnData(matrix, obs=obs, var=var)


def whole_counts(path, values):
    """Values of a count matrix as int32. Raises InputError where one is not a count."""
    whole = np.issubdtype(values.dtype, np.integer)  # most are, and need no further look
    if not whole and np.isnan(values).any():
        raise InputError(f"{path}: some of its values are empty. Download it again")
    if values.size and (values.min() < 0 or values.max() > np.iinfo(np.int32).max
                        or not (whole or (values == np.rint(values)).all())):
        where = ', in layers["counts"] or X' if path.suffix == ".h5ad" else ""
        raise InputError(f"{path}: holds values that are not counts (whole numbers from 0). Give the raw counts{where}"
                         ", not normalised expression")
    return values.astype(np.int32, copy=False)


def gene_table(gene_ids, symbols, kinds=None):
    """Symbols by gene id, of gene-expression features only."""
    var = pd.DataFrame({"symbol": np.asarray(symbols)}, index=pd.Index(gene_ids, name="gene_id"))
    return var if kinds is None else var[kinds == "Gene Expression"]


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

    Space Ranger's with or without header or as parquet, STUtility's alignment tables, and AnnData. Returns a DataFrame
    by barcode: in_tissue (bool), array_row, array_col (int; absent where an AnnData has none), x, y (float,
    full-resolution pixels: image column and row); attrs["kind"], the version in words.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"\x89HDF":
            return read_h5ad_positions(path)
        if magic == b"PAR1":
            return space_ranger_positions(path, read_parquet(path), "parquet")
        with open_text(path) as file:
            first = file.readline()
            file.seek(0)
            if "pixel_x" in first.split():
                table = pd.read_csv(file, sep="\t")
                return positions(path, "alignment table", table["x"].astype(str) + "x" + table["y"].astype(str),
                                 table["selected"], table["y"], table["x"], table["pixel_x"], table["pixel_y"])
            if not first:
                raise InputError(f"{path} is empty. Download it again")
            headed = not any(letter.isdigit() for letter in first)  # Space Ranger's own rule
            if first.count(",") != 5:
                raise InputError(f"{path}: not a position file: its first line has {first.count(',') + 1} columns, "
                                 f"expected the six of Space Ranger ({', '.join(POSITION_COLUMNS)}). "
                                 "Download it again")
            table = pd.read_csv(file, header=0 if headed else None, names=None if headed else POSITION_COLUMNS)
            return space_ranger_positions(path, table, "csv with header" if headed else "csv, no header")
    except DAMAGED as error:
        raise damaged(path, error) from None


def space_ranger_positions(path, table, kind):
    """The position table from Space Ranger's columns, by their names."""
    if absent := set(POSITION_COLUMNS) - set(table.columns):
        raise InputError(f"{path}: its header lacks {', '.join(sorted(absent))}; expected the columns of Space "
                         f"Ranger ({', '.join(POSITION_COLUMNS)})")
    return positions(path, kind, *(table[column] for column in (
        "barcode", "in_tissue", "array_row", "array_col", "pxl_col_in_fullres", "pxl_row_in_fullres")))


def read_parquet(path):
    """A parquet table, as Space Ranger writes the positions of Visium HD's bins."""
    try:
        return pd.read_parquet(path)
    except ImportError:
        raise InputError(f"{path} is parquet, which needs pyarrow: pip install pyarrow, or install this project with "
                         "its extra hd") from None
    except Exception as error:  # pyarrow's own kinds
        raise damaged(path, error) from None


def read_h5ad_positions(path):
    """Positions of an AnnData file: obsm["spatial"], or HEST's columns of obs; without in_tissue all are under it."""
    with opened_h5ad(path) as file:
        obs = anndata.io.read_elem(file["obs"])
        if "spatial" in file.get("obsm", ()):
            xy = np.asarray(anndata.io.read_elem(file["obsm/spatial"]), np.float64)[:, :2]
        elif {"pxl_col_in_fullres", "pxl_row_in_fullres"} <= set(obs):
            xy = obs[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(np.float64)
        else:
            raise InputError(f'{path}: has neither obsm["spatial"] nor pxl_col_in_fullres and pxl_row_in_fullres in '
                             "obs. Name a position file beside it")
    if "in_tissue" in obs:
        in_tissue = obs["in_tissue"].astype(str).isin(["1", "1.0", "True"])  # numbers, truth values or categories
    else:
        in_tissue = pd.Series(1, obs.index)
    array = {"array_row", "array_col"} <= set(obs)
    return positions(path, "h5ad" if array else "h5ad, no array", obs.index, in_tissue,
                     obs["array_row"] if array else None, obs["array_col"] if array else None, *map(pd.Series, xy.T))


def positions(path, kind, barcode, in_tissue, array_row, array_col, x, y):
    """The position table from its columns; array_row and array_col may be None."""
    numbers = {"in_tissue": in_tissue, "array_row": array_row, "array_col": array_col, "x": x, "y": y}
    numbers = {name: column for name, column in numbers.items() if column is not None}
    table = pd.DataFrame({name: column.to_numpy(dtype=np.float64) for name, column in numbers.items()},
                         index=pd.Index(barcode.astype(str), name="barcode"))
    if not table.index.is_unique:
        twice = table.index[table.index.duplicated()][0]
        raise InputError(f"{path}: barcode {twice} occurs more than once. Download it again")
    if not (complete := np.isfinite(table.to_numpy()).all(axis=1)).all():
        raise InputError(f"{path}: the line of {table.index[~complete][0]} is incomplete. Download it again")
    table = table.assign(in_tissue=table["in_tissue"] == 1).astype(
        {name: np.int64 for name in ("array_row", "array_col") if name in table})
    table.attrs["kind"] = kind
    return table


def join(counts, spots, counts_path, positions_path):
    """Counts and positions of the spots under tissue, joined by barcode, in the matrix's order.

    Returns AnnData: X counts, obs in_tissue, array_row, array_col, obsm["spatial"] = (x, y) in full-resolution pixels.
    Raises InputError unless every spot under tissue is in the matrix: otherwise the two files are not of one section.
    An AnnData, from which people drop poor spots, and Visium HD, of which some bins hold nothing, may lack some.
    """
    under_tissue = spots.index[spots["in_tissue"]]
    if not len(under_tissue):
        raise InputError(f"{positions_path}: no spot is under tissue (in_tissue == 1 nowhere). Check that this is the "
                         "section's own position file")
    absent = under_tissue.difference(counts.obs_names)
    may_lack = Path(counts_path).suffix == ".h5ad" or spots.attrs.get("kind") == "parquet"
    if len(absent) == len(under_tissue) or (len(absent) and not may_lack):
        raise InputError(f"{counts_path} lacks {len(absent)} of the {len(under_tissue)} spots that {positions_path} "
                         f"has under tissue, {absent[0]} for one; its own begin {', '.join(counts.obs_names[:2])}. "
                         "They belong to different sections, or the matrix is incomplete")
    kept = counts.obs_names.isin(under_tissue)
    adata = counts if kept.all() else counts[kept].copy()
    spots = spots.loc[adata.obs_names]
    columns = [column for column in ("in_tissue", "array_row", "array_col") if column in spots]
    adata.obs[columns] = spots[columns]
    adata.obsm["spatial"] = spots[["x", "y"]].to_numpy()
    return adata


def damaged(path, error):
    """The error for a file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} is missing")
    return InputError(f"{path} is damaged or incomplete ({first_line(error)}). Download it again")
