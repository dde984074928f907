"""The data model, and the paths where every stage reads and writes.

The tree below `ROOT` is the contract between the stages; see "Files" in the README.
"""

import hashlib
import io
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from .files import InputError, first_line
from .identity import Identity, shared
from .limits import check_indices, check_npy, open_hdf5, read_text
from .panel import choose_panel, read_panel, run_name
from .spots import array_of

SIZES = "n_spots", "mpp", "patch_px", "crop_px"  # columns of the section table
SCRIPTS = Path(__file__).parents[1]
ROOT = Path(os.environ.get("HECLIP_ROOT") or Path(__file__).resolve().parents[2])


@dataclass(frozen=True)
class Section:
    """One piece of tissue on one capture area.

    counts, positions, image: glob patterns below the raw folder, tried in order; `.gz` may follow
    each. Or a Path, which names the file itself.
    n_spots: the number of spots under tissue that its authors report; another number is an error.
    pitch_um: distance of neighbouring spots in microns, if it is not the dataset's.
    mpp: microns per pixel of the image, if they are known from another source than the pitch.
    stated_mpp: what the section's other files say of it. It is not used, only compared.
    scale: pixels of the image per pixel of the positions; below 1 if the image is smaller than the
    one that the positions refer to.
    new_ids: gene id -> the id that the other sections have for it.
    part: conditions that say which spots of the files are of this section; see `part.read_part`.
    """

    name: str
    donor: str
    role: str  # "reference" | "query"
    counts: list | Path
    positions: list | Path
    image: list | Path
    n_spots: int | None = None
    pitch_um: float | None = None
    mpp: float | None = None
    stated_mpp: float | None = None
    scale: float = 1.0
    new_ids: dict = field(default_factory=dict)
    part: tuple = ()


@dataclass(frozen=True)
class Dataset:
    """The facts about one dataset, stated once, in its preprocess script.

    n_hvg, n_heg: number of genes that each section contributes to the panel.
    markers: symbols of genes whose scores and maps are shown by name.
    symbols: glob patterns of a table gene_id -> gene_name, or its Path, for counts without symbols.
    pitch_um, spot_um: distance of neighbouring spots and their diameter in microns (Visium 100 and
    55, legacy Spatial Transcriptomics 200 and 100).
    patch_px: side of the stored patches in pixels. Without patch_um, these are pixels of the image.
    patch_um: side of the patch in microns. A patch of that side in each section's image is
    resampled to patch_px.
    min_counts: spots with fewer counts in total are dropped.
    command: the command that prepares the dataset, if it is not preprocess_<name>.py.
    Raises InputError for a name that two sections have, or a wrong role.
    """

    name: str
    sections: list
    n_hvg: int
    n_heg: int
    markers: tuple = ()
    symbols: tuple | Path = ()
    pitch_um: float = 100.0
    spot_um: float = 55.0
    patch_px: int = 256
    patch_um: float | None = None
    min_counts: int = 0
    command: str | None = None

    def __post_init__(self):
        names = [section.name for section in self.sections]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"dataset {self.name}: section {', '.join(twice)} is named twice; "
                             "give each its own name")
        for section in self.sections:
            if section.role not in ("reference", "query"):
                raise InputError(f"dataset {self.name}, section {section.name}: role "
                                 f"{section.role!r} is neither 'reference' nor 'query'")
        if not any(section.role == "reference" for section in self.sections):
            raise InputError(f"dataset {self.name}: no section has the role 'reference', so there "
                             "is nothing to learn from")

    @property
    def raw(self):
        """The folder of the raw files, unless `--raw` names another."""
        return ROOT / "GSE" / self.name


def has_script(dataset):
    """Whether there is a preprocess script with the dataset's name."""
    return (SCRIPTS / f"preprocess_{dataset}.py").exists()


