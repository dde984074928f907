"""sources.py: every raw format gives the same spots x genes table; a broken file is named."""

import gzip
import importlib
import re
import sys

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse

from heclip import sources
from heclip.files import InputError
from heclip.spots import array_of, mirrored, pitch

# ----------------------------------------------------------------- raw files as others publish them


def a_matrix(n_spots=7, n_genes=5, seed=0):
    """Counts (spots x genes), barcodes, gene ids and symbols.

    The symbol MATR3 occurs twice, as in GRCh38.
    """
    counts = np.random.default_rng(seed).poisson(2, (n_spots, n_genes))
    barcodes = [f"{letters}ACGT-1"
                for letters in ("TTG", "AAC", "CGA", "GAT", "ACA", "TGC", "CCT", "GGG")[:n_spots]]
    symbols = ["MATR3" if i in (1, 3) else f"GENE{i}" for i in range(n_genes)]
    return counts, barcodes, [f"ENSG{i:05d}" for i in range(n_genes)], symbols


def write_text(path, text):
    """Write text, gzipped if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return path


def mtx_text(counts):
    """A spots x genes matrix as the genes x spots MatrixMarket text of 10x."""
    gene, spot = np.nonzero(np.asarray(counts).T)
    lines = [f"{g + 1} {s + 1} {counts[s][g]}" for g, s in zip(gene, spot, strict=True)]
    kind = "real" if np.asarray(counts).dtype.kind == "f" else "integer"
    return "\n".join([f"%%MatrixMarket matrix coordinate {kind} general", "%metadata_json: {}",
                      f"{len(counts[0])} {len(counts)} {len(lines)}", *lines, ""])


def write_mtx(folder, counts, barcodes, ids, symbols, kinds=None, prefix="", suffix="",
              features="features.tsv"):
    """Write the trio matrix.mtx, barcodes.tsv and features.tsv. Returns the matrix's path."""
    kinds = ["Gene Expression"] * len(ids) if kinds is None else kinds
    columns = (ids, symbols) if features == "genes.tsv" else (ids, symbols, kinds)
    rows = zip(*columns, strict=True)
    write_text(folder / f"{prefix}barcodes.tsv{suffix}",
               "".join(f"{barcode}\n" for barcode in barcodes))
    write_text(folder / f"{prefix}{features}{suffix}",
               "".join("\t".join(row) + "\n" for row in rows))
    return write_text(folder / f"{prefix}matrix.mtx{suffix}", mtx_text(counts))


