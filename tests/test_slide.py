"""slide.py: whatever the file, a patch is the obvious slice of the whole image."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import tifffile
import torch
from PIL import Image

from heclip import slide
from heclip.files import InputError
from heclip.slide import SpotPatches, microns_per_pixel, open_slide
from heclip.spots import lattice

HEIGHT, WIDTH, SIZE = 200, 150, 32
TALL, WIDE = 420, 300  # of whole slides
APERIO = ("Aperio Image Library v11.2.1 \r\n300x420 [0,0 300x420] (64x64) JPEG/RGB Q=70|"
          "AppMag = 20|MPP = {}")
CPU = torch.device("cpu")


def an_image(height=HEIGHT, width=WIDTH, channels=3, seed=0):
    """Noise over a gradient that differs in both directions and all channels, so that no swap goes
    unseen."""
    rows, cols = np.mgrid[:height, :width]
    planes = [rows % 200, cols % 200, (rows + 2 * cols) % 200,
              np.full((height, width), 200)][:channels]
    noise = np.random.default_rng(seed).integers(0, 55, (height, width, channels))
    image = (np.stack(planes, axis=-1) + noise).astype(np.uint8)
    if channels == 4:
        image[..., 3] = 255
    return image if channels > 1 else image[..., 0]


def some_spots(n=25, height=HEIGHT, width=WIDTH, seed=0):
    """Spots in random order, fractions of pixels, with the image's corners among them."""
    inside = np.random.default_rng(seed).uniform(0, 1, (n, 2)) * [width - 1, height - 1]
    return np.random.default_rng(seed).permutation(
        np.concatenate([inside,
                        [[0, 0], [width - 1, height - 1], [width - 1, 0], [0, height - 1]]]))