class Processed:
    """The processed files of one dataset: their paths, and their contents.

    n_spots and n_genes are numbers of one section; G is the size of a panel. A method that reads a
    file raises InputError if the file is missing or damaged.
    """

    def __init__(self, dataset):
        self.dataset = dataset
        self.folder = ROOT / "GSE" / dataset / "processed"
        self.sections_path = self.folder / "sections.csv"
        self.fingerprints_path = self.folder / "fingerprints.npz"  # see `identity.fingerprints`
        self.command_path = self.folder / "command.txt"  # of datasets without a script

    def section_path(self, section):
        """Path of a section's expression."""
        return self.folder / f"{section}.h5ad"

    def patches_path(self, section):
        """Path of a section's patches."""
        return self.folder / f"{section}.patches.npy"

    def panel_path(self, kind, protocol="strict"):
        """Path of a panel."""
        return self.folder / f"panel_{run_name(kind, protocol)}.csv"

    def corrected_path(self, section, kind):
        """Path of the paper protocol's Harmony-corrected expression, float32 (n_spots, G)."""
        return self.folder / f"{section}.{run_name(kind, 'paper')}.npy"

    @property
    def command(self):
        """The command that makes these files."""
        if has_script(self.dataset) or not self.command_path.exists():
            return f"python code/preprocess_{self.dataset}.py"
        return self.command_path.read_text().strip()

    def need(self, path, protocol="strict"):
        """Return `path`, or raise InputError with the command that makes it."""
        if path.exists():
            return path
        if not has_script(self.dataset) and not self.command_path.exists():
            known = sorted(script.stem.removeprefix("preprocess_")
                           for script in SCRIPTS.glob("preprocess_*.py"))
            known.remove("custom")
            raise InputError(
                f"{path} is missing, and no preprocess script is called {self.dataset}. --dataset "
                f"takes {', '.join(known)}, or one that you make from a sample sheet: python "
                f"code/preprocess_custom.py SHEET --name {self.dataset}")
        asks_for_paper = protocol == "paper" and " --protocol paper" not in self.command
        raise InputError(f"{path} is missing. Make it with: {self.command}"
                         + (" --protocol paper" if asks_for_paper else ""))

    # ------------------------------------------------------------------------------- the sections

    def sections(self):
        """The section table: a DataFrame with index section, read from sections.csv.

        Columns: donor, role, n_spots, n_genes, mpp, patch_px, crop_px, padded, image, digest,
        sha256. crop_px: side, in full-resolution pixels, of what a patch of patch_px x patch_px
        pixels shows. digest: stands for the raw files and settings that the section was made from.
        Names are text, so "NA" and "007" are names. Raises InputError for a table that names a
        section twice or is of an older version.
        """
        text = {"section": str, "donor": str, "digest": str}
        path = self.need(self.sections_path)
        try:
            content = io.StringIO(read_text(path))
            table = pd.read_csv(content, dtype=text, keep_default_na=False).set_index("section")
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise InputError(f"{path} is damaged ({first_line(error)}). Run {self.command} "
                             "again") from None
        if not table.index.is_unique:
            raise InputError(f"{path} names a section twice. Run {self.command} again")
        if "digest" not in table:
            raise InputError(f"{path} was written by an older version. Run {self.command} again")
        if fault := fault_of(table):
            raise InputError(f"{path} is damaged ({fault}). Run {self.command} again")
        return table

    def roles(self, query=None):
        """Names of the sections, (reference, query): two lists.

        query: the sections to hold out; None: those with that role in the section table. Raises
        InputError for an unknown section, or if no reference is left.
        """
        table = self.sections()
        if query is None:
            query = list(table.index[table["role"] == "query"])
        if absent := [name for name in query if name not in table.index]:
            raise InputError(f"--query {absent[0]}: {self.sections_path} has no such section, but "
                             f"{', '.join(table.index)}")
        reference = [name for name in table.index if name not in query]
        if not reference:
            raise InputError(f"--query {' '.join(query)}: no section is left to learn from")
        return reference, list(query)

    def identity(self, section):
        """The Identity of a section, which shows whether another one holds the same spots."""
        fingerprints, spots = self.fingerprints(), self.spots(section)
        if len(fingerprints.get(section, ())) != spots.n_obs:
            raise InputError(f"{self.fingerprints_path} is not of {self.section_path(section)}. "
                             f"Run {self.command} again")
        return identity_of(section, spots, fingerprints[section])

    def fingerprints(self):
        """Section -> the fingerprints of its spots, uint64 (n_spots,)."""
        path = self.need(self.fingerprints_path)
        try:
            with np.load(path) as file:
                return dict(file)
        except Exception as error:  # zip and numpy raise many kinds
            raise InputError(f"{path} is damaged ({first_line(error)}). Run {self.command} "
                             "again") from None

    def check_apart(self, query, reference):
        """Raise InputError if a section is in its own reference: by name, by files, or by spots.

        query: a section's name. reference: names.
        """
        if query in reference:
            raise InputError(f"{query} is in its own reference, {', '.join(reference)}. Hold it "
                             "out, or name another query")
        digest = self.sections()["digest"]
        if same := [name for name in reference if digest[name] == digest[query]]:
            raise InputError(f"{query} and {same[0]} were made from the same files, so {query} "
                             "would be predicted from itself. Leave one of them out")
        of_query = self.identity(query)
        for name in reference:
            if problem := shared(of_query, self.identity(name)):
                raise InputError(f"{self.folder}: {problem}")

    def check_made_from(self, sections):
        """Raise InputError if a section was preprocessed since the section table was written.

        `--section` of the preprocess scripts does that. The table would then be out of date.
        """
        table = self.sections()
        for section in sections:
            with self.opened(section) as file:
                made_from = file["uns/made_from"][()].decode()
            if section_digest(made_from) != table.at[section, "digest"]:
                raise InputError(f"{self.section_path(section)} was preprocessed in another way "
                                 f"since {self.sections_path} was written. Run {self.command} for "
                                 "all sections, without --section")

    def read(self, section):
        """One section as AnnData, spots x all genes.

        X: log-normalised, CSR float32. layers["counts"]: counts.
        """
        import anndata

        with self.opened(section) as file:
            adata = anndata.io.read_elem(file)
            if not isinstance(adata, anndata.AnnData):
                raise ValueError("it is no AnnData")
            for matrix in (adata.X, *adata.layers.values()):
                check_indices(matrix)
        return adata

    def spots(self, section):
        """A section's spots without genes, as AnnData of n_spots x 0: obs, obsm and uns."""
        import anndata

        with self.opened(section) as file:
            return anndata.AnnData(**{part: anndata.io.read_elem(file[part])
                                      for part in ("obs", "obsm", "uns")})

    def xy(self, section):
        """The spots' centres (x, y) in full-resolution pixels: float64 (n_spots, 2)."""
        with self.opened(section) as file:
            return np.asarray(file["obsm/spatial"][:], np.float64)

    def barcodes(self, section):
        """The spots' names, in order: array of str (n_spots,)."""
        with self.opened(section) as file:
            obs = file["obs"]
            return obs[obs.attrs["_index"]].asstr()[:].astype(str)

    def genes(self, section):
        """The gene table of a section (see `expression.gene_statistics`), without its matrices."""
        import anndata

        with self.opened(section) as file:
            return anndata.io.read_elem(file["var"])

    @contextmanager
    def opened(self, section):
        """A section's open HDF5 file. Errors while it is read name the file."""
        path = self.need(self.section_path(section))
        try:
            with open_hdf5(path) as file:
                yield file
        except (InputError, MemoryError):
            raise
        except Exception as error:  # HDF5 raises many kinds of errors
            raise InputError(f"{path} is damaged ({first_line(error)}). Delete it and run "
                             f"{self.command} again") from error

    def patches(self, section):
        """A section's patches as a memory map, uint8 (n_spots, patch_px, patch_px, 3) RGB.

        Row i is row i of the section. Raises InputError if patches and expression were not made
        together.
        """
        path = self.need(self.patches_path(section))
        patches = self.load(path, mmap_mode="r")
        if patches.dtype != np.uint8 or patches.ndim != 4 or not len(patches):
            raise InputError(f"{path} holds {patches.dtype} of shape {patches.shape}, expected "
                             f"patches. Delete it and run {self.command} again")
        with self.opened(section) as file:
            made_with = file["uns/patches_digest"][()].decode()
        if patches_digest(patches) != made_with:
            raise InputError(f"{path} and {self.section_path(section)} were not made together. "
                             f"Delete both and run {self.command} again")
        return patches

    def load(self, path, **options):
        """The array in a .npy file. options: of numpy.load. Raises InputError if it is damaged."""
        try:
            with open(path, "rb") as file:
                check_npy(file, os.path.getsize(path))
            return np.load(path, **options)
        except (ValueError, EOFError, OverflowError) as error:
            raise InputError(f"{path} is damaged ({first_line(error)}). Delete it and run "
                             f"{self.command} again") from None

    # --------------------------------------------------------------------------- panel, expression

    def panel(self, kind, protocol="strict", reference=None):
        """The panel of that kind as on disk, or chosen again by `reference`.

        It is chosen again if other sections than `reference` chose the one on disk. In the paper
        protocol all sections choose it, whichever is held out.
        """
        panel = read_panel(self.need(self.panel_path(kind, protocol), protocol))
        if protocol == "paper" or reference is None or panel.sections == list(reference):
            return panel
        genes = {section: self.genes(section) for section in self.sections().index}
        return choose_panel(kind, {section: genes[section] for section in reference}, panel.n_top,
                            [table.index for table in genes.values()], panel.markers)

    def expression(self, section, panel):
        """What the model is trained on and scored against: float32 (n_spots, G), in panel order."""
        if panel.protocol == "paper":
            path = self.need(self.corrected_path(section, panel.kind), "paper")
            corrected = self.load(path)
            if corrected.ndim != 2 or corrected.shape[1] != len(panel):
                raise InputError(f"{path} is of shape {corrected.shape}, and its panel has "
                                 f"{len(panel)} genes. Run {self.command} again")
            return corrected
        with self.opened(section) as file:
            return read_columns(file, panel.ids)


