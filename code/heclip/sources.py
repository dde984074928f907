"""Raw files -> AnnData: read the count matrices and spot positions that the datasets come with.

Counts and positions are joined by barcode. Genes are indexed by id and have a column of symbols.
Matrices stay sparse. Formats: 10x Genomics "Feature-Barcode Matrices" (MEX and HDF5) and "Spatial
Outputs" of Space Ranger 1 to 4, including the bins of Visium HD; legacy ST tables as in STUtility;
AnnData as scanpy, squidpy and HEST write it.
"""

import io
import re
import warnings
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse
from isal import isal_zlib

from .files import InputError, first_line
from .limits import LINE, check_indices, open_bytes, open_hdf5, open_text, read_text, text_room
from .missing import add_note, leave_out
from .part import selected
from .spots import array_of

POSITION_COLUMNS = [
    "barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
AS_TEXT = {"barcode": str}  # also those that look like a number, or like a missing value
# Names that these columns have in the gene tables of AnnData files.
ID_COLUMNS = ["gene_ids", "gene_id"]
SYMBOL_COLUMNS = ["symbol", "gene_symbols", "gene_symbol", "gene_name", "feature_name"]
# Feature types that mean gene expression, in small letters. Empty: a table that does not say.
GENE_KINDS = {"gene expression", "gene", "genes", "rna", "mrna", "gex", "expression", "", "nan",
              "none", "na"}
# Names of features that are no genes, whatever their type: controls, blanks, codewords that stand
# for no gene, spiked-in RNA, and what counters of reads call "__no_feature" and "__ambiguous".
NO_GENE = re.compile(
    r"(neg(ative)?[ _-]?(control|ctrl|prb|probe)|negative\d+$|system[ _-]?control|falsecode|"
    r"blank[ _-]?(codeword|\d)|(unassigned|deprecated)[ _-]?codeword|deprecated_|antisense_|"
    r"intergenic[ _-]region|ercc-\d|__)", re.IGNORECASE)
# Names of x and y, where a table of positions names them.
NAMED_XY = [("pxl_col_in_fullres", "pxl_row_in_fullres"), ("imagecol", "imagerow"), ("x", "y")]
LARGEST_ARRAY = 10**6  # rows or columns; those of Visium HD are some thousands
ST_LINE = 16 << 20  # characters of an ST table's first line, which names the genes
IN_TISSUE = {"1", "1.0", "true", "t", "yes", "in"}
OFF_TISSUE = {"0", "0.0", "false", "f", "no", "out"}
RAW_SHARE = 0.95  # of the spots on glass: a raw matrix has more, a filtered one none
# The errors that readers raise for a file that is damaged or incomplete.
DAMAGED = (OSError, EOFError, ValueError, OverflowError, isal_zlib.error)


def find(raw, patterns, what):
    """The one file below `raw` that matches the first pattern with a match, plain or `.gz`.

    raw: a folder. patterns: glob patterns relative to it, the preferred one first; or a Path, which
    is returned as it is. what: the name of the file in error messages.
    Returns a Path. Raises InputError if there is no such file, or if a pattern matches several.
    """
    if isinstance(patterns, Path):
        if not patterns.exists():
            raise InputError(f"{patterns} is missing: the {what}")
        return patterns
    raw = Path(raw)
    if not raw.is_dir():
        raise InputError(f"{raw} is not a folder. Put the raw files there (README, 'The datasets') "
                         "or name their folder with --raw")
    for pattern in patterns:
        for suffix in ("", ".gz"):
            names = set(glob(pattern + suffix, root_dir=raw, recursive=True))
            matches = sorted(name for name in names if not (raw / name).is_dir())
            if len(matches) > 1:
                raise InputError(f"{raw}: {len(matches)} files match {pattern + suffix} for the "
                                 f"{what}: {', '.join(matches[:4])}. Keep one of them there")
            if matches:
                return raw / matches[0]
    raise InputError(f"{raw}: no {what} found; looked for {' and '.join(patterns)}, plain or .gz. "
                     "Put it there (README, 'The datasets') or name the raw folder with --raw")


# ------------------------------------------------------------------------------------------- counts


def read_counts(path, part=()):
    """Read a count matrix of any known kind. The kind is determined from the file's name.

    path: `*matrix.mtx` (its barcodes and features lie next to it under the same prefix), `*.h5` or
    `*.tsv`, each plain or `.gz`; or `*.h5ad`. part: conditions on the obs of an AnnData file.
    Returns AnnData, spots x genes: X counts (CSR int32), obs index barcode, var index gene id,
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
        return read_h5ad(path, part)
    raise InputError(f"{path}: not a count matrix of a known kind (…matrix.mtx, ….h5, ….h5ad or "
                     "….tsv, .gz or not)")


def files_of(path):
    """The files that `read_counts` reads for a matrix: itself, and for mtx its two tables.

    Raises InputError if barcodes or features are missing.
    """
    path = Path(path)
    name = path.name.removesuffix(".gz")
    if not name.endswith("matrix.mtx"):
        return [path]
    prefix = name.removesuffix("matrix.mtx")
    barcodes = next_to(path, prefix, "barcodes.tsv")
    return [path, barcodes, next_to(path, prefix, "features.tsv", "genes.tsv")]


def read_mtx(path):
    """Read the 10x trio: matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv)."""
    _, barcodes_path, features_path = files_of(path)
    barcodes = read_table(barcodes_path)[0].astype(str)
    features = read_table(features_path)
    try:
        with open_bytes(path) as file:
            n_genes, n_spots, *n_entries = mtx_sizes(file)
            trio = (features_path, features[0], barcodes_path, barcodes)
            check_trio(path, (n_genes, n_spots), *trio)
            check_entries(path, *(n_entries or [n_genes * n_spots]))
            file.seek(0)
            matrix = scipy.io.mmread(MatrixText(file))  # genes x spots
    except (*DAMAGED, RuntimeError) as error:
        raise damaged(path, error) from None
    return build(path, matrix.T, barcodes, *mtx_features(features))


class MatrixText(NamedTuple):
    """An open mtx as scipy can read it, even if it is damaged.

    It has no `seek` and `tell`, because scipy ends the process if one of them fails. It gives no
    zero byte, because scipy reads on behind one, in memory that is not the file's.
    """

    file: io.BufferedReader

    def read(self, size):
        """The next bytes. Raises ValueError if one of them is zero."""
        block = self.file.read(size)
        if b"\0" in block:
            raise ValueError("it holds bytes that are no text")
        return block


def mtx_sizes(file):
    """The sizes that an open mtx declares: genes, spots, and entries unless it is dense."""
    line = file.readline(LINE)
    banner = line.lower().split()
    if banner[:2] != [b"%%matrixmarket", b"matrix"] or len(banner) != 5:
        raise ValueError("it does not begin with %%MatrixMarket matrix")
    n_sizes = 2 if banner[2] == b"array" else 3
    while line.startswith(b"%") or line.isspace():
        line = file.readline(LINE)
    sizes = [int(size) for size in line.split()]
    if len(sizes) != n_sizes or min(sizes) < 0:
        raise ValueError(f"its sizes are {sizes}")
    return sizes


def check_entries(path, n_entries):
    """Raise ValueError if a text matrix promises more entries than it has room for."""
    if 2 * n_entries > text_room(path):  # an entry has at least a digit and a line end
        raise ValueError(f"it promises {n_entries:,} entries, which its {path.stat().st_size:,} "
                         "bytes cannot hold")


def check_trio(path, shape, features_path, genes, barcodes_path, barcodes):
    """Raise InputError if a matrix is not genes x barcodes of the tables next to it."""
    expected = len(genes), len(barcodes)
    if shape == expected:
        return
    if shape == expected[::-1]:
        raise InputError(f"{path} is spots x genes. 10x Genomics' matrix is genes x spots: write "
                         "its transpose")
    for table, names, n in ((features_path, genes, shape[0]), (barcodes_path, barcodes, shape[1])):
        if len(names) == n + 1:
            raise InputError(f"{table} has {len(names)} lines for {n} in the matrix. If the first, "
                             f"{names.iloc[0]!r}, is a header, remove it")
    raise InputError(f"{path}: {shape[0]} x {shape[1]} entries, but {features_path.name} has "
                     f"{expected[0]} genes and {barcodes_path.name} {expected[1]} barcodes. They "
                     "belong to different sections or one is incomplete: download the three again")


def mtx_features(features):
    """Gene ids, symbols and kinds of features.tsv or genes.tsv; kinds is None if it has none."""
    n_columns = features.shape[1]
    symbols = features[1 if n_columns > 1 else 0].astype(str)
    kinds = features[2].to_numpy() if n_columns > 2 else None
    return features[0].astype(str), symbols, kinds


def next_to(path, prefix, *names):
    """The file next to the matrix that has one of these names, plain or gzipped."""
    for name in names:
        for suffix in ("", ".gz"):
            if (candidate := path.with_name(prefix + name + suffix)).exists():
                return candidate
    raise InputError(f"{path.with_name(prefix + names[0])} is missing; it must lie next to "
                     f"{path.name}, plain or .gz")


def read_table(path):
    """Read a tab-separated text table that has no header."""
    try:
        with open_text(path) as file:
            return pd.read_csv(file, sep="\t", header=None, dtype=str, keep_default_na=False)
    except DAMAGED as error:
        raise damaged(path, error) from None


def read_h5(path):
    """Read a 10x feature-barcode matrix in HDF5. The counts of several genomes are put together."""
    with opened_h5(path) as groups:
        barcodes = [group["barcodes"].asstr()[:] for group in groups]
        if any(not np.array_equal(barcodes[0], other) for other in barcodes[1:]):
            raise InputError(f"{path} holds {len(groups)} genomes with different barcodes. Give "
                             "the matrix of one genome")
        matrices = []
        for group in groups:
            arrays = tuple(group[name][:] for name in ("data", "indices", "indptr"))
            n_genes, n_spots = group["shape"][:]
            matrices.append(scipy.sparse.csr_matrix(arrays, (n_spots, n_genes)))
        matrix = matrices[0] if len(matrices) == 1 else scipy.sparse.hstack(matrices, "csr")
        features = h5_features(groups)
    return build(path, matrix, barcodes[0], *features)


def h5_features(groups):
    """Gene ids, symbols and kinds of the groups of a 10x HDF5 matrix; kinds is None if absent."""
    tables = []
    for group in groups:
        features = group.get("features", group)
        names = ("id", "name") if "features" in group else ("genes", "gene_names")
        table = {name: features[name].asstr()[:] for name in names}
        if "feature_type" in features:
            table["kinds"] = features["feature_type"].asstr()[:]
        tables.append(list(table.values()))
    ids, symbols, *kinds = (np.concatenate(columns) for columns in zip(*tables, strict=True))
    return ids, symbols, kinds[0] if kinds else None


@contextmanager
def opened_h5(path):
    """Open a 10x HDF5 matrix: its groups, one of version 3, or one per genome of older versions.

    Any error while it is read becomes one that names the file.
    """
    try:
        with open_hdf5(path) as file:
            yield [file["matrix"]] if "matrix" in file else list(file.values())
    except InputError:
        raise
    except OSError as error:
        raise damaged(path, error) from None
    except Exception:  # a missing group or column raises errors of many kinds
        raise not_10x(path) from None


def not_10x(path):
    """The error for an HDF5 file that is not a 10x matrix."""
    return InputError(f"{path} is HDF5, but not a 10x feature-barcode matrix. Give the "
                      "…feature_bc_matrix.h5 that Space Ranger wrote")


def read_h5ad(path, part=()):
    """Read the counts of an AnnData file: layers["counts"], X or raw.X (see `counts_of_h5ad`).

    part: conditions on obs, see `read_obs`.
    """
    with opened_h5ad(path) as file:
        obs, rows = read_obs(path, file, part)
        matrix, var = counts_of_h5ad(path, file)
        matrix, var = anndata.io.read_elem(matrix), anndata.io.read_elem(var)
    if not rows.all():
        matrix = matrix[rows]
    return build(path, matrix, obs.index.astype(str), *h5ad_features(var))


def read_obs(path, file, part):
    """The obs of one section in an open AnnData file, and which rows it has there: bool (n,).

    part: conditions on obs. Raises InputError if the rows are of several of the libraries that
    uns["spatial"] lists, because each is a section of its own.
    """
    obs = anndata.io.read_elem(file["obs"])
    rows = selected(obs, part, path)
    obs = obs[rows]
    names_of_libraries = set(libraries(file))
    for column in obs.columns if len(names_of_libraries) > 1 else ():
        names = list(dict.fromkeys(obs[column].dropna().astype(str)))
        if len(names) > 1 and names_of_libraries.issuperset(names):
            raise InputError(f"{path} holds several sections, {column} {', '.join(names)}. Give "
                             f"each its own line, with {column}={names[0]} in the column part")
    return obs, rows


def counts_of_h5ad(path, file):
    """Where the counts of an open AnnData file are, and their gene table: two HDF5 objects.

    They are layers["counts"] if there is such a layer. Otherwise they are X, or raw.X if only that
    holds whole numbers. Raises InputError if there is neither.
    """
    var = file["var"]  # an error if there is none, because then the file is no AnnData
    layers = list(file.get("layers", ()))
    if "counts" in layers:
        return file["layers/counts"], var
    tops = [file, *(file[name] for name in ("raw",) if isinstance(file.get(name), h5py.Group))]
    places = [(top["X"], top["var"]) for top in tops
              if "X" in top and top["X"].attrs.get("encoding-type") != "null"]
    if not places:
        others = f"Its layers are {', '.join(layers)}" if layers else "It has no layers either"
        raise InputError(f'{path} has no X. {others}. Store the raw counts as X or as '
                         'layers["counts"]')
    return next((place for place in places if starts_whole(place[0])), places[0])


def starts_whole(matrix):
    """Whether the first values of a stored matrix are whole numbers. `as_counts` checks all."""
    values = matrix["data"][:100_000] if isinstance(matrix, h5py.Group) else matrix[:100]
    return values.dtype.kind in "iub" or bool((values == np.rint(values)).all())


def h5ad_features(var):
    """Gene ids, symbols and kinds of an AnnData's gene table.

    The index is the id; or the symbol, if the table has a column of ids.
    """
    index = var.index.astype(str).to_series()

    def first_of(columns):
        """The first of these columns. Where a gene has none, its name in the index stands in."""
        for column in columns:
            if column in var:
                return var[column].astype(object).where(var[column].notna(), index).astype(str)
        return index

    kinds = var["feature_types"].astype(str).to_numpy() if "feature_types" in var else None
    return first_of(ID_COLUMNS), first_of(SYMBOL_COLUMNS), kinds


@contextmanager
def opened_h5ad(path):
    """Open an AnnData file as HDF5. Any error while it is read becomes one that names the file.

    A file of anndata before 0.7 is written again in memory, as anndata would write it today.
    """
    try:
        with open_hdf5(path) as file:
            if isinstance(file.get("obs"), h5py.Dataset):
                file = h5py.File.in_memory()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # they advise to write it again
                    anndata.io.write_elem(file, "/", anndata.read_h5ad(path))
            yield file
    except InputError:
        raise
    except OSError as error:
        raise damaged(path, error) from None
    except Exception as error:  # a missing group or column raises errors of many kinds
        raise InputError(f"{path} is HDF5, but not an AnnData file that can be read "
                         f"({first_line(error)}). Write it again with anndata") from None


def read_st_table(path):
    """Read a legacy Spatial Transcriptomics table, tab-separated, spots x genes.

    Row names are `XxY`. The header holds gene ids, which are used as symbols too.
    """
    try:
        genes = st_genes(path)  # not table.columns: pandas renames a repeated column
        check_unique(path, "gene id", pd.Index(genes))
        with open_text(path, ST_LINE) as file:
            table = pd.read_csv(file, sep="\t", index_col=0)
        matrix = scipy.sparse.csr_matrix(table.to_numpy(dtype=np.float64))
    except DAMAGED as error:
        raise damaged(path, error) from None
    return build(path, matrix, table.index.astype(str), genes, genes)


def st_genes(path):
    """The gene ids in the first line of an ST table."""
    with open_text(path, ST_LINE) as file:
        header = st_cells(file.readline())
        row = st_cells(file.readline())
    n_genes = len(row) - 1
    if not 0 < n_genes <= len(header):
        raise ValueError(f"its first line has {len(header)} cells, its second {len(row)}")
    return header[len(header) - n_genes:]  # the corner above the row names is optional


def st_cells(line):
    """The cells of a line of an ST table, without the quotes that R writes."""
    return [cell.strip('"') for cell in line.rstrip("\n").split("\t")]


def read_genes(path):
    """Read the genes of a count matrix without its counts.

    path: as for `read_counts`. Returns its `var`: DataFrame, index gene id, column symbol.
    Raises InputError for a damaged file.
    """
    path = Path(path)
    name = path.name.removesuffix(".gz")
    if name.endswith("matrix.mtx"):
        return gene_table(*mtx_features(read_table(files_of(path)[2])))[0]
    if name.endswith(".h5"):
        with opened_h5(path) as groups:
            return gene_table(*h5_features(groups))[0]
    if name.endswith(".h5ad"):
        with opened_h5ad(path) as file:
            _, var = counts_of_h5ad(path, file)
            return gene_table(*h5ad_features(anndata.io.read_elem(var)))[0]
    if name.endswith(".tsv"):
        try:
            genes = st_genes(path)
        except DAMAGED as error:
            raise damaged(path, error) from None
        return gene_table(genes, genes)[0]
    return read_counts(path).var


def build(path, matrix, barcodes, gene_ids, symbols, kinds=None):
    """AnnData (X: CSR int32) from a spots x genes matrix of counts and its names.

    path: the file, for error messages. kinds: the feature type of each gene, or None. Features that
    are no genes are left out; uns["no_genes"] says how many and of what kinds, as text.
    Raises InputError for values that are not counts, for repeated names, and if nothing is left.
    """
    if not scipy.sparse.issparse(matrix):
        matrix = scipy.sparse.csr_matrix(matrix)
    matrix.data = as_counts(path, matrix.data)  # before tocsr, which then copies fewer bytes
    matrix = as_csr(path, matrix)
    obs = pd.DataFrame(index=pd.Index(barcodes, name="barcode"))
    var, others = gene_table(gene_ids, symbols, kinds)
    kinds_left_out = others[others != ""].value_counts()
    left_out = ", ".join(f"{n:,} {kind}" for kind, n in kinds_left_out.items())
    if left_out:
        matrix = matrix[:, (others == "").to_numpy()]
    if 0 in matrix.shape:
        found = f"{len(others):,} features, of which none is a gene: {left_out}"
        if not left_out:
            found = f"{matrix.shape[0]} spots x {matrix.shape[1]} genes"
        raise InputError(f"{path}: holds {found}. Give the section's gene expression; its feature "
                         "type is Gene Expression")
    check_unique(path, "barcode", obs.index)
    check_unique(path, "gene id", var.index)
    return anndata.AnnData(matrix, obs=obs, var=var, uns={"no_genes": left_out})


def as_csr(path, matrix):
    """A sparse matrix of any layout as CSR, with sorted indices.

    Raises InputError for indices outside it, and for two values in one place, of which scipy makes
    a sum that may overflow.
    """
    n_values = matrix.nnz
    try:
        if matrix.format in ("csr", "csc"):
            check_indices(matrix)
        matrix = matrix.tocsr()
        matrix.sum_duplicates()
    except ValueError as error:
        raise damaged(path, error) from None
    if matrix.nnz < n_values:
        raise damaged(path, "it holds two values for one spot and gene")
    return matrix


def check_unique(path, what, names):
    """Raise InputError if one of the names, a pandas Index, occurs twice."""
    if not names.is_unique:
        twice = names[names.duplicated()][0]
        raise InputError(f"{path}: {what} {twice} occurs more than once; each must be unique. "
                         "Download the matrix again or fix its table")


def as_counts(path, values):
    """Values of a count matrix as int32. Raises InputError if one is not a count."""
    integer = np.issubdtype(values.dtype, np.integer)  # most are, and need no further check
    if not integer and np.isnan(values).any():
        raise InputError(f"{path}: some of its values are empty. Download it again")
    if values.size and (values.min() < 0 or values.max() > np.iinfo(np.int32).max
                        or not (integer or (values == np.rint(values)).all())):
        where = ', in layers["counts"] or X or raw.X' if path.suffix == ".h5ad" else ""
        raise InputError(f"{path}: holds values that are not counts (whole numbers from 0). Give "
                         f"the raw counts{where}, not normalised expression")
    return values.astype(np.int32, copy=False)


def gene_table(gene_ids, symbols, kinds=None):
    """The genes among features, and what the other features are.

    kinds: the feature type of each, or None. Returns (DataFrame of symbols by gene id, Series: ""
    for a gene, its type for another feature, "control" for what is no gene by its name).
    """
    index = pd.Index(np.asarray(gene_ids, object), dtype=str, name="gene_id")
    var = pd.DataFrame({"symbol": np.asarray(symbols, object)}, index, dtype=str)
    others = pd.Series("", range(len(var)))
    if kinds is not None:
        kinds = pd.Series(np.asarray(kinds)).str.strip()
        words = kinds.str.lower().str.replace("[_-]", " ", regex=True)
        others = others.where(words.isin(GENE_KINDS), kinds)
    by_name = np.asarray(index.str.match(NO_GENE)) | np.asarray(var["symbol"].str.match(NO_GENE))
    others = others.mask(by_name & (others == ""), "control")
    others.index = index
    return var[(others == "").to_numpy()], others


def read_symbols(path):
    """Read gene symbols from a table with the columns gene_id and gene_name.

    Returns a Series of symbols by gene id. Raises InputError for a damaged file, for an absent
    column, and for an id with several symbols.
    """
    try:
        content = io.StringIO(read_text(path))
        table = pd.read_csv(content, sep="\t", dtype=str, keep_default_na=False)
    except DAMAGED as error:
        raise damaged(path, error) from None
    if not {"gene_id", "gene_name"} <= set(table.columns):
        raise InputError(f"{path}: not a table of gene symbols: its first line lacks gene_id or "
                         "gene_name. Name these two columns in it")
    table = table.drop_duplicates(["gene_id", "gene_name"]).set_index("gene_id")
    if not table.index.is_unique:
        twice = table.index[table.index.duplicated()][0]
        raise InputError(f"{path}: gene id {twice} occurs more than once, with different symbols. "
                         "Keep one of them")
    return table["gene_name"]


# ---------------------------------------------------------------------------------------- positions


def read_positions(path, part=()):
    """Read spot positions of any known version, determined from the content, not from the name.

    path: Space Ranger's csv with or without header, or its parquet; STUtility's alignment table; or
    AnnData. part: conditions on the obs of an AnnData.
    Returns a DataFrame with index barcode and the columns in_tissue (bool), array_row, array_col
    (int; absent if an AnnData has none), x, y (float, full-resolution pixels: image column and
    row); attrs["kind"] is the version in words. Raises InputError for a damaged file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"\x89HDF":
            return read_h5ad_positions(path, part)
        if magic == b"PAR1":
            return space_ranger_positions(path, read_parquet(path), "parquet")
        return read_text_positions(path)
    except DAMAGED as error:
        raise damaged(path, error) from None


