"""The demo: generate a small synthetic dataset with the files of GSE240429, then preprocess it.

Tissue. A section has six regions. Each region has a smooth random field, and a pixel belongs to the
region whose field is largest there. Nuclei, fibres and holes are random ellipses at random places
(a Boolean model), so the area they cover depends on their stated cover alone, not on their size or
direction. Regions come as three pairs of twins with equal cover: small or large nuclei, aligned or
crossed fibres, wide or narrow holes. Twins have the same mean colour and differ in texture. Two
gradients cross all regions: cellularity (nuclei per area) and zonation (fine to coarse cytoplasm).

Expression. The log rate of a gene at a spot is the sum of its baseline, the effects of the region,
of the two gradients and of a hidden state, and the section's own shift. The rate is multiplied by
the spot's library size. Counts are negative binomial. The effects differ more between twins than
between pairs. A third of the genes ignore the tissue, and most genes are rare.

Why it is a fair small test. The image shows what can be predicted, but its mean colour shows little
of it, so an encoder has to learn texture. Some of the variation cannot be predicted: the hidden
state, the sampling noise, and a batch effect on genes. Some of the image must be ignored: blood;
stain, thickness and light, which vary between sections and within them. Fibres have any direction,
so flips and quarter turns do not change the expected expression. The files have the habits of real
ones: all sections share the same barcodes; their order differs from that of the positions; some
spots are off tissue; a symbol occurs twice; slides are not square; images have an alpha channel.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from scipy.io import mmwrite
from scipy.ndimage import gaussian_filter
from scipy.sparse import csc_array

from heclip.command import run
from heclip.dataset import Dataset, Section
from heclip.files import atomic_path
from heclip.script import preprocess

# Pixels between neighbouring spots, which are 100 µm apart. A patch of 64 px then shows 78 µm, as
# 256 px of GSE240429 do.
PITCH = 82
N_MARKERS = 8  # per region, and named after it: PORTAL1 ... PORTAL8

# region: nuclei (cover, radius px), fibres (cover, 1 = crossed), holes (cover, radius px). Cover is
# a share of the area. Twins follow each other.
REGIONS = {
    "PORTAL": ((0.22, 2.2), (0.00, 0), (0.00, 1.0)),
    "PLATE":  ((0.22, 3.0), (0.00, 0), (0.00, 1.0)),
    "SEPTUM": ((0.10, 2.6), (0.30, 0), (0.00, 1.0)),
    "STROMA": ((0.10, 2.6), (0.30, 1), (0.00, 1.0)),
    "DUCT":   ((0.14, 2.6), (0.00, 0), (0.12, 6.0)),
    "FAT":    ((0.14, 2.6), (0.00, 0), (0.12, 4.0)),
}  # fmt: skip
# (2, 6) each
NUCLEI, FIBRES, HOLES = np.array(list(REGIONS.values()), np.float32).transpose(1, 2, 0)
# Optical density of a unit of stain in R, G and B.
HAEMATOXYLIN = np.array([0.65, 0.70, 0.29], np.float32)
EOSIN = np.array([0.10, 0.80, 0.36], np.float32)


class Biology(NamedTuple):
    """The facts about the G genes that all sections share. Effects are added to the log rate."""

    ids: list  # (G,)
    symbols: np.ndarray  # (G,)
    baseline: np.ndarray  # (G,)
    region: np.ndarray  # (6, G)
    gradient: np.ndarray  # (2, G)
    hidden: np.ndarray  # (4, G)
    shape: np.ndarray  # (G,) of the negative binomial; a smaller one gives more noise


class Tissue(NamedTuple):
    """One section. Arrays are (height, width) in full-resolution pixels."""

    inside: np.ndarray  # bool
    region: np.ndarray  # uint8, index into REGIONS
    cellularity: np.ndarray  # float32 of mean 0 and variance 1
    zonation: np.ndarray  # likewise


def draw_biology(rng, n_genes):
    """Draw a Biology: frequent specific markers, and genes of which a third ignore the tissue.

    Raises ValueError if n_genes is not above the number of markers.
    """
    n_pairs, n_named = len(REGIONS) // 2, len(REGIONS) * N_MARKERS
    n_free = n_genes - n_named
    if n_free < 1:
        raise ValueError(f"n_genes={n_genes}: {n_named} markers alone need more")
    symbols = [f"{region}{i + 1}" for region in REGIONS for i in range(N_MARKERS)]
    symbols += [f"GENE{i + 1:04d}" for i in range(n_free - 1)]
    symbols.append("GENE0001")  # occurs twice, as ten symbols of GRCh38 do
    related = np.hstack([np.ones(n_named), rng.random(n_free) < 2 / 3])
    between, within = rng.normal(0, [[[0.15]], [[0.75]]], (2, n_pairs, n_genes)) * related
    region = np.repeat(between, 2, axis=0) + np.kron(within, [[1], [-1]])
    up_here_down_in_twin = np.kron(np.eye(n_pairs), [[1, -1], [-1, 1]])  # (6, 6)
    region[:, :n_named] = np.kron(up_here_down_in_twin, rng.uniform(0.8, 1.2, N_MARKERS))
    gradient = rng.normal(0, 0.25, (2, n_genes)) * related
    baseline = np.hstack([rng.normal(1.6, 0.5, n_named), rng.normal(-1.3, 1.3, n_free)])
    order = rng.permutation(n_genes)  # so that the markers are not the first genes of the file
    return Biology(
        ids=[f"ENSG{i:011d}" for i in np.sort(rng.choice(10**6, n_genes, replace=False))],
        symbols=np.array(symbols)[order],
        baseline=baseline[order],
        region=region[:, order],
        gradient=gradient[:, order],
        hidden=rng.normal(0, 0.15, (4, n_genes)),
        shape=2 + rng.gamma(4, 2, n_genes),
    )


def lattice(rows, cols):
    """The hexagonal Visium lattice, row by row.

    Returns array_row, array_col, pixel y and pixel x; integers, (rows * cols,) each.
    """
    row, col = np.divmod(np.arange(rows * cols), cols)
    col = 2 * col + row % 2
    # The lattice has a margin of one pitch of glass.
    y, x = PITCH + row * PITCH * np.sqrt(3) / 2, PITCH + col * PITCH / 2
    return row, col, np.rint(y).astype(int), np.rint(x).astype(int)


def smooth_field(rng, shape, scale):
    """A Gaussian random field of mean 0 and variance 1 that varies over `scale` pixels.

    Returns float32 of the given shape (height, width).
    """
    sides = []
    for n in shape:
        knots = np.arange(-2 * scale, n + 2 * scale, scale)
        bumps = np.exp(-(((np.arange(n)[:, None] - knots) / scale) ** 2))  # (n, knots)
        sides.append(bumps / np.linalg.norm(bumps, axis=1, keepdims=True))
    down, across = sides
    noise = rng.standard_normal((down.shape[1], across.shape[1]))
    return (down @ noise @ across.T).astype(np.float32)


def draw_tissue(rng, shape):
    """Draw a Tissue: an irregular, nearly round piece on a slide of shape (height, width)."""
    down, across = np.ogrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    radius = 0.84 + 0.07 * smooth_field(rng, shape, max(shape) / 6)
    fields = np.stack([smooth_field(rng, shape, 2.2 * PITCH) for _ in REGIONS])
    return Tissue(
        inside=np.hypot(down, across) < radius,
        region=fields.argmax(axis=0).astype(np.uint8),
        cellularity=smooth_field(rng, shape, 3 * PITCH),
        zonation=smooth_field(rng, shape, 3 * PITCH),
    )


class Ellipses(NamedTuple):
    """The ellipses of one kind, by region: (6,) each."""

    cover: np.ndarray  # share of the area
    long: np.ndarray  # half axes, px
    short: np.ndarray
    crossed: np.ndarray  # 0: along the tissue's direction, 1: in any direction


def draw_ellipses(rng, tissue, ellipses, direction, crowding):
    """Draw ellipses at random places of the tissue.

    direction: (height, width) radians. crowding: (height, width) relative density.
    Returns (height, width) float32, 1 inside an ellipse and 0 outside.
    """
    cover, long, short, crossed = ellipses
    canvas = np.zeros(tissue.region.shape, np.float32)
    density = cover / (np.pi * long * short)  # ellipses per px
    highest = density.max() * crowding.max()
    # An ellipse is drawn in a window of K = (2 reach + 1)² pixels.
    reach = int(np.ceil(1.2 * long.max())) + 1
    far_edges = np.array(canvas.shape)[:, None] - reach
    y, x = rng.integers(reach, far_edges, (2, int(highest * canvas.size)))
    chance = density[tissue.region[y, x]] * crowding[y, x]
    drawn = (rng.random(len(y)) * highest < chance) & tissue.inside[y, x]
    y, x = y[drawn, None], x[drawn, None]  # (E, 1), E ellipses
    region = tissue.region[y, x]
    angle = direction[y, x] + crossed[region] * rng.uniform(0, np.pi, y.shape).astype(np.float32)
    size = rng.uniform(0.8, 1.2, y.shape).astype(np.float32)
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)  # (K,)
    dy32, dx32 = dy.astype(np.float32), dx.astype(np.float32)
    along = (dx32 * np.cos(angle) + dy32 * np.sin(angle)) / (long[region] * size)  # (E, K)
    across = (dy32 * np.cos(angle) - dx32 * np.sin(angle)) / (short[region] * size)
    # The edge is 1 px wide.
    depth = np.clip((1 - np.hypot(along, across)) * short[region] * size + 0.5, 0, 1)
    pixel = (y + dy) * canvas.shape[1] + x + dx
    np.maximum.at(canvas.reshape(-1), pixel[depth > 0], depth[depth > 0])
    return canvas


def paint(rng, tissue):
    """The image of a stained section: (height, width, 4) uint8 RGBA."""

    def field(scale):
        return smooth_field(rng, tissue.region.shape, scale * PITCH)

    ones = np.ones(len(REGIONS), np.float32)
    even, direction = np.ones(tissue.region.shape, np.float32), np.pi * field(6)
    cover, radius = NUCLEI
    kind = Ellipses(cover, 1.15 * radius, radius / 1.15, ones)
    nuclei = draw_ellipses(rng, tissue, kind, direction, np.exp(0.5 * tissue.cellularity))
    cover, crossed = FIBRES
    kind = Ellipses(cover, 6 * ones, 1.2 * ones, crossed)
    fibres = draw_ellipses(rng, tissue, kind, direction, even)
    cover, radius = HOLES
    kind = Ellipses(cover, 1.1 * radius, radius / 1.1, ones)
    holes = draw_ellipses(rng, tissue, kind, direction, even)
    kind = Ellipses(0.06 * ones, 3 * ones, 2.7 * ones, ones)
    blood = draw_ellipses(rng, tissue, kind, direction, np.exp(1.2 * field(2)))

    grain = rng.standard_normal(even.shape, np.float32)
    fine, coarse = smoothed(grain, 0.8), smoothed(grain, 3)
    zone = 1 / (1 + np.exp(-1.5 * tissue.zonation))
    cytoplasm = 1 + 0.30 * (zone * coarse + (1 - zone) * fine)
    haematoxylin = (0.12 + nuclei) * (1 - 0.8 * blood)
    eosin = (0.40 * cytoplasm + 0.45 * fibres) * (1 - 0.5 * nuclei) * (1 + 1.2 * blood)

    # The section's own stain, thickness and light are independent of its expression.
    stains = np.exp(rng.normal(0, 0.10, 2))[:, None] * (HAEMATOXYLIN, EOSIN)  # (2, 3)
    soft_edge = gaussian_filter(tissue.inside.astype(np.float32), 1.5)
    thickness = np.exp(0.40 * field(2)) * (1 - holes) * soft_edge
    amounts = np.stack([haematoxylin * thickness, eosin * thickness], axis=-1)
    density = amounts @ stains.astype(np.float32)
    light = rng.uniform(236, 250) * (1 + rng.normal(0, 0.008, 3)) + 2 * field(8)[..., None]
    noise = 2.5 * rng.standard_normal(density.shape, np.float32)
    rgb = light.astype(np.float32) * np.exp(-density) + noise
    alpha = np.full((*even.shape, 1), 255, np.uint8)
    return np.concatenate([np.clip(rgb, 0, 255).astype(np.uint8), alpha], axis=-1)


def smoothed(noise, sigma):
    """White noise of variance 1, smoothed by a Gaussian and scaled back to variance 1."""
    return 2 * np.sqrt(np.pi) * sigma * gaussian_filter(noise, sigma)


def sequence(rng, biology, tissue, y, x):
    """Count the genes at spots centred on pixels y, x: (n_spots, G) integers."""
    # Nine points stand for a spot, which is 45 px wide.
    dy, dx = np.mgrid[-14:15:14, -14:15:14].reshape(2, -1)
    seen = tissue.region[y[:, None] + dy, x[:, None] + dx]  # (n_spots, 9)
    region = (seen[..., None] == np.arange(len(REGIONS))).mean(axis=1)  # (n_spots, 6), shares
    gradient = np.stack([tissue.cellularity[y, x], tissue.zonation[y, x]], axis=1)  # (n_spots, 2)
    hidden = rng.standard_normal((len(y), len(biology.hidden)))
    effects = region @ biology.region + gradient @ biology.gradient  # (n_spots, G)
    effects = effects + hidden @ biology.hidden
    batch = rng.normal(0, 0.3, len(biology.ids))
    rate = rng.lognormal(0, 0.35, (len(y), 1)) * np.exp(biology.baseline + batch + effects)
    return rng.poisson(rate * rng.gamma(biology.shape, 1 / biology.shape, rate.shape))


def files(number):
    """The paths of section `number`'s files in the raw folder; sections are counted from 1.

    Returns a list: image, positions, barcodes, features, matrix.
    """
    matrix = f"data/filtered_expression_matrices/{number}"
    return [
        f"image/DEMO_{chr(64 + number)}1.tiff",
        f"data/tissue_pos_matrices/tissue_positions_list_{number}.csv",
        *(f"{matrix}/{name}" for name in ("barcodes.tsv", "features.tsv", "matrix.mtx")),
    ]


def write_lines(path, *columns, separator):
    """Write columns of equal length as a text table without header."""
    rows = zip(*columns, strict=True)
    with atomic_path(path) as part:
        part.write_text("".join(separator.join(map(str, row)) + "\n" for row in rows))


def write_section(raw, number, rng, biology, barcodes, grid):
    """Draw section `number` and write its files below `raw` as Space Ranger 1 does.

    barcodes: (rows * cols,) of the lattice `grid`, (rows, columns).
    """
    image, positions, names, features, matrix = (raw / name for name in files(number))
    row, col, y, x = lattice(*grid)
    tissue = draw_tissue(rng, (y.max() + PITCH, x.max() + PITCH))
    in_tissue = tissue.inside[y, x]
    spots = np.flatnonzero(in_tissue)
    spots = spots[np.argsort(barcodes[spots])]  # matrices are sorted by barcode, unlike positions
    counts = sequence(rng, biology, tissue, y[spots], x[spots])
    write_lines(positions, barcodes, in_tissue.astype(int), row, col, y, x, separator=",")
    write_lines(names, barcodes[spots], separator="")
    kind = ["Gene Expression"] * len(biology.ids)
    write_lines(features, biology.ids, biology.symbols, kind, separator="\t")
    with atomic_path(matrix) as part, open(part, "wb") as file:  # mmwrite adds a suffix to a path
        mmwrite(file, csc_array(counts.T), field="integer", symmetry="general")
    with atomic_path(image) as part:
        rgba = paint(rng, tissue)
        tifffile.imwrite(part, rgba, photometric="rgb", extrasamples=["unassalpha"], metadata=None)


def generate(raw, n_sections=4, grid=(28, 20), n_genes=2000, seed=68):
    """Write the synthetic dataset below the folder `raw`.

    grid: (rows, columns) of the lattice. seed: with the default, all four sections have every
    region and different numbers of spots. Each section has its own random stream, so it does not
    depend on n_sections. A file appears when it is complete.
    """
    shared, *own = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(1 + n_sections))
    biology = draw_biology(shared, n_genes)
    letters = shared.choice(list("ACGT"), (grid[0] * grid[1], 16))
    # As in reality, all slides of one kind have the same barcodes.
    barcodes = np.array(["".join(row) + "-1" for row in letters])
    for number, rng in enumerate(own, start=1):
        write_section(Path(raw), number, rng, biology, barcodes, grid)


DATASET = Dataset(
    name="demo",
    sections=[
        Section(
            name=f"DEMO_{letter}1",
            donor="demo",
            role="query" if number == 3 else "reference",
            n_spots=n_spots,
            counts=[f"data/filtered_expression_matrices/{number}/matrix.mtx"],
            positions=[f"data/tissue_pos_matrices/tissue_positions_list_{number}.csv"],
            image=[f"image/DEMO_{letter}1.tiff"],
        )
        for number, letter, n_spots in [(1, "A", 370), (2, "B", 328), (3, "C", 347), (4, "D", 345)]
    ],
    n_hvg=200,
    n_heg=200,
    markers=("PORTAL1", "PLATE1", "SEPTUM1", "STROMA1", "DUCT1", "FAT1"),
    patch_px=64,
)


def generate_missing(raw):
    """Write the dataset below `raw` if any of its files is missing."""
    numbers = range(1, len(DATASET.sections) + 1)
    names = [name for number in numbers for name in files(number)]
    if not all((raw / name).exists() for name in names):
        generate(raw)


def main(argv=None):
    preprocess(DATASET, argv, generate_missing)


if __name__ == "__main__":
    run(main)

# Expected: 370, 328, 347 and 345 spots; panels of 282 (heg) and 424 (hvg) genes.
