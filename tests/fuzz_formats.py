"""Every file format that the project reads: a small honest file, its reader, and hostile files.

`FORMATS` is what tests/fuzz.py and tests/test_fuzz.py mutate and read. A reader returns if what it
read is of the right shape and type, else it raises an AssertionError: that would be a wrong value
that nobody noticed.
"""

import gzip
import io
import json
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse
import tifffile
import torch
from makers import network, panel_of
from PIL import Image

from heclip import prediction, sheet, slide, sources
from heclip.checkpoint import Trained, load_checkpoint, save_checkpoint
from heclip.dataset import Processed, patches_digest
from heclip.files import InputError, atomic_path, write_h5ad
from heclip.panel import given_panel, read_panel
from heclip.settings import TRAINING, Training

SPOTS, GENES = 24, 15
SIDE = 96  # px of the pictures
APERIO = ("Aperio Image Library v11.2.1 \r\n96x96 [0,0 96x96] (32x32) JPEG/RGB Q=70|AppMag = 20|"
          "MPP = 0.5")
HUGE = 10**6  # px
RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(0.7, (SPOTS, GENES)) + np.eye(SPOTS, GENES, dtype=int)
BARCODES = [f"AACG{i:04}TTGC-1" for i in range(SPOTS)]
IDS = [f"ENSG{i:011}" for i in range(GENES)]
SYMBOLS = [f"GENE{i}" for i in range(GENES)]
ROWS, COLUMNS = np.arange(SPOTS) // 6, np.arange(SPOTS) % 6 * 2 + np.arange(SPOTS) // 6 % 2
XY = np.stack([8 + COLUMNS * 7, 12 + ROWS * 12], axis=1)  # px
PICTURE = RNG.integers(0, 60, (SIDE, SIDE, 3), np.uint8) + np.linspace(
    0, 190, SIDE).astype(np.uint8)[:, None, None]


@dataclass(frozen=True)
class Format:
    """A format of files.

    files: name -> honest bytes. read: reads them in a folder, and checks what it gets. hostile:
    name of the case -> bytes of the first file, or a function that makes them.
    mutated: the files that are changed, by default the first.
    """

    files: dict
    read: Callable
    hostile: dict = field(default_factory=dict)
    mutated: tuple = ()

    @property
    def targets(self):
        """The names of the files that are changed."""
        return self.mutated or tuple(self.files)[:1]


# --------------------------------------------------------------------------------- honest contents


def made(write, name="file"):
    """The bytes that `write(path)` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        write(path)
        return path.read_bytes()


def text(*lines):
    """Lines as the bytes of a text file."""
    return "".join(f"{line}\n" for line in lines).encode()


def zipped(files):
    """The same files, gzipped."""
    return {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in files.items()}


def mtx_files():
    """The 10x trio."""
    matrix = io.BytesIO()
    scipy.io.mmwrite(matrix, scipy.sparse.coo_matrix(COUNTS.T), field="integer")
    features = (f"{gene}\t{symbol}\tGene Expression"
                for gene, symbol in zip(IDS, SYMBOLS, strict=True))
    return {"matrix.mtx": matrix.getvalue(), "barcodes.tsv": text(*BARCODES),
            "features.tsv": text(*features)}


def write_10x(path, legacy=False):
    """A 10x HDF5 matrix, in chunks, compressed. legacy: as Cell Ranger 2 writes it."""
    counts = scipy.sparse.csr_matrix(COUNTS)  # a column of genes x spots per spot
    with h5py.File(path, "w") as file:
        group = file.create_group("GRCh38" if legacy else "matrix")
        names = ("genes", "gene_names") if legacy else ("features/id", "features/name")
        arrays = {"data": counts.data.astype("i4"), "indices": counts.indices.astype("i8"),
                  "indptr": counts.indptr.astype("i8"), "shape": np.array([GENES, SPOTS], "i4"),
                  "barcodes": np.array(BARCODES, "S"), names[0]: np.array(IDS, "S"),
                  names[1]: np.array(SYMBOLS, "S")}
        if not legacy:
            arrays |= {"features/feature_type": np.array(["Gene Expression"] * GENES, "S"),
                       "features/genome": np.array(["GRCh38"] * GENES, "S")}
        for name, values in arrays.items():
            group.create_dataset(name, data=values, chunks=True, compression="gzip")


def an_adata():
    """A section as AnnData, with positions."""
    obs = pd.DataFrame({"in_tissue": 1, "array_row": ROWS, "array_col": COLUMNS}, index=BARCODES)
    var = pd.DataFrame({"symbol": SYMBOLS}, index=IDS)
    factors = {"tissue_hires_scalef": 0.5, "spot_diameter_fullres": 4.0}
    return anndata.AnnData(
        scipy.sparse.csr_matrix(COUNTS.astype(np.float32)), obs, var,
        obsm={"spatial": XY.astype(float)},
        uns={"spatial": {"A": {"scalefactors": factors, "metadata": {"mpp": 2.0}}}})


def processed_files():
    """The processed files of a section A."""
    patches = RNG.integers(0, 255, (SPOTS, 8, 8, 3), np.uint8)
    adata = an_adata()
    adata.layers["counts"] = adata.X.copy()
    adata.uns |= {"made_from": json.dumps({"format": 2}), "crop_px": 8, "padded": 0,
                  "patches_digest": patches_digest(patches)}
    return {"A.h5ad": made(lambda path: write_h5ad(adata, path)),
            "A.patches.npy": made(lambda path: np.save(path, patches), "a.npy")}


def write_stored_patches(path):
    """Patches as HEST stores them."""
    with h5py.File(path, "w") as file:
        file.create_dataset("img", data=RNG.integers(0, 255, (SPOTS, 8, 8, 3), np.uint8),
                            chunks=(1, 8, 8, 3))
        file.create_dataset("coords", data=XY - 4)
        file.create_dataset("barcode", data=np.array(BARCODES, "S")[:, None])


def positions_lines():
    """Space Ranger's positions, without header."""
    return [f"{barcode},1,{row},{column},{y},{x}" for barcode, row, column, (x, y) in
            zip(BARCODES, ROWS, COLUMNS, XY, strict=True)]


