"""MOB: mouse olfactory bulb, legacy Spatial Transcriptomics arrays, 4 sections of 2 animals.

A small dataset of real sections. Source: github.com/jbergenstrahle/STUtility, commit 9a8f421,
inst/extdata (MIT). See the README, 'The datasets'.
"""

from heclip.command import run
from heclip.dataset import Dataset, Section
from heclip.script import preprocess

DATASET = Dataset(
    name="MOB",
    sections=[
        Section(
            name=name,
            donor=donor,
            role="query" if name == "MOB3" else "reference",
            n_spots=n_spots,
            counts=[f"**/{name}.tsv"],
            positions=[f"**/alignment_table_{name}.tsv"],
            image=[f"**/{name}.jpg"],
        )
        for name, donor, n_spots in [
            ("MOB1", "animal 1", 379),
            ("MOB2", "animal 1", 407),
            ("MOB3", "animal 2", 438),
            ("MOB4", "animal 2", 403),
        ]
    ],
    n_hvg=500,
    n_heg=1000,
    markers=("Penk", "Pcp4", "Nrgn", "Kcnb2", "Cpne4"),  # their patterns show the bulb's layers
    symbols=("**/mouse_genes.tsv",),
    pitch_um=200,
    spot_um=100,
    patch_px=56,  # 350 µm, because a pixel of the slide is 6.3 µm wide
    min_counts=100,
)


def main(argv=None):
    preprocess(DATASET, argv)


if __name__ == "__main__":
    run(main)