def read_text_positions(path):
    """Positions of an alignment table or of Space Ranger's csv."""
    with open_text(path) as file:
        first = file.readline()
        file.seek(0)
        if "pixel_x" in first.replace('"', "").split():
            return alignment_positions(path, pd.read_csv(file, sep="\t"))
        if not first:
            raise InputError(f"{path} is empty. Download it again")
        if first.count(",") != 5:
            raise InputError(f"{path}: not a position file: its first line has "
                             f"{first.count(',') + 1} columns, expected the six of Space Ranger "
                             f"({', '.join(POSITION_COLUMNS)}). Download it again")
        if any(letter.isdigit() for letter in first):  # Space Ranger's own rule
            table = pd.read_csv(file, header=None, names=POSITION_COLUMNS, converters=AS_TEXT)
            return space_ranger_positions(path, table, "csv, no header")
        return space_ranger_positions(path, pd.read_csv(file, converters=AS_TEXT),
                                      "csv with header")


def alignment_positions(path, table):
    """The position table from STUtility's columns. Barcodes are `XxY`, as in the ST table.

    A table without the column selected lists the selected spots alone.
    """
    if absent := {"x", "y", "pixel_x", "pixel_y"} - set(table.columns):
        raise InputError(f"{path}: its header lacks {', '.join(sorted(absent))}; expected the "
                         "columns of an ST alignment table (x, y, pixel_x, pixel_y, selected)")
    barcodes = table["x"].astype(str) + "x" + table["y"].astype(str)
    selected = table.get("selected", pd.Series(1, table.index))
    return positions(path, "alignment table", barcodes, {
        "in_tissue": selected, "array_row": table["y"], "array_col": table["x"],
        "x": table["pixel_x"], "y": table["pixel_y"]})