def alignment_lines():
    """STUtility's alignment table."""
    return ["x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected",
            *(f"{column}\t{row}\t{column}.1\t{row}.2\t{x}.5\t{y}.25\t1" for row, column, (x, y) in
              zip(ROWS, COLUMNS, XY, strict=True))]


def write_parquet(path):
    """Positions of Visium HD."""
    cells = [line.split(",") for line in positions_lines()]
    table = pd.DataFrame(cells, columns=sources.POSITION_COLUMNS)
    numbers = dict.fromkeys(sources.POSITION_COLUMNS[1:4], "int64")
    numbers |= dict.fromkeys(sources.POSITION_COLUMNS[4:], "float64")
    table.astype(numbers).to_parquet(path)


def st_lines():
    """A legacy ST table."""
    rows = ("\t".join([f"{column}x{row}", *map(str, counts)])
            for row, column, counts in zip(ROWS, COLUMNS, COUNTS, strict=True))
    return ["\t".join(["", *IDS]), *rows]


def a_panel():
    """A panel of all genes."""
    panel = panel_of(*IDS, sections=("A",), markers=IDS[:2])
    panel.genes["rank_A"] = np.arange(1, GENES + 1)
    return panel


def a_model():
    """A small trained model."""
    settings = Training(**asdict(TRAINING["heclip"]) | {
        "dataset": "fuzz", "encoder": "test_resnet", "pretrained": False})
    return Trained(network(n_genes=GENES), settings, a_panel(), {"A": "0123456789abcdef"}, 32, 39.0,
                   epoch=3, validation=[0.5] * GENES)


def embeddings_file():
    """Saved embeddings of a section."""
    about = {"views": 8, "section": "0123456789abcdef", "reference": ["A"],
             "trained": a_model().facts()}
    arrays = {"image": RNG.normal(size=(SPOTS, 8)).astype("f4"),
              "gene": RNG.normal(size=(SPOTS, 8)).astype("f4"), "barcode": np.array(BARCODES)}
    return made(lambda path: np.savez(path, **arrays, about=json.dumps(about)), "a.npz")


def sections_lines():
    """The table of processed sections."""
    return ["section,donor,role,n_spots,n_genes,mpp,patch_px,crop_px,padded,image,digest,sha256",
            f"A,NA,reference,{SPOTS},{GENES},2.0,8,8,0,a.tif,0123456789abcdef,a.tif:00",
            f"B,D2,query,{SPOTS},{GENES},2.0,8,8,0,b.tif,0123456789abcdee,b.tif:01"]


