r"""Convert a 10x h5 matrix to the mtx trio that the published pipeline reads.

    python GSE/std.py 151507_filtered_feature_bc_matrix.h5 \
        --out GSE/spatialLIBD_1/data/filtered_expression_matrices/1

Only other programs need this, because the preprocess scripts also read the h5 itself.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
import scipy.io

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))

from heclip import command
from heclip.files import atomic_path
from heclip.sources import read_counts


def main(argv=None):
    flags = argparse.ArgumentParser(
        description="Convert a 10x h5 matrix to matrix.mtx, barcodes.tsv and features.tsv.")
    flags.add_argument("h5", type=Path)
    flags.add_argument("--out", type=Path, metavar="DIR",
                       help="folder for the three files; default: that of the h5, whose name is "
                            "then their prefix")
    args = flags.parse_args(argv)

    adata = read_counts(args.h5)
    if args.out:
        folder, prefix = args.out, ""
    else:
        folder = args.h5.parent
        prefix = args.h5.stem.removesuffix("_filtered_feature_bc_matrix") + "_"
    features = pd.DataFrame({"symbol": adata.var["symbol"], "type": "Gene Expression"})
    with (atomic_path(folder / f"{prefix}matrix.mtx") as matrix,
          atomic_path(folder / f"{prefix}barcodes.tsv") as barcodes,
          atomic_path(folder / f"{prefix}features.tsv") as genes):
        with open(matrix, "wb") as file:
            scipy.io.mmwrite(file, adata.X.T.tocoo())  # genes x spots
        pd.Series(adata.obs_names).to_csv(barcodes, header=False, index=False)
        features.to_csv(genes, sep="\t", header=False)
    print(f"{adata.n_obs} spots x {adata.n_vars} genes in {folder / f'{prefix}matrix.mtx'} and the "
          "two tables next to it")


if __name__ == "__main__":
    command.run(main)
