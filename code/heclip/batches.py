"""Processed files -> tensors on the device; the split into training and validation spots; augmentation."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree


class Spots:
    """The spots of some sections as one set, in order: N spots, G genes, patches of P x P pixels.

    section: (N,) section names. xy: (N, 2) patch centres in whole full-resolution pixels, image column and row.
    expression: float32 (N, G) on the device.
    """

    def __init__(self, processed, sections, name, panel, device):
        xy, expression = [], []
        for section in sections:  # one at a time: a section holds all genes, and only the panel is kept
            adata = processed.read(section)
            xy.append(np.rint(adata.obsm["spatial"]).astype(np.int64))
            expression.append(processed.expression(section, name, panel, adata))
        self.section = np.repeat(sections, [len(rows) for rows in xy])
        self.xy = np.concatenate(xy)
        self.expression = torch.from_numpy(np.concatenate(expression)).to(device)
        self.patches = Patches([processed.patches(section) for section in sections], device)

    def __len__(self):
        return len(self.section)


class Patches:
    """Patches of several sections under one index. On the GPU when they take at most half of its free memory."""

    def __init__(self, sections, device):
        self.sections, self.device = sections, device
        self.ends = np.cumsum([len(patches) for patches in sections])
        self.resident = None
        if device.type == "cuda" and sum(p.nbytes for p in sections) < torch.cuda.mem_get_info(device)[0] / 2:
            self.resident = torch.cat([torch.from_numpy(np.asarray(p)).to(device) for p in sections])

    def __getitem__(self, index):
        """index: (B,) int64, on the CPU. Returns uint8 (B, P, P, 3) on the device."""
        if self.resident is not None:
            return self.resident[index.to(self.device)]
        index = index.numpy()
        section = np.searchsorted(self.ends, index, side="right")
        batch = np.empty((len(index), *self.sections[0].shape[1:]), np.uint8)
        for s in np.unique(section):
            rows = np.flatnonzero(section == s)
            batch[rows] = self.sections[s][index[rows] - (self.ends[s - 1] if s else 0)]
        return torch.from_numpy(batch).to(self.device)


def split_spots(spots, patch_px, fraction, protocol, seed):
    """Choose validation spots; no spot is on both sides. Returns (training, validation) indices, int64, sorted.

    strict: in each section the `fraction` of spots nearest to one drawn at random, a window of tissue; the spots whose
    patches share a pixel with a patch of the window are left out of both. paper: a random draw over all spots.
    """
    rng = np.random.default_rng(seed)
    everything = np.arange(len(spots))
    if protocol == "paper":
        validation = np.sort(rng.permutation(everything)[:round(fraction * len(spots))])
        return torch.from_numpy(np.setdiff1d(everything, validation)), torch.from_numpy(validation)
    training, validation = [], []
    for section in dict.fromkeys(spots.section):
        index = np.flatnonzero(spots.section == section)
        xy = spots.xy[index]
        distance = np.abs(xy - xy[rng.integers(len(xy))]).max(axis=1)  # a square window
        inside = np.zeros(len(index), bool)
        inside[np.argsort(distance, kind="stable")[:round(fraction * len(index))]] = True
        validation.append(index[inside])
        if inside.any():
            nearest, _ = cKDTree(xy[inside]).query(xy, p=np.inf)  # patches overlap below patch_px on both axes
            inside = nearest < patch_px
        training.append(index[~inside])
    return torch.from_numpy(np.concatenate(training)), torch.from_numpy(np.concatenate(validation))


def augment(patches, generator):
    """Turn each patch to one of the 8 symmetries of the square, all equally likely.

    The same as the published random flips and rotations by multiples of 90°. patches: (B, P, P, 3), any device.
    """
    flip_x, flip_y, swap = torch.randint(0, 2, (3, len(patches), 1, 1, 1), generator=generator,
                                         dtype=torch.bool).to(patches.device)
    patches = torch.where(flip_x, patches.flip(2), patches)
    patches = torch.where(flip_y, patches.flip(1), patches)
    return torch.where(swap, patches.transpose(1, 2), patches)


def to_pixels(patches, config):
    """uint8 RGB (B, P, P, 3) -> what the encoder was trained on: float32 (B, 3, S, S), standardised, channels last."""
    pixels = patches.permute(0, 3, 1, 2).float()
    if pixels.shape[-1] != config.image_size:
        pixels = F.interpolate(pixels, size=config.image_size, mode="bilinear", antialias=True)
    mean = torch.tensor(config.mean, device=pixels.device).view(3, 1, 1) * 255
    std = torch.tensor(config.std, device=pixels.device).view(3, 1, 1) * 255
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)
