"""Settings: every flag explained, recipes as instances, contradictions refused before any work."""

import argparse
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest

from heclip.files import InputError
from heclip.settings import (
    FROZEN,
    PREDICTING,
    TRAINING,
    Predicting,
    Training,
    add_predicting_flags,
    parse_training,
    predicting,
    recipe_settings,
)

RECIPES = ["heclip", "published", "clip", "bleep", "regression"]


def parse_predicting(*argv):
    """The flags of `Predicting` as infer.py reads them."""
    parser = argparse.ArgumentParser()
    add_predicting_flags(parser)
    return vars(parser.parse_args(argv))


# ------------------------------------------------------------------------------ fields and flags


@pytest.mark.parametrize("settings", [Training, Predicting])
def test_every_field_is_a_flag_with_help_and_with_its_default_among_its_choices(settings):
    for item in fields(settings):
        # of the recipe; its temperature fits no other
        if (settings, item.name) == (Training, "loss"):
            assert not item.metadata
            continue
        assert len(item.metadata["help"]) > 5, item.name
        choices = item.metadata.get("choices")
        assert choices is None or item.default is None or item.default in choices, item.name


def test_settings_cannot_be_changed():
    for settings, name in ((Training(), "lr"), (Predicting(), "k")):
        with pytest.raises(FrozenInstanceError):
            setattr(settings, name, 1)


def test_without_flags_the_settings_are_the_defaults():
    assert parse_training([]) == Training() == TRAINING["heclip"]
    assert predicting("heclip", parse_predicting()) == Predicting() == PREDICTING["heclip"]


def test_every_training_flag_reaches_its_field():
    given = {
        "dataset": "demo", "type": "hvg", "panel": "heg", "query": ["B1", "C1"],
        "protocol": "paper",
        "recipe": "bleep", "temperature": "2", "expression_loss": "3", "pixels": "raw_bgr",
        "colour_jitter": "0.3", "mixup": "0.2", "schedule": "constant", "lr": "0.1",
        "encoder_lr": "0", "wd": "0.2", "max_epochs": "2", "batch_size": "7", "val_fraction": "0",
        "seed": "0", "encoder": "test_vit", "encoder_args": '{"img_size": 96}',
        "encoder_weights": "w.pth", "image_size": "96", "device": "cpu", "save_path": "runs/1"}
    argv = []
    for name, value in given.items():
        argv += [f"--{name}", *([value] if isinstance(value, str) else value)]
    found = parse_training([*argv, "--no-compile", "--resume", "--overwrite"])
    assert found == Training(
        "demo", "hvg", "heg", ("B1", "C1"), "paper", "bleep", "bleep", 2.0, 3.0, "raw_bgr", 0.3,
        0.2,
        "constant", 0.1, 0.0, 0.2, 2, 7, 0.0, 0, "test_vit", {"img_size": 96}, "w.pth", True, False,
        96, "cpu", False, True, True, "runs/1")
    flags = {item.name for item in fields(Training) if item.metadata}
    assert flags == {*given, "pretrained", "freeze", "compile", "resume", "overwrite"}


def test_panel_and_encoder_rate_are_those_of_type_and_heads_unless_given():
    assert parse_training(["--type", "hvg"]).panel_type == "hvg"
    assert parse_training(["--type", "hvg", "--panel", "heg"]).panel_type == "heg"
    assert parse_training(["--lr", "0.5"]).encoder_rate == 0.5
    assert parse_training(["--lr", "0.5", "--encoder_lr", "0"]).encoder_rate == 0
    assert parse_training(["--recipe", "clip", "--lr", "0.5"]).encoder_rate == 1e-4


@pytest.mark.parametrize(("flag", "value"), [
    ("--smoothing", "-0.1"), ("--smoothing", "nan"), ("--k", "0"), ("--views", "3"),
    ("--retrieval", "none"), ("--colour_jitter", "-0.1"), ("--colour_jitter", "inf"),
    ("--mixup", "much"), ("--temperature", "0"), ("--temperature", "nan"), ("--lr", "-1"),
    ("--batch_size", "0"), ("--max_epochs", "2.5"), ("--val_fraction", "1"), ("--seed", "-1"),
    ("--encoder_args", "{"), ("--loss", "clip"), ("--recipe", "ours")])
