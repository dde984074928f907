"""Tissue on a slide: a small picture, where it shows tissue, and each spot's share of it."""

import math

import numpy as np
import scipy.ndimage

from .slide import shrunk

# See `find_tissue`. Checked on 4 sections of MOB and 2 of mouse muscle, with and without colour.
TISSUE_UM = 8  # µm a pixel of the picture that tissue is sought on
BLUR_UM = 25  # standard deviation
LEAST_MM2 = 0.05  # specks and holes below this area are dust and lumina
CONTRAST = 15  # levels of 255 between glass and tissue, at least
PALEST_SURE = 80  # levels darker than the glass are tissue, whatever the histogram says
BLACK, INK = 50, 25
ROUGH = 3  # levels between a pixel and its surroundings: tissue 10 to 22, blurred marks 0.5 to 4
ON_TISSUE = 0.25  # share of a spot's circle
# Medians over what is called glass. On 14 real pictures with glass, its texture was at most 0.8 and
# its colour at most 19. In 8 fields that lie wholly inside tissue, they were at least 9.7 and 31.
TEXTURE_OF_TISSUE = 8  # levels between a pixel and its surroundings: glass is not so rough
STAINED = 60  # levels of colour: smooth and stained. Set on a generated picture, not on real ones
COLOURED = 25  # levels between the brightest and the darkest channel: glass is not so coloured


