"""What the scripts preprocess_<dataset>.py share: their flags, and the call that prepares."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from . import command
from .files import InputError


def preprocess(dataset, argv=None, generate=None):
    """Prepare a dataset for main.py: patches, expression, gene panels, and pictures to check.

    A section whose raw files and settings are unchanged is not read again. Sections are independent
    of each other, so other processes, or other jobs on other machines, make the same files.
    argv: the command line; None: that of the script. generate: a function that makes the raw files
    in the folder it is called with, for a dataset that is not downloaded. Raises InputError if the
    script has another name than the dataset, or as `prepare` does.
    """
    script = Path(sys.argv[0]).stem
    if script.startswith("preprocess_") and script != f"preprocess_{dataset.name}":
        raise InputError(
            f"{script}.py would prepare the dataset {dataset.name!r}, which belongs to "
            f"preprocess_{dataset.name}.py. Name it after the script: "
            f"name={script.removeprefix('preprocess_')!r}")
    flags = argparse.ArgumentParser(description=f"Prepare {dataset.name} for training.",
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--raw", metavar="DIR", default=dataset.raw, type=Path,
                       help="folder of the raw files, as downloaded, or in the arrangement of "
                            "older versions")
    add_flags(flags, dataset.patch_px)
    given = flags.parse_args(argv)
    # Imported here because it takes seconds, and a wrong flag should be answered at once.
    from .preprocess import prepare

    dataset = replace(dataset, patch_um=given.patch_um, patch_px=given.patch_px)
    if given.check:
        return check(dataset, given.raw)
    if generate:
        generate(given.raw)
    prepare(dataset, given.raw, given.protocol, given.workers, given.section)


def check(dataset, raw):
    """Print what there is of a dataset in the folder `raw`, and every problem; write nothing."""
    from . import preprocess, sheet, sources

    problems, sections = [], []
    for section in dataset.sections:
        files = {}
        for what in ("counts", "positions", "image"):
            with sheet.collecting(problems, section.name):
                files[what] = None
                files[what] = preprocess.find_file(dataset, section, raw, what)
        sections.append(replace(section, **files))
    if dataset.symbols:
        with sheet.collecting(problems, dataset.name):
            sources.read_symbols(sources.find(raw, dataset.symbols, "gene symbols"))
    cut = sheet.Cut(dataset.patch_px, dataset.patch_um, dataset.min_counts, dataset.pitch_um)
    sheet.report(raw, sections, cut, problems, [])


def add_flags(flags, patch_px):
    """The flags that every preprocess script has."""
    flags.add_argument("--check", action="store_true",
                       help="read everything, show what was found and every problem, and write "
                            "nothing")
    flags.add_argument("--protocol", choices=["strict", "paper"], default="strict",
                       help="paper: also prepare the published panel and batch correction, over "
                            "all sections")
    flags.add_argument("--workers", type=command.positive, default=1,
                       help="number of processes that share the sections; a single one prepares "
                            "two at a time")
    flags.add_argument("--section", nargs="+", metavar="NAME",
                       help="prepare these sections only, and no panel, for jobs that share the "
                            "work. When all are done, run once more without this flag")
    flags.add_argument("--patch_um", type=command.above_zero, metavar="UM",
                       help="side of the patches in microns, resampled to --patch_px, for sections "
                            "of different resolution. Default: --patch_px pixels of the image, not "
                            "resampled")
    flags.add_argument("--patch_px", type=command.positive, default=patch_px,
                       help="side of the patches in pixels")