def tiff(picture=PICTURE, **layout):
    """A TIFF as bytes."""
    layout = dict(photometric="rgb", metadata=None, resolution=(5000, 5000),
                  resolutionunit="CENTIMETER") | layout
    return made(lambda path: tifffile.imwrite(path, picture, **layout))


def pyramid(**layout):
    """A tiled TIFF with two levels."""
    def write(path):
        with tifffile.TiffWriter(path) as file:
            file.write(PICTURE, tile=(32, 32), photometric="rgb", compression="jpeg", subifds=1,
                       **layout)
            file.write(PICTURE[::2, ::2], tile=(32, 32), photometric="rgb", compression="jpeg",
                       subfiletype=1)
    return made(write)


def ome():
    """An OME-TIFF with its scale in XML."""
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    return made(lambda path: tifffile.imwrite(
        path, PICTURE, ome=True, photometric="rgb", tile=(32, 32), compression="deflate",
        metadata=metadata))


def picture(kind, image=None, **options):
    """A JPEG or PNG as bytes."""
    image = image or Image.fromarray(PICTURE)
    return made(lambda path: image.save(path, kind, **options))


def turned_jpeg():
    """A JPEG with an EXIF entry of orientation."""
    exif = Image.Exif()
    exif[slide.ORIENTATION] = 6
    return picture("JPEG", exif=exif, progressive=True)


def palette_png():
    """A PNG with a palette."""
    return picture("PNG", Image.fromarray(PICTURE).quantize(16))


def sheet_lines():
    """A sample sheet."""
    return ["section,counts,donor,role,image,positions,mpp,scale",
            "A,matrix.mtx,NA,reference,a.png,tissue_positions.csv,0.5,hires",
            "B,b.h5ad,D2,query,a.png,,,0.5"]


FACTORS = json.dumps({"tissue_hires_scalef": 0.5, "tissue_lowres_scalef": 0.1,
                      "spot_diameter_fullres": 4.0, "bin_size_um": 8.0}).encode()


# ---------------------------------------------------------------------------------------- readers


def read_counts(path):
    """Counts of any kind, with their genes alone."""
    adata = sources.read_counts(path)
    genes = sources.read_genes(path)
    assert adata.X.dtype == np.int32
    assert adata.X.format == "csr"
    assert (adata.X.data >= 0).all()
    assert 0 not in adata.shape
    adata.X.check_format()
    assert adata.obs_names.is_unique
    assert adata.var_names.is_unique
    check_texts(adata.obs_names, adata.var_names, adata.var["symbol"])
    assert list(genes.index) == list(adata.var_names)


def check_texts(*collections):
    """Every entry must be text."""
    for texts in collections:
        assert all(isinstance(entry, str) for entry in texts)


def read_positions(path):
    """Positions of any kind."""
    table = sources.read_positions(path)
    assert table.index.is_unique
    check_texts(table.index)
    assert table["in_tissue"].dtype == bool
    assert np.isfinite(table[["x", "y"]].to_numpy()).all()
    for name in {"array_row", "array_col"} & set(table):
        assert table[name].dtype == np.int64
        assert table[name].abs().max() < 2**53


def read_h5ad(path):
    """Counts, positions and scale factor of an AnnData file."""
    read_counts(path)
    read_positions(path)
    check_factor(sheet.find_scale("hires", path, None))


def check_factor(value):
    """A scale factor must be a number above 0."""
    assert isinstance(value, float)
    assert 0 < value < np.inf


def read_stored_patches(folder):
    """Patches as HEST stores them, cut for a section."""
    stored = slide.StoredPatches(folder / "patches.h5")
    kept = stored.of(an_adata())
    crop_px = stored.crop_px(kept)
    target = folder / "out.npy"
    with atomic_path(target) as path:  # as preprocessing does
        stored.write(kept, crop_px, 8, path)
    patches = np.load(target)
    target.unlink()
    assert patches.shape == (kept.n_obs, 8, 8, 3)


def read_slide(path):
    """All pixels of a slide, at each level."""
    with slide.open_slide(path, path.parent) as opened:
        assert opened.mpp is None or all(0 < value < np.inf for value in opened.mpp)
        n_rows = 0
        for top, band in opened.bands():
            assert top == n_rows
            assert band.dtype == np.uint8
            assert band.shape[1:] == (opened.width, 3)
            n_rows += len(band)
        assert n_rows == opened.height
        for level in opened.levels:
            assert opened.region(level, 0, 0, 20, 20).shape == (20, 20, 3)