def write_h5(path, counts, barcodes, ids, symbols, kinds=None, genome=None):
    """Write a 10x HDF5 matrix: compressed sparse columns of genes x spots.

    genome: write the layout before version 3, under this name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    matrix = scipy.sparse.csc_matrix(np.asarray(counts).T)
    kinds = np.array(["Gene Expression"] * len(ids) if kinds is None else kinds, "S")
    with h5py.File(path, "w") as file:
        group = file.create_group(genome or "matrix")
        group["data"] = matrix.data.astype(np.int32)
        group["indices"] = matrix.indices.astype(np.int64)
        group["indptr"] = matrix.indptr.astype(np.int64)
        group["shape"] = np.array(matrix.shape, np.int32)
        group["barcodes"] = np.array(barcodes, "S")
        if genome:
            group["genes"] = np.array(ids, "S")
            group["gene_names"] = np.array(symbols, "S")
        else:
            features = group.create_group("features")
            features["id"] = np.array(ids, "S")
            features["name"] = np.array(symbols, "S")
            features["feature_type"] = kinds
            features["genome"] = np.array(["GRCh38"] * len(ids), "S")
    return path


def write_st(path, counts, barcodes, ids):
    """Write a legacy Spatial Transcriptomics table, as pandas and R do."""
    rows = [["", *ids]]
    rows += [[barcode, *values] for barcode, values in zip(barcodes, counts, strict=True)]
    return write_text(path, "".join("\t".join(map(str, row)) + "\n" for row in rows))


POSITIONS = pd.DataFrame({
    "barcode": ["AAC-1", "CGA-1", "TTG-1"], "in_tissue": [0, 1, 1],
    "array_row": [0, 1, 2], "array_col": [4, 7, 10],
    "pxl_row_in_fullres": [100, 210, 320], "pxl_col_in_fullres": [1000, 1300, 1600]})


def write_positions(path, table=POSITIONS, header=False):
    return write_text(path, table.to_csv(index=False, header=header))


def assert_holds(adata, counts, barcodes, ids, symbols):
    """The contract of read_counts, whatever the format."""
    np.testing.assert_array_equal(adata.X.toarray(), counts)
    assert isinstance(adata.X, scipy.sparse.csr_matrix)
    assert adata.X.dtype == np.int32
    assert adata.obs_names.tolist() == list(barcodes)
    assert adata.var_names.tolist() == list(ids)
    assert adata.var["symbol"].tolist() == list(symbols)


# ------------------------------------------------------------------------- counts


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("prefix", ["", "GSM7845914_PSC011_A1_VISIUM_"])
@pytest.mark.parametrize("features", ["features.tsv", "genes.tsv"])
def test_a_trio_is_read_plain_or_zipped_with_any_prefix_and_either_gene_table(
        tmp_path, suffix, prefix, features):
    matrix = a_matrix()
    path = write_mtx(tmp_path, *matrix, prefix=prefix, suffix=suffix, features=features)
    assert_holds(sources.read_counts(path), *matrix)


def test_a_zipped_matrix_may_lie_next_to_plain_tables(tmp_path):
    counts, *names = a_matrix()
    write_mtx(tmp_path, counts, *names).unlink()
    path = write_text(tmp_path / "matrix.mtx.gz", mtx_text(counts))
    assert_holds(sources.read_counts(path), counts, *names)


def test_a_trio_never_takes_the_tables_of_a_neighbour_with_another_prefix(tmp_path):
    one, two = a_matrix(seed=1), a_matrix(seed=2)
    two = (two[0], two[1][::-1], *two[2:])
    paths = [write_mtx(tmp_path, *one, prefix="A_"), write_mtx(tmp_path, *two, prefix="B_")]
    for path, matrix in zip(paths, (one, two), strict=True):
        assert_holds(sources.read_counts(path), *matrix)


def test_a_gene_named_like_a_missing_value_keeps_its_name(tmp_path):
    counts, barcodes, ids, symbols = a_matrix()
    ids[0] = symbols[0] = "NA"
    assert_holds(sources.read_counts(write_mtx(tmp_path, counts, barcodes, ids, symbols)),
                 counts, barcodes, ids, symbols)


def test_a_dense_matrix_market_file_is_read(tmp_path):
    counts, *names = a_matrix()
    path = write_mtx(tmp_path, counts, *names)
    with open(path, "wb") as file:
        scipy.io.mmwrite(file, counts.T)
    assert path.read_text().startswith("%%MatrixMarket matrix array")
    assert_holds(sources.read_counts(path), counts, *names)


@pytest.mark.parametrize("genome", [None, "GRCh38"])
def test_a_10x_h5_is_read_in_both_its_layouts(tmp_path, genome):
    matrix = a_matrix()
    assert_holds(sources.read_counts(write_h5(tmp_path / "a.h5", *matrix, genome=genome)), *matrix)


@pytest.mark.parametrize("write", [
    lambda folder, *a: write_mtx(folder, *a),
    lambda folder, *a: write_mtx(folder, *a, suffix=".gz"),
    lambda folder, *a: write_h5(folder / "a.h5", *a),
], ids=["mtx", "mtx.gz", "h5"])
def test_antibodies_are_not_genes(tmp_path, write):
    counts, barcodes, ids, symbols = a_matrix()
    gene, antibody = "Gene Expression", "Antibody Capture"
    path = write(tmp_path, counts, barcodes, ids, symbols, [gene, antibody, gene, gene, antibody])
    genes = [0, 2, 3]
    assert_holds(sources.read_counts(path), counts[:, genes], barcodes,
                 [ids[i] for i in genes], [symbols[i] for i in genes])


@pytest.mark.parametrize(("kinds", "genes", "left_out"), [
    (["Gene expression", "rna", "GENE", "", "gene_expression"], [0, 1, 2, 3, 4], ""),
    (["Gene Expression", "Blank Codeword", "Gene Expression", "CRISPR Guide Capture",
      "Blank Codeword"], [0, 2], "2 Blank Codeword, 1 CRISPR Guide Capture"),
], ids=["other spellings", "no genes"])
def test_what_is_a_gene_follows_from_its_feature_type_in_any_spelling(tmp_path, kinds, genes,
                                                                      left_out):
    counts, barcodes, ids, symbols = a_matrix()
    path = write_mtx(tmp_path, counts, barcodes, ids, symbols, kinds)
    adata = sources.read_counts(path)
    assert_holds(adata, counts[:, genes], barcodes, [ids[i] for i in genes],
                 [symbols[i] for i in genes])
    assert adata.uns["no_genes"] == left_out
    pd.testing.assert_frame_equal(sources.read_genes(path), adata.var)


@pytest.mark.parametrize("name", [
    "NegControlProbe_00042", "NegControlCodeword_0500", "antisense_PROKR2", "BLANK_0006", "Blank-1",
    "UnassignedCodeword_0001", "DeprecatedCodeword_0320", "DEPRECATED_ENSG00000135679", "NegPrb01",
    "Negative12", "SystemControl3", "Intergenic_Region_107", "ERCC-00002", "__no_feature",
    "__ambiguous[ENSG1+ENSG2]"])
@pytest.mark.parametrize("where", ["id", "symbol"])
def test_controls_and_blanks_are_no_genes_whatever_their_type(tmp_path, name, where):
    counts, barcodes, ids, symbols = a_matrix()
    (ids if where == "id" else symbols)[2] = name
    adata = sources.read_counts(write_h5(tmp_path / "a.h5", counts, barcodes, ids, symbols))
    assert adata.var_names.tolist() == [gene for gene in ids if gene != ids[2]]
    assert adata.uns["no_genes"] == "1 control"


@pytest.mark.parametrize("name", ["NEGR1", "BLNK", "ERCC1", "DEPDC1", "ANTXR1", "SYS1", "INTS1",
                                  "NEGATIVE"])
def test_genes_whose_names_resemble_controls_are_genes(name):
    assert len(sources.gene_table([name], [name])[0]) == 1


def test_a_matrix_without_a_gene_says_what_it_holds(tmp_path):
    path = write_mtx(tmp_path, *a_matrix(), ["Antibody Capture"] * 5)
    with pytest.raises(InputError, match="none is a gene: 5 Antibody Capture"):
        sources.read_counts(path)


def no_types(file):
    del file["matrix/features/feature_type"]


def of_cellbender(file):
    file["droplet_latents/cell_probability"] = np.ones(3)
    file["metadata/y"] = "z"


def floats(file):
    values = file["matrix/data"][:].astype(np.float32)
    del file["matrix/data"]
    file["matrix/data"] = values


@pytest.mark.parametrize("change", [no_types, of_cellbender, floats])
def test_an_h5_that_another_program_wrote_is_read(tmp_path, change):
    matrix = a_matrix()
    path = write_h5(tmp_path / "a.h5", *matrix)
    with h5py.File(path, "r+") as file:
        change(file)
    adata = sources.read_counts(path)
    assert_holds(adata, *matrix)
    pd.testing.assert_frame_equal(sources.read_genes(path), adata.var)


@pytest.mark.parametrize("same", [True, False], ids=["same barcodes", "other barcodes"])
def test_two_genomes_are_put_together_if_they_have_the_same_barcodes(tmp_path, same):
    counts, barcodes, ids, symbols = a_matrix()
    path = write_h5(tmp_path / "a.h5", counts, barcodes, ids, symbols, genome="GRCh38")
    other = write_h5(tmp_path / "b.h5", counts, barcodes if same else barcodes[::-1],
                     [f"mm_{gene}" for gene in ids], symbols, genome="mm10")
    with h5py.File(path, "r+") as file, h5py.File(other) as source:
        source.copy("mm10", file)
    if same:
        adata = sources.read_counts(path)
        assert_holds(adata, np.hstack([counts, counts]), barcodes,
                     [*ids, *(f"mm_{gene}" for gene in ids)], symbols * 2)
        pd.testing.assert_frame_equal(sources.read_genes(path), adata.var)
    else:
        with pytest.raises(InputError, match="2 genomes with different barcodes"):
            sources.read_counts(path)


@pytest.mark.parametrize(("counts", "barcodes", "features", "says"), [
    (a_matrix()[0].T, "", "", "is spots x genes.*write its transpose"),
    (a_matrix()[0], "barcode\n", "", "barcodes.tsv has 8 lines for 7.*'barcode', is a header"),
    (a_matrix()[0], "", "id\tname\ttype\n", "features.tsv has 6 lines for 5.*'id', is a header"),
], ids=["transposed", "barcodes with a header", "features with a header"])
def test_a_trio_that_does_not_fit_says_why(tmp_path, counts, barcodes, features, says):
    path = write_mtx(tmp_path, *a_matrix())
    path.write_text(mtx_text(counts))
    for name, header in (("barcodes.tsv", barcodes), ("features.tsv", features)):
        table = tmp_path / name
        table.write_text(header + table.read_text())
    with pytest.raises(InputError, match=says):
        sources.read_counts(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("corner", [True, False],
                         ids=["header with a corner", "header of genes only"])
def test_an_st_table_is_read(tmp_path, suffix, corner):
    counts, _, ids, _ = a_matrix()
    barcodes = [f"{x}x{x + 2}" for x in range(7)]
    path = write_st(tmp_path / f"MOB1.tsv{suffix}", counts, barcodes, ids)
    if not corner:
        with sources.open_text(path) as file:
            text = file.read()
        write_text(path, text.removeprefix("\t"))
    assert_holds(sources.read_counts(path), counts, barcodes, ids, ids)


def test_an_st_table_that_r_wrote_with_quotes_has_none_in_its_names(tmp_path):
    counts, _, ids, _ = a_matrix()
    barcodes = [f"{x}x{x + 2}" for x in range(7)]
    path = write_st(tmp_path / "MOB1.tsv", counts, [f'"{b}"' for b in barcodes],
                    [f'"{i}"' for i in ids])
    assert_holds(sources.read_counts(path), counts, barcodes, ids, ids)


def test_a_matrix_that_is_empty_for_a_spot_keeps_the_spot(tmp_path):
    counts, *names = a_matrix()
    counts[3] = 0
    assert_holds(sources.read_counts(write_mtx(tmp_path, counts, *names)), counts, *names)


def test_a_matrix_stays_sparse_from_the_file_to_the_join(tmp_path, monkeypatch):
    counts, barcodes, ids, symbols = a_matrix()
    path = write_mtx(tmp_path, counts, barcodes, ids, symbols)
    spots = pd.DataFrame({"in_tissue": True, "array_row": 0, "array_col": 0, "x": 0.0, "y": 0.0},
                         index=barcodes)

    def forbidden(*args, **kwargs):
        raise AssertionError("the matrix was made dense")

    for kind in (scipy.sparse.csr_matrix, scipy.sparse.csc_matrix, scipy.sparse.coo_matrix):
        monkeypatch.setattr(kind, "toarray", forbidden)
        monkeypatch.setattr(kind, "todense", forbidden)
    adata = sources.join(sources.read_counts(path), spots, path, path)
    assert isinstance(adata.X, scipy.sparse.csr_matrix)


# ------------------------------------------------------------------------- broken counts


@pytest.mark.parametrize(("damage", "says"), [
    (lambda folder: (folder / "matrix.mtx").unlink(), "matrix.mtx is missing"),
    (lambda folder: (folder / "barcodes.tsv").unlink(),
     "barcodes.tsv is missing; it must lie next to matrix.mtx"),
    (lambda folder: (folder / "features.tsv").unlink(),
     "features.tsv is missing; it must lie next to matrix.mtx"),
    (lambda folder: (folder / "matrix.mtx").write_text(""), "matrix.mtx is damaged or incomplete"),
    (lambda folder: (folder / "matrix.mtx").write_text("<html>404</html>"),
     "matrix.mtx is damaged or incomplete"),
    (lambda folder: (folder / "matrix.mtx").write_text(mtx_text(a_matrix()[0])[:-20]),
     "matrix.mtx is damaged or incomplete"),
    (lambda folder: (folder / "barcodes.tsv").write_text(""),
     "barcodes.tsv is damaged or incomplete"),
    (lambda folder: (folder / "features.tsv").write_bytes(b"\xff\xfe\x00\x01"),
     "features.tsv is damaged"),
    (lambda folder: (folder / "barcodes.tsv").write_text("AAC-1\nCGA-1\n"),
     "matrix.mtx: 5 x 7 entries, but features.tsv has 5 genes and barcodes.tsv 2 barcodes"),
    (lambda folder: (folder / "features.tsv").write_text("ENSG1\tA\tGene Expression\n"),
     "features.tsv has 1 genes"),
], ids=["no matrix", "no barcodes", "no features", "empty matrix", "a web page", "cut matrix",
        "empty barcodes", "binary features", "fewer barcodes", "fewer features"])
def test_a_broken_trio_is_an_error_that_names_the_file(tmp_path, damage, says):
    path = write_mtx(tmp_path, *a_matrix())
    damage(tmp_path)
    with pytest.raises(InputError, match=re.escape(says)) as error:
        sources.read_counts(path)
    assert str(tmp_path) in str(error.value)


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def cut_last_bytes(path):
    path.write_bytes(path.read_bytes()[:-4])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def not_zipped(path):
    path.write_text("<html>404</html>")


@pytest.mark.parametrize("damage", [cut, cut_last_bytes, flip_a_byte, not_zipped])
@pytest.mark.parametrize("which", ["matrix.mtx.gz", "barcodes.tsv.gz", "features.tsv.gz"])
def test_a_broken_gzip_is_an_error_that_names_the_file(tmp_path, damage, which):
    path = write_mtx(tmp_path, *a_matrix(), suffix=".gz")
    damage(tmp_path / which)
    with pytest.raises(InputError, match=re.escape(str(path.parent))):
        sources.read_counts(path)


@pytest.mark.parametrize("seed", range(12))
def test_any_damage_inside_a_gzip_is_an_input_error(tmp_path, seed):
    path = write_mtx(tmp_path, *a_matrix(), suffix=".gz")
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(seed)
    for _ in range(3):
        content[random.integers(10, len(content) - 8)] ^= int(random.integers(1, 256))
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"{path} is damaged")):
        sources.read_counts(path)


HEAD = "%%MatrixMarket matrix coordinate integer general\n"


@pytest.mark.parametrize(("text", "says"), [
    (HEAD + "5 7 1000000000\n1 1 1\n", "it promises 1,000,000,000 entries, which its"),
    (HEAD + "1000000000 1000000000 1\n1 1 1\n", "1000000000 x 1000000000 entries, but"),
    ("%%MatrixMarket matrix array integer general\n5 7\n1\n", "it promises 35 entries"),
    (HEAD + "5 7 2\n1 1 1\n\0\0\0 1\n", "it holds bytes that are no text"),  # ended the process
    (HEAD + "5 7 2\n1 1 2000000000\n1 1 2000000000\n", "two values for one spot and gene"),
    (HEAD + "5 7\n", "its sizes are"), (HEAD + "5 -7 1\n", "its sizes are"),
    (HEAD + "five 7 1\n", "invalid literal"), ("1 1 1\n", "does not begin with %%MatrixMarket")])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_matrix_that_its_file_cannot_hold_is_refused(tmp_path, text, says, suffix):
    path = write_mtx(tmp_path, *a_matrix(), suffix=suffix)
    if suffix and "promises 35" in says:
        pytest.skip("a gzipped text of any size may hold them")
    if suffix and "1,000,000,000" not in says:
        says = says.replace("it promises", "promises")
    write_text(path, text)
    with pytest.raises(InputError, match=re.escape(str(path)) + f".*({says})"):
        sources.read_counts(path)


@pytest.mark.parametrize(("name", "values"), [
    ("matrix/indices", [0, 99]), ("matrix/indptr", [0, 10**9]), ("matrix/indptr", [5, 0])])
def test_indices_outside_a_matrix_are_refused(tmp_path, name, values):
    path = write_h5(tmp_path / "a.h5", *a_matrix())
    with h5py.File(path, "r+") as file:
        file[name][-2:] = values
    with pytest.raises(InputError, match=re.escape(str(path))):
        sources.read_counts(path)


@pytest.mark.parametrize("text", [
    "a\tb\n", "\tE1\tE1\n1x1\t1\t2\n", "", "\n", "E1\tE2\n1x1\t1\t2\t3\t4\n", "\t" * 1000 + "\n"])
def test_an_st_table_without_genes_or_with_one_twice_is_refused(tmp_path, text):
    path = write_text(tmp_path / "a.tsv", text)
    for read in (sources.read_counts, sources.read_genes):
        if read is sources.read_genes and "E1\tE1" in text:
            continue
        with pytest.raises(InputError, match=re.escape(str(path))):
            read(path)


@pytest.mark.parametrize(("row", "in_tissue", "says"), [
    ("1e300", 1, "array_row holds 1e\\+300, expected a place in an array"),
    ("1.5", 1, "array_row holds 1.5, expected a place in an array"),
    (3, 7, "in_tissue holds 7, expected 0 or 1")])
def test_a_number_that_cannot_be_a_place_is_refused(tmp_path, row, in_tissue, says):
    path = write_text(tmp_path / "p.csv", f"AAC-1,1,0,0,5,5\nAAG-1,{in_tissue},{row},0,5,5\n")
    with pytest.raises(InputError, match=says):
        sources.read_positions(path)


@pytest.mark.parametrize("damage", [
    cut, not_zipped, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_broken_h5_is_an_error_that_names_the_file(tmp_path, damage):
    path = write_h5(tmp_path / "151507_filtered_feature_bc_matrix.h5", *a_matrix())
    damage(path)
    with pytest.raises(InputError, match=re.escape(str(path)) + " is (damaged|missing)"):
        sources.read_counts(path)


def test_an_hdf5_file_that_is_no_matrix_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "patches.h5"
    with h5py.File(path, "w") as file:
        file["img"] = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(InputError, match=re.escape(f"{path} is HDF5, but not a 10x")):
        sources.read_counts(path)


@pytest.mark.parametrize(("values", "says"), [
    ([[1.5, 2.0]], "not counts"), ([[-1, 2]], "not counts"), ([[np.nan, 1.0]], "values are empty"),
    ([[np.inf, 1.0]], "not counts"), ([[3e9, 1.0]], "not counts"),
], ids=["fraction", "negative", "nan", "inf", "huge"])
@pytest.mark.parametrize("kind", ["mtx", "st"])
def test_values_that_are_no_counts_are_an_error(tmp_path, values, says, kind):
    if kind == "mtx":
        path = write_mtx(tmp_path, np.array(values), ["AAC-1"], ["E1", "E2"], ["A", "B"])
    else:
        path = write_st(tmp_path / "MOB1.tsv", values, ["1x1"], ["E1", "E2"])
    with pytest.raises(InputError, match=says) as error:
        sources.read_counts(path)
    assert str(path) in str(error.value)


def test_whole_numbers_written_as_decimals_are_counts(tmp_path):
    counts, *names = a_matrix()
    path = write_mtx(tmp_path, counts.astype(float), *names)
    assert_holds(sources.read_counts(path), counts, *names)


@pytest.mark.filterwarnings("error:.*names are not unique")  # the InputError is enough
@pytest.mark.parametrize("write", [
    lambda folder, *a: write_mtx(folder, *a),
    lambda folder, *a: write_h5(folder / "a.h5", *a),
    lambda folder, c, b, i, s: write_st(folder / "a.tsv", c, b, i),
], ids=["mtx", "h5", "st"])
@pytest.mark.parametrize("twice", ["barcode", "gene id"])
def test_a_name_that_occurs_twice_is_an_error(tmp_path, write, twice):
    counts, barcodes, ids, symbols = a_matrix()
    names = barcodes if twice == "barcode" else ids
    names[4] = names[2]
    with pytest.raises(InputError, match=f"{twice} {names[2]} occurs more than once"):
        sources.read_counts(write(tmp_path, counts, barcodes, ids, symbols))


@pytest.mark.parametrize("damage", [
    lambda text: text[:len(text) - 3], lambda text: text.replace("\t1", "\tone", 1),
    lambda text: "", lambda text: "\n",
    lambda text: "<html>404</html>\n", lambda text: text.split("\n")[0] + "\n",
], ids=["cut in its last row", "a word", "empty", "blank", "a web page", "header only"])
def test_a_broken_st_table_is_an_error_that_names_the_file(tmp_path, damage):
    counts, _, ids, _ = a_matrix()
    path = write_st(tmp_path / "MOB1.tsv", counts + 1, [f"{x}x1" for x in range(7)], ids)
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=re.escape(str(path))):
        sources.read_counts(path)


def test_a_file_of_an_unknown_kind_is_an_error_that_lists_the_known(tmp_path):
    with pytest.raises(InputError,
                       match=r"counts\.csv: not a count matrix of a known kind .*mtx.*h5.*tsv"):
        sources.read_counts(tmp_path / "counts.csv")


# ------------------------------------------------------------------------- positions


@pytest.mark.parametrize(("name", "header"), [
    ("tissue_positions_list.csv", False), ("tissue_positions_list.txt", False),
    ("tissue_positions.csv", True), ("tissue_positions_list.csv", True),
    ("tissue_positions_list.csv.gz", False), ("tissue_positions.csv.gz", True)])
@pytest.mark.parametrize("pixels", [int, float])
def test_the_version_of_space_ranger_positions_is_determined_from_their_content(
        tmp_path, name, header, pixels):
    table = POSITIONS.copy()
    pixel_columns = ["pxl_row_in_fullres", "pxl_col_in_fullres"]
    table[pixel_columns] = table[pixel_columns].astype(pixels) + (0.25 if pixels is float else 0)
    spots = sources.read_positions(write_positions(tmp_path / name, table, header))
    assert spots.index.tolist() == table["barcode"].tolist()
    assert spots["in_tissue"].tolist() == [False, True, True]
    assert spots["in_tissue"].dtype == bool
    assert spots["array_row"].tolist() == [0, 1, 2]
    assert spots["array_col"].tolist() == [4, 7, 10]
    assert spots["x"].tolist() == table["pxl_col_in_fullres"].tolist()  # x is the image column
    assert spots["y"].tolist() == table["pxl_row_in_fullres"].tolist()


def test_headed_positions_are_read_by_the_header_not_by_the_place(tmp_path):
    swapped = POSITIONS[["barcode", "in_tissue", "array_col", "array_row", "pxl_col_in_fullres",
                         "pxl_row_in_fullres"]]
    one = sources.read_positions(write_positions(tmp_path / "one.csv", POSITIONS, header=True))
    two = sources.read_positions(write_positions(tmp_path / "two.csv", swapped, header=True))
    pd.testing.assert_frame_equal(one, two)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_alignment_table_is_read(tmp_path, suffix):
    path = write_text(tmp_path / f"alignment_table_MOB1.tsv{suffix}",
                      "x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected\n"
                      "1\t3\t0.99\t2.97\t268.25\t119.05\t0\n2\t4\t2\t4\t300.5\t140\t1\n")
    spots = sources.read_positions(path)
    assert spots.index.tolist() == ["1x3", "2x4"]
    assert spots["in_tissue"].tolist() == [False, True]
    assert spots[["x", "y"]].to_numpy().tolist() == [[268.25, 119.05], [300.5, 140]]
    # The array's column runs along the image's x, as in Visium.
    assert spots[["array_row", "array_col"]].to_numpy().tolist() == [[3, 1], [4, 2]]


def test_an_alignment_table_without_selected_lists_selected_spots(tmp_path):
    header = "x\ty\tpixel_x\tpixel_y\n"
    path = write_text(tmp_path / "t.tsv", header + "1\t2\t10\t20\n3\t4\t30\t40\n")
    assert sources.read_positions(path)["in_tissue"].tolist() == [True, True]
    write_text(path, "x\tnew_y\tpixel_x\tpixel_y\n1\t2\t10\t20\n")
    with pytest.raises(InputError, match=r"t\.tsv: its header lacks y; expected"):
        sources.read_positions(path)


@pytest.mark.parametrize(("damage", "says"), [
    (lambda text: "", "is empty"),
    (lambda text: "<html>404</html>\n", "not a position file"),
    (lambda text: text.replace(",", ";"), "not a position file"),
    (lambda text: text[:-12], "the line of TTG-1 is incomplete"),
    (lambda text: text.replace("320", "far"), "y holds 'far', which is no number"),
    (lambda text: text.replace("320", ""), "the line of TTG-1 is incomplete"),
    (lambda text: text.replace("320", "inf"), "the line of TTG-1 is incomplete"),
    (lambda text: text.replace(",7,", ",,"), "the line of CGA-1 is incomplete"),
    (lambda text: text.replace("CGA", "TTG"), "barcode TTG-1 occurs more than once"),
    (lambda text: "barcode,in_tissue,row,col,y,x\n" + text, "array_row"),
], ids=["empty", "a web page", "semicolons", "cut", "a word", "a gap", "infinite", "no column",
        "barcode twice", "foreign header"])
def test_a_broken_position_file_is_an_error_that_names_the_file(tmp_path, damage, says):
    path = write_positions(tmp_path / "tissue_positions_list.csv")
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=says) as error:
        sources.read_positions(path)
    assert str(path) in str(error.value)


def test_a_missing_position_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"positions\.csv is missing"):
        sources.read_positions(tmp_path / "positions.csv")


@pytest.mark.parametrize(("text", "says"), [
    ("gene_id\tgene_name\nE1\tA\nE1\tB\n", "E1 occurs more than once"),
    ("id\tname\nE1\tA\n", "gene_id"), ("", ""),
], ids=["gene twice", "foreign header", "empty"])
def test_a_broken_symbol_table_is_an_error_that_names_the_file(tmp_path, text, says):
    path = write_text(tmp_path / "genes.tsv", text)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}.*{says}"):
        sources.read_symbols(path)


def test_symbols_are_read_by_id_and_none_is_taken_for_a_missing_value(tmp_path):
    path = write_text(tmp_path / "genes.tsv.gz",
                      "gene_id\tgene_type\tgene_name\nE1\tTEC\tNA\nE2\tTEC\tPenk\n")
    assert sources.read_symbols(path).to_dict() == {"E1": "NA", "E2": "Penk"}


# ------------------------------------------------------------------------- join


def spots_for(barcodes, in_tissue):
    """Positions in which every number is determined from the barcode's place in `barcodes`."""
    i = np.arange(len(barcodes))
    columns = {"in_tissue": in_tissue, "array_row": i, "array_col": 2 * i,
               "x": 10.0 * i, "y": 100.0 * i}
    return pd.DataFrame(columns, index=pd.Index(barcodes, name="barcode"))