def obvious_patches(image, xy, size=SIZE):
    """The definition: decode everything, repeat the edge, slice."""
    image = np.stack([image] * 3, axis=-1) if image.ndim == 2 else image[..., :3]
    padded = np.pad(image, ((size, size), (size, size), (0, 0)), mode="edge")
    corners = [(round(y) - size // 2 + size, round(x) - size // 2 + size) for x, y in xy.tolist()]
    return np.stack([padded[top:top + size, left:left + size] for top, left in corners])


def crop(path, xy, size=SIZE):
    """Patches, thumbnail, scale and padded count of a slide, through files as preprocess does
    it."""
    target = path.parent / "patches.npy"
    with slide.open_slide(path, path.parent) as opened:
        rest = slide.crop_patches(opened, xy, size, target)
    assert not list(path.parent.glob(".*"))
    return np.load(target), *rest


TIFFS = {
    "uncompressed, one strip": dict(rowsperstrip=HEIGHT),
    "uncompressed, strips": dict(rowsperstrip=7),
    "uncompressed, tiles": dict(tile=(48, 64)),
    "big endian, strips": dict(rowsperstrip=7, byteorder=">"),
    "BigTIFF": dict(rowsperstrip=7, bigtiff=True),
    "LZW, strips": dict(rowsperstrip=7, compression="lzw", predictor=True),
    "LZW, one strip": dict(rowsperstrip=HEIGHT, compression="lzw"),
    "deflate, strips": dict(rowsperstrip=7, compression="deflate"),
    "deflate, tiles": dict(tile=(48, 64), compression="deflate", predictor=True),
    "JPEG, tiles": dict(tile=(48, 64), compression="jpeg"),
    "JPEG, strips": dict(rowsperstrip=16, compression="jpeg"),
}


@pytest.fixture(params=[512, 20], ids=["one band", "many bands"])
def band(request, monkeypatch):
    """512 rows hold the whole test image; of 20 rows a patch spans up to three bands."""
    monkeypatch.setattr(slide, "BAND", request.param)


@pytest.mark.usefixtures("band")
@pytest.mark.parametrize(("name", "channels"), [
    (name, channels) for name in TIFFS for channels in (1, 3, 4)
    if not ("JPEG" in name and channels == 4)])
def test_patches_of_a_tiff_are_slices_of_the_whole_image(tmp_path, name, channels):
    image = an_image(channels=channels)
    layout = dict(photometric="rgb" if channels > 1 else "minisblack", metadata=None) | TIFFS[name]
    layout |= dict(extrasamples=["unassalpha"]) if channels == 4 else {}
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, image, **layout)
    whole = tifffile.imread(path)
    if "JPEG" not in name:
        np.testing.assert_array_equal(whole, image)
    xy = some_spots()
    np.testing.assert_array_equal(crop(path, xy)[0], obvious_patches(whole, xy))


@pytest.mark.usefixtures("band")
@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("channels", [3, 4])
def test_patches_of_a_tiff_with_one_plane_a_colour_are_slices_of_the_whole_image(tmp_path,
                                                                                 compression,
                                                                                 channels):
    image = an_image(channels=channels)
    path = tmp_path / "slide.tiff"
    tifffile.imwrite(path, np.moveaxis(image, -1, 0), photometric="rgb", planarconfig="separate",
                     rowsperstrip=16,
                     compression=compression, metadata=None)
    xy = some_spots()
    np.testing.assert_array_equal(crop(path, xy)[0], obvious_patches(image, xy))


@pytest.mark.usefixtures("band")
@pytest.mark.parametrize(("suffix", "channels"), [
    ("png", 1), ("png", 3), ("png", 4), ("PNG", 3), ("jpg", 1), ("jpg", 3), ("JPEG", 3)])
def test_patches_of_a_png_or_jpeg_are_slices_of_the_whole_image(tmp_path, suffix, channels):
    path = tmp_path / f"slide.{suffix}"
    Image.fromarray(an_image(channels=channels)).save(path)
    xy = some_spots()
    np.testing.assert_array_equal(crop(path, xy)[0],
                                  obvious_patches(np.asarray(Image.open(path)), xy))


@pytest.mark.parametrize("mode", ["1", "P", "LA", "CMYK"])
def test_other_kinds_of_picture_give_the_colours_that_one_sees(tmp_path, mode):
    path = tmp_path / ("slide.jpg" if mode == "CMYK" else "slide.png")
    Image.fromarray(an_image()).convert(mode).save(path)
    xy = some_spots()
    seen = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(crop(path, xy)[0], obvious_patches(seen, xy))


@pytest.mark.parametrize("name", ["slide.tif.gz", "slide.tiff.gz", "slide.jpg.gz"])
def test_a_zipped_slide_gives_the_same_patches_and_leaves_no_unpacked_copy(tmp_path, name):
    plain = tmp_path / name.removesuffix(".gz")
    Image.fromarray(an_image()).save(plain)
    (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    xy = some_spots()
    np.testing.assert_array_equal(crop(tmp_path / name, xy)[0], crop(plain, xy)[0])
    assert sorted(path.name
                  for path in tmp_path.iterdir()) == sorted([plain.name, name, "patches.npy"])


def test_the_levels_of_a_pyramid_are_not_mistaken_for_the_slide(tmp_path):
    image, path = an_image(), tmp_path / "slide.tif"
    with tifffile.TiffWriter(path) as writer:
        options = dict(photometric="rgb", tile=(32, 32), compression="deflate", metadata=None)
        writer.write(image, subifds=1, **options)
        writer.write(image[::2, ::2], subfiletype=1, **options)
    xy = some_spots()
    np.testing.assert_array_equal(crop(path, xy)[0], obvious_patches(image, xy))


@pytest.mark.parametrize("band_rows", [1, 3, 16, 33, 64, 1000])
@pytest.mark.parametrize("rows_per_strip", [1, 5, 40])
def test_patches_that_span_many_bands_are_whole(tmp_path, monkeypatch, band_rows, rows_per_strip):
    monkeypatch.setattr(slide, "BAND", band_rows)
    image, path = an_image(height=400, width=60), tmp_path / "tall.tif"
    tifffile.imwrite(path, image, photometric="rgb", rowsperstrip=rows_per_strip,
                     compression="deflate")
    xy = some_spots(40, height=400, width=60)
    np.testing.assert_array_equal(crop(path, xy)[0], obvious_patches(image, xy))


@pytest.mark.parametrize("size", [1, 15, 32, 200])
def test_any_patch_size_follows_the_definition_even_one_wider_than_the_slide(tmp_path, monkeypatch,
                                                                             size):
    monkeypatch.setattr(slide, "BAND", 20)
    image, path = an_image(), tmp_path / "slide.png"
    Image.fromarray(image).save(path)
    xy = some_spots()
    np.testing.assert_array_equal(crop(path, xy, size)[0], obvious_patches(image, xy, size))


def test_row_i_is_spot_i_also_where_spots_share_a_place(tmp_path):
    image, path = an_image(), tmp_path / "slide.png"
    Image.fromarray(image).save(path)
    xy = np.repeat(some_spots(), 2, axis=0)
    order = np.random.default_rng(1).permutation(len(xy))
    in_order, shuffled = crop(path, xy)[0], crop(path, xy[order])[0]
    np.testing.assert_array_equal(shuffled, in_order[order])


def test_patches_over_the_edge_are_counted(tmp_path):
    path = tmp_path / "slide.png"
    Image.fromarray(an_image()).save(path)
    half = SIZE // 2
    inside = [[half, half], [WIDTH - half, HEIGHT - half], [70, 70]]
    over = [[half - 1, 70], [WIDTH - half + 1, 70], [70, half - 1], [70, HEIGHT - half + 1], [0, 0]]
    assert crop(path, np.array(inside, float))[3] == 0
    assert crop(path, np.array(over, float))[3] == len(over)
    assert crop(path, np.array(inside + over, float))[3] == len(over)


@pytest.mark.parametrize("bad",
                         [[-1, 50], [WIDTH, 50], [50, -1], [50, HEIGHT], [HEIGHT - 1, WIDTH - 1]])
def test_a_centre_outside_the_slide_is_an_error_with_both_sizes(tmp_path, bad):
    path = tmp_path / "slide.png"
    Image.fromarray(an_image()).save(path)
    with pytest.raises(InputError) as error:
        crop(path, np.array([[70, 70], bad], float))
    says = f"{path} has {WIDTH} x {HEIGHT} pixels, but 1 of 2 spots lie outside it"
    assert says in str(error.value)
    assert f"x {bad[0]}, y {bad[1]}" in str(error.value)


# ------------------------------------------------------------------------- thumbnail


@pytest.mark.usefixtures("band")
@pytest.mark.parametrize(("height", "width", "limit"), [
    (HEIGHT, WIDTH, 1500), (HEIGHT, WIDTH, 60), (WIDTH, HEIGHT, 60), (HEIGHT, WIDTH, 7),
    (HEIGHT, WIDTH, 200)])
def test_the_thumbnail_is_the_slide_averaged_over_whole_squares(tmp_path, monkeypatch, height,
                                                                width, limit):
    monkeypatch.setattr(slide, "THUMBNAIL", limit)
    image, path = an_image(height, width), tmp_path / "slide.png"
    Image.fromarray(image).save(path)
    _, thumbnail, scale, _ = crop(path, np.array([[70.0, 70.0]]))
    shrink = round(1 / scale)
    assert scale == pytest.approx(1 / shrink)
    assert thumbnail.shape == (height // shrink, width // shrink, 3)
    assert max(thumbnail.shape) <= limit
    assert thumbnail.dtype == np.uint8
    squares = image[:height // shrink * shrink, :width // shrink * shrink].reshape(
        height // shrink, shrink, width // shrink, shrink, 3)
    np.testing.assert_allclose(thumbnail, squares.mean(axis=(1, 3)), atol=1)


# ------------------------------------------------------------------------- what is no slide


def assert_refused(path, says):
    with pytest.raises(InputError, match=says) as error:
        crop(path, np.array([[70.0, 70.0]]))
    assert str(path) in str(error.value)
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize("name", ["slide.png", "slide.tif", "slide.tif.gz"])
def test_an_alpha_that_is_not_opaque_is_refused(tmp_path, name):
    image, plain = an_image(channels=4), tmp_path / name.removesuffix(".gz")
    image[150, 20, 3] = 254
    Image.fromarray(image).save(plain)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    assert_refused(tmp_path / name, "alpha channel is not 255 everywhere.*Flatten it")


@pytest.mark.parametrize(("shape", "dtype", "options"), [
    ((50, 40, 3), np.uint16, dict(photometric="rgb")),
    ((50, 40), np.uint16, dict(photometric="minisblack")),
    ((50, 40), np.float32, dict(photometric="minisblack")),
    ((50, 40), bool, dict(photometric="minisblack"))])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_tiff_that_is_not_8_bits_a_channel_is_refused(tmp_path, shape, dtype, options,
                                                        compression):
    tifffile.imwrite(tmp_path / "slide.tif", np.zeros(shape, dtype), compression=compression,
                     **options)
    assert_refused(tmp_path / "slide.tif", "expected 8 bits a channel")


def test_a_16_bit_png_is_refused(tmp_path):
    Image.fromarray(np.zeros((50, 40), np.uint16)).save(tmp_path / "slide.png")
    assert_refused(tmp_path / "slide.png", "expected 8 bits a channel")


@pytest.mark.parametrize(("shape", "options"), [
    ((100, 90), dict(photometric="miniswhite")),
    ((100, 90), dict(photometric="palette", colormap=np.zeros((3, 256), np.uint16))),
    ((100, 90, 4), dict(photometric="separated")), ((100, 90, 3), dict(photometric="cielab")),
    ((100, 90, 2),
     dict(photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"])),
    ((100, 90, 6), dict(photometric="minisblack", planarconfig="contig"))],
    ids=["inverted", "palette", "CMYK", "Lab", "grey and alpha", "six channels"])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_tiff_whose_numbers_are_not_the_colours_is_refused(tmp_path, shape, options, compression):
    tifffile.imwrite(tmp_path / "slide.tif", np.full(shape, 255, np.uint8), compression=compression,
                     **options)
    assert_refused(tmp_path / "slide.tif", "RGB or grey")


def test_a_stack_of_images_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "slide.tif", np.zeros((5, 100, 90), np.uint8),
                     photometric="minisblack")
    assert_refused(tmp_path / "slide.tif", "axes")


@pytest.mark.parametrize(("name", "options"), [
    ("slide.tif", dict(photometric="rgb", rowsperstrip=7)),
    ("slide.tif", dict(photometric="rgb", rowsperstrip=HEIGHT)),
    ("slide.tif", dict(photometric="rgb", rowsperstrip=7, compression="lzw")),
    ("slide.tif", dict(photometric="rgb", tile=(48, 64), compression="deflate")),
    ("slide.tif", dict(photometric="rgb", tile=(48, 64), compression="jpeg")),
    ("slide.png", {}), ("slide.jpg", {})],
    ids=["strips", "one strip", "LZW", "deflate", "JPEG in TIFF", "PNG", "JPEG"])
@pytest.mark.parametrize("keep", [0, 6, 0.1, 0.5, 0.99])
def test_a_truncated_slide_is_refused_by_name(tmp_path, name, options, keep):
    path = tmp_path / name
    if options:
        tifffile.imwrite(path, an_image(), **options)
    else:
        Image.fromarray(an_image()).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:keep if isinstance(keep, int) else int(keep * len(content))])
    assert_refused(path, "cannot be read as an image")


@pytest.mark.parametrize("compression", ["lzw", "deflate", "jpeg"])
def test_a_tiff_whose_pixels_are_overwritten_is_refused(tmp_path, compression):
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, an_image(), photometric="rgb", rowsperstrip=16, compression=compression)
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half:half + 8000] = bytes(8000)
    path.write_bytes(content)
    assert_refused(path, "cannot be read as an image")


@pytest.mark.parametrize("damage", [
    lambda zipped: zipped[:len(zipped) // 2], lambda zipped: zipped[:-4],
    lambda zipped: b"<html>404</html>",
    lambda zipped: zipped[:10] + b"\xff" * 90 + zipped[100:], lambda zipped: zipped[:-8] + bytes(8),
    lambda zipped: b"",
], ids=["half", "no end", "not zipped", "overwritten", "wrong checksum", "empty"])
def test_a_damaged_gzip_is_refused_by_name_and_leaves_no_unpacked_copy(tmp_path, damage):
    Image.fromarray(an_image()).save(tmp_path / "slide.tif")
    path = tmp_path / "slide.tif.gz"
    path.write_bytes(damage(gzip.compress((tmp_path / "slide.tif").read_bytes())))
    assert_refused(path, "cannot be read as an image")


@pytest.mark.parametrize("name", ["slide.tif", "slide.jpg", "slide.png"])
@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>", b"II*\0" + bytes(100)])
def test_what_is_no_image_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name, "cannot be read as an image")


@pytest.mark.parametrize("name", ["slide.tif", "slide.jpg", "slide.tif.gz"])
def test_a_missing_slide_is_named(tmp_path, name):
    assert_refused(tmp_path / name, "is missing")


def test_pillows_limit_holds_again_after_a_slide_was_read(tmp_path):
    limit = Image.MAX_IMAGE_PIXELS
    Image.fromarray(an_image()).save(tmp_path / "slide.png")
    crop(tmp_path / "slide.png", some_spots())
    assert limit == Image.MAX_IMAGE_PIXELS
    assert limit is not None


# ------------------------------------------------------------------------- patches at another size


@pytest.mark.parametrize(("size", "stored"), [(32, 16), (31, 16), (16, 32), (16, 16)])
def test_patches_are_resampled_one_by_one(tmp_path, size, stored):
    image, xy = an_image(140, 90), np.array([[5, 5], [45, 70], [89, 139]])
    Image.fromarray(image).save(tmp_path / "a.png")
    with slide.open_slide(tmp_path / "a.png") as opened:
        slide.crop_patches(opened, xy, size, tmp_path / "patches.npy", stored)
    expected = [np.asarray(Image.fromarray(patch).resize((stored, stored),
                                                         Image.Resampling.BILINEAR))
                for patch in obvious_patches(image, xy, size)]
    np.testing.assert_array_equal(np.load(tmp_path / "patches.npy"), expected)


def test_shrunk_patches_are_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:,
            ::2] = 200  # finer than the smaller patch can show: it becomes grey
    Image.fromarray(stripes).save(tmp_path / "a.png")
    with slide.open_slide(tmp_path / "a.png") as opened:
        slide.crop_patches(opened, np.array([[32, 32]]), 32, tmp_path / "patches.npy", 8)
    patch = np.load(tmp_path / "patches.npy")[0]
    assert patch.min() > 80
    assert patch.max() < 120


