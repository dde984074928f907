"""Whole slides: open an image pyramid, its microns per pixel, its tissue, a lattice of spots, and the spots' patches.

A whole slide is never held in memory. Tiles are decoded as patches ask for them, in an order that asks for each about
once, and a cache of CACHE bytes keeps what the next patches share. Formats: what openslide reads (.svs, .ndpi, .mrxs,
.scn, ...), where it is installed; TIFF, OME-TIFF and SVS through tifffile; JPEG and PNG, decoded whole.
"""

import math
import re
import xml.etree.ElementTree
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.ndimage
import tifffile
import torch
from PIL import Image
from tqdm import tqdm

from .batches import READERS
from .files import InputError
from .slide import RowsOfFile, Slide, check_pixels, picture, unreadable

CACHE = 256 << 20  # bytes of decoded tiles
AHEAD = 16  # patches whose tiles are asked for before they are needed
PLAUSIBLE = (0.05, 20)  # µm a pixel; a screen's 96 dots per inch would be 265
ONLY_OPENSLIDE = (".mrxs", ".vms", ".vmu", ".svslide", ".bif", ".czi", ".dcm", ".ndpi", ".scn")
MICRONS = {"m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "µm": 1, "μm": 1, "um": 1, "nm": 1e-3, "pm": 1e-6, "Å": 1e-4,
           "in": 25400, "inch": 25400, "micron": 1, "microns": 1, "\\u00B5m": 1}  # OME's units, and ImageJ's

# Tissue: see `find_tissue`. Checked on 4 sections of MOB and 2 of mouse muscle, with and without colour.
TISSUE_UM = 8  # µm a pixel of the picture that tissue is sought on
BLUR_UM = 25  # standard deviation
LEAST_MM2 = 0.05  # specks and holes below this area are dust and lumina
CONTRAST = 15  # levels of 255 between glass and tissue, at least
PALEST_SURE = 80  # levels darker than the glass are tissue, whatever the histogram says
BLACK, INK = 50, 25
ROUGH = 3  # levels between a pixel and its blurred surroundings: tissue 10 to 22, out-of-focus marks 0.5 to 4
ON_TISSUE = 0.25  # share of a spot's circle


@dataclass
class Level:
    """One level of a pyramid. `read(top, bottom, left, right)` decodes pixels of this level: uint8 (h, w, 3)."""

    width: int
    height: int
    downsample: float  # full-resolution pixels across one of its pixels
    tile: tuple  # height and width of what the file stores together
    read: Callable


