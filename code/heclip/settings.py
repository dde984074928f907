"""Every setting of training and prediction: its meaning, its default, and the recipes.

Each field of `Training` is a flag of main.py. Each field of `Predicting` is a flag of infer.py. A
recipe is one instance of each. `heclip` is ours. `published` is HECLIP as released, for both of its
types. `clip`, `bleep` and `regression` are methods to compare with. LAB.md has the experiments
behind the numbers. This module imports nothing heavy, so that a wrong flag is answered at once.
"""

import argparse
import json
from dataclasses import asdict, dataclass, field, fields, replace

from . import command
from .files import InputError

HELP = argparse.ArgumentDefaultsHelpFormatter
SWITCH = argparse.BooleanOptionalAction
# Fields of Training that do not change the model.
WHERE_IT_RUNS = ("device", "compile", "resume", "overwrite", "save_path")


def flag(default, help, **options):
    """A field that is also a flag. options: further arguments of argparse's add_argument."""
    return field(default=default, metadata={"help": help, **options})


@dataclass(frozen=True)
class Training:
    """How a model is trained, and on what. The defaults are the recipe `heclip`.

    Raises InputError for values that contradict each other.
    """

    # The data.
    dataset: str = flag("GSE240429", "a dataset that a preprocess script has prepared")
    type: str = flag(
        "heg",
        "heg: images and highly expressed genes meet in 256 dimensions; hvg: images are embedded "
        "into the space of the highly variable genes",
        choices=["heg", "hvg"])
    panel: str | None = flag(
        None, "genes of the other type; default: those of --type", choices=["heg", "hvg"])
    query: tuple | None = flag(
        None, "hold out these sections; default: those with the role query. The others are the "
        "reference, and choose the panel", nargs="+", metavar="SECTION")
    protocol: str = flag(
        "strict", "strict: the query section chooses and corrects nothing; paper: panel and "
        "Harmony over all sections, as published (preprocess with it too)",
        choices=["strict", "paper"])

    # The recipe. Gains are in mean Pearson over all genes of MOB2 and MOB4, each predicted from the
    # other.
    recipe: str = flag(
        "heclip", "sets the loss and the flags from --temperature to --wd",
        choices=["heclip", "published", "clip", "bleep", "regression"])
    loss: str = "image_centric"  # no flag, because temperature and rates of a recipe belong to it
    # 4 instead of 1: .342 to .350. At 1 the soft targets are almost one-hot.
    temperature: float = flag(4.0, "of the loss", type=command.above_zero)
    # A linear layer predicts expression itself. Weight 10: .350 to .363; weight 30: .004 more.
    expression_loss: float = flag(
        30.0, "weight of a second loss: the squared error of a layer that predicts expression "
        "itself. It teaches the encoder and is not used to predict",
        type=command.not_negative, metavar="WEIGHT")
    pixels: str = flag(
        "standardised", "standardised as the encoder was pretrained, or 0 to 255 and blue first, "
        "as published", choices=["standardised", "raw_bgr"])
    # With the cosine schedule: .338 to .342. Stain and scanner differ between sections.
    colour_jitter: float = flag(
        0.1, "random stain: each colour channel times 1 ± X, plus up to ± 80 X",
        type=command.not_negative, metavar="X")
    # With the expression loss at 30: .387 to .389, and .391 to .396 with centred retrieval.
    mixup: float = flag(
        0.4, "mix patches and their expression in pairs, in shares drawn from Beta(A, A); 0: none",
        type=command.not_negative, metavar="A")
    schedule: str = flag(
        "cosine", "cosine: the learning rate warms up over a twentieth of the steps and falls to "
        "zero", choices=["cosine", "constant"])
    lr: float = flag(1e-3, "learning rate of AdamW for the heads", type=command.not_negative)
    # 1e-4 and 3e-4 for the encoder were clearly worse than 1e-3.
    encoder_lr: float | None = flag(
        None, "learning rate of the encoder; default: that of the heads", type=command.not_negative)
    wd: float = flag(1e-3, "weight decay of AdamW", type=command.not_negative)

    # Length and split.
    max_epochs: int = flag(15, "passes over the training spots", type=command.positive)
    batch_size: int = flag(128, "patches per step, over all processes", type=command.positive)
    val_fraction: float = flag(
        0.2, "share of the reference spots held out for validation; 0: train on all, save the "
        "last epoch", type=command.fraction)
    seed: int = flag(42, "same seed, same result", type=command.seed)

    # The encoder.
    encoder: str = flag(
        "resnet50", "any timm model, hf-hub:OWNER/NAME or local-dir:FOLDER; tf_efficientnet_lite0 "
        "suits a CPU")
    encoder_args: dict | None = flag(  # noqa: RUF009 (a field, which `flag` makes)
        None, """further arguments of timm.create_model, such as '{"global_pool": "avg"}'""",
        type=json.loads, metavar="JSON")
    encoder_weights: str | None = flag(
        None, "local state dict of timm or torchvision", metavar="FILE")
    pretrained: bool = flag(
        True, "start from ImageNet weights; --no-pretrained: from scratch", action=SWITCH)
    freeze: bool = flag(
        False, "leave the encoder as pretrained and train the heads on its features, which are "
        "computed once and saved in GSE/<dataset>/processed/features; changes other defaults, see "
        "heclip/settings.py", action="store_true")
    image_size: int | None = flag(
        None, "side of the encoder's input; default: the patch's own",
        type=command.positive, metavar="PX")

    # Where and how it runs. These do not change the model.
    device: str = flag("auto", command.DEVICE_HELP)
    compile: bool | None = flag(
        None, "compile the encoder: a minute at first, then faster; default: on CUDA GPUs",
        action=SWITCH)
    resume: bool = flag(
        False, "continue after the last finished epoch of the same run; start it if there is none",
        action="store_true")
    overwrite: bool = flag(
        False, "replace a model that was trained in another way", action="store_true")
    save_path: str | None = flag(None, command.SAVE_PATH_HELP, metavar="DIR")

    def __post_init__(self):
        if self.freeze and self.colour_jitter:
            raise InputError(
                f"--colour_jitter {self.colour_jitter} with --freeze: features are computed once, "
                "from the colours as they are. Leave one of them out")
        if self.freeze and not self.pretrained:
            raise InputError("--freeze with --no-pretrained: nothing would ever train the encoder. "
                             "Leave one of them out")
        if self.encoder_weights and not self.pretrained:
            raise InputError("--encoder_weights with --no-pretrained: one asks for weights, the "
                             "other for none. Leave one of them out")

    @property
    def panel_type(self):
        """The type of the genes that are predicted: "heg" or "hvg"."""
        return self.panel or self.type

    @property
    def encoder_rate(self):
        """The learning rate of the encoder."""
        return self.lr if self.encoder_lr is None else self.encoder_lr

    def differences(self, earlier, also_free=()):
        """The settings that change the model and differ from those of `earlier`, a list of texts.

        also_free: further settings that may differ.
        """
        free = {*WHERE_IT_RUNS, *also_free}
        return [f"--{name} was {getattr(earlier, name)}, is {value}"
                for name, value in vars(self).items()
                if name not in free and value != getattr(earlier, name)]


