"""Rows stay with their spots, validation apart from training tissue, pixels as pretrained."""

from itertools import combinations
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from makers import panel_of
from PIL import Image

from heclip.batches import (
    READERS,
    Patches,
    Spots,
    augment,
    encode_patches,
    mix,
    random_shares,
    random_stains,
    random_turns,
    split_spots,
    stain,
    to_pixels,
)
from heclip.dataset import Processed, patches_digest
from heclip.files import InputError
from heclip.model import HECLIP, configure

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


class Lattice:
    """The part of `Spots` that a split reads: sections of rows x columns spots."""

    def __init__(self, shapes, pitch=40):
        sections, xy = [], []
        for name, (rows, columns) in shapes.items():
            row, column = np.mgrid[:rows, :columns].reshape(2, -1)
            xy.append(np.column_stack(
                [pitch * column + pitch // 2 * (row % 2), round(0.87 * pitch) * row]) + 100)
            sections += [name] * len(row)
        self.section, self.xy = np.array(sections), np.concatenate(xy)

    def __len__(self):
        return len(self.section)


def share_a_pixel(a, b, size):
    """Whether the patches around two centres, [x - size/2, x + size/2) on both axes, overlap."""
    return all(set(range(p - size // 2, p - size // 2 + size))
               & set(range(q - size // 2, q - size // 2 + size)) for p, q in zip(a, b, strict=True))


def symmetries(patch):
    """The 8 images of a (P, P, 3) patch under the symmetries of the square."""
    turned = [np.rot90(patch, quarter) for quarter in range(4)]
    return turned + [image[:, ::-1] for image in turned]


def patches_at(patches, index):
    (batch,) = patches.stream([torch.tensor(index, dtype=torch.int64)])
    return batch


def turn(patches, seed):
    return augment(patches, random_turns(len(patches), torch.Generator().manual_seed(seed)))


def write_section(processed, name, spots, genes=("G1", "G2", "G3", "G4"), size=6, seed=0):
    """One processed section, written by hand; its patches all differ. Returns (X, xy, patches)."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(1, (spots, len(genes))).astype(np.float32)
    xy = rng.uniform(0, 500, (spots, 2))
    patches = rng.integers(0, 256, (spots, size, size, 3), dtype=np.uint8)
    adata = anndata.AnnData(scipy.sparse.csr_matrix(x), obs=pd.DataFrame(index=[
        f"{name}-{i}" for i in range(spots)]), var=pd.DataFrame({"symbol": list(genes)}, index=list(
            genes)), obsm={"spatial": xy}, uns={"patches_digest": patches_digest(patches)})
    processed.folder.mkdir(parents=True, exist_ok=True)
    adata.write_h5ad(processed.section_path(name))
    np.save(processed.patches_path(name), patches)
    return x, xy, patches


# ------------------------------------------------------------------------------ patches


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index",
                         [[0, 1, 2], list(range(12)), [11, 0, 3, 4, 8, 2], [7, 7, 0, 7], [4], []])
def test_any_rows_of_several_sections_equal_those_of_the_arrays(index, device):
    rng = np.random.default_rng(0)
    sections = [rng.integers(0, 256, (n, 5, 5, 3), dtype=np.uint8) for n in (4, 1, 0, 7)]
    batch = patches_at(Patches(sections, torch.device(device)), index)
    assert batch.dtype == torch.uint8
    assert batch.device.type == device
    np.testing.assert_array_equal(batch.cpu(), np.concatenate(sections)[np.array(index, int)])


def test_patches_of_memory_maps_equal_those_of_arrays_and_leave_the_files_alone(tmp_path):
    rng = np.random.default_rng(1)
    arrays = [rng.integers(0, 256, (n, 5, 5, 3), dtype=np.uint8) for n in (6, 3)]
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", array)
    patches = Patches([np.load(tmp_path / f"{i}.npy", mmap_mode="r") for i in range(2)], CPU)
    batch = patches_at(patches, [8, 0, 5, 6])
    np.testing.assert_array_equal(batch, np.concatenate(arrays)[[8, 0, 5, 6]])
    batch.zero_()
    np.testing.assert_array_equal(np.load(tmp_path / "0.npy"), arrays[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batches", [0, 1, 2 * READERS, 2 * READERS + 1, 50])
def test_batches_come_in_the_order_they_were_asked_for_however_many(batches, device):
    array = np.arange(300, dtype=np.int64)[:, None, None, None] // np.array([1, 256, 999]) % 256
    array = np.broadcast_to(array, (300, 4, 4, 3)).astype(np.uint8)
    patches = Patches([array[:100], array[100:]], torch.device(device))
    asked = [torch.from_numpy(rows)
             for rows in np.random.default_rng(batches).integers(0, 300, (batches, 7))]
    streamed = list(patches.stream(iter(asked)))
    assert len(streamed) == batches
    for rows, batch in zip(asked, streamed, strict=True):
        np.testing.assert_array_equal(batch.cpu(), array[rows])


def test_patches_say_how_large_they_are_and_where_they_lie():
    gigabyte = np.broadcast_to(np.uint8(0), (4000, 250, 250, 4))
    assert Patches([gigabyte, gigabyte],
                   CPU).where() == "2,000 MB of patches read from disk as needed"


@pytest.mark.parametrize("n", [0, 1, 4, 5, 8, 11])
def test_patches_are_encoded_in_order_without_augmentation_whatever_the_batch(n):
    torch.manual_seed(0)
    model = HECLIP(configure("test_resnet", "heg", 5, 24, embedding_dim=8)).eval()
    arrays = [np.random.default_rng(size).integers(0, 256, (size, 24, 24, 3), dtype=np.uint8)
              for size in (9, 4)]
    index = torch.from_numpy(np.random.default_rng(n).permutation(13)[:n])
    embeddings = encode_patches(model, Patches(arrays, CPU), index, 4)
    assert embeddings.shape == (n, 8)
    assert embeddings.dtype == torch.float32
    with torch.inference_mode():
        for row, spot in zip(embeddings, index, strict=True):  # one at a time
            pixels = to_pixels(torch.from_numpy(np.concatenate(arrays)[spot][None]), model.config)
            torch.testing.assert_close(row, model.encode_image(pixels)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(embeddings, encode_patches(model, Patches(arrays, CPU), index, 4))


# ------------------------------------------------------------------------------ spots


def test_row_i_is_the_same_spot_in_section_position_expression_and_patch():
    processed = Processed("test-batches-rows")
    parts = {name: write_section(processed, name, spots, seed=spots)
             for name, spots in (("B", 5), ("A", 3))}
    spots = Spots(processed, ["B", "A"], panel_of("G3", "G1"), CPU)  # not the files' order
    assert len(spots) == 8
    assert spots.section.tolist() == ["B"] * 5 + ["A"] * 3
    assert spots.expression.dtype == torch.float32
    assert spots.xy.dtype == np.int64
    x, xy, patches = (np.concatenate(arrays) for arrays in zip(*parts.values(), strict=True))
    np.testing.assert_array_equal(spots.expression, x[:, [2, 0]])
    np.testing.assert_array_equal(spots.xy, np.rint(xy))
    np.testing.assert_array_equal(patches_at(spots.patches, range(8)), patches)


def test_sections_that_hold_their_genes_in_another_order_are_aligned_by_gene_id():
    processed = Processed("test-batches-genes")
    first, *_ = write_section(processed, "A", 4, genes=("G1", "G2", "G3"))
    second, *_ = write_section(processed, "B", 4, genes=("G3", "G9", "G2", "G1"), seed=1)
    spots = Spots(processed, ["A", "B"], panel_of("G1", "G2", kind="hvg"), CPU)
    np.testing.assert_array_equal(spots.expression,
                                  np.concatenate([first[:, :2], second[:, [3, 2]]]))


def test_the_paper_protocol_reads_the_corrected_matrix():
    processed = Processed("test-batches-paper")
    write_section(processed, "A", 3)
    corrected = np.array([[-0.5, 1], [2, 3], [4, 5]], np.float32)
    np.save(processed.corrected_path("A", "heg"), corrected)
    spots = Spots(processed, ["A"], panel_of("G1", "G2", protocol="paper"), CPU)
    np.testing.assert_array_equal(spots.expression, corrected)


def test_a_missing_section_is_an_error_that_names_its_file():
    processed = Processed("test-batches-missing")
    with pytest.raises(InputError, match=r"nowhere\.h5ad is missing"):
        Spots(processed, ["nowhere"], panel_of("G1"), CPU)


# ------------------------------------------------------------------------------ split


# the first two have the same coordinates
SHAPES = {"one": (12, 15), "two": (12, 15), "three": (9, 7)}


def everywhere(crop_px):
    """The same size of patch in every section."""
    return dict.fromkeys(SHAPES, crop_px)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("protocol", ["strict", "paper"])
def test_no_spot_is_on_both_sides_and_both_are_sorted(protocol, fraction, seed):
    spots = Lattice(SHAPES)
    training, validation = split_spots(spots, everywhere(56), fraction, protocol, seed)
    assert training.dtype == validation.dtype == torch.int64
    assert not set(training.tolist()) & set(validation.tolist())
    for side in (training, validation):
        assert side.tolist() == sorted(set(side.tolist()))
        assert len(side)
        assert 0 <= side.min()
        assert side.max() < len(spots)


ONE = {"one": (12, 15)}  # of a single section, a window of tissue validates


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("patch_px", [17, 40, 56, 64])
def test_no_patch_of_a_validation_window_shares_a_pixel_with_a_training_patch(patch_px, seed):
    spots = Lattice(ONE)
    training, validation = split_spots(spots, everywhere(patch_px), 0.2, "strict", seed)
    shared = [(t, v) for v in validation.tolist() for t in training.tolist()
              if share_a_pixel(spots.xy[t], spots.xy[v], patch_px)]
    assert not shared


@pytest.mark.parametrize("patch_px", [17, 40, 56])
def test_a_window_leaves_out_only_spots_whose_patch_shares_a_pixel_with_validation(patch_px):
    spots = Lattice(ONE)
    training, validation = split_spots(spots, everywhere(patch_px), 0.2, "strict", 0)
    left_out = set(range(len(spots))) - set(training.tolist()) - set(validation.tolist())
    assert bool(left_out) == (patch_px > 40 * 0.87)
    for spot in left_out:
        assert any(share_a_pixel(spots.xy[spot], spots.xy[v], patch_px)
                   for v in validation.tolist())


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.33])
def test_a_window_holds_the_fraction_of_its_section(fraction):
    _, validation = split_spots(Lattice(ONE), everywhere(56), fraction, "strict", 3)
    assert len(validation) == round(fraction * 180)


@pytest.mark.parametrize(("fraction", "section"), [(0.1, "three"), (0.2, "three"), (0.5, "one")])
@pytest.mark.parametrize("crop_px", [17, 4000])
def test_of_several_sections_the_one_nearest_to_the_fraction_validates_as_a_whole(
        fraction, section, crop_px):
    spots = Lattice(SHAPES)  # 180, 180 and 63 spots; equally near: the first
    for seed in (0, 1):
        training, validation = split_spots(spots, everywhere(crop_px), fraction, "strict", seed)
        assert set(spots.section[validation]) == {section}
        assert section not in set(spots.section[training])
        assert len(training) + len(validation) == len(spots)  # no spot is between them


def test_a_strict_validation_set_is_one_compact_window_of_tissue():
    spots = Lattice({"one": (30, 30)})
    # 36 spots, about 6 x 6 of pitch 40
    _, validation = split_spots(spots, everywhere(56), 0.04, "strict", 1)
    # at the edge of the tissue up to twice as long
    assert np.ptp(spots.xy[validation], axis=0).max() <= 12 * 40


@pytest.mark.parametrize(("protocol", "shapes"), [("strict", ONE), ("paper", SHAPES)])
def test_the_same_seed_gives_the_same_split_and_another_seed_another(protocol, shapes):
    spots = Lattice(shapes)
    one, again, other = (split_spots(spots, everywhere(56), 0.2, protocol, seed)
                         for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[1], other[1])


def test_the_paper_split_is_a_random_draw_that_uses_every_spot():
    spots = Lattice(SHAPES)
    training, validation = split_spots(spots, everywhere(56), 0.2, "paper", 0)
    assert len(validation) == round(0.2 * len(spots))
    assert len(training) + len(validation) == len(spots)
    # spread over the tissue
    assert np.ptp(spots.xy[validation], axis=0).min() > 0.9 * np.ptp(spots.xy, axis=0).min()
    drawn = np.concatenate(
        [split_spots(spots, everywhere(56), 0.2, "paper", seed)[1] for seed in range(200)])
    often = np.bincount(drawn, minlength=len(spots))
    assert often.min() > 40 - 5 * 32**0.5  # each spot in one draw of five
    assert often.max() < 40 + 5 * 32**0.5


# ------------------------------------------------------------------------------ augmentation


@pytest.mark.parametrize("device", DEVICES)
def test_augmentation_gives_the_eight_symmetries_of_the_square_equally_often(device):
    patch = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    images = [image.tobytes() for image in symmetries(patch)]
    assert len(set(images)) == 8
    batch = torch.from_numpy(patch).repeat(4000, 1, 1, 1).to(device)
    turned = turn(batch, 0).cpu().numpy()
    counts = [0] * 8
    for image in turned:
        counts[images.index(image.tobytes())] += 1  # ValueError were it none of them
    assert min(counts) > 500 - 5 * 437.5**0.5
    assert max(counts) < 500 + 5 * 437.5**0.5


def test_augmentation_mixes_neither_patches_nor_channels():
    batch = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8))
    before = batch.clone()
    turned = turn(batch, 1)
    assert turned.shape == batch.shape
    assert turned.dtype == torch.uint8
    assert torch.equal(batch, before)
    for image, patch in zip(turned.numpy(), batch.numpy(), strict=True):
        assert any(np.array_equal(image, other) for other in symmetries(patch))


def test_the_same_generator_seed_gives_the_same_augmentation_and_the_next_batch_another():
    batch = torch.from_numpy(
        np.random.default_rng(2).integers(0, 256, (32, 4, 4, 3), dtype=np.uint8))
    generator = torch.Generator().manual_seed(3)
    first, second = (augment(batch, random_turns(32, generator)) for _ in range(2))
    assert torch.equal(first, turn(batch, 3))
    assert not torch.equal(first, second)


# ------------------------------------------------------------------------------ pixels


def pixel_config(image_size, mean=(0.5, 0.4, 0.2), std=(0.1, 0.2, 0.5)):
    return SimpleNamespace(bgr=False, image_size=image_size, mean=mean, std=std)


def test_pixels_are_standardised_channel_by_channel_in_rgb_order():
    patches = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    patches[1, 2, 3] = torch.tensor([255, 51, 102])
    pixels = to_pixels(patches, pixel_config(4))
    assert pixels.shape == (2, 3, 4, 4)
    assert pixels.dtype == torch.float32
    # (255/255 - 0.5) / 0.1, (51/255 - 0.4) / 0.2, (102/255 - 0.2) / 0.5; black: - mean / std
    torch.testing.assert_close(pixels[1, :, 2, 3], torch.tensor([5.0, -1.0, 0.4]))
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([-5.0, -2.0, -0.4]))


def test_pixels_keep_their_place_and_lie_channels_last_in_memory():
    patches = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (3, 5, 5, 3), dtype=np.uint8))
    pixels = to_pixels(patches, pixel_config(5))
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    back = (pixels.permute(0, 2, 3, 1) * torch.tensor([0.1, 0.2, 0.5])
            + torch.tensor([0.5, 0.4, 0.2])) * 255
    torch.testing.assert_close(back, patches.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [4, 8, 12, 32])
def test_patches_are_resized_only_if_the_encoder_takes_another_size(size):
    plain = torch.full((2, 8, 8, 3), 51, dtype=torch.uint8)
    plain[1] = 102
    pixels = to_pixels(plain, pixel_config(size, mean=(0, 0, 0), std=(1, 1, 1)))
    assert pixels.shape == (2, 3, size, size)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    # one colour stays one colour
    torch.testing.assert_close(pixels[0], torch.full((3, size, size), 0.2))
    torch.testing.assert_close(pixels[1], torch.full((3, size, size), 0.4))


def test_patches_are_resized_as_pillow_resizes_them():
    noise = np.random.default_rng(0).integers(0, 256, (30, 30), dtype=np.uint8)
    pixels = to_pixels(torch.from_numpy(noise)[None, ..., None].repeat(1, 1, 1, 3),
                       pixel_config(8, (0,) * 3, (1,) * 3))
    expected = Image.fromarray(noise.astype(np.float32)).resize((8, 8), Image.Resampling.BILINEAR)
    torch.testing.assert_close(pixels[0, 1] * 255, torch.from_numpy(np.array(expected)), rtol=0,
                               atol=0.01)


# -------------------------------------------------------------- stain, blue first, several views


def test_mixing_is_the_weighted_mean_with_the_row_half_a_batch_further():
    rows, shares = torch.tensor([[0.0, 8], [4, 0], [2, 2], [8, 4]]), torch.tensor(
        [1.0, 0.5, 0.25, 0])
    assert mix(rows, shares).tolist() == [[0, 8], [6, 2], [0.5, 6.5], [4, 0]]
    patches = torch.randint(0, 256, (4, 3, 3, 3), dtype=torch.uint8)
    torch.testing.assert_close(mix(patches, shares)[1], (patches[1].float() + patches[3]) / 2)


@pytest.mark.parametrize("n", [8, 12])
def test_two_processes_mix_the_pairs_that_one_would(n):
    rows, shares = torch.rand(n, 5), torch.rand(n)
    whole = mix(rows, shares)
    for rank in range(2):
        torch.testing.assert_close(mix(rows[rank::2], shares[rank::2]), whole[rank::2])


def test_random_shares_follow_the_beta_distribution_and_come_from_the_generator():
    drawn = random_shares(20_000, 0.4, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    assert 0 <= drawn.min() < 1e-3
    assert 1 - 1e-3 < drawn.max() <= 1
    assert drawn.mean() == pytest.approx(0.5, abs=0.01)
    assert drawn.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.02)
    assert torch.equal(drawn, random_shares(20_000, 0.4, torch.Generator().manual_seed(0)))


def test_random_stains_fill_their_range_and_come_from_the_generator():
    drawn = random_stains(4000, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 2, 3)
    assert -1 <= drawn.min() < -0.99
    assert 0.99 < drawn.max() <= 1
    assert drawn.mean(dim=0).abs().max() < 0.05
    flat = drawn.flatten(1)
    assert (np.corrcoef(flat.T) - np.eye(6)).max() < 0.1  # channels vary apart
    assert torch.equal(drawn, random_stains(4000, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("device", DEVICES)
def test_stain_scales_and_shifts_each_channel_of_each_patch_and_stays_within_the_pixels_range(
        device):
    patches = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8))
    stains = random_stains(5, torch.Generator().manual_seed(1))
    stained = stain(patches.to(device), stains, 0.3).cpu()
    for b in range(5):
        for channel in range(3):
            gain, offset = stains[b, :, channel].tolist()
            expected = np.clip(patches[b, ..., channel].numpy() * (1 + 0.3 * gain) + 24 * offset, 0,
                               255)
            np.testing.assert_allclose(stained[b, ..., channel], expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(stain(patches, stains, 0.0), patches.float())


def test_raw_blue_first_pixels_are_the_patch_itself_with_its_channels_turned_round():
    patches = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8))
    pixels = to_pixels(patches, configure("test_resnet", "heg", 5, 24, pixels="raw_bgr"))
    torch.testing.assert_close(pixels, patches.flip(3).permute(0, 3, 1, 2).float(), rtol=1e-6,
                               atol=1e-4)


@pytest.mark.parametrize("views", [1, 2, 4, 8])
def test_views_are_that_many_different_symmetries_averaged_the_patch_itself_first(views):
    torch.manual_seed(0)
    model = HECLIP(configure("test_resnet", "heg", 5, 24, embedding_dim=8)).eval()
    array = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)
    embeddings = encode_patches(model, Patches([array], CPU), torch.arange(3), 2, views)
    with torch.inference_mode():
        for row, patch in zip(embeddings, array, strict=True):
            every = torch.from_numpy(np.stack(symmetries(patch)))
            each = torch.stack([model.encode_image(to_pixels(one[None], model.config))[0]
                                for one in every])  # (8, 8), the patch itself first
            means = [each[[0, *others]].mean(dim=0)
                     for others in combinations(range(1, 8), views - 1)]
            # some choice of that many
            assert min((row - mean).abs().max() for mean in means) < 1e-4


def test_all_eight_views_of_a_turned_patch_have_the_embedding_of_the_patch():
    torch.manual_seed(0)
    model = HECLIP(configure("test_resnet", "heg", 5, 24, embedding_dim=8)).eval()
    array = np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3), dtype=np.uint8)
    turned = np.stack(symmetries(array[0]))
    embeddings = encode_patches(model, Patches([turned], CPU), torch.arange(8), 8, views=8)
    torch.testing.assert_close(embeddings, embeddings[:1].expand(8, -1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("protocol", ["strict", "paper"])
def test_without_a_validation_fraction_every_spot_trains(protocol):
    for shapes in (SHAPES, ONE):
        assert_all_train(Lattice(shapes), protocol)


def assert_all_train(spots, protocol):
    training, validation = split_spots(spots, everywhere(56), 0, protocol, 0)
    assert training.tolist() == list(range(len(spots)))
    assert validation.dtype == torch.int64
    assert not len(validation)
