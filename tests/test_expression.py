"""Normalisation against sums by hand, statistics against scanpy, Harmony's orientation."""

import anndata
import harmonypy
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse

from heclip.expression import gene_statistics, harmonise, log_normalise


def section(counts, genes=None):
    counts = np.asarray(counts)
    genes = [f"ENS{i:04}" for i in range(counts.shape[1])] if genes is None else genes
    return anndata.AnnData(scipy.sparse.csr_matrix(counts.astype(np.int32)),
                           obs=pd.DataFrame(index=[f"spot{i}" for i in range(len(counts))]),
                           var=pd.DataFrame({"symbol": [f"sym-{gene}" for gene in genes]},
                                            index=genes))


def random_section(seed, spots=120, n_genes=300):
    """Negative-binomial counts. The genes' means and spreads are the same for all seeds.

    Each seed lacks a few of the genes.
    """
    shared, rng = np.random.default_rng(0), np.random.default_rng(seed)
    mean, shape = shared.gamma(0.5, 4, n_genes), shared.uniform(0.3, 5, n_genes)
    counts = rng.poisson(
        mean * rng.gamma(shape, 1 / shape, (spots, n_genes)) * rng.lognormal(0, 0.3, (spots, 1)))
    counts[:, rng.choice(n_genes, 8, replace=False)] = 0
    return section(counts)


def prepared(adata):
    log_normalise(adata)
    gene_statistics(adata)
    return adata


# ------------------------------------------------------------------------------ normalisation


@pytest.mark.filterwarnings("ignore:Some cells have zero counts")
def test_spots_are_scaled_to_the_median_total_and_logged_once():
    # totals 4, 8, 0, 20; 8 is the median above zero
    counts = np.array([[1, 3, 0], [2, 2, 4], [0, 0, 0], [5, 0, 15]])
    adata = section(counts)
    log_normalise(adata)
    expected = np.log1p([[2, 6, 0], [2, 2, 4], [0, 0, 0], [2, 0, 6]])
    np.testing.assert_allclose(adata.X.toarray(), expected, rtol=1e-6)
    np.testing.assert_array_equal(adata.layers["counts"].toarray(), counts)
    assert "log1p" not in adata.uns


def test_normalised_expression_stays_sparse_float32_and_its_counts_whole_numbers():
    adata = random_section(1)
    log_normalise(adata)
    assert adata.X.format == "csr"
    assert adata.X.dtype == np.float32
    assert adata.X.nnz == adata.layers["counts"].nnz
    assert adata.layers["counts"].dtype == np.int32
    median = np.median(adata.layers["counts"].toarray().sum(axis=1))
    np.testing.assert_allclose(np.expm1(adata.X.toarray().astype(float)).sum(axis=1), median,
                               rtol=1e-5)


def test_without_empty_spots_the_values_are_scanpys_to_the_last_bit():
    adata, plain = random_section(1), random_section(1)
    log_normalise(adata)
    plain.X = plain.X.astype(np.float32)
    scanpy.pp.normalize_total(plain)
    scanpy.pp.log1p(plain)
    np.testing.assert_array_equal(adata.X.toarray(), plain.X.toarray())


def test_gene_statistics_are_those_of_the_section_alone():
    adata = prepared(random_section(1))
    x = adata.X.toarray()
    np.testing.assert_allclose(adata.var["mean"], x.mean(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(adata.var["n_expressed"], (x > 0).sum(axis=0))
    expected = scanpy.pp.highly_variable_genes(adata, n_top_genes=50,
                                               inplace=False)["dispersions_norm"]
    np.testing.assert_allclose(adata.var["dispersion"], expected, rtol=1e-6)
    assert "highly_variable" not in adata.var


# ------------------------------------------------------------------------------ Harmony


def shifted_sections(sizes=(90, 60, 80), genes=30, seed=0):
    """Two kinds of tissue in every section, and a shift of every gene that only its section has."""
    rng = np.random.default_rng(seed)
    kinds = rng.normal(3, 1.5, (2, genes))
    return {name: (kinds[np.arange(n) % 2] + rng.normal(0, 0.3, (n, genes))
                   + rng.normal(0, 0.6, genes)).astype(np.float32)
            for name, n in zip(("third", "first", "second"), sizes, strict=True)}


def spread_of_means(matrices):
    return np.stack([matrix.mean(axis=0) for matrix in matrices.values()]).std(axis=0).mean()


def test_harmony_removes_the_shift_between_sections_and_keeps_the_tissue():
    before = shifted_sections()
    after = harmonise(before)
    assert spread_of_means(after) < 0.3 * spread_of_means(before)
    # the rows are still the same spots: even and odd ones differ as they did
    for name, matrix in after.items():
        def contrast(x):
            return x[::2].mean(axis=0) - x[1::2].mean(axis=0)

        assert np.corrcoef(contrast(matrix), contrast(before[name]))[0, 1] > 0.98


def test_harmony_keeps_the_sections_their_order_and_their_shapes():
    before = shifted_sections()
    after = harmonise(before)
    assert list(after) == list(before)
    shapes = [[matrix.shape for matrix in matrices.values()] for matrices in (before, after)]
    assert shapes[0] == shapes[1]
    assert all(matrix.dtype == np.float32 for matrix in after.values())
    for name, matrix in after.items():  # each row is nearest to itself, but for the shift
        x, y = before[name] - before[name].mean(axis=0), matrix - matrix.mean(axis=0)
        distance = ((x[:, None] - y[None]) ** 2).sum(axis=2)
        assert (distance.argmin(axis=1) == np.arange(len(x))).mean() > 0.95


def test_harmony_takes_a_square_matrix_for_spots_by_genes_too():
    square = shifted_sections(sizes=(40, 24, 32), genes=96)
    oblong = {name: matrix[:, :95] for name, matrix in square.items()}
    after, expected = harmonise(square), harmonise(oblong)
    for name in square:
        np.testing.assert_allclose(after[name][:, :95], expected[name], atol=0.1)
    assert spread_of_means(after) < 0.3 * spread_of_means(square)


def test_a_harmonypy_that_returns_genes_by_spots_is_refused(monkeypatch):
    class Old:
        def result(self):
            return np.zeros((30, 230))

    monkeypatch.setattr(harmonypy, "run_harmony", lambda *args, **kwargs: Old())
    with pytest.raises(RuntimeError, match=r"\(30, 230\) for \(230, 30\).*version 2"):
        harmonise(shifted_sections())
