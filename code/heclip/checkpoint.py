"""Trained models: their weights, and the facts that decide what they may be used on.

They are saved as plain values. Checkpoints of HECLIP's authors, which are bare state dicts, are
read too.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import torch

from .features import digest
from .files import InputError, atomic_path, first_line
from .limits import check_words, check_zip
from .model import HECLIP, ModelConfig, load_encoder_weights
from .panel import Panel, run_name
from .settings import TRAINING, Training

FORMAT = 4
LIBRARIES = ("torch", "timm", "numpy", "scanpy", "anndata")  # their versions are saved
KINDS = {  # of what a damaged file may hold other values
    "reference": dict | None, "patch_px": int, "patch_um": int | float | None, "epoch": int,
    "frozen": dict | None, "digest": str, "versions": dict, "validation": list | None}
SAME_WIDTH = 0.1  # patches whose widths differ by less, relatively, count as of the same scale


@dataclass
class Trained:
    """A model, and what it was trained on. `check` says what it may be used on.

    network: HECLIP; None if only its embeddings are at hand.
    settings: how it was trained.
    panel: its genes; None for a published checkpoint, which does not name them.
    reference: section -> digest of the section's raw files and settings; None if that is unknown.
    patch_px, patch_um: side of the patches it saw, in stored pixels and in microns of tissue (the
    mean over its sections; None if that is unknown).
    epoch: the epoch whose weights these are.
    validation: Pearson correlation per gene that the model reached on the validation spots, (G,),
    in training, without the query; None without validation spots.
    frozen: for an encoder that was not trained, {"weights": digest, "hub": its name on a hub or
    None}.
    digest: stands for the weights and the way pixels are prepared.
    versions: library -> version at training. path: the file it was read from.
    """

    network: HECLIP | None
    settings: Training
    panel: Panel | None
    reference: dict | None
    patch_px: int
    patch_um: float | None
    epoch: int = 0
    validation: list | None = None
    frozen: dict | None = None
    digest: str = ""
    versions: dict = field(default_factory=dict)
    path: Path | None = None

    @property
    def name(self):
        """The stem of the model's file names: heg, hvg, heg_paper or hvg_paper."""
        return run_name(self.settings.type, self.settings.protocol)

    @property
    def is_regression(self):
        """Whether the model predicts expression directly, so that nothing is retrieved."""
        return self.settings.loss == "regression"

    def facts(self):
        """Everything but the weights, as plain values that `from_facts` takes."""
        panel = self.panel and {
            "kind": self.panel.kind, "protocol": self.panel.protocol,
            "sections": list(self.panel.sections), "n_top": self.panel.n_top,
            "markers": list(self.panel.markers), "ids": list(self.panel.ids),
            "symbols": list(self.panel.genes["symbol"])}
        return {"format": FORMAT, "settings": asdict(self.settings), "panel": panel,
                "reference": self.reference, "patch_px": self.patch_px, "patch_um": self.patch_um,
                "epoch": self.epoch, "validation": self.validation, "frozen": self.frozen,
                "digest": self.digest, "versions": self.versions}

    def check(self, processed, query, width_um=None):
        """Raise InputError unless the model may predict `query` from its reference as it is now.

        processed: the dataset's files. query: a section's name, or None for a slide.
        width_um: side of the query's patches in microns; None: that of the section table.
        """
        origin, table = self.path, processed.sections()
        if self.reference is None:
            return
        if processed.dataset != self.settings.dataset:
            raise InputError(f"{origin} was trained on {self.settings.dataset}, not on "
                             f"{processed.dataset}. Give its own --dataset, or train again")
        if query in self.reference:
            raise InputError(f"{origin} was trained on {query}, which is now the query section. "
                             "Name one that was held out with --query, or train again")
        if absent := [section for section in self.reference if section not in table.index]:
            raise InputError(f"{origin} was trained on {', '.join(absent)}, which "
                             f"{processed.sections_path} lacks. Train again")
        changed = [section for section, made in self.reference.items()
                   if table.at[section, "digest"] != made]
        if changed:
            first = table.loc[changed[0]]
            raise InputError(
                f"{origin} was trained on patches of {self.patch_um:.0f} µm in {self.patch_px} px, "
                f"and {', '.join(changed)} was made again since, from other files or settings: "
                f"patches of {first['crop_px'] * first['mpp']:.0f} µm in {first['patch_px']} px. "
                "Preprocess as before, or train again")
        of_query = [query] if query in table.index else []
        processed.check_made_from([*self.reference, *of_query])
        if query is not None and width_um is None:
            width_um = table.at[query, "crop_px"] * table.at[query, "mpp"]
        if width_um is not None and abs(width_um / self.patch_um - 1) > SAME_WIDTH:
            raise InputError(
                f"{origin} was trained on patches of {self.patch_um:.0f} µm, but those of "
                f"{query} show {width_um:.0f} µm. Preprocess all sections with the same --patch_um")


