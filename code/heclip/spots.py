"""Where spots lie: their pitch, Visium's lattice, the neighbours of a spot, smoothing over them.

The pitch is the distance between the centres of neighbouring spots. Positions are xy, (n, 2): x and y
of each spot's centre in full-resolution pixels. Array coordinates are (n, 2): array_row and array_col.
"""

import math

import numpy as np
import pandas as pd
import scipy.sparse
from scipy.spatial import cKDTree


def array_of(table):
    """array_row and array_col of a spot table, (n, 2), or None if the table lacks one of them."""
    if not {"array_row", "array_col"} <= set(table.columns):
        return None
    return table[["array_row", "array_col"]].to_numpy()


def pitch(xy, array=None):
    """Distance of neighbouring spots in pixels: by the lattice where the array is known, else measured.

    xy: (n, 2); array: (n, 2), or None.
    Measured: the mean over pairs of spots that are at most 1.2 times as far apart as nearest neighbours
    are in the median.
    Raises ValueError if the spots do not tell it.
    """
    if array is not None:
        return lattice_pitch(xy, array)
    distances = cKDTree(xy).query(xy, k=min(7, len(xy)))[0][:, 1:] if len(xy) > 1 else np.zeros((1, 1))
    nearest = np.median(distances[:, 0])
    if nearest == 0:
        raise ValueError("the spots are too few, or lie on each other, to tell their pitch")
    return float(distances[distances <= 1.2 * nearest].mean())


def lattice_pitch(xy, array):
    """Distance of neighbouring spots in pixels, from a least-squares fit of the lattice.

    xy: (n, 2); array: (n, 2). On a staggered lattice (array_row + array_col is always even: Visium, later
    Spatial Transcriptomics arrays) neighbours lie two steps along a row or column, or diagonally. On any
    other they lie one step along. The result is the mean over the directions in which they are nearest,
    to 10 %.
    Raises ValueError if the spots lie on a line.
    """
    places = np.column_stack([array, np.ones(len(array))])
    (row, col, _), _, rank, _ = np.linalg.lstsq(places, xy, rcond=None)
    if rank < 3:
        raise ValueError("the spots lie on a line, or are too few, to tell their pitch")
    along_row, along_col = np.linalg.norm(col), np.linalg.norm(row)
    if (array.sum(axis=1) % 2 == 0).all():
        diagonal = (np.linalg.norm(row + col) + np.linalg.norm(row - col)) / 2
        distances = np.array([2 * along_row, 2 * along_col, diagonal])
    else:
        distances = np.array([along_row, along_col])
    return float(distances[distances < 1.1 * distances.min()].mean())


def lattice(width, height, pitch):
    """Visium's staggered lattice over width x height pixels; all six neighbours are `pitch` pixels away.

    Returns a DataFrame by name `<row>x<column>`: array_row, array_col (their sum is even), x, y.
    """
    n_rows, n_columns = math.ceil(height / (pitch * math.sqrt(3) / 2)), math.ceil(width / pitch)
    row, column = np.divmod(np.arange(n_rows * n_columns), n_columns)
    spots = pd.DataFrame({"array_row": row, "array_col": 2 * column + row % 2,
                          "x": (column + (1 + row % 2) / 2) * pitch, "y": (row + 0.5) * pitch * math.sqrt(3) / 2})
    spots = spots[(spots["x"] < width) & (spots["y"] < height)]
    return spots.set_index(spots["array_row"].astype(str) + "x" + spots["array_col"].astype(str)).rename_axis("barcode")


def neighbours(xy):
    """Spots and their neighbours on the lattice: sparse (n, n), 1 or 0, symmetric. xy: (n, 2).

    Neighbours lie within 1.5 times the usual distance to the nearest spot: 6 on Visium, 8 on a square lattice.
    """
    tree = cKDTree(xy)
    pitch = np.median(tree.query(xy, 2)[0][:, 1])
    i, j = tree.query_pairs(1.5 * pitch, output_type="ndarray").T
    n = len(xy)
    return scipy.sparse.csr_matrix((np.ones(2 * len(i)), (np.r_[i, j], np.r_[j, i])), shape=(n, n))


def smooth(values, xy, width):
    """Gaussian average over neighbouring spots. values: (n, G); xy: (n, 2); width: in pitches, 0 for none."""
    if width == 0:
        return values
    tree = cKDTree(xy)
    pitch = np.median(tree.query(xy, 2)[0][:, 1])
    near = tree.sparse_distance_matrix(tree, 4.001 * width * pitch, output_type="coo_matrix")  # itself included
    weight = scipy.sparse.csr_array((np.exp(-(near.data / (width * pitch)) ** 2 / 2), near.coords), near.shape)
    return (weight @ values / weight.sum(axis=1)[:, None]).astype(np.float32)