class WholeSlide:
    """An open whole slide: levels, finest first; mpp = (x, y) in µm per full-resolution pixel, or None if unknown."""

    def __init__(self, path, levels, mpp):
        self.path, self.levels, self.mpp = path, levels, mpp
        self.width, self.height = levels[0].width, levels[0].height
        self.capacity, self.held = CACHE, 0
        self.tiles = OrderedDict()  # (level's downsample, row, column) -> (future pixels, their bytes)
        self.readers = ThreadPoolExecutor(READERS)

    def tiles_of(self, level, left, top, width, height):
        """Row, column and future pixels of the tiles under a box of the level's pixels; reading starts at once."""
        tiles = []
        for row in range(max(top, 0) // level.tile[0], -(-min(top + height, level.height) // level.tile[0])):
            for column in range(max(left, 0) // level.tile[1], -(-min(left + width, level.width) // level.tile[1])):
                key = level.downsample, row, column
                if key not in self.tiles:
                    y, x = row * level.tile[0], column * level.tile[1]
                    box = y, min(y + level.tile[0], level.height), x, min(x + level.tile[1], level.width)
                    self.tiles[key] = self.readers.submit(level.read, *box), (box[1] - y) * (box[3] - x) * 3
                    self.held += self.tiles[key][1]
                self.tiles.move_to_end(key)
                tiles.append((row, column, self.tiles[key][0]))
        while self.held > self.capacity and len(self.tiles) > 1:
            self.held -= self.tiles.popitem(last=False)[1][1]
        return tiles

    def region(self, level, left, top, width, height):
        """uint8 (height, width, 3), placed in the level's own pixels. What lies beyond the slide repeats its edge."""
        x0, x1 = max(left, 0), min(left + width, level.width)
        y0, y1 = max(top, 0), min(top + height, level.height)
        out = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
        for row, column, future in self.tiles_of(level, left, top, width, height):
            try:
                tile = future.result()
            except Exception as error:  # every codec has its own kinds
                raise unreadable(self.path, error) from None
            y, x = row * level.tile[0], column * level.tile[1]
            to = (slice(max(y, y0) - y0, min(y + len(tile), y1) - y0),
                  slice(max(x, x0) - x0, min(x + tile.shape[1], x1) - x0))
            out[to] = tile[max(y0 - y, 0):y1 - y, max(x0 - x, 0):x1 - x]
        if out.shape[:2] != (height, width):
            out = np.pad(out, ((y0 - top, top + height - y1), (x0 - left, left + width - x1), (0, 0)), mode="edge")
        return out

    def level_for(self, downsample):
        """The coarsest level that is no coarser than `downsample`."""
        return max((level for level in self.levels if level.downsample <= max(downsample, 1)),
                   key=lambda level: level.downsample)


# ---------------------------------------------------------------------------------------------- opening


@contextmanager
def open_whole_slide(path):
    """Yield a WholeSlide. Raises InputError if the file is no image that can be read here."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} is missing")
    if path.name.endswith(".gz"):
        raise InputError(f"{path} is zipped. Unpack it first: gunzip {path.name}")
    if vendor(path):
        with openslide_slide(path) as slide:
            yield slide
    elif is_tiff(path):
        with tiff_slide(path) as slide:
            yield slide
    else:
        if path.suffix.lower() in ONLY_OPENSLIDE:
            raise InputError(f"{path} cannot be read as an image, with openslide or without. If openslide is not "
                             "installed: pip install openslide-python openslide-bin")
        slide = picture_slide(path)
        with slide.readers:
            yield slide


def vendor(path):
    """The scanner's format as openslide calls it; None without openslide, and for TIFFs that tifffile reads better."""
    try:
        from openslide import OpenSlide
    except ImportError:
        return None
    found = OpenSlide.detect_format(path)
    return None if found == "generic-tiff" else found  # openslide does not see pyramids in SubIFDs, as in OME-TIFF


def is_tiff(path):
    with open(path, "rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@contextmanager
def openslide_slide(path):
    """A WholeSlide through openslide. Where the scanner saw nothing, the slide's background colour."""
    from openslide import OpenSlide

    try:
        handle = OpenSlide(path)
    except Exception as error:
        raise unreadable(path, error) from None
    with handle:
        properties = handle.properties
        glass = Image.new("RGBA", (1, 1), "#" + properties.get("openslide.background-color", "FFFFFF"))

        def reader(number, downsample):
            def read(top, bottom, left, right):
                size = right - left, bottom - top
                origin = round(left * downsample), round(top * downsample)
                return np.asarray(Image.alpha_composite(glass.resize(size), handle.read_region(origin, number, size)))[
                    ..., :3]
            return read

        levels = []
        for number, (width, height) in enumerate(handle.level_dimensions):
            downsample = downsample_of(handle.dimensions, (width, height))
            tile = tuple(int(properties.get(f"openslide.level[{number}].tile-{side}", 512))
                         for side in ("height", "width"))
            levels.append(Level(width, height, downsample, bounded(tile, (height, width)), reader(number, downsample)))
        mpp = [properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        slide = WholeSlide(path, levels, plausible(*mpp) if all(mpp) else None)
        with slide.readers:
            yield slide


@contextmanager
def tiff_slide(path):
    """A WholeSlide through tifffile: the levels of the file's first series."""
    try:
        handle = tifffile.TiffFile(path)
    except Exception as error:
        raise unreadable(path, error) from None
    with handle:
        try:
            series = handle.series[0]
            levels = [tiff_level(path, series, number) for number in range(len(series.levels))]
            mpp = tiff_mpp(handle)
        except Exception as error:
            raise unreadable(path, error) from None
        slide = WholeSlide(path, levels, mpp)
        with slide.readers:
            yield slide


def tiff_level(path, series, number):
    """One level of a TIFF series."""
    level, page = series.levels[number], series.levels[number].keyframe
    check_pixels(page, level.axes)
    height, width = page.imagelength, page.imagewidth
    if page.is_memmappable and level.axes != "SYX":
        stored = RowsOfFile(path, page.dataoffsets[0], page.shape)
        tile = 64, width

        def pixels(top, bottom, left, right):
            return stored[top:bottom][:, left:right]
    else:
        import zarr  # tifffile decodes single strips and tiles through it

        # A tile that the scanner left out holds glass.
        stored = zarr.open(series.aszarr(level=number, fillvalue=255), mode="r")
        tile = tuple(stored.chunks[level.axes.index(axis)] for axis in "YX")

        def pixels(top, bottom, left, right):
            if level.axes == "SYX":  # one plane a colour
                return np.moveaxis(np.asarray(stored[:, top:bottom, left:right]), 0, -1)
            return np.asarray(stored[top:bottom, left:right])

    to_rgb, finest = Slide(path, stored).to_rgb, series.levels[0].keyframe
    return Level(width, height, downsample_of((finest.imagewidth, finest.imagelength), (width, height)),
                 bounded(tile, (height, width)), lambda *box: to_rgb(pixels(*box)))


def picture_slide(path):
    """A WholeSlide of one level over a JPEG or PNG, decoded whole."""
    opened = picture(path, path)
    height, width = opened.height, opened.width

    def read(top, bottom, left, right):
        return opened.to_rgb(opened.pixels[top:bottom, left:right])

    return WholeSlide(path, [Level(width, height, 1, bounded((512, 512), (height, width)), read)], None)


def bounded(tile, size):
    """A tile no larger than its level."""
    return tuple(min(side, whole) for side, whole in zip(tile, size, strict=True))


def downsample_of(full, size):
    """Full-resolution pixels across one of a level: whole where the sizes allow it, as a pyramid rounds its own size.

    full, size: (width, height). A ratio of sizes that were rounded would be off by up to a pixel at the far end.
    """
    ratio = (full[0] / size[0] + full[1] / size[1]) / 2
    whole = round(ratio)
    return whole if all(abs(f / whole - s) < 1 for f, s in zip(full, size, strict=True)) else ratio


# ---------------------------------------------------------------------------------------------- microns per pixel


def microns_per_pixel(slide, given=None):
    """The width of a full-resolution pixel in µm: `given`, or what the file says.

    Raises InputError if neither is known, if it is implausible, or if the file's pixels are not square.
    """
    if given is not None:
        if plausible(given, given) is None:
            raise InputError(f"--mpp {given}: expected µm a pixel, from {PLAUSIBLE[0]} to {PLAUSIBLE[1]}")
        return float(given)
    if slide.mpp is None:
        raise InputError(f"{slide.path} does not say how many µm a pixel is wide. Give it with --mpp")
    x, y = slide.mpp
    if abs(x / y - 1) > 0.02:
        raise InputError(f"{slide.path}: its pixels are not square, {x:.4g} by {y:.4g} µm. Resample the image, or give "
                         "one width with --mpp if that is an error")
    return (x + y) / 2


def plausible(x, y):
    """(x, y) as numbers if both are within what a microscope makes of a pixel, else None."""
    try:
        pair = float(x), float(y)
    except ValueError:
        return None
    return pair if all(PLAUSIBLE[0] <= value <= PLAUSIBLE[1] for value in pair) else None


def tiff_mpp(handle):
    """(x, y) in µm a pixel of an open TIFF, or None: OME-XML, then Aperio's MPP, then the resolution tags."""
    page = handle.series[0].keyframe
    found = None
    if handle.is_ome:
        pixels = xml.etree.ElementTree.fromstring(handle.ome_metadata).find(".//{*}Pixels")
        sizes = [(pixels.get(f"PhysicalSize{axis}"), MICRONS.get(pixels.get(f"PhysicalSize{axis}Unit", "µm")))
                 for axis in "XY"]
        if all(size and unit for size, unit in sizes):
            found = plausible(*(float(size) * unit for size, unit in sizes))
    elif handle.is_svs and (match := re.search(r"MPP *= *([\d.]+)", page.description)):
        found = plausible(match[1], match[1])
    if found or not {"XResolution", "YResolution"} <= {tag.name for tag in page.tags}:
        return found
    unit = {2: 25400, 3: 10000}.get(int(page.resolutionunit))  # inch, centimetre
    if unit is None and handle.is_imagej:
        unit = MICRONS.get(handle.imagej_metadata.get("unit"))
    return plausible(*(unit / pixels for pixels in page.resolution)) if unit and all(page.resolution) else None


# ---------------------------------------------------------------------------------------------- tissue


def thumbnail(slide, mpp, limit=4096):
    """The slide at about TISSUE_UM a pixel, `limit` pixels at most, from the nearest level of its pyramid.

    Returns (uint8 (h, w, 3), its pixels per full-resolution pixel). The level is read block by block.
    """
    longest = max(slide.width, slide.height)
    level = slide.level_for(max(TISSUE_UM / mpp, longest / limit))
    shrink = max(round(TISSUE_UM / mpp / level.downsample), math.ceil(longest / level.downsample / limit), 1)
    rows, columns = (-(-max(level.tile[axis], least) // shrink) * shrink for axis, least in enumerate((256, 2048)))
    height, width = (side // shrink * shrink for side in (level.height, level.width))
    bands = [np.concatenate([
        shrunk(slide.region(level, left, top, min(columns, width - left), min(rows, height - top)), shrink)
        for left in range(0, width, columns)], axis=1) for top in range(0, height, rows)]
    return np.concatenate(bands), 1 / (level.downsample * shrink)


def shrunk(rgb, times):
    """Averaged over whole squares; what is left over at the right and bottom is dropped."""
    height, width = (side // times * times for side in rgb.shape[:2])
    return np.asarray(Image.fromarray(rgb[:height, :width]).reduce(times))


def find_tissue(rgb, um):
    """Where a bright-field picture shows tissue: uint8 (h, w, 3), `um` microns a pixel -> bool (h, w).

    A pixel's darkness is that of its darkest channel: eosin and haematoxylin both absorb green, and grey slides have
    three alike. After a blur, Otsu's threshold (IEEE Trans SMC 9, 1979) parts tissue from glass, and what is much
    darker than the glass is tissue in any case. Areas of scanner's black, of black ink, and of ink that is greener
    than red are never tissue, with a margin for their blurred edges. Specks and holes below LEAST_MM2 are removed,
    and so are parts without texture: frames printed below the glass, smears, shadows. Fine strokes of red ink stay.
    All False where no two kinds of pixels differ by CONTRAST.
    """
    sigma, least = BLUR_UM / um, LEAST_MM2 * 1e6 / um**2  # in pixels
    red, green, blue = (scipy.ndimage.gaussian_filter(rgb[..., c], min(sigma, 1)) for c in range(3))  # uint8
    ink = (np.maximum(np.maximum(red, green), blue) < BLACK) | (green > red.clip(max=255 - INK) + INK)
    ink = scipy.ndimage.maximum_filter(keep_parts(ink, least), 2 * math.ceil(3 * sigma) + 1)
    sharp = (255 - rgb.min(axis=2)).astype(np.float32)
    darkness = scipy.ndimage.gaussian_filter(sharp, sigma)  # (h, w)
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
    """The mask's connected parts of at least `least` pixels, and, on average over a part, of a texture of `rough`."""
    labels, n = scipy.ndimage.label(mask)
    size = np.bincount(labels.ravel(), minlength=n + 1)
    keep = size >= least
    if texture is not None:
        keep &= np.bincount(labels.ravel(), texture.ravel(), n + 1) >= rough * size
    keep[0] = False
    return keep[labels]


# ---------------------------------------------------------------------------------------------- spots


def share_on_tissue(spots, tissue, scale, diameter):
    """How much of each spot's circle lies on tissue, 0 to 1: (n,). diameter, x and y are in full-resolution pixels.

    tissue: bool (h, w), `scale` of its pixels per full-resolution pixel.
    """
    radius = diameter / 2 * scale
    reach = math.ceil(radius)
    dy, dx = np.mgrid[-reach:reach + 1, -reach:reach + 1].reshape(2, -1)
    dy, dx = (offset[np.hypot(dy, dx) <= radius] for offset in (dy, dx))
    y, x = ((spots[axis].to_numpy() * scale).astype(int)[:, None] + offset for axis, offset in (("y", dy), ("x", dx)))
    return tissue[np.clip(y, 0, tissue.shape[0] - 1), np.clip(x, 0, tissue.shape[1] - 1)].mean(axis=1)


# ---------------------------------------------------------------------------------------------- patches


class SpotPatches:
    """The patches of spots on a whole slide, read as they are asked for; `order` asks for each tile about once.

    xy: (n, 2) spot centres in full-resolution pixels, rounded to whole ones. crop: side of a patch in full-resolution
    pixels, any positive number. It is read from the coarsest level on which it has at least patch_px pixels, and
    resampled (bilinear, antialiased) to patch_px where it has more, or, on a coarse slide, fewer.
    Raises InputError if a centre lies outside the slide, or if a patch is larger than the slide.
    """

    def __init__(self, slide, xy, crop, patch_px, device):
        self.slide, self.patch_px, self.device = slide, patch_px, device
        self.xy = np.rint(xy).astype(np.int64)
        outside = ((self.xy < 0) | (self.xy >= [slide.width, slide.height])).any(axis=1)
        if outside.any():
            raise InputError(f"{slide.path} has {slide.width} x {slide.height} pixels, but {outside.sum()} of "
                             f"{len(xy)} spots lie outside it, one at x {self.xy[outside][0][0]}, y "
                             f"{self.xy[outside][0][1]}. They are another slide's, or not in full-resolution pixels")
        if crop > max(slide.width, slide.height):
            raise InputError(f"{slide.path} has {slide.width} x {slide.height} pixels, and a patch would take "
                             f"{crop:.0f}: check --mpp")
        self.level = slide.level_for(crop / (patch_px - 0.5))
        self.size = crop / self.level.downsample  # of the level's pixels
        if abs(self.size - patch_px) < 0.5:
            self.size = patch_px

    def __len__(self):
        return len(self.xy)

    @property
    def order(self):
        """(n,) spots by rows of tiles, from left to right, in strips of a width that the cache can hold."""
        height, width = self.level.tile
        rows = min(math.ceil(self.size / height) + 2, -(-self.level.height // height))  # of tiles, held at a time
        # One tile may be as wide as the slide: then all of its rows that a patch needs are held, whatever they take.
        self.slide.capacity = max(CACHE, rows * height * width * 3)
        strip = self.level.width if width == self.level.width else max(CACHE // (rows * height * 3), width)
        x, y = (self.xy / self.level.downsample).T
        return np.lexsort([x, np.maximum(y - self.size / 2, 0) // height, x // strip])

    def window(self, spot):
        """Where a patch lies on its level: (left, top, width, height) in whole pixels, and its own corner in them."""
        centre = self.xy[spot] / self.level.downsample
        if self.size == self.patch_px:  # the same pixels as slide.crop_patches
            left, top = np.rint(centre).astype(int).tolist()
            return (left - self.patch_px // 2, top - self.patch_px // 2, self.patch_px, self.patch_px), (0, 0)
        start = centre - self.size / 2
        low = np.floor(start).astype(int)
        return (*low.tolist(), *(np.ceil(start + self.size).astype(int) - low).tolist()), tuple(start - low)

    def patch(self, spot):
        """uint8 (patch_px, patch_px, 3)."""
        window, (x, y) = self.window(spot)
        region = self.slide.region(self.level, *window)
        if self.size == self.patch_px:
            return region
        box = x, y, x + self.size, y + self.size
        return np.asarray(Image.fromarray(region).resize((self.patch_px,) * 2, Image.Resampling.BILINEAR, box))

    def read(self, index):
        """index: (B,) int64 on the CPU -> uint8 (B, P, P, 3) on the CPU, in pinned memory where a GPU waits for it."""
        batch = torch.empty((len(index), self.patch_px, self.patch_px, 3), dtype=torch.uint8,
                            pin_memory=self.device.type == "cuda")
        spots = index.tolist()
        for row, spot in enumerate(spots):
            for ahead in spots[row + AHEAD:row + AHEAD + 1] if row else spots[:AHEAD + 1]:
                self.slide.tiles_of(self.level, *self.window(ahead)[0])  # decoded while the ones before are resampled
            batch.numpy()[row] = self.patch(spot)
        return batch

    def stream(self, batches):
        """Yield the patches of each index in `batches`, (B,) int64 on the CPU, as uint8 (B, P, P, 3) on the device.

        One thread reads ahead, as the tiles are to be asked for in order.
        """
        with ThreadPoolExecutor(1) as reader, tqdm(total=len(self), desc="predict", unit="patch", leave=False,
                                                   disable=None) as bar:
            ahead = deque()
            for index in batches:
                ahead.append(reader.submit(self.read, index))
                if len(ahead) > 3:
                    yield self.ready(ahead.popleft(), bar)
            while ahead:
                yield self.ready(ahead.popleft(), bar)

    def ready(self, future, bar):
        batch = future.result()
        bar.update(min(len(batch), bar.total - bar.n))  # the last batch is filled up
        return batch.to(self.device, non_blocking=True)
