"""Retrieval: each query patch gets the mean expression of its nearest reference spots."""

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F

FEW = 20  # patches, see `centre`


def retrieve(query, reference, k=50, block=4096):
    """The k reference embeddings most similar to each query embedding, by cosine. Exact.

    query: (n, D); reference: (N, D); float arrays. Returns (index, similarity), both (n, k'), most
    similar first, with k' = min(k, N). At most block x block similarities are in memory at a time.
    """
    query = F.normalize(torch.as_tensor(query), dim=1)
    reference = torch.as_tensor(reference)
    k, width = min(k, len(reference)), min(block, len(reference))
    # Allocated once, because fresh memory for each block costs more time than its products.
    buffer = query.new_empty(min(block, len(query)) * width)
    indices, similarities = [], []
    for rows in query.split(block):
        best = query.new_full((len(rows), k), -torch.inf)
        index = torch.zeros(len(rows), k, dtype=torch.int64, device=query.device)
        for start in range(0, len(reference), block):
            columns = F.normalize(reference[start:start + block], dim=1)
            similarity = buffer[:len(rows) * len(columns)].view(len(rows), len(columns))
            torch.mm(rows, columns.T, out=similarity)
            if start == 0:
                better, found = similarity.topk(min(k, len(columns)), dim=1)
            else:
                # Only values above a row's k-th best so far are sorted. After the first blocks
                # there are few.
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


def crowded(k, n_reference):
    """What to say if k is not well below the number of reference spots, else None."""
    if 2 * k <= n_reference:
        return None
    return (f"K is {k} of {n_reference} reference spots, so every prediction is close to their "
            "mean. Give a smaller --k or more reference spots")


def centre(query, sections):
    """Subtract each section's mean from its embeddings; stain, scanner and batch move that mean.

    query: the query's, (n, D). sections: the reference's, a list of (N_s, D). Returns (n, D), and
    the list's (N, D) as one tensor. The mean of a few patches is unreliable, so the query's mean is
    drawn towards that of the reference, which has the weight of FEW patches.
    """
    query, sections = torch.as_tensor(query), [torch.as_tensor(rows) for rows in sections]
    expected = torch.cat(sections).mean(dim=0)
    mean = (query.sum(dim=0) + FEW * expected) / (len(query) + FEW)
    return query - mean, torch.cat([rows - rows.mean(dim=0) for rows in sections])


def average_expression(index, expression):
    """Plain mean of the retrieved spots' expression: float32 (n, G).

    index: (n, K), rows of the expression, (N, G).
    """
    n, k = index.shape
    weights, ends = np.full(n * k, 1 / k, np.float32), np.arange(0, n * k + 1, k)
    picked = scipy.sparse.csr_matrix((weights, index.ravel(), ends), shape=(n, len(expression)))
    return picked @ expression


def spread(index, expression, block=1024):
    """How much the retrieved spots differ: standard deviation, mean over genes. (n,).

    index: (n, K), rows of the expression, (N, G). The unit is that of the expression,
    log-normalised.
    """
    squares = expression**2
    spreads = []
    for rows in np.array_split(index, -(-len(index) // block)):
        variance = average_expression(rows, squares) - average_expression(rows, expression) ** 2
        variance = np.maximum(variance, 0)  # rounding can leave less than 0
        spreads.append(np.sqrt(variance).mean(axis=1))
    return np.concatenate(spreads)


def random_spots(n, n_reference, k, seed):
    """The chance level of retrieval: k reference spots drawn at random for each query spot.

    Returns (n, min(k, n_reference)) indices. The spots of one row are all different.
    """
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(n_reference, min(k, n_reference), replace=False) for _ in range(n)])
