"""spots.py: pitch, lattice, neighbours and smoothing on lattices whose distances are known beforehand."""

import numpy as np
import pandas as pd
import pytest

from heclip.spots import array_of, lattice, neighbours, pitch, smooth


def a_lattice(rows, cols, step, staggered, turn=0.0, stretch=1.0, keep=None):
    """array_row, array_col, x and y of a turned lattice, whose neighbours are `step` apart.

    Staggered: neighbours in a row are 2 columns apart. Square: 1 column apart.
    """
    row, col = (grid.ravel() for grid in np.mgrid[:rows, :cols])
    if staggered:
        inside = (row + col) % 2 == 0
        row, col = row[inside], col[inside]
        xy = np.column_stack([col * step / 2, row * step * np.sqrt(3) / 2 * stretch])
    else:
        xy = np.column_stack([col * step, row * step * stretch])
    cosine, sine = np.cos(turn), np.sin(turn)
    xy = xy @ np.array([[cosine, sine], [-sine, cosine]]) + [300, 500]
    spots = pd.DataFrame({"array_row": row, "array_col": col, "x": xy[:, 0], "y": xy[:, 1]})
    return spots if keep is None else spots.sample(frac=keep, random_state=0)


def xy_of(spots):
    return spots[["x", "y"]].to_numpy(float)


# ------------------------------------------------------------------------- pitch by the array


def pitch_by_array(spots):
    return pitch(xy_of(spots), array_of(spots))


@pytest.mark.parametrize("turn", [0, 0.01, np.pi / 6, np.pi / 2, -2])
@pytest.mark.parametrize("staggered", [True, False])
@pytest.mark.parametrize("keep", [None, 0.3])
def test_the_pitch_is_the_distance_of_neighbours_however_the_lattice_lies(turn, staggered, keep):
    spots = a_lattice(12, 20, 137.5, staggered, turn, keep=keep)
    if not staggered:
        assert ((spots["array_row"] + spots["array_col"]) % 2 == 1).any()
    assert pitch_by_array(spots) == pytest.approx(137.5)


def test_the_pitch_of_a_staggered_square_lattice_is_its_diagonal():
    """Spatial Transcriptomics arrays: one column and one row are 141 um, so the diagonal is 200 um."""
    spots = a_lattice(12, 20, 1.0, staggered=False)
    spots = spots[(spots["array_row"] + spots["array_col"]) % 2 == 0].assign(
        x=lambda table: 22.45 * table["array_col"], y=lambda table: 22.45 * table["array_row"])
    assert pitch_by_array(spots) == pytest.approx(22.45 * np.sqrt(2))


def test_a_slightly_stretched_lattice_gives_the_mean_over_its_directions():
    spots = a_lattice(12, 20, 100.0, staggered=True, stretch=1.01)
    diagonal = np.hypot(50, 100 * np.sqrt(3) / 2 * 1.01)
    assert pitch_by_array(spots) == pytest.approx((100 + diagonal) / 2)


def test_jitter_of_single_spots_averages_out():
    spots = a_lattice(40, 60, 100.0, staggered=True)
    spots[["x", "y"]] += np.random.default_rng(0).normal(0, 2, (len(spots), 2))
    assert pitch_by_array(spots) == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize(("rows", "cols"), [(1, 9), (2, 1)], ids=["row", "two"])
def test_spots_on_a_line_have_no_pitch(rows, cols):
    with pytest.raises(ValueError, match="line"):
        pitch_by_array(a_lattice(rows, cols, 100.0, staggered=False))


# ------------------------------------------------------------------------- pitch as measured


@pytest.mark.parametrize("turn", [0, 0.3, np.pi / 2])
@pytest.mark.parametrize("staggered", [True, False])
@pytest.mark.parametrize("jitter", [0, 2])
def test_without_an_array_the_pitch_is_measured_between_neighbours(turn, staggered, jitter):
    spots = a_lattice(30, 40, 100.0, staggered, turn, keep=0.9).drop(columns=["array_row", "array_col"])
    spots[["x", "y"]] += np.random.default_rng(0).normal(0, jitter, (len(spots), 2))
    assert array_of(spots) is None
    assert pitch_by_array(spots) == pytest.approx(100, rel=0.002)