def space_ranger_positions(path, table, kind):
    """The position table from Space Ranger's columns, by their names."""
    if absent := set(POSITION_COLUMNS) - set(table.columns):
        raise InputError(f"{path}: its header lacks {', '.join(sorted(absent))}; expected the "
                         f"columns of Space Ranger ({', '.join(POSITION_COLUMNS)})")
    return positions(path, kind, table["barcode"], {
        "in_tissue": table["in_tissue"], "array_row": table["array_row"],
        "array_col": table["array_col"], "x": table["pxl_col_in_fullres"],
        "y": table["pxl_row_in_fullres"]})


def read_parquet(path):
    """Read a parquet table. Space Ranger writes one with the positions of Visium HD's bins."""
    try:
        return pd.read_parquet(path)
    except ImportError:
        raise InputError(f"{path} is parquet, which needs pyarrow: pip install pyarrow, or install "
                         "this project with its extra hd") from None
    except Exception as error:  # pyarrow has its own kinds of errors
        raise damaged(path, error) from None


def read_h5ad_positions(path, part=()):
    """Positions of an AnnData file: named columns of obs or obsm, or else obsm["spatial"].

    Named columns go first, because the order of unnamed ones cannot be checked. Array coordinates
    that hold no information are left out. Without a column in_tissue, all spots are under tissue.
    """
    with opened_h5ad(path) as file:
        obs, rows = read_obs(path, file, part)
        stored = [key for key in ("spatial", "X_spatial") if key in file.get("obsm", ())]
        spatial = anndata.io.read_elem(file["obsm"][stored[0]])[rows] if stored else None
    named = named_xy(obs, NAMED_XY[:2])  # x and y alone may be places of the array
    if isinstance(spatial, pd.DataFrame):
        named = named_xy(spatial, NAMED_XY) or named
    if named:
        x, y = named
    elif spatial is not None and np.ndim(spatial) == 2 and np.shape(spatial)[1] >= 2:
        x, y = (pd.Series(column, obs.index) for column in np.asarray(spatial).T[:2])
    else:
        raise InputError(f'{path}: has neither obsm["spatial"] nor pxl_col_in_fullres and '
                         "pxl_row_in_fullres in obs. Name a position file in addition to it")
    columns = {"in_tissue": under_tissue(path, obs)}
    kind = "h5ad, no array"
    if array_of(obs) is not None:
        kind = "h5ad"
        columns |= {"array_row": obs["array_row"], "array_col": obs["array_col"]}
    return positions(path, kind, obs.index, columns | {"x": x, "y": y})


