"""What every preprocess_<dataset>.py is: the facts of a dataset, its flags, then heclip.preprocess."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from . import command
from .files import InputError


def preprocess(dataset, argv=None, generate=None):
    """Prepare a dataset for main.py: patches, expression, gene panels, and a picture to check by eye.

    A section whose raw files and settings are unchanged is not read again. Sections are independent of
    each other: in other processes, or in other jobs on other machines, they give the same files.
    generate: called with the raw folder first, for a dataset that is made and not downloaded.
    """
    script = Path(sys.argv[0]).stem
    if script.startswith("preprocess_") and script != f"preprocess_{dataset.name}":
        raise InputError(
            f"{script}.py would prepare the dataset {dataset.name!r}, which preprocess_{dataset.name}.py "
            f"makes. Call it like the script: name={script.removeprefix('preprocess_')!r}")
    flags = argparse.ArgumentParser(description=f"Prepare {dataset.name} for training.",
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--raw", metavar="DIR", default=dataset.raw, type=Path,
                       help="folder of the raw files, as downloaded or as an old checkout arranged them")
    add_flags(flags, dataset.patch_px)
    args = flags.parse_args(argv)
    from .preprocess import prepare  # here, because it takes seconds, and a wrong flag should not

    if generate:
        generate(args.raw)
    dataset = replace(dataset, patch_um=args.patch_um, patch_px=args.patch_px)
    prepare(dataset, args.raw, args.protocol, args.workers, args.section)


def add_flags(flags, patch_px):
    """The flags that every preprocess script has."""
    flags.add_argument("--protocol", choices=["strict", "paper"], default="strict",
                       help="paper: also prepare the published panel and batch correction, over all "
                            "sections")
    flags.add_argument("--workers", type=command.positive, default=1,
                       help="processes to share the sections between; a single one prepares two at a "
                            "time")
    flags.add_argument("--section", nargs="+", metavar="NAME",
                       help="prepare these sections only, and no panel: for jobs that share the work. "
                            "When all are done, run once more without this flag")
    flags.add_argument("--patch_um", type=command.above_zero, metavar="UM",
                       help="side of the patches in microns, resampled to --patch_px: for sections of "
                            "different resolution. Default: --patch_px pixels of the image as they are")
    flags.add_argument("--patch_px", type=command.positive, default=patch_px,
                       help="side of the patches in pixels")
