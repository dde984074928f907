"""Checkpoints that describe themselves: weights, model config, gene panel, how and on what they were trained."""

from dataclasses import asdict

import torch

from .dataset import first_line
from .files import InputError, atomic_path
from .model import HECLIP, ModelConfig

FORMAT = 1


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
        facts = torch.load(path, map_location="cpu", weights_only=True)
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']}, expected {FORMAT}")
        model = HECLIP(ModelConfig(**facts.pop("config")))
        model.load_state_dict(facts.pop("model"))
    except Exception as error:  # a damaged file can fail anywhere
        raise InputError(f"{path} is not a checkpoint of main.py, or is damaged ({first_line(error)}). Train again, or "
                         "copy it again") from None
    return model.eval(), facts


def check_fits(path, facts, dataset, name, panel):
    """Raise InputError unless the checkpoint was trained on this dataset and this very panel."""
    if (facts["dataset"], facts["name"]) != (dataset, name):
        raise InputError(f"{path} was trained on {facts['dataset']} {facts['name']}, not on {dataset} {name}. Name its "
                         "own with --dataset, --type and --protocol, or train again")
    if facts["panel"] != list(panel.index):
        shared = len(set(facts["panel"]) & set(panel.index))
        raise InputError(f"{path} was trained on another gene panel: {len(facts['panel'])} genes, now {len(panel)}, "
                         f"{shared} shared. The data was preprocessed anew since: train again")
