"""Slides: open an image, read pixels and microns per pixel from it, and crop patches. The only
pixel code.

`open_slide` opens section images and whole slides alike. What a file is follows from its content,
never from its name: scanners' formats are read with openslide, TIFF with tifffile, JPEG and PNG
with Pillow, and a gzipped file is unpacked first. Whatever the file, pixels are 8-bit RGB in the
picture as a viewer shows it, so positions refer to that picture:

- orientation: the TIFF tag and the EXIF entry are obeyed, all 8 values.
- axes: colours are interleaved (YXS), in planes (SYX), or three or four channels of 8 bits (CYX).
  Grey is repeated.
- alpha: opaque alpha is dropped, and other alpha is an error. What a scanner left out has its
  background colour.
- several images in one file: the largest is the slide, not its label or thumbnail.
- metadata is optional: where it cannot be understood, the microns per pixel are unknown and the
  picture is still read.

A slide is never held in memory, except JPEG, PNG and TIFF of one compressed strip. `crop_patches`
reads it once from top to bottom, in bands of rows. `SpotPatches` decodes tiles as patches need
them, and keeps CACHE bytes of them.
"""

import math
import re
import tempfile
import threading
import xml.etree.ElementTree
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import tifffile
from isal import igzip, isal_zlib  # gzip, at two to three times its speed
from openslide import OpenSlide
from PIL import Image
from tqdm import tqdm

from .files import InputError, first_line, temporary_path
from .limits import WholeFile, check_declared, open_hdf5
from .missing import add_note, leave_out

BAND = 128  # rows of a band, at least: more would leave the processor's cache
CACHE = 256 << 20  # bytes of decoded tiles
DECODERS = 4  # threads that decode tiles
AHEAD = 16  # patches whose tiles are asked for before they are needed
THUMBNAIL = 1500  # px, the longest edge of the picture that is kept with the expression
UNPACKED_LEAST, UNPACKED_RATIO = 1 << 30, 100  # most bytes of a gzipped picture, and per byte of it
LIMIT = threading.Lock()  # Pillow's limit of pixels is one for all threads
ORIENTATION = 274  # number of the tag, in TIFF and in EXIF
PLAUSIBLE = (0.05, 20)  # µm per pixel; a screen's 96 dots per inch would be 265
MICRONS = {  # units of OME and ImageJ
    "m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "µm": 1, "μm": 1, "um": 1, "nm": 1e-3, "pm": 1e-6,
    "Å": 1e-4, "in": 25400, "inch": 25400, "micron": 1, "microns": 1, "\\u00B5m": 1}


@dataclass
class Level:
    """One level of a pyramid.

    read(top, bottom, left, right) decodes pixels of this level as the file has them: uint8 (h, w)
    or (h, w, channels).
    """

    width: int
    height: int
    downsample: float  # full-resolution pixels across one of its pixels
    tile: tuple  # height and width of what the file stores together
    read: Callable


