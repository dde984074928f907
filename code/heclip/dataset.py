"""What a dataset is, and where every stage reads and writes.

The tree below `ROOT` is the contract between the stages: see "Files" in the README.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from .files import InputError

SCRIPTS = Path(__file__).parents[1]
ROOT = Path(os.environ.get("HECLIP_ROOT") or Path(__file__).resolve().parents[2])


@dataclass(frozen=True)
class Section:
    """One piece of tissue on one capture area.

    counts, positions, image: glob patterns below the raw folder, tried in order; `.gz` may follow each. Or a Path:
    that very file.
    n_spots: the number of spots under tissue that its authors report; another number is an error.
    pitch_um: distance of neighbouring spots in microns, where it is not the dataset's.
    mpp: microns per pixel of the image, where they are known otherwise than from the pitch.
    scale: pixels of the image per pixel of the positions: below 1 for an image smaller than the one they refer to.
    new_ids: gene id -> the id that the other sections have for it.
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
    scale: float = 1.0
    new_ids: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """The facts about one dataset, stated once, in its preprocess script.

    n_hvg, n_heg: genes that each section contributes to the panel's union.
    markers: symbols whose scores and maps are shown by name.
    symbols: glob patterns of a table gene_id -> gene_name, or its Path, for counts that carry no symbols.
    pitch_um, spot_um: distance of neighbouring spots and their diameter in microns (Visium 100 and 55, legacy
    Spatial Transcriptomics 200 and 100).
    patch_px: side of the stored patches in pixels, which are the image's own unless patch_um says otherwise.
    patch_um: side of the patch in microns: what is that wide in each section's image is resampled to patch_px.
    min_counts: spots with fewer counts in all are dropped.
    command: what prepares the dataset, if it is not preprocess_<name>.py.
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
            raise InputError(f"dataset {self.name}: section {', '.join(twice)} is named twice; give each its own name")
        for section in self.sections:
            if section.role not in ("reference", "query"):
                raise InputError(f"dataset {self.name}, section {section.name}: role {section.role!r} "
                                 "is neither 'reference' nor 'query'")
        if not any(section.role == "reference" for section in self.sections):
            raise InputError(f"dataset {self.name}: no section has the role 'reference': nothing to learn from")

    @property
    def raw(self):
        """Where the raw files are looked for unless `--raw` says otherwise."""
        return ROOT / "GSE" / self.name


def has_script(dataset):
    """Whether a preprocess script is called like the dataset."""
    return (SCRIPTS / f"preprocess_{dataset}.py").exists()


def run_name(panel_type, protocol):
    """The stem that tells a panel's files, and a model's, from another's: `heg`, `hvg`, `heg_paper`, `hvg_paper`."""
    return panel_type if protocol == "strict" else f"{panel_type}_{protocol}"