def from_facts(facts, network=None, path=None):
    """The Trained that `Trained.facts` described."""
    facts = {key: value for key, value in facts.items() if key != "format"}
    settings = dict(facts.pop("settings"))
    if settings["query"]:
        settings["query"] = tuple(settings["query"])
    panel = facts.pop("panel")
    if panel is not None:
        ids = pd.Index(panel.pop("ids"), name="gene_id")
        genes = pd.DataFrame({"symbol": panel.pop("symbols")}, index=ids)
        genes["marker"] = genes["symbol"].isin(panel["markers"])
        panel = Panel(genes=genes, **panel)
    trained = Trained(network, Training(**settings), panel, path=path, **facts)
    for name, kind in KINDS.items():
        if not isinstance(getattr(trained, name), kind):
            raise ValueError(f"its {name} is {getattr(trained, name)!r}")
    return trained


def library_versions():
    """Version of each library that may change a result: name -> version."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # installed without a record of its version
            found[name] = "unknown"
    return found


def model_digest(network):
    """SHA-256 over the weights and the config, which says how pixels are prepared: hexadecimal."""
    config = json.dumps(asdict(network.config), sort_keys=True)
    return hashlib.sha256(f"{config} {digest(network)}".encode()).hexdigest()


# ---------------------------------------------------------------------------------- saving, loading


def save_checkpoint(path, trained):
    """Write a model with everything that `load_checkpoint` needs to check its use.

    A frozen encoder from a hub is left out, because it may be large and its terms may forbid
    passing it on. It is fetched again by its name, and checked by its digest.
    """
    network = trained.network
    described = replace(trained, digest=model_digest(network), versions=library_versions())
    from_hub = trained.frozen and trained.frozen["hub"]
    weights = heads(network) if from_hub else network.state_dict()
    with atomic_path(path) as temporary:
        torch.save({"model": weights, "config": asdict(network.config), **described.facts()},
                   temporary)


def heads(network):
    """The entries of a model's state that do not belong to its image encoder."""
    return {key: value for key, value in network.state_dict().items()
            if not key.startswith("image_encoder.")}


