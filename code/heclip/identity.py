"""Which sections hold the same spots, whatever they are called.

A section must not be predicted from its own spots. Names and file digests do not prove that two
sections differ: a copy may have another name, another format or fewer genes, and the barcodes of
all Visium sections are the same. Here two sections share a spot if it has the same counts in both,
or if it lies at the same place of the same image. Patches of two parts of one image must not show
the same tissue either, because then the model would be tested on pixels that it has learnt.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from .spots import pitch

ENOUGH_GENES = 20  # expressed in a spot: two spots with fewer may have the same counts by chance


@dataclass(frozen=True)
class Identity:
    """What distinguishes the n spots of a section, or of a slide.

    fingerprint: of their counts, uint64 (n,), 0 if these cannot tell them apart. image: the SHA-256
    of the image file. xy: centres in its pixels, (n, 2). crop_px: what a patch shows, in these
    pixels. array: array_row and array_col (n, 2), or None.
    """

    name: str
    fingerprint: np.ndarray
    image: str
    xy: np.ndarray
    crop_px: int
    array: np.ndarray | None = None


def fingerprints(counts, genes, common):
    """A number for each spot that stands for its counts of the `common` genes: uint64 (n,).

    counts: CSR (n, genes). Equal counts have equal numbers. Only genes that all sections have are
    used, so that a copy with fewer genes is recognised. Spots that express less than ENOUGH_GENES
    of them get 0.
    """
    used = np.asarray(pd.Index(genes).isin(common))
    weight = np.where(used, pd.util.hash_array(np.asarray(genes, object)), 0).astype(np.uint64)
    total = counts.astype(np.uint64) @ weight  # a random sum of counts, modulo 2^64
    expressed = counts.astype(bool).astype(np.int32) @ used.astype(np.int32)
    return np.where(expressed < ENOUGH_GENES, np.uint64(0), total)


def same_counts(a, b):
    """Which spots of `a` have the counts of a spot of `b`: bool (n,)."""
    return (a.fingerprint != 0) & np.isin(a.fingerprint, b.fingerprint)


def same_places(a, b):
    """Which spots of `a` lie within half a pitch of a spot of `b` in the same image: bool (n,)."""
    if a.image != b.image:
        return np.zeros(len(a.xy), bool)
    try:
        reach = pitch(b.xy) / 2
    except ValueError:  # a single spot
        reach = b.crop_px / 2
    return cKDTree(b.xy).query(a.xy)[0] < reach


def same_tissue(a, b):
    """Which patches of `a` show a pixel that a patch of `b` shows in the same image: bool (n,)."""
    if a.image != b.image:
        return np.zeros(len(a.xy), bool)
    distance = cKDTree(np.rint(b.xy)).query(np.rint(a.xy), p=np.inf)[0]
    return distance < (a.crop_px + b.crop_px) / 2


def shared(a, b):
    """In words, what is wrong if one of `a` and `b` is predicted from the other; None if nothing.

    a, b: Identity.
    """
    for found, how in ((same_counts(a, b), "have the counts of spots"),
                       (same_places(a, b), "lie at the places of spots")):
        if found.any():
            return (f"{a.name} and {b.name} hold the same spots: {found.sum():,} of the "
                    f"{len(found):,} spots of {a.name} {how} of {b.name}. One would be predicted "
                    "from itself. Leave one of them out, or give them parts without common spots")
    if (found := same_tissue(a, b)).any():
        return (f"{a.name} and {b.name} are parts of one image, and the patches of {found.sum():,} "
                f"spots of {a.name} show tissue that patches of {b.name} show too. Leave a gap as "
                f"wide as a patch: leave out {where(a, found)} or {where(b, same_tissue(b, a))}")
    return None


def where(section, found):
    """In words, the rows or columns of the array that hold the spots `found`, bool (n,)."""
    if section.array is None:
        return f"these of {section.name}"
    low, high = section.array[found].min(axis=0), section.array[found].max(axis=0)
    axis = int(np.argmin(high - low))
    column = ("array_row", "array_col")[axis]
    return f"{column} {low[axis]:.0f} to {high[axis]:.0f} of {section.name}"


def compare(sections):
    """Compare each pair of sections. sections: list of Identity.

    Returns (problems, notes), two lists of text.
    """
    problems, notes = [], []
    for a, b in combinations(sections, 2):
        if problem := shared(a, b):
            problems.append(problem)
        elif a.image == b.image:
            notes.append(f"{a.name} and {b.name} are parts of one image without common spots; no "
                         "patch of one shows tissue of a patch of the other")
    return problems, notes
