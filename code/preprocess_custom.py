"""Your own sections, listed in a sample sheet: see the README, 'Your own data'.

    python code/preprocess_custom.py mydata.csv --check     # read everything, write nothing
    python code/preprocess_custom.py mydata.csv             # prepare the dataset mydata

The second command prepares the sections for `main.py --dataset mydata`.
"""

import argparse
from pathlib import Path

from heclip import command
from heclip.dataset import Dataset, has_script
from heclip.files import InputError
from heclip.script import add_flags


def parse(argv=None):
    flags = argparse.ArgumentParser(
        description="Prepare the sections of a sample sheet for training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("sheet",
                       help="CSV with the columns section, counts, donor, role, and image, "
                            "positions, mpp, pitch, scale, bin, part where they apply; paths are "
                            "relative to it")
    flags.add_argument("--name", help="name of the dataset; default: that of the sheet")
    flags.add_argument("--n_hvg", type=command.positive, default=1000,
                       help="number of variable genes that each section adds")
    flags.add_argument("--n_heg", type=command.positive, default=3200,
                       help="number of expressed genes that each section adds")
    flags.add_argument("--markers", nargs="+", default=(), metavar="SYMBOL",
                       help="genes to score and map by name")
    flags.add_argument("--symbols", type=Path, default=(), metavar="FILE",
                       help="table with the columns gene_id and gene_name, for counts without "
                            "symbols")
    flags.add_argument("--min_counts", type=int, default=0,
                       help="drop spots with fewer counts in total")
    add_flags(flags, Dataset.patch_px)
    return flags.parse_args(argv)


if __name__ == "__main__":
    command.run(parse)  # a wrong flag is answered here: the imports below take seconds

import shlex
import sys

from heclip import preprocess, sheet


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    path = Path(args.sheet)
    name = args.name or path.stem
    if has_script(name) or not name or name[0] == "." or set(name) & set("/\\"):
        raise InputError(f"a dataset cannot be called {name!r}, because another dataset has this "
                         "name or no folder can have it. Choose one with --name")

    sections, problems, ignored = sheet.read_sheet(path)
    gene_problems = [] if args.check else problems  # --check reads the genes again and reports then
    sections, changes = sheet.share_genes(sections, gene_problems, args.symbols)
    if args.check:
        notes = [f"genes: {line}" for line in changes]
        if ignored:
            notes.append(f"columns not used: {', '.join(ignored)}")
        cut = sheet.Cut(args.patch_px, args.patch_um, args.min_counts)
        sheet.report(path, sections, cut, problems, notes)
    elif problems:
        more = ""
        if len(problems) > 1:
            more = f". And {len(problems) - 1} more: --check lists them all"
        raise InputError(f"{path}, {problems[0]}{more}")
    else:
        for line in changes:
            print(f"genes: {line}")
        words = [args.sheet, *(word for word in argv if word != args.sheet)]  # the sheet first
        paths = (args.sheet, str(args.symbols))
        full = [str(Path(word).resolve()) if word in paths else word for word in words]
        again = shlex.join(["python", "code/preprocess_custom.py", *full])
        dataset = Dataset(name, sections, args.n_hvg, args.n_heg, markers=tuple(args.markers),
                          symbols=args.symbols, min_counts=args.min_counts, command=again,
                          patch_um=args.patch_um, patch_px=args.patch_px)
        preprocess.prepare(dataset, None, args.protocol, args.workers, args.section)


if __name__ == "__main__":
    command.run(main)
