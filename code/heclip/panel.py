"""The gene panel: the genes that a model predicts, and how these were chosen."""

import io
import json
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from .files import InputError, atomic_path, first_line
from .limits import open_text, read_text

RANKED_BY = {"hvg": "dispersion", "heg": "mean"}  # columns of a section's gene table
LINE = 1 << 20  # characters of a panel's first line, which lists the markers
IN_WORDS = {"hvg": "normalised dispersion", "heg": "mean log-normalised expression"}


@dataclass(frozen=True)
class Panel:
    """G genes, in the order of every matrix of spots x panel.

    kind: "hvg" or "heg". protocol: "strict", chosen by reference sections only, or "paper", by all.
    genes: DataFrame; index gene_id; columns symbol, marker (bool), rank_<section> (1 is highest).
    sections: names of those that chose it; none for a given list of genes.
    n_top: number of genes that each section contributed. markers: symbols that are scored by name.
    """

    kind: str
    protocol: str
    genes: pd.DataFrame
    sections: list
    n_top: int
    markers: list

    def __len__(self):
        return len(self.genes)

    @property
    def ids(self):
        """Gene ids, a pandas Index of length G."""
        return self.genes.index

    @property
    def is_marker(self):
        """Which genes are markers: bool (G,)."""
        return self.genes["marker"].to_numpy()

    @property
    def name(self):
        """The stem of the panel's file name."""
        return run_name(self.kind, self.protocol)

    @property
    def absent(self):
        """Markers that are no genes of the panel: sorted symbols."""
        return sorted(set(self.markers) - set(self.genes["symbol"]))

    def write(self, path):
        """Write the panel as CSV by gene id. The first line says how it was chosen."""
        how = {"type": self.kind, "protocol": self.protocol, "sections": list(self.sections),
               "n_top": self.n_top, "ranked_by": IN_WORDS[self.kind], "markers": list(self.markers),
               "markers_not_in_panel": self.absent}
        with atomic_path(path) as temporary, open(temporary, "w") as file:
            file.write(f"# {json.dumps(how)}\n")
            self.genes.to_csv(file)


def run_name(kind, protocol):
    """The stem of a panel's and of a model's file names: heg, hvg, heg_paper or hvg_paper."""
    return kind if protocol == "strict" else f"{kind}_{protocol}"


def read_panel(path):
    """Read what `Panel.write` wrote. Raises InputError if the file is anything else."""
    try:
        with open_text(path, LINE) as file:
            how = json.loads(file.readline().removeprefix("#"))
            genes = pd.read_csv(file, dtype={"gene_id": str, "symbol": str}, keep_default_na=False)
        panel = Panel(how["type"], how["protocol"], genes.set_index("gene_id"), how["sections"],
                      how["n_top"], how["markers"])
        check_panel(panel)
        return panel
    except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not a panel that a preprocess script wrote "
                         f"({first_line(error)}). Run that script again") from None


def check_panel(panel):
    """Raise ValueError if a panel that was read is not what `Panel` describes."""
    texts = [*panel.sections, *panel.markers]
    if not all(isinstance(name, str) for name in texts) or not isinstance(panel.n_top, int):
        raise ValueError("its first line is damaged")
    if panel.kind not in RANKED_BY or panel.protocol not in ("strict", "paper"):
        raise ValueError(f"it is of kind {panel.kind} and protocol {panel.protocol}")
    if not len(panel) or not panel.ids.is_unique:
        raise ValueError("it holds no genes, or one twice")
    if "symbol" not in panel.genes:
        raise ValueError("it lacks symbols")
    ranks = panel.genes.filter(regex="^rank_")
    if panel.is_marker.dtype != bool or any(kind.kind != "i" for kind in ranks.dtypes):
        raise ValueError("its markers or ranks are damaged")


def choose_panel(kind, genes, n_top, present_in=(), markers=(), protocol="strict"):
    """The union over sections of each section's top genes (Li et al. call these HVG and HEG).

    kind: "hvg" ranks by normalised dispersion, over all genes; "heg" ranks by mean log-normalised
    expression, over the genes that are expressed in every section.
    genes: section -> its `var` table (see `expression.gene_statistics`).
    present_in: further lists of gene ids, such as the query's. A gene must be in each of them. They
    contribute names only, because the query must not choose.
    Genes are in the order of the first section. Raises InputError if no gene is left.
    """
    first = next(iter(genes.values()))
    candidates = first.index
    for ids in [table.index for table in genes.values()] + list(present_in):
        candidates = candidates[candidates.isin(ids)]
    if kind == "heg":
        for table in genes.values():
            candidates = candidates[table.loc[candidates, "n_expressed"].to_numpy() > 0]

    symbol = first.loc[candidates, "symbol"]
    table = pd.DataFrame({"symbol": symbol, "marker": symbol.isin(markers)}, index=candidates)
    chosen = np.zeros(len(candidates), bool)
    for name, statistics in genes.items():
        value = statistics.loc[candidates, RANKED_BY[kind]]
        rank = value.rank(ascending=False, method="first", na_option="bottom").astype(int)
        chosen |= ((rank <= n_top) & value.notna()).to_numpy()
        table[f"rank_{name}"] = rank
    if not chosen.any():
        raise InputError(
            f"the {kind} panel of {', '.join(genes)} is empty: they share {len(candidates)} "
            "candidate genes. Check that all sections use the same gene ids")
    table = table[chosen].rename_axis("gene_id")
    return Panel(kind, protocol, table, list(genes), n_top, list(markers))


def given_panel(file, panel, genes):
    """A Panel with the genes of a CSV, in its order; all else is as in `panel`.

    file: a CSV with gene ids in its first column. genes: the gene table of a section, where their
    symbols are looked up.
    Raises InputError if the file holds no genes, one gene twice, or one that the section lacks.
    """
    try:
        content = io.StringIO(read_text(file))
        table = pd.read_csv(content, comment="#", dtype=str, keep_default_na=False)
        table = table.set_index(table.columns[0])
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise InputError(f"--panel_file {file}: {first_line(error)}. It takes a CSV with a header "
                         "and gene ids in the first column") from None
    ids = table.index
    missing = ids.difference(genes.index)
    if not len(ids):
        fault = "it holds no genes"
    elif not ids.is_unique:
        fault = f"it lists gene {ids[ids.duplicated()][0]!r} twice"
    elif len(missing):
        fault = f"{len(missing)} of its {len(ids)} genes are in no section, {missing[0]!r} first"
    else:
        symbol = genes.loc[ids, "symbol"]
        chosen = pd.DataFrame({"symbol": symbol, "marker": symbol.isin(panel.markers)}, index=ids)
        return replace(panel, genes=chosen.rename_axis("gene_id"), sections=[])
    raise InputError(f"--panel_file {file}: {fault}. Its first column must be gene ids")
