"""tissue.py: tissue is where it was painted."""

import numpy as np
import pytest
import scipy.ndimage
from test_slide import a_slide, write_pyramid

from heclip import sources, tissue
from heclip.slide import open_slide, shrunk
from heclip.spots import lattice
from heclip.tissue import doubt_about, find_tissue, otsu, share_on_tissue

# ------------------------------------------------------------------------- thumbnail and tissue


def a_section(height=300, width=420, um=8, colour=(200, 120, 170), grain=25, seed=1):
    """Glass with an ellipse of textured tissue: (picture, where the tissue is)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    down, across = (y - 0.45 * height) / (0.25 * height), (x - 0.6 * width) / (0.2 * width)
    tissue = down**2 + across**2 < 1
    picture = np.where(tissue[..., None],
                       np.array(colour) + rng.integers(-grain, grain, (height, width, 1)), 242)
    return np.clip(picture + rng.integers(-2, 3, picture.shape), 0, 255).astype(np.uint8), tissue


def overlap(found, true):
    return (found & true).sum() / (found | true).sum()


@pytest.mark.parametrize("colour",
                         [(200, 120, 170), (90, 70, 140), (215, 190, 215), (150, 150, 150)],
                         ids=["eosin", "haematoxylin", "pale", "grey"])
def test_tissue_is_found_where_it_was_painted(colour):
    picture, painted = a_section(colour=colour)
    assert overlap(find_tissue(picture, 8), painted) > 0.93


def test_a_slide_that_is_nearly_all_tissue_and_one_that_is_nearly_none():
    rng = np.random.default_rng(0)
    most = np.clip(rng.normal(150, 25, (300, 300, 1)) + np.array([30, -30, 10]), 0,
                   255).astype(np.uint8)
    most[:, :20] = 245
    most[:, 160:] -= 60  # two stains: the histogram's deepest gap lies between them
    assert find_tissue(most, 8)[:, 30:].mean() > 0.98
    few = np.full((600, 600, 3), 245, np.uint8)
    few[300:340, 300:340] = most[100:140, 100:140]
    assert 0.6 * 1600 < find_tissue(few, 8).sum() < 2200


def test_borders_ink_dust_frames_and_uneven_light_are_no_tissue():
    picture, painted = a_section(um=8)
    picture[:, :25] = 0  # beyond the scan
    picture[-12:] = 3
    picture[40:52, 60:250] = (20, 120, 60)  # green pen
    picture[60:80, 60:100] = (10, 110, 190)  # blue pen
    picture[100:160, 60:80] = 25  # black pen
    for y, x in [(20, 300), (250, 100), (270, 390)]:
        picture[y:y + 8, x:x + 8] = (120, 80, 120)  # dust of 64 µm
    frame = np.zeros(painted.shape)
    frame[220:290, 130:240] = 70  # printed below the glass, out of focus
    picture = np.clip(picture - scipy.ndimage.gaussian_filter(frame, 8)[..., None], 0, 255)
    picture = (picture * np.linspace(0.97, 1, painted.shape[1])[:, None]).astype(np.uint8)
    assert overlap(find_tissue(picture, 8), painted) > 0.93


def test_small_holes_are_filled_and_large_ones_are_not():
    picture, _ = a_section()
    picture[100:120, 240:260] = 242  # 160 µm: a lumen
    picture[130:180, 240:290] = 242  # 400 µm
    found = find_tissue(picture, 8)
    assert found[100:120, 240:260].all()
    assert not found[140:170, 250:280].any()


LIGHT = np.linspace(225, 245, 300).astype(np.uint8)[None, :, None]  # from left to right
GLOW = np.linspace(0, 10, 300)[:, None]


@pytest.mark.parametrize("picture", [
    np.full((200, 300, 3), 240, np.uint8),
    np.zeros((200, 300, 3), np.uint8),
    np.random.default_rng(0).integers(235, 250, (200, 300, 3)).astype(np.uint8),
    LIGHT.repeat(200, axis=0).repeat(3, axis=2),
    (np.random.default_rng(0).integers(225, 245, (200, 300, 3)) + GLOW).astype(np.uint8)],
    ids=["glass", "black", "noise", "uneven light", "both"])
def test_glass_has_no_tissue(picture):
    assert not find_tissue(picture, 8).any()


def a_field(colour=(30, -30, 10), grain=25, seed=0):
    """A picture that lies wholly inside tissue: a pale and a dark part, both textured."""
    rng = np.random.default_rng(seed)
    level = np.where(np.arange(300) < 140, 170, 110)[None, :, None]
    cells = scipy.ndimage.gaussian_filter(rng.normal(0, 2 * grain, (200, 300)), 0.7)[..., None]
    return np.clip(level + cells + np.array(colour), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("picture", [
    a_field(), a_field(colour=(0, 0, 0)), a_field()[:, :140], a_field()[:40, :40],
    a_field(colour=(40, -40, 20), grain=2)[:, :140]],
    ids=["two stains", "grey", "one stain", "a small core", "smooth"])
def test_a_picture_without_glass_is_all_tissue_and_that_is_said(picture):
    found = find_tissue(picture, 8)
    assert found.all()
    assert "no glass is seen" in doubt_about(picture, 8, found)


@pytest.mark.parametrize(("glass", "says"), [
    ((242, 240, 241), None), ((245, 225, 205), "is coloured"), ((235, 215, 240), "is coloured"),
    ("rough", "is textured")])
def test_glass_that_does_not_look_like_it_is_doubted(glass, says):
    picture, painted = a_section(colour=(120, 60, 110), grain=60)
    rough = np.random.default_rng(0).integers(225, 243, picture.shape[:2])[..., None]
    picture[~painted] = np.broadcast_to(rough if glass == "rough" else glass, picture.shape)[
        ~painted]
    found = find_tissue(picture, 8)
    assert overlap(found, painted) > 0.9
    doubt = doubt_about(picture, 8, found)
    assert says in doubt if says else doubt is None


def test_otsu_is_the_threshold_of_least_variance_within_the_classes():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(10, 3, 900), rng.normal(60, 8, 300)])
    within = {t: sum(len(part) * part.var() for part in (values[values <= t], values[values > t]))
              for t in np.linspace(values.min(), values.max(), 257)[1:-1]}
    assert otsu(values) == pytest.approx(min(within, key=within.get))


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize(("mpp", "limit", "shrink"),
                         [(1, 4096, 8), (4, 105, 8), (4, 4096, 2), (16, 4096, 1)])
def test_the_thumbnail_is_the_slide_made_smaller_from_its_nearest_level(tmp_path, mpp, limit,
                                                                        shrink, levels):
    image = a_slide(840, 600)
    path = write_pyramid(tmp_path / "slide.tif", image, levels)
    with open_slide(path) as opened:
        asked = []
        for level in opened.levels:
            level.read = (lambda *box, level=level, read=level.read:
                          asked.append(level.downsample) or read(*box))
        thumbnail, scale = tissue.thumbnail(opened, mpp, limit)
    expected = shrunk(image, shrink)
    assert scale == 1 / shrink
    assert abs(np.array(thumbnail.shape) - expected.shape).max() <= 1
    height, width = np.minimum(thumbnail.shape[:2], expected.shape[:2])
    np.testing.assert_allclose(thumbnail[:height, :width], expected[:height, :width].astype(int),
                               atol=3)
    assert set(asked) == {max(d for d in (1, 2, 4, 8)[:levels] if d <= shrink)}


def test_tissue_of_real_sections_is_where_their_authors_saw_it(real_data):
    folder = real_data("MOB") / "inst" / "extdata"
    for section in ("MOB1", "MOB3"):
        with open_slide(next(folder.rglob(f"{section}.jpg"))) as opened:
            thumbnail, scale = tissue.thumbnail(opened, 6.18)
        spots = sources.read_positions(next(folder.rglob(f"alignment_table_{section}*")))
        found = share_on_tissue(spots, find_tissue(thumbnail, 6.18), scale, 100 / 6.18) >= 0.25
        assert doubt_about(thumbnail, 6.18, find_tissue(thumbnail, 6.18)) is None
        true = spots["in_tissue"].to_numpy()
        assert (found & true).sum() > 0.92 * true.sum()
        assert (found & true).sum() > 0.97 * found.sum()


@pytest.mark.parametrize("section", ["MOB1", "MOB3"])
def test_a_field_inside_a_real_section_is_all_tissue(real_data, section):
    folder = real_data("MOB") / "inst" / "extdata"
    spots = sources.read_positions(next(folder.rglob(f"alignment_table_{section}*")))
    x, y = spots.loc[spots["in_tissue"], ["x", "y"]].median().astype(int)
    with open_slide(next(folder.rglob(f"{section}.jpg"))) as opened:
        field = opened.region(opened.levels[0], x - 146, y - 146, 292, 292)
    assert find_tissue(field, 6.18).all()


# --------------------------------------------------------------------------- spots


def test_the_share_of_a_circle_on_tissue():
    tissue = np.zeros((100, 200), bool)  # at half of full resolution
    tissue[:, 100:] = True
    spots = lattice(400, 200, 20)
    share = share_on_tissue(spots, tissue, 0.5, 40)
    x = spots["x"].to_numpy()
    assert (share[x < 178] == 0).all()
    assert (share[x > 222] == 1).all()
    np.testing.assert_allclose(share[(x > 198) & (x < 202)], 0.5, atol=0.06)
    y, x = np.mgrid[-10:11, -10:11]
    circle = np.hypot(y, x) <= 10
    left = spots[(spots["x"] == 190) & (spots["y"].between(50, 150))]
    expected = (circle & (x >= 5)).sum() / circle.sum()
    assert share_on_tissue(left, tissue, 0.5, 40) == pytest.approx(np.full(len(left), expected))
