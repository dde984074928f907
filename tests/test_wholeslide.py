"""wholeslide.py: every patch is the obvious slice of the decoded image, and tissue is where it was painted."""

import numpy as np
import pytest
import scipy.ndimage
import tifffile
import torch
from PIL import Image

from heclip import slide, sources, wholeslide
from heclip.files import InputError
from heclip.spots import lattice
from heclip.wholeslide import SpotPatches, find_tissue, microns_per_pixel, open_whole_slide

HEIGHT, WIDTH = 420, 300
APERIO = "Aperio Image Library v11.2.1 \r\n300x420 [0,0 300x420] (64x64) JPEG/RGB Q=70|AppMag = 20|MPP = {}"
CPU = torch.device("cpu")


def an_image(height=HEIGHT, width=WIDTH, grain=55):
    """Noise over a gradient that differs in both directions and all channels, so that no swap goes unseen."""
    rows, cols = np.mgrid[:height, :width]
    planes = [rows * 180 // height, cols * 180 // width, (rows + cols) * 180 // (height + width)]
    noise = np.random.default_rng(0).integers(0, grain, (height, width, 3))
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
            writer.write(image, subfiletype=int(path.suffix != ".svs"), **(options | {"metadata": None}),
                         description=first.get("description"))
    return path


def some_spots(n=25, height=HEIGHT, width=WIDTH):
    """Spots in random order, fractions of pixels, with the image's corners among them."""
    inside = np.random.default_rng(0).uniform(0, 1, (n, 2)) * [width - 1, height - 1]
    return np.concatenate([inside, [[0, 0], [width - 1, height - 1], [width - 1, 0], [0, height - 1]]])


def patches_of(path, xy, crop, patch_px=32, batch=7):
    """All patches through the stream, in the order of the spots."""
    with open_whole_slide(path) as opened:
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
    "OME": lambda path, image: write_pyramid(path / "slide.ome.tif", image, metadata={"axes": "YXS"}),
    "uncompressed": lambda path, image: tifffile.imwrite(path / "slide.tif", image, metadata=None),
    "uncompressed tiles": lambda path, image: tifffile.imwrite(path / "slide.tif", image, tile=(64, 48), metadata=None),
    "one strip": lambda path, image: tifffile.imwrite(path / "slide.tif", image, rowsperstrip=HEIGHT,
                                                      compression="lzw", metadata=None),
    "planes": lambda path, image: tifffile.imwrite(path / "slide.tif", np.moveaxis(image, -1, 0), photometric="rgb",
                                                   planarconfig="separate", tile=(64, 48), metadata=None),
    "PNG": lambda path, image: Image.fromarray(image).save(path / "slide.png"),
}


@pytest.mark.parametrize("cache", [1, 20_000, 1 << 28])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_resampling_patches_are_those_of_the_reference_sections(tmp_path, monkeypatch, layout, cache):
    monkeypatch.setattr(wholeslide, "CACHE", cache)
    LAYOUTS[layout](tmp_path, an_image())
    (path,) = tmp_path.iterdir()
    xy = some_spots()
    with slide.open_slide(path, tmp_path / ".part") as opened:
        slide.crop_patches(opened, xy, 32, tmp_path / "patches.npy")
    np.testing.assert_array_equal(patches_of(path, xy, crop=32.3), np.load(tmp_path / "patches.npy"))


def test_a_patch_keeps_x_across_and_y_down(tmp_path):
    image = np.full((HEIGHT, WIDTH, 3), 240, np.uint8)
    image[300:, :] = (200, 100, 150)  # lower part
    image[:, :40] = (90, 70, 140)  # left part
    path = write_pyramid(tmp_path / "slide.tif", image)
    (patch,) = patches_of(path, np.array([[40.0, 300.0]]), crop=64)
    np.testing.assert_array_equal(patch[4, 28], (240, 240, 240))
    np.testing.assert_array_equal(patch[28, 28], (200, 100, 150))
    np.testing.assert_array_equal(patch[4, 4], patch[28, 4])
    np.testing.assert_array_equal(patch[4, 4], (90, 70, 140))


@pytest.mark.parametrize(("crop", "downsample", "size"), [
    (20, 1, 20), (32, 1, 32), (62, 1, 62), (63.2, 2, 32), (64, 2, 32), (100, 2, 50), (127, 4, 32), (500, 4, 125)])
