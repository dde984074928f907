"""The plain way of each stage, which `benchmark.py` compares with: correct, simple, not fast.

Whole slides and dense matrices in memory, one patch at a time with table look-ups, float32, loops
over genes.
"""

import os
import random

import numpy as np
import pandas as pd
import scanpy
import scipy.io
import tifffile
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import entropy, pearsonr
from torchvision.transforms import functional

from heclip import metrics, sources
from heclip.dataset import Processed
from heclip.files import sha256
from heclip.slide import THUMBNAIL


def preprocess(size, dataset, folder):
    """All sections in memory at once: whole slides, dense expression.

    The same products as ours: expression, gene statistics, patches, a digest of each raw file, a
    picture to check by eye. size: side of a patch in px. Arrays and pictures go to `folder`.
    """
    raw, sections = dataset.raw, {}
    for section in dataset.sections:
        counts = scipy.io.mmread(raw / f"{section.name}.matrix.mtx.gz")
        counts = counts.toarray().T.astype(np.float32)
        total = counts.sum(axis=1, keepdims=True)
        expression = np.log1p(counts / total * np.median(total))
        genes = scanpy.pp.highly_variable_genes(scanpy.AnnData(expression), inplace=False)
        barcodes = list(pd.read_csv(raw / f"{section.name}.barcodes.tsv", header=None)[0])
        sections[section.name] = {"barcodes": barcodes, "expression": expression, "genes": genes,
                                  **open_slide(raw, section)}
    for name, section in sections.items():
        np.save(folder / f"{name}.expression.npy", section["expression"])
        patches = [crop(section, barcode, size) for barcode in section["barcodes"]]
        np.save(folder / f"{name}.patches.npy", np.stack(patches))
        picture(section, folder / f"{name}.jpg")
        section["sha256"] = {path.name: sha256(path) for path in raw.glob(f"{name}.*")}
    return sections


def picture(section, path):
    """Draw the slide, uint8 (H, W, 4), without and with its spots, reduced as ours is."""
    shrink = -(-max(section["image"].shape) // THUMBNAIL)
    thumbnail = Image.fromarray(section["image"]).reduce(shrink).convert("RGB")
    figure = Figure(figsize=(10, 5))
    bare, circled = figure.subplots(1, 2)
    for axes in (bare, circled):
        axes.imshow(thumbnail)
        axes.axis("off")
    x, y = (section["positions"][f"pxl_{axis}_in_fullres"] / shrink for axis in ("col", "row"))
    circled.scatter(x, y, s=4, facecolors="none", edgecolors="black", linewidths=0.6)
    figure.savefig(path, dpi=200)


def open_slide(raw, section):
    """The whole image, and the table of positions."""
    positions = pd.read_csv(raw / section.positions[0], names=sources.POSITION_COLUMNS)
    return {"image": tifffile.imread(raw / section.image[0]),
            "positions": positions.set_index("barcode")}


def crop(section, barcode, size):
    """One patch, looked up by its barcode: uint8 (size, size, 3)."""
    spot = section["positions"].loc[barcode]
    top = spot["pxl_row_in_fullres"] - size // 2
    left = spot["pxl_col_in_fullres"] - size // 2
    return section["image"][top:top + size, left:left + size, :3]


class Patches(torch.utils.data.Dataset):
    """One patch and its expression at a time, cropped from whole slides in memory."""

    def __init__(self, size, dataset, config, training):
        self.size, self.config, self.training = size, config, training
        self.sections, self.items = {}, []
        processed = Processed(dataset.name)
        panel = processed.panel("heg")
        for section in dataset.sections:
            name = section.name
            self.sections[name] = open_slide(dataset.raw, section)
            spots = zip(processed.barcodes(name), processed.expression(name, panel), strict=True)
            self.items += [(name, barcode, expression) for barcode, expression in spots]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        section, barcode, expression = self.items[i]
        patch = crop(self.sections[section], barcode, self.size)
        image = Image.fromarray(np.ascontiguousarray(patch))
        if self.training:
            if random.random() < 0.5:
                image = functional.hflip(image)
            if random.random() < 0.5:
                image = functional.vflip(image)
            image = functional.rotate(image, random.choice([0, 90, 180, -90]))
        pixels = functional.to_tensor(image)
        pixels = functional.normalize(pixels, self.config.mean, self.config.std)
        return {"image": pixels, "expression": torch.tensor(expression)}

    def loader(self, n, batch_size, device):
        """Batches of the first n items; with worker processes where a GPU leaves the cores free."""
        gpu = device.type == "cuda"
        workers = min(8, os.cpu_count()) if gpu else 0
        return torch.utils.data.DataLoader(
            torch.utils.data.Subset(self, range(n)), batch_size, shuffle=self.training,
            drop_last=self.training, num_workers=workers, pin_memory=gpu)


def retrieve(query, reference, k):
    """All cosine similarities at once, sorted in full."""
    query, reference = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, reference))
    cosine = query @ reference.T
    index = np.argsort(-cosine, axis=1)[:, :k]
    return index, np.take_along_axis(cosine, index, axis=1)


