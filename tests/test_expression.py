"""Normalisation against sums by hand, panels against scanpy and against their definitions, Harmony's orientation."""

import anndata
import harmonypy
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse

from heclip import sources
from heclip.expression import choose_panel, gene_statistics, harmonise, log_normalise
from heclip.files import InputError


def section(counts, genes=None):
    counts = np.asarray(counts)
    genes = [f"ENS{i:04}" for i in range(counts.shape[1])] if genes is None else genes
    return anndata.AnnData(scipy.sparse.csr_matrix(counts.astype(np.int32)),
                           obs=pd.DataFrame(index=[f"spot{i}" for i in range(len(counts))]),
                           var=pd.DataFrame({"symbol": [f"sym-{gene}" for gene in genes]}, index=genes))


def random_section(seed, spots=120, n_genes=300):
    """Negative-binomial counts; the genes' means and spreads are shared by all seeds, and each lacks a few genes."""
    shared, rng = np.random.default_rng(0), np.random.default_rng(seed)
    mean, shape = shared.gamma(0.5, 4, n_genes), shared.uniform(0.3, 5, n_genes)
    counts = rng.poisson(mean * rng.gamma(shape, 1 / shape, (spots, n_genes)) * rng.lognormal(0, 0.3, (spots, 1)))
    counts[:, rng.choice(n_genes, 8, replace=False)] = 0
    return section(counts)


def prepared(adata):
    log_normalise(adata)
    gene_statistics(adata)
    return adata


def tables(**columns):
    """Gene tables by hand: section -> {gene: (mean, dispersion, n_expressed)}."""
    return {name: pd.DataFrame.from_dict(genes, orient="index", columns=["mean", "dispersion", "n_expressed"])
            .assign(symbol=lambda table: table.index.str.lower()) for name, genes in columns.items()}


# ------------------------------------------------------------------------------ normalisation


@pytest.mark.filterwarnings("ignore:Some cells have zero counts")
def test_spots_are_scaled_to_the_median_total_and_logged_once():
    counts = np.array([[1, 3, 0], [2, 2, 4], [0, 0, 0], [5, 0, 15]])  # totals 4, 8, 0, 20; 8 is the median above zero
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
    np.testing.assert_allclose(np.expm1(adata.X.toarray().astype(float)).sum(axis=1), median, rtol=1e-5)


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
    expected = scanpy.pp.highly_variable_genes(adata, n_top_genes=50, inplace=False)["dispersions_norm"]
    np.testing.assert_allclose(adata.var["dispersion"], expected, rtol=1e-6)
    assert "highly_variable" not in adata.var


# ------------------------------------------------------------------------------ panels


def scanpy_flags(adata, n_top):
    ranking = scanpy.pp.highly_variable_genes(adata, n_top_genes=n_top, inplace=False)
    return set(adata.var_names[ranking["highly_variable"].to_numpy()])


@pytest.mark.parametrize("n_top", [1, 20, 75])
def test_the_hvg_panel_is_the_union_of_what_scanpy_flags_in_each_section(n_top):
    adatas = {f"S{seed}": prepared(random_section(seed)) for seed in (1, 2, 3)}
    flags = {name: scanpy_flags(adata, n_top) for name, adata in adatas.items()}
    panel = choose_panel("hvg", {name: adata.var for name, adata in adatas.items()}, n_top)
    assert set(panel.index) == set.union(*flags.values())
    assert len(panel) > n_top
    for name, flagged in flags.items():
        assert set(panel.index[panel[f"rank_{name}"] <= n_top]) == flagged


@pytest.mark.parametrize("n_top", [1, 20, 75])
def test_the_heg_panel_is_the_union_of_each_sections_highest_means_of_genes_present_everywhere(n_top):
    adatas = {f"S{seed}": prepared(random_section(seed)) for seed in (1, 2, 3)}
    panel = choose_panel("heg", {name: adata.var for name, adata in adatas.items()}, n_top)
    dense = {name: adata.X.toarray().astype(float) for name, adata in adatas.items()}
    everywhere = [g for g in range(300) if all(x[:, g].any() for x in dense.values())]
    expected = set()
    for x in dense.values():
        expected |= set(sorted(everywhere, key=lambda g: -x[:, g].mean())[:n_top])
    assert list(panel.index) == [f"ENS{g:04}" for g in sorted(expected)]


def test_a_panel_of_all_genes_holds_every_gene_that_has_a_dispersion():
    adata = prepared(random_section(1))
    panel = choose_panel("hvg", {"S1": adata.var}, 1000)
    assert set(panel.index) == set(adata.var_names[adata.var["dispersion"].notna()])