@pytest.mark.parametrize("seed", range(3))
def test_an_unfiltered_matrix_in_another_order_is_joined_by_barcode(tmp_path, seed):
    counts, barcodes, ids, symbols = a_matrix()
    path = write_mtx(tmp_path, counts, barcodes, ids, symbols)
    order = np.random.default_rng(seed).permutation(7)
    in_tissue = np.array([True, False, True, True, False, True, False])
    spots = spots_for([barcodes[i] for i in order], in_tissue)

    adata = sources.join(sources.read_counts(path), spots, path, path)

    # In the matrix's order.
    expected = [barcode for barcode in barcodes if spots.loc[barcode, "in_tissue"]]
    assert adata.obs_names.tolist() == expected
    for row, barcode in enumerate(expected):
        np.testing.assert_array_equal(adata.X[row].toarray()[0], counts[barcodes.index(barcode)])
        assert adata.obs["array_row"].iloc[row] == spots.loc[barcode, "array_row"]
        assert adata.obs["array_col"].iloc[row] == spots.loc[barcode, "array_col"]
        assert adata.obsm["spatial"][row].tolist() == spots.loc[barcode, ["x", "y"]].tolist()
    assert adata.obs["in_tissue"].all()


def test_a_filtered_matrix_joins_positions_of_the_whole_array(tmp_path):
    counts, barcodes, ids, symbols = a_matrix()
    path = write_mtx(tmp_path, counts[:4], barcodes[:4], ids, symbols)
    spots = spots_for(barcodes, np.arange(7) < 4)
    adata = sources.join(sources.read_counts(path), spots, path, path)
    assert adata.obs_names.tolist() == barcodes[:4]


