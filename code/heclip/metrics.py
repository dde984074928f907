"""Every number in a results table. Arrays are spots x genes; all genes are computed at once.

Per-gene scores keep every gene in its place. A score that is undefined is NaN, as for a gene that
is constant over the spots. `score` computes the published scores (Li et al., Nat Methods 19 (2022),
as the published HECLIP uses them). `score_further` computes scores of what these leave out.
`bootstrap` says how certain a score is, and `halves` and `ceiling_per_gene` how high it could be.
"""

import numpy as np
import scipy.sparse
from scipy.ndimage import uniform_filter
from scipy.stats import rankdata

from .spots import array_of, neighbours, pitch, staggered

TOP_GENES = (1, 3, 5, 10, 50, 100)
HIT_AT = (1, 2, 3, 4, 5)
ROUNDING = 256  # times a number's precision: means of 5,000 spots in other orders differ by 40
BLOCK = 256  # genes scored at a time; more do not fit into the processor's cache


def standardise(x):
    """z-scores over spots: (n, G) -> float64 (n, G).

    A gene that is constant to rounding becomes NaN. Means of the same reference spots in different
    order are, for example; what then varies is rounding, and its correlation means nothing.
    """
    x = np.asarray(x)
    precision = ROUNDING * np.finfo(np.result_type(x, np.float32)).eps
    x = x.astype(np.float64, copy=False)
    centred = x - x.mean(axis=0)
    deviation = np.sqrt((centred**2).mean(axis=0))
    low, high = x.min(axis=0), x.max(axis=0)
    constant = high - low <= precision * np.maximum(np.abs(low), np.abs(high))
    return centred / np.where(constant, np.nan, deviation)


def pearson_per_gene(prediction, truth):
    """Pearson correlation over spots: (n, G), (n, G) -> (G,), -1 to 1."""
    return (standardise(prediction) * standardise(truth)).mean(axis=0)


def rmse_per_gene(prediction, truth):
    """Root mean squared difference of z-scores, as published: (n, G), (n, G) -> (G,).

    It equals sqrt(2 - 2 Pearson), so it adds nothing to the Pearson correlation.
    """
    return np.sqrt(((standardise(prediction) - standardise(truth)) ** 2).mean(axis=0))


def ssim_per_gene(prediction, truth):
    """Structural similarity in its published global form: (n, G), (n, G) -> (G,), -1 to 1.

    One window holds all spots, and L = 1. Each vector is first divided by its maximum. A gene whose
    maximum is zero is undefined.
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
    """Divide each gene by its maximum over spots, (n, G); NaN where the maximum is zero."""
    x = np.asarray(x, np.float64)
    top = x.max(axis=0)
    return x / np.where(top == 0, np.nan, top)


def js_per_gene(prediction, truth):
    """Jensen-Shannon divergence over spots, in nats: (n, G), (n, G) -> (G,), 0 (equal) to ln 2.

    Each vector is divided by its sum, 1e-10 is added, and both are normalised again. The divergence
    is undefined where a sum is zero or a value is below zero, which Harmony-corrected expression
    can be.
    """
    p, t = (share(x) for x in (prediction, truth))
    middle = (p + t) / 2
    return 0.5 * (t * np.log(t / middle)).sum(axis=0) + 0.5 * (p * np.log(p / middle)).sum(axis=0)


def share(x):
    """Each gene's values as shares of its sum over spots, (n, G); NaN where it is undefined.

    It is undefined if the sum is zero or a value is below zero.
    """
    x = np.asarray(x, np.float64)
    total = np.where((x.min(axis=0) < 0) | (x.sum(axis=0) == 0), np.nan, x.sum(axis=0))
    x = x / total + 1e-10
    return x / x.sum(axis=0)


def hit_at_k(prediction, truth, k):
    """Fraction of spots whose k highest predicted and k highest true genes share at least one.

    prediction, truth: (n, G). Of equal genes, the one with the lower index ranks first. Returns 0
    to 1.
    """
    return hits(prediction, truth, [k])[0]


def hits(prediction, truth, ks):
    """`hit_at_k` for several k, ranked once: (n, G), (n, G) -> one fraction for each of `ks`."""
    p, t = (highest_genes(x, max(ks)) for x in (prediction, truth))  # (n, k) each
    same = p[:, :, None] == t[:, None, :]
    return [float(same[:, :k, :k].any(axis=(1, 2)).mean()) for k in ks]


def highest_genes(x, k):
    """The indices of each spot's k highest genes, highest first: (n, G) -> int64 (n, min(k, G)).

    Of equal genes, the one with the lower index comes first. This is far cheaper than sorting all.
    """
    x = np.array(x, dtype=np.result_type(x, np.float32))  # a copy, where found genes become -inf
    best = np.empty((len(x), min(k, x.shape[1])), np.int64)
    for place in range(best.shape[1]):
        best[:, place] = x.argmax(axis=1)
        x[np.arange(len(x)), best[:, place]] = -np.inf
    return best


def rank_genes(expression):
    """Gene indices, highest first, by sum (for HEG-n) and by variance (for HVG-n) over spots.

    expression: (n, G). Returns two arrays (G,).
    """
    x = np.asarray(expression, np.float64)
    return np.argsort(-x.sum(axis=0), kind="stable"), np.argsort(-x.var(axis=0), kind="stable")


def score(prediction, truth, ranked_on):
    """All published scores of one prediction: (per gene: name -> (G,), summary: name -> number).

    prediction, truth: (n, G). ranked_on: the expression that ranks genes for HEG-n and HVG-n, (any
    number of spots, G). The summary's means are over the genes whose score is defined.
    """
    per_gene = {"Pearson": by_blocks(pearson_per_gene, prediction, truth),
                "SSIM": by_blocks(ssim_per_gene, prediction, truth),
                "RMSE": by_blocks(rmse_per_gene, prediction, truth),
                "JS": by_blocks(js_per_gene, prediction, truth)}
    summary = {name: mean_defined(values) for name, values in per_gene.items()}
    for label, order in zip(("HEG", "HVG"), rank_genes(ranked_on), strict=True):
        for n in TOP_GENES:
            summary[f"{label}-{n}"] = mean_defined(per_gene["Pearson"][order[:n]])
    rates = hits(prediction, truth, HIT_AT)
    summary |= {f"Hit@{k}": rate for k, rate in zip(HIT_AT, rates, strict=True)}
    summary["undefined genes"] = int(np.isnan(per_gene["Pearson"]).sum())
    return per_gene, summary


def by_blocks(per_gene, prediction, truth):
    """Call `per_gene(prediction, truth)` on BLOCK genes at a time: (n, G), (n, G) -> (G,)."""
    blocks = [slice(start, start + BLOCK) for start in range(0, truth.shape[1], BLOCK)]
    return np.concatenate([per_gene(prediction[:, genes], truth[:, genes]) for genes in blocks])


def mean_defined(values):
    """Mean of the values that are not NaN; NaN if all are."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


