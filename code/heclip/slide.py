"""Slides: open one without decoding it, and crop the patches in one pass over its rows. The only pixel code.

A slide is read in bands of whole rows, from top to bottom, so every strip or tile is decoded once and memory does
not grow with the slide: a band is about 128 rows, unless one strip or tile of the file is taller. JPEG and PNG files
are decoded whole. Patches that HEST has cut are taken from its files.
"""

import math
import threading
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import tifffile
from isal import igzip, isal_zlib  # gzip, at two to three times its speed
from PIL import Image

from .dataset import first_line
from .files import InputError

BAND = 128  # rows read at a time, at least: more would leave the processor's cache
LIMIT = threading.Lock()  # Pillow's limit of pixels is one for all threads
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
        with igzip.open(path) as source, open(target, "wb") as out:
            while block := source.read(1 << 24):
                out.write(block)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (EOFError, igzip.BadGzipFile, isal_zlib.error) as error:
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
            check_pixels(page, series.axes)
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


def check_pixels(page, axes):
    """Raise ValueError unless a TIFF page holds one plane of RGB, RGBA or grey pixels of 8 bits a channel."""
    if page.dtype != np.uint8:
        raise ValueError(f"its pixels are {page.dtype}, expected 8 bits a channel")
    kind = tifffile.PHOTOMETRIC(page.photometric).name
    if kind == "YCBCR" and page.compression == tifffile.COMPRESSION.JPEG:
        kind = "RGB"  # tifffile decodes it so
    if kind not in ("RGB", "MINISBLACK") or page.samplesperpixel not in (1, 3, 4):
        raise ValueError(f"it has {page.samplesperpixel} channels of kind {kind}, expected RGB or grey")
    if axes not in ("YX", "YXS", "SYX"):
        raise ValueError(f"its axes are {axes}, expected one plane of colour pixels")


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
    with LIMIT:
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