# ------------------------------------------------------------------------- whole slides


def a_slide(height=TALL, width=WIDE):
    """As an_image, without jumps in its gradient."""
    rows, cols = np.mgrid[:height, :width]
    planes = [rows * 180 // height, cols * 180 // width, (rows + cols) * 180 // (height + width)]
    noise = np.random.default_rng(0).integers(0, 55, (height, width, 3))
    return (np.stack(planes, axis=-1) + noise).astype(np.uint8)


def halved(image):
    return np.asarray(Image.fromarray(image).reduce(2))


def write_pyramid(path, image, levels=2, compression="deflate", pages=False, **first):
    """A tiled pyramid: each level half of the one before, in SubIFDs or as pages."""
    options = dict(photometric="rgb", tile=(64, 48), compression=compression) | (
        {} if path.name.endswith(".ome.tif") else dict(metadata=None))
    with tifffile.TiffWriter(path) as writer:
        writer.write(image, **(options | first), **({} if pages else dict(subifds=levels - 1)))
        if path.name.endswith(".svs"):  # the second page is a thumbnail
            writer.write(image[::8, ::8], photometric="rgb", rowsperstrip=16, metadata=None)
        for _ in range(levels - 1):
            image = halved(image)
            writer.write(image, subfiletype=int(path.suffix != ".svs"),
                         **(options | {"metadata": None}),
                         description=first.get("description"))
    return path


def patches_of(path, xy, crop, patch_px=32, batch=7):
    """All patches through the stream, in the order of the spots."""
    with open_slide(path) as opened:
        patches = SpotPatches(opened, xy, crop, patch_px, CPU)
        order = patches.order
        read = torch.cat(list(patches.stream(torch.from_numpy(order).split(batch)))).numpy()
    assert sorted(order) == list(range(len(xy)))
    out = np.empty_like(read)
    out[order] = read
    return out


LAYOUTS = {
    "pyramid": lambda path, image: write_pyramid(path / "slide.tif", image),
    "pyramid in pages": lambda path, image: write_pyramid(path / "slide.tif", image, pages=True),
    "OME": lambda path,
    image: write_pyramid(path / "slide.ome.tif", image, metadata={"axes": "YXS"}),
    "uncompressed": lambda path, image: tifffile.imwrite(path / "slide.tif", image, metadata=None),
    "uncompressed tiles": lambda path,
    image: tifffile.imwrite(path / "slide.tif", image, tile=(64, 48), metadata=None),
    "one strip": lambda path, image: tifffile.imwrite(path / "slide.tif", image, rowsperstrip=TALL,
                                                      compression="lzw", metadata=None),
    "planes": lambda path,
    image: tifffile.imwrite(path / "slide.tif", np.moveaxis(image, -1, 0), photometric="rgb",
                                                   planarconfig="separate", tile=(64, 48),
                                                   metadata=None),
    "PNG": lambda path, image: Image.fromarray(image).save(path / "slide.png"),
}


@pytest.mark.parametrize("cache", [1, 20_000, 1 << 28])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_resampling_patches_are_those_of_the_reference_sections(tmp_path, monkeypatch,
                                                                        layout, cache):
    monkeypatch.setattr(slide, "CACHE", cache)
    LAYOUTS[layout](tmp_path, a_slide())
    (path,) = tmp_path.iterdir()
    xy = some_spots(height=TALL, width=WIDE)
    with slide.open_slide(path) as opened:
        slide.crop_patches(opened, xy, 32, tmp_path / "patches.npy")
    np.testing.assert_array_equal(patches_of(path, xy, crop=32.3),
                                  np.load(tmp_path / "patches.npy"))


def test_a_patch_keeps_x_across_and_y_down(tmp_path):
    image = np.full((TALL, WIDE, 3), 240, np.uint8)
    image[300:, :] = (200, 100, 150)  # lower part
    image[:, :40] = (90, 70, 140)  # left part
    path = write_pyramid(tmp_path / "slide.tif", image)
    (patch,) = patches_of(path, np.array([[40.0, 300.0]]), crop=64)
    np.testing.assert_array_equal(patch[4, 28], (240, 240, 240))
    np.testing.assert_array_equal(patch[28, 28], (200, 100, 150))
    np.testing.assert_array_equal(patch[4, 4], patch[28, 4])
    np.testing.assert_array_equal(patch[4, 4], (90, 70, 140))


@pytest.mark.parametrize(("crop", "downsample", "size"), [
    (20, 1, 20), (32, 1, 32), (62, 1, 62), (63.2, 2, 32), (64, 2, 32), (100, 2, 50), (127, 4, 32),
    (500, 4, 125)])
def test_the_coarsest_level_with_enough_pixels_is_read(tmp_path, crop, downsample, size):
    path = write_pyramid(tmp_path / "slide.tif", a_slide(840, 600), levels=3)
    with open_slide(path) as opened:
        patches = SpotPatches(opened, np.array([[300.0, 420.0]]), crop, 32, CPU)
    assert patches.level.downsample == downsample
    assert patches.size == pytest.approx(size)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("finer", [2, 2.5, 4])
def test_the_same_tissue_in_finer_pixels_gives_nearly_the_same_patches(tmp_path, finer, levels):
    smooth = scipy.ndimage.gaussian_filter(a_slide(), (1.5, 1.5, 0))
    enlarged = np.asarray(Image.fromarray(smooth).resize((int(WIDE * finer), int(TALL * finer)),
                                                         Image.BICUBIC))
    coarse = write_pyramid(tmp_path / "coarse.tif", smooth, levels=1)
    fine = write_pyramid(tmp_path / "fine.tif", enlarged, levels=levels)
    xy = np.rint(np.random.default_rng(0).uniform(0, 1, (25, 2)) * [WIDE - 1, TALL - 1])
    expected, found = patches_of(coarse, xy, crop=32), patches_of(fine, xy * finer, crop=32 * finer)
    shifted = patches_of(fine, xy * finer + finer, crop=32 * finer)
    difference, if_shifted = (np.abs(p.astype(float) - expected).mean() for p in (found, shifted))
    assert difference < 1  # of 255
    assert if_shifted > 1.5 * difference


@pytest.mark.parametrize(("crop", "levels"), [(128, 1), (90, 1), (20, 2)])
def test_a_resampled_patch_is_the_slice_resized(tmp_path, crop, levels):
    image = a_slide()
    (patch,) = patches_of(write_pyramid(tmp_path / "slide.tif", image, levels),
                          np.array([[150.0, 220.0]]), crop)
    half = crop // 2
    cut = Image.fromarray(image[220 - half:220 + half, 150 - half:150 + half])
    np.testing.assert_array_equal(patch, cut.resize((32, 32), Image.Resampling.BILINEAR))


def test_the_tiles_of_one_level_are_not_taken_for_anothers(tmp_path):
    image = a_slide()
    with open_slide(write_pyramid(tmp_path / "slide.tif", image)) as opened:
        coarse = opened.region(opened.levels[1], 5, 7, 40, 50)
        np.testing.assert_array_equal(opened.region(opened.levels[0], 5, 7, 40, 50),
                                      image[7:57, 5:45])
        np.testing.assert_array_equal(coarse, halved(image)[7:57, 5:45])


def test_tiles_are_decoded_once_and_the_cache_keeps_its_size(tmp_path, monkeypatch):
    path = write_pyramid(tmp_path / "slide.tif", a_slide(1200, 900), levels=1)
    spots = lattice(900, 1200, 30)
    decoded = {}
    for cache in (1 << 28, 48 * 64 * 3 * 5 * 10):  # everything fits; half of the slide's width fits
        monkeypatch.setattr(slide, "CACHE", cache)
        with open_slide(path) as opened:
            read = opened.levels[0].read
            asked = []
            opened.levels[0].read = (
                lambda *box, asked=asked, read=read: asked.append(box) or read(*box))
            patches = SpotPatches(opened, spots[["x", "y"]].to_numpy(), 40, 40, CPU)
            for _ in patches.stream(torch.from_numpy(patches.order).split(16)):
                assert opened.held <= cache
        assert len(set(asked)) == 19 * 19
        decoded[cache] = len(asked)
    assert decoded[1 << 28] == 19 * 19
    assert list(decoded.values())[1] < 1.2 * 19 * 19


def test_rows_of_an_uncompressed_slide_are_read_about_once(tmp_path, monkeypatch):
    monkeypatch.setattr(slide, "CACHE", 1)
    tifffile.imwrite(tmp_path / "slide.tif", a_slide(1200, 900), metadata=None)
    with open_slide(tmp_path / "slide.tif") as opened:
        read, asked = opened.levels[0].read, []
        opened.levels[0].read = lambda *box: asked.append(box) or read(*box)
        patches = SpotPatches(opened, lattice(900, 1200, 30)[["x", "y"]].to_numpy(), 40, 40, CPU)
        for _ in patches.stream(torch.from_numpy(patches.order).split(16)):
            pass
    assert len(asked) == len(set(asked)) == 19


@pytest.mark.parametrize(("xy", "crop", "says"), [
    ([[-1, 50]], 32, "1 of 1 spots lie outside it, one at x -1, y 50"),
    ([[70, 70], [WIDE, 50]], 32, "1 of 2 spots"),
    ([[70, 70]], 500, "a patch would take 500: check --mpp")])
def test_spots_or_patches_that_do_not_fit_the_slide_are_refused(tmp_path, xy, crop, says):
    path = write_pyramid(tmp_path / "slide.tif", a_slide())
    with pytest.raises(InputError, match=says) as error:
        patches_of(path, np.array(xy, float), crop)
    assert f"{path} has {WIDE} x {TALL} pixels" in str(error.value)


# ------------------------------------------------------------------------- microns per pixel


def ome(x, y, unit):
    return {"axes": "YXS", "PhysicalSizeX": x, "PhysicalSizeXUnit": unit, "PhysicalSizeY": y,
            "PhysicalSizeYUnit": unit}


def mpp_of(path, given=None):
    with open_slide(path) as opened:
        return microns_per_pixel(opened, given)


@pytest.mark.parametrize(("name", "options", "mpp"), [
    ("slide.ome.tif", dict(metadata=ome(0.25, 0.25, "µm")), 0.25),
    ("slide.ome.tif", dict(metadata=ome(500, 500, "nm")), 0.5),
    ("slide.ome.tif", dict(metadata=ome(0.0005, 0.0005, "mm"), resolution=(40000, 40000),
                           resolutionunit="CENTIMETER"), 0.5),
    ("slide.tif", dict(resolution=(40000, 40000), resolutionunit="CENTIMETER"), 0.25),
    ("slide.tif", dict(resolution=(50800, 50800), resolutionunit="INCH"), 0.5),
    ("slide.tif", dict(resolution=(50000, 50100), resolutionunit="INCH"), 0.5075),
    ("slide.svs", dict(description=APERIO.format("0.4990")), 0.499)])
def test_microns_per_pixel_are_read_from_the_file(tmp_path, monkeypatch, name, options, mpp):
    path = write_pyramid(tmp_path / name, a_slide(), pages=name.endswith(".svs"), **options)
    assert mpp_of(path) == pytest.approx(mpp, rel=1e-4)
    assert mpp_of(path, given=0.31) == 0.31
    monkeypatch.setattr(slide, "vendor", lambda path: None)  # as without openslide
    assert mpp_of(path) == pytest.approx(mpp, rel=1e-4)


def test_imagej_writes_microns_as_a_unit_of_its_own(tmp_path):
    tifffile.imwrite(tmp_path / "slide.tif", a_slide(), imagej=True, resolution=(2, 2),
                     metadata={"unit": "um"})
    assert mpp_of(tmp_path / "slide.tif") == pytest.approx(0.5)


@pytest.mark.parametrize("options", [
    {}, dict(resolution=(72, 72), resolutionunit="INCH"),
    dict(resolution=(96, 96), resolutionunit="INCH"),
    dict(resolution=(300, 300), resolutionunit="CENTIMETER"),
    dict(resolution=(2, 2), resolutionunit="NONE"),
    dict(resolution=(0, 0), resolutionunit="INCH")])
def test_a_screens_resolution_is_no_microscopes(tmp_path, options):
    path = write_pyramid(tmp_path / "slide.tif", a_slide(), **options)
    with pytest.raises(InputError,
                       match=r"slide.tif does not say how many µm a pixel is wide. Give it"):
        mpp_of(path)
    assert mpp_of(path, given=0.5) == 0.5


@pytest.mark.parametrize("options", [dict(resolution=(40000, 20000), resolutionunit="CENTIMETER")])
def test_pixels_that_are_not_square_are_an_error_unless_mpp_is_given(tmp_path, options):
    path = write_pyramid(tmp_path / "slide.tif", a_slide(), **options)
    with pytest.raises(InputError, match=r"not square, 0.25 by 0.5 µm"):
        mpp_of(path)
    assert mpp_of(path, given=0.25) == 0.25


@pytest.mark.parametrize("given", [0, -1, 250, float("nan")])
def test_an_impossible_mpp_is_refused(tmp_path, given):
    path = write_pyramid(tmp_path / "slide.tif", a_slide())
    with pytest.raises(InputError, match=r"--mpp .*from 0.05 to 20"):
        mpp_of(path, given)


# ------------------------------------------------------------------ openslide, and what is no slide


def test_openslide_and_tifffile_read_the_same_slide(tmp_path, monkeypatch):
    path = write_pyramid(tmp_path / "slide.svs", a_slide(), levels=3, pages=True,
                         description=APERIO.format(0.5))
    xy = some_spots(height=TALL, width=WIDE)
    assert slide.vendor(path) == "aperio"
    with open_slide(path) as opened:
        levels = [(level.width, level.height, level.downsample) for level in opened.levels]
    through_openslide = [patches_of(path, xy, crop) for crop in (32, 64, 100)]
    monkeypatch.setattr(slide, "vendor", lambda path: None)
    with open_slide(path) as opened:
        assert [(level.width, level.height, level.downsample) for level in opened.levels] == levels
    assert levels == [(300, 420, 1), (150, 210, 2), (75, 105, 4)]
    for crop, patches in zip((32, 64, 100), through_openslide, strict=True):
        np.testing.assert_array_equal(patches, patches_of(path, xy, crop))


def test_a_tile_that_the_scanner_left_out_is_white(tmp_path):
    image = np.full((128, 128, 3), 77, np.uint8)
    tiles = iter([image[:64, :64], None, image[:64, :64], image[:64, :64]])
    tifffile.imwrite(tmp_path / "slide.tif", tiles, shape=image.shape, dtype=np.uint8,
                     tile=(64, 64),
                     photometric="rgb", compression="deflate", metadata=None)
    first, second = patches_of(tmp_path / "slide.tif", np.array([[32.0, 32.0], [96.0, 32.0]]), 32)
    assert (first == 77).all()
    assert (second == 255).all()


def test_sizes_that_a_pyramid_rounded_do_not_shift_its_far_end():
    assert slide.downsample_of((100_003, 80_001), (25_000, 20_000)) == 4
    assert slide.downsample_of((100_003, 80_001), (25_001, 20_001)) == 4
    assert slide.downsample_of((1000, 800), (400, 320)) == 2.5


@pytest.mark.parametrize(("name", "content", "says"), [
    ("slide.tif", b"II*\0 but no more", "cannot be read as an image"),
    ("slide.svs", b"no slide at all", "cannot be read as an image"),
    ("slide.mrxs", b"no slide at all", "cannot be read without its folder slide"),
    ("slide.jpg", b"no picture", "cannot be read as an image"),
    ("slide.tif.gz", b"\x1f\x8b", "cannot be read as an image"),
    ("slide.tif", None, "is missing")])
def test_what_is_no_slide_is_refused_by_name(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as error:
        mpp_of(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(("image", "says"), [
    (np.zeros((70, 60, 3), np.uint16), "8 bits a channel"),
    (np.zeros((4, 70, 60), np.uint8), "axes are")])
def test_a_tiff_that_is_no_picture_is_refused(tmp_path, image, says):
    tifffile.imwrite(tmp_path / "slide.tif", image,
                     photometric="rgb" if image.ndim == 3 and image.shape[2] == 3
                     else "minisblack")
    with pytest.raises(InputError, match=says):
        mpp_of(tmp_path / "slide.tif")


def test_damage_in_a_tile_is_an_error_that_names_the_slide(tmp_path):
    path = write_pyramid(tmp_path / "slide.tif", a_slide(), levels=1)
    content = bytearray(path.read_bytes())
    content[40_000:60_000] = bytes(20_000)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"slide.tif cannot be read as an image"):
        patches_of(path, lattice(WIDE, TALL, 20)[["x", "y"]].to_numpy(), 32)


# ------------------------------------------------------------------------- one rule for every file


TILES = dict(photometric="rgb", tile=(64, 48), compression="deflate", metadata=None)
# How a viewer turns what is stored (a) into what it shows, by the orientation tag
SHOWN = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
         5: lambda a: a.swapaxes(0, 1),
         6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
         8: lambda a: np.rot90(a, 1)}
# What to store so that it is shown as the picture
STORED = SHOWN | {6: SHOWN[8], 8: SHOWN[6]}


def write_label_first(path, image):
    with tifffile.TiffWriter(path) as writer:
        writer.write(np.full((90, 120, 3), 99, np.uint8), photometric="rgb", metadata=None)
        writer.write(image, **TILES)


def write_channels(path, image, **options):
    tifffile.imwrite(path, np.moveaxis(image, -1, 0), photometric="minisblack",
                     metadata={"axes": "CYX"}, **options)


def opaque(image):
    return np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])