def read_sheet(folder):
    """A sample sheet with all the files that it names looked up."""
    sections, problems, _ = sheet.read_sheet(folder / "sheet.csv")
    check_texts(problems)
    for section in sections:
        check_texts([section.name, section.donor, section.role])
        check_factor(section.scale)
        for value in (section.mpp, section.pitch_um):
            if value is not None:
                check_factor(value)
    sheet.share_genes(sections, problems)
    if problems:
        raise InputError(problems[0])


def processed(folder):
    """A Processed whose files lie in a folder."""
    files = Processed("fuzz")
    files.folder = folder
    files.sections_path = folder / "sections.csv"
    return files


def read_sections(folder):
    """The table of processed sections."""
    table = processed(folder).sections()
    check_texts(table.index, table["donor"], table["digest"], table["role"])
    for name in ("n_spots", "patch_px", "crop_px", "mpp"):
        assert (table[name] > 0).all()
    files = processed(folder)
    if (table["role"] == "reference").any():
        check_texts(*files.roles())


def read_processed(folder):
    """A processed section, its patches and its expression."""
    files = processed(folder)
    adata = files.read("A")
    assert adata.n_obs == len(files.spots("A").obs) == len(files.xy("A"))
    assert list(files.barcodes("A")) == list(adata.obs_names)
    check_texts(files.genes("A").index)
    patches = files.patches("A")
    assert patches.dtype == np.uint8
    assert patches.shape == (adata.n_obs, 8, 8, 3)
    expression = files.expression("A", a_panel())
    assert expression.shape == (adata.n_obs, GENES)
    assert np.isfinite(expression).all()


def read_a_panel(folder):
    """A panel that preprocessing wrote."""
    panel = read_panel(folder / "panel_heg.csv")
    assert panel.kind in ("heg", "hvg")
    assert panel.protocol in ("strict", "paper")
    assert panel.is_marker.dtype == bool
    assert len(panel) > 0
    assert panel.ids.is_unique
    assert isinstance(panel.n_top, int)
    check_texts(panel.ids, panel.genes["symbol"], panel.sections, panel.markers)
    ranks = panel.genes.filter(like="rank_")
    assert all(np.issubdtype(kind, np.number) for kind in ranks.dtypes)


def read_panel_file(folder):
    """A list of genes that a user gives."""
    genes = pd.DataFrame({"symbol": SYMBOLS}, index=IDS)
    panel = given_panel(folder / "genes.csv", a_panel(), genes)
    assert set(panel.ids) <= set(IDS)


def read_symbols(path):
    """A table of gene symbols."""
    symbols = sources.read_symbols(path)
    assert symbols.index.is_unique
    check_texts(symbols, symbols.index)


def read_model(folder):
    """A checkpoint."""
    trained = load_checkpoint(folder / "heg_best.pt")
    assert len(trained.panel) == GENES
    assert trained.network.width > 0
    check_texts(trained.panel.ids, trained.panel.genes["symbol"], trained.reference)
    assert trained.patch_px > 0
    assert trained.patch_um > 0


def read_embeddings(folder):
    """Saved embeddings."""
    embeddings, barcodes, about = prediction.load_embeddings(folder / "A.npz")
    check_texts(barcodes, about["reference"])
    for values in embeddings.values():
        assert values.ndim == 2
        assert len(values) == len(barcodes)
        assert np.isfinite(values).all()
    assert isinstance(about["trained"].digest, str)


# ------------------------------------------------------------------------------------------ hostile


