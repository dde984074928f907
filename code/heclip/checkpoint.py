"""Checkpoints that describe themselves: weights, model config, gene panel, how and on what they were trained.

Those of HECLIP's authors, which are bare state dicts, are read too.
"""

import zipfile
from dataclasses import asdict

import torch

from .dataset import first_line
from .features import digest
from .files import InputError, atomic_path
from .model import HECLIP, ModelConfig, load_encoder_weights

FORMAT = 3


def save_checkpoint(path, model, **facts):
    """Write the model with its config and further facts (plain Python values).

    A frozen encoder from a hub (facts["frozen"], see main.py) is left out: it may be large, and its terms may forbid
    passing it on. It is found again by its name, and known by its digest.
    """
    hub = facts.get("frozen", {}).get("hub")
    with atomic_path(path) as temporary:
        torch.save({"format": FORMAT, "model": heads(model) if hub else model.state_dict(),
                    "config": asdict(model.config), **facts}, temporary)


def heads(model):
    """The entries of the model's state that are not its image encoder's."""
    return {key: value for key, value in model.state_dict().items() if not key.startswith("image_encoder.")}


def load_checkpoint(path):
    """Read a checkpoint. Returns (HECLIP on the CPU in evaluation mode, the other facts as a dict).

    Of a file of the published code there are no further facts: the dict is empty.
    """
    if not path.exists():
        raise InputError(f"{path} is missing. Train it with main.py, with the same --dataset, --type, --protocol and "
                         "--save_path")
    try:
        facts = read(path)
        if is_published(facts):
            return load_published(facts), {}
        model = HECLIP(ModelConfig(**facts.pop("config")))
        weights = facts.pop("model")
        frozen = facts.get("frozen", {})
        if frozen.get("hub"):
            load_encoder_weights(model.image_encoder, frozen["hub"], None, model.config.encoder_args)
            if digest(model.image_encoder) != frozen["weights"]:
                raise InputError(f"{path} was trained on other weights of {frozen['hub']} than are found by that name "
                                 "now. Train again, or name the revision: --encoder hf-hub:<owner>/<name>@<revision>")
            weights = model.state_dict() | weights
        model.load_state_dict(weights)
    except InputError:
        raise
    except Exception as error:  # a damaged file can fail anywhere
        raise InputError(f"{path} is not a checkpoint of main.py, or is damaged ({first_line(error)}). Train again, or "
                         "copy it again") from None
    return model.eval(), facts


def is_published(saved):
    """Whether this is a state dict of the published code: it saves a layer of this name, though it never uses it."""
    return isinstance(saved, dict) and any(key.endswith(("spot_encoder.model.bias", "well_encoder.model.bias"))
                                           for key in saved if isinstance(key, str))


def load_published(weights):
    """HECLIP from a state dict of the published code (QSong-github/HECLIP), which tells its type and genes itself.

    ResNet-50, fed as it was trained: 256 px, blue-green-red, 0 to 255. Raises an error on missing or other entries.
    """
    weights = {key.replace("module.", "").replace("well", "spot"): value for key, value in weights.items()}
    n_genes = len(weights["spot_encoder.model.bias"])
    renamed = {"image_encoder.model.": "image_encoder.", "spot_projection.": "expression_projection.",
               "image_projection.": "image_projection."}
    ours = {new + key.removeprefix(old): value for key, value in weights.items()
            for old, new in renamed.items() if key.startswith(old)}
    kind = "heg" if any(key.startswith("spot_projection.") for key in weights) else "hvg"
    model = HECLIP(ModelConfig(kind, n_genes, "resnet50", image_size=256, mean=(0.0,) * 3, std=(1 / 255,) * 3, bgr=True,
                               embedding_dim=len(weights["image_projection.fc.bias"])))
    model.load_state_dict(ours)
    return model.eval()


def read(path):
    """The contents of a file that was saved here, or by the published code. Raises ValueError if a byte is wrong."""
    if wrong := zipfile.ZipFile(path).testzip():  # torch does not look at the checksums it writes
        raise ValueError(f"the checksum of {wrong} is wrong")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if not is_published(saved) and saved["format"] != FORMAT:
        raise ValueError(f"format {saved['format']}, expected {FORMAT}")
    return saved


def check_fits(path, facts, dataset, name, panel):
    """Raise InputError unless the checkpoint was trained on this dataset and this very panel."""
    if (facts["dataset"], facts["name"]) != (dataset, name):
        raise InputError(f"{path} was trained on {facts['dataset']} {facts['name']}, not on {dataset} {name}. Name its "
                         "own with --dataset, --type and --protocol, or train again")
    if facts["panel"] != list(panel.index):
        shared = len(set(facts["panel"]) & set(panel.index))
        raise InputError(f"{path} was trained on another gene panel: {len(facts['panel'])} genes, now {len(panel)}, "
                         f"{shared} shared. Name it with --panel (it was {facts['panel_name']}), or train again if the "
                         "data was preprocessed anew since")


def save_progress(path, model, optimiser, losses, facts):
    """Write all that the next epoch depends on: weights, optimiser, the scores so far, and whose they are."""
    with atomic_path(path) as temporary:
        torch.save({"format": FORMAT, "model": heads(model) if "frozen" in facts else model.state_dict(),
                    "optimiser": optimiser.state_dict(), "losses": losses, **facts}, temporary)


def load_progress(path, model, optimiser, facts):
    """Fill model and optimiser with the state after the last finished epoch; return the scores so far.

    Raises InputError unless the run had the same data, panel and arguments; only the number of epochs may differ, and
    that not under a schedule that ends with them.
    """
    free = {"device", "compile", "save_path"}
    if facts["arguments"].get("schedule") != "cosine":
        free.add("max_epochs")
    try:
        saved = read(path)
        losses = saved["losses"]
        arguments = {key: (saved["arguments"].get(key), value) for key, value in facts["arguments"].items()
                     if key not in free}
        changed = [f"--{key} was {old}, is {new}" for key, (old, new) in arguments.items() if old != new]
        changed += [f"its {key} differs" for key in ("dataset", "name", "panel", "reference", "frozen")
                    if saved.get(key) != facts.get(key)]
        if not changed:
            model.load_state_dict(model.state_dict() | saved["model"] if "frozen" in facts else saved["model"])
            optimiser.load_state_dict(saved["optimiser"])
    except Exception as error:  # a damaged file can fail anywhere
        raise InputError(f"{path} is damaged ({first_line(error)}). Train again without --resume") from None
    if changed:
        raise InputError(f"{path} is of another run: {'; '.join(changed)}. Resume with the same settings, or train "
                         "again without --resume")
    return losses
