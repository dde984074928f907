"""Prediction: each query patch takes the mean expression of its nearest reference spots."""

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F

FEW = 20  # patches; see `centre`


def retrieve(query, reference, k=50, block=4096):
    """The k reference embeddings most similar to each query embedding, by cosine. Exact.

    query: (n, D), reference: (N, D), float arrays. Returns (index, similarity), both (n, k'), most
    similar first, with k' = min(k, N). Only block x block similarities are held at a time.
    """
    query = F.normalize(torch.as_tensor(query), dim=1)
    reference = torch.as_tensor(reference)
    k, width = min(k, len(reference)), min(block, len(reference))
    held = query.new_empty(min(block, len(query)) * width)  # made once: fresh memory costs more than the sums in it
    indices, similarities = [], []
    for rows in query.split(block):
        best = query.new_full((len(rows), k), -torch.inf)
        index = torch.zeros(len(rows), k, dtype=torch.int64, device=query.device)
        for start in range(0, len(reference), block):
            columns = F.normalize(reference[start:start + block], dim=1)
            similarity = held[:len(rows) * len(columns)].view(len(rows), len(columns))
            torch.mm(rows, columns.T, out=similarity)
            if start == 0:
                better, found = similarity.topk(min(k, len(columns)), dim=1)
            else:
                # Only what beats a row's k-th best so far is sorted: after the first blocks, next
                # to nothing.
                row, column = (similarity > best[:, -1:]).nonzero(as_tuple=True)  # by rows
                if not len(row):
                    continue
                count = row.bincount(minlength=len(rows))
                place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
                better = best.new_full((len(rows), int(count.max())), -torch.inf)
                found = index.new_zeros(better.shape)
                better[row, place], found[row, place] = similarity[row, column], start + column
            best, keep = torch.cat([best, better], dim=1).topk(k, dim=1)
            index = torch.cat([index, found], dim=1).gather(1, keep)
        indices.append(index)
        similarities.append(best)
    return torch.cat(indices).cpu().numpy(), torch.cat(similarities).cpu().numpy()


def centre(query, sections):
    """Embeddings less their section's mean: what its stain, its scanner or its batch does to all of
    them alike.

    query: (n, D), the query's; sections: the reference's, a list of (N_s, D). Returns (n, D) and
    the list's (N, D). Few patches have a mean of little worth: the reference's counts as much as
    that of FEW of them.
    """
    query, sections = torch.as_tensor(query), [torch.as_tensor(rows) for rows in sections]
    expected = torch.cat(sections).mean(dim=0)
    mean = (query.sum(dim=0) + FEW * expected) / (len(query) + FEW)
    return query - mean, torch.cat([rows - rows.mean(dim=0) for rows in sections])


def average_expression(index, expression):
    """Plain mean of the retrieved spots' expression: index (n, K), expression (N, G) -> float32 (n,
    G)."""
    n, k = index.shape
    picked = scipy.sparse.csr_matrix((np.full(n * k, 1 / k, np.float32), index.ravel(), np.arange(0, n * k + 1, k)),
                                     shape=(n, len(expression)))
    return picked @ expression


def spread(index, expression, block=1024):
    """How much the retrieved spots differ: their standard deviation, mean over genes. (n,),
    log-normalised units."""
    squares = expression**2
    spreads = []
    for rows in np.array_split(index, -(-len(index) // block)):
        variance = average_expression(rows, squares) - average_expression(rows, expression) ** 2
        spreads.append(np.sqrt(np.maximum(variance, 0)).mean(axis=1))  # rounding can leave less than 0
    return np.concatenate(spreads)


def random_spots(n, n_reference, k, seed):
    """What retrieval must beat: k different reference spots drawn at random for each query spot.
    Returns (n, k)."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(n_reference, min(k, n_reference), replace=False) for _ in range(n)])
