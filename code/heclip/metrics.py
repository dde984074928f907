"""Every number in a results table. Arrays are spots x genes; all genes are computed at once.

Per-gene scores keep every gene in its place; where a score is undefined (a gene that is constant over the spots) it
is NaN. First the published scores (Li et al., Nat Methods 19 (2022), as the published HECLIP uses them: `score`), then
those that say what they leave out (`score_further`), then the two things a score should stand beside: how certain it
is (`bootstrap`) and how high it could be (`halves`).
"""

import numpy as np
import scipy.sparse
from scipy.ndimage import uniform_filter
from scipy.stats import rankdata

from .spots import array_of, neighbours, pitch, staggered

TOP_GENES = (1, 3, 5, 10, 50, 100)
HIT_AT = (1, 2, 3, 4, 5)
BLOCK = 256  # genes scored at a time: more would leave the processor's cache


def standardise(x):
    """z-scores over spots, (n, G); a constant gene becomes NaN."""
    x = np.asarray(x, np.float64)
    centred = x - x.mean(axis=0)
    deviation = np.sqrt((centred**2).mean(axis=0))
    constant = x.max(axis=0) == x.min(axis=0)  # rounding leaves a deviation of 1e-17
    return centred / np.where(constant, np.nan, deviation)


def pearson_per_gene(prediction, truth):
    """Pearson correlation over spots: (n, G), (n, G) -> (G,), -1 to 1."""
    return (standardise(prediction) * standardise(truth)).mean(axis=0)


def rmse_per_gene(prediction, truth):
    """Root mean squared difference of z-scores, as published: sqrt(2 - 2 Pearson), so nothing of its own. (G,)."""
    return np.sqrt(((standardise(prediction) - standardise(truth)) ** 2).mean(axis=0))


def ssim_per_gene(prediction, truth):
    """Structural similarity in its published global form: one window over all spots, L = 1. (G,).

    Each vector is first divided by its maximum; a gene whose maximum is zero is undefined.
    """
    p, t = (scale_to_maximum(x) for x in (prediction, truth))
    c1, c2 = 0.01**2, 0.03**2
    c3 = c2 / 2
    mean_p, mean_t = p.mean(axis=0), t.mean(axis=0)
    sd_p, sd_t = p.std(axis=0), t.std(axis=0)
    covariance = ((p - mean_p) * (t - mean_t)).mean(axis=0)
    luminance = (2 * mean_p * mean_t + c1) / (mean_p**2 + mean_t**2 + c1)
    contrast = (2 * sd_p * sd_t + c2) / (sd_p**2 + sd_t**2 + c2)
    structure = (covariance + c3) / (sd_p * sd_t + c3)
    return luminance * contrast * structure


def scale_to_maximum(x):
    """Divide each gene by its maximum over spots; NaN where that is zero."""
    x = np.asarray(x, np.float64)
    top = x.max(axis=0)
    return x / np.where(top == 0, np.nan, top)


def js_per_gene(prediction, truth):
    """Jensen-Shannon divergence over spots, in nats: 0 (equal) to ln 2. (G,).

    Each vector is divided by its sum, 1e-10 is added, and both are normalised again. Undefined where a sum is zero or
    a value is below zero (Harmony-corrected expression can be).
    """
    p, t = (share(x) for x in (prediction, truth))
    middle = (p + t) / 2
    return 0.5 * (t * np.log(t / middle)).sum(axis=0) + 0.5 * (p * np.log(p / middle)).sum(axis=0)


def share(x):
    """Each gene's values as shares of its sum over spots; NaN where there are none."""
    x = np.asarray(x, np.float64)
    total = np.where((x.min(axis=0) < 0) | (x.sum(axis=0) == 0), np.nan, x.sum(axis=0))
    x = x / total + 1e-10
    return x / x.sum(axis=0)


def hit_at_k(prediction, truth, k):
    """Fraction of spots whose k highest predicted and k highest true genes share at least one. Ties: lower index.

    prediction, truth: (n, G). Returns 0 to 1.
    """
    return hits(prediction, truth, [k])[0]


def hits(prediction, truth, ks):
    """`hit_at_k` for several k, ranked once: (n, G), (n, G) -> a list of fractions, one for each of `ks`."""
    p, t = (highest_genes(x, max(ks)) for x in (prediction, truth))  # (n, k) each
    same = p[:, :, None] == t[:, None, :]
    return [float(same[:, :k, :k].any(axis=(1, 2)).mean()) for k in ks]