KINDS = {
    "tiled.tif": lambda path, image: tifffile.imwrite(path, image, **TILES),
    "bigtiff.btf": lambda path, image: tifffile.imwrite(path, image, **TILES, bigtiff=True),
    "ome.tf8": lambda path,
    image: tifffile.imwrite(path, image, bigtiff=True, ome=True, photometric="rgb"),
    "generic.svs": lambda path, image: tifffile.imwrite(path, image, **TILES),
    "strips.qptiff": lambda path,
    image: tifffile.imwrite(path, image, rowsperstrip=16, compression="lzw"),
    "aperio.svs": lambda path,
    image: tifffile.imwrite(path, image, **TILES, description=APERIO.format(0.5)),
    "aperio.tif": lambda path,
    image: tifffile.imwrite(path, image, **TILES, description=APERIO.format(0.5)),
    "colours as channels.ome.tif": lambda path, image: write_channels(path, image, tile=(64, 48)),
    "colours in strips.ome.tif": lambda path,
    image: write_channels(path, image, rowsperstrip=7, compression="lzw"),
    "uncompressed channels.ome.tif": write_channels,
    "four channels.ome.tif": lambda path, image: write_channels(path, opaque(image)),
    "alpha.tif": lambda path,
    image: tifffile.imwrite(path, opaque(image), **TILES, extrasamples=["unassalpha"]),
    "JPEG2000.tif": lambda path, image: tifffile.imwrite(
        path, image,
        **TILES | dict(compression="jpeg2000", compressionargs=dict(level=0, reversible=True))),
    "label first.tif": write_label_first,
    "PNG.tif": lambda path, image: Image.fromarray(image).save(path, format="PNG"),
    "PNG.svs": lambda path, image: Image.fromarray(image).save(path, format="PNG"),
    "TIFF.jpg": lambda path, image: tifffile.imwrite(path, image, **TILES),
    "TIFF": lambda path, image: tifffile.imwrite(path, image, **TILES),
}


