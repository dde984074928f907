"""GSE240429: human liver (healthy donor C73), Visium, 4 sections of 36,601 genes.

Source: GEO GSE240429; Andrews et al., J Hepatol 80 (2024). See the README, 'The datasets'. The
matrices on GEO may hold all 4,992 spots of the array; only those under tissue are used.
"""

from heclip.command import run
from heclip.dataset import Dataset, Section
from heclip.script import preprocess

DATASET = Dataset(
    name="GSE240429",
    sections=[
        Section(
            name=f"C73_{area}",
            donor="C73",
            role="query" if area == "C1" else "reference",
            n_spots=n_spots,
            counts=[f"data/filtered_expression_matrices/{slot}/*matrix.mtx",
                    f"**/{sample}_*matrix.mtx"],
            positions=[f"data/tissue_pos_matrices/tissue_positions_list_{slot}.csv",
                       f"**/{sample}_*tissue_positions_list.csv"],
            image=[f"**/*GEX_C73_{area}_Merged.tiff", f"**/*GEX_C73_{area}_Merged.tif"],
        )
        for slot, area, sample, n_spots in [
            (1, "A1", "GSM7697868", 2378),
            (2, "B1", "GSM7697869", 2349),
            (3, "C1", "GSM7697870", 2277),
            (4, "D1", "GSM7697871", 2265),
        ]
    ],
    n_hvg=1000,
    n_heg=3200,
    markers=("HAL", "CYP3A4", "VWF", "SOX9", "KRT7", "ANXA4", "ACTA2", "DCN"),
)


def main(argv=None):
    preprocess(DATASET, argv)


if __name__ == "__main__":
    run(main)

# Expected: 0.3036 µm per pixel; 2378, 2349, 2277 and 2265 spots. The published panels have
# 3467 (hvg) and 3511 (heg) genes. With --protocol paper our heg panel may differ, because theirs
# was chosen on twice-logged values.