def identity_of(section, spots, fingerprints):
    """The Identity of a processed section, AnnData."""
    return Identity(section, fingerprints, json.loads(spots.uns["made_from"])["image"],
                    spots.obsm["spatial"], int(spots.uns["crop_px"]), array_of(spots.obs))


def fault_of(table):
    """What is wrong with the contents of a section table, in words; None if it is right."""
    if absent := [name for name in ("donor", "role", *SIZES) if name not in table]:
        return f"it lacks {', '.join(absent)}"
    if not table["role"].isin(["reference", "query"]).all():
        return "a role is neither reference nor query"
    sizes = table[list(SIZES)]
    is_number = all(kind.kind in "if" for kind in sizes.dtypes)
    if not is_number or not ((sizes > 0) & np.isfinite(sizes)).all(axis=None):
        return "a size is not a number above 0"
    return None


def section_digest(made_from):
    """A short digest of a section's raw files and settings."""
    return hashlib.sha256(made_from.encode()).hexdigest()[:16]


def patches_digest(patches):
    """SHA-256 of the shape of patches (n, P, P, 3) and of 16 patches, evenly spaced.

    It takes a second at most. It shows which patches and which expression were made together. It
    does not find damaged bytes.
    """
    total = hashlib.sha256(str(patches.shape).encode())
    for row in np.unique(np.linspace(0, len(patches) - 1, 16).astype(int)):
        total.update(np.ascontiguousarray(patches[row]).tobytes())
    return total.hexdigest()


