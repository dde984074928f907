"""slide.py: whatever the file, a patch is the obvious slice of the whole image."""

import gzip

import numpy as np
import pytest
import tifffile
from PIL import Image

from heclip import slide
from heclip.files import InputError

HEIGHT, WIDTH, SIZE = 200, 150, 32


def an_image(height=HEIGHT, width=WIDTH, channels=3, seed=0):
    """Noise over a gradient that differs in both directions and all channels, so that no swap goes unseen."""
    rows, cols = np.mgrid[:height, :width]
    planes = [rows % 200, cols % 200, (rows + 2 * cols) % 200, np.full((height, width), 200)][:channels]
    noise = np.random.default_rng(seed).integers(0, 55, (height, width, channels))
    image = (np.stack(planes, axis=-1) + noise).astype(np.uint8)
    if channels == 4:
        image[..., 3] = 255
    return image if channels > 1 else image[..., 0]


def some_spots(n=25, height=HEIGHT, width=WIDTH, seed=0):
    """Spots in random order, fractions of pixels, with the image's corners among them."""
    inside = np.random.default_rng(seed).uniform(0, 1, (n, 2)) * [width - 1, height - 1]
    return np.random.default_rng(seed).permutation(
        np.concatenate([inside, [[0, 0], [width - 1, height - 1], [width - 1, 0], [0, height - 1]]]))


