"""spatialLIBD_1: human dorsolateral prefrontal cortex, Visium, 4 sections of 33,538 genes.

All sections are of one donor. Source: LieberInstitute/HumanPilot; Maynard et al., Nat Neurosci 24
(2021). See the README, 'The datasets'.
"""

from heclip.command import run
from heclip.dataset import Dataset, Section
from heclip.script import preprocess

DATASET = Dataset(
    name="spatialLIBD_1",
    sections=[
        Section(
            name=name,
            donor=donor,
            role="query" if name == "151509" else "reference",
            n_spots=n_spots,
            counts=[f"data/filtered_expression_matrices/{slot}/*matrix.mtx",
                    f"**/{name}_filtered_feature_bc_matrix.h5"],
            positions=[f"data/tissue_pos_matrices/tissue_positions_list_{slot}.txt",
                       f"**/{name}/tissue_positions_list.txt",
                       f"**/{name}_tissue_positions_list.txt"],
            image=[f"**/{name}_full_image.tif"],
        )
        for slot, name, donor, n_spots in [
            (1, "151507", "Br5292", 4226),
            (2, "151508", "Br5292", 4384),
            (3, "151509", "Br5292", 4789),
            (4, "151510", "Br5292", 4634),
        ]
    ],
    n_hvg=1000,
    n_heg=3200,
)


def main(argv=None):
    preprocess(DATASET, argv)


if __name__ == "__main__":
    run(main)

# Expected: 0.7251, 0.7251, 0.7186 and 0.7212 µm per pixel; 4226, 4384, 4789 and 4634 spots. The
# published panels have 3376 (hvg) and 3468 (heg) genes. They were chosen with the matrix of another
# section in place of that of 151507, so ours may differ.