def crop_patches(slide, xy, size, path, patch_px=None):
    """Crop a size x size patch around every spot in one pass over the slide, and write them to `path`.

    xy: (n, 2) spot centres in pixels, image column and row. Row i of the file, a .npy of uint8 (n, P, P, 3), is the
    patch of spot i: slide[y - size/2 : y + size/2, x - size/2 : x + size/2] with x and y rounded. What lies beyond the
    slide's edge repeats the edge. P is size, or patch_px, to which the patch is then resampled.
    Returns (thumbnail uint8 (h, w, 3), thumbnail pixels per slide pixel, number of patches that reach over the edge).
    Raises InputError if a centre lies outside the slide.
    """
    check_inside(slide, xy)
    centres = np.rint(xy).astype(np.int64)
    lefts, tops = (centres - size // 2).T
    over_edge = (lefts < 0) | (tops < 0) | (lefts + size > slide.width) | (tops + size > slide.height)

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
                patch[y0 - tops[i]:y1 - tops[i], x0 - lefts[i]:x1 - lefts[i]] = band[y0 - top:y1 - top, x0:x1]
                if tops[i] + size <= bottom or bottom == slide.height:
                    if over_edge[i]:
                        patch = repeat_edge(patch, lefts[i], tops[i], slide)
                    patch = resample(patch, stored)
                    file.seek(start + i * patch.nbytes)
                    file.write(np.ascontiguousarray(patch))
                    del open_patches[i]
            pending = np.concatenate([pending, band]) if len(pending) else band
            if whole := len(pending) // shrink * shrink:
                thumbnail.append(reduce(pending[:whole], shrink))
            pending = pending[whole:]
    return np.concatenate(thumbnail), 1 / shrink, int(over_edge.sum())


def reduce(band, shrink):
    """The mean colour of every shrink x shrink pixels: uint8 (h, w, 3) -> (h / shrink, w // shrink, 3)."""
    reduced = Image.fromarray(band).reduce(shrink)  # of whole rows, which Pillow takes as they are
    return np.asarray(reduced)[:, :band.shape[1] // shrink]


def outside(slide, xy):
    """Which spot centres lie outside the slide: bool (n,)."""
    centres = np.rint(xy)
    return ((centres < 0) | (centres >= [slide.width, slide.height])).any(axis=1)


def check_inside(slide, xy):
    """Raise InputError if a spot centre lies outside the slide."""
    if (out := outside(slide, xy)).any():
        x, y = np.rint(xy[out][0]).astype(int)
        raise InputError(f"{slide.path} has {slide.width} x {slide.height} pixels, but {out.sum()} of {len(xy)} spots "
                         f"lie outside it, one at x {x}, y {y}. It is another section's image, or not the "
                         "full-resolution one, which a sample sheet can state in its column scale")


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


class StoredPatches:
    """Patches that were cut before, as HEST stores them (hestcore 1.0.6): an HDF5 file, joined to spots by barcode.

    img: uint8 (N, S, S, 3) RGB, at any scale. coords: (N, 2), the x and y of their top left corners in full-resolution
    pixels. barcode: (N, 1).
    """

    def __init__(self, path):
        self.path = path
        try:
            with h5py.File(path) as file:
                self.side = file["img"].shape[1]
                if file["img"].shape[1:] != (self.side, self.side, 3) or file["img"].dtype != np.uint8:
                    raise ValueError(f"img is {file['img'].dtype} of shape {file['img'].shape}, expected RGB patches")
                self.corners = file["coords"][:].astype(np.float64)
                barcodes = file["barcode"].asstr()[:].ravel() if file["barcode"].dtype == object else (
                    file["barcode"][:].astype(str).ravel())
            self.row = pd.Series(np.arange(len(self.corners)), index=barcodes)
        except FileNotFoundError:
            raise InputError(f"{path} is missing") from None
        except Exception as error:  # HDF5 raises many kinds
            raise InputError(f"{path} is not a file of patches as HEST writes it ({first_line(error)})") from None
        if not self.row.index.is_unique:
            raise InputError(f"{path}: barcode {self.row.index[self.row.index.duplicated()][0]} occurs more than once")

    def of(self, adata):
        """The spots that have a patch: HEST stores none for those off its tissue mask or too near an edge."""
        kept = adata.obs_names.isin(self.row.index)
        if not kept.any():
            raise InputError(f"{self.path} has none of the section's {adata.n_obs} spots; its own barcodes begin "
                             f"{', '.join(self.row.index[:2])}. It is another section's")
        return adata[kept].copy()

    def crop_px(self, adata):
        """The side of what a patch shows, in full-resolution pixels: twice the way from its corner to its spot."""
        way = adata.obsm["spatial"] - self.corners[self.row[adata.obs_names]]  # (n, 2)
        crop_px = 2 * np.median(way)
        if crop_px < 1 or np.abs(2 * way - crop_px).max() > 4:  # corners are rounded
            raise InputError(f"{self.path}: its patches do not lie around the section's spots; they were cut for other "
                             "positions")
        return round(crop_px)

    def write(self, adata, crop_px, patch_px, path):
        """Write the middle crop_px of each spot's patch to a .npy of uint8 (n, patch_px, patch_px, 3), in spot order.

        Returns (thumbnail uint8 (h, w, 3): the patches in their places on white, its pixels per full-resolution pixel).
        """
        inner = min(self.side, round(self.side * crop_px / self.crop_px(adata)))
        edge = (self.side - inner) // 2
        xy = adata.obsm["spatial"]
        scale = min(1, THUMBNAIL / (xy.max() + crop_px / 2))
        width, height = np.ceil((xy.max(axis=0) + crop_px / 2) * scale).astype(int)
        thumbnail, tile = Image.new("RGB", (width, height), "white"), max(1, round(crop_px * scale))
        with h5py.File(self.path) as file, open(path, "wb") as out:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(xy), patch_px, patch_px, 3)}
            np.lib.format.write_array_header_1_0(out, header)
            for (x, y), row in zip(xy, self.row[adata.obs_names], strict=True):
                patch = file["img"][row, edge:edge + inner, edge:edge + inner]
                out.write(resample(patch, patch_px).tobytes())
                thumbnail.paste(Image.fromarray(resample(patch, tile)),
                                (round(x * scale - tile / 2), round(y * scale - tile / 2)))
        return np.asarray(thumbnail), scale


def unreadable(path, error):
    """The error for a file that is no readable image."""
    if isinstance(error, InputError):
        return error
    return InputError(f"{path} cannot be read as an image ({first_line(error)}). Download or export it again")