# -------------------------------------------------------------- what the published scores leave out


def pearson_per_spot(prediction, truth):
    """Pearson correlation over genes: (n, G), (n, G) -> (n,), -1 to 1.

    A mean profile scores high here, so compare with the score of the mean profile.
    """
    return pearson_per_gene(np.asarray(prediction).T, np.asarray(truth).T)


def spearman_per_gene(prediction, truth):
    """Rank correlation over spots: (n, G), (n, G) -> (G,). Equal values share their mean rank."""
    return pearson_per_gene(rankdata(prediction, axis=0), rankdata(truth, axis=0))


def error_per_gene(prediction, truth):
    """Root mean squared error in the units of the expression (log-normalised): (G,)."""
    return np.sqrt(((np.asarray(prediction, np.float64) - truth) ** 2).mean(axis=0))


def recall_at_k(prediction, truth, k):
    """Mean share of a spot's k highest true genes that are among its k highest predicted ones.

    prediction, truth: (n, G). Returns 0 to 1.
    """
    p, t = highest_genes(prediction, k), highest_genes(truth, k)
    return float((p[:, :, None] == t[:, None, :]).any(axis=2).mean())


def morans_i(x, graph):
    """Spatial autocorrelation of each gene: (n, G), (n, n) weights -> (G,), about -1 to 1.

    A constant gene is NaN.
    """
    z = standardise(x)
    return (z * (graph @ z)).sum(axis=0) / graph.sum()


def windowed_ssim_per_gene(prediction, truth, array, window=7):
    """Structural similarity in windows of window x window spots, mean over spots: (G,).

    Unlike the published global form, it depends on where in the tissue a gene is expressed. It is
    that of Wang et al., IEEE Trans Image Process 13 (2004), with a uniform window, K1 = 0.01, K2 =
    0.03, and L the range of the gene's truth. A place of the lattice without a spot does not count.
    A gene whose truth is constant is undefined.
    prediction, truth: (n, G). array: (n, 2), array_row and array_col.
    """
    row, col = np.asarray(array).astype(int).T
    if staggered(array):  # in each row, every second column is empty
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
    for gene in range(truth.shape[1]):  # one plane at a time, because all would not fit into memory
        p, t = (np.asarray(x[:, gene], np.float64) for x in (prediction, truth))
        value_range = t.max() - t.min()
        if value_range == 0:
            continue
        mean_p, mean_t = local_mean(p), local_mean(t)
        var_p, var_t = local_mean(p * p) - mean_p**2, local_mean(t * t) - mean_t**2
        covariance = local_mean(p * t) - mean_p * mean_t
        c1, c2 = (0.01 * value_range) ** 2, (0.03 * value_range) ** 2
        scores[gene] = ((2 * mean_p * mean_t + c1) * (2 * covariance + c2)
                        / ((mean_p**2 + mean_t**2 + c1) * (var_p + var_t + c2))).mean()
    return scores


