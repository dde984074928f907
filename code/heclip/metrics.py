"""Every number in a results table. Arrays are spots x genes; all genes are computed at once.

Per-gene scores keep every gene in its place; where a score is undefined (a gene that is constant over the spots) it
is NaN. Definitions: Li et al., Nat Methods 19 (2022), as the published HECLIP uses them.
"""

import numpy as np

TOP_GENES = (1, 3, 5, 10, 50, 100)
HIT_AT = (1, 2, 3, 4, 5)


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
    per_gene = {"Pearson": pearson_per_gene(prediction, truth), "SSIM": ssim_per_gene(prediction, truth),
                "RMSE": rmse_per_gene(prediction, truth), "JS": js_per_gene(prediction, truth)}
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