def named_xy(table, names):
    """The columns x and y of a table under the first of several pairs of names, or None."""
    return next(((table[x], table[y]) for x, y in names if {x, y} <= set(table)), None)


def under_tissue(path, obs):
    """The column in_tissue of an AnnData as 1 and 0, whatever words it has. Absent: 1 for all."""
    if "in_tissue" not in obs:
        return pd.Series(1, obs.index)
    words = obs["in_tissue"].astype(str).str.lower()
    unknown = sorted(set(words) - IN_TISSUE - OFF_TISSUE)
    if unknown:
        raise InputError(f"{path}: the column in_tissue of obs holds {', '.join(unknown[:4])}, "
                         "expected 1 or 0, or True or False")
    return words.isin(IN_TISSUE).astype(int)


def positions(path, kind, barcodes, columns):
    """The position table that `read_positions` returns.

    columns: in_tissue, array_row, array_col, x and y in this order -> Series of numbers; the two of
    the array may be absent. Raises InputError for a repeated barcode or a missing number.
    """
    numbers = {name: as_numbers(path, name, column) for name, column in columns.items()}
    table = pd.DataFrame(numbers, index=pd.Index(barcodes.astype(str), name="barcode"))
    if table.empty:
        raise InputError(f"{path}: lists no spot. Download it again")
    if not table.index.is_unique:
        twice = table.index[table.index.duplicated()][0]
        raise InputError(f"{path}: barcode {twice} occurs more than once. Download it again")
    complete = np.isfinite(table.to_numpy()).all(axis=1)
    if not complete.all():
        raise InputError(f"{path}: the line of {table.index[~complete][0]} is incomplete. Download "
                         "it again")
    integers = {name: np.int64 for name in ("array_row", "array_col") if name in table}
    for name in integers:
        values = table[name].to_numpy()
        whole = (np.abs(values) < LARGEST_ARRAY) & (values == np.rint(values))
        check_all(path, name, table[name], whole, "a place in an array")
    check_all(path, "in_tissue", table["in_tissue"], table["in_tissue"].isin([0, 1]), "0 or 1")
    table = table.assign(in_tissue=table["in_tissue"] == 1).astype(integers)
    check_places(path, table[table["in_tissue"]])
    table.attrs["kind"] = kind
    return table