def test_a_spot_under_tissue_that_the_matrix_lacks_is_an_error_naming_both_files(tmp_path):
    counts, barcodes, ids, symbols = a_matrix()
    path = write_mtx(tmp_path, counts[:4], barcodes[:4], ids, symbols)
    counts = sources.read_counts(path)
    with pytest.raises(InputError, match=r"3 of 7 spots under tissue of positions\.csv have no "
                                         r"counts in matrix\.mtx.* at most 10% may be left out"):
        sources.join(counts, spots_for(barcodes, True), "matrix.mtx", "positions.csv")


def test_no_spot_under_tissue_is_an_error_naming_the_position_file():
    counts = anndata.AnnData(scipy.sparse.csr_matrix((1, 1), dtype=np.int32),
                             obs=pd.DataFrame(index=["A"]))
    with pytest.raises(InputError, match=r"positions\.csv: no spot is under tissue"):
        sources.join(counts, spots_for(["A"], False), "matrix.mtx", "positions.csv")


# ------------------------------------------------------------------------- find


def touch(folder, *names):
    for name in names:
        write_text(folder / name, "")


def test_the_first_pattern_with_a_match_wins(tmp_path):
    touch(tmp_path, "b/list_1.csv", "a/other.csv")
    patterns = ["a/none.csv", "b/list_*.csv", "a/*.csv"]
    assert sources.find(tmp_path, patterns, "positions") == tmp_path / "b/list_1.csv"
    assert sources.find(tmp_path, ["a/*.csv", "b/*.csv"], "positions") == tmp_path / "a/other.csv"