@dataclass(frozen=True)
class Predicting:
    """How a model predicts. The defaults are the recipe `heclip`. Gains are as in `Training`."""

    # One kind at 8 views: .366; both: .367, and +.01 on the genes that are expressed or vary most.
    retrieval: str = flag(
        "both", "the query's patches are compared with the expression of the reference spots "
        "(gene), with their images (image), or with both. With both, each is scored alone too",
        choices=["gene", "image", "both"])
    k: int = flag(50, "reference spots averaged for each query spot; with both, K of each",
                  type=command.positive)
    # .389 to .396.
    centre: bool = flag(
        True, "subtract the mean of their section, which stain and batch move, from embeddings "
        "before they are compared", action=SWITCH)
    # 1 to 8: .350 to .366.
    views: int = flag(8, "symmetries of each patch whose embeddings are averaged",
                      type=int, choices=[1, 2, 4, 8])
    # 0 to .5: .367 to .372.
    smoothing: float = flag(
        0.5, "width of a Gaussian over neighbouring spots of the prediction, in spot pitches; "
        "0: none", type=command.not_negative, metavar="PITCHES")


# ------------------------------------------------------------------------------------------ recipes

WITHOUT_AUXILIARIES = replace(Training(), expression_loss=0.0, mixup=0.0)