def read_columns(file, ids, rows=1024):
    """Some genes of a section's X: float32 (n_spots, G), in the order of the gene ids `ids`.

    file: an open h5ad whose X is CSR. Only X is read, `rows` spots at a time.
    Raises InputError if the section lacks one of the genes.
    """
    import anndata

    place = pd.Index(anndata.io.read_elem(file["var"]).index).get_indexer(ids)
    if (place < 0).any():
        lacking = ids[place < 0]
        raise InputError(f"{file.filename} lacks {len(lacking)} genes of the panel, {lacking[0]} "
                         "first. The panel belongs to another dataset, or the section has been "
                         "made again since")
    x = anndata.io.sparse_dataset(file["X"])
    blocks = []
    for start in range(0, x.shape[0], rows):
        block = x[start:start + rows]
        check_indices(block)
        blocks.append(block[:, place].toarray())
    return np.concatenate(blocks).astype(np.float32, copy=False)


class Run:
    """The paths of one model's files.

    With `save_path` all of them are below that folder, so that several runs can be kept.
    """

    def __init__(self, dataset, name, save_path=None):
        save = Path(save_path) if save_path else ROOT / "save"
        self.dataset, self.name = dataset, name
        self.top = save if save_path else ROOT
        self.folder = save / dataset
        self.checkpoint = self.folder / f"{name}_best.pt"
        self.last = self.folder / f"{name}_last.pt"
        self.unfinished = self.folder / f"{name}_unfinished.pt"  # best epoch of a running training
        self.losses = self.folder / f"{name}_losses.csv"
        self.prediction = self.folder / f"{name}_prediction.h5ad"
        self.genes = self.folder / f"{name}_genes.csv"
        self.scores = self.folder / f"{name}_scores.json"

    def embeddings(self, section):
        """Path of a section's embeddings."""
        return self.top / "ebd" / self.dataset / self.name / f"{section}.npz"

    def figure(self, kind, of=None, suffix="pdf"):
        """Path of a picture of that kind: QC, MAP, CAL, EBD or EXP. of: the name of a slide."""
        stem = self.name if of is None else f"{self.name}_slide_{of}"
        return self.top / "figure" / kind / f"{self.dataset}_{stem}.{suffix}"

    def slide_prediction(self, slide):
        """Path of the prediction of a slide that has no expression."""
        return self.folder / f"{self.name}_slide_{slide}_prediction.h5ad"