def test_the_coarsest_level_with_enough_pixels_is_read(tmp_path, crop, downsample, size):
    path = write_pyramid(tmp_path / "slide.tif", an_image(840, 600), levels=3)
    with open_whole_slide(path) as opened:
        patches = SpotPatches(opened, np.array([[300.0, 420.0]]), crop, 32, CPU)
    assert patches.level.downsample == downsample
    assert patches.size == pytest.approx(size)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("finer", [2, 2.5, 4])
def test_the_same_tissue_in_finer_pixels_gives_nearly_the_same_patches(tmp_path, finer, levels):
    smooth = scipy.ndimage.gaussian_filter(an_image(), (1.5, 1.5, 0))
    enlarged = np.asarray(Image.fromarray(smooth).resize((int(WIDTH * finer), int(HEIGHT * finer)), Image.BICUBIC))
    coarse = write_pyramid(tmp_path / "coarse.tif", smooth, levels=1)
    fine = write_pyramid(tmp_path / "fine.tif", enlarged, levels=levels)
    xy = np.rint(some_spots()[:-4])
    expected, found = patches_of(coarse, xy, crop=32), patches_of(fine, xy * finer, crop=32 * finer)
    shifted = patches_of(fine, xy * finer + finer, crop=32 * finer)
    difference, if_shifted = (np.abs(p.astype(float) - expected).mean() for p in (found, shifted))
    assert difference < 1  # of 255
    assert if_shifted > 1.5 * difference


@pytest.mark.parametrize(("crop", "levels"), [(128, 1), (90, 1), (20, 2)])
def test_a_resampled_patch_is_the_slice_resized(tmp_path, crop, levels):
    image = an_image()
    (patch,) = patches_of(write_pyramid(tmp_path / "slide.tif", image, levels), np.array([[150.0, 220.0]]), crop)
    half = crop // 2
    cut = Image.fromarray(image[220 - half:220 + half, 150 - half:150 + half])
    np.testing.assert_array_equal(patch, cut.resize((32, 32), Image.Resampling.BILINEAR))


def test_the_tiles_of_one_level_are_not_taken_for_anothers(tmp_path):
    image = an_image()
    with open_whole_slide(write_pyramid(tmp_path / "slide.tif", image)) as opened:
        coarse = opened.region(opened.levels[1], 5, 7, 40, 50)
        np.testing.assert_array_equal(opened.region(opened.levels[0], 5, 7, 40, 50), image[7:57, 5:45])
        np.testing.assert_array_equal(coarse, halved(image)[7:57, 5:45])


def test_tiles_are_decoded_once_and_the_cache_keeps_its_size(tmp_path, monkeypatch):
    path = write_pyramid(tmp_path / "slide.tif", an_image(1200, 900), levels=1)
    spots = lattice(900, 1200, 30)
    decoded = {}
    for cache in (1 << 28, 48 * 64 * 3 * 5 * 10):  # everything fits; half of the slide's width fits
        monkeypatch.setattr(wholeslide, "CACHE", cache)
        with open_whole_slide(path) as opened:
            read = opened.levels[0].read
            asked = []
            opened.levels[0].read = lambda *box, asked=asked, read=read: asked.append(box) or read(*box)
            patches = SpotPatches(opened, spots[["x", "y"]].to_numpy(), 40, 40, CPU)
            for _ in patches.stream(torch.from_numpy(patches.order).split(16)):
                assert opened.held <= cache
        assert len(set(asked)) == 19 * 19
        decoded[cache] = len(asked)
    assert decoded[1 << 28] == 19 * 19
    assert list(decoded.values())[1] < 1.2 * 19 * 19


def test_rows_of_an_uncompressed_slide_are_read_about_once(tmp_path, monkeypatch):
    monkeypatch.setattr(wholeslide, "CACHE", 1)
    tifffile.imwrite(tmp_path / "slide.tif", an_image(1200, 900), metadata=None)
    with open_whole_slide(tmp_path / "slide.tif") as opened:
        read, asked = opened.levels[0].read, []
        opened.levels[0].read = lambda *box: asked.append(box) or read(*box)
        patches = SpotPatches(opened, lattice(900, 1200, 30)[["x", "y"]].to_numpy(), 40, 40, CPU)
        for _ in patches.stream(torch.from_numpy(patches.order).split(16)):
            pass
    assert len(asked) == len(set(asked)) == 19


@pytest.mark.parametrize(("xy", "crop", "says"), [
    ([[-1, 50]], 32, "1 of 1 spots lie outside it, one at x -1, y 50"),
    ([[70, 70], [WIDTH, 50]], 32, "1 of 2 spots"),
    ([[70, 70]], 500, "a patch would take 500: check --mpp")])
