"""Positions of spots: their pitch, Visium's lattice, the neighbours of a spot, smoothing over them.

The pitch is the distance between the centres of neighbouring spots. `pitch` is its only definition.
Positions are xy, (n, 2): x and y of each spot's centre in full-resolution pixels. Array coordinates
are (n, 2): array_row and array_col.
Neighbours and smoothing use the pitch of xy alone, so they are the same with and without array
columns in the position file.
"""

import math
from contextlib import suppress

import numpy as np
import pandas as pd
import scipy.sparse
from scipy.spatial import cKDTree


def array_of(table):
    """array_row and array_col of a spot table: float (n, 2), or None if they hold no information.

    They hold none if a column is absent, if a value is missing, or if all spots have the same
    place, such as the -1 that stands for "unknown".
    """
    if not {"array_row", "array_col"} <= set(table.columns):
        return None
    columns = [pd.to_numeric(table[name], errors="coerce") for name in ("array_row", "array_col")]
    array = np.column_stack([column.to_numpy(float, na_value=np.nan) for column in columns])
    if not np.isfinite(array).all() or (array == array[:1]).all():
        return None
    return array


def staggered(array):
    """Whether every second place is empty: array_row + array_col is even for all. array: (n, 2).

    True for Visium and for later Spatial Transcriptomics arrays. False for bins of Visium HD.
    """
    return bool((np.asarray(array).sum(axis=1) % 2 == 0).all())


# ------------------------------------------------------------------------------------------- pitch


def pitch(xy, array=None):
    """Distance of neighbouring spots in pixels: a float above 0.

    xy: (n, 2); array: (n, 2), or None. With usable array coordinates the pitch is that of the
    fitted lattice (`fitted_pitch`), which uses every spot, so that gaps and jitter do not matter.
    Otherwise it is measured between neighbours (`measured_pitch`). On real sections the two differ
    by less than 0.1 %.
    Raises ValueError if a position is not a number, or if all spots lie at one place.
    """
    xy = np.asarray(xy, float)
    if not np.isfinite(xy).all():
        raise ValueError("x or y of some spots is not a number, so their pitch is unknown")
    fitted = None if array is None else fitted_pitch(xy, array)
    return measured_pitch(xy) if fitted is None else fitted


def fitted_pitch(xy, array):
    """The pitch of the lattice, fitted by least squares, or None if the array cannot be used.

    xy: (n, 2); array: (n, 2). On a staggered array neighbours lie two steps along a row or column,
    or one step along both. On any other array they lie one step along a row or column. The result
    is the mean over the directions in which they are nearest. Directions count as equal within
    10 %, so that a slightly stretched lattice keeps all its neighbours.

    The array cannot be used
    - if a value is missing;
    - if the spots lie on a line of it, or at one place of it, as placeholders do;
    - if the fitted lattice is flat, that is, if one side is below a tenth of the other;
    - if the spots lie more than half a pitch from their places in the lattice (root mean square).
    Then the array belongs to other spots, or the table holds several sections. Real sections are
    within 0.05 pitches.
    """
    array = np.asarray(array, float)
    if not np.isfinite(array).all():
        return None
    places = np.column_stack([array, np.ones(len(array))])
    steps, _, rank, _ = np.linalg.lstsq(places, xy, rcond=None)
    if rank < 3:
        return None
    row, col, _ = steps
    along_row, along_col = np.linalg.norm(col), np.linalg.norm(row)
    if staggered(array):
        diagonal = (np.linalg.norm(row + col) + np.linalg.norm(row - col)) / 2
        distances = np.array([2 * along_row, 2 * along_col, diagonal])
    else:
        distances = np.array([along_row, along_col])
    longest, shortest = np.linalg.svd(steps[:2], compute_uv=False)
    if not shortest > 0.1 * longest:
        return None
    fitted = distances[distances < 1.1 * distances.min()].mean()
    off_place = np.sqrt(((xy - places @ steps) ** 2).sum(axis=1).mean())
    return float(fitted) if off_place <= 0.5 * fitted else None


def measured_pitch(xy):
    """The pitch as the mean distance between neighbours. xy: (n, 2).

    A neighbour is at most 1.2 times as far away as the nearest spot is in the median. The factor
    lies between jitter (a few per cent) and the diagonal of a square lattice (1.41).
    The median itself would be too short, because the nearest of six is the one that rounding or
    jitter moved closest. It is short by up to 0.7 % on Visium, and by 1.8 % on Spatial
    Transcriptomics arrays.
    Spots at the same place count once. If most spots lack their neighbours, the result is too long,
    because it is the distance of the nearest spots that are there.
    Raises ValueError if all spots lie at one place.
    """
    places = np.unique(xy, axis=0)
    if len(places) < 2:
        raise ValueError(f"too few spots to measure their pitch: {len(xy)}, all at one place. "
                         "Give positions of spots at two places or more")
    # A spot has 6 neighbours at this distance at most. The first found is the spot itself.
    distances = cKDTree(places).query(places, min(7, len(places)))[0][:, 1:]
    return float(distances[distances <= 1.2 * np.median(distances[:, 0])].mean())