def highest_genes(x, k):
    """The k highest genes of each spot, highest first: (n, G) -> (n, min(k, G)). Far cheaper than sorting all."""
    x = np.array(x, dtype=np.result_type(x, np.float32))  # a copy, to strike out what has been found
    best = np.empty((len(x), min(k, x.shape[1])), np.int64)
    for place in range(best.shape[1]):
        best[:, place] = x.argmax(axis=1)
        x[np.arange(len(x)), best[:, place]] = -np.inf
    return best


def rank_genes(expression):
    """Gene orders for HEG-n and HVG-n, highest first: by sum and by variance over spots. Two arrays (G,)."""
    x = np.asarray(expression, np.float64)
    return np.argsort(-x.sum(axis=0), kind="stable"), np.argsort(-x.var(axis=0), kind="stable")


def score(prediction, truth, ranked_on):
    """All published scores of one prediction. ranked_on: expression (any spots x G) that ranks genes for HEG-n, HVG-n.

    Returns (per gene: name -> (G,), summary: name -> number). Means are over the genes where a score is defined.
    """
    scores = {"Pearson": pearson_per_gene, "SSIM": ssim_per_gene, "RMSE": rmse_per_gene, "JS": js_per_gene}
    blocks = [slice(start, start + BLOCK) for start in range(0, truth.shape[1], BLOCK)]
    per_gene = {name: np.concatenate([one(prediction[:, genes], truth[:, genes]) for genes in blocks])
                for name, one in scores.items()}
    summary = {name: mean_defined(values) for name, values in per_gene.items()}
    for label, order in zip(("HEG", "HVG"), rank_genes(ranked_on), strict=True):
        for n in TOP_GENES:
            summary[f"{label}-{n}"] = mean_defined(per_gene["Pearson"][order[:n]])
    summary |= {f"Hit@{k}": rate for k, rate in zip(HIT_AT, hits(prediction, truth, HIT_AT), strict=True)}
    summary["undefined genes"] = int(np.isnan(per_gene["Pearson"]).sum())
    return per_gene, summary


def mean_defined(values):
    """Mean of what is not NaN; NaN if nothing is."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


# ------------------------------------------------------------------------------- what the published scores leave out


def pearson_per_spot(prediction, truth):
    """Pearson correlation over genes: (n, G), (n, G) -> (n,). A mean profile scores high here: compare with its own."""
    return pearson_per_gene(np.asarray(prediction).T, np.asarray(truth).T)


def spearman_per_gene(prediction, truth):
    """Rank correlation over spots, ties sharing their mean rank: (G,)."""
    return pearson_per_gene(rankdata(prediction, axis=0), rankdata(truth, axis=0))


def error_per_gene(prediction, truth):
    """Root mean squared error in the units of the expression itself (log-normalised): (G,)."""
    return np.sqrt(((np.asarray(prediction, np.float64) - truth) ** 2).mean(axis=0))


def recall_at_k(prediction, truth, k):
    """Mean share of a spot's k highest true genes that are among its k highest predicted ones. 0 to 1."""
    p, t = highest_genes(prediction, k), highest_genes(truth, k)
    return float((p[:, :, None] == t[:, None, :]).any(axis=2).mean())


def morans_i(x, graph):
    """Spatial autocorrelation of each gene: (n, G), (n, n) weights -> (G,), about -1 to 1; NaN for a constant gene."""
    z = standardise(x)
    return (z * (graph @ z)).sum(axis=0) / graph.sum()


def windowed_ssim_per_gene(prediction, truth, array, window=7):
    """Structural similarity over windows of window x window spots on the lattice, mean over spots: (G,).

    Wang et al., IEEE Trans Image Process 13 (2004), uniform window, K1 = 0.01, K2 = 0.03, L the range of the gene's
    truth; a place without a spot does not count. Undefined where the truth is constant. Unlike the published global
    form it sees where on the tissue a gene is. array: (n, 2), array_row and array_col.
    """
    row, col = np.asarray(array).astype(int).T
    if staggered(array):  # every second column holds no spot
        col = col // 2
    row, col = row - row.min(), col - col.min()
    grid = np.zeros((row.max() + 1, col.max() + 1))
    grid[row, col] = 1
    weight = uniform_filter(grid, window, mode="constant")[row, col]

    def local_mean(values):
        plane = np.zeros(grid.shape)
        plane[row, col] = values
        return uniform_filter(plane, window, mode="constant")[row, col] / weight

    scores = np.full(truth.shape[1], np.nan)
    for gene in range(truth.shape[1]):  # a plane at a time: all of them would not fit
        p, t = (np.asarray(x[:, gene], np.float64) for x in (prediction, truth))
        reach = t.max() - t.min()
        if reach == 0:
            continue
        mean_p, mean_t = local_mean(p), local_mean(t)
        var_p, var_t = local_mean(p * p) - mean_p**2, local_mean(t * t) - mean_t**2
        covariance = local_mean(p * t) - mean_p * mean_t
        c1, c2 = (0.01 * reach) ** 2, (0.03 * reach) ** 2
        scores[gene] = ((2 * mean_p * mean_t + c1) * (2 * covariance + c2)
                        / ((mean_p**2 + mean_t**2 + c1) * (var_p + var_t + c2))).mean()
    return scores