def test_spots_or_patches_that_do_not_fit_the_slide_are_refused(tmp_path, xy, crop, says):
    path = write_pyramid(tmp_path / "slide.tif", an_image())
    with pytest.raises(InputError, match=says) as error:
        patches_of(path, np.array(xy, float), crop)
    assert f"{path} has {WIDTH} x {HEIGHT} pixels" in str(error.value)


# ------------------------------------------------------------------------- microns per pixel


def ome(x, y, unit):
    return {"axes": "YXS", "PhysicalSizeX": x, "PhysicalSizeXUnit": unit, "PhysicalSizeY": y, "PhysicalSizeYUnit": unit}


def mpp_of(path, given=None):
    with open_whole_slide(path) as opened:
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
    path = write_pyramid(tmp_path / name, an_image(), pages=name.endswith(".svs"), **options)
    assert mpp_of(path) == pytest.approx(mpp, rel=1e-4)
    assert mpp_of(path, given=0.31) == 0.31
    monkeypatch.setattr(wholeslide, "vendor", lambda path: None)  # as without openslide
    assert mpp_of(path) == pytest.approx(mpp, rel=1e-4)


def test_imagej_writes_microns_as_a_unit_of_its_own(tmp_path):
    tifffile.imwrite(tmp_path / "slide.tif", an_image(), imagej=True, resolution=(2, 2), metadata={"unit": "um"})
    assert mpp_of(tmp_path / "slide.tif") == pytest.approx(0.5)


@pytest.mark.parametrize("options", [
    {}, dict(resolution=(72, 72), resolutionunit="INCH"), dict(resolution=(96, 96), resolutionunit="INCH"),
    dict(resolution=(300, 300), resolutionunit="CENTIMETER"), dict(resolution=(2, 2), resolutionunit="NONE"),
    dict(resolution=(0, 0), resolutionunit="INCH")])
def test_a_screens_resolution_is_no_microscopes(tmp_path, options):
    path = write_pyramid(tmp_path / "slide.tif", an_image(), **options)
    with pytest.raises(InputError, match=r"slide.tif does not say how many µm a pixel is wide. Give it with --mpp"):
        mpp_of(path)
    assert mpp_of(path, given=0.5) == 0.5


@pytest.mark.parametrize("options", [dict(resolution=(40000, 20000), resolutionunit="CENTIMETER")])
def test_pixels_that_are_not_square_are_an_error_unless_mpp_is_given(tmp_path, options):
    path = write_pyramid(tmp_path / "slide.tif", an_image(), **options)
    with pytest.raises(InputError, match=r"not square, 0.25 by 0.5 µm"):
        mpp_of(path)
    assert mpp_of(path, given=0.25) == 0.25


@pytest.mark.parametrize("given", [0, -1, 250, float("nan")])
def test_an_impossible_mpp_is_refused(tmp_path, given):
    path = write_pyramid(tmp_path / "slide.tif", an_image())
    with pytest.raises(InputError, match=r"--mpp .*from 0.05 to 20"):
        mpp_of(path, given)


# ------------------------------------------------------------------------- openslide, and what is no slide


def test_openslide_and_tifffile_read_the_same_slide(tmp_path, monkeypatch):
    pytest.importorskip("openslide")
    path = write_pyramid(tmp_path / "slide.svs", an_image(), levels=3, pages=True, description=APERIO.format(0.5))
    xy = some_spots()
    assert wholeslide.vendor(path) == "aperio"
    with open_whole_slide(path) as opened:
        levels = [(level.width, level.height, level.downsample) for level in opened.levels]
    through_openslide = [patches_of(path, xy, crop) for crop in (32, 64, 100)]
    monkeypatch.setattr(wholeslide, "vendor", lambda path: None)
    with open_whole_slide(path) as opened:
        assert [(level.width, level.height, level.downsample) for level in opened.levels] == levels
    assert levels == [(300, 420, 1), (150, 210, 2), (75, 105, 4)]
    for crop, patches in zip((32, 64, 100), through_openslide, strict=True):
        np.testing.assert_array_equal(patches, patches_of(path, xy, crop))


def test_a_tile_that_the_scanner_left_out_is_white(tmp_path):
    image = np.full((128, 128, 3), 77, np.uint8)
    tiles = iter([image[:64, :64], None, image[:64, :64], image[:64, :64]])
    tifffile.imwrite(tmp_path / "slide.tif", tiles, shape=image.shape, dtype=np.uint8, tile=(64, 64),
                     photometric="rgb", compression="deflate", metadata=None)
    first, second = patches_of(tmp_path / "slide.tif", np.array([[32.0, 32.0], [96.0, 32.0]]), 32)
    assert (first == 77).all()
    assert (second == 255).all()


