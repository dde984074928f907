"""Recipes: how a model is trained and how it predicts, by name.

Every entry is the default of a flag of main.py (TRAINING) or infer.py (PREDICTION), so that each can be changed alone.
`heclip` is ours, and what was tried for it stands in LAB.md; `published` is HECLIP as released, for both of its types;
`clip`, `bleep` and `regression` are what it is compared with. ModelConfig and loss.py say what the words mean.
"""

OURS = {
    "loss": "image_centric",
    "temperature": 4.0,
    "expression_loss": 30.0,
    "pixels": "standardised",
    "colour_jitter": 0.1,
    "mixup": 0.4,
    "schedule": "cosine",
    "lr": 1e-3,
    "encoder_lr": None,  # as the heads'
    "wd": 1e-3,
}
PLAIN = OURS | {"expression_loss": 0.0, "mixup": 0.0}
PUBLISHED = PLAIN | {"temperature": 1.0, "pixels": "raw_bgr", "colour_jitter": 0.0, "schedule": "constant"}

TRAINING = {
    "heclip": OURS,
    "published": PUBLISHED,
    # Radford et al., ICML 2021: cosine similarity, both directions, learned temperature, a gentler encoder.
    "clip": PLAIN | {"loss": "clip", "temperature": 0.1, "encoder_lr": 1e-4},
    # Xie et al. (BLEEP), NeurIPS 2023: both directions, targets smoothed by both similarities.
    "bleep": PLAIN | {"loss": "bleep", "temperature": 1.0},
    # He et al. (ST-Net), Nat Biomed Eng 4 (2020): the encoder is fine-tuned to predict expression itself.
    "regression": PLAIN | {"loss": "regression"},
}

AS_PUBLISHED = {"retrieval": "image", "k": 50, "centre": False, "views": 1, "smoothing": 0.0}
BETTER = {"retrieval": "both", "k": 50, "centre": True, "views": 8, "smoothing": 0.5}

PREDICTION = {
    "heclip": BETTER,
    "published": AS_PUBLISHED,
    "clip": AS_PUBLISHED | {"retrieval": "gene"},
    "bleep": AS_PUBLISHED | {"retrieval": "gene"},
    "regression": AS_PUBLISHED,  # its views and smoothing; nothing is retrieved
}

# What --freeze changes of any recipe, and of main.py's 15 epochs: they take a moment each, colours cannot vary, and a
# second loss has no encoder to teach.
FROZEN = {"colour_jitter": 0.0, "mixup": 0.0, "expression_loss": 0.0, "max_epochs": 40}
