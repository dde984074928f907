"""Slides: open one without decoding it, and crop the patches in one pass over its rows. The only pixel code.

A slide is read in bands of whole rows, from top to bottom, so every strip or tile is decoded once and memory does
not grow with the slide: a band is about 512 rows, unless one strip or tile of the file is taller. JPEG and PNG files
are decoded whole.
"""

import gzip
import math
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from .dataset import first_line
from .files import InputError

BAND = 512  # rows read at a time, at least
THUMBNAIL = 1500  # px, the longest edge of the picture kept beside the expression


class Slide:
    """An open slide of height x width pixels.

    pixels: array-like (height, width, channels) uint8 whose row slices are read on demand.
    chunk: rows that the file stores together.
    """

    def __init__(self, path, pixels, chunk=1):
        self.path, self.pixels = path, pixels
        self.height, self.width = pixels.shape[:2]
        self.band = -(-BAND // chunk) * chunk

    def bands(self):
        """Yield (first row, uint8 (rows, width, 3) RGB) from top to bottom."""
        for top in range(0, self.height, self.band):
            try:
                band = np.asarray(self.pixels[top:top + self.band])
            except Exception as error:  # every codec has its own kinds
                raise unreadable(self.path, error) from None
            yield top, self.to_rgb(band)

    def to_rgb(self, band):
        """Drop an opaque alpha, repeat grey; no colour is changed."""
        if band.ndim == 2 or band.shape[2] == 1:
            return np.repeat(band.reshape(*band.shape[:2], 1), 3, axis=2)
        if band.shape[2] == 4 and (band[..., 3] != 255).any():
            raise InputError(f"{self.path}: its alpha channel is not 255 everywhere, so its colours are not what one "
                             "sees. Flatten it on white first")
        rgb = np.empty((*band.shape[:2], 3), np.uint8)  # packed: every later copy of a view would be slower
        for channel in range(3):
            rgb[..., channel] = band[..., channel]
        return rgb


@contextmanager
def open_slide(path, scratch):
    """Open a TIFF, JPEG or PNG; a gzipped one is unpacked to the file `scratch`.

    Yields a Slide. Raises InputError if the file is no image that can be read, or is not 8 bits a channel.
    """
    path, scratch = Path(path), Path(scratch)
    try:
        file = path
        if path.name.endswith(".gz"):
            file = scratch
            scratch.parent.mkdir(parents=True, exist_ok=True)
            unpack(path, scratch)
        if path.name.removesuffix(".gz").lower().endswith((".tif", ".tiff")):
            with tiff(path, file) as slide:
                yield slide
        else:
            yield picture(path, file)
    finally:
        scratch.unlink(missing_ok=True)


def unpack(path, target):
    """Gunzip to `target`, to the last byte: a file that ends early is an error."""
    try:
        with gzip.open(path) as source, open(target, "wb") as out:
            while block := source.read(1 << 24):
                out.write(block)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise unreadable(path, error) from None


@contextmanager
def tiff(path, file):
    """A Slide over the first, full-size level of a TIFF."""
    try:
        handle = tifffile.TiffFile(file)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except Exception as error:
        raise unreadable(path, error) from None
    with handle:
        try:
            if not handle.pages:
                raise ValueError("it holds no image")
            series, page = handle.series[0], handle.pages[0]
            end = max(offset + size for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True))
            if end > file.stat().st_size:
                raise ValueError(f"it ends {end - file.stat().st_size:,} bytes early")
            if page.dtype != np.uint8:
                raise ValueError(f"its pixels are {page.dtype}, expected 8 bits a channel")
            kind = tifffile.PHOTOMETRIC(page.photometric).name
            if kind == "YCBCR" and page.compression == tifffile.COMPRESSION.JPEG:
                kind = "RGB"  # tifffile decodes it so
            if kind not in ("RGB", "MINISBLACK") or page.samplesperpixel not in (1, 3, 4):
                raise ValueError(f"it has {page.samplesperpixel} channels of kind {kind}, expected RGB or grey")
            if series.axes not in ("YX", "YXS", "SYX"):
                raise ValueError(f"its axes are {series.axes}, expected one plane of colour pixels")
            if page.is_memmappable and series.axes != "SYX":
                pixels, chunk = RowsOfFile(file, page.dataoffsets[0], page.shape), 1
            else:
                import zarr  # tifffile decodes single strips and tiles through it

                pixels = zarr.open(series.aszarr(level=0), mode="r")
                chunk = pixels.chunks[series.axes.index("Y")]
            if series.axes == "SYX":  # one plane a colour
                pixels = ChannelsLast(pixels)
        except Exception as error:
            raise unreadable(path, error) from None
        yield Slide(path, pixels, chunk)