def mirrored(xy, array):
    """Whether the lattice is a mirror image of the array. xy: (n, 2); array: (n, 2), or None.

    On a picture as a microscope shows it, array_row grows downwards where array_col grows to the
    right, or both are turned together. All real position files have this handedness. If x and y are
    exchanged, or the picture is mirrored, it is the other one. False if the array is unusable.
    """
    if array is None or fitted_pitch(xy, array) is None:
        return False
    places = np.column_stack([array, np.ones(len(array))])
    row, col, _ = np.linalg.lstsq(places, xy, rcond=None)[0]
    return bool(col[0] * row[1] < col[1] * row[0])


# ----------------------------------------------------------------------------------- contradictions


def geometry_notes(xy, array, mpp, pitch_um, stated):
    """What contradicts the places and the scale of a section: a list of text, empty if nothing.

    xy: (n, 2); array: (n, 2), or None. mpp: the microns per pixel that are used. pitch_um: distance
    of neighbouring spots. stated: what says so -> microns per pixel, or None. Up to 10 % is no
    contradiction.
    """
    notes = []
    if mirrored(xy, array):
        notes.append("its spots are a mirror image of the array. x and y are exchanged, or the "
                     "picture is mirrored: patches may come from wrong places")
    others = dict(stated)
    with suppress(ValueError):  # a single spot has no pitch
        others[f"neighbouring spots, if they are {pitch_um:.4g} µm apart,"] = (
            pitch_um / pitch(xy, array))
    for source, other in others.items():
        if other and abs(other / mpp - 1) > 0.1:
            notes.append(f"a pixel is taken to be {mpp:.4g} µm wide, but {source} say {other:.4g}. "
                         "Find out which is right")
    return notes


# ------------------------------------------------------------ lattice, neighbours and smoothing


def lattice(width, height, pitch):
    """Visium's staggered lattice over width x height pixels: six neighbours, `pitch` pixels away.

    Returns a DataFrame by name `<row>x<column>`: array_row, array_col (their sum is even), x, y.
    """
    n_rows = math.ceil(height / (pitch * math.sqrt(3) / 2))
    n_columns = math.ceil(width / pitch)
    row, column = np.divmod(np.arange(n_rows * n_columns), n_columns)
    spots = pd.DataFrame({"array_row": row, "array_col": 2 * column + row % 2,
                          "x": (column + (1 + row % 2) / 2) * pitch,
                          "y": (row + 0.5) * pitch * math.sqrt(3) / 2})
    spots = spots[(spots["x"] < width) & (spots["y"] < height)]
    names = spots["array_row"].astype(str) + "x" + spots["array_col"].astype(str)
    return spots.set_index(names).rename_axis("barcode")


def neighbours(xy):
    """Spots and their neighbours on the lattice: sparse (n, n), 1 or 0, symmetric. xy: (n, 2).

    Neighbours lie within 1.5 pitches. On Visium these are 6, and the next distance is 1.73. On a
    square lattice they are 8, with the diagonal at 1.41 and the next distance 2. The array of
    legacy Spatial Transcriptomics is slightly oblong; its 8 neighbours are at 1, 1.34 and 1.49. A
    single spot has none.
    Raises ValueError as `pitch` does.
    """
    n = len(xy)
    if n < 2:
        return scipy.sparse.csr_matrix((n, n))
    i, j = cKDTree(xy).query_pairs(1.5 * pitch(xy), output_type="ndarray").T
    return scipy.sparse.csr_matrix((np.ones(2 * len(i)), (np.r_[i, j], np.r_[j, i])), shape=(n, n))


def smooth(values, xy, width):
    """Gaussian average over neighbouring spots: float32 (n, G).

    values: (n, G); xy: (n, 2); width: standard deviation in pitches. With a width of 0, or a single
    spot, the values are returned unchanged.
    The Gaussian is cut at 4 widths, where it is 0.0003 of its height. The cut is at 4.001 so that
    floating-point error does not decide about spots that are exactly there, such as the second ring
    at width 0.5. Rounding to whole pixels still does, and their weight together is 0.1 %.
    Raises ValueError as `pitch` does.
    """
    if width == 0 or len(values) < 2:
        return values
    sigma = width * pitch(xy)
    tree = cKDTree(xy)
    near = tree.sparse_distance_matrix(tree, 4.001 * sigma, output_type="coo_matrix")  # and itself
    gaussian = np.exp(-((near.data / sigma) ** 2) / 2)
    weight = scipy.sparse.csr_array((gaussian, near.coords), near.shape)
    return (weight @ values / weight.sum(axis=1)[:, None]).astype(np.float32)