TRAINING = {
    "heclip": Training(),
    "published": replace(WITHOUT_AUXILIARIES, recipe="published", temperature=1.0, pixels="raw_bgr",
                         colour_jitter=0.0, schedule="constant"),
    # Radford et al., ICML 2021: cosine similarity, both directions, a temperature that is learned.
    "clip": replace(WITHOUT_AUXILIARIES, recipe="clip", loss="clip", temperature=0.1,
                    encoder_lr=1e-4),
    # Xie et al. (BLEEP), NeurIPS 2023: both directions, targets smoothed by both similarities.
    "bleep": replace(WITHOUT_AUXILIARIES, recipe="bleep", loss="bleep", temperature=1.0),
    # The idea of He et al. (ST-Net), Nat Biomed Eng 4 (2020): the encoder is fine-tuned to predict
    # expression itself.
    "regression": replace(WITHOUT_AUXILIARIES, recipe="regression", loss="regression"),
}

AS_PUBLISHED = Predicting(retrieval="image", centre=False, views=1, smoothing=0.0)

PREDICTING = {
    "heclip": Predicting(),
    "published": AS_PUBLISHED,
    "clip": replace(AS_PUBLISHED, retrieval="gene"),
    "bleep": replace(AS_PUBLISHED, retrieval="gene"),
    "regression": AS_PUBLISHED,  # only views and smoothing are used; nothing is retrieved
}

# The changes of --freeze to every recipe. Epochs are short, colours cannot vary, and a second loss
# would have no encoder to teach.
FROZEN = {"colour_jitter": 0.0, "mixup": 0.0, "expression_loss": 0.0, "max_epochs": 40}


def recipe_settings(name, freeze=False):
    """The Training of a recipe; with `freeze`, for an encoder that stays as it was pretrained."""
    return replace(TRAINING[name], freeze=True, **FROZEN) if freeze else TRAINING[name]


# -------------------------------------------------------------------------------------------- flags


def add_flags(parser, defaults, names=None):
    """Add a flag for each field of `defaults`, settings whose values are shown as the defaults.

    names: names of the fields; None: all that are flags.
    """
    for item in fields(defaults):
        if item.metadata and (names is None or item.name in names):
            default = getattr(defaults, item.name)
            parser.add_argument(f"--{item.name}", default=default, **item.metadata)


def parse_training(argv=None):
    """The command line of main.py as Training. A flag overrides its recipe at any position.

    Raises InputError for settings that contradict each other.
    """
    parser = argparse.ArgumentParser(
        description="Train HECLIP on the reference sections of a dataset.", formatter_class=HELP,
        allow_abbrev=False)
    add_flags(parser, Training())
    asked = parser.parse_known_args(argv)[0]
    recipe = recipe_settings(asked.recipe, asked.freeze)
    parser.set_defaults(**asdict(recipe))
    given = vars(parser.parse_args(argv))
    if given["query"]:
        given["query"] = tuple(given["query"])
    if recipe.loss == "regression" and given["temperature"] != recipe.temperature:
        raise InputError(f"--temperature {given['temperature']} with --recipe regression: a "
                         "squared error has no temperature. Leave one of them out")
    return Training(**given)


def add_predicting_flags(parser):
    """Add the flags of `Predicting`. Each is None if it is not given, and the recipe decides."""
    for item in fields(Predicting):
        parser.add_argument(f"--{item.name}", **item.metadata)


def predicting(recipe, given):
    """The Predicting of a recipe, changed by the values of the dict `given` that are not None."""
    names = {item.name for item in fields(Predicting)}
    chosen = {name: value for name, value in given.items() if name in names and value is not None}
    return replace(PREDICTING[recipe], **chosen)