def score_further(prediction, truth, spots, xy):
    """Scores in addition to the published ones: name -> number.

    prediction, truth: (n, G). spots: obs table; without array_row and array_col, or with
    placeholders in them, the windowed SSIM is left out. xy: (n, 2) spot centres.
    "Moran's I, r" is the correlation over genes of the predicted with the true autocorrelation.
    "Moran's I, ratio" is the predicted autocorrelation divided by the true one, each as a mean over
    genes. Above 1, the prediction is smoother than the tissue.
    """
    pearson = pearson_per_gene(prediction, truth)
    defined = np.isfinite(pearson).any()
    summary = {"Pearson, median": float(np.nanmedian(pearson)) if defined else float("nan"),
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
        predicted, measured = predicted[both], measured[both]
        r = pearson_per_gene(predicted[:, None], measured[:, None])
        summary["Moran's I, r"] = float(r[0])
        summary["Moran's I, ratio"] = float(predicted.mean() / measured.mean())
    return summary | {f"recall@{k}": recall_at_k(prediction, truth, k) for k in HIT_AT}


# --------------------------------------------------------------- how certain, and how high at most


def bootstrap(prediction, truth, xy, genes, draws=500, seed=0):
    """95 % interval of the mean Pearson over `genes` (an index), from resampled blocks of tissue.

    Blocks are drawn with replacement. Neighbouring spots resemble each other, so single spots are
    not independent draws, but blocks of 5 x 5 pitches nearly are. The interval describes the
    uncertainty within this section, not between sections.
    prediction, truth: (n, G). xy: (n, 2). Returns (low, high), NaN for tissue of a single block.
    """
    if len(xy) < 2:
        return float("nan"), float("nan")
    corner = np.floor(np.asarray(xy) / (5 * pitch(xy))).astype(int)
    block = np.unique(corner, axis=0, return_inverse=True)[1].ravel()
    p, t = (standardise(x)[:, genes] for x in (prediction, truth))
    member = scipy.sparse.csr_matrix((np.ones(len(block)), (block, np.arange(len(block)))))
    terms = (np.ones_like(p), p, t, p * p, t * t, p * t)
    sums = np.stack([member @ x for x in terms])  # (6, blocks, G)
    n_blocks = sums.shape[1]
    if n_blocks == 1:
        return float("nan"), float("nan")
    equal = np.full(n_blocks, 1 / n_blocks)
    counts = np.random.default_rng(seed).multinomial(n_blocks, equal, size=draws)  # (draws, blocks)
    n, sum_p, sum_t, pp, tt, pt = np.einsum("db,sbg->sdg", counts, sums, optimize=True)
    vary_p, vary_t = n * pp - sum_p**2, n * tt - sum_t**2
    # Constant in a draw. Rounding leaves a little more than zero.
    constant = (vary_p <= 1e-12 * n * pp) | (vary_t <= 1e-12 * n * tt)
    r = (n * pt - sum_p * sum_t) / np.sqrt(np.where(constant, np.nan, vary_p * vary_t))
    means = np.array([mean_defined(row) for row in r])
    means = means[~np.isnan(means)]
    if not len(means):
        return float("nan"), float("nan")
    return tuple(np.percentile(means, [2.5, 97.5]))


def halves(counts, seed=0):
    """Split counts in two at random: each molecule goes to either half with probability 1/2.

    counts: (n, G) whole numbers, sparse. Returns two matrices of the same shape. They are
    independent measurements of the same tissue as far as counts follow a Poisson distribution.
    """
    first = counts.tocsr().copy()
    half = np.random.default_rng(seed).binomial(first.data.astype(np.int64), 0.5)
    first.data = half.astype(first.data.dtype)
    return first, counts - first


def ceiling_per_gene(half, other):
    """The Pearson correlation that perfect knowledge of the tissue would reach: (G,).

    It refers to the whole measurement. half, other: the two halves' log-normalised expression, (n,
    G). If r is their correlation, the whole has the reliability 2 r / (1 + r) (Spearman and Brown),
    and the noise-free expression correlates with the whole by the root of the reliability. A
    negative r counts as 0.
    """
    r = np.maximum(pearson_per_gene(half, other), 0)
    return np.sqrt(2 * r / (1 + r))
