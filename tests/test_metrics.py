"""Each vectorised score is compared with its slow, obvious definition, and with sums by hand."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse
import scipy.stats
from numpy.testing import assert_allclose

from heclip import metrics
from heclip.metrics import (
    HIT_AT,
    TOP_GENES,
    bootstrap,
    ceiling_per_gene,
    error_per_gene,
    halves,
    hit_at_k,
    js_per_gene,
    mean_defined,
    morans_i,
    pearson_per_gene,
    pearson_per_spot,
    rank_genes,
    recall_at_k,
    rmse_per_gene,
    score,
    score_further,
    spearman_per_gene,
    ssim_per_gene,
    standardise,
    windowed_ssim_per_gene,
)
from heclip.retrieval import average_expression, random_spots
from heclip.spots import neighbours

NAN = float("nan")


# ----------------------------------------------------------------------------- the slow definitions


def slow_pearson(p, t):
    return scipy.stats.pearsonr(p, t).statistic


def slow_rmse(p, t):
    if len(set(p)) == 1 or len(set(t)) == 1:  # scipy's zscore takes rounding for a deviation
        return NAN
    return np.sqrt(np.mean((scipy.stats.zscore(p) - scipy.stats.zscore(t)) ** 2))


def slow_ssim(p, t):
    if p.max() == 0 or t.max() == 0:
        return NAN
    p, t = p / p.max(), t / t.max()
    c1, c2 = 0.01**2, 0.03**2
    c3 = c2 / 2
    sd_p, sd_t = np.sqrt(np.mean((p - p.mean()) ** 2)), np.sqrt(np.mean((t - t.mean()) ** 2))
    covariance = np.mean((p - p.mean()) * (t - t.mean()))
    luminance = (2 * p.mean() * t.mean() + c1) / (p.mean() ** 2 + t.mean() ** 2 + c1)
    contrast = (2 * sd_p * sd_t + c2) / (sd_p**2 + sd_t**2 + c2)
    structure = (covariance + c3) / (sd_p * sd_t + c3)
    return luminance * contrast * structure


def slow_js(p, t):
    if (p < 0).any() or (t < 0).any() or p.sum() == 0 or t.sum() == 0:
        return NAN
    p, t = p / p.sum() + 1e-10, t / t.sum() + 1e-10
    middle = (p + t) / 2
    return 0.5 * scipy.stats.entropy(t, middle) + 0.5 * scipy.stats.entropy(p, middle)


def slow_hit(prediction, truth, k):
    def top(row):
        return set(sorted(range(len(row)), key=lambda gene: (-row[gene], gene))[:k])

    return sum(bool(top(p) & top(t)) for p, t in zip(prediction, truth, strict=True)) / len(truth)


FAST_AND_SLOW = [
    pytest.param(pearson_per_gene, slow_pearson, id="pearson"),
    pytest.param(rmse_per_gene, slow_rmse, id="rmse"),
    pytest.param(ssim_per_gene, slow_ssim, id="ssim"),
    pytest.param(js_per_gene, slow_js, id="js"),
]


def gene_by_gene(slow, prediction, truth):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of constant genes, and gives NaN
        pairs = zip(prediction.T.astype(float), truth.T.astype(float), strict=True)
        return np.array([slow(p, t) for p, t in pairs])


def expression_pair(n=60, genes=40, seed=0):
    """A prediction and a truth like log-normalised expression, some genes constant or empty."""
    rng = np.random.default_rng(seed)
    truth = np.log1p(rng.poisson(rng.gamma(1, 2, genes), (n, genes)))
    prediction = np.abs(0.5 * truth + rng.normal(0.3, 0.4, (n, genes)))
    truth[:, 3] = 0.0
    truth[:, 7] = 0.1  # its mean is not exactly 0.1
    prediction[:, 11] = 0.0
    prediction[:, 13] = 1 / 3
    truth[:, 17], prediction[:, 17] = 0.0, 0.0
    truth[:, 19], prediction[:, 19] = 0.7, 0.7
    truth[:, 23], prediction[:, 23] = 0.0, 2.5
    return prediction, truth


def column(*values):
    return np.array(values, float)[:, None]


# ------------------------------------------------------------------------------ per gene


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("fast", "slow"), FAST_AND_SLOW)
def test_each_score_equals_its_slow_definition(fast, slow, dtype):
    prediction, truth = (x.astype(dtype) for x in expression_pair())
    expected = gene_by_gene(slow, prediction, truth)
    assert np.isnan(expected).any()
    assert not np.isnan(expected).all()
    assert_allclose(fast(prediction, truth), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("fast", "slow"), FAST_AND_SLOW)
def test_each_score_equals_its_slow_definition_where_values_lie_below_zero(fast, slow):
    prediction, truth = expression_pair(seed=1)  # as Harmony leaves them
    prediction, truth = prediction - 0.2, truth - 0.1
    expected = gene_by_gene(slow, prediction, truth)
    assert_allclose(fast(prediction, truth), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("fast", "prediction", "truth", "expected"), [
    (pearson_per_gene, (1, 2), (5, 9), 1),
    (pearson_per_gene, (1, 2), (9, 5), -1),
    (pearson_per_gene, (0, 0, 3), (0, 3, 0), -0.5),
    (pearson_per_gene, (1, 2, 3), (1, 3, 2), 0.5),
    (pearson_per_gene, (1, 1, 1), (1, 3, 2), NAN),
    (pearson_per_gene, (1, 3, 2), (0, 0, 0), NAN),
    (rmse_per_gene, (1, 2), (9, 5), 2),
    (rmse_per_gene, (0, 0, 3), (0, 3, 0), 3**0.5),
    (rmse_per_gene, (1, 3, 2), (4, 4, 4), NAN),
    (ssim_per_gene, (1, 2, 3), (2, 4, 6), 1),  # each is divided by its own maximum
    (ssim_per_gene, (0, 1), (1, 0), -0.24955 / 0.25045),
    # 1, 1 has mean 1 and no deviation; 0, 1 has mean and deviation 1/2
    (ssim_per_gene, (1, 1), (0, 1), (1.0001 / 1.2501) * (0.0009 / 0.2509) * 1),
    (ssim_per_gene, (0, 0), (0, 1), NAN),
    (js_per_gene, (1, 3), (2, 6), 0),
    (js_per_gene, (1, 0), (0, 1), np.log(2)),
    (js_per_gene, (1, 1), (1, 0),
     0.5 * np.log(1 / 0.75) + 0.25 * np.log(0.5 / 0.75) + 0.25 * np.log(0.5 / 0.25)),
    (js_per_gene, (0, 0), (1, 0), NAN),
    (js_per_gene, (2, -1), (1, 0), NAN),
])
def test_scores_of_two_or_three_spots_are_those_worked_out_by_hand(fast, prediction, truth,
                                                                   expected):
    # The published 1e-10 in the Jensen-Shannon divergence moves the hand's numbers by some 1e-8.
    assert_allclose(fast(column(*prediction), column(*truth)), [expected], rtol=0, atol=1e-8)


@pytest.mark.parametrize(("fast", "perfect"), [
    (pearson_per_gene, 1),
    (ssim_per_gene, 1),
    (rmse_per_gene, 0),
    (js_per_gene, 0),
])
def test_a_perfect_prediction_has_the_perfect_score_in_every_varying_gene(fast, perfect):
    _, truth = expression_pair()
    varying = truth.std(axis=0) > 1e-9
    assert_allclose(fast(truth, truth)[varying], perfect, rtol=0, atol=1e-12)


def test_pearson_does_not_change_when_a_gene_is_scaled_and_shifted():
    prediction, truth = expression_pair()
    rng = np.random.default_rng(2)
    scale, shift = rng.uniform(0.1, 30, truth.shape[1]), rng.normal(0, 5, truth.shape[1])
    assert_allclose(pearson_per_gene(prediction * scale + shift, truth),
                    pearson_per_gene(prediction, truth), rtol=0, atol=1e-10)
    assert_allclose(pearson_per_gene(-prediction, truth), -pearson_per_gene(prediction, truth),
                    atol=1e-12)


def test_rmse_says_nothing_that_pearson_does_not():
    prediction, truth = expression_pair()
    pearson = pearson_per_gene(prediction, truth)
    assert_allclose(rmse_per_gene(prediction, truth), np.sqrt(2 - 2 * pearson), rtol=0, atol=1e-10)


@pytest.mark.parametrize("fast", [pearson_per_gene, rmse_per_gene, ssim_per_gene, js_per_gene])
def test_a_gene_keeps_its_place_and_its_score_whatever_is_next_to_it(fast):
    prediction, truth = expression_pair()
    order = np.random.default_rng(3).permutation(truth.shape[1])
    together = fast(prediction, truth)
    assert_allclose(fast(prediction[:, order], truth[:, order]), together[order], rtol=1e-12)
    assert_allclose(fast(prediction[:, 5:6], truth[:, 5:6]), together[5:6], rtol=1e-12)


@pytest.mark.parametrize("fast", [pearson_per_gene, rmse_per_gene, ssim_per_gene, js_per_gene])
def test_scores_do_not_change_their_arguments(fast):
    prediction, truth = expression_pair()
    before = prediction.copy(), truth.copy()
    fast(prediction, truth)
    np.testing.assert_array_equal((prediction, truth), before)


def test_pearson_of_float32_with_a_large_offset_is_as_accurate_as_of_float64():
    rng = np.random.default_rng(4)
    truth = (rng.normal(0, 1, (500, 6)) + 1e4).astype(np.float32)
    prediction = (truth + rng.normal(0, 1, truth.shape)).astype(np.float32)
    expected = gene_by_gene(slow_pearson, prediction, truth)
    assert_allclose(pearson_per_gene(prediction, truth), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 1e6 + 0.1, -0.7])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_constant_gene_is_undefined_though_rounding_moves_its_mean(value, dtype):
    constant = np.full((37, 1), value, dtype)
    varying = np.random.default_rng(5).random((37, 1))
    assert np.isnan(standardise(constant)).all()
    assert np.isnan(pearson_per_gene(constant, varying)).all()
    assert np.isnan(pearson_per_gene(varying, constant)).all()


@pytest.mark.parametrize(("n", "dtype"), [(60, np.float32), (3000, np.float32), (60, np.float64)])
def test_a_gene_that_is_constant_to_rounding_is_undefined(n, dtype):
    """The mean of all reference spots, summed in another order for each query spot."""
    rng = np.random.default_rng(3)
    reference = np.log1p(rng.poisson(1, (n, 4))).astype(dtype)
    order = np.stack([rng.permutation(n) for _ in range(30)])
    predicted = average_expression(order, reference)
    assert (predicted.max(axis=0) > predicted.min(axis=0)).any()
    assert np.isnan(pearson_per_gene(predicted, rng.random((30, 4)))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_gene_that_varies_by_more_than_rounding_is_defined(dtype):
    gene = (1 + 1e-3 * np.random.default_rng(0).random((40, 1))).astype(dtype)
    assert_allclose(pearson_per_gene(gene, gene), 1, atol=1e-6)


def test_a_gene_constant_over_the_reference_is_predicted_as_constant_to_the_last_bit():
    reference = np.full((300, 3), [0.1, 1 / 3, 2.7], np.float32)
    predicted = average_expression(random_spots(80, 300, 50, seed=0), reference)
    assert np.isnan(pearson_per_gene(predicted, np.random.default_rng(6).random((80, 3)))).all()


# ------------------------------------------------------------------------------ per spot


@pytest.mark.parametrize("k", [*HIT_AT, 40, 100])
def test_hit_at_k_equals_the_intersection_of_sets_with_ties_to_the_lower_index(k):
    pair = expression_pair(seed=7)
    prediction, truth = (np.round(x, 1) for x in pair)  # rounding makes many ties
    expected = slow_hit(prediction, truth, k)
    assert hit_at_k(prediction, truth, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("k", "expected"), [(1, 1 / 3), (2, 2 / 3), (3, 1), (9, 1)])
def test_hit_at_k_of_three_spots_is_the_one_counted_by_hand(k, expected):
    truth = [[9, 5, 1, 0], [9, 5, 1, 0], [9, 5, 1, 0]]
    prediction = [[3, 2, 1, 0],  # the same first gene
                  [2, 0, 3, 1],  # gene 0 comes second
                  [0, 1, 2, 3]]  # gene 1 comes third
    assert hit_at_k(np.array(prediction), np.array(truth), k) == pytest.approx(expected)


# ------------------------------------------------------------------------------ ranking and summary


def test_genes_are_ranked_by_sum_and_by_variance_of_the_expression_that_is_given():
    # Sums 15, 9, 6, 6. Genes 0 and 3 do not vary.
    expression = np.array([[5, 0, 1, 2], [5, 8, 2, 2], [5, 1, 3, 2]])
    by_sum, by_variance = rank_genes(expression)
    assert by_sum.tolist() == [0, 1, 2, 3]
    assert by_variance.tolist() == [1, 2, 0, 3]


def test_heg_and_hvg_are_means_over_the_top_genes_of_the_ranking_expression_not_of_the_truth():
    prediction, truth = expression_pair(genes=70)
    ranked_on = np.random.default_rng(8).gamma(1, 1, (25, 70)) * np.random.default_rng(9).random(70)
    per_gene, summary = score(prediction, truth, ranked_on)
    slow = gene_by_gene(slow_pearson, prediction, truth)
    for label, value in (("HEG", ranked_on.sum(0)), ("HVG", ranked_on.var(0))):
        order = sorted(range(70), key=lambda gene: -value[gene])
        for n in TOP_GENES:  # 100 of them are more than there are
            assert summary[f"{label}-{n}"] == pytest.approx(np.nanmean(slow[order[:n]]), abs=1e-10)
    assert_allclose(per_gene["Pearson"], slow, atol=1e-10)


def test_a_constant_gene_inside_the_top_n_is_left_out_of_the_mean_and_moves_no_other():
    truth = np.array([[9.0, 1, 5], [9, 2, 4], [9, 3, 1], [9, 4, 2]])  # gene 0 leads and is constant
    prediction = np.array([[1.0, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4]])
    _, summary = score(prediction, truth, truth)
    slow = gene_by_gene(slow_pearson, prediction, truth)
    assert np.isnan(summary["HEG-1"])
    assert summary["HEG-3"] == pytest.approx((slow[1] + slow[2]) / 2)
    assert summary["HVG-1"] == pytest.approx(slow[2])  # variances 0, 1.25, 2.5
    assert summary["undefined genes"] == 1


def test_the_summary_holds_every_published_score_and_counts_undefined_genes():
    prediction, truth = expression_pair()
    per_gene, summary = score(prediction, truth, truth)
    slow = {"Pearson": slow_pearson, "SSIM": slow_ssim, "RMSE": slow_rmse, "JS": slow_js}
    expected = {name: np.nanmean(gene_by_gene(one, prediction, truth))
                for name, one in slow.items()}
    expected |= {f"Hit@{k}": slow_hit(prediction, truth, k) for k in HIT_AT}
    assert per_gene.keys() == slow.keys()
    for name, value in expected.items():
        assert summary[name] == pytest.approx(value, abs=1e-10), name
    assert summary["undefined genes"] == 7
    assert summary.keys() == {*expected, "undefined genes",
                              *(f"{label}-{n}" for label in ("HEG", "HVG") for n in TOP_GENES)}


def test_scoring_by_blocks_of_genes_keeps_every_gene_in_its_place(monkeypatch):
    prediction, truth = expression_pair()
    monkeypatch.setattr(metrics, "BLOCK", 7)
    assert truth.shape[1] > 2 * 7  # and the last block is not whole
    assert truth.shape[1] % 7
    per_gene, _ = score(prediction, truth, truth)
    slow = {"Pearson": slow_pearson, "SSIM": slow_ssim, "RMSE": slow_rmse, "JS": slow_js}
    for name, one in slow.items():
        assert_allclose(per_gene[name], gene_by_gene(one, prediction, truth), atol=1e-10)


def test_the_mean_over_genes_is_nan_only_where_no_gene_is_defined():
    assert mean_defined(np.array([NAN, 1, 3])) == 2
    assert np.isnan(mean_defined(np.array([NAN, NAN])))
    assert np.isnan(mean_defined(np.array([])))


# -------------------------------------------------------------- what the published scores leave out


def lattice(rows=12, columns=9, staggered=False):
    """array_row, array_col and centres (n, 2) of a lattice, shuffled, with some places empty."""
    rng = np.random.default_rng(rows)
    row, col = np.mgrid[:rows, :columns].reshape(2, -1)
    order = rng.permutation(len(row))[:len(row) * 5 // 6]
    row, col = row[order], col[order]
    if staggered:
        col = 2 * col + row % 2
        return row + 5, col + 3, np.column_stack([50 * col, 100 * 0.75**0.5 * row])
    return row + 3, col + 2, np.column_stack([100 * col, 100 * row]) + 7.0


def smooth_genes(xy, genes=5, seed=0):
    """A noisy prediction of a truth that varies smoothly over the tissue, and the truth: (n, G)."""
    rng = np.random.default_rng(seed)
    waves = np.sin(xy @ rng.normal(0, 0.006, (2, genes)) + rng.uniform(0, 6, genes)) + 1
    return waves + rng.normal(0, 0.3, waves.shape), waves + rng.normal(0, 0.2, waves.shape)


def slow_spearman(p, t):
    return scipy.stats.spearmanr(p, t).statistic


def test_spearman_equals_scipys_ties_and_constant_genes_included():
    prediction, truth = (np.round(x, 1) for x in expression_pair(seed=11))
    expected = gene_by_gene(slow_spearman, prediction, truth)
    assert np.isnan(expected).any()
    assert_allclose(spearman_per_gene(prediction, truth), expected, rtol=0, atol=1e-10)


def test_spearman_asks_for_the_order_alone():
    prediction, truth = expression_pair()
    assert_allclose(spearman_per_gene(np.exp(3 * prediction), truth),
                    spearman_per_gene(prediction, truth))
    assert_allclose(spearman_per_gene(column(1, 2, 900), column(3, 4, 5)), [1])
    # The ranks are 1.5, 1.5, 3 and 1, 2.5, 2.5.
    assert_allclose(spearman_per_gene(column(0, 0, 5), column(0, 7, 7)), [0.5])


def test_pearson_per_spot_is_that_of_its_row():
    prediction, truth = expression_pair()
    prediction[2] = 0.0  # a spot without a prediction
    expected = gene_by_gene(slow_pearson, prediction.T, truth.T)
    assert_allclose(pearson_per_spot(prediction, truth), expected, rtol=0, atol=1e-10)
    assert np.isnan(pearson_per_spot(prediction, truth)[2])


def test_the_error_is_in_the_units_of_the_expression():
    assert_allclose(error_per_gene(np.float32([[1, 5], [1, 2]]), np.float32([[4, 5], [5, 2]])),
                    [12.5**0.5, 0])
    prediction, truth = expression_pair()
    slow = []
    for p, t in zip(prediction.T, truth.T, strict=True):
        slow.append(np.sqrt(np.mean([(a - b) ** 2 for a, b in zip(p, t, strict=True)])))
    assert_allclose(error_per_gene(prediction, truth), slow)


def slow_recall(prediction, truth, k):
    def top(row):
        return set(sorted(range(len(row)), key=lambda gene: (-row[gene], gene))[:k])

    pairs = zip(prediction, truth, strict=True)
    return np.mean([len(top(p) & top(t)) / len(top(t)) for p, t in pairs])


@pytest.mark.parametrize("k", [1, 2, 5, 40, 100])  # there are 40 genes
def test_recall_at_k_is_the_share_of_the_true_top_that_was_found(k):
    prediction, truth = (np.round(x, 1) for x in expression_pair(seed=12))
    expected = slow_recall(prediction, truth, k)
    assert recall_at_k(prediction, truth, k) == pytest.approx(expected, abs=1e-12)


def test_recall_at_two_of_two_spots_counted_by_hand():
    truth = np.array([[9, 8, 1, 0], [9, 8, 1, 0]])
    prediction = np.array([[5, 1, 4, 0], [0, 1, 2, 3]])
    assert recall_at_k(prediction, truth, 2) == 0.25  # one of two, none of two
    assert recall_at_k(prediction, truth, 1) == 0.5


def slow_morans_i(x, graph):
    """n / W times the sum over pairs of w_ij z_i z_j, over the sum of squares."""
    z = x - x.mean()
    pairs = sum(graph[i, j] * z[i] * z[j] for i in range(len(x)) for j in range(len(x)))
    return len(x) / graph.sum() * pairs / (z**2).sum()


def test_morans_i_equals_its_formula_in_loops_and_scanpys():
    _, _, xy = lattice()
    xy = np.vstack([xy, [[9000, 9000]]])  # a spot without neighbours
    truth = smooth_genes(xy)[1]
    graph = neighbours(xy)
    assert graph.sum(axis=1).min() == 0
    values = morans_i(truth, graph)
    expected = [slow_morans_i(gene, graph.toarray()) for gene in truth.T]
    assert_allclose(values, expected, atol=1e-12)
    assert_allclose(values, scanpy.metrics.morans_i(graph, truth.T.copy()), atol=1e-10)
    assert values.min() > 0.2


def test_morans_i_of_a_chequered_and_a_constant_gene():
    chain = np.array([[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]])
    graph = scipy.sparse.csr_matrix(chain)
    values = morans_i(np.array([[0, 0.1, 0], [1, 0.1, 0], [0, 0.1, 1], [1, 0.1, 1]]), graph)
    assert_allclose(values, [-1, NAN, 1 / 3])


def slow_windowed_ssim(p, t, row, col, window=7):
    """The mean over spots of the structural similarity in the window around each spot."""
    c1, c2 = (0.01 * np.ptp(t)) ** 2, (0.03 * np.ptp(t)) ** 2
    values = []
    for i in range(len(t)):
        near = [j for j in range(len(t))
                if max(abs(row[i] - row[j]), abs(col[i] - col[j])) <= window // 2]
        a, b = p[near], t[near]
        covariance = np.mean((a - a.mean()) * (b - b.mean()))
        values.append((2 * a.mean() * b.mean() + c1) * (2 * covariance + c2)
                      / ((a.mean() ** 2 + b.mean() ** 2 + c1) * (a.var() + b.var() + c2)))
    return np.mean(values)


@pytest.mark.parametrize("window", [3, 7])
@pytest.mark.parametrize("staggered", [False, True])
def test_windowed_ssim_equals_a_loop_over_windows(staggered, window):
    row, col, xy = lattice(staggered=staggered)
    prediction, truth = smooth_genes(xy)
    prediction[:, 1] -= 2  # below zero too
    truth[:, 2] = 0.1
    values = windowed_ssim_per_gene(prediction, truth, np.column_stack([row, col]), window)
    place = col // 2 if staggered else col
    assert np.isnan(values[2])
    for gene in (0, 1, 3, 4):
        slow = slow_windowed_ssim(prediction[:, gene], truth[:, gene], row, place, window)
        assert values[gene] == pytest.approx(slow, abs=1e-10)


def test_windowed_ssim_is_one_for_the_truth_and_sees_where_a_gene_is():
    row, col, xy = lattice()
    _, truth = smooth_genes(xy)
    assert_allclose(windowed_ssim_per_gene(truth, truth, np.column_stack([row, col])), 1)
    # Both are shuffled in the same way, which does not change the global form.
    shuffled = np.random.default_rng(0).permutation(len(row))
    noisy = truth + np.random.default_rng(1).normal(0, 0.3, truth.shape)
    assert_allclose(ssim_per_gene(noisy[shuffled], truth[shuffled]), ssim_per_gene(noisy, truth))
    array = np.column_stack([row, col])
    apart = windowed_ssim_per_gene(noisy[shuffled], truth[shuffled], array)
    assert (np.abs(apart - windowed_ssim_per_gene(noisy, truth, array)) > 0.001).all()


def test_the_further_scores_are_those_of_their_functions():
    row, col, xy = lattice(staggered=True)
    prediction, truth = smooth_genes(xy, genes=6)
    truth[:, 4] = 0.3
    spots = pd.DataFrame({"array_row": row, "array_col": col})
    summary = score_further(prediction, truth, spots, xy)
    graph, varying = neighbours(xy).toarray(), [0, 1, 2, 3, 5]
    pearson = gene_by_gene(slow_pearson, prediction, truth)[varying]
    predicted = np.array([slow_morans_i(prediction[:, g], graph) for g in varying])
    measured = np.array([slow_morans_i(truth[:, g], graph) for g in varying])
    windowed = windowed_ssim_per_gene(prediction, truth, np.column_stack([row, col]))
    assert summary == pytest.approx({
        "Pearson, median": np.median(pearson),
        "Pearson per spot": gene_by_gene(slow_pearson, prediction.T, truth.T).mean(),
        "Spearman": gene_by_gene(slow_spearman, prediction, truth)[varying].mean(),
        "RMSE, log-normalised": np.sqrt(((prediction - truth) ** 2).mean(axis=0)).mean(),
        "SSIM, windows": windowed[varying].mean(),
        "Moran's I, r": slow_pearson(predicted, measured),
        "Moran's I, ratio": predicted.mean() / measured.mean(),
        **{f"recall@{k}": slow_recall(prediction, truth, k) for k in HIT_AT}}, abs=1e-10)
    without = score_further(prediction, truth, spots[["array_row"]], xy)
    assert without.keys() == summary.keys() - {"SSIM, windows"}
    unknown = score_further(prediction, truth, spots * 0 - 1, xy)  # all would lie in one window
    assert unknown == without


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("n", "genes"), [(1, 4), (2, 3), (2, 1)])
def test_a_section_of_one_or_two_spots_is_scored_without_a_crash(n, genes):
    rng = np.random.default_rng(n)
    prediction, truth = rng.random((2, n, genes))
    spots = pd.DataFrame({"array_row": [0, 1][:n], "array_col": [0, 1][:n]})
    xy = np.array([[5.0, 5.0], [105.0, 5.0]])[:n]
    summary = score_further(prediction, truth, spots, xy)
    assert np.isnan(summary["Spearman"]) == (n == 1)
    assert np.isnan(bootstrap(prediction, truth, xy, slice(None))).all()


# ---------------------------------------------------------------- how certain, and how high at most


def slow_bootstrap(prediction, truth, xy, genes, draws, seed):
    """The same draws of blocks, but every draw is laid out as spots and correlated gene by gene."""
    distance = np.linalg.norm(xy[:, None] - xy, axis=2) + np.diag([np.inf] * len(xy))
    side = 5 * np.median(distance.min(axis=1))
    names = [(int(x // side), int(y // side)) for x, y in xy]
    blocks = []
    for block in sorted(set(names)):
        blocks.append(np.flatnonzero([name == block for name in names]))
    equal = np.full(len(blocks), 1 / len(blocks))
    chosen = np.random.default_rng(seed).multinomial(len(blocks), equal, size=draws)
    means = []
    for counts in chosen:
        spots = np.concatenate([block for block, count in zip(blocks, counts, strict=True)
                                for _ in range(count)])
        p_drawn, t_drawn = prediction[spots][:, genes], truth[spots][:, genes]
        r = [slow_pearson(p, t) for p, t in zip(p_drawn.T, t_drawn.T, strict=True)
             if len(set(p)) > 1 and len(set(t)) > 1]
        means.append(np.mean(r) if r else NAN)
    return np.nanpercentile(means, [2.5, 97.5])


@pytest.mark.parametrize("genes", [slice(None), np.array([5, 0, 3]), np.array([3])])
def test_bootstrap_equals_resampling_spots_block_by_block(genes):
    _, _, xy = lattice(24, 18)
    prediction, truth = smooth_genes(xy, genes=6)
    truth[:, 1], prediction[:, 2] = 1 / 3, 0.1  # constant: left out
    truth[:, 3] = 0.7
    truth[5, 3] = 1.9  # constant in every draw without the block of spot 5
    fast = bootstrap(prediction, truth, xy, genes, draws=40, seed=3)
    assert_allclose(fast, slow_bootstrap(prediction, truth, xy, genes, 40, 3), rtol=0, atol=1e-9)
    assert fast == bootstrap(prediction, truth, xy, genes, draws=40, seed=3)


def test_the_interval_holds_the_score_and_is_narrower_for_more_tissue():
    widths = []
    for rows, columns in ((20, 20), (60, 60)):
        _, _, xy = lattice(rows, columns)
        prediction, truth = smooth_genes(xy, genes=8)
        low, high = bootstrap(prediction, truth, xy, slice(None))
        assert low < pearson_per_gene(prediction, truth).mean() < high
        widths.append(high - low)
    assert widths[1] < 0.6 * widths[0]


def test_a_prediction_that_is_constant_has_no_interval():
    _, _, xy = lattice(24, 18)
    _, truth = smooth_genes(xy)
    flat = np.tile(truth.mean(axis=0), (len(truth), 1)).astype(np.float32)
    assert np.isnan(bootstrap(flat, truth, xy, slice(None))).all()


@pytest.mark.parametrize("kind", [
    scipy.sparse.csr_matrix, scipy.sparse.csc_matrix, scipy.sparse.csr_array])
def test_halves_add_up_to_the_counts_and_leave_them_alone(kind):
    rng = np.random.default_rng(0)
    dense = rng.poisson(rng.gamma(0.5, 6, 40), (300, 40)).astype(np.float32)
    counts = kind(dense)
    first, second = halves(counts, seed=1)
    np.testing.assert_array_equal((first + second).toarray(), dense)
    np.testing.assert_array_equal(counts.toarray(), dense)
    for half in (first, second):
        values = half.toarray()
        assert half.dtype == np.float32
        assert (values >= 0).all()
        assert (values == np.rint(values)).all()
        assert values.sum() == pytest.approx(dense.sum() / 2, rel=0.02)
    # Given n molecules a half holds binomial(n, 1/2) of them, of variance n / 4.
    assert ((first.toarray() - dense / 2) ** 2).sum() == pytest.approx(dense.sum() / 4, rel=0.1)
    assert (halves(counts, seed=1)[0] != first).nnz == 0
    assert (halves(counts, seed=2)[0] != first).nnz > 0


def test_the_ceiling_is_what_the_noise_free_field_reaches():
    rng = np.random.default_rng(5)
    field = np.exp(rng.normal(0, 0.5, (6000, 12))) * np.geomspace(1, 30, 12)  # molecules expected
    counts = rng.poisson(field)
    parts = [half.toarray() for half in halves(scipy.sparse.csr_matrix(counts))]
    ceiling = ceiling_per_gene(*parts)
    reached = gene_by_gene(slow_pearson, field, counts)
    assert_allclose(ceiling, reached, rtol=0, atol=0.04)
    assert ceiling[0] < 0.6
    assert ceiling[-1] > 0.95
    logged = ceiling_per_gene(*map(np.log1p, parts))
    reached = gene_by_gene(slow_pearson, np.log1p(field), np.log1p(counts))
    assert_allclose(logged, reached, rtol=0, atol=0.06)


@pytest.mark.parametrize(("half", "other", "expected"), [
    ((1, 2, 3), (2, 4, 6), 1),
    ((1, 2, 3), (1, 3, 2), (2 * 0.5 / 1.5) ** 0.5),  # r = 1/2
    ((1, 2, 3), (3, 2, 1), 0),
    ((1, 2, 3), (0, 0, 0), NAN),
])
def test_the_ceiling_of_three_spots_is_that_of_spearman_and_brown(half, other, expected):
    assert_allclose(ceiling_per_gene(column(*half), column(*other)), [expected], atol=1e-7)