@pytest.mark.parametrize("xy", [[[5, 5]], [[5, 5], [5, 5], [5, 5]]])
def test_spots_without_a_neighbour_have_no_pitch(xy):
    with pytest.raises(ValueError, match="too few"):
        pitch(np.array(xy, float))


# ------------------------------------------------------------------------- lattice


@pytest.mark.parametrize(("width", "height"), [(1000, 600), (600, 1000)])
def test_the_lattice_is_visiums(width, height):
    spots = lattice(width, height, 40)
    xy = xy_of(spots)
    distance = np.linalg.norm(xy[:, None] - xy, axis=2) + np.diag(np.full(len(xy), np.inf))
    np.testing.assert_allclose(distance.min(axis=1), 40)
    inner = ((xy > 45) & (xy < [width - 45, height - 45])).all(axis=1)
    assert ((distance[inner] < 40.01).sum(axis=1) == 6).all()  # staggered
    assert ((spots["array_row"] + spots["array_col"]) % 2 == 0).all()
    assert pitch_by_array(spots) == pytest.approx(40)
    assert ((xy >= 0) & (xy < [width, height])).all()
    assert len(spots) == pytest.approx(width * height / (40**2 * np.sqrt(3) / 2), rel=0.06)
    assert spots.index.is_unique
    assert spots.index[0] == "0x0"


# ------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize(("staggered", "most"), [(False, 8), (True, 6)])
def test_neighbours_are_those_next_to_a_spot_on_the_lattice(staggered, most):
    spots = a_lattice(12, 18 if staggered else 9, 100.0, staggered, keep=5 / 6)
    row, col = array_of(spots).T
    graph = neighbours(xy_of(spots)).toarray()
    for i in range(len(row)):
        for j in range(len(row)):
            down, across = abs(row[i] - row[j]), abs(col[i] - col[j])
            next_to = (down, across) in {(0, 2), (1, 1)} if staggered else max(down, across) == 1
            assert graph[i, j] == next_to
    assert graph.sum(axis=1).max() == most


# ------------------------------------------------------------------------- smoothing


def slow_smooth(prediction, xy, width):
    distance = np.linalg.norm(xy[:, None] - xy, axis=2)
    pitch = np.median(np.sort(distance, axis=1)[:, 1])
    smoothed = []
    for row in distance / pitch:
        near = np.flatnonzero(row <= 4.001 * width)
        weight = np.exp(-(row[near] / width) ** 2 / 2)
        smoothed.append((weight[:, None] * prediction[near]).sum(axis=0) / weight.sum())
    return np.array(smoothed)


@pytest.mark.parametrize("width", [0.1, 0.5, 1.0, 3.0])
def test_smoothing_is_the_gaussian_average_over_neighbours(width):
    rng = np.random.default_rng(3)
    xy = np.vstack([rng.permutation(np.argwhere(np.ones((7, 9))))[:50] * 130.0, [[9000, 0]]])  # one far from all
    prediction = rng.gamma(1, 1, (51, 4)).astype(np.float32)
    smoothed = smooth(prediction, xy, width)
    assert smoothed.dtype == np.float32
    np.testing.assert_allclose(smoothed, slow_smooth(prediction, xy, width), rtol=1e-5)
    np.testing.assert_allclose(smoothed[-1], prediction[-1], rtol=1e-6)
    np.testing.assert_allclose(smooth(np.full((51, 2), 0.3, np.float32), xy, width), 0.3, rtol=1e-6)
    np.testing.assert_allclose(smooth(prediction, 3.7 * xy + 11, width), smoothed, rtol=1e-5)  # any unit


def test_width_zero_smooths_nothing_and_a_lone_spot_stays_as_it_is():
    prediction = np.float32([[1, 5], [3, 1]])
    xy = np.array([[0.0, 0.0], [100.0, 0.0]])
    np.testing.assert_array_equal(smooth(prediction, xy, 0), prediction)
    np.testing.assert_allclose(smooth(prediction[:1], xy[:1], 0.5), prediction[:1])
    own = 1 / (1 + np.exp(-0.5))  # the other spot lies one width away
    np.testing.assert_allclose(smooth(prediction, xy, 1.0)[0], own * prediction[0] + (1 - own) * prediction[1])