def score(prediction, truth):
    """All scores, gene by gene, as published: tables grow by one column per gene.

    prediction, truth: DataFrames (n, G). Returns name -> (G,) or a number.
    """
    scaled = {
        "Pearson": (pearson, prediction, truth),
        "SSIM": (ssim, by_gene(scale_to_maximum, prediction), by_gene(scale_to_maximum, truth)),
        "RMSE": (rmse, by_gene(z_score, prediction), by_gene(z_score, truth)),
        "JS": (js, by_gene(share, prediction), by_gene(share, truth)),
    }
    scores = {}
    for name, (one, p, t) in scaled.items():
        table = pd.DataFrame()
        for gene in truth.columns:
            column = pd.DataFrame(one(p[gene], t[gene]), index=[name], columns=[gene])
            table = pd.concat([table, column], axis=1)
        scores[name] = table.loc[name].to_numpy()
    for name, rank in (("HEG", truth.sum()), ("HVG", truth.var())):
        order = rank.sort_values(ascending=False).index
        for n in metrics.TOP_GENES:
            scores[f"{name}-{n}"] = scores["Pearson"][order[:n]].mean()
    for k in metrics.HIT_AT:
        hits = []
        for spot in truth.index:
            predicted = set(prediction.loc[spot].nlargest(k).index)
            hits.append(bool(predicted & set(truth.loc[spot].nlargest(k).index)))
        scores[f"Hit@{k}"] = np.mean(hits)
    return scores


def by_gene(scale, table):
    """Scale each gene, and join the genes again one by one."""
    result = pd.DataFrame()
    for gene in table.columns:
        result = pd.concat([result, scale(table[gene])], axis=1)
    return result


def scale_to_maximum(x):
    return x / x.max()


def z_score(x):
    return (x - x.mean()) / x.std(ddof=0)


def share(x):
    return x / x.sum() + 1e-10


def pearson(p, t):
    return pearsonr(p, t)[0]


def ssim(p, t):
    c1, c2 = 0.01**2, 0.03**2
    covariance = ((p - p.mean()) * (t - t.mean())).mean()
    luminance = (2 * p.mean() * t.mean() + c1) / (p.mean() ** 2 + t.mean() ** 2 + c1)
    contrast = (2 * p.std(ddof=0) * t.std(ddof=0) + c2) / (p.var(ddof=0) + t.var(ddof=0) + c2)
    structure = (covariance + c2 / 2) / (p.std(ddof=0) * t.std(ddof=0) + c2 / 2)
    return luminance * contrast * structure


def rmse(p, t):
    return np.sqrt(((p - t) ** 2).mean())


def js(p, t):
    return 0.5 * entropy(t, (p + t) / 2) + 0.5 * entropy(p, (p + t) / 2)