def bomb(unit, times=64):
    """A gzip file of `times` members that unpack to 16 MB each: by default 1 GB in all."""
    return gzip.compress(unit * ((16 << 20) // len(unit)), 9, mtime=0) * times


BOMBS = {
    "bomb of zeros": lambda: bomb(b"\0"),
    "bomb of line ends": lambda: bomb(b"\n"),
    "bomb of tabs": lambda: bomb(b"\t"),
    "bomb of commas": lambda: bomb(b","),
    "bomb of one cell": lambda: bomb(b"1"),
    "bomb of rows": lambda: bomb(b"1\t1\t1\n1,1,1\n"),
    "bomb of brackets": lambda: bomb(b"["),
    "one long line": lambda: b"a" * (32 << 20),
    "two million cells": lambda: b"a\t" * (2 << 20),
    "two million commas": lambda: b"," * (2 << 20),
}
JSONS = BOMBS | {
    "deep list": b"[" * 100_000,
    "deep dict": b'{"a":' * 100_000,
    "closed deep list": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "long number": b'{"tissue_hires_scalef": 1' + b"0" * 400 + b"}",
    "list of pairs": b'[["tissue_hires_scalef", 0.5]]',
    **{f"factor {value}": f'{{"tissue_hires_scalef": {value}, "bin_size_um": {value}}}'.encode()
       for value in ("NaN", "1e999", "-1", "0", "null", "true", '"0.5"', '"x"', "[1]", "{}")},
}
MTX_HEAD = b"%%MatrixMarket matrix coordinate integer general\n"
MTXS = BOMBS | {
    "a billion entries": MTX_HEAD + b"15 24 1000000000\n1 1 1\n",
    "2^62 entries": MTX_HEAD + b"15 24 4611686018427387904\n1 1 1\n",
    "a billion genes": MTX_HEAD + b"1000000000 24 1\n1 1 1\n",
    "a billion genes and spots": MTX_HEAD + b"1000000000 1000000000 1\n1 1 1\n",
    "a dense matrix": b"%%MatrixMarket matrix array integer general\n1000000 1000000\n1\n",
    "a dense matrix of right shape": b"%%MatrixMarket matrix array integer general\n15 24\n1\n",
    "entries without values": b"%%MatrixMarket matrix coordinate pattern general\n15 24 1\n1 1\n",
    "complex": b"%%MatrixMarket matrix coordinate complex general\n15 24 1\n1 1 1 1\n",
    "skew": b"%%MatrixMarket matrix coordinate integer skew-symmetric\n15 24 1\n2 1 1\n",
    "an index of 0": MTX_HEAD + b"15 24 1\n0 0 1\n",
    "an index beyond": MTX_HEAD + b"15 24 1\n16 25 1\n",
    "one entry twice": MTX_HEAD + b"15 24 2\n1 1 2000000000\n1 1 2000000000\n",
}


def declared(write, change):
    """An HDF5 file that `write` makes, after `change(file)`."""
    def both(path):
        write(path)
        with h5py.File(path, "r+") as file:
            change(file)
    return lambda: made(both)


def enlarged(name, size=10**9, **options):
    """A function that replaces a dataset by one that declares `size` entries and stores none."""
    def change(file):
        kind = file[name].dtype
        del file[name]
        file.create_dataset(name, (size,), kind, **options or {"chunks": (1 << 16,)})
    return change


def hdf5_bombs(write, group, names):
    """Hostile HDF5 files: `names` are datasets in the group."""
    def deep(file):
        inside = file
        for _ in range(2000):
            inside = inside.create_group("a")

    def loop(file):
        file[names[0]].parent["loop"] = file["/"]

    def zeros(file):
        enlarged(names[0], 10**8, chunks=(1 << 20,), compression="gzip")(file)
        file[names[0]][...] = 0

    cases = {f"{name} of a billion": declared(write, enlarged(name)) for name in names}
    cases |= {f"{name} outside": declared(write, enlarged(
        name, 10**6, external=[("outside.bin", 0, h5py.h5f.UNLIMITED)])) for name in names}
    return cases | {
        "deep groups": declared(write, deep), "groups in a circle": declared(write, loop),
        "chunks of zeros": declared(write, zeros),
        "link outside": declared(write, lambda file: file.update(
            {f"{group}x": h5py.ExternalLink("/etc/hostname", "/")}))}


def write_h5ad_of(adata):
    """A function that writes an AnnData, for `declared`."""
    return lambda path: write_h5ad(adata, path)


def without_storage(shape, **attributes):
    """A function that replaces a matrix in X by a dense one of this shape, without values."""
    def change(file):
        del file["X"]
        matrix = file.create_dataset("X", shape, "f4", chunks=(1024, 1024))
        matrix.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"} | attributes)
    return change


def with_tags(content, **values):
    """A little-endian TIFF whose first page has other values in tags of one number."""
    content = bytearray(content)
    start = int.from_bytes(content[4:8], "little")
    for number in range(int.from_bytes(content[start:start + 2], "little")):
        at = start + 2 + 12 * number
        name = tifffile.TIFF.TAGS.get(int.from_bytes(content[at:at + 2], "little"))
        if name in values:
            content[at + 2:at + 12] = (b"\4\0\1\0\0\0" + values[name].to_bytes(4, "little"))
    return bytes(content)


def in_a_circle(content):
    """A TIFF whose first page is followed by itself."""
    start = int.from_bytes(content[4:8], "little")
    after = start + 2 + 12 * int.from_bytes(content[start:start + 2], "little")
    return content[:after] + content[4:8] + content[after + 4:]


def many_tags(content, count=2**32 - 1):
    """A TIFF whose tags all declare `count` values."""
    content, start = bytearray(content), int.from_bytes(content[4:8], "little")
    for number in range(int.from_bytes(content[start:start + 2], "little")):
        at = start + 2 + 12 * number
        content[at + 4:at + 8] = count.to_bytes(4, "little")
    return bytes(content)


def tiff_bombs(**layout):
    """Hostile TIFFs of a layout."""
    honest, sides = tiff(**layout), dict(ImageWidth=HUGE, ImageLength=HUGE)
    return {
        "a million px each way": with_tags(honest, **sides),
        "a million px in one strip": with_tags(honest, **sides, RowsPerStrip=HUGE),
        "a million px in one tile": with_tags(honest, **sides, TileWidth=HUGE, TileLength=HUGE),
        "a million px wide": with_tags(honest, ImageWidth=HUGE),
        "30,000 px each way": with_tags(honest, ImageWidth=30_000, ImageLength=30_000),
        "65,000 channels": with_tags(honest, SamplesPerPixel=65_000),
        "no strips": with_tags(honest, StripOffsets=0, StripByteCounts=0),
        "no pixels": with_tags(honest, ImageWidth=0, ImageLength=0),
        "pages in a circle": in_a_circle(honest), "tags of 2^32": many_tags(honest),
        "tags of 10^8": many_tags(honest, 10**8), "bomb of zeros": BOMBS["bomb of zeros"],
        "bomb of a TIFF": lambda: gzip.compress(honest) + bomb(b"\0")}


def ome_bombs():
    """Hostile OME-XML."""
    honest = ome()
    at, end = honest.index(b"<?xml"), honest.index(b"</OME>") + 6

    def with_xml(xml):
        return honest[:at] + xml[:end - at].ljust(end - at) + honest[end:]

    laughs = b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "ha">' + b"".join(
        b'<!ENTITY %c "%s">' % (98 + i, b"&%c;" % (97 + i) * 10) for i in range(9))
    return {
        "XML entities": with_xml(laughs + b"]><OME>&j;</OME>"),
        "deep XML": with_xml(b"<OME>" * 100_000), "no XML": with_xml(b"<OME"),
        "a billion planes": honest.replace(b'SizeT="1"', b'SizeT="%d"' % (10**9)),
        "a million px in XML": honest.replace(b'SizeX="96"', b'SizeX="1000000"')}


def png_of(width, height, honest=None):
    """A PNG that declares another size, with a right checksum."""
    honest = honest or picture("PNG")
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + honest[24:29]
    return honest[:12] + head + zlib.crc32(head).to_bytes(4, "big") + honest[33:]


def jpeg_of(width, height):
    """A JPEG that declares another size."""
    honest = picture("JPEG")
    at = honest.index(b"\xff\xc0") + 5
    return honest[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + honest[at + 4:]


def rezipped(content, change, method=zipfile.ZIP_STORED):
    """A zip file with right checksums, after `change(name, bytes)` of every member."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w", method) as zip_:
        for name in source.namelist():
            zip_.writestr(name, change(name, source.read(name)))
    return out.getvalue()


def packed(content, member):
    """A zip file with one member that unpacks to 1 GB."""
    return rezipped(content, lambda name, old: bytes(1 << 30) if name.endswith(member) else old,
                    zipfile.ZIP_DEFLATED)


def npy_of(shape, kind="<f4"):
    """The header of a .npy that declares a shape, and no values."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": kind, "fortran_order": False, "shape": shape})
    return out.getvalue()