class Slide:
    """An open image of width x height pixels.

    levels: its pyramid, finest first. mpp: (x, y) in µm per full-resolution pixel, or None where
    the file does not say.
    """

    def __init__(self, path, levels, mpp=None):
        self.path, self.levels, self.mpp = path, levels, mpp
        self.width, self.height = levels[0].width, levels[0].height
        self.capacity, self.held = CACHE, 0
        self.tiles = OrderedDict()  # (level's downsample, row, column) -> (future pixels, bytes)
        self.decoders = ThreadPoolExecutor(DECODERS)

    @property
    def stated_mpp(self):
        """The mean width of a pixel in µm that the file states, or None."""
        return None if self.mpp is None else sum(self.mpp) / 2

    def of(self, adata):
        """The spots whose centres lie inside. Raises InputError if many lie outside."""
        inside, note = leave_outside(self, adata.obsm["spatial"])
        if note:
            adata = adata[inside].copy()
            add_note(adata, note)
        return adata

    def write(self, adata, crop_px, patch_px, path):
        """Write the spots' patches; see `crop_patches`."""
        return crop_patches(self, adata.obsm["spatial"], crop_px, path, patch_px)

    def level_for(self, downsample):
        """The coarsest level that is no coarser than `downsample`."""
        return max((level for level in self.levels if level.downsample <= max(downsample, 1)),
                   key=lambda level: level.downsample)

    def region(self, level, left, top, width, height):
        """uint8 (height, width, 3), placed in the level's own pixels. What lies beyond the slide
        repeats its edge.

        Raises InputError if a tile cannot be decoded.
        """
        x0, x1 = max(left, 0), min(left + width, level.width)
        y0, y1 = max(top, 0), min(top + height, level.height)
        out = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
        for row, column, future in self.tiles_of(level, left, top, width, height):
            tile = future.result()
            y, x = row * level.tile[0], column * level.tile[1]
            to = (slice(max(y, y0) - y0, min(y + len(tile), y1) - y0),
                  slice(max(x, x0) - x0, min(x + tile.shape[1], x1) - x0))
            out[to] = tile[max(y0 - y, 0):y1 - y, max(x0 - x, 0):x1 - x]
        if out.shape[:2] != (height, width):
            beyond = (y0 - top, top + height - y1), (x0 - left, left + width - x1), (0, 0)
            out = np.pad(out, beyond, mode="edge")
        return out

    def tiles_of(self, level, left, top, width, height):
        """Row, column and future pixels of the tiles under a box of the level's pixels.

        Decoding starts at once.
        """
        tiles = []
        for row in range(max(top, 0) // level.tile[0],
                         -(-min(top + height, level.height) // level.tile[0])):
            for column in range(max(left, 0) // level.tile[1],
                                -(-min(left + width, level.width) // level.tile[1])):
                key = level.downsample, row, column
                if key not in self.tiles:
                    y, x = row * level.tile[0], column * level.tile[1]
                    bottom = min(y + level.tile[0], level.height)
                    right = min(x + level.tile[1], level.width)
                    size = (bottom - y) * (right - x) * 3
                    future = self.decoders.submit(self.decode, level, y, bottom, x, right)
                    self.tiles[key] = future, size
                    self.held += size
                self.tiles.move_to_end(key)
                tiles.append((row, column, self.tiles[key][0]))
        while self.held > self.capacity and len(self.tiles) > 1:
            self.held -= self.tiles.popitem(last=False)[1][1]
        return tiles

    def bands(self):
        """Yield (first row, uint8 (rows, width, 3)) of the full resolution, from top to bottom.

        A band holds whole tiles, so that each is decoded once. It has about BAND rows, unless a
        tile is taller.
        """
        level = self.levels[0]
        rows = -(-BAND // level.tile[0]) * level.tile[0]
        if level.tile[1] < self.width:  # strips of a slide turned by 90 degrees are as tall as it
            rows = min(rows, max(BAND, CACHE // (3 * self.width)))
        for top in range(0, self.height, rows):
            yield top, self.decode(level, top, min(top + rows, self.height), 0, self.width)

    def decode(self, level, *box):
        """The pixels of a box of a level as RGB: uint8 (h, w, 3). box: top, bottom, left, right,
        inside the level.

        Drops an opaque alpha and repeats grey. No colour is changed.
        Raises InputError if the file is damaged, or its alpha is not opaque.
        """
        try:
            pixels = level.read(*box)
        except Exception as error:  # every codec has its own kinds
            raise unreadable(self.path, error) from None
        if pixels.ndim == 2 or pixels.shape[2] == 1:
            return np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
        if pixels.shape[2] == 4 and (pixels[..., 3] != 255).any():
            raise InputError(f"{self.path}: its alpha channel is not 255 everywhere, so its "
                             "colours are not what one sees. Flatten it on white first")
        rgb = np.empty((*pixels.shape[:2], 3), np.uint8)  # packed: copies of a view are slower
        for channel in range(3):
            rgb[..., channel] = pixels[..., channel]
        return rgb


# ------------------------------------------------------------ opening


@contextmanager
def open_slide(path, scratch=None):
    """Open a section's image or a whole slide, for reading inside a with block. Yields a Slide.

    scratch: the folder where a gzipped image is unpacked; default: the system's folder for
    temporary files. The copy has a name of its own and is removed at the end.
    Raises InputError if the file is missing, is no image that can be read, or is not 8 bits a
    channel.
    """
    path = Path(path)
    with ExitStack() as stack:
        if not path.exists():
            raise InputError(f"{path} is missing")
        if path.is_dir():
            raise InputError(f"{path} is a folder. Give the image in it")
        file = path
        if starts_with(path, b"\x1f\x8b"):
            file = stack.enter_context(unzipped(path, scratch))
        try:
            if vendor(file):
                levels, mpp = stack.enter_context(openslide_levels(file))
            elif is_tiff(file):
                levels, mpp = stack.enter_context(tiff_levels(file))
            elif path.suffix.lower() == ".mrxs":  # the file itself is a small picture at most
                raise InputError(f"{path} cannot be read without its folder {path.stem}, which "
                                 "holds the slide's pixels. Put the folder next to it")
            else:
                levels, mpp = [picture_level(file)], None
        except Exception as error:  # every format has its own kinds
            raise unreadable(path, error) from None
        slide = Slide(path, levels, mpp)
        stack.callback(slide.decoders.shutdown)
        yield slide


@contextmanager
def open_picture(path, scratch=None):
    """Open what patches are cut from: yields a Slide, or StoredPatches for a file of patches.

    Both have `of`, the spots that have a patch, and `write`, which writes these patches.
    """
    if Path(path).suffix == ".h5":
        yield StoredPatches(path)
        return
    with open_slide(path, scratch) as slide:
        yield slide


def starts_with(file, *magic):
    """Whether a file begins with one of some byte strings."""
    with open(file, "rb") as content:
        return content.read(max(map(len, magic))).startswith(magic)


@contextmanager
def unzipped(path, folder):
    """Unpack a gzipped file to the last byte, yield the copy, and remove it.

    Raises InputError if the file is damaged or ends early, or if it unpacks to more than a picture
    would.
    """
    copy = temporary_path(Path(folder or tempfile.gettempdir()) / path.stem)
    limit = UNPACKED_LEAST + UNPACKED_RATIO * path.stat().st_size
    try:
        with igzip.open(path) as source, open(copy, "wb") as out:
            while block := source.read(1 << 24):
                out.write(block)
                if out.tell() > limit:
                    raise ValueError(f"it unpacks to over {limit / 1e9:.0f} GB")
    except (EOFError, ValueError, igzip.BadGzipFile, isal_zlib.error) as error:
        copy.unlink()
        raise unreadable(path, error) from None
    try:
        yield copy
    finally:
        copy.unlink()


def is_tiff(file):
    """Whether a file is a TIFF or BigTIFF, of either byte order."""
    return starts_with(file, b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def vendor(file):
    """The scanner's format as openslide calls it, or None for what is read without openslide.

    TIFFs without a scanner's mark are read with tifffile, because openslide does not see the
    pyramids of OME-TIFF, colours as channels, strips, or orientation. For the same reason so are
    turned Aperio files.
    """
    found = OpenSlide.detect_format(file)
    if found == "aperio":
        with suppress(Exception), tifffile.TiffFile(file) as handle:
            return found if orientation_of(handle.pages[0]) == 1 else None
    return None if found == "generic-tiff" else found


@contextmanager
def openslide_levels(file):
    """Levels and mpp of a slide through openslide.

    Where the scanner saw nothing, pixels have the slide's background colour.
    """
    with OpenSlide(file) as handle:
        properties = handle.properties
        if is_tiff(file):  # other formats keep pixels in files next to it
            check_size(file, *handle.dimensions)
        colour = "#" + properties.get("openslide.background-color", "FFFFFF")
        glass = Image.new("RGBA", (1, 1), colour)

        def reader(number, downsample):
            def read(top, bottom, left, right):
                size = right - left, bottom - top
                origin = round(left * downsample), round(top * downsample)
                region = handle.read_region(origin, number, size)
                if region.getextrema()[3] != (255, 255):
                    region = Image.alpha_composite(glass.resize(size), region)
                return np.asarray(region)[..., :3]
            return read

        levels = []
        for number, size in enumerate(handle.level_dimensions):
            downsample = downsample_of(handle.dimensions, size)
            tile = [int(properties.get(f"openslide.level[{number}].tile-{side}", 512))
                    for side in ("height", "width")]
            levels.append(Level(*size, downsample, bounded(tile, size), reader(number, downsample)))
        yield levels, plausible(*(properties.get(f"openslide.mpp-{axis}") for axis in "xy"))


@contextmanager
def tiff_levels(file):
    """Levels and mpp of the largest image of a TIFF, through tifffile."""
    with ExitStack() as stack:
        handle = stack.enter_context(tifffile.TiffFile(file))
        try:
            series = handle.series
        except Exception:  # OME-XML that nobody can read: the pages alone tell as much
            handle = stack.enter_context(tifffile.TiffFile(file, is_ome=False))
            series = handle.series
        if not series:
            raise ValueError("it holds no image")
        series = max(series, key=lambda one: one.keyframe.imagelength * one.keyframe.imagewidth)
        for level in series.levels:
            page = level.keyframe
            check_size(file, page.imagewidth, page.imagelength)
            if min(page.chunks) < 1:
                raise ValueError(f"its tiles have the size {page.chunks}")
            check_declared(f"its tiles of {page.chunks}", math.prod(page.chunks),
                           file.stat().st_size)
        if any(page is None for page in series.pages):
            raise ValueError("one of its channels is missing")
        end = max(offset + size for page in series.pages
                  for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True))
        if end > file.stat().st_size:
            raise ValueError(f"it ends {end - file.stat().st_size:,} bytes early")
        orientation, mpp = orientation_of(series.keyframe), tiff_mpp(handle, series)
        if mpp and orientation > 4:
            mpp = mpp[::-1]
        levels = [tiff_level(file, series, number) for number in range(len(series.levels))]
        yield [turned(level, orientation) for level in levels], mpp


def check_size(file, width, height):
    """Raise ValueError if a picture has more pixels than its file can hold."""
    if min(width, height) < 1:
        raise ValueError(f"it has {width} x {height} pixels")
    check_declared(f"its {width} x {height} pixels", 3 * width * height, file.stat().st_size)


def tiff_level(file, series, number):
    """One level of a TIFF series, as stored."""
    level, page = series.levels[number], series.levels[number].keyframe
    check_pixels(level)
    height, width = page.imagelength, page.imagewidth
    planes = level.axes in ("SYX", "CYX")  # one plane per colour
    if offsets := uncompressed(level):
        tile = 64, width
        row = width if planes else width * page.samplesperpixel  # bytes

        def pixels(top, bottom, left, right):
            # Rows are read from the file, because a memory map would keep all that it has read.
            read = [np.fromfile(file, np.uint8, (bottom - top) * row, offset=offset + top * row)
                    .reshape(bottom - top, width, -1)[:, left:right] for offset in offsets]
            return read[0] if len(read) == 1 else np.concatenate(read, axis=2)
    else:
        import zarr  # tifffile decodes single strips and tiles through it

        # A tile that the scanner left out holds glass.
        stored = zarr.open(series.aszarr(level=number, fillvalue=255), mode="r")
        tile = tuple(stored.chunks[level.axes.index(axis)] for axis in "YX")

        def pixels(top, bottom, left, right):
            if planes:
                return np.moveaxis(np.asarray(stored[:, top:bottom, left:right]), 0, -1)
            return np.asarray(stored[top:bottom, left:right])

    size, finest = (width, height), series.levels[0].keyframe
    downsample = downsample_of((finest.imagewidth, finest.imagelength), size)
    return Level(width, height, downsample, bounded(tile, size), pixels)


def check_pixels(level):
    """Raise ValueError unless a level of a TIFF series is RGB, RGBA or grey of 8 bits a channel."""
    page, axes = level.keyframe, level.axes
    if page.dtype != np.uint8:
        raise ValueError(f"its pixels are {page.dtype}, expected 8 bits a channel")
    kind = tifffile.PHOTOMETRIC(page.photometric).name
    if kind == "YCBCR" and page.compression == tifffile.COMPRESSION.JPEG:
        kind = "RGB"  # tifffile decodes it so
    if kind not in ("RGB", "MINISBLACK") or page.samplesperpixel not in (1, 3, 4):
        raise ValueError(f"it has {page.samplesperpixel} channels of kind {kind}, "
                         "expected RGB or grey")
    if axes == "CYX" and level.shape[0] not in (3, 4):
        raise ValueError(f"it has {level.shape[0]} channels, expected red, green and blue")
    if axes not in ("YX", "YXS", "SYX", "CYX"):
        raise ValueError(f"its axes are {axes}, expected one plane of colour pixels")


def uncompressed(level):
    """Where a level's planes begin in the file, if each is stored row after row. Otherwise None."""
    page, pages = level.keyframe, level.pages
    if not page.is_memmappable or any(has_gaps(one) for one in pages):
        return None
    offsets = [one.dataoffsets[0] for one in pages]
    if len(offsets) == 1 and level.axes in ("SYX", "CYX"):
        size = page.imagelength * page.imagewidth
        return [offsets[0] + plane * size for plane in range(level.shape[0])]
    return offsets


def has_gaps(page):
    """Whether the strips of a TIFF page do not follow each other in the file."""
    return np.diff(page.dataoffsets).tolist() != list(page.databytecounts[:-1])


def picture_level(file):
    """The one level of a JPEG or PNG, decoded whole. These hold at most some hundred megapixels."""
    with LIMIT:  # slides are larger than any web picture
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with WholeFile(file) as content, Image.open(content) as image:
                check_size(file, *image.size)
                orientation = image.getexif().get(ORIENTATION, 1)
                if image.mode in ("P", "PA") or image.mode.startswith("LA"):
                    image = image.convert("RGBA")
                elif image.mode not in ("L", "RGB", "RGBA"):
                    if image.mode.startswith(("I", "F")):
                        raise ValueError(f"its pixels are of mode {image.mode}, "
                                         "expected 8 bits a channel")
                    image = image.convert("RGB")
                pixels = np.asarray(image)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    height, width = pixels.shape[:2]

    def read(top, bottom, left, right):
        return pixels[top:bottom, left:right]

    return turned(Level(width, height, 1, bounded((BAND, 512), (width, height)), read), orientation)


def orientation_of(page):
    """The orientation tag of a TIFF page: 1 if it has none."""
    return page.tags.valueof(ORIENTATION, default=1)


def turned(level, orientation):
    """A stored level as a viewer shows it. orientation: 1 to 8, as TIFF and EXIF define them;
    others count as 1.

    tifffile.reorient is not used, because it exchanges 7 and 8.
    """
    if orientation not in range(2, 9):
        return level
    transposed = orientation > 4  # rows and columns are exchanged, and after that mirrored
    upside_down, mirrored = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    width, height, tile = level.width, level.height, level.tile
    if transposed:
        width, height, tile = height, width, tile[::-1]

    def read(top, bottom, left, right):
        rows = (height - bottom, height - top) if upside_down else (top, bottom)
        columns = (width - right, width - left) if mirrored else (left, right)
        if transposed:
            pixels = level.read(*columns, *rows).swapaxes(0, 1)
        else:
            pixels = level.read(*rows, *columns)
        if upside_down:
            pixels = pixels[::-1]
        return pixels[:, ::-1] if mirrored else pixels

    return replace(level, width=width, height=height, tile=tile, read=read)


def bounded(tile, size):
    """(height, width) of a tile no larger than its level. size: the level's (width, height)."""
    return min(tile[0], size[1]), min(tile[1], size[0])


def downsample_of(full, size):
    """Full-resolution pixels across one of a level: whole where the sizes allow it, as a pyramid
    rounds its own size.

    full, size: (width, height). A ratio of sizes that were rounded would be off by up to a pixel at
    the far end.
    """
    ratio = (full[0] / size[0] + full[1] / size[1]) / 2
    whole = round(ratio)
    return whole if all(abs(f / whole - s) < 1 for f, s in zip(full, size, strict=True)) else ratio


# ------------------------------------------------------------ microns per pixel


def microns_per_pixel(slide, given=None):
    """The width of a full-resolution pixel in µm: `given`, or what the file says.

    Raises InputError if neither is known, if it is implausible, or if the file's pixels are not
    square.
    """
    if given is not None:
        if plausible(given, given) is None:
            raise InputError(f"--mpp {given}: expected µm a pixel, "
                             f"from {PLAUSIBLE[0]} to {PLAUSIBLE[1]}")
        return float(given)
    if slide.mpp is None:
        raise InputError(f"{slide.path} does not say how many µm a pixel is wide. "
                         "Give it with --mpp")
    x, y = slide.mpp
    if abs(x / y - 1) > 0.02:
        raise InputError(f"{slide.path}: its pixels are not square, {x:.4g} by {y:.4g} µm. "
                         "Resample the image, or give one width with --mpp if that is an error")
    return slide.stated_mpp


def plausible(x, y):
    """(x, y) as numbers if both are within what a microscope makes of a pixel, else None."""
    try:
        pair = float(x), float(y)
    except (TypeError, ValueError):  # absent, or no number
        return None
    return pair if all(PLAUSIBLE[0] <= value <= PLAUSIBLE[1] for value in pair) else None


def tiff_mpp(handle, series):
    """(x, y) in µm per pixel of a TIFF's series as stored: from OME-XML, Aperio's MPP, or the
    resolution tags.

    None where none of them says it. What cannot be understood counts as absent.
    """
    for source in (ome_mpp, aperio_mpp, tag_mpp):
        with suppress(Exception):  # writers leave all kinds of things in these fields
            if found := source(handle, series):
                return found
    return None


def ome_mpp(handle, series):
    """What OME-XML says of the series."""
    if not handle.is_ome:
        return None
    images = xml.etree.ElementTree.fromstring(handle.ome_metadata).findall(".//{*}Pixels")
    of_size = [image for image in images if (image.get("SizeX"), image.get("SizeY")) == (
        str(series.keyframe.imagewidth), str(series.keyframe.imagelength))]
    pixels = (of_size or images)[0]  # a label has an entry of its own
    sizes = [float(pixels.get(f"PhysicalSize{axis}")) for axis in "XY"]
    units = [MICRONS[pixels.get(f"PhysicalSize{axis}Unit", "µm")] for axis in "XY"]
    return plausible(sizes[0] * units[0], sizes[1] * units[1])


def aperio_mpp(handle, series):
    """What Aperio's description says."""
    match = handle.is_svs and re.search(r"MPP *= *([\d.]+)", series.keyframe.description)
    return plausible(match[1], match[1]) if match else None


def tag_mpp(handle, series):
    """What the resolution tags say, in inches, centimetres, or ImageJ's unit."""
    page = series.keyframe
    if not {"XResolution", "YResolution"} <= {tag.name for tag in page.tags}:
        return None  # tifffile would answer 1
    unit = {2: 25400, 3: 10000}.get(int(page.resolutionunit))  # inch, centimetre
    if unit is None and handle.is_imagej:
        unit = MICRONS[handle.imagej_metadata["unit"]]
    return plausible(*(unit / pixels for pixels in page.resolution)) if unit else None


# ------------------------------------------------------------ patches of sections


def crop_patches(slide, xy, size, path, patch_px=None):
    """Crop a size x size patch around every spot in one pass over the slide, and write them to
    `path`.

    xy: (n, 2) spot centres in pixels, image column and row. Row i of the file, a .npy of uint8 (n,
    P, P, 3), is the patch of spot i: slide[y - size/2 : y + size/2, x - size/2 : x + size/2] with x
    and y rounded. What lies beyond the slide's edge repeats the edge. P is size, or patch_px, to
    which the patch is then resampled.
    Returns (thumbnail uint8 (h, w, 3), thumbnail pixels per slide pixel, number of patches that
    reach over the edge).
    Raises InputError if a centre lies outside the slide.
    """
    check_inside(slide, xy)
    centres = np.rint(xy).astype(np.int64)
    lefts, tops = (centres - size // 2).T
    over_edge = ((lefts < 0) | (tops < 0)
                 | (lefts + size > slide.width) | (tops + size > slide.height))

    shrink = -(-max(slide.height, slide.width) // THUMBNAIL)
    stored = size if patch_px is None else patch_px
    thumbnail, pending = [], np.empty((0, slide.width, 3), np.uint8)
    waiting = np.argsort(tops, kind="stable")[::-1].tolist()  # topmost last, to pop
    open_patches = {}  # spots that the band reaches but does not finish
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(xy), stored, stored, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for top, band in slide.bands():
            bottom = top + len(band)
            while waiting and tops[waiting[-1]] < bottom:
                open_patches[waiting.pop()] = np.empty((size, size, 3), np.uint8)
            for i, patch in list(open_patches.items()):
                y0, y1 = max(tops[i], top), min(tops[i] + size, bottom)
                x0, x1 = max(lefts[i], 0), min(lefts[i] + size, slide.width)
                part = patch[y0 - tops[i]:y1 - tops[i], x0 - lefts[i]:x1 - lefts[i]]
                part[:] = band[y0 - top:y1 - top, x0:x1]
                if tops[i] + size <= bottom or bottom == slide.height:
                    if over_edge[i]:
                        patch = repeat_edge(patch, lefts[i], tops[i], slide)
                    patch = resample(patch, stored)
                    file.seek(start + i * patch.nbytes)
                    file.write(np.ascontiguousarray(patch))
                    del open_patches[i]
            pending = np.concatenate([pending, band]) if len(pending) else band
            if whole := len(pending) // shrink * shrink:
                thumbnail.append(shrunk(pending, shrink))
            pending = pending[whole:]
    return np.concatenate(thumbnail), 1 / shrink, int(over_edge.sum())


def shrunk(rgb, times):
    """The mean colour of whole squares of times x times pixels.

    uint8 (h, w, 3) -> (h // times, w // times, 3). What is left over at the right and bottom is
    dropped.
    """
    height, width = (side // times for side in rgb.shape[:2])
    whole = rgb[:height * times]  # columns are dropped afterwards: Pillow takes whole rows uncopied
    return np.asarray(Image.fromarray(whole).reduce(times))[:, :width]


def outside(slide, xy):
    """Which spot centres lie outside the slide: bool (n,)."""
    centres = np.rint(xy)
    return ((centres < 0) | (centres >= [slide.width, slide.height])).any(axis=1)


def leave_outside(slide, xy):
    """Leave out the few spots whose centres lie outside the slide.

    Returns (which lie inside, bool (n,); a note, or None). Raises InputError if many lie outside.
    """
    out, example = outside(slide, xy), ""
    if out.any():
        x, y = np.rint(xy[out][0]).astype(int)
        example = f", for example at x {x}, y {y}"
    note = leave_out(
        out, f"lie outside {slide.path}, which has {slide.width} x {slide.height} pixels{example}",
        "It is another section's image, or not the full-resolution one, which a sample sheet can "
        "state in its column scale")
    return ~out, note


def check_inside(slide, xy):
    """Raise InputError if a spot centre lies outside the slide."""
    if (out := outside(slide, xy)).any():
        x, y = np.rint(xy[out][0]).astype(int)
        raise InputError(f"{slide.path} has {slide.width} x {slide.height} pixels, but {out.sum()} "
                         f"of {len(xy)} spots lie outside it, one at x {x}, y {y}. They are "
                         "another slide's, or not in full-resolution pixels")


def repeat_edge(patch, left, top, slide):
    """Fill what lies beyond the slide with its nearest pixel."""
    size = len(patch)
    rows = np.clip(np.arange(size), max(0, -top), min(size, slide.height - top) - 1)
    cols = np.clip(np.arange(size), max(0, -left), min(size, slide.width - left) - 1)
    return patch[rows][:, cols]


def resample(patch, size):
    """A square patch at another size: bilinear, antialiased where it shrinks."""
    if len(patch) == size:
        return patch
    return np.asarray(Image.fromarray(patch).resize((size, size), Image.Resampling.BILINEAR))


# ------------------------------------------------------------ patches of slides


class SpotPatches:
    """The patches of spots on a whole slide, read as they are asked for; `order` asks for each tile
    about once.

    xy: (n, 2) spot centres in full-resolution pixels, rounded to whole ones. crop: side of a patch
    in full-resolution pixels, any positive number. It is read from the coarsest level on which it
    has at least patch_px pixels, and resampled (bilinear, antialiased) to patch_px where it has
    more, or, on a coarse slide, fewer.
    Raises InputError if a centre lies outside the slide, or if a patch is larger than the slide.
    """

    def __init__(self, slide, xy, crop, patch_px, device):
        self.slide, self.patch_px, self.device = slide, patch_px, device
        self.xy = np.rint(xy).astype(np.int64)
        check_inside(slide, xy)
        if crop > max(slide.width, slide.height):
            raise InputError(f"{slide.path} has {slide.width} x {slide.height} pixels, and a patch "
                             f"would take {crop:.0f}: check --mpp")
        self.level = slide.level_for(crop / (patch_px - 0.5))
        self.size = crop / self.level.downsample  # of the level's pixels
        if abs(self.size - patch_px) < 0.5:
            self.size = patch_px

    def __len__(self):
        return len(self.xy)

    @property
    def order(self):
        """(n,) spots by rows of tiles, from left to right, in strips that the cache can hold."""
        height, width = self.level.tile
        # Rows of tiles that are held at a time
        rows = min(math.ceil(self.size / height) + 2, -(-self.level.height // height))
        # One tile may be as wide as the slide. Then all rows that a patch needs are held.
        self.slide.capacity = max(CACHE, rows * height * width * 3)
        strip = self.level.width
        if width < strip:
            strip = max(CACHE // (rows * height * 3), width)
        x, y = (self.xy / self.level.downsample).T
        return np.lexsort([x, np.maximum(y - self.size / 2, 0) // height, x // strip])

    def window(self, spot):
        """Where a patch lies on its level, and its own corner in there.

        Returns (left, top, width, height) in whole pixels, and (x, y) in fractions of them.
        """
        centre = self.xy[spot] / self.level.downsample
        if self.size == self.patch_px:  # the same pixels as slide.crop_patches
            left, top = np.rint(centre).astype(int).tolist()
            half = self.patch_px // 2
            return (left - half, top - half, self.patch_px, self.patch_px), (0, 0)
        start = centre - self.size / 2
        low = np.floor(start).astype(int)
        size = np.ceil(start + self.size).astype(int) - low
        return (*low.tolist(), *size.tolist()), tuple(start - low)

    def patch(self, spot):
        """uint8 (patch_px, patch_px, 3)."""
        window, (x, y) = self.window(spot)
        region = self.slide.region(self.level, *window)
        if self.size == self.patch_px:
            return region
        box = x, y, x + self.size, y + self.size
        size = self.patch_px, self.patch_px
        return np.asarray(Image.fromarray(region).resize(size, Image.Resampling.BILINEAR, box))

    def read(self, index):
        """index: (B,) int64 on the CPU -> uint8 (B, P, P, 3) on the CPU.

        In pinned memory where a GPU waits for it.
        """
        import torch  # preprocessing crops patches without it

        batch = torch.empty((len(index), self.patch_px, self.patch_px, 3), dtype=torch.uint8,
                            pin_memory=self.device.type == "cuda")
        spots = index.tolist()
        for row, spot in enumerate(spots):
            for ahead in spots[row + AHEAD:row + AHEAD + 1] if row else spots[:AHEAD + 1]:
                # Decoded while the patches before are resampled
                self.slide.tiles_of(self.level, *self.window(ahead)[0])
            batch.numpy()[row] = self.patch(spot)
        return batch

    def stream(self, batches):
        """Yield the patches of each index in `batches`, (B,) int64 on the CPU, as uint8 (B, P, P,
        3) on the device.

        One thread reads ahead, as the tiles are to be asked for in order.
        """
        bar = tqdm(total=len(self), desc="predict", unit="patch", leave=False, disable=None)
        with ThreadPoolExecutor(1) as reader, bar:
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


# ------------------------------------------------------------ patches cut before


class StoredPatches:
    """Patches that were cut before, as HEST stores them (hestcore 1.0.6): an HDF5 file, joined to
    spots by barcode.

    img: uint8 (N, S, S, 3) RGB, at any scale. coords: (N, 2), the x and y of their top left corners
    in full-resolution pixels. barcode: (N, 1).
    """

    stated_mpp = None  # such a file states none

    def __init__(self, path):
        self.path = path
        try:
            with open_hdf5(path) as file:
                self.side = file["img"].shape[1]
                shape, kind = file["img"].shape, file["img"].dtype
                if shape[1:] != (self.side, self.side, 3) or kind != np.uint8:
                    raise ValueError(f"img is {kind} of shape {shape}, expected RGB patches")
                self.corners = file["coords"][:].astype(np.float64)
                stored = file["barcode"]
                barcodes = stored.asstr()[:] if stored.dtype == object else stored[:].astype(str)
                barcodes = barcodes.ravel()
            self.row = pd.Series(np.arange(len(self.corners)), index=barcodes)
        except FileNotFoundError:
            raise InputError(f"{path} is missing") from None
        except Exception as error:  # HDF5 raises many kinds
            raise InputError(f"{path} is not a file of patches as HEST writes it "
                             f"({first_line(error)})") from None
        if not self.row.index.is_unique:
            twice = self.row.index[self.row.index.duplicated()][0]
            raise InputError(f"{path}: barcode {twice} occurs more than once")

    def of(self, adata):
        """The spots that have a patch. HEST stores none off its tissue mask or too near an edge.

        Raises InputError if many spots have none.
        """
        has_patch = adata.obs_names.isin(self.row.index)
        note = leave_out(~has_patch, f"have no patch in {self.path}",
                         f"Its own barcodes begin {', '.join(self.row.index[:2])}. It is another "
                         "section's, or incomplete")
        adata = adata[has_patch].copy()
        add_note(adata, note)
        return adata

    def crop_px(self, adata):
        """The side of what a patch shows, in full-resolution pixels.

        It is twice the way from the patch's corner to its spot.
        """
        way = adata.obsm["spatial"] - self.corners[self.row[adata.obs_names]]  # (n, 2)
        crop_px = 2 * np.median(way)
        if crop_px < 1 or np.abs(2 * way - crop_px).max() > 4:  # corners are rounded
            raise InputError(f"{self.path}: its patches do not lie around the section's spots; "
                             "they were cut for other positions")
        return round(crop_px)

    def write(self, adata, crop_px, patch_px, path):
        """Write the middle crop_px of each spot's patch to a .npy of uint8 (n, patch_px, patch_px,
        3), in spot order.

        Returns (thumbnail uint8 (h, w, 3): the patches in their places on white, its pixels per
        full-resolution pixel, 0 patches that reach over an edge).
        """
        inner = min(self.side, round(self.side * crop_px / self.crop_px(adata)))
        edge = (self.side - inner) // 2
        xy = adata.obsm["spatial"]
        scale = min(1, THUMBNAIL / (xy.max() + crop_px / 2))
        width, height = np.ceil((xy.max(axis=0) + crop_px / 2) * scale).astype(int)
        thumbnail, tile = Image.new("RGB", (width, height), "white"), max(1, round(crop_px * scale))
        with h5py.File(self.path) as file, open(path, "wb") as out:
            header = {"descr": "|u1", "fortran_order": False,
                      "shape": (len(xy), patch_px, patch_px, 3)}
            np.lib.format.write_array_header_1_0(out, header)
            for (x, y), row in zip(xy, self.row[adata.obs_names], strict=True):
                try:
                    patch = file["img"][row, edge:edge + inner, edge:edge + inner]
                except OSError as error:
                    raise unreadable(self.path, error) from None
                out.write(resample(patch, patch_px).tobytes())
                thumbnail.paste(Image.fromarray(resample(patch, tile)),
                                (round(x * scale - tile / 2), round(y * scale - tile / 2)))
        return np.asarray(thumbnail), scale, 0


def unreadable(path, error):
    """The error for a file that is no readable image."""
    if isinstance(error, InputError):
        return error
    return InputError(f"{path} cannot be read as an image ({first_line(error)}). "
                      "Download or export it again")
