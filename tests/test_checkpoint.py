"""A checkpoint gives back the same model, refuses what it does not fit, and is never half written."""

import dataclasses
import re

import pandas as pd
import pytest
import torch

from heclip.checkpoint import check_fits, load_checkpoint, load_progress, save_checkpoint, save_progress
from heclip.files import InputError
from heclip.model import HECLIP, configure

FACTS = {"dataset": "demo", "name": "heg", "panel_name": "heg", "panel": ["G1", "G2", "G3", "G4"],
         "reference": ["A", "B"], "epoch": 3,
         "validation_pearson": 0.25, "arguments": {"lr": 1e-3, "pretrained": True, "encoder_weights": None}}


def trained(panel_type="heg", seed=0):
    """A model whose every entry, the batch statistics too, is no longer what a new one has."""
    torch.manual_seed(seed)
    model = HECLIP(configure("test_resnet", panel_type, 4, 32, embedding_dim=8, temperature=2.0))
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    image, expression, _ = model(torch.randn(6, 3, 32, 32), torch.rand(6, 4))
    ((image - 1) ** 2).mean().add((expression**2).mean()).backward()
    optimiser.step()
    return model.eval()


@torch.inference_mode()
def embeddings(model):
    generator = torch.Generator().manual_seed(1)
    return model(torch.randn(3, 3, 32, 32, generator=generator), torch.rand(3, 4, generator=generator))[:2]


def panel(*genes):
    return pd.DataFrame({"symbol": genes}, index=pd.Index(genes, name="gene_id"))


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path / "heg_best.pt", trained(), **FACTS)
    return tmp_path / "heg_best.pt"


@pytest.mark.parametrize("panel_type", ["heg", "hvg"])
def test_a_loaded_model_gives_the_same_embeddings_to_the_last_bit(panel_type, tmp_path):
    model = trained(panel_type)
    save_checkpoint(tmp_path / "new" / "best.pt", model, **FACTS)
    torch.manual_seed(99)
    loaded, facts = load_checkpoint(tmp_path / "new" / "best.pt")
    assert not loaded.training
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(embeddings(loaded), embeddings(model), strict=True))
    assert {key: facts[key] for key in FACTS} == FACTS


def test_the_file_loads_with_plain_torch_and_without_running_code(saved):
    content = torch.load(saved, weights_only=True)
    assert content["config"] == dataclasses.asdict(trained().config)
    assert all(isinstance(value, torch.Tensor) for value in content["model"].values())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


def flip_a_weight(path):
    """Change one byte in the middle of the largest tensor, as a failing disk or a bad copy does."""
    content = bytearray(path.read_bytes())
    weights = max(trained().state_dict().values(), key=torch.numel).numpy().tobytes()
    content[content.index(weights) + len(weights) // 2] ^= 0xFF
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("<html>404 Not Found</html>")


def folder(path):
    path.unlink()
    path.mkdir()


def tensor(path):
    torch.save(torch.zeros(3), path)


def plain_weights(path):
    torch.save(trained().state_dict(), path)


def whole_module(path):
    torch.save(trained(), path)


def later_format(path):
    torch.save(torch.load(path, weights_only=True) | {"format": 99}, path)


def unknown_option(path):
    content = torch.load(path, weights_only=True)
    content["config"]["colour"] = "blue"
    torch.save(content, path)


def other_config(path):
    content = torch.load(path, weights_only=True)
    content["config"]["n_genes"] = 5
    torch.save(content, path)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # of torch, for a tensor taken for a dict
@pytest.mark.parametrize("spoil", [truncate, flip_a_weight, empty, text, folder, tensor, plain_weights, whole_module,
                                   later_format, unknown_option, other_config])
def test_a_damaged_or_foreign_file_is_an_error_that_names_it(spoil, saved):
    spoil(saved)
    with pytest.raises(InputError, match=re.escape(f"{saved} is not a checkpoint of main.py, or is damaged")):
        load_checkpoint(saved)


def test_a_missing_checkpoint_is_an_error_that_says_what_makes_it(tmp_path):
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'best.pt'} is missing. Train it with main.py")):
        load_checkpoint(tmp_path / "best.pt")


def test_a_checkpoint_fits_its_own_dataset_type_and_panel(saved):
    check_fits(saved, load_checkpoint(saved)[1], "demo", "heg", panel("G1", "G2", "G3", "G4"))