def both_ways(path, xy):
    """The patches of a file as a section's image, which must be the same as those of a whole
    slide."""
    patches = crop(path, xy)[0]
    np.testing.assert_array_equal(patches_of(path, xy, crop=SIZE), patches)
    return patches


@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_read_by_its_content_and_its_name_counts_for_nothing(tmp_path, name):
    image, xy = an_image(), some_spots()
    KINDS[name](tmp_path / name, image)
    np.testing.assert_array_equal(both_ways(tmp_path / name, xy), obvious_patches(image, xy))


def test_a_jpeg_with_a_scanners_suffix_is_a_jpeg(tmp_path):
    Image.fromarray(an_image()).save(tmp_path / "slide.svs", format="JPEG")
    xy, image = some_spots(), np.asarray(Image.open(tmp_path / "slide.svs"))
    np.testing.assert_array_equal(both_ways(tmp_path / "slide.svs", xy), obvious_patches(image, xy))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name",
                         ["tiles.btf", "strips.tif", "uncompressed.tif", "grey.tif", "aperio.svs",
                          "a.png",
                                  "a.jpg"])
def test_the_orientation_of_a_file_is_obeyed(tmp_path, monkeypatch, name, orientation):
    monkeypatch.setattr(slide, "BAND", 20)
    monkeypatch.setattr(slide, "CACHE", 20_000)
    image, path, xy = an_image(channels=1 if name == "grey.tif"
                               else 3), tmp_path / name, some_spots()
    stored = np.ascontiguousarray(STORED[orientation](image))
    np.testing.assert_array_equal(SHOWN[orientation](stored), image)
    if path.suffix in (".png", ".jpg"):
        exif = Image.Exif()
        exif[slide.ORIENTATION] = orientation
        Image.fromarray(stored).save(path, exif=exif)
        if path.suffix == ".jpg":
            image = SHOWN[orientation](np.asarray(Image.open(path)))
    else:
        layout = {"tiles.btf": TILES, "aperio.svs": TILES | dict(description=APERIO.format(0.5)),
                  "strips.tif": dict(rowsperstrip=7, compression="lzw"),
                  "uncompressed.tif": dict(metadata=None),
                  "grey.tif": TILES | dict(photometric="minisblack")}[name]
        tifffile.imwrite(path, stored, extratags=[(slide.ORIENTATION, 3, 1, orientation, True)],
                         **layout)
    np.testing.assert_array_equal(both_ways(path, xy), obvious_patches(image, xy))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_real_turned_files_are_shown_as_pillow_shows_them(real_data, orientation):
    path = real_data("real") / f"test_orient{orientation}.tif"
    shown = np.asarray(Image.open(path).convert("RGB"))
    with open_slide(path) as opened:
        np.testing.assert_array_equal(np.concatenate([band for _, band in opened.bands()]), shown)
        np.testing.assert_array_equal(opened.region(opened.levels[0], 0, 0, opened.width,
                                                    opened.height), shown)