def embeddings_bombs():
    """Hostile embeddings."""
    honest = embeddings_file()

    def image(content):
        return lambda: rezipped(honest, lambda name, old: content if name == "image.npy" else old)

    def about(**changes):
        arrays = dict(np.load(io.BytesIO(honest)))
        facts = json.loads(str(arrays.pop("about"))) | changes
        return lambda: made(
            lambda path: np.savez(path, **arrays, about=json.dumps(facts)), "a.npz")

    return {
        "a billion spots": image(npy_of((10**9, 8))),
        "2^62 spots": image(npy_of((2**62, 8))),
        "objects": image(npy_of((3,), "|O")),
        "a deep header": image(b"\x93NUMPY\1\0\x10\x27" + b"(" * 10_000),
        "another shape": image(npy_of((SPOTS, 0))),
        "bomb": image(bytes(1 << 20)), "packed": lambda: packed(honest, "image.npy"),
        "about a list": about(trained=[]), "about no settings": about(trained={"settings": {}}),
        "unknown setting": about(trained=a_model().facts() | {"x": 1}),
        "reference of numbers": about(reference=[1]), "no views": about(views=None)}


def model_bombs():
    """Hostile checkpoints."""
    honest = MODEL
    saved = torch.load(io.BytesIO(honest), weights_only=True)

    def with_config(**changes):
        return with_saved(config=saved["config"] | changes)

    def with_saved(**changes):
        return lambda: made(lambda path: torch.save(saved | changes, path))

    deep = []
    for _ in range(400):
        deep = [deep]
    return {
        "a billion genes": with_config(n_genes=10**9),
        "a million genes": with_config(n_genes=10**6),
        "a million wide": with_config(embedding_dim=10**6), "-1 genes": with_config(n_genes=-1),
        "no such encoder": with_config(encoder="none"),
        "a large encoder": with_config(encoder="vit_giant_patch14_dinov2"),
        "an encoder's folder": with_config(encoder="local-dir:/etc"),
        "unknown config": with_config(x=1), "text as a size": with_config(n_genes="15"),
        "no panel": with_saved(panel={}), "a deep entry": with_saved(panel=deep),
        "expanded tensors": with_saved(model={
            name: torch.zeros(1).expand(10**6, 10**6) for name in saved["model"]}),
        "packed": lambda: packed(honest, "data.pkl")}


