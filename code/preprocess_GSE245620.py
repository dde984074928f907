"""GSE245620: human liver with primary sclerosing cholangitis, Visium, 4 sections of 36,601 genes.

The donor is PSC011. Source: GEO GSE245620; Andrews et al., J Hepatol 80 (2024). See the README,
'The datasets'. The matrices hold all 4,992 spots of the array, including those on glass; only those
under tissue are used.
"""

from heclip.command import run
from heclip.dataset import Dataset, Section
from heclip.script import preprocess

DATASET = Dataset(
    name="GSE245620",
    sections=[
        Section(
            name=f"PSC011_{area}",
            donor="PSC011",
            role="query" if area == "C1" else "reference",
            n_spots=n_spots,
            counts=[f"data/filtered_expression_matrices/{slot}/*matrix.mtx",
                    f"**/{sample}_*matrix.mtx"],
            positions=[f"**/{sample}_*tissue_positions_list.csv"],
            image=[f"**/{sample}_GEX_PSC011-4_{area}_Merged.tif",
                   f"**/{sample}_*{area}_Merged.tiff"],
        )
        for slot, area, sample, n_spots in [
            (1, "A1", "GSM7845914", 3118),
            (2, "B1", "GSM7845915", 2670),
            (3, "C1", "GSM7845916", 3322),
            (4, "D1", "GSM7845917", 3174),
        ]
    ],
    n_hvg=1000,
    n_heg=3200,
)


def main(argv=None):
    preprocess(DATASET, argv)


if __name__ == "__main__":
    run(main)

# Expected: 3118, 2670, 3322 and 3174 spots. The published panels (3508 hvg, 3403 heg genes) were
# chosen on twice-logged values and with the spots on glass, so ours differ.
