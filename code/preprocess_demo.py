"""The demo: a small synthetic data set in the raw GSE240429 arrangement, then the shared preprocessing.

Tissue.  Six regions divide a section: at each place, the one whose smooth random field is largest. Nuclei,
fibres and holes are strewn over them as random ellipses (a Boolean model), so the area they cover depends on
cover alone, not on size or direction. Regions come as three pairs of twins with equal cover: small or large
nuclei, aligned or crossed fibres, wide or narrow holes. Twins share their mean colour and differ in texture.
Two gradients cross all regions: cellularity (nuclei per area) and zonation (fine to coarse cytoplasm).

Expression.  The log rate of a gene at a spot is its baseline, plus what the region, the two gradients and a
hidden state add, plus the section's own shift; times the spot's library size. Counts are negative binomial.
Twins differ more than pairs do. A third of the genes ignore the tissue, and most genes are rare.

Why it is a fair little test.  What can be predicted is in the picture, but mean colour says little of it: an
encoder has to learn texture. What cannot be predicted is there too: hidden state, sampling noise, a batch
effect on genes. So is what must be ignored: blood, and stain, thickness and light that vary between sections
and within them. Fibres point anywhere, so flips and quarter turns change no answer. The files have the habits
of real ones: barcodes that all sections share, in another order than the positions; off-tissue spots; a
symbol that occurs twice; slides that are not square; an alpha channel.
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

PITCH = 82  # px between neighbouring spots, 100 µm: a patch of 64 px shows 78 µm, as 256 px of GSE240429 do
N_MARKERS = 8  # per region and named after it: PORTAL1 ... PORTAL8

# region: nuclei (cover, radius px), fibres (cover, 1 = crossed), holes (cover, radius px). Twins adjoin
REGIONS = {
    "PORTAL": ((0.22, 2.2), (0.00, 0), (0.00, 1.0)),
    "PLATE":  ((0.22, 3.0), (0.00, 0), (0.00, 1.0)),
    "SEPTUM": ((0.10, 2.6), (0.30, 0), (0.00, 1.0)),
    "STROMA": ((0.10, 2.6), (0.30, 1), (0.00, 1.0)),
    "DUCT":   ((0.14, 2.6), (0.00, 0), (0.12, 6.0)),
    "FAT":    ((0.14, 2.6), (0.00, 0), (0.12, 4.0)),
}  # fmt: skip
NUCLEI, FIBRES, HOLES = np.array(list(REGIONS.values()), np.float32).transpose(1, 2, 0)  # (2, 6) each
HAEMATOXYLIN = np.array([0.65, 0.70, 0.29], np.float32)  # optical density in R, G, B of a unit of stain
EOSIN = np.array([0.10, 0.80, 0.36], np.float32)


class Biology(NamedTuple):
    """What all sections share. G genes; effects are on the log rate."""

    ids: list  # (G,)
    symbols: np.ndarray  # (G,)
    baseline: np.ndarray  # (G,)
    region: np.ndarray  # (6, G)
    gradient: np.ndarray  # (2, G)
    hidden: np.ndarray  # (4, G)
    shape: np.ndarray  # (G,) of the negative binomial: the smaller, the noisier


class Tissue(NamedTuple):
    """One section, (height, width) each, in full-resolution pixels."""

    inside: np.ndarray  # bool
    region: np.ndarray  # uint8, index into REGIONS
    cellularity: np.ndarray  # float32 of mean 0 and variance 1
    zonation: np.ndarray  # likewise


def draw_biology(rng, n_genes):
    """Draw the genes: frequent, specific markers, and others of which one third ignore the tissue."""
    n_pairs, n_named = len(REGIONS) // 2, len(REGIONS) * N_MARKERS
    n_free = n_genes - n_named
    if n_free < 1:
        raise ValueError(f"n_genes={n_genes}: {n_named} markers alone need more")
    symbols = [f"{region}{i + 1}" for region in REGIONS for i in range(N_MARKERS)]
    symbols += [f"GENE{i + 1:04d}" for i in range(n_free - 1)] + ["GENE0001"]  # twice, as ten are in GRCh38
    related = np.hstack([np.ones(n_named), rng.random(n_free) < 2 / 3])
    between, within = rng.normal(0, [[[0.15]], [[0.75]]], (2, n_pairs, n_genes)) * related
    region = np.repeat(between, 2, axis=0) + np.kron(within, [[1], [-1]])
    up_here_down_in_twin = np.kron(np.eye(n_pairs), [[1, -1], [-1, 1]])  # (6, 6)
    region[:, :n_named] = np.kron(up_here_down_in_twin, rng.uniform(0.8, 1.2, N_MARKERS))
    gradient = rng.normal(0, 0.25, (2, n_genes)) * related
    baseline = np.hstack([rng.normal(1.6, 0.5, n_named), rng.normal(-1.3, 1.3, n_free)])
    order = rng.permutation(n_genes)  # so that the markers do not head the file
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
    """The hexagonal Visium lattice, row by row: array_row, array_col, pixel y and x, (rows * cols,) each."""
    row, col = np.divmod(np.arange(rows * cols), cols)
    col = 2 * col + row % 2
    y, x = PITCH + row * PITCH * np.sqrt(3) / 2, PITCH + col * PITCH / 2  # one pitch of glass around
    return row, col, np.rint(y).astype(int), np.rint(x).astype(int)


def smooth_field(rng, shape, scale):
    """Gaussian random field, mean 0 and variance 1, that varies over `scale` px: (height, width) float32."""
    sides = []
    for n in shape:
        knots = np.arange(-2 * scale, n + 2 * scale, scale)
        bumps = np.exp(-(((np.arange(n)[:, None] - knots) / scale) ** 2))  # (n, knots)
        sides.append(bumps / np.linalg.norm(bumps, axis=1, keepdims=True))
    down, across = sides
    return (down @ rng.standard_normal((down.shape[1], across.shape[1])) @ across.T).astype(np.float32)


def draw_tissue(rng, shape):
    """A roundish, irregular piece of tissue on a slide of shape (height, width)."""
    down, across = np.ogrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    edge = 0.84 + 0.07 * smooth_field(rng, shape, max(shape) / 6)
    fields = np.stack([smooth_field(rng, shape, 2.2 * PITCH) for _ in REGIONS])
    return Tissue(
        inside=np.hypot(down, across) < edge,
        region=fields.argmax(axis=0).astype(np.uint8),
        cellularity=smooth_field(rng, shape, 3 * PITCH),
        zonation=smooth_field(rng, shape, 3 * PITCH),
    )


def strew(rng, tissue, crowding, direction, cover, long, short, crossed):
    """Strew random ellipses over the tissue: (height, width) float32, 1 inside an ellipse and 0 outside.

    crowding: (height, width) relative density; direction: (height, width) radians;
    cover (share of the area), long, short (half axes, px), crossed (0: along `direction`, 1: any way): (6,).
    """
    canvas = np.zeros(tissue.region.shape, np.float32)
    density = cover / (np.pi * long * short)  # ellipses per px
    most = density.max() * crowding.max()
    reach = int(np.ceil(1.2 * long.max())) + 1  # an ellipse is drawn in a window of K = (2 reach + 1)² pixels
    y, x = rng.integers(reach, np.array(canvas.shape)[:, None] - reach, (2, int(most * canvas.size)))
    chance = density[tissue.region[y, x]] * crowding[y, x]
    keep = (rng.random(len(y)) * most < chance) & tissue.inside[y, x]
    y, x = y[keep, None], x[keep, None]  # (E, 1), E ellipses
    region = tissue.region[y, x]
    angle = direction[y, x] + crossed[region] * rng.uniform(0, np.pi, y.shape).astype(np.float32)
    size = rng.uniform(0.8, 1.2, y.shape).astype(np.float32)
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)  # (K,)
    dy32, dx32 = dy.astype(np.float32), dx.astype(np.float32)
    along = (dx32 * np.cos(angle) + dy32 * np.sin(angle)) / (long[region] * size)  # (E, K)
    across = (dy32 * np.cos(angle) - dx32 * np.sin(angle)) / (short[region] * size)
    depth = np.clip((1 - np.hypot(along, across)) * short[region] * size + 0.5, 0, 1)  # an edge 1 px wide
    pixel = (y + dy) * canvas.shape[1] + x + dx
    np.maximum.at(canvas.reshape(-1), pixel[depth > 0], depth[depth > 0])
    return canvas


def paint(rng, tissue):
    """Stain a section and photograph it: (height, width, 4) uint8 RGBA."""

    def field(scale):
        return smooth_field(rng, tissue.region.shape, scale * PITCH)

    ones = np.ones(len(REGIONS), np.float32)
    even, direction = np.ones(tissue.region.shape, np.float32), np.pi * field(6)
    cover, radius = NUCLEI
    cells = np.exp(0.5 * tissue.cellularity)
    nuclei = strew(rng, tissue, cells, direction, cover, 1.15 * radius, radius / 1.15, ones)
    cover, crossed = FIBRES
    fibres = strew(rng, tissue, even, direction, cover, 6 * ones, 1.2 * ones, crossed)
    cover, radius = HOLES
    holes = strew(rng, tissue, even, direction, cover, 1.1 * radius, radius / 1.1, ones)
    blood = strew(rng, tissue, np.exp(1.2 * field(2)), direction, 0.06 * ones, 3 * ones, 2.7 * ones, ones)

    grain = rng.standard_normal(even.shape, np.float32)  # smoothed below, its variance kept at 1
    fine, coarse = (2 * np.sqrt(np.pi) * sigma * gaussian_filter(grain, sigma) for sigma in (0.8, 3))
    zone = 1 / (1 + np.exp(-1.5 * tissue.zonation))
    cytoplasm = 1 + 0.30 * (zone * coarse + (1 - zone) * fine)
    haematoxylin = (0.12 + nuclei) * (1 - 0.8 * blood)
    eosin = (0.40 * cytoplasm + 0.45 * fibres) * (1 - 0.5 * nuclei) * (1 + 1.2 * blood)

    # The section's own stain, cut and light tell nothing.
    stains = np.exp(rng.normal(0, 0.10, 2))[:, None] * (HAEMATOXYLIN, EOSIN)  # (2, 3)
    thickness = np.exp(0.40 * field(2)) * (1 - holes) * gaussian_filter(tissue.inside.astype(np.float32), 1.5)
    density = np.stack([haematoxylin * thickness, eosin * thickness], axis=-1) @ stains.astype(np.float32)
    light = rng.uniform(236, 250) * (1 + rng.normal(0, 0.008, 3)) + 2 * field(8)[..., None]
    rgb = light.astype(np.float32) * np.exp(-density) + 2.5 * rng.standard_normal(density.shape, np.float32)
    alpha = np.full((*even.shape, 1), 255, np.uint8)
    return np.concatenate([np.clip(rgb, 0, 255).astype(np.uint8), alpha], axis=-1)


def sequence(rng, biology, tissue, y, x):
    """Count the genes at spots centred on pixels y, x: (n_spots, G) integers."""
    dy, dx = np.mgrid[-14:15:14, -14:15:14].reshape(2, -1)  # nine points stand for a spot, 45 px across
    seen = tissue.region[y[:, None] + dy, x[:, None] + dx]  # (n_spots, 9)
    region = (seen[..., None] == np.arange(len(REGIONS))).mean(axis=1)  # (n_spots, 6), shares
    gradient = np.stack([tissue.cellularity[y, x], tissue.zonation[y, x]], axis=1)  # (n_spots, 2)
    hidden = rng.standard_normal((len(y), len(biology.hidden)))
    effects = region @ biology.region + gradient @ biology.gradient + hidden @ biology.hidden  # (n_spots, G)
    batch = rng.normal(0, 0.3, len(biology.ids))
    rate = rng.lognormal(0, 0.35, (len(y), 1)) * np.exp(biology.baseline + batch + effects)
    return rng.poisson(rate * rng.gamma(biology.shape, 1 / biology.shape, rate.shape))


def files(number):
    """Where section 1, 2, ... lies in the raw folder: image, positions, barcodes, features, matrix."""
    matrix = f"data/filtered_expression_matrices/{number}"
    return [
        f"image/DEMO_{chr(64 + number)}1.tiff",
        f"data/tissue_pos_matrices/tissue_positions_list_{number}.csv",
        *(f"{matrix}/{name}" for name in ("barcodes.tsv", "features.tsv", "matrix.mtx")),
    ]


def write_lines(path, *columns, separator):
    with atomic_path(path) as part:
        part.write_text("".join(separator.join(map(str, line)) + "\n" for line in zip(*columns, strict=True)))


def write_section(raw, number, rng, biology, barcodes, grid):
    """Draw section `number` and write its files below `raw` as Space Ranger 1 does."""
    image, positions, names, features, matrix = (raw / name for name in files(number))
    row, col, y, x = lattice(*grid)
    tissue = draw_tissue(rng, (y.max() + PITCH, x.max() + PITCH))
    in_tissue = tissue.inside[y, x]
    spots = np.flatnonzero(in_tissue)
    spots = spots[np.argsort(barcodes[spots])]  # matrices are sorted by barcode, positions by place
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
    """Write the synthetic data set below the folder `raw`; grid: (rows, columns) of the lattice.

    A section draws from a seed of its own, so it is the same however many there are. Files appear when whole.
    The default seed is one whose four sections hold every region and differ in their number of spots.
    """
    shared, *own = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(1 + n_sections))
    biology = draw_biology(shared, n_genes)
    letters = shared.choice(list("ACGT"), (grid[0] * grid[1], 16))
    barcodes = np.array(["".join(row) + "-1" for row in letters])  # all slides of a kind have the same
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
    """Write the data set below `raw`, unless it is there."""
    numbers = range(1, len(DATASET.sections) + 1)
    if not all((raw / name).exists() for number in numbers for name in files(number)):
        generate(raw)


def main(argv=None):
    preprocess(DATASET, argv, generate_missing)


if __name__ == "__main__":
    run(main)

# DEMO_A1 370, DEMO_B1 328, DEMO_C1 347, DEMO_D1 345 spots; panels: heg 282 genes, hvg 424 genes