@pytest.mark.parametrize(("dataset", "name", "genes", "message"), [
    ("MOB", "heg", ["G1", "G2", "G3", "G4"], r"trained on demo heg, not on MOB heg.*--dataset"),
    ("demo", "hvg", ["G1", "G2", "G3", "G4"], r"trained on demo heg, not on demo hvg.*--type"),
    ("demo", "heg_paper", ["G1", "G2", "G3", "G4"], r"trained on demo heg, not on demo heg_paper.*--protocol"),
    ("demo", "heg", ["G1", "G2", "G9"], "another gene panel: 4 genes, now 3, 2 shared"),
    ("demo", "heg", ["G1", "G2", "G4", "G3"], "another gene panel: 4 genes, now 4, 4 shared"),
])
def test_a_checkpoint_is_refused_for_other_data_and_the_error_says_which(saved, dataset, name, genes, message):
    facts = load_checkpoint(saved)[1]
    with pytest.raises(InputError, match=f"{re.escape(str(saved))} was .*{message}"):
        check_fits(saved, facts, dataset, name, panel(*genes))


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_file_as_it_was_and_nothing_else(saved, failure, monkeypatch):
    def fail(content, path):
        path.write_bytes(b"half")
        raise failure

    before = saved.read_bytes()
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(type(failure)):
        save_checkpoint(saved, trained(seed=5), **FACTS)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_later_save_replaces_the_earlier_one(saved):
    later = trained(seed=5)
    save_checkpoint(saved, later, **FACTS | {"epoch": 7})
    loaded, facts = load_checkpoint(saved)
    assert facts["epoch"] == 7
    assert torch.equal(embeddings(loaded)[0], embeddings(later)[0])


# ------------------------------------------------------------------------------ resuming

LOSSES = [{"epoch": 1, "train_loss": 2.5, "validation_pearson": 0.1}]
RUN = {key: FACTS[key] for key in ("dataset", "name", "panel", "reference")} | {
    "arguments": {"lr": 1e-3, "max_epochs": 2, "device": "cpu", "compile": False, "save_path": None, "seed": 42}}


def step(model, optimiser, seed):
    generator = torch.Generator().manual_seed(seed)
    image, expression, _ = model(torch.randn(6, 3, 32, 32, generator=generator), torch.rand(6, 4, generator=generator))
    optimiser.zero_grad()
    ((image - 1) ** 2).mean().add((expression - 1).abs().mean()).backward()
    optimiser.step()


def started(seed):
    model = trained(seed=seed)
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


@pytest.fixture
def interrupted(tmp_path):
    """A run that stopped after its second step: (file, model, optimiser)."""
    model, optimiser = started(0)
    step(model, optimiser, 1)
    step(model, optimiser, 2)
    save_progress(tmp_path / "heg_last.pt", model, optimiser, LOSSES, RUN)
    return tmp_path / "heg_last.pt", model, optimiser


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(interrupted):
    path, model, optimiser = interrupted
    other, other_optimiser = started(7)
    assert load_progress(path, other, other_optimiser, RUN) == LOSSES
    step(model, optimiser, 3)
    step(other, other_optimiser, 3)
    for one, same in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, same)


@pytest.mark.parametrize(("key", "value"), [("max_epochs", 30), ("device", "cuda"), ("compile", True),
                                            ("save_path", "elsewhere")])
def test_what_does_not_change_the_epochs_done_may_differ_on_resuming(key, value, interrupted):
    assert load_progress(interrupted[0], *started(7), RUN | {"arguments": RUN["arguments"] | {key: value}}) == LOSSES


def test_under_a_schedule_that_ends_with_the_epochs_their_number_may_not_differ(interrupted):
    path, model, optimiser = interrupted
    cosine = RUN | {"arguments": RUN["arguments"] | {"schedule": "cosine"}}
    save_progress(path, model, optimiser, LOSSES, cosine)
    assert load_progress(path, *started(7), cosine) == LOSSES
    with pytest.raises(InputError, match="--max_epochs was 2, is 30"):
        load_progress(path, *started(7), cosine | {"arguments": cosine["arguments"] | {"max_epochs": 30}})


@pytest.mark.parametrize(("change", "message"), [
    ({"arguments": RUN["arguments"] | {"lr": 0.1}}, r"--lr was 0\.001, is 0\.1"),
    ({"arguments": RUN["arguments"] | {"seed": 1}}, "--seed was 42, is 1"),
    ({"arguments": RUN["arguments"] | {"new_flag": 1}}, "--new_flag was None, is 1"),
    ({"panel": ["G1", "G2", "G4", "G3"]}, "its panel differs"),
    ({"reference": ["A"]}, "its reference differs"),
    ({"dataset": "MOB"}, "its dataset differs"),
])
def test_another_run_is_not_resumed_and_the_model_is_left_as_it_was(change, message, interrupted):
    model, optimiser = started(7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=f"{re.escape(str(interrupted[0]))} is of another run: .*{message}.*--resume"):
        load_progress(interrupted[0], model, optimiser, RUN | change)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("spoil", [truncate, text, empty, later_format])
def test_damaged_progress_is_an_error_that_names_the_file(spoil, interrupted):
    spoil(interrupted[0])
    with pytest.raises(InputError, match=re.escape(f"{interrupted[0]} is damaged")):
        load_progress(interrupted[0], *started(7), RUN)
