"""Counts -> log-normalised expression, statistics of genes, and the published batch correction."""

import numpy as np
import pandas as pd
import scanpy
import scipy.sparse


def log_normalise(adata):
    """Scale each spot to the section's median count, then take log(1 + x). Call it once.

    Modifies adata: the counts move to layers["counts"], and X becomes CSR float32 (n_spots,
    n_genes), in natural-log units. In memory X shares its indices with the counts, so do not change
    the sparsity of either in place. A spot without counts stays zero and does not lower the median.
    """
    counts = adata.layers["counts"] = adata.X
    values = counts.data.astype(np.float32)
    adata.X = scipy.sparse.csr_matrix((values, counts.indices, counts.indptr), counts.shape)
    total = np.asarray(adata.X.sum(axis=1)).ravel()
    # The target is given because scanpy's own counts the empty spots in some versions only.
    scanpy.pp.normalize_total(adata, target_sum=np.median(total[total > 0]))
    scanpy.pp.log1p(adata)
    del adata.uns["log1p"]  # it holds a None that not every reader accepts


def gene_statistics(adata):
    """Add to adata.var the columns that panels are chosen by: mean, dispersion, n_expressed.

    The dispersion is scanpy's default, normalised. All three depend on this section alone, so any
    set of sections can choose its panel without reading matrices.
    """
    ranking = scanpy.pp.highly_variable_genes(adata, inplace=False)
    adata.var["mean"] = np.asarray(adata.X.mean(axis=0)).ravel()
    adata.var["dispersion"] = ranking["dispersions_norm"].to_numpy(dtype=np.float64)
    adata.var["n_expressed"] = np.asarray((adata.X > 0).sum(axis=0)).ravel()


def harmonise(matrices):
    """Harmony over all sections in gene space, as published (Korsunsky et al., Nat Methods 2019).

    matrices: section -> float32 (n_spots, G). Returns the same with corrected values, which may be
    below zero. Raises RuntimeError if harmonypy is older than version 2.
    """
    import harmonypy  # GPL, so loaded only for the protocol that asks for it

    stacked = np.concatenate(list(matrices.values()))
    section = np.repeat(list(matrices), [len(m) for m in matrices.values()])
    labels = pd.DataFrame({"section": section})
    n_spots, n_genes = stacked.shape
    # harmonypy reads a square matrix as genes x spots, so a square one must be given that way.
    given = stacked.T if n_spots == n_genes else stacked
    result = harmonypy.run_harmony(given, labels, "section", random_state=0, verbose=False).result()
    if result.shape != stacked.shape:
        raise RuntimeError(f"harmonypy returned {result.shape} for {stacked.shape} (spots x "
                           "genes): version 2 or newer is needed")
    ends = np.cumsum([len(m) for m in matrices.values()])[:-1]
    return dict(zip(matrices, np.split(result.astype(np.float32), ends), strict=True))