def test_ranks_count_from_one_over_the_candidates_and_symbols_travel_along():
    genes = tables(A={"G1": (5, 0.1, 9), "G2": (4, 0.9, 9), "G3": (3, 0.5, 9), "G4": (9, 9.0, 0)},
                   B={"G1": (1, 0.3, 2), "G2": (2, 0.2, 2), "G3": (8, 0.1, 2), "G4": (9, 0.9, 3)})
    panel = choose_panel("heg", genes, 1)
    assert panel.to_dict("index") == {"G1": {"symbol": "g1", "rank_A": 1, "rank_B": 3},
                                      "G3": {"symbol": "g3", "rank_A": 3, "rank_B": 1}}
    assert panel.index.name == "gene_id"
    panel = choose_panel("hvg", genes, 1)  # also ranks genes that one section lacks
    assert panel.to_dict("index") == {"G4": {"symbol": "g4", "rank_A": 1, "rank_B": 1}}


def test_a_gene_without_dispersion_ranks_last_and_is_never_chosen():
    genes = tables(A={"G1": (5, np.nan, 9), "G2": (4, -0.9, 9)}, B={"G1": (5, 0.3, 9), "G2": (4, np.nan, 9)})
    panel = choose_panel("hvg", genes, 2)
    assert panel[["rank_A", "rank_B"]].to_dict("index") == {"G1": {"rank_A": 2, "rank_B": 1},
                                                            "G2": {"rank_A": 1, "rank_B": 2}}
    assert choose_panel("hvg", {"A": genes["A"]}, 2).index.tolist() == ["G2"]


def test_the_query_is_asked_for_its_gene_names_and_for_nothing_else():
    genes = tables(A={"G1": (1, 1, 5), "G2": (2, 2, 5), "G3": (3, 3, 5)})
    for panel_type in ("hvg", "heg"):
        assert choose_panel(panel_type, genes, 1).index.tolist() == ["G3"]
        panel = choose_panel(panel_type, genes, 1, present_in=[pd.Index(["G2", "G9", "G1"])])
        assert panel.index.tolist() == ["G2"]
        assert panel.columns.tolist() == ["symbol", "rank_A"]


def test_the_panel_keeps_the_first_sections_gene_order_and_pairs_the_others_by_id():
    genes = tables(A={"G3": (3, 3, 5), "G1": (1, 1, 5), "G2": (2, 2, 5)},
                   B={"G1": (10, 10, 5), "G9": (99, 99, 5), "G2": (30, 30, 5), "G3": (20, 20, 5)})
    for panel_type in ("hvg", "heg"):
        panel = choose_panel(panel_type, genes, 2)
        assert panel.to_dict("index") == {"G3": {"symbol": "g3", "rank_A": 1, "rank_B": 2},
                                          "G2": {"symbol": "g2", "rank_A": 2, "rank_B": 1}}


@pytest.mark.parametrize("other", ["G9", "G1"])
def test_an_empty_panel_is_an_error_that_names_the_sections(other):
    genes = tables(A={"G1": (1, 1, 5)}, B={other: (1, 1, 0)})  # no common gene, or one that B does not express
    with pytest.raises(InputError, match="heg panel of A, B is empty"):
        choose_panel("heg", genes, 5)


def test_flags_equal_scanpys_on_real_sections(real_data):
    folder = real_data("MOB") / "inst" / "extdata" / "counts"
    for name in ("MOB1", "MOB3"):
        adata = sources.read_counts(folder / f"{name}.tsv")
        adata = prepared(adata[np.asarray(adata.X.sum(axis=1)).ravel() >= 100].copy())
        panel = choose_panel("hvg", {name: adata.var}, 500)
        assert set(panel.index) == scanpy_flags(adata, 500)
        assert len(panel) == 500


# ------------------------------------------------------------------------------ Harmony


def shifted_sections(sizes=(90, 60, 80), genes=30, seed=0):
    """Two kinds of tissue in every section, and a shift of every gene that only its section has."""
    rng = np.random.default_rng(seed)
    kinds = rng.normal(3, 1.5, (2, genes))
    return {name: (kinds[np.arange(n) % 2] + rng.normal(0, 0.3, (n, genes)) + rng.normal(0, 0.6, genes))
            .astype(np.float32) for name, n in zip(("third", "first", "second"), sizes, strict=True)}


def spread_of_means(matrices):
    return np.stack([matrix.mean(axis=0) for matrix in matrices.values()]).std(axis=0).mean()


def test_harmony_removes_the_shift_between_sections_and_keeps_the_tissue():
    before = shifted_sections()
    after = harmonise(before)
    assert spread_of_means(after) < 0.3 * spread_of_means(before)
    for name, matrix in after.items():  # the rows are still the same spots: even and odd ones differ as they did
        def contrast(x):
            return x[::2].mean(axis=0) - x[1::2].mean(axis=0)

        assert np.corrcoef(contrast(matrix), contrast(before[name]))[0, 1] > 0.98


def test_harmony_keeps_the_sections_their_order_and_their_shapes():
    before = shifted_sections()
    after = harmonise(before)
    assert list(after) == list(before)
    assert [matrix.shape for matrix in after.values()] == [matrix.shape for matrix in before.values()]
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
