"""Each vectorised score against its slow, obvious definition, one gene at a time, and against sums done by hand."""

import warnings

import numpy as np
import pytest
import scipy.stats

from heclip.metrics import (
    HIT_AT,
    TOP_GENES,
    hit_at_k,
    js_per_gene,
    mean_defined,
    pearson_per_gene,
    rank_genes,
    rmse_per_gene,
    score,
    ssim_per_gene,
    standardise,
)
from heclip.retrieval import average_expression, random_spots

NAN = float("nan")


# ------------------------------------------------------------------------------ the slow definitions


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
        return np.array([slow(p, t) for p, t in zip(prediction.T.astype(float), truth.T.astype(float), strict=True)])


def expression_pair(n=60, genes=40, seed=0):
    """A prediction and a truth like log-normalised expression, with constant and empty genes among them."""
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
    np.testing.assert_allclose(fast(prediction, truth), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("fast", "slow"), FAST_AND_SLOW)
def test_each_score_equals_its_slow_definition_where_values_lie_below_zero(fast, slow):
    prediction, truth = expression_pair(seed=1)  # as Harmony leaves them
    prediction, truth = prediction - 0.2, truth - 0.1
    np.testing.assert_allclose(fast(prediction, truth), gene_by_gene(slow, prediction, truth), rtol=0, atol=1e-10)


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
    (js_per_gene, (1, 1), (1, 0), 0.5 * np.log(1 / 0.75) + 0.25 * np.log(0.5 / 0.75) + 0.25 * np.log(0.5 / 0.25)),
    (js_per_gene, (0, 0), (1, 0), NAN),
    (js_per_gene, (2, -1), (1, 0), NAN),
])
def test_scores_of_two_or_three_spots_are_those_worked_out_by_hand(fast, prediction, truth, expected):
    # The published 1e-10 in the Jensen-Shannon divergence moves the hand's numbers by some 1e-8.
    np.testing.assert_allclose(fast(column(*prediction), column(*truth)), [expected], rtol=0, atol=1e-8)


@pytest.mark.parametrize(("fast", "perfect"), [(pearson_per_gene, 1), (ssim_per_gene, 1), (rmse_per_gene, 0),
                                               (js_per_gene, 0)])
def test_a_perfect_prediction_has_the_perfect_score_in_every_varying_gene(fast, perfect):
    _, truth = expression_pair()
    varying = truth.std(axis=0) > 1e-9
    np.testing.assert_allclose(fast(truth, truth)[varying], perfect, rtol=0, atol=1e-12)


def test_pearson_does_not_change_when_a_gene_is_scaled_and_shifted():
    prediction, truth = expression_pair()
    rng = np.random.default_rng(2)
    scale, shift = rng.uniform(0.1, 30, truth.shape[1]), rng.normal(0, 5, truth.shape[1])
    np.testing.assert_allclose(pearson_per_gene(prediction * scale + shift, truth),
                               pearson_per_gene(prediction, truth), rtol=0, atol=1e-10)
    np.testing.assert_allclose(pearson_per_gene(-prediction, truth), -pearson_per_gene(prediction, truth), atol=1e-12)


def test_rmse_says_nothing_that_pearson_does_not():
    prediction, truth = expression_pair()
    pearson = pearson_per_gene(prediction, truth)
    np.testing.assert_allclose(rmse_per_gene(prediction, truth), np.sqrt(2 - 2 * pearson), rtol=0, atol=1e-10)