def score_further(prediction, truth, spots, xy):
    """Scores beside the published ones: name -> number.

    spots: obs table; without array_row and array_col, or with placeholders in them, the windowed SSIM is left out.
    xy: (n, 2) centres.
    "Moran's I, r" is the correlation over genes of the autocorrelation predicted with the true one, "Moran's I, ratio"
    their ratio: above 1, the prediction is smoother than the tissue.
    """
    pearson = pearson_per_gene(prediction, truth)
    summary = {"Pearson, median": float(np.nanmedian(pearson)) if np.isfinite(pearson).any() else float("nan"),
               "Pearson per spot": mean_defined(pearson_per_spot(prediction, truth)),
               "Spearman": mean_defined(spearman_per_gene(prediction, truth)),
               "RMSE, log-normalised": float(error_per_gene(prediction, truth).mean())}
    array = array_of(spots)
    if array is not None:
        summary["SSIM, windows"] = mean_defined(windowed_ssim_per_gene(prediction, truth, array))
    graph = neighbours(xy)
    predicted, measured = morans_i(prediction, graph), morans_i(truth, graph)
    both = np.isfinite(predicted) & np.isfinite(measured)
    if both.sum() > 1:
        summary["Moran's I, r"] = float(pearson_per_gene(predicted[both, None], measured[both, None])[0])
        summary["Moran's I, ratio"] = float(predicted[both].mean() / measured[both].mean())
    return summary | {f"recall@{k}": recall_at_k(prediction, truth, k) for k in HIT_AT}


# --------------------------------------------------------------------------------- how certain, and how high at most


def bootstrap(prediction, truth, xy, genes, draws=500, seed=0):
    """95 % interval of the mean Pearson over `genes` (an index), by drawing blocks of tissue with replacement.

    Neighbouring spots resemble each other, so single spots are not independent draws; blocks of 5 x 5 pitches are,
    nearly. It tells the uncertainty within this section, not between sections. Returns (low, high), NaN for tissue of
    a single block.
    """
    if len(xy) < 2:
        return float("nan"), float("nan")
    corner = np.floor(np.asarray(xy) / (5 * pitch(xy))).astype(int)
    block = np.unique(corner, axis=0, return_inverse=True)[1].ravel()
    p, t = (standardise(x)[:, genes] for x in (prediction, truth))
    member = scipy.sparse.csr_matrix((np.ones(len(block)), (block, np.arange(len(block)))))
    sums = np.stack([member @ x for x in (np.ones_like(p), p, t, p * p, t * t, p * t)])  # (6, blocks, G)
    n_blocks = sums.shape[1]
    if n_blocks == 1:
        return float("nan"), float("nan")
    counts = np.random.default_rng(seed).multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks), size=draws)
    n, sum_p, sum_t, pp, tt, pt = np.einsum("db,sbg->sdg", counts, sums, optimize=True)
    vary_p, vary_t = n * pp - sum_p**2, n * tt - sum_t**2
    constant = (vary_p <= 1e-12 * n * pp) | (vary_t <= 1e-12 * n * tt)  # in the draw: rounding leaves no zero
    r = (n * pt - sum_p * sum_t) / np.sqrt(np.where(constant, np.nan, vary_p * vary_t))
    means = np.array([mean_defined(row) for row in r])
    means = means[~np.isnan(means)]
    return tuple(np.percentile(means, [2.5, 97.5])) if len(means) else (float("nan"), float("nan"))


def halves(counts, seed=0):
    """Split counts in two by binomial thinning: each molecule falls to either half by the toss of a coin.

    counts: (n, G) whole numbers, sparse. Returns two matrices of the same kind, independent measurements of the same
    tissue as far as counts are Poisson.
    """
    first = counts.tocsr().copy()
    first.data = np.random.default_rng(seed).binomial(first.data.astype(np.int64), 0.5).astype(first.data.dtype)
    return first, counts - first


def ceiling_per_gene(half, other):
    """The Pearson correlation that perfect knowledge of the tissue would reach with the whole measurement: (G,).

    half, other: the two halves' log-normalised expression, (n, G). With r their correlation, the whole has the
    reliability 2 r / (1 + r) (Spearman and Brown), and the noise-free expression correlates with it by the root of
    that. A gene whose halves do not agree has 0.
    """
    r = np.maximum(pearson_per_gene(half, other), 0)
    return np.sqrt(2 * r / (1 + r))
