"""Checkpoints that describe themselves: weights, model config, gene panel, how and on what they were trained."""

import zipfile
from dataclasses import asdict

import torch

from .dataset import first_line
from .files import InputError, atomic_path
from .model import HECLIP, ModelConfig

FORMAT = 3


def save_checkpoint(path, model, **facts):
    """Write the model with its config and further facts (plain Python values)."""
    with atomic_path(path) as temporary:
        torch.save({"format": FORMAT, "model": model.state_dict(), "config": asdict(model.config), **facts}, temporary)


def load_checkpoint(path):
    """Read a checkpoint. Returns (HECLIP on the CPU in evaluation mode, the other facts as a dict)."""
    if not path.exists():
        raise InputError(f"{path} is missing. Train it with main.py, with the same --dataset, --type, --protocol and "
                         "--save_path")
    try:
        facts = read(path)
        model = HECLIP(ModelConfig(**facts.pop("config")))
        model.load_state_dict(facts.pop("model"))
    except Exception as error:  # a damaged file can fail anywhere
        raise InputError(f"{path} is not a checkpoint of main.py, or is damaged ({first_line(error)}). Train again, or "
                         "copy it again") from None
    return model.eval(), facts


def read(path):
    """The contents of a file that `torch.save` wrote here. Raises ValueError if a byte of it is wrong."""
    if wrong := zipfile.ZipFile(path).testzip():  # torch does not look at the checksums it writes
        raise ValueError(f"the checksum of {wrong} is wrong")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if saved["format"] != FORMAT:
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
        torch.save({"format": FORMAT, "model": model.state_dict(), "optimiser": optimiser.state_dict(),
                    "losses": losses, **facts}, temporary)


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
        changed += [f"its {key} differs" for key in ("dataset", "name", "panel", "reference")
                    if saved[key] != facts[key]]
        if not changed:
            model.load_state_dict(saved["model"])
            optimiser.load_state_dict(saved["optimiser"])
    except Exception as error:  # a damaged file can fail anywhere
        raise InputError(f"{path} is damaged ({first_line(error)}). Train again without --resume") from None
    if changed:
        raise InputError(f"{path} is of another run: {'; '.join(changed)}. Resume with the same settings, or train "
                         "again without --resume")
    return losses