def thumbnail(slide, mpp, limit=4096):
    """The slide at about TISSUE_UM a pixel, `limit` pixels at most, from the nearest level of its
    pyramid.

    Returns (uint8 (h, w, 3), its pixels per full-resolution pixel). The level is read block by
    block.
    """
    longest = max(slide.width, slide.height)
    level = slide.level_for(max(TISSUE_UM / mpp, longest / limit))
    shrink = max(round(TISSUE_UM / mpp / level.downsample),
                 math.ceil(longest / level.downsample / limit), 1)
    rows, columns = (-(-max(side, least) // shrink) * shrink
                     for side, least in zip(level.tile, (256, 2048), strict=True))
    height, width = (side // shrink * shrink for side in (level.height, level.width))
    bands = []
    for top in range(0, height, rows):
        block_height = min(rows, height - top)
        blocks = [slide.region(level, left, top, min(columns, width - left), block_height)
                  for left in range(0, width, columns)]
        bands.append(np.concatenate([shrunk(block, shrink) for block in blocks], axis=1))
    return np.concatenate(bands), 1 / (level.downsample * shrink)


def find_tissue(rgb, um):
    """Where a bright-field picture shows tissue: uint8 (h, w, 3), `um` microns a pixel -> bool (h,
    w).

    A pixel's darkness is that of its darkest channel: eosin and haematoxylin both absorb green, and
    grey slides have three alike. After a blur, Otsu's threshold (IEEE Trans SMC 9, 1979) parts
    tissue from glass, and what is much darker than the glass is tissue in any case. Areas of
    scanner's black, of black ink, and of ink that is greener than red are never tissue, with a
    margin for their blurred edges. Specks and holes below LEAST_MM2 are removed, and so are parts
    without texture: frames printed below the glass, smears, shadows. Fine strokes of red ink stay.
    If what remains is no glass either (`looks_of_glass`), the picture lies wholly inside tissue, as
    a core or an exported field does: all True. All False where there is only glass or ink.
    """
    tissue = darker_than_glass(rgb, um)
    texture, colour = looks_of_glass(rgb, um, tissue)
    is_tissue = (texture >= TEXTURE_OF_TISSUE or colour >= STAINED
                 or (texture >= ROUGH and colour >= COLOURED))
    return np.ones(tissue.shape, bool) if is_tissue else tissue


def looks_of_glass(rgb, um, tissue):
    """Texture and colour of what is not tissue: the median levels of texture, and of colour.

    tissue: bool (h, w). Scanner's black and black ink are left out, and so are edges of the tissue,
    whose blur is texture too, unless there are only edges. Both are 0 if nothing is left.
    """
    glass = ~tissue & (rgb.max(axis=2) >= BLACK)
    if not glass.any():
        return 0.0, 0.0
    reach = 2 * math.ceil(2 * BLUR_UM / um) + 1
    if (inner := glass & ~scipy.ndimage.maximum_filter(tissue, reach)).any():
        glass = inner
    sharp, darkness = darkness_of(rgb, um)
    colour = rgb.max(axis=2) - rgb.min(axis=2)
    return float(np.median(np.abs(sharp - darkness)[glass])), float(np.median(colour[glass]))


def doubt_about(rgb, um, tissue):
    """What to say about the tissue that was found, or None if it needs no word."""
    if tissue.all():
        return "no glass is seen on it, so all of it is taken for tissue"
    texture, colour = looks_of_glass(rgb, um, tissue)
    if texture < ROUGH and colour < COLOURED:
        return None
    fault = "textured" if texture >= ROUGH else "coloured"
    return (f"{1 - tissue.mean():.0%} of it is taken for glass, but is {fault} as tissue is. If it "
            "is tissue, predict all of the picture with --whole_image")


def darkness_of(rgb, um):
    """Levels of each pixel's darkest channel below white, float32 (h, w): sharp, and blurred."""
    sharp = (255 - rgb.min(axis=2)).astype(np.float32)
    return sharp, scipy.ndimage.gaussian_filter(sharp, BLUR_UM / um)


def darker_than_glass(rgb, um):
    """The tissue that `find_tissue` finds by its darkness: bool (h, w).

    All False where no two kinds of pixels differ by CONTRAST.
    """
    sigma, least = BLUR_UM / um, LEAST_MM2 * 1e6 / um**2  # in pixels
    red, green, blue = (scipy.ndimage.gaussian_filter(rgb[..., c], min(sigma, 1)) for c in range(3))
    black = np.maximum(np.maximum(red, green), blue) < BLACK
    ink = black | (green > red.clip(max=255 - INK) + INK)  # uint8 stays below 256
    ink = scipy.ndimage.maximum_filter(keep_parts(ink, least), 2 * math.ceil(3 * sigma) + 1)
    sharp, darkness = darkness_of(rgb, um)
    seen = darkness[~ink]
    if not seen.size:
        return np.zeros(ink.shape, bool)
    threshold = otsu(seen)
    above, below = seen[seen > threshold], seen[seen <= threshold]
    if not above.size or not below.size or above.mean() - below.mean() < CONTRAST:
        return np.zeros(ink.shape, bool)
    tissue = (darkness > min(threshold, np.percentile(seen, 1) + PALEST_SURE)) & ~ink
    tissue = ~keep_parts(~keep_parts(tissue, least), least)
    return keep_parts(tissue, least, np.abs(sharp - darkness), ROUGH)


def otsu(values):
    """The threshold that parts values into two classes with the least variance within them."""
    count, edges = np.histogram(values, 256)
    middle = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(count)[:-1]  # (255,), a threshold after each bin but the last
    above = count.sum() - below
    total = np.cumsum(count * middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total[:-1] / below - (total[-1] - total[:-1]) / above) ** 2
    return edges[1 + np.nan_to_num(between).argmax()]


def keep_parts(mask, least, texture=None, rough=0):
    """The mask's connected parts of at least `least` pixels and a mean texture of `rough`."""
    labels, n = scipy.ndimage.label(mask)
    size = np.bincount(labels.ravel(), minlength=n + 1)
    keep = size >= least
    if texture is not None:
        keep &= np.bincount(labels.ravel(), texture.ravel(), n + 1) >= rough * size
    keep[0] = False
    return keep[labels]


def share_on_tissue(spots, tissue, scale, diameter):
    """How much of each spot's circle lies on tissue, 0 to 1: (n,). diameter, x and y are in
    full-resolution pixels.

    tissue: bool (h, w), `scale` of its pixels per full-resolution pixel.
    """
    radius = diameter / 2 * scale
    reach = math.ceil(radius)
    dy, dx = np.mgrid[-reach:reach + 1, -reach:reach + 1].reshape(2, -1)
    dy, dx = (offset[np.hypot(dy, dx) <= radius] for offset in (dy, dx))
    y, x = ((spots[axis].to_numpy() * scale).astype(int)[:, None] + offset
            for axis, offset in (("y", dy), ("x", dx)))
    height, width = tissue.shape
    return tissue[np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)].mean(axis=1)
