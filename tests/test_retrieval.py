"""Retrieval against the full cosine matrix, sorted; averages against a loop."""

import numpy as np
import pytest
import torch

from heclip.retrieval import (
    average_expression,
    centre,
    crowded,
    random_spots,
    retrieve,
    spread,
)


def cosine(query, reference):
    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1)[:, None]

    return unit(query) @ unit(reference).T


def embeddings(n=23, n_reference=41, width=8, seed=0):
    rng = np.random.default_rng(seed)
    query, reference = rng.normal(0.2, 1, (n, width)), rng.normal(0.2, 1, (n_reference, width))
    return query, reference * rng.gamma(1, 3, (n_reference, 1))


@pytest.mark.parametrize(("k", "block"), [(1, 5), (6, 1), (6, 7), (6, 4096), (41, 23), (60, 41),
                                          (60, 5), (1, 4096)])
def test_the_nearest_are_those_of_the_whole_cosine_matrix_whatever_the_block(k, block):
    query, reference = embeddings()
    index, similarity = retrieve(query, reference, k, block)
    whole = cosine(query, reference)
    expected = np.argsort(-whole, axis=1)[:, :k]
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_allclose(similarity, np.take_along_axis(whole, expected, axis=1), rtol=0,
                               atol=1e-12)


@pytest.mark.parametrize("block", [7, 4096])
def test_float32_tensors_give_the_similarities_of_float64_to_rounding(block):
    query, reference = embeddings(width=64)
    index, similarity = retrieve(torch.from_numpy(query).float(),
                                 torch.from_numpy(reference).float(), 10, block)
    whole = cosine(query, reference)
    assert index.shape == similarity.shape == (23, 10)
    np.testing.assert_allclose(similarity, -np.sort(-whole, axis=1)[:, :10], rtol=0, atol=1e-6)
    np.testing.assert_allclose(similarity, np.take_along_axis(whole, index, axis=1), rtol=0,
                               atol=1e-6)


def test_in_one_dimension_only_the_sign_counts():
    reference = np.array([[3.0], [-1.0], [0.5], [-8.0]])
    index, similarity = retrieve(np.array([[2.0], [-0.1]]), reference, 3, block=3)
    assert set(index[0][:2]) == {0, 2}
    assert set(index[1][:2]) == {1, 3}
    np.testing.assert_allclose(similarity, [[1, 1, -1], [1, 1, -1]])


def test_length_does_not_count_and_no_spot_is_found_twice():
    query, reference = embeddings()
    index, _ = retrieve(query, reference, 15, block=4)
    scaled, _ = retrieve(100 * query, reference * np.linspace(0.01, 50, 41)[:, None], 15, block=4)
    np.testing.assert_array_equal(index, scaled)
    assert all(len(set(row)) == 15 for row in index)


def test_equal_embeddings_are_found_with_similarity_one_and_an_empty_one_with_zero():
    reference = np.array([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]])
    index, similarity = retrieve(np.array([[6.0, 8.0]]), reference, 3)
    assert set(index[0][:2]) == {1, 2}
    assert index[0][2] == 0
    np.testing.assert_allclose(similarity, [[1, 1, 0]])


@pytest.mark.parametrize("k", [1, 4, 9])
def test_the_average_is_the_plain_mean_of_the_retrieved_rows(k):
    rng = np.random.default_rng(1)
    expression = rng.gamma(1, 1, (9, 5)).astype(np.float32)
    index = np.stack([rng.permutation(9)[:k] for _ in range(12)])
    average = average_expression(index, expression)
    assert average.dtype == np.float32
    assert average.shape == (12, 5)
    for row, rows in zip(average, index, strict=True):
        np.testing.assert_allclose(row, np.mean([expression[i] for i in rows], axis=0), rtol=1e-6)


def test_random_spots_differ_within_a_row_follow_the_seed_and_cover_the_whole_reference():
    drawn = random_spots(200, 30, 10, seed=1)
    assert drawn.shape == (200, 10)
    assert all(len(set(row)) == 10 for row in drawn)
    assert set(drawn.ravel()) == set(range(30))
    np.testing.assert_array_equal(drawn, random_spots(200, 30, 10, seed=1))
    assert (drawn != random_spots(200, 30, 10, seed=2)).any()
    assert len({tuple(row) for row in drawn}) == 200
    assert sorted(random_spots(1, 4, 10, seed=0)[0]) == [0, 1, 2, 3]


def test_the_spread_equals_a_loop():
    rng = np.random.default_rng(2)
    index = np.stack([rng.permutation(9)[:5] for _ in range(12)])
    expression = rng.gamma(1, 1, (9, 6)).astype(np.float32)
    expected = [np.mean([np.std(expression[rows, gene]) for gene in range(6)]) for rows in index]
    np.testing.assert_allclose(spread(index, expression), expected, atol=1e-4)
    np.testing.assert_allclose(spread(index, expression, block=5), expected, atol=1e-4)


def test_spots_that_are_alike_have_no_spread_and_neither_has_a_single_one():
    index = np.tile(np.arange(5), (12, 1))
    same = np.tile(np.float32([0, 0.1, 3, 7, 1 / 3, 5]), (9, 1))
    np.testing.assert_allclose(spread(index, same), 0, atol=2e-3)  # the root of rounding
    various = np.random.default_rng(0).random((9, 6))
    np.testing.assert_allclose(spread(index[:, :1], various), 0, atol=2e-3)
    assert np.isfinite(spread(index, same)).all()


def test_each_section_is_centred_on_its_own_mean_and_few_patches_on_the_references_too():
    query = np.array([[1.0, 0], [3, 8]])
    sections = [np.array([[1.0, 1], [3, 5]]), np.array([[10.0, 2]])]
    expected = np.array([14 / 3, 8 / 3])  # the mean of all three reference spots
    centred, reference = centre(query, sections)
    np.testing.assert_allclose(reference, [[-1, -2], [1, 2], [0, 0]])
    np.testing.assert_allclose(centred, query - (np.array([4, 8]) + 20 * expected) / 22)


def test_what_shifts_all_of_a_section_changes_nothing_that_is_retrieved():
    query, reference = embeddings(400, 300)
    parts = [reference[:120], reference[120:]]
    index, similarity = retrieve(*centre(query, parts), 10)
    moved = [parts[0] + 3, parts[1] - np.arange(8)]
    mean = np.concatenate(moved).mean(axis=0) - reference.mean(axis=0)
    index_moved, similarity_moved = retrieve(*centre(query + mean, moved), 10)
    np.testing.assert_array_equal(index_moved, index)
    np.testing.assert_allclose(similarity_moved, similarity, atol=1e-6)
    without_centring, _ = retrieve(query + mean, np.concatenate(moved), 10)
    assert (without_centring != index).mean() > 0.5


@pytest.mark.parametrize(("k", "n_reference", "says"), [
    (50, 100, None), (51, 100, "K is 51 of 100 reference spots"), (50, 20, "K is 50 of 20")])
def test_k_that_is_not_well_below_the_reference_is_said(k, n_reference, says):
    note = crowded(k, n_reference)
    assert says in note if says else note is None