@pytest.mark.parametrize("fast", [pearson_per_gene, rmse_per_gene, ssim_per_gene, js_per_gene])
def test_a_gene_keeps_its_place_and_its_score_whatever_stands_beside_it(fast):
    prediction, truth = expression_pair()
    order = np.random.default_rng(3).permutation(truth.shape[1])
    np.testing.assert_allclose(fast(prediction[:, order], truth[:, order]), fast(prediction, truth)[order], rtol=1e-12)
    np.testing.assert_allclose(fast(prediction[:, 5:6], truth[:, 5:6]), fast(prediction, truth)[5:6], rtol=1e-12)


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
    np.testing.assert_allclose(pearson_per_gene(prediction, truth), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 1e6 + 0.1, -0.7])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_constant_gene_is_undefined_though_rounding_moves_its_mean(value, dtype):
    constant = np.full((37, 1), value, dtype)
    varying = np.random.default_rng(5).random((37, 1))
    assert np.isnan(standardise(constant)).all()
    assert np.isnan(pearson_per_gene(constant, varying)).all()
    assert np.isnan(pearson_per_gene(varying, constant)).all()


def test_a_gene_that_varies_in_its_last_bit_only_is_still_defined():
    low = np.float32(0.1)
    gene = np.array([low, np.nextafter(low, np.float32(1))] * 20)[:, None]
    np.testing.assert_allclose(pearson_per_gene(gene, gene), 1, atol=1e-6)
    np.testing.assert_allclose(pearson_per_gene(gene, np.tile([[0.0], [5.0]], (20, 1))), 1, atol=1e-6)


def test_a_gene_constant_over_the_reference_is_predicted_as_constant_to_the_last_bit():
    reference = np.full((300, 3), [0.1, 1 / 3, 2.7], np.float32)
    predicted = average_expression(random_spots(80, 300, 50, seed=0), reference)
    assert np.isnan(pearson_per_gene(predicted, np.random.default_rng(6).random((80, 3)))).all()


# ------------------------------------------------------------------------------ per spot


@pytest.mark.parametrize("k", [*HIT_AT, 40, 100])
def test_hit_at_k_equals_the_intersection_of_sets_with_ties_to_the_lower_index(k):
    prediction, truth = (np.round(x, 1) for x in expression_pair(seed=7))  # rounding makes many ties
    assert hit_at_k(prediction, truth, k) == pytest.approx(slow_hit(prediction, truth, k), abs=1e-12)


@pytest.mark.parametrize(("k", "expected"), [(1, 1 / 3), (2, 2 / 3), (3, 1), (9, 1)])
def test_hit_at_k_of_three_spots_is_the_one_counted_by_hand(k, expected):
    truth = [[9, 5, 1, 0], [9, 5, 1, 0], [9, 5, 1, 0]]
    prediction = [[3, 2, 1, 0],  # the same first gene
                  [2, 0, 3, 1],  # gene 0 comes second
                  [0, 1, 2, 3]]  # gene 1 comes third
    assert hit_at_k(np.array(prediction), np.array(truth), k) == pytest.approx(expected)


# ------------------------------------------------------------------------------ ranking and summary


def test_genes_are_ranked_by_sum_and_by_variance_of_the_expression_that_is_given():
    expression = np.array([[5, 0, 1, 2], [5, 8, 2, 2], [5, 1, 3, 2]])  # sums 15, 9, 6, 6; genes 0 and 3 do not vary
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
    np.testing.assert_allclose(per_gene["Pearson"], slow, atol=1e-10)


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
    expected = {name: np.nanmean(gene_by_gene(one, prediction, truth)) for name, one in slow.items()}
    expected |= {f"Hit@{k}": slow_hit(prediction, truth, k) for k in HIT_AT}
    assert per_gene.keys() == slow.keys()
    for name, value in expected.items():
        assert summary[name] == pytest.approx(value, abs=1e-10), name
    assert summary["undefined genes"] == 7
    assert summary.keys() == {*expected, "undefined genes",
                              *(f"{label}-{n}" for label in ("HEG", "HVG") for n in TOP_GENES)}


def test_the_mean_over_genes_is_nan_only_where_no_gene_is_defined():
    assert mean_defined(np.array([NAN, 1, 3])) == 2
    assert np.isnan(mean_defined(np.array([NAN, NAN])))
    assert np.isnan(mean_defined(np.array([])))