def test_a_zipped_file_is_found_and_a_plain_one_preferred(tmp_path):
    touch(tmp_path, "deep/down/x.csv.gz")
    assert sources.find(tmp_path, ["**/x.csv"], "positions").name == "x.csv.gz"
    touch(tmp_path, "deep/down/x.csv")
    assert sources.find(tmp_path, ["**/x.csv"], "positions").name == "x.csv"


def test_two_files_for_one_pattern_are_an_error_that_lists_them(tmp_path):
    touch(tmp_path, "old/x.csv", "x.csv")
    with pytest.raises(InputError, match=r"2 files match \*\*/x\.csv for the positions: "
                                         r"old/x\.csv, x\.csv\. Keep one"):
        sources.find(tmp_path, ["**/x.csv"], "positions")


def test_a_wrong_folder_and_a_missing_file_are_different_errors(tmp_path):
    with pytest.raises(InputError, match=r"nowhere is not a folder.*--raw"):
        sources.find(tmp_path / "nowhere", ["x.csv"], "positions")
    with pytest.raises(InputError, match=r"no positions of section A found; "
                                         r"looked for x\.csv and y\.csv.*--raw"):
        sources.find(tmp_path, ["x.csv", "y.csv"], "positions of section A")


def test_a_folder_that_matches_is_not_taken_for_the_file(tmp_path):
    touch(tmp_path, "x.csv/inside", "below/x.csv/y.csv")
    with pytest.raises(InputError, match="no positions found"):
        sources.find(tmp_path, ["**/x.csv"], "positions")


# ---------------------------------------------------------------- AnnData, parquet, and genes alone


def an_anndata(seed=0, **obs):
    """A matrix of 7 spots with everything that spots need; obs: further columns."""
    counts, barcodes, ids, symbols = a_matrix(seed=seed)
    table = spots_for(barcodes, True)
    adata = anndata.AnnData(scipy.sparse.csc_matrix(counts.astype(np.float32)),
                            obs=pd.DataFrame(obs, index=barcodes),
                            var=pd.DataFrame({"gene_name": symbols}, index=ids))
    adata.obsm["spatial"] = table[["x", "y"]].to_numpy()
    return adata, (counts, barcodes, ids, symbols)