def load_checkpoint(path):
    """Read a checkpoint: a Trained whose network is on the CPU and in evaluation mode.

    Raises InputError if the file is missing, damaged or not a checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} is missing. Train it with main.py, with the same --dataset, "
                         "--type, --protocol and --save_path")
    try:
        saved = read(path)
        if is_published(saved):
            return load_published(saved, path)
        config, weights = ModelConfig(**saved["config"]), saved["model"]
        check_shapes(config, weights)
        network = HECLIP(config)
        trained = from_facts(only_facts(saved), network, path)
        if trained.frozen and trained.frozen["hub"]:
            weights = network_from_hub(trained) | weights
        network.load_state_dict(weights)
    except InputError:
        raise
    except Exception as error:  # a damaged file can fail anywhere
        raise InputError(f"{path} is not a checkpoint of main.py, or is damaged "
                         f"({first_line(error)}). Train again, or copy it again") from None
    network.eval()
    return trained


def check_shapes(config, weights):
    """Raise ValueError if weights are not those of a network of this config.

    No memory is taken for the network, because a damaged config may describe one of any size.
    """
    with torch.device("meta"):
        expected = HECLIP(config).state_dict()
    for name, value in weights.items():
        if name not in expected or value.shape != expected[name].shape:
            raise ValueError(f"its config does not fit its weights of {name}")


def network_from_hub(trained):
    """The state of a model whose frozen encoder is fetched from its hub, or read from the cache.

    Raises InputError if the weights are not those of the training.
    """
    network, name = trained.network, trained.frozen["hub"]
    load_encoder_weights(network.image_encoder, name, None, network.config.encoder_args)
    if digest(network.image_encoder) != trained.frozen["weights"]:
        raise InputError(f"{trained.path} was trained on other weights of {name} than the hub has "
                         "under that name now. Train again, or name the revision: --encoder "
                         "hf-hub:<owner>/<name>@<revision>")
    return network.state_dict()


def read(path):
    """The contents of a file that was saved here or by the published code.

    Raises ValueError if the file is damaged or has another format.
    """
    check_zip(path)
    check_words(path)
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if not is_published(saved) and saved["format"] != FORMAT:
        raise ValueError(f"format {saved['format']}, expected {FORMAT}")
    return saved


# ---------------------------------------------------------------------------- published checkpoints


def is_published(saved):
    """Whether this is a state dict of the published code.

    It has a layer that only the published code saves, and that is never used.
    """
    unused = ("spot_encoder.model.bias", "well_encoder.model.bias")
    return isinstance(saved, dict) and any(
        key.endswith(unused) for key in saved if isinstance(key, str))


def load_published(weights, path):
    """A Trained from a state dict of the published code (QSong-github/HECLIP).

    The entries show its type and its number of genes, but not its genes and sections. The network
    is ResNet-50 with the input of its training: 256 px, blue-green-red, 0 to 255. Raises an error
    on missing or other entries.
    """
    weights = {key.replace("module.", "").replace("well", "spot"): value
               for key, value in weights.items()}
    n_genes = len(weights["spot_encoder.model.bias"])
    renamed = {"image_encoder.model.": "image_encoder.",
               "spot_projection.": "expression_projection.",
               "image_projection.": "image_projection."}
    ours = {new + key.removeprefix(old): value for key, value in weights.items()
            for old, new in renamed.items() if key.startswith(old)}
    has_projection = any(key.startswith("spot_projection.") for key in weights)
    kind = "heg" if has_projection else "hvg"
    width = len(weights["image_projection.fc.bias"])
    network = HECLIP(ModelConfig(kind, n_genes, "resnet50", image_size=256, mean=(0.0,) * 3,
                                 std=(1 / 255,) * 3, bgr=True, embedding_dim=width))
    network.load_state_dict(ours)
    settings = replace(TRAINING["published"], type=kind)
    return Trained(network.eval(), settings, panel=None, reference=None, patch_px=256,
                   patch_um=None, digest=model_digest(network), path=path)


# -------------------------------------------------------------------------- stopping and continuing


def save_progress(path, trained, optimiser, losses):
    """Write all that the next epoch depends on, for `load_progress`.

    losses: the scores so far, a list of dicts.
    """
    network = trained.network
    weights = heads(network) if trained.frozen else network.state_dict()
    with atomic_path(path) as temporary:
        torch.save({"model": weights, "optimiser": optimiser.state_dict(), "losses": losses,
                    **trained.facts()}, temporary)


def load_progress(path, trained, optimiser):
    """Fill model and optimiser with the state after the last finished epoch.

    Returns the scores so far. Raises InputError unless the run had the same data, panel and
    settings. Only the number of epochs may differ. With the cosine schedule it may not, because
    that schedule ends with the epochs.
    """
    network = trained.network
    free = () if trained.settings.schedule == "cosine" else ("max_epochs",)
    try:
        saved = read(path)
        losses, weights = saved["losses"], saved["model"]
        changed = changes(from_facts(only_facts(saved)), trained, free)
        if not changed:
            network.load_state_dict(network.state_dict() | weights if trained.frozen else weights)
            optimiser.load_state_dict(saved["optimiser"])
    except Exception as error:  # a damaged file can fail anywhere
        raise InputError(f"{path} is damaged ({first_line(error)}). Train again without "
                         "--resume") from None
    if changed:
        raise InputError(f"{path} is of another run: {'; '.join(changed)}. Resume with the same "
                         "settings, or train again without --resume")
    return losses


def changes(earlier, trained, free=()):
    """In words, the differences between `trained` and `earlier`, a list of texts.

    They concern settings, panel, sections and encoder. free: further settings that may differ.
    """
    changed = trained.settings.differences(earlier.settings, free)
    if list(earlier.panel.ids) != list(trained.panel.ids):
        changed.append(f"its panel differs ({len(earlier.panel)} genes, now {len(trained.panel)})")
    if (earlier.reference is None) != (trained.reference is None):
        changed.append("one of them is a published checkpoint")
    elif earlier.reference is None:  # for a published one, only the weights are known
        if earlier.digest != trained.digest:
            changed.append("its weights differ")
    elif list(earlier.reference) != list(trained.reference):
        changed.append(f"its reference was {', '.join(earlier.reference)}, is "
                       f"{', '.join(trained.reference)}")
    elif earlier.reference != trained.reference:
        changed.append(f"its sections were made again since: patches of {earlier.patch_um:.0f} µm, "
                       f"now {trained.patch_um:.0f} µm, or other files or settings")
    if earlier.frozen != trained.frozen:
        changed.append("its frozen encoder differs")
    return changed


def check_replaceable(run, trained):
    """Raise InputError if training would replace a model that it does not make again.

    trained: the model that training makes.
    """
    for path in (run.checkpoint, run.last):
        if not path.exists():
            continue
        try:
            saved = read(path)
            if is_published(saved):
                changed = ["it is a published checkpoint"]
            else:
                changed = changes(from_facts(only_facts(saved)), trained)
        except Exception as error:  # a damaged file can fail anywhere
            changed = [f"it cannot be read ({first_line(error)})"]
        if changed:
            raise InputError(f"{path} holds another model: {'; '.join(changed)}. Keep both with "
                             "--save_path DIR, or replace it with --overwrite")


def only_facts(saved):
    """The entries of a saved file that are not tensors."""
    return {key: value for key, value in saved.items()
            if key not in ("model", "config", "optimiser", "losses")}


def saved_digest(path):
    """The digest of the model in a checkpoint, without reading its weights; None without one."""
    try:
        check_words(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["digest"]
    except Exception:  # absent, damaged or a published one
        return None