def test_values_and_flags_that_mean_nothing_are_refused(flag, value, capsys):
    named = {item.name for item in fields(Predicting)}
    parse = parse_predicting if flag[2:] in named else lambda *argv: parse_training(argv)
    with pytest.raises(SystemExit):
        parse(f"{flag}={value}")
    assert flag in capsys.readouterr().err


def test_help_shows_the_default_recipes_values(capsys):
    with pytest.raises(SystemExit):
        parse_training(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "of the loss (default: 4.0)" in text
    assert "passes over the training spots (default: 15)" in text
    assert "none (default: 0.4)" in text  # of mixup


# ------------------------------------------------------------------------------ recipes


def test_recipes_are_instances_that_know_their_name():
    assert list(TRAINING) == list(PREDICTING) == RECIPES
    for name in RECIPES:
        assert isinstance(TRAINING[name], Training)
        assert isinstance(PREDICTING[name], Predicting)
        assert TRAINING[name].recipe == name
    choices = next(item for item in fields(Training) if item.name == "recipe").metadata["choices"]
    assert choices == RECIPES


def test_the_published_recipe_is_the_published_training_and_prediction():
    one, how = TRAINING["published"], PREDICTING["published"]
    assert (one.loss, one.temperature, one.pixels) == ("image_centric", 1.0, "raw_bgr")
    assert (one.expression_loss, one.mixup, one.colour_jitter,
            one.schedule) == (0, 0, 0, "constant")
    assert (one.lr, one.encoder_rate, one.wd) == (1e-3, 1e-3, 1e-3)
    assert how == Predicting(retrieval="image", k=50, centre=False, views=1, smoothing=0.0)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_by_its_flag_is_that_recipe(name):
    assert parse_training(["--recipe", name]) == TRAINING[name]
    assert predicting(name, parse_predicting()) == PREDICTING[name]


def test_flags_override_the_recipe_wherever_they_stand():
    expected = replace(TRAINING["clip"], lr=0.5, pixels="raw_bgr")
    flags = ["--lr", "0.5", "--pixels", "raw_bgr"]
    for argv in (["--recipe", "clip", *flags], [*flags, "--recipe", "clip"],
                 ["--lr=0.5", "--recipe=clip", "--pixels=raw_bgr"]):
        assert parse_training(argv) == expected


def test_a_flag_that_asks_for_what_another_recipe_has_is_followed():
    # 4 is the temperature of the default recipe: it must not be taken for a flag that was left out.
    assert parse_training(["--recipe", "bleep", "--temperature", "4"]).temperature == 4
    assert predicting("published", parse_predicting("--smoothing", "0.5", "--centre")) == replace(
        PREDICTING["published"], smoothing=0.5, centre=True)


def test_zero_and_no_are_values_of_a_flag_and_not_its_absence():
    given = parse_predicting("--smoothing", "0", "--no-centre")
    assert predicting("heclip", given) == Predicting(smoothing=0.0, centre=False)
    assert parse_training(["--mixup", "0", "--val_fraction", "0"]) == replace(
        Training(), mixup=0.0, val_fraction=0.0)


def test_what_infer_knows_besides_is_left_out():
    assert predicting("heclip", {"k": 7, "device": "cpu", "recipe": "clip"}) == Predicting(k=7)


# ------------------------------------------------------------------------------ a frozen encoder


@pytest.mark.parametrize("recipe", RECIPES)
def test_freeze_changes_the_defaults_of_every_recipe(recipe):
    found = parse_training(["--freeze", "--recipe", recipe])
    assert found == recipe_settings(recipe, freeze=True)
    assert found == replace(TRAINING[recipe], freeze=True, colour_jitter=0.0, mixup=0.0,
                            expression_loss=0.0, max_epochs=40)


def test_freeze_changes_defaults_only():
    argv = ["--max_epochs", "3", "--mixup", "0.2", "--freeze", "--expression_loss", "30"]
    assert parse_training(argv) == replace(
        Training(), freeze=True,
        **FROZEN | {"max_epochs": 3, "mixup": 0.2, "expression_loss": 30.0})


# ------------------------------------------------------------------------------ contradictions


@pytest.mark.parametrize(("argv", "says"), [
    (["--freeze", "--colour_jitter", "0.1"], r"--colour_jitter 0\.1 with --freeze"),
    (["--freeze", "--no-pretrained"], "--freeze with --no-pretrained"),
    (["--encoder_weights", "w.pth", "--no-pretrained"], "--encoder_weights with --no-pretrained"),
    (["--recipe", "regression", "--temperature", "2"],
     r"--temperature 2\.0 with --recipe regression"),
    (["--temperature", "1", "--recipe", "regression", "--freeze"],
     r"--temperature 1\.0 with --recipe regression"),
])
def test_contradictions_are_refused_with_the_way_out(argv, says):
    with pytest.raises(InputError, match=rf"{says}: .*Leave one of them out"):
        parse_training(argv)


@pytest.mark.parametrize("changes", [
    {"freeze": True}, {"freeze": True, "colour_jitter": 0.0, "pretrained": False},
    {"encoder_weights": "w.pth", "pretrained": False}])
def test_contradictions_are_refused_however_settings_are_made(changes):
    with pytest.raises(InputError, match="Leave one of them out"):
        Training(**changes)
    with pytest.raises(InputError, match="Leave one of them out"):
        replace(Training(), **changes)


@pytest.mark.parametrize("argv", [
    ["--freeze"], ["--freeze", "--colour_jitter", "0"], ["--freeze", "--encoder_weights", "w.pth"],
    ["--no-pretrained", "--colour_jitter", "0.2"], ["--recipe", "regression"],
    ["--recipe", "clip", "--temperature", "2"]])
def test_what_goes_together_is_taken(argv):
    assert isinstance(parse_training(argv), Training)


# ------------------------------------------------------------------------------ differences


def test_settings_differ_by_what_changes_the_model_and_by_nothing_else():
    one = parse_training(["--seed", "3"])
    assert one.differences(one) == []
    elsewhere = replace(one, device="cuda", compile=True, resume=True, overwrite=True,
                        save_path="x")
    assert elsewhere.differences(one) == []
    other = replace(one, lr=0.01, query=("A",), max_epochs=20)
    assert other.differences(one) == [
        "--query was None, is ('A',)", "--lr was 0.001, is 0.01", "--max_epochs was 15, is 20"]
    assert other.differences(one, ["max_epochs", "lr"]) == ["--query was None, is ('A',)"]


def test_every_setting_of_the_model_is_compared():
    """None that is new is forgotten: only where and how it runs is free."""
    one = Training()
    free = [name for name in asdict(one) if not replace_by_force(one, name).differences(one)]
    assert free == ["device", "compile", "resume", "overwrite", "save_path"]


def replace_by_force(settings, name):
    """A copy in which one field has a value that no other has, with no question asked."""
    changed = replace(settings)
    object.__setattr__(changed, name, object())
    return changed


def test_settings_come_back_from_json_as_they_were():
    """As in a checkpoint, but for tuples, which checkpoint.from_facts makes again."""
    one = parse_training(
        ["--encoder_args", '{"img_size": 96}', "--query", "A", "--max_epochs", "3"])
    again = Training(**asdict(one))
    assert again == one
    assert again.differences(one) == []


# ------------------------------------------------------------------------------ imports


def test_a_wrong_flag_is_answered_before_anything_heavy_is_imported(project):
    code = """
import sys
import heclip.settings
heavy = {"torch", "numpy", "pandas", "scipy", "timm", "anndata"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(project / "code")}, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