@pytest.mark.parametrize(("name", "read"), [
    ("CMU-1-Small-Region.svs", lambda path, xy: both_ways(path, xy)),
    ("tcga-cr-7395-01a-01-ts1.svs", lambda path, xy: patches_of(path, xy, crop=SIZE))])
def test_patches_of_real_slides_are_slices_of_the_whole_image(tmp_path, real_data, name, read):
    image = tifffile.imread(real_data("real") / name)
    path = tmp_path / "slide.jpg"
    path.symlink_to(real_data("real") / name)
    xy = some_spots(height=image.shape[0], width=image.shape[1])
    np.testing.assert_array_equal(read(path, xy), obvious_patches(image, xy))


def test_a_turned_slide_exchanges_its_microns_per_pixel(tmp_path):
    tifffile.imwrite(tmp_path / "slide.tif", an_image(), resolution=(20_000, 40_000),
                     resolutionunit="CENTIMETER",
                     extratags=[(slide.ORIENTATION, 3, 1, 6, True)])
    with open_slide(tmp_path / "slide.tif") as opened:
        assert opened.mpp == pytest.approx((0.25, 0.5))


@pytest.mark.parametrize(("size", "other"),
                         [(b'"0.5"', b'"0,5"'), (b'"0.5"', b'"   "'), (b"<Pixels", b"<pixels"),
                                             (b"</OME>", b"</0ME>")])
