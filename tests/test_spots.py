"""spots.py: pitch, lattice, neighbours and smoothing, on lattices whose distances are known."""

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest

from heclip import sources
from heclip.dataset import Section
from heclip.files import InputError
from heclip.preprocess import section_mpp
from heclip.spots import (
    array_of,
    geometry_notes,
    lattice,
    mirrored,
    neighbours,
    pitch,
    smooth,
)


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
    """Spatial Transcriptomics arrays: a column and a row are 141 um, so the diagonal is 200 um."""
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


def test_gaps_do_not_matter_where_the_array_is_known():
    """Every third spot of every third row: the nearest spots are 3 pitches apart."""
    spots = a_lattice(30, 30, 100.0, staggered=False)
    spots = spots[(spots["array_row"] % 3 == 0) & (spots["array_col"] % 3 == 0)]
    assert pitch_by_array(spots) == pytest.approx(100)
    assert pitch(xy_of(spots)) == pytest.approx(300)


def test_spots_at_the_same_place_do_not_change_the_pitch_of_the_array():
    spots = a_lattice(12, 20, 100.0, staggered=True)
    assert pitch_by_array(pd.concat([spots, spots])) == pytest.approx(100)


# ------------------------------------------------------------------------- arrays of no use


@pytest.mark.parametrize("staggered", [True, False])
@pytest.mark.parametrize("placeholder", [-1, 0, np.nan])
def test_placeholders_in_the_array_are_as_no_array(placeholder, staggered):
    """An AnnData without array columns is predicted with -1 in them, and may be read again."""
    spots = a_lattice(12, 20, 100.0, staggered).assign(array_row=placeholder, array_col=placeholder)
    assert array_of(spots) is None
    raw = spots[["array_row", "array_col"]].to_numpy()
    assert pitch(xy_of(spots), raw) == pitch(xy_of(spots)) == pytest.approx(100)


def test_an_array_with_a_missing_column_or_value_is_no_array():
    spots = a_lattice(12, 20, 100.0, staggered=True)
    assert array_of(spots.drop(columns="array_col")) is None
    spots = spots.astype({"array_row": "Int64"})  # an integer column that may hold <NA>
    np.testing.assert_array_equal(array_of(spots), spots[["array_row", "array_col"]])
    spots.loc[spots.index[3], "array_row"] = pd.NA
    assert array_of(spots) is None
    raw = spots[["array_row", "array_col"]].to_numpy(float, na_value=np.nan)
    assert pitch(xy_of(spots), raw) == pytest.approx(100)


def test_the_array_of_other_spots_is_not_fitted():
    spots = a_lattice(12, 20, 100.0, staggered=True)
    shuffled = np.random.default_rng(0).permutation(array_of(spots))
    assert pitch(xy_of(spots), shuffled) == pytest.approx(100)


def test_two_sections_in_one_table_have_the_pitch_of_each():
    """They share array coordinates, so no single lattice fits them."""
    spots = a_lattice(12, 20, 100.0, staggered=True)
    both = pd.concat([spots, spots.assign(x=spots["x"] + 9000)])
    assert pitch_by_array(both) == pytest.approx(100)


def test_positions_flatter_than_their_array_give_no_pitch_of_zero():
    array = array_of(a_lattice(6, 6, 1.0, staggered=False))
    on_a_line = array * [100, 0] + 7
    assert pitch(on_a_line, array) == pytest.approx(100)
    with pytest.raises(ValueError, match="36, all at one place"):
        pitch(array * 0 + 7, array)


@pytest.mark.parametrize(("rows", "cols"), [(1, 9), (2, 1)], ids=["row", "two"])
def test_the_pitch_of_spots_on_a_line_is_measured(rows, cols):
    assert pitch_by_array(a_lattice(rows, cols, 100.0, staggered=False)) == pytest.approx(100)


# ------------------------------------------------------------------------- pitch as measured