def test_sizes_that_a_pyramid_rounded_do_not_shift_its_far_end():
    assert wholeslide.downsample_of((100_003, 80_001), (25_000, 20_000)) == 4
    assert wholeslide.downsample_of((100_003, 80_001), (25_001, 20_001)) == 4
    assert wholeslide.downsample_of((1000, 800), (400, 320)) == 2.5


@pytest.mark.parametrize(("name", "content", "says"), [
    ("slide.tif", b"II*\0 but no more", "cannot be read as an image"),
    ("slide.svs", b"no slide at all", "cannot be read as an image"),
    ("slide.mrxs", b"no slide at all", "pip install openslide-python openslide-bin"),
    ("slide.jpg", b"no picture", "cannot be read as an image"),
    ("slide.tif.gz", b"\x1f\x8b", "Unpack it first: gunzip slide.tif.gz"),
    ("slide.tif", None, "is missing")])
def test_what_is_no_slide_is_refused_by_name(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as error:
        mpp_of(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(("image", "says"), [
    (np.zeros((70, 60, 3), np.uint16), "8 bits a channel"), (np.zeros((4, 70, 60), np.uint8), "axes are")])
def test_a_tiff_that_is_no_picture_is_refused(tmp_path, image, says):
    tifffile.imwrite(tmp_path / "slide.tif", image, photometric="rgb" if image.ndim == 3 and image.shape[2] == 3
                     else "minisblack")
    with pytest.raises(InputError, match=says):
        mpp_of(tmp_path / "slide.tif")


def test_damage_in_a_tile_is_an_error_that_names_the_slide(tmp_path):
    path = write_pyramid(tmp_path / "slide.tif", an_image(), levels=1)
    content = bytearray(path.read_bytes())
    content[40_000:60_000] = bytes(20_000)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"slide.tif cannot be read as an image"):
        patches_of(path, lattice(WIDTH, HEIGHT, 20)[["x", "y"]].to_numpy(), 32)


# ------------------------------------------------------------------------- thumbnail and tissue


def a_section(height=300, width=420, um=8, colour=(200, 120, 170), grain=25, seed=1):
    """Glass with an ellipse of textured tissue: (picture, where the tissue is)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    tissue = ((y - 0.45 * height) / (0.25 * height)) ** 2 + ((x - 0.6 * width) / (0.2 * width)) ** 2 < 1
    picture = np.where(tissue[..., None], np.array(colour) + rng.integers(-grain, grain, (height, width, 1)), 242)
    return np.clip(picture + rng.integers(-2, 3, picture.shape), 0, 255).astype(np.uint8), tissue


def overlap(found, true):
    return (found & true).sum() / (found | true).sum()


@pytest.mark.parametrize("colour", [(200, 120, 170), (90, 70, 140), (215, 190, 215), (150, 150, 150)],
                         ids=["eosin", "haematoxylin", "pale", "grey"])
def test_tissue_is_found_where_it_was_painted(colour):
    picture, tissue = a_section(colour=colour)
    assert overlap(find_tissue(picture, 8), tissue) > 0.93


def test_a_slide_that_is_nearly_all_tissue_and_one_that_is_nearly_none():
    rng = np.random.default_rng(0)
    most = np.clip(rng.normal(150, 25, (300, 300, 1)) + np.array([30, -30, 10]), 0, 255).astype(np.uint8)
    most[:, :20] = 245
    most[:, 160:] -= 60  # two stains: the histogram's deepest gap lies between them
    assert find_tissue(most, 8)[:, 30:].mean() > 0.98
    few = np.full((600, 600, 3), 245, np.uint8)
    few[300:340, 300:340] = most[100:140, 100:140]
    assert 0.6 * 1600 < find_tissue(few, 8).sum() < 2200


def test_borders_ink_dust_frames_and_uneven_light_are_no_tissue():
    picture, tissue = a_section(um=8)
    picture[:, :25] = 0  # beyond the scan
    picture[-12:] = 3
    picture[40:52, 60:250] = (20, 120, 60)  # green pen
    picture[60:80, 60:100] = (10, 110, 190)  # blue pen
    picture[100:160, 60:80] = 25  # black pen
    for y, x in [(20, 300), (250, 100), (270, 390)]:
        picture[y:y + 8, x:x + 8] = (120, 80, 120)  # dust of 64 µm
    frame = np.zeros(tissue.shape)
    frame[220:290, 130:240] = 70  # printed below the glass, out of focus
    picture = np.clip(picture - scipy.ndimage.gaussian_filter(frame, 8)[..., None], 0, 255)
    picture = (picture * np.linspace(0.97, 1, tissue.shape[1])[:, None]).astype(np.uint8)
    assert overlap(find_tissue(picture, 8), tissue) > 0.93


def test_small_holes_are_filled_and_large_ones_are_not():
    picture, _ = a_section()
    picture[100:120, 240:260] = 242  # 160 µm: a lumen
    picture[130:180, 240:290] = 242  # 400 µm
    found = find_tissue(picture, 8)
    assert found[100:120, 240:260].all()
    assert not found[140:170, 250:280].any()


@pytest.mark.parametrize("picture", [
    np.full((200, 300, 3), 240, np.uint8), np.zeros((200, 300, 3), np.uint8),
    np.random.default_rng(0).integers(235, 250, (200, 300, 3)).astype(np.uint8),
    np.repeat(np.linspace(225, 245, 300).astype(np.uint8)[None, :, None], 200, axis=0).repeat(3, axis=2),
    (np.random.default_rng(0).integers(225, 245, (200, 300, 3)) + np.linspace(0, 10, 300)[:, None]).astype(np.uint8)],
    ids=["glass", "black", "noise", "uneven light", "both"])
def test_glass_has_no_tissue(picture):
    assert not find_tissue(picture, 8).any()


def test_otsu_is_the_threshold_of_least_variance_within_the_classes():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(10, 3, 900), rng.normal(60, 8, 300)])
    within = {t: sum(len(part) * part.var() for part in (values[values <= t], values[values > t]))
              for t in np.linspace(values.min(), values.max(), 257)[1:-1]}
    assert wholeslide.otsu(values) == pytest.approx(min(within, key=within.get))


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize(("mpp", "limit", "shrink"), [(1, 4096, 8), (4, 105, 8), (4, 4096, 2), (16, 4096, 1)])
def test_the_thumbnail_is_the_slide_made_smaller_from_its_nearest_level(tmp_path, mpp, limit, shrink, levels):
    image = an_image(840, 600)
    path = write_pyramid(tmp_path / "slide.tif", image, levels)
    with open_whole_slide(path) as opened:
        asked = []
        for level in opened.levels:
            level.read = lambda *box, level=level, read=level.read: asked.append(level.downsample) or read(*box)
        thumbnail, scale = wholeslide.thumbnail(opened, mpp, limit)
    expected = wholeslide.shrunk(image, shrink)
    assert scale == 1 / shrink
    assert abs(np.array(thumbnail.shape) - expected.shape).max() <= 1
    height, width = np.minimum(thumbnail.shape[:2], expected.shape[:2])
    np.testing.assert_allclose(thumbnail[:height, :width], expected[:height, :width].astype(int), atol=3)
    assert set(asked) == {max(d for d in (1, 2, 4, 8)[:levels] if d <= shrink)}


def test_tissue_of_real_sections_is_where_their_authors_saw_it(real_data):
    folder = real_data("MOB") / "inst" / "extdata"
    for section in ("MOB1", "MOB3"):
        with open_whole_slide(next(folder.rglob(f"{section}.jpg"))) as opened:
            thumbnail, scale = wholeslide.thumbnail(opened, 6.18)
        spots = sources.read_positions(next(folder.rglob(f"alignment_table_{section}*")))
        found = wholeslide.share_on_tissue(spots, find_tissue(thumbnail, 6.18), scale, 100 / 6.18) >= 0.25
        true = spots["in_tissue"].to_numpy()
        assert (found & true).sum() > 0.92 * true.sum()
        assert (found & true).sum() > 0.97 * found.sum()


def test_the_share_of_a_circle_on_tissue():
    tissue = np.zeros((100, 200), bool)  # at half of full resolution
    tissue[:, 100:] = True
    spots = lattice(400, 200, 20)
    share = wholeslide.share_on_tissue(spots, tissue, 0.5, 40)
    x = spots["x"].to_numpy()
    assert (share[x < 178] == 0).all()
    assert (share[x > 222] == 1).all()
    np.testing.assert_allclose(share[(x > 198) & (x < 202)], 0.5, atol=0.06)
    y, x = np.mgrid[-10:11, -10:11]
    circle = np.hypot(y, x) <= 10
    left = spots[(spots["x"] == 190) & (spots["y"].between(50, 150))]
    expected = (circle & (x >= 5)).sum() / circle.sum()
    assert wholeslide.share_on_tissue(left, tissue, 0.5, 40) == pytest.approx(np.full(len(left), expected))