@pytest.mark.parametrize("matrix", ["sparse", "dense", "layer"])
def test_an_anndata_is_read_as_counts(tmp_path, matrix):
    adata, expected = an_anndata()
    if matrix == "dense":
        adata.X = adata.X.toarray()
    if matrix == "layer":
        adata.layers["counts"], adata.X = adata.X.copy(), adata.X.log1p()
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert_holds(sources.read_counts(tmp_path / "a.h5ad"), *expected)


def test_an_anndata_of_an_old_version_is_read(tmp_path):
    adata, (counts, barcodes, ids, symbols) = an_anndata()
    obs = np.zeros(7, [("index", "S10"), ("in_tissue", "i8")])
    var = np.zeros(5, [("index", "S10"), ("gene_name", "S10")])
    obsm = np.zeros(7, [("spatial", "f8", (2,))])
    obs["index"], obs["in_tissue"] = barcodes, [1, 0, 1, 1, 1, 1, 1]
    var["index"], var["gene_name"], obsm["spatial"] = ids, symbols, adata.obsm["spatial"]
    path = tmp_path / "old.h5ad"
    with h5py.File(path, "w") as file:  # as anndata before 0.7 wrote it
        file["obs"], file["var"], file["obsm"] = obs, var, obsm
        file["X"] = counts.astype(np.float32)
    read = sources.read_counts(path)
    assert_holds(read, counts, barcodes, ids, symbols)
    pd.testing.assert_frame_equal(sources.read_genes(path), read.var)
    spots = sources.read_positions(path)
    assert spots["in_tissue"].sum() == 6
    assert spots[["x", "y"]].to_numpy().tolist() == adata.obsm["spatial"].tolist()
    assert sources.scale_facts(path) == {}


def test_counts_of_an_anndata_may_be_in_raw_with_genes_of_their_own(tmp_path):
    adata, expected = an_anndata()
    adata.raw = adata.copy()
    adata = adata[:, 1:3].copy()
    adata.X = adata.X.log1p()
    adata.write_h5ad(tmp_path / "a.h5ad")
    read = sources.read_counts(tmp_path / "a.h5ad")
    assert_holds(read, *expected)
    pd.testing.assert_frame_equal(sources.read_genes(tmp_path / "a.h5ad"), read.var)


@pytest.mark.parametrize(("layers", "says"), [
    (("spliced", "raw_counts"), "has no X. Its layers are raw_counts, spliced"),
    ((), "has no X. It has no layers either")])
@pytest.mark.parametrize("read", [sources.read_counts, sources.read_genes])
def test_an_anndata_without_x_is_refused_with_the_names_of_its_layers(tmp_path, read, layers, says):
    adata, _ = an_anndata()
    for name in layers:
        adata.layers[name] = adata.X
    adata.X = None
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match=rf'a\.h5ad {says}. Store the raw counts as X'):
        read(tmp_path / "a.h5ad")


def test_a_gene_of_an_anndata_without_id_keeps_its_name_and_without_type_is_a_gene(tmp_path):
    adata, (counts, barcodes, ids, _) = an_anndata()
    adata.var = pd.DataFrame({"gene_ids": ids, "feature_types": "Gene Expression"},
                             index=[f"G{i}" for i in range(5)], dtype=object)
    adata.var.loc["G2", ["gene_ids", "feature_types"]] = np.nan
    adata.write_h5ad(tmp_path / "a.h5ad")
    expected = [*ids[:2], "G2", *ids[3:]]
    assert_holds(sources.read_counts(tmp_path / "a.h5ad"), counts, barcodes, expected,
                 [f"G{i}" for i in range(5)])


PXL = ["pxl_row_in_fullres", "pxl_col_in_fullres"]


@pytest.mark.parametrize("change", [
    lambda adata, xy: adata.obsm.update(spatial=pd.DataFrame(
        xy[:, ::-1], adata.obs_names, PXL)),
    lambda adata, xy: adata.obsm.update(spatial=pd.DataFrame(
        xy[:, ::-1], adata.obs_names, ["imagerow", "imagecol"])),
    lambda adata, xy: adata.obsm.update(spatial=pd.DataFrame(xy, adata.obs_names, ["x", "y"])),
    lambda adata, xy: adata.obsm.update(spatial=pd.DataFrame(xy, adata.obs_names, ["u", "v"])),
    lambda adata, xy: adata.obsm.update(X_spatial=adata.obsm.pop("spatial")),
    lambda adata, xy: (adata.obsm.update(spatial=xy[:, ::-1]),
                       adata.obs.__setitem__(PXL, xy[:, ::-1])),
], ids=["named, y first", "Seurat's names", "x and y", "other names", "X_spatial", "named in obs"])
def test_named_coordinates_of_an_anndata_count_for_more_than_their_order(tmp_path, change):
    adata, _ = an_anndata()
    xy = adata.obsm["spatial"]
    change(adata, xy)
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert xy_of(sources.read_positions(tmp_path / "a.h5ad")).tolist() == xy.tolist()


@pytest.mark.parametrize("value", [np.nan, 0, -1, "unknown"])
def test_array_coordinates_that_say_nothing_are_left_out(tmp_path, value):
    adata, _ = an_anndata(array_row=value, array_col=value)
    adata.write_h5ad(tmp_path / "a.h5ad")
    spots = sources.read_positions(tmp_path / "a.h5ad")
    assert spots.attrs["kind"] == "h5ad, no array"
    assert "array_row" not in spots


def test_scale_factors_of_an_anndata_pass_over_members_that_are_no_library(tmp_path):
    adata, _ = an_anndata()
    library = {"images": {}, "scalefactors": {"bin_size_um": 8.0, "microns_per_pixel": 0.5}}
    adata.uns["spatial"] = {"is_single": np.bool_(True), "A": library}
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert sources.scale_facts(tmp_path / "a.h5ad") == library["scalefactors"]
    adata.uns["spatial"]["B"] = library  # which of the two is meant?
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert sources.scale_facts(tmp_path / "a.h5ad") == {}


def test_normalised_values_in_an_anndata_are_an_error_that_says_where_counts_belong(tmp_path):
    adata, _ = an_anndata()
    adata.X = adata.X.log1p()
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match=r"a\.h5ad: holds values that are not counts.*"
                                         r'in layers\["counts"\] or X'):
        sources.read_counts(tmp_path / "a.h5ad")


@pytest.mark.parametrize("read", [sources.read_counts, sources.read_genes, sources.read_positions])
@pytest.mark.parametrize("damage", [
    cut, lambda path: path.unlink(), lambda path: write_h5(path, *a_matrix())])
def test_a_broken_anndata_is_an_error_that_names_the_file(tmp_path, read, damage):
    path = tmp_path / "a.h5ad"
    an_anndata()[0].write_h5ad(path)
    damage(path)
    says = " is (damaged|missing|HDF5, but not an AnnData)"
    with pytest.raises(InputError, match=re.escape(str(path)) + says):
        read(path)