@pytest.mark.parametrize("turn", [0, 0.3, np.pi / 2])
@pytest.mark.parametrize("staggered", [True, False])
@pytest.mark.parametrize("jitter", [0, 2])
def test_without_an_array_the_pitch_is_measured_between_neighbours(turn, staggered, jitter):
    spots = a_lattice(30, 40, 100.0, staggered, turn, keep=0.9)
    spots = spots.drop(columns=["array_row", "array_col"])
    spots[["x", "y"]] += np.random.default_rng(0).normal(0, jitter, (len(spots), 2))
    assert array_of(spots) is None
    assert pitch_by_array(spots) == pytest.approx(100, rel=0.002)


def test_rounding_to_whole_pixels_does_not_shorten_the_pitch():
    """Scores used the median distance to the nearest spot, which is 6 % too short here."""
    xy = np.rint(xy_of(a_lattice(20, 30, 10.0, staggered=True)))
    distance = np.linalg.norm(xy[:, None] - xy, axis=2) + np.diag(np.full(len(xy), np.inf))
    assert np.median(distance.min(axis=1)) < 9.5
    assert pitch(xy) == pytest.approx(10, rel=2e-3)


@pytest.mark.parametrize("twice", [1, 30, 60])
def test_spots_at_the_same_place_count_once(twice):
    """They were their own neighbours at distance 0: with all spots twice the pitch was 0."""
    xy = xy_of(a_lattice(6, 10, 100.0, staggered=False))
    again = np.vstack([xy, xy[:twice]])
    assert pitch(again) == pytest.approx(100)
    np.testing.assert_array_equal(neighbours(again).toarray()[:60, :60], neighbours(xy).toarray())
    assert np.isfinite(smooth(np.ones((len(again), 2)), again, 0.5)).all()


@pytest.mark.parametrize("xy", [[[5, 5]], [[5, 5], [5, 5], [5, 5]], np.zeros((0, 2))])
@pytest.mark.parametrize("array", [None, [[3, 4]]])
def test_spots_without_a_neighbour_have_no_pitch(xy, array):
    array = None if array is None else array * len(xy)
    with pytest.raises(ValueError, match="too few"):
        pitch(np.array(xy, float), None if array is None else np.reshape(array, (-1, 2)))


@pytest.mark.parametrize("array", [None, [[0, 0], [0, 2], [1, 1]]])
def test_a_position_that_is_not_a_number_is_named(array):
    with pytest.raises(ValueError, match="x or y of some spots is not a number"):
        pitch([[0, 0], [100, 0], [50, np.nan]], array)


# ------------------------------------------------------------------------- pitch of files


@pytest.mark.parametrize("columns", [[], ["array_row"]], ids=["no array", "half of one"])
def test_an_anndata_without_array_columns_has_a_measured_pitch(tmp_path, columns):
    """read_positions leaves array_row and array_col out where an AnnData lacks one of them."""
    spots = a_lattice(12, 20, 100.0, staggered=True)
    adata = anndata.AnnData(obs=spots[columns].set_axis([f"s{i}" for i in range(len(spots))]),
                            obsm={"spatial": xy_of(spots)})
    adata.write_h5ad(tmp_path / "positions.h5ad")
    read = sources.read_positions(tmp_path / "positions.h5ad")
    assert not {"array_row", "array_col"} & set(read.columns)
    assert array_of(read) is None
    assert pitch(xy_of(read), array_of(read)) == pytest.approx(100)


@pytest.mark.parametrize("array", ["known", "placeholders", "absent"])
def test_microns_per_pixel_of_a_section_with_and_without_an_array(array):
    spots = a_lattice(12, 20, 50.0, staggered=True).set_axis([f"s{i}" for i in range(120)])
    obs = spots[["array_row", "array_col"]]
    if array == "placeholders":
        obs = obs * 0 - 1
    if array == "absent":
        obs = obs[[]]
    adata = anndata.AnnData(obs=obs, obsm={"spatial": xy_of(spots)})
    section = Section("S1", "D1", "query", [], [], [])
    assert section_mpp(section, adata, "positions.csv") == pytest.approx(100 / 50)
    assert section_mpp(replace(section, pitch_um=200), adata, "positions.csv") == pytest.approx(4)
    assert section_mpp(replace(section, mpp=0.3), adata, "positions.csv") == 0.3
    with pytest.raises(InputError, match=r"positions\.csv: too few spots .* Check that this is"):
        section_mpp(section, adata[:1], "positions.csv")


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