def check_all(path, name, column, right, expected):
    """Raise InputError that names the first value of a column that is not right."""
    if not right.all():
        raise InputError(f"{path}: {name} holds {column[~np.asarray(right)].iloc[0]:g}, expected "
                         f"{expected}. Download it again")


def as_numbers(path, name, column):
    """A column of a position table as float64 (n,); NaN where it is empty.

    Raises InputError for a value that is no number.
    """
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    wrong = np.isnan(numbers) & column.notna().to_numpy()
    if wrong.any():
        raise InputError(f"{path}: {name} holds {column[wrong].iloc[0]!r}, which is no number. "
                         "Correct it, or download the file again")
    return numbers


def libraries(file):
    """The libraries in uns["spatial"] of an open AnnData file: name -> HDF5 group.

    Members that are no library, such as CELLxGENE's is_single, are passed over.
    """
    spatial = file.get("uns/spatial")
    members = spatial.items() if isinstance(spatial, h5py.Group) else []
    return {name: member for name, member in members if isinstance(member, h5py.Group)}


def scale_facts(path, part=()):
    """What Space Ranger's scale factors in an AnnData file state: dict, empty if there are none.

    Of several libraries, the one that `part` names. Otherwise nothing is stated, because it is
    unknown which is meant.
    """
    with opened_h5ad(path) as file:
        stated = {name: library["scalefactors"] for name, library in libraries(file).items()
                  if "scalefactors" in library}
        named = [condition.value for condition in part if condition.value in stated]
        if len(chosen := named or list(stated)) != 1:
            return {}
        return dict(anndata.io.read_elem(stated[chosen[0]]))