class RowsOfFile:
    """Row slices of uncompressed pixels, read as they are asked for: a memory map would keep what it has read."""

    def __init__(self, file, offset, shape):
        self.file, self.offset, self.shape = file, offset, shape

    def __getitem__(self, rows):
        top, bottom, _ = rows.indices(self.shape[0])
        band = np.fromfile(self.file, np.uint8, (bottom - top) * math.prod(self.shape[1:]),
                           offset=self.offset + top * math.prod(self.shape[1:]))
        return band.reshape(bottom - top, *self.shape[1:])


class ChannelsLast:
    """Row slices (rows, width, channels) of an array stored as (channels, height, width)."""

    def __init__(self, planes):
        self.planes = planes
        self.shape = (*planes.shape[1:], planes.shape[0])

    def __getitem__(self, rows):
        return np.moveaxis(np.asarray(self.planes[:, rows]), 0, -1)


def picture(path, file):
    """A Slide over a JPEG or PNG, decoded whole: these formats hold at most some hundred megapixels."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # slides are larger than any web picture
    try:
        with Image.open(file) as image:
            if image.mode in ("P", "PA") or image.mode.startswith("LA"):
                image = image.convert("RGBA")
            elif image.mode not in ("L", "RGB", "RGBA"):
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"its pixels are of mode {image.mode}, expected 8 bits a channel")
                image = image.convert("RGB")
            return Slide(path, np.asarray(image))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except Exception as error:
        raise unreadable(path, error) from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def crop_patches(slide, xy, size, path):
    """Crop a size x size patch around every spot in one pass over the slide, and write them to `path`.

    xy: (n, 2) spot centres in pixels, image column and row. Row i of the file, a .npy of uint8 (n, size, size, 3),
    is the patch of spot i: slide[y - size/2 : y + size/2, x - size/2 : x + size/2] with x and y rounded. What lies
    beyond the slide's edge repeats the edge.
    Returns (thumbnail uint8 (h, w, 3), thumbnail pixels per slide pixel, number of patches that reach over the edge).
    Raises InputError if a centre lies outside the slide.
    """
    centres = np.rint(xy).astype(np.int64)
    outside = ((centres < 0) | (centres >= [slide.width, slide.height])).any(axis=1)
    if outside.any():
        raise InputError(f"{slide.path} has {slide.width} x {slide.height} pixels, but {outside.sum()} of {len(xy)} "
                         f"spots lie outside it, one at x {centres[outside][0][0]}, y {centres[outside][0][1]}. It is "
                         "another section's image, or not the full-resolution one")
    lefts, tops = (centres - size // 2).T
    over_edge = (lefts < 0) | (tops < 0) | (lefts + size > slide.width) | (tops + size > slide.height)

    shrink = -(-max(slide.height, slide.width) // THUMBNAIL)
    thumbnail, pending = [], np.empty((0, slide.width, 3), np.uint8)
    waiting = np.argsort(tops, kind="stable")[::-1].tolist()  # topmost last, to pop
    open_patches = {}  # spots that the band reaches but does not finish
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(xy), size, size, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for top, band in slide.bands():
            bottom = top + len(band)
            while waiting and tops[waiting[-1]] < bottom:
                open_patches[waiting.pop()] = np.empty((size, size, 3), np.uint8)
            for i, patch in list(open_patches.items()):
                y0, y1 = max(tops[i], top), min(tops[i] + size, bottom)
                x0, x1 = max(lefts[i], 0), min(lefts[i] + size, slide.width)
                patch[y0 - tops[i]:y1 - tops[i], x0 - lefts[i]:x1 - lefts[i]] = band[y0 - top:y1 - top, x0:x1]
                if tops[i] + size <= bottom or bottom == slide.height:
                    if over_edge[i]:
                        patch = repeat_edge(patch, lefts[i], tops[i], slide)
                    file.seek(start + i * patch.nbytes)
                    file.write(np.ascontiguousarray(patch))
                    del open_patches[i]
            pending = np.concatenate([pending, band]) if len(pending) else band
            whole = len(pending) // shrink * shrink
            if whole:
                thumbnail.append(np.asarray(Image.fromarray(pending[:whole, :slide.width // shrink * shrink])
                                            .reduce(shrink)))
            pending = pending[whole:]
    return np.concatenate(thumbnail), 1 / shrink, int(over_edge.sum())


def repeat_edge(patch, left, top, slide):
    """Fill what lies beyond the slide with its nearest pixel."""
    size = len(patch)
    rows = np.clip(np.arange(size), max(0, -top), min(size, slide.height - top) - 1)
    cols = np.clip(np.arange(size), max(0, -left), min(size, slide.width - left) - 1)
    return patch[rows][:, cols]


def unreadable(path, error):
    """The error for a file that is no readable image."""
    if isinstance(error, InputError):
        return error
    return InputError(f"{path} cannot be read as an image ({first_line(error)}). Download or export it again")