@pytest.mark.parametrize(("in_tissue", "n_in_tissue"), [
    ([1, 0, 1, 1, 1, 1, 1], 6), ([True, False] * 3 + [True], 4),
    (pd.Categorical(["0", "1", "1", "0", "1", "1", "1"]), 5),
    ([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], 1), (None, 7),
    (["TRUE", "FALSE"] * 3 + ["TRUE"], 4), (pd.Categorical(["in", "out"] * 3 + ["in"]), 4),
], ids=["numbers", "truth", "categories", "decimals", "absent", "of R", "words"])
def test_positions_of_an_anndata_are_its_own(tmp_path, in_tissue, n_in_tissue):
    columns = {} if in_tissue is None else {"in_tissue": in_tissue}
    adata, (_, barcodes, *_) = an_anndata(**columns)
    adata.write_h5ad(tmp_path / "a.h5ad")
    spots = sources.read_positions(tmp_path / "a.h5ad")
    assert spots.index.tolist() == barcodes
    assert spots["in_tissue"].sum() == n_in_tissue
    assert spots["x"].tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert spots["y"].tolist() == [0, 100, 200, 300, 400, 500, 600]
    assert "array_row" not in spots
    assert spots.attrs["kind"] == "h5ad, no array"


def test_a_word_in_in_tissue_that_is_neither_true_nor_false_is_an_error(tmp_path):
    an_anndata(in_tissue=["1", "maybe"] * 3 + ["1"])[0].write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match="in_tissue of obs holds maybe, expected 1 or 0"):
        sources.read_positions(tmp_path / "a.h5ad")


def test_positions_of_an_anndata_may_stand_in_its_obs(tmp_path):
    adata, _ = an_anndata(pxl_col_in_fullres=range(7), pxl_row_in_fullres=range(70, 77),
                          array_row=1, array_col=range(7))
    del adata.obsm["spatial"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    spots = sources.read_positions(tmp_path / "a.h5ad")
    assert spots.iloc[2].tolist() == [True, 1, 2, 2.0, 72.0]
    adata.obs = adata.obs[["array_row"]]
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match=r'a\.h5ad: has neither obsm\["spatial"\] nor'):
        sources.read_positions(tmp_path / "a.h5ad")


