"""Builders that several test files share: a small data set, a panel, a model, digests of files.

The small data set is the demo of preprocess_demo.py: four sections of about 100 spots, of which
DEMO_C1 is the query; 150 genes; patches of 32 px, 39 µm wide. Its raw files are made once, then
copied.
"""

import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
from dataclasses import replace
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

import pandas as pd
import pytest
import torch

import main
import preprocess_demo
from heclip.checkpoint import Trained, load_checkpoint, save_checkpoint
from heclip.dataset import ROOT, Processed
from heclip.files import sha256
from heclip.model import HECLIP, configure
from heclip.panel import Panel
from heclip.script import preprocess
from heclip.settings import PREDICTING, recipe_settings

GRID, GENES = (14, 12), 150
REFERENCE, QUERY = ["DEMO_A1", "DEMO_B1", "DEMO_D1"], "DEMO_C1"
TRAIN = ["--encoder", "test_resnet", "--no-pretrained", "--batch_size", "16", "--device", "cpu"]

# One view in validation: eight take eight times as long.
main.PREDICTING = {recipe: replace(how, views=1) for recipe, how in PREDICTING.items()}


def small_dataset(name):
    """The demo's Dataset under another name, smaller."""
    sections = [replace(section, n_spots=None) for section in preprocess_demo.DATASET.sections]
    return replace(preprocess_demo.DATASET, name=name, sections=sections, n_hvg=60, n_heg=60,
                   patch_px=32)


def prepare(name, *flags):
    """Make the small data set `name` and preprocess it; flags: of its preprocess script.

    Again under the same name, only what changed is made again. Returns its Dataset.
    """
    dataset, raw = small_dataset(name), ROOT / "raw_of_small_datasets"
    if not raw.exists():
        preprocess_demo.generate(raw, grid=GRID, n_genes=GENES)
    if not dataset.raw.exists():
        shutil.copytree(raw, dataset.raw)
    preprocess(dataset, list(flags))
    return dataset


def panel_of(*ids, kind="heg", protocol="strict", sections=("A", "B"), markers=()):
    """A Panel of the genes `ids`, whose symbols are their ids."""
    genes = pd.DataFrame({"symbol": ids}, index=pd.Index(ids, name="gene_id"))
    genes["marker"] = genes["symbol"].isin(markers)
    return Panel(kind, protocol, genes, list(sections), len(ids), list(markers))


def network(kind="heg", n_genes=4, patch_px=32, seed=0, **options):
    """A HECLIP of the smallest encoder, as it was drawn. options: of `configure`."""
    torch.manual_seed(seed)
    return HECLIP(configure("test_resnet", kind, n_genes, patch_px, **options)).eval()


def untrained(path, dataset, kind="heg", seed=0, protocol="strict", recipe="heclip", **changes):
    """Write a checkpoint of the small data set as main.py does, of a network as it was drawn.

    changes: fields of the Trained to be other than they would be. Returns it as loaded.
    """
    processed = Processed(dataset)
    table = processed.sections().loc[REFERENCE]
    panel = processed.panel(kind, protocol, REFERENCE)
    settings = replace(recipe_settings(recipe), dataset=dataset, type=kind, protocol=protocol,
                       encoder="test_resnet", pretrained=False)
    patch_px = int(table["patch_px"].iloc[0])
    torch.manual_seed(seed)
    trained = Trained(
        main.build(settings, panel, patch_px, torch.zeros(1, len(panel))), settings, panel,
        table["digest"].to_dict(), patch_px, float((table["crop_px"] * table["mpp"]).mean()))
    save_checkpoint(path, replace(trained, **changes))
    return load_checkpoint(path)


def hashes(folder):
    """The SHA-256 of every file below a folder, by its relative path.

    Locks are left out: they hold nothing, and may stay or not.
    """
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != ".lock"}


@cache
def server():
    """A context whose processes are forked from one that has imported everything, and done nothing.

    A fork of this process could wait for ever for a thread that exists only here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["makers"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11 preloads without it
        forkserver.ensure_running()
    return context


class Fresh:
    """A new process that runs `work(*arguments)`. It starts at once: all is imported.

    After `wait`: returncode, stdout and stderr, as of a finished process of `subprocess`.
    """

    def __init__(self, work, *arguments, env=()):
        self.folder = Path(tempfile.mkdtemp())
        self.process = server().Process(
            target=run_with, args=(dict(env), self.folder, work, arguments))
        self.process.start()

    def wait(self):
        self.process.join(300)
        self.returncode = self.process.exitcode
        self.stdout, self.stderr = ((self.folder / name).read_text() for name in ("out", "err"))
        return self


def run_with(env, folder, work, arguments):
    """Run work(*arguments) with some environment variables, its output in files of a folder."""
    os.environ.update(env)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    work(*arguments)


def as_script(path, flags, cwd):
    """Run a script as the main program, with flags as its command line."""
    os.chdir(cwd)
    sys.argv = [str(path), *map(str, flags)]
    runpy.run_path(str(path), run_name="__main__")


def run_script(path, *flags, cwd="."):
    """Run a script in a process of its own, as a user would: a `Fresh` that has ended."""
    return Fresh(as_script, Path(path).resolve(), flags, cwd).wait()