def obvious_patches(image, xy, size=SIZE):
    """The definition: decode everything, repeat the edge, slice."""
    image = np.stack([image] * 3, axis=-1) if image.ndim == 2 else image[..., :3]
    padded = np.pad(image, ((size, size), (size, size), (0, 0)), mode="edge")
    corners = [(round(y) - size // 2 + size, round(x) - size // 2 + size) for x, y in xy.tolist()]
    return np.stack([padded[top:top + size, left:left + size] for top, left in corners])


def crop(path, xy, size=SIZE):
    """Patches, thumbnail, scale and padded count of a slide, through files as preprocess does it."""
    target = path.parent / "patches.npy"
    scratch = path.parent / ".slide.part"
    with slide.open_slide(path, scratch) as opened:
        rest = slide.crop_patches(opened, xy, size, target)
    assert not scratch.exists()
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
    (name, channels) for name in TIFFS for channels in (1, 3, 4) if not ("JPEG" in name and channels == 4)])
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
def test_patches_of_a_tiff_with_one_plane_a_colour_are_slices_of_the_whole_image(tmp_path, compression, channels):
    image = an_image(channels=channels)
    path = tmp_path / "slide.tiff"
    tifffile.imwrite(path, np.moveaxis(image, -1, 0), photometric="rgb", planarconfig="separate", rowsperstrip=16,
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
    np.testing.assert_array_equal(crop(path, xy)[0], obvious_patches(np.asarray(Image.open(path)), xy))


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
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([plain.name, name, "patches.npy"])


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
    tifffile.imwrite(path, image, photometric="rgb", rowsperstrip=rows_per_strip, compression="deflate")
    xy = some_spots(40, height=400, width=60)
    np.testing.assert_array_equal(crop(path, xy)[0], obvious_patches(image, xy))


@pytest.mark.parametrize("size", [1, 15, 32, 200])
def test_any_patch_size_follows_the_definition_even_one_wider_than_the_slide(tmp_path, monkeypatch, size):
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


@pytest.mark.parametrize("bad", [[-1, 50], [WIDTH, 50], [50, -1], [50, HEIGHT], [HEIGHT - 1, WIDTH - 1]])
def test_a_centre_outside_the_slide_is_an_error_with_both_sizes(tmp_path, bad):
    path = tmp_path / "slide.png"
    Image.fromarray(an_image()).save(path)
    with pytest.raises(InputError) as error:
        crop(path, np.array([[70, 70], bad], float))
    assert f"{path} has {WIDTH} x {HEIGHT} pixels, but 1 of 2 spots lie outside it" in str(error.value)
    assert f"x {bad[0]}, y {bad[1]}" in str(error.value)


# ------------------------------------------------------------------------- thumbnail


@pytest.mark.usefixtures("band")
@pytest.mark.parametrize(("height", "width", "limit"), [
    (HEIGHT, WIDTH, 1500), (HEIGHT, WIDTH, 60), (WIDTH, HEIGHT, 60), (HEIGHT, WIDTH, 7), (HEIGHT, WIDTH, 200)])
def test_the_thumbnail_is_the_slide_averaged_over_whole_squares(tmp_path, monkeypatch, height, width, limit):
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
    assert not (path.parent / ".slide.part").exists()


@pytest.mark.parametrize("name", ["slide.png", "slide.tif", "slide.tif.gz"])
def test_an_alpha_that_is_not_opaque_is_refused(tmp_path, name):
    image, plain = an_image(channels=4), tmp_path / name.removesuffix(".gz")
    image[150, 20, 3] = 254
    Image.fromarray(image).save(plain)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    assert_refused(tmp_path / name, "alpha channel is not 255 everywhere.*Flatten it")


@pytest.mark.parametrize(("shape", "dtype", "options"), [
    ((50, 40, 3), np.uint16, dict(photometric="rgb")), ((50, 40), np.uint16, dict(photometric="minisblack")),
    ((50, 40), np.float32, dict(photometric="minisblack")), ((50, 40), bool, dict(photometric="minisblack"))])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_tiff_that_is_not_8_bits_a_channel_is_refused(tmp_path, shape, dtype, options, compression):
    tifffile.imwrite(tmp_path / "slide.tif", np.zeros(shape, dtype), compression=compression, **options)
    assert_refused(tmp_path / "slide.tif", "expected 8 bits a channel")


def test_a_16_bit_png_is_refused(tmp_path):
    Image.fromarray(np.zeros((50, 40), np.uint16)).save(tmp_path / "slide.png")
    assert_refused(tmp_path / "slide.png", "expected 8 bits a channel")


@pytest.mark.parametrize(("shape", "options"), [
    ((100, 90), dict(photometric="miniswhite")),
    ((100, 90), dict(photometric="palette", colormap=np.zeros((3, 256), np.uint16))),
    ((100, 90, 4), dict(photometric="separated")), ((100, 90, 3), dict(photometric="cielab")),
    ((100, 90, 2), dict(photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"])),
    ((100, 90, 6), dict(photometric="minisblack", planarconfig="contig"))],
    ids=["inverted", "palette", "CMYK", "Lab", "grey and alpha", "six channels"])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_tiff_whose_numbers_are_not_the_colours_is_refused(tmp_path, shape, options, compression):
    tifffile.imwrite(tmp_path / "slide.tif", np.full(shape, 255, np.uint8), compression=compression, **options)
    assert_refused(tmp_path / "slide.tif", "RGB or grey")


def test_a_stack_of_images_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "slide.tif", np.zeros((5, 100, 90), np.uint8), photometric="minisblack")
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
    lambda zipped: zipped[:len(zipped) // 2], lambda zipped: zipped[:-4], lambda zipped: b"<html>404</html>",
    lambda zipped: zipped[:10] + b"\xff" * 90 + zipped[100:], lambda zipped: zipped[:-8] + bytes(8), lambda zipped: b"",
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
    with slide.open_slide(tmp_path / "a.png", tmp_path / "scratch") as opened:
        slide.crop_patches(opened, xy, size, tmp_path / "patches.npy", stored)
    expected = [np.asarray(Image.fromarray(patch).resize((stored, stored), Image.Resampling.BILINEAR))
                for patch in obvious_patches(image, xy, size)]
    np.testing.assert_array_equal(np.load(tmp_path / "patches.npy"), expected)


def test_shrunk_patches_are_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200  # finer than the smaller patch can show: it must become grey, not black or white
    Image.fromarray(stripes).save(tmp_path / "a.png")
    with slide.open_slide(tmp_path / "a.png", tmp_path / "scratch") as opened:
        slide.crop_patches(opened, np.array([[32, 32]]), 32, tmp_path / "patches.npy", 8)
    patch = np.load(tmp_path / "patches.npy")[0]
    assert patch.min() > 80
    assert patch.max() < 120