MODEL = made(lambda path: save_checkpoint(path, a_model()))
PROCESSED = processed_files()
ADATA = write_h5ad_of(an_adata())
SHEET = {"sheet.csv": text(*sheet_lines()), **mtx_files(),
         "tissue_positions.csv": text(*positions_lines()),
         "scalefactors_json.json": FACTORS, "a.png": picture("PNG"), "b.h5ad": made(ADATA)}
PLACES = {f"row {row}": text(f"AAA-1,1,{row},0,5,5")
          for row in ("1e300", "1.5", "inf", "", "1e18")}
PLACES |= {f"y {y}": text(f"AAA-1,1,0,0,{y},5") for y in ("inf", "nan", "x", "1e400", "0x10")}
PLACES |= {"in_tissue 7": text("AAA-1,7,0,0,5,5")}


def single(name, content, read, hostile=None):
    """A format of one file."""
    return Format({name: content}, lambda folder: read(folder / name), hostile or {})


def tiffs():
    """TIFFs in all layouts."""
    planes = tiff(np.moveaxis(PICTURE, -1, 0), planarconfig="separate", bigtiff=True,
                  rowsperstrip=32)
    strips, lzw = dict(rowsperstrip=7), dict(rowsperstrip=96, compression="lzw", predictor=True)
    deflate = dict(tile=(32, 32), compression="deflate")
    jpeg = dict(tile=(32, 32), compression="jpeg")
    contents = {"plain": (tiff(), tiff_bombs()), "strips": (tiff(**strips), tiff_bombs(**strips)),
                "LZW": (tiff(**lzw), tiff_bombs(**lzw)),
                "deflate": (tiff(**deflate), tiff_bombs(**deflate)),
                "JPEG": (tiff(**jpeg), tiff_bombs(**jpeg)), "planes, big": (planes, {}),
                "pyramid": (pyramid(), {}), "gz": (gzip.compress(tiff(), mtime=0), {})}
    formats = {f"TIFF, {name}": single("a.tif", content, read_slide, hostile)
               for name, (content, hostile) in contents.items()}
    svs_bombs = tiff_bombs(**jpeg, description=APERIO)
    formats["SVS"] = single("a.svs", pyramid(description=APERIO), read_slide, svs_bombs)
    formats["OME-TIFF"] = single("a.ome.tif", ome(), read_slide, ome_bombs())
    return formats


def pictures():
    """JPEG and PNG."""
    large = {"a million px each way": png_of(HUGE, HUGE),
             "30,000 px each way": png_of(30_000, 30_000), "no pixels": png_of(0, 0)}
    return {
        "JPEG": single("a.jpg", picture("JPEG", quality=80), read_slide,
                       {"65,000 px each way": jpeg_of(65_000, 65_000)}),
        "JPEG, turned": single("a.jpg", turned_jpeg(), read_slide),
        "PNG": single("a.png", picture("PNG"), read_slide, large),
        "PNG, palette": single("a.png", palette_png(), read_slide)}