def test_a_single_spot_has_no_neighbours():
    assert neighbours(np.array([[5.0, 5.0]])).toarray().tolist() == [[0]]


def test_spots_at_one_place_have_no_neighbours_to_tell():
    with pytest.raises(ValueError, match="too few"):
        neighbours(np.full((3, 2), 5.0))


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
    xy = rng.permutation(np.argwhere(np.ones((7, 9))))[:50] * 130.0
    xy = np.vstack([xy, [[9000, 0]]])  # one far from all
    prediction = rng.gamma(1, 1, (51, 4)).astype(np.float32)
    smoothed = smooth(prediction, xy, width)
    assert smoothed.dtype == np.float32
    np.testing.assert_allclose(smoothed, slow_smooth(prediction, xy, width), rtol=1e-5)
    np.testing.assert_allclose(smoothed[-1], prediction[-1], rtol=1e-6)
    np.testing.assert_allclose(smooth(np.full((51, 2), 0.3, np.float32), xy, width), 0.3, rtol=1e-6)
    in_other_units = smooth(prediction, 3.7 * xy + 11, width)
    np.testing.assert_allclose(in_other_units, smoothed, rtol=1e-5)


def test_width_zero_smooths_nothing_and_a_lone_spot_stays_as_it_is():
    prediction = np.float32([[1, 5], [3, 1]])
    xy = np.array([[0.0, 0.0], [100.0, 0.0]])
    np.testing.assert_array_equal(smooth(prediction, xy, 0), prediction)
    np.testing.assert_array_equal(smooth(prediction[:1], xy[:1], 0.5), prediction[:1])
    with pytest.raises(ValueError, match="too few"):
        smooth(prediction, xy * 0, 0.5)
    own = 1 / (1 + np.exp(-0.5))  # the other spot lies one width away
    expected = own * prediction[0] + (1 - own) * prediction[1]
    np.testing.assert_allclose(smooth(prediction, xy, 1.0)[0], expected)


# --------------------------------------------------------------------------- what contradicts what


def visium():
    """Positions with a pitch of 40 px, and their array coordinates."""
    table = lattice(400, 300, 40)
    return table[["x", "y"]].to_numpy(), table[["array_row", "array_col"]].to_numpy(float)


def turned(xy, degrees):
    angle = np.radians(degrees)
    return xy @ [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]


@pytest.mark.parametrize("degrees", [0, 37, 90, 180, 270])
def test_a_lattice_is_mirrored_if_it_is_so_in_any_rotation(degrees):
    xy, array = visium()
    assert not mirrored(turned(xy, degrees), array)
    for image in (xy[:, ::-1], xy * [-1, 1], xy * [1, -1]):
        assert mirrored(turned(image, degrees), array)


@pytest.mark.parametrize("array", [None, np.zeros((86, 2)), np.full((86, 2), np.nan)])
def test_without_an_array_nothing_is_known_of_a_mirror_image(array):
    xy, _ = visium()
    assert len(xy) == 86
    assert not mirrored(xy[:, ::-1], array)


@pytest.mark.parametrize("with_array", [True, False])
@pytest.mark.parametrize(("mpp", "stated", "says"), [
    (2.5, {"the file": 2.5}, []), (2.5, {"the file": 2.7}, []), (2.5, {"the file": None}, []),
    (2.5, {"the file": 2.8}, ["2.5 µm wide, but the file say 2.8"]),
    (2.0, {"the file": 2.5}, ["2 µm wide, but the file say 2.5",
                              "but neighbouring spots, if they are 100 µm apart, say 2.5"]),
])
def test_a_scale_that_is_off_by_more_than_a_tenth_is_said(mpp, stated, says, with_array):
    xy, array = visium()
    notes = geometry_notes(xy, array if with_array else None, mpp, 100, stated)
    assert len(notes) == len(says)
    for note, text in zip(notes, says, strict=True):
        assert text in note