def test_odd_ome_xml_does_not_hide_the_picture(tmp_path, size, other):
    path, xy, image = tmp_path / "slide.ome.tif", some_spots(), an_image()
    tifffile.imwrite(path, image, photometric="rgb", metadata={"axes": "YXS", "PhysicalSizeX": 0.5,
                                                               "PhysicalSizeY": 0.5})
    content = path.read_bytes()
    assert size in content
    path.write_bytes(content.replace(size, other))
    np.testing.assert_array_equal(both_ways(path, xy), obvious_patches(image, xy))
    with open_slide(path) as opened:
        assert opened.mpp is None


def test_two_runs_may_unpack_the_same_file_into_the_same_folder(tmp_path):
    tifffile.imwrite(tmp_path / "slide.tif", an_image(), rowsperstrip=7)
    zipped = gzip.compress((tmp_path / "slide.tif").read_bytes())
    (tmp_path / "slide").write_bytes(zipped)  # recognised by its content
    with open_slide(tmp_path / "slide", tmp_path) as one:
        with open_slide(tmp_path / "slide", tmp_path):
            pass
        assert np.concatenate([band for _, band in one.bands()]).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("channels", [2, 5])
def test_another_number_of_channels_is_refused(tmp_path, channels):
    tifffile.imwrite(tmp_path / "slide.ome.tif", np.zeros((channels, 100, 90), np.uint8),
                     photometric="minisblack",
                     metadata={"axes": "CYX"})
    assert_refused(tmp_path / "slide.ome.tif",
                   f"has {channels} channels, expected red, green and blue")