def test_parquet_positions_are_read_as_space_rangers_csv(tmp_path):
    pytest.importorskip("pyarrow")
    types = {"in_tissue": np.uint8, "array_row": np.uint32, "pxl_row_in_fullres": float}
    POSITIONS.astype(types).to_parquet(tmp_path / "tissue_positions.parquet")
    spots = sources.read_positions(tmp_path / "tissue_positions.parquet")
    from_csv = sources.read_positions(write_positions(tmp_path / "list.csv"))
    pd.testing.assert_frame_equal(spots, from_csv)
    POSITIONS.drop(columns="array_row").to_parquet(tmp_path / "less.parquet")
    with pytest.raises(InputError, match=r"less\.parquet: its header lacks array_row"):
        sources.read_positions(tmp_path / "less.parquet")
    cut(tmp_path / "less.parquet")
    with pytest.raises(InputError, match=r"less\.parquet is damaged"):
        sources.read_positions(tmp_path / "less.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "tissue_positions.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "fastparquet", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        sources.read_positions(tmp_path / "tissue_positions.parquet")


@pytest.mark.parametrize("write", [
    lambda folder, *a: write_mtx(folder, *a),
    lambda folder, *a: write_mtx(folder, *a, suffix=".gz"),
    lambda folder, *a: write_h5(folder / "a.h5", *a),
], ids=["mtx", "mtx.gz", "h5"])
def test_genes_alone_are_those_of_the_counts(tmp_path, write):
    kinds = ["Gene Expression", "Antibody Capture", *["Gene Expression"] * 3]
    path = write(tmp_path, *a_matrix(), kinds)
    pd.testing.assert_frame_equal(sources.read_genes(path), sources.read_counts(path).var)
    assert len(sources.read_genes(path)) == 4


def test_genes_alone_of_other_formats_too(tmp_path):
    counts, barcodes, ids, symbols = a_matrix()
    an_anndata()[0].write_h5ad(tmp_path / "a.h5ad")
    paths = [write_h5(tmp_path / "old.h5", counts, barcodes, ids, symbols, genome="mm10"),
             tmp_path / "a.h5ad",
             write_mtx(tmp_path, counts, barcodes, ids, symbols, features="genes.tsv"),
             write_st(tmp_path / "st.tsv.gz", counts, barcodes, ids)]
    cornerless = write_st(tmp_path / "cornerless.tsv", counts, barcodes, ids)
    cornerless.write_text(cornerless.read_text().removeprefix("\t"))
    for path in [*paths, cornerless]:
        pd.testing.assert_frame_equal(sources.read_genes(path), sources.read_counts(path).var)
        assert sources.read_genes(path).index.tolist() == ids


def test_an_anndata_may_lack_spots_but_not_all_of_them(tmp_path):
    adata, (_, barcodes, *_) = an_anndata()
    joined = sources.join(adata[2:], spots_for(barcodes, True), "filtered.h5ad", "positions.csv")
    assert joined.obs_names.tolist() == barcodes[2:]
    with pytest.raises(InputError, match=r"7 of 7 spots under tissue .* have no counts"):
        sources.join(adata[:0], spots_for(barcodes, True), "filtered.h5ad", "positions.csv")


@pytest.mark.parametrize(("under_tissue", "in_matrix", "says"), [
    pytest.param(range(20), range(1, 20), None, id="a filtered matrix without one empty spot"),
    pytest.param(range(20), range(2, 20), None, id="two of twenty"),
    pytest.param(range(20), range(3, 20), "3 of 20 .* at most 10%", id="more than a tenth"),
    pytest.param(range(20), range(1, 40), None, id="a raw matrix without one empty spot"),
    pytest.param(range(20), range(1, 30), "10 spots that are not under tissue have",
                 id="a filtered matrix of another section")])
def test_a_few_spots_without_counts_are_left_out_and_many_are_an_error(
        under_tissue, in_matrix, says):
    """A spot without a single count is in no matrix of Space Ranger."""
    barcodes = [f"B{i:02d}" for i in range(40)]
    counts = anndata.AnnData(scipy.sparse.csr_matrix((len(in_matrix), 1), dtype=np.int32),
                             obs=pd.DataFrame(index=[barcodes[i] for i in in_matrix]))
    spots = spots_for(barcodes, np.isin(range(40), under_tissue))
    if says:
        with pytest.raises(InputError, match=says):
            sources.join(counts, spots, "matrix.h5", "positions.csv")
    else:
        joined = sources.join(counts, spots, "matrix.h5", "positions.csv")
        assert joined.obs_names.tolist() == [barcodes[i] for i in under_tissue if i in in_matrix]
        n = 20 - joined.n_obs
        assert joined.uns["left_out"].startswith(f"{n} of 20 spots under tissue")
        assert joined.uns["left_out"].endswith("for example B00; left out")


@pytest.mark.parametrize(("column", "says"), [("array_row", "at array_row 0, array_col 1"),
                                              ("x", "at x 10, y 20")])
def test_spots_under_tissue_at_one_place_are_an_error(tmp_path, column, says):
    """As where an AnnData holds two sections."""
    table = pd.DataFrame({"barcode": ["A", "B", "C"], "in_tissue": 1, "array_row": [0, 0, 5],
                          "array_col": [1, 3, 1], "y": [20, 20, 90], "x": [10, 40, 10]})
    table.columns = sources.POSITION_COLUMNS
    table.to_csv(tmp_path / "good.csv", index=False)
    assert len(sources.read_positions(tmp_path / "good.csv")) == 3
    same = {"array_row": "array_col", "x": "pxl_col_in_fullres"}[column]
    table[same] = table[same].where(table["barcode"] != "B", table[same][0])
    table.to_csv(tmp_path / "twice.csv", index=False)
    with pytest.raises(InputError, match=f"1 of 3 spots under tissue .*{says}"):
        sources.read_positions(tmp_path / "twice.csv")
    table["in_tissue"] = [1, 0, 1]  # glass is not used
    table.to_csv(tmp_path / "glass.csv", index=False)
    assert len(sources.read_positions(tmp_path / "glass.csv")) == 3


@pytest.mark.parametrize("header", [True, False])
def test_barcodes_are_text_whatever_they_look_like(tmp_path, header):
    names = ["007", "NA", "1e3", "nan"]
    table = pd.DataFrame({"barcode": names, "in_tissue": 1, "array_row": [0, 1, 2, 3],
                          "array_col": [0, 1, 0, 1], "y": range(4), "x": range(4)})
    table.columns = sources.POSITION_COLUMNS
    table.to_csv(tmp_path / "positions.csv", index=False, header=header)
    assert sources.read_positions(tmp_path / "positions.csv").index.tolist() == names


# ------------------------------------------------------------------------- real data

GSE240429 = {1: (2378, 0.3036), 2: (2349, 0.3036), 3: (2277, 0.3036), 4: (2265, 0.3035)}
DLPFC = {
    "151507": (4226, 0.7251), "151508": (4384, 0.7251), "151509": (4789, 0.7186),
    "151510": (4634, 0.7212), "151669": (3661, 0.7251), "151670": (3498, 0.7252),
    "151671": (4110, 0.7250), "151672": (4015, 0.7251), "151673": (3639, 0.7249),
    "151674": (3673, 0.7251), "151675": (3592, 0.7249), "151676": (3460, 0.7250),
}


def xy_of(spots):
    return spots[["x", "y"]].to_numpy()


def assert_spots_and_mpp(spots, n_in_tissue, mpp):
    assert spots["in_tissue"].sum() == n_in_tissue
    assert round(100 / pitch(xy_of(spots), array_of(spots)), 4) == mpp
    spots = spots[spots["in_tissue"]]
    assert 100 / pitch(xy_of(spots), array_of(spots)) == pytest.approx(mpp, abs=1e-4)


@pytest.mark.parametrize("slot", GSE240429)
def test_liver_positions_give_the_published_spots_and_scale(real_data, slot):
    data = real_data("GSE240429") / "data"
    spots = sources.read_positions(data / f"tissue_pos_matrices/tissue_positions_list_{slot}.csv")
    assert_spots_and_mpp(spots, *GSE240429[slot])
    barcodes = (data / f"filtered_expression_matrices/{slot}/barcodes.tsv").read_text().split()
    assert set(barcodes) == set(spots.index[spots["in_tissue"]])


@pytest.mark.parametrize("section", DLPFC)
def test_cortex_positions_give_the_published_spots_and_scale(real_data, section):
    spots = sources.read_positions(real_data("spatialLIBD") / section / "tissue_positions_list.txt")
    assert_spots_and_mpp(spots, *DLPFC[section])
    measured = pitch(xy_of(spots[spots["in_tissue"]]))
    # The distance between neighbours agrees with the lattice.
    assert 100 / measured == pytest.approx(DLPFC[section][1], rel=1e-3)


@pytest.mark.parametrize(("folder", "name", "n_spots", "mpp"), [
    ("Vis5A_2dpi", "Vis5A", 982, 0.3599), ("Vis7B_5dpi", "Vis7B", 1011, 0.3591)])
def test_muscle_sections_are_read_as_scanpy_reads_them(real_data, folder, name, n_spots, mpp):
    scanpy = importlib.import_module("scanpy")
    data = real_data("scMuscle") / "visium_data" / folder
    path = data / f"{name}_filtered_feature_bc_matrix.h5"
    positions_path = data / "spatial/tissue_positions_list.csv"
    spots = sources.read_positions(positions_path)
    adata = sources.join(sources.read_counts(path), spots, path, positions_path)
    assert adata.shape == (n_spots, 33217)
    assert round(100 / pitch(xy_of(spots), array_of(spots)), 4) == mpp

    with pytest.warns(UserWarning, match="not unique"):
        theirs = scanpy.read_10x_h5(path)
    theirs = theirs[adata.obs_names]
    np.testing.assert_array_equal(adata.var_names, theirs.var["gene_ids"])
    np.testing.assert_array_equal(adata.X.sum(axis=1), theirs.X.sum(axis=1))
    np.testing.assert_array_equal(adata.X.sum(axis=0), theirs.X.sum(axis=0))


@pytest.mark.parametrize(("section", "n_spots"),
                         [("MOB1", 379), ("MOB2", 407), ("MOB3", 438), ("MOB4", 403)])
def test_olfactory_bulb_sections_join_with_all_their_spots(real_data, section, n_spots):
    raw = real_data("MOB")
    counts = sources.find(raw, [f"**/{section}.tsv"], "counts")
    positions = sources.find(raw, [f"**/alignment_table_{section}.tsv"], "positions")
    spots = sources.read_positions(positions)
    adata = sources.join(sources.read_counts(counts), spots, counts, positions)
    assert adata.shape == (n_spots, 1000)
    table = pd.read_csv(counts, sep="\t", index_col=0)
    assert adata.X.sum() == table.loc[adata.obs_names].to_numpy().sum()
    symbols = sources.read_symbols(sources.find(raw, ["**/mouse_genes.tsv"], "symbols"))
    assert adata.var_names.isin(symbols.index).all()
    x, y = adata.obsm["spatial"].T
    # The array is neither turned nor mirrored.
    assert np.corrcoef(adata.obs["array_col"], x)[0, 1] > 0.999
    assert np.corrcoef(adata.obs["array_row"], y)[0, 1] > 0.999
    # By hand: 21.62 px per column and 24.05 px per row, so neighbours on the diagonal are 32.34 px
    # apart.
    assert pitch(adata.obsm["spatial"], array_of(adata.obs)) == pytest.approx(32.34, abs=0.05)


def test_real_files_of_old_and_foreign_writers_are_read_or_refused_for_the_right_reason(real_data):
    real = real_data("real")
    assert sources.read_counts(real / "multiple_genomes.h5").shape == (12, 686)
    assert sources.read_genes(real / "anndata_v0.5.0.h5ad").shape == (765, 1)
    with pytest.raises(InputError, match="values that are not counts"):  # it holds scaled values
        sources.read_counts(real / "anndata_v0.5.0.h5ad")
    with pytest.raises(InputError, match="has no X"):
        sources.read_counts(real / "anndata_v0.11.4.h5ad")


@pytest.mark.parametrize("folder",
                         ["GSE240429", "MOB", "her2st", "real", "scMuscle", "spatialLIBD"])
def test_no_real_section_is_a_mirror_image_of_its_array(real_data, folder):
    files = [path for path in real_data(folder).rglob("*") if re.search(
        r"tissue_positions|alignment_table|_selection", path.name)]
    assert files
    for path in files:
        spots = sources.read_positions(path)
        assert not mirrored(xy_of(spots), array_of(spots)), path
        assert mirrored(xy_of(spots)[:, ::-1], array_of(spots)), path