def check_places(path, table):
    """Raise InputError if spots under tissue share a place of the array, or the same x and y."""
    places = [["x", "y"]]
    if array_of(table) is not None:
        places.append(["array_row", "array_col"])
    for columns in places:
        if (twice := table.duplicated(columns)).any():
            first = table.loc[twice, columns].iloc[0]
            place = ", ".join(f"{column} {first[column]:g}" for column in columns)
            raise InputError(f"{path}: {twice.sum():,} of {len(table):,} spots under tissue are at "
                             f"the place of another one, for example at {place}. It holds several "
                             "sections, or one twice. Take one section, which the sheet's column "
                             "part can name by a column of an AnnData's obs")


def join(counts, spots, counts_path, positions_path):
    """Join counts and positions by barcode: the spots under tissue, in the matrix's order.

    counts: as `read_counts` returns it. spots: as `read_positions` returns it. The two paths are
    for error messages and, by its suffix, for the kind of the matrix.
    Returns AnnData: X counts, obs in_tissue, array_row, array_col (as far as spots has them),
    obsm["spatial"] = (x, y) in full-resolution pixels.
    A few spots under tissue may have no counts. They are left out, and uns["left_out"] says so. A
    Space Ranger matrix has none for a spot without a single count. Two kinds may lack more: an
    AnnData, from which people drop poor spots, and Visium HD, in which some bins hold no counts.
    Raises InputError if the two files belong to different sections: if too many spots have no
    counts; or if any has none and the matrix is neither of the spots under tissue nor of all.
    """
    under_tissue = spots.index[spots["in_tissue"]]
    if not len(under_tissue):
        raise InputError(f"{positions_path}: no spot is under tissue (in_tissue == 1 nowhere). "
                         "Check that this is the section's own position file")
    note = left_out_of(counts, spots, counts_path, positions_path)
    joined = counts.obs_names.isin(under_tissue)
    adata = counts if joined.all() else counts[joined].copy()
    spots = spots.loc[adata.obs_names]
    columns = [column for column in ("in_tissue", "array_row", "array_col") if column in spots]
    adata.obs[columns] = spots[columns]
    adata.obsm["spatial"] = spots[["x", "y"]].to_numpy()
    add_note(adata, note)
    return adata