def test_a_slide_is_not_held_in_memory_whatever_its_name(tmp_path):
    side, options = 5000, dict(photometric="rgb", compression="deflate", metadata=None)
    tiles = (np.full((256, 256, 3), 200, np.uint8) for _ in range(20 * 20))
    tifffile.imwrite(tmp_path / "a.tif", tiles, shape=(side, side, 3), dtype=np.uint8,
                     tile=(256, 256), **options)
    for name in ("a.btf", "a.svs"):
        (tmp_path / name).symlink_to(tmp_path / "a.tif")
    planes = tifffile.memmap(tmp_path / "planes.btf", shape=(3, side, side), dtype=np.uint8,
                             photometric="rgb",
                             planarconfig="separate")
    del planes
    code = """
import resource, sys
import imagecodecs, zarr
from heclip.slide import open_slide
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for path in sys.argv[1:]:
    before = peak()
    with open_slide(path) as opened:
        for top, band in opened.bands():
            pass
    print(peak() - before)
"""
    paths = [tmp_path / name for name in ("a.tif", "a.btf", "a.svs", "planes.btf")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True,
                          check=True,
                          env=os.environ | {"PYTHONPATH": str(Path(slide.__file__).parents[1])})
    assert max(map(int, done.stdout.split())) < 35  # MB; the picture is 75


# -------------------------------------------------------------------- files that declare too much


def with_tags(path, **values):
    """Give the first page of a little-endian TIFF other values in tags of one number."""
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        for name, value in values.items():
            at = file.pages[0].tags[name].offset
            content[at + 2:at + 12] = b"\4\0\1\0\0\0" + value.to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize(("layout", "tags", "says"), [
    (dict(rowsperstrip=7), dict(ImageWidth=10**6, ImageLength=10**6), "1000000 pixels would take"),
    (dict(tile=(48, 64), compression="deflate"), dict(ImageWidth=10**6, ImageLength=10**6),
     "1000000 pixels would take"),
    (dict(tile=(48, 64), compression="jpeg"), dict(ImageWidth=30_000, ImageLength=30_000),
     "30000 pixels would take"),
    (dict(tile=(48, 64), compression="deflate"), dict(TileLength=0), r"its tiles have the size"),
    (dict(tile=(48, 64), compression="deflate"), dict(TileWidth=2**30), "its tiles of"),
    (dict(rowsperstrip=7), dict(ImageWidth=0), "")])
def test_a_tiff_that_declares_more_than_it_holds_is_refused(tmp_path, layout, tags, says):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, an_image(), photometric="rgb", metadata=None, **layout)
    with_tags(path, **tags)
    with (pytest.raises(InputError, match=rf"a\.tif cannot be read as an image \(.*{says}"),
          slide.open_slide(path)):
        pass


def test_a_picture_that_declares_more_than_it_holds_is_refused(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(an_image()).save(path)
    content = path.read_bytes()
    at = content.index(b"\xff\xc0") + 5  # height and width
    path.write_bytes(content[:at] + b"\xff" * 4 + content[at + 4:])
    with pytest.raises(InputError, match="65535 x 65535 pixels would"), slide.open_slide(path):
        pass


def test_a_gzipped_picture_that_unpacks_to_too_much_is_refused_and_leaves_nothing(tmp_path,
                                                                                  monkeypatch):
    monkeypatch.setattr(slide, "UNPACKED_LEAST", 1 << 20)
    path = tmp_path / "a.tif.gz"
    path.write_bytes(gzip.compress(bytes(1 << 22)) * 8)
    with pytest.raises(InputError, match="unpacks to over"), slide.open_slide(path, tmp_path):
        pass
    assert list(tmp_path.iterdir()) == [path]