def counts():
    """Count matrices."""
    trio = zipped(mtx_files())
    h5_names = ["matrix/data", "matrix/indptr", "matrix/barcodes", "matrix/features/id"]
    h5ad_names = ["X/data", "X/indptr", "obs/_index", "obs/in_tissue"]
    dense = {"a dense million": declared(ADATA, without_storage((HUGE, HUGE)))}
    old = made(lambda path: write_10x(path, legacy=True))
    table = text(*st_lines())
    return {
        "mtx": Format(mtx_files(), lambda folder: read_counts(folder / "matrix.mtx"), MTXS,
                      tuple(mtx_files())),
        "mtx.gz": Format(trio, lambda folder: read_counts(folder / "matrix.mtx.gz"), MTXS,
                         tuple(trio)),
        "10x h5": single("a.h5", made(write_10x), read_counts,
                         hdf5_bombs(write_10x, "matrix/", h5_names)),
        "10x h5, version 2": single("a.h5", old, read_counts),
        "h5ad": single("a.h5ad", made(ADATA), read_h5ad,
                       hdf5_bombs(ADATA, "X/", h5ad_names) | dense),
        "ST table": single("a.tsv", table, read_counts, BOMBS),
        "ST table, gz": single("a.tsv.gz", gzip.compress(table, mtime=0), read_counts, BOMBS)}


def tables():
    """Positions, sheets, and what stands next to them."""
    headed = gzip.compress(text(",".join(sources.POSITION_COLUMNS), *positions_lines()), mtime=0)
    hest = {"metadata/A.json": b'{"inter_spot_dist": 100.0, "pixel_size_um_estimated": 0.5}',
            "st/A.h5ad": made(ADATA), "wsis/A.tif": tiff(),
            "sheet.csv": text("section,counts,donor,role", "A,.,D,reference")}
    symbols = text("gene_id\tgene_name", *map("\t".join, zip(IDS, SYMBOLS, strict=True)))
    return {
        "positions csv": single("p.csv", text(*positions_lines()), read_positions, BOMBS | PLACES),
        "positions csv, header, gz": single("p.csv.gz", headed, read_positions, BOMBS),
        "alignment table": single("a.tsv", text(*alignment_lines()), read_positions, BOMBS),
        "parquet": single("p.parquet", made(write_parquet), read_positions),
        "sample sheet": Format(SHEET, read_sheet, BOMBS),
        "scale factors": Format({"scalefactors_json.json": FACTORS, **SHEET}, read_sheet, JSONS),
        "HEST metadata": Format(hest, read_sheet, JSONS),
        "HEST patches": Format(
            {"patches.h5": made(write_stored_patches)}, read_stored_patches,
            hdf5_bombs(write_stored_patches, "", ["img", "coords", "barcode"])),
        "symbols": single("symbols.tsv", symbols, read_symbols, BOMBS)}


def own():
    """What the project itself writes."""
    npys = {"a billion": npy_of((10**9, 8, 8, 3), "|u1"), "0": npy_of((0,)),
            "deep": b"\x93NUMPY\1\0\x10\x27" + b"(" * 10_000}
    section = hdf5_bombs(lambda path: path.write_bytes(PROCESSED["A.h5ad"]), "X/",
                         ["X/data", "X/indptr", "obs/_index"])
    panels = BOMBS | {"deep": b"# " + b"[" * 100_000 + b"\n",
                      "a list": b"# []\ngene_id,symbol,marker\n"}
    genes = text("gene_id,symbol", *map(",".join, zip(IDS, SYMBOLS, strict=True)))
    return {
        "checkpoint": Format({"heg_best.pt": MODEL}, read_model, model_bombs()),
        "embeddings": Format({"A.npz": embeddings_file()}, read_embeddings, embeddings_bombs()),
        "patches npy": Format(PROCESSED, read_processed, npys, ("A.patches.npy",)),
        "processed h5ad": Format(PROCESSED, read_processed, section),
        "sections.csv": Format({"sections.csv": text(*sections_lines())}, read_sections, BOMBS),
        "panel": Format({"panel_heg.csv": made(a_panel().write)}, read_a_panel, panels),
        "panel file": Format({"genes.csv": genes}, read_panel_file, BOMBS)}


FORMATS = counts() | tables() | tiffs() | pictures() | own()