def left_out_of(counts, spots, counts_path, positions_path):
    """The note on spots under tissue that a matrix lacks, or None. Raises InputError as `join`."""
    lacking = ~spots.index.isin(counts.obs_names)
    in_tissue = spots["in_tissue"].to_numpy()
    absent = lacking[in_tissue]
    if not absent.any():
        return None
    first = spots.index[in_tissue & lacking][0]
    fault = f"of {positions_path} have no counts in {counts_path}, for example {first}"
    remedy = ("The two files belong to different sections, or the matrix is incomplete; its first "
              f"barcodes are {', '.join(counts.obs_names[:2])}. Give both files of one section")
    may_lack_spots = Path(counts_path).suffix == ".h5ad" or spots.attrs.get("kind") == "parquet"
    if may_lack_spots and not absent.all():
        return f"{absent.sum():,} of {len(absent):,} spots under tissue {fault}; left out"
    on_glass = (~lacking)[~in_tissue]
    if on_glass.any() and on_glass.mean() < RAW_SHARE:
        raise InputError(f"{absent.sum():,} of {len(absent):,} spots under tissue {fault}, but "
                         f"{on_glass.sum():,} spots that are not under tissue have. {remedy}")
    return leave_out(absent, fault, remedy)


def damaged(path, error):
    """The error for a file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} is missing")
    return InputError(f"{path} is damaged or incomplete ({first_line(error)}). Download it again")
