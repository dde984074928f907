"""Processed files -> tensors on the device; training and validation spots; augmentation."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from scipy.special import betaincinv

from .command import autocast

READERS = 4  # threads that read patches ahead of the model
SYMMETRIES = torch.cartesian_prod(*[torch.tensor([False, True])] * 3)  # (8, 3), see `augment`


class Spots:
    """The spots of some sections as one set, in order: N spots, G genes, patches of P x P pixels.

    section: (N,) section names. xy: (N, 2) patch centres in whole full-resolution pixels, image
    column and row. expression: float32 (N, G) on the device. patches: Patches of all N spots.
    """

    def __init__(self, processed, sections, panel, device):
        xy = [np.rint(processed.xy(section)).astype(np.int64) for section in sections]
        expression = [processed.expression(section, panel) for section in sections]
        self.section = np.repeat(sections, [len(rows) for rows in xy])
        self.xy = np.concatenate(xy)
        self.expression = torch.from_numpy(np.concatenate(expression)).to(device)
        self.patches = Patches([processed.patches(section) for section in sections], device)

    def __len__(self):
        return len(self.section)


class Patches:
    """Patches of several sections, P x P pixels each, or their features, under one index.

    sections: arrays uint8 (n, P, P, 3), or float16 (n, 8, F) as in features.py. They are kept on
    the GPU if they take at most half of its free memory. Otherwise they stay in their memory maps,
    and threads read ahead.
    """

    def __init__(self, sections, device):
        self.sections, self.device = sections, device
        self.ends = np.cumsum([len(patches) for patches in sections])
        self.resident = None
        size = sum(patches.nbytes for patches in sections)
        if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2:
            self.resident = torch.cat([torch.from_numpy(np.array(patches)).to(device)
                                       for patches in sections])

    def where(self):
        """In words: what is stored, and where it is read from."""
        size = sum(patches.nbytes for patches in self.sections) / 1e6
        what = "patches" if self.sections[0].dtype == np.uint8 else "features"
        place = "read from disk as needed" if self.resident is None else "on the GPU"
        return f"{size:,.0f} MB of {what} {place}"

    def read(self, index):
        """index: (B,) int64 on the CPU -> uint8 (B, P, P, 3), or float16 (B, 8, F), on the CPU.

        The result is in pinned memory if the device is a GPU.
        """
        index = index.numpy()
        section = np.searchsorted(self.ends, index, side="right")
        kind = torch.uint8 if self.sections[0].dtype == np.uint8 else torch.float16
        batch = torch.empty((len(index), *self.sections[0].shape[1:]), dtype=kind,
                            pin_memory=self.device.type == "cuda")
        for s in np.unique(section):
            rows = np.flatnonzero(section == s)
            batch.numpy()[rows] = self.sections[s][index[rows] - (self.ends[s - 1] if s else 0)]
        return batch

    def stream(self, batches):
        """Yield the rows of each index in `batches` on the device, (B, P, P, 3) or (B, 8, F).

        batches: a sequence of (B,) int64 on the CPU.
        """
        if self.resident is not None:
            for index in batches:
                yield self.resident[index.to(self.device)]
            return
        with ThreadPoolExecutor(READERS) as readers:
            ahead = deque()
            for index in batches:
                ahead.append(readers.submit(self.read, index))
                if len(ahead) > 2 * READERS:
                    yield ahead.popleft().result().to(self.device, non_blocking=True)
            while ahead:
                yield ahead.popleft().result().to(self.device, non_blocking=True)


def split_spots(spots, crop_px, fraction, protocol, seed):
    """Choose validation spots: sorted indices (training, validation). No spot is on both sides.

    strict: the section whose share of the spots is nearest to `fraction` is held out as a whole, so
    that a model is chosen by the task itself, to predict a section that it has not seen. If there
    is only one section, a window of tissue is held out (`split_window`).
    paper: a random draw over all spots.
    crop_px: section -> side of what its patches show, in the pixels of spots.xy.
    """
    sections = list(dict.fromkeys(spots.section))
    everything = np.arange(len(spots))
    if protocol == "paper":
        drawn = np.random.default_rng(seed).permutation(everything)
        validation = np.sort(drawn[:round(fraction * len(spots))])
    elif fraction == 0:
        validation = everything[:0]
    elif len(sections) == 1:
        training, validation = split_window(spots.xy, crop_px[sections[0]], fraction, seed)
        return torch.from_numpy(training), torch.from_numpy(validation)
    else:
        away = [abs((spots.section == section).mean() - fraction) for section in sections]
        validation = np.flatnonzero(spots.section == sections[int(np.argmin(away))])
    training = np.setdiff1d(everything, validation)
    return torch.from_numpy(training), torch.from_numpy(validation)


def split_window(xy, crop_px, fraction, seed):
    """Split one section's spots, xy (n, 2): the `fraction` nearest to a random spot validate.

    The spots whose patches share a pixel with a patch of this window are on neither side. crop_px:
    side of what a patch shows, in the pixels of xy. Returns (training, validation), sorted indices.
    """
    centre = xy[np.random.default_rng(seed).integers(len(xy))]
    distance = np.abs(xy - centre).max(axis=1)  # the window is a square
    inside = np.zeros(len(xy), bool)
    inside[np.argsort(distance, kind="stable")[:round(fraction * len(xy))]] = True
    if not inside.any():
        return np.flatnonzero(~inside), np.flatnonzero(inside)
    # Patches overlap if their centres are closer than crop_px on both axes.
    nearest, _ = cKDTree(xy[inside]).query(xy, p=np.inf)
    return np.flatnonzero(nearest >= crop_px), np.flatnonzero(inside)


def random_turns(n, generator):
    """One of the square's 8 symmetries for each of n patches: bool (n, 3) on the CPU.

    All are equally likely.
    """
    return torch.randint(0, 2, (n, 3), generator=generator, dtype=torch.bool)


def augment(patches, turns):
    """Mirror each patch left-right, top-bottom and along its diagonal, each as `turns` says.

    patches: (B, P, P, 3), on any device. turns: bool (B, 3). This equals the published random flips
    and rotations by multiples of 90°. Features (B, 8, F) hold all symmetries in the order of
    SYMMETRIES; for these, the chosen symmetry's are returned, (B, F).
    """
    if patches.ndim == 3:
        which = (turns.long() * torch.tensor([4, 2, 1])).sum(dim=1)
        every = torch.arange(len(patches), device=patches.device)
        return patches[every, which.to(patches.device, non_blocking=True)]
    turns = turns.to(patches.device, non_blocking=True)
    flip_x, flip_y, swap = turns.T[..., None, None, None]  # (B, 1, 1, 1) each
    patches = torch.where(flip_x, patches.flip(2), patches)
    patches = torch.where(flip_y, patches.flip(1), patches)
    return torch.where(swap, patches.transpose(1, 2), patches)


def random_stains(n, generator):
    """A gain and an offset for each colour channel of n patches: float (n, 2, 3) on the CPU.

    All are between -1 and 1.
    """
    return 2 * torch.rand(n, 2, 3, generator=generator) - 1


def stain(patches, stains, strength):
    """Vary the stain: multiply each colour channel by 1 ± strength and add up to ± 80 strength.

    Scanner and stain differ between sections, and the model should not depend on them. patches:
    float (B, P, P, 3), 0 to 255. stains: as from `random_stains`, (B, 2, 3).
    """
    stains = stains.to(patches.device, non_blocking=True).transpose(0, 1)
    gain, offset = stains[:, :, None, None]  # (B, 1, 1, 3) each
    return (patches * (1 + strength * gain) + 80 * strength * offset).clamp(0, 255)


def random_shares(n, strength, generator):
    """Each patch's own share when it is mixed: Beta(strength, strength), float32 (n,), on the CPU.

    With a small strength most pairs are almost unmixed.
    """
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    return torch.from_numpy(betaincinv(strength, strength, uniform.numpy())).float()


def mix(rows, shares):
    """Mixup (Zhang et al., ICLR 2018): each row times its share, plus another row times the rest.

    The other row is half a batch away. Patches and their expression are mixed in the same way,
    because a mixture of two patches should have the mixture of their expression.
    rows: (B, ...), patches or expression. shares: (B,).
    """
    shares = shares.to(rows.device, non_blocking=True).view(-1, *[1] * (rows.ndim - 1))
    return shares * rows + (1 - shares) * rows.roll(len(rows) // 2, 0)


def to_pixels(patches, config):
    """RGB patches (B, P, P, 3), 0 to 255 -> the encoder's input, float32 (B, 3, S, S).

    The result is channels-last in memory. Features (B, F) are the encoder's output already, and are
    only converted to float32.
    """
    if patches.ndim == 2:
        return patches.float()
    pixels = patches.permute(0, 3, 1, 2).float()
    if config.bgr:
        pixels = pixels.flip(1)
    if pixels.shape[-1] != config.image_size:
        pixels = F.interpolate(pixels, size=config.image_size, mode="bilinear", antialias=True)
    mean, std = pixel_statistics(config.mean, config.std, pixels.device)
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


@lru_cache
def pixel_statistics(mean, std, device):
    """Mean and standard deviation of pixels in 0 to 255, (3, 1, 1) each.

    They are cached because making them waits for the GPU.
    """
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (mean, std))


@torch.inference_mode()
def encode_patches(model, patches, index, batch_size, views=1):
    """Image embeddings of the patches in `index`: float32 (n, D) on their device.

    Nothing is random. views: the number of a patch's 8 symmetries whose embeddings are averaged; 1
    is the patch as it is. The last batch is filled up, so that all have one shape and a compiled
    encoder is compiled once.
    """
    if not len(index):
        return torch.empty(0, model.width, device=patches.device)
    filled = torch.cat([index, index[:1].expand(-len(index) % batch_size)])
    embeddings = []
    for batch in patches.stream(filled.split(batch_size)):
        embedding = 0
        for turns in SYMMETRIES[:views]:
            with autocast(patches.device):
                pixels = to_pixels(augment(batch, turns.expand(len(batch), 3)), model.config)
                embedding = embedding + model.encode_image(pixels).float() / views
        embeddings.append(embedding)
    return torch.cat(embeddings)[:len(index)]