class Processed:
    """The processed files of one dataset: paths for the stage that writes them, contents for those that read."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.folder = ROOT / "GSE" / dataset / "processed"
        self.sections_path = self.folder / "sections.csv"
        self.command_path = self.folder / "command.txt"  # for datasets without a script of their own

    def section_path(self, section):
        return self.folder / f"{section}.h5ad"

    def patches_path(self, section):
        return self.folder / f"{section}.patches.npy"

    def panel_path(self, name):
        return self.folder / f"panel_{name}.csv"

    def corrected_path(self, section, name):
        """Harmony-corrected expression of the panel, for the paper protocol: float32 (n_spots, G)."""
        return self.folder / f"{section}.{name}.npy"

    def need(self, path):
        """`path`, or an error that says which command makes it."""
        if path.exists():
            return path
        if not has_script(self.dataset) and not self.command_path.exists():
            known = sorted(script.stem.removeprefix("preprocess_") for script in SCRIPTS.glob("preprocess_*.py"))
            known.remove("custom")
            raise InputError(f"{path} is missing, and no preprocess script is called {self.dataset}. "
                             f"--dataset takes {', '.join(known)}, or one that you make from a sample sheet: "
                             f"python code/preprocess_custom.py SHEET --name {self.dataset}")
        paper = " --protocol paper" if path.stem.endswith("_paper") and " paper" not in self.command else ""
        raise InputError(f"{path} is missing. Make it with: {self.command}{paper}")

    @property
    def command(self):
        """The command that makes these files."""
        if has_script(self.dataset) or not self.command_path.exists():
            return f"python code/preprocess_{self.dataset}.py"
        return self.command_path.read_text().strip()

    def sections(self):
        """The section table: index section; columns donor, role, n_spots, n_genes, mpp, patch_px, crop_px, ...

        crop_px: side, in full-resolution pixels, of what each patch of patch_px x patch_px pixels shows.
        """
        table = pd.read_csv(self.need(self.sections_path), dtype={"section": str, "donor": str}, index_col="section")
        if not table.index.is_unique:
            raise InputError(f"{self.sections_path} names a section twice. Make it anew with the preprocess script")
        if "crop_px" not in table:  # written before patches could be resampled
            table["crop_px"] = table["patch_px"]
        return table

    def read(self, section):
        """One section as AnnData: spots x all genes, X log-normalised (CSR float32), layers["counts"]."""
        import anndata

        path = self.need(self.section_path(section))
        try:
            return anndata.read_h5ad(path)
        except Exception as error:  # HDF5 raises many kinds
            raise InputError(f"{path} is damaged ({first_line(error)}). Delete it and run "
                             f"{self.command} again") from error

    def panel(self, name):
        """The gene panel: index gene id; columns symbol, marker, rank_<section> ...; attrs: how it was chosen."""
        path = self.need(self.panel_path(name))
        try:
            with open(path) as file:
                how = json.loads(file.readline().removeprefix("#"))
                panel = pd.read_csv(file, index_col="gene_id", keep_default_na=False)
            how["markers"]  # absent from panels of an early version
        except (ValueError, KeyError) as error:
            raise InputError(f"{path} is not a panel written by preprocess ({first_line(error)}). "
                             f"Run {self.command} again") from None
        panel.attrs = how
        return panel

    def roles(self, query=None):
        """(reference, query): lists of section names, as the section table has it, or with `query` held out instead."""
        table = self.sections()
        if query is None:
            query = list(table.index[table["role"] == "query"])
        if absent := [name for name in query if name not in table.index]:
            raise InputError(f"--query {absent[0]}: {self.sections_path} has no such section, but "
                             f"{', '.join(table.index)}")
        reference = [name for name in table.index if name not in query]
        if not reference:
            raise InputError(f"--query {' '.join(query)}: no section is left to learn from")
        return reference, query

    def genes(self, section):
        """The gene table of a section (see `expression.gene_statistics`), without its matrices."""
        import anndata
        import h5py

        path = self.need(self.section_path(section))
        try:
            with h5py.File(path) as file:
                return anndata.io.read_elem(file["var"])
        except Exception as error:  # HDF5 raises many kinds
            raise InputError(f"{path} is damaged ({first_line(error)}). Delete it and run "
                             f"python code/preprocess_{self.dataset}.py again") from error

    def panel_for(self, name, reference):
        """The panel of that name, chosen by these reference sections: as on disk, or anew if others chose that one.

        The paper protocol's is chosen by all sections, whichever is held out.
        """
        panel = self.panel(name)
        if name.endswith("_paper") or panel.attrs["sections"] == reference:
            return panel
        from .expression import choose_panel

        genes = {section: self.genes(section) for section in self.sections().index}
        anew = choose_panel(panel.attrs["type"], {section: genes[section] for section in reference},
                            panel.attrs["n_top"], present_in=[table.index for table in genes.values()])
        anew.insert(1, "marker", anew["symbol"].isin(panel.attrs["markers"]))
        anew.attrs = panel.attrs | {"sections": reference}
        return anew

    def panel_from(self, file, name, section):
        """The genes of a CSV (ids in its first column), in its order, as a panel; all else as in the panel `name`.

        section: where the genes' symbols are looked up.
        """
        if name.endswith("_paper"):
            raise InputError("--panel_file with --protocol paper: its corrected expression is that of its own panel. "
                             "Leave one of them out")
        try:
            ids = pd.read_csv(file, comment="#", dtype=str, index_col=0, keep_default_na=False).index
        except (OSError, ValueError) as error:
            raise InputError(f"--panel_file {file}: {first_line(error)}. It takes a CSV with a header, gene ids in the "
                             "first column") from None
        genes, how = self.genes(section), self.panel(name).attrs
        if len(missing := ids.difference(genes.index)) or not ids.is_unique or not len(ids):
            raise InputError(f"--panel_file {file}: " + (f"{len(missing)} of its {len(ids)} genes, {missing[0]!r} "
                             f"first, are not in {self.section_path(section)}" if len(missing) else "a gene stands in "
                             "it twice" if len(ids) else "it holds no genes") + ". Its first column must be gene ids")
        panel = pd.DataFrame({"symbol": genes.loc[ids, "symbol"]}, index=ids).rename_axis("gene_id")
        panel.insert(1, "marker", panel["symbol"].isin(how["markers"]))
        panel.attrs = how | {"sections": [], "file": str(file)}
        return panel

    def expression(self, section, name, panel, adata=None):
        """What the model is trained on and scored against: float32 (n_spots, G), columns in panel order."""
        if name.endswith("_paper"):
            return np.load(self.need(self.corrected_path(section, name)))
        adata = self.read(section) if adata is None else adata
        missing = panel.index.difference(adata.var_names)
        if len(missing):
            raise InputError(f"{self.panel_path(name)} holds {len(missing)} genes that {self.section_path(section)} "
                             f"lacks, {missing[0]} first. Run {self.command} again")
        return adata[:, panel.index].X.toarray().astype(np.float32, copy=False)

    def patches(self, section):
        """uint8 (n_spots, patch_px, patch_px, 3) RGB, opened as a memory map; row i is row i of the section."""
        path = self.need(self.patches_path(section))
        try:
            return np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise InputError(f"{path} is damaged ({first_line(error)}). Delete it and run "
                             f"{self.command} again") from None


class Run:
    """Where one model's files go. With `save_path` all of it goes below that folder, so runs can stand side by side."""

    def __init__(self, dataset, name, save_path=None):
        save = Path(save_path) if save_path else ROOT / "save"
        self.dataset, self.name = dataset, name
        self.top = save if save_path else ROOT
        self.folder = save / dataset
        self.checkpoint = self.folder / f"{name}_best.pt"
        self.last = self.folder / f"{name}_last.pt"
        self.losses = self.folder / f"{name}_losses.csv"
        self.prediction = self.folder / f"{name}_prediction.h5ad"
        self.genes = self.folder / f"{name}_genes.csv"
        self.scores = self.folder / f"{name}_scores.json"

    def embeddings(self, section):
        return self.top / "ebd" / self.dataset / self.name / f"{section}.npz"

    def figure(self, kind):
        return self.top / "figure" / kind / f"{self.dataset}_{self.name}.{'png' if kind in ('MAP', 'CAL') else 'pdf'}"


def first_line(error):
    """The first line of an error's text, for use inside another error."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
