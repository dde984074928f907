"""The scripts as a user runs them: the demo at a small size, from preprocessing to figures."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from heclip.recipes import PREDICTION, TRAINING

import infer
import main
import preprocess_demo
from heclip.dataset import Processed, Run
from heclip.expression import choose_panel
from heclip.files import InputError, sha256
from heclip.preprocess import preprocess

GRID, GENES = (14, 12), 150
TRAIN = ["--encoder", "test_resnet", "--no-pretrained", "--batch_size", "16", "--device", "cpu"]


def small_dataset(name):
    """The demo's own dataset under another name and size."""
    sections = [replace(section, n_spots=None) for section in preprocess_demo.DATASET.sections]
    return replace(preprocess_demo.DATASET, name=name, sections=sections, n_hvg=60, n_heg=60, patch_px=32)


def prepare(name, *flags):
    dataset = small_dataset(name)
    if not dataset.raw.exists():
        preprocess_demo.generate(dataset.raw, grid=GRID, n_genes=GENES)
    preprocess(dataset, list(flags))
    return dataset


def hashes(folder):
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_sections_by_several_workers_or_one_by_one_give_the_same_files():
    folders = {}
    for name, calls in (("alone", [[]]), ("workers", [["--workers", "2"]]),
                        ("jobs", [["--section", "DEMO_D1"], ["--section", "DEMO_A1", "DEMO_B1", "DEMO_C1"], []])):
        for flags in calls:
            dataset = prepare(f"by_{name}", *flags)
        folders[name] = hashes(dataset.raw / "processed")
    assert len(folders["alone"]) == 11
    assert folders["alone"] == folders["workers"] == folders["jobs"]


def test_a_part_of_the_sections_chooses_no_panel():
    dataset = prepare("partly", "--section", "DEMO_B1")
    assert set(hashes(dataset.raw / "processed")) == {"DEMO_B1.h5ad", "DEMO_B1.patches.npy"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small dataset, and a run that has been trained and inferred on it: (dataset, folder of its results)."""
    dataset, results = prepare("small", "--protocol", "paper"), tmp_path_factory.mktemp("run")
    here = ["--dataset", "small", "--save_path", str(results)]
    main.main([*here, *TRAIN, "--max_epochs", "2"])
    infer.main([*here, "--device", "cpu", "--untrained", "--k", "10"])
    return dataset, results


def test_every_output_is_where_the_readme_says(trained):
    _, results = trained
    names = set(hashes(results))
    assert names == {
        "small/heg_best.pt", "small/heg_last.pt", "small/heg_losses.csv",
        "small/heg_prediction.h5ad", "small/heg_genes.csv", "small/heg_scores.json",
        *(f"ebd/small/heg/DEMO_{letter}1.npz" for letter in "ABCD"),
        "figure/MAP/small_heg.png", "figure/CAL/small_heg.png", "figure/EBD/small_heg.pdf", "figure/EXP/small_heg.pdf",
    }


def test_the_prediction_is_the_mean_of_the_nearest_reference_spots_smoothed(trained):
    dataset, results = trained
    run, processed = Run("small", "heg", results), Processed("small")
    panel = processed.panel("heg")
    files = {s.name: np.load(run.embeddings(s.name)) for s in dataset.sections}
    reference = [s.name for s in dataset.sections if s.role == "reference"]
    expression = np.concatenate([processed.expression(s, "heg", panel) for s in reference])
    prediction = anndata.read_h5ad(run.prediction)

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    nearest, similarities = [], []
    for kind in ("gene", "image"):  # both, 10 spots each
        query, every = files["DEMO_C1"]["image"], np.concatenate([files[s][kind] for s in reference])
        query = query - (query.sum(axis=0) + 20 * every.mean(axis=0)) / (len(query) + 20)
        centred = np.concatenate([files[s][kind] - files[s][kind].mean(axis=0) for s in reference])
        similarity = unit(query) @ unit(centred).T
        nearest.append(np.argsort(-similarity, axis=1)[:, :10])
        similarities.append(np.take_along_axis(similarity, nearest[-1], axis=1))
    found = expression[np.hstack(nearest)]  # (n, 20, G)
    distance = np.linalg.norm(prediction.obsm["spatial"][:, None] - prediction.obsm["spatial"], axis=2)
    pitch = np.median(np.sort(distance, axis=1)[:, 1])
    near = np.where(distance <= 2.002 * pitch, np.exp(-(distance / (0.5 * pitch)) ** 2 / 2), 0)
    np.testing.assert_allclose(prediction.X, near @ found.mean(axis=1) / near.sum(axis=1, keepdims=True), atol=1e-4)
    np.testing.assert_array_equal(prediction.layers["true"], processed.expression("DEMO_C1", "heg", panel))
    assert list(prediction.var_names) == list(panel.index)
    assert list(prediction.obs_names) == list(processed.read("DEMO_C1").obs_names)
    np.testing.assert_allclose(prediction.obs["similarity"], np.hstack(similarities).mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(prediction.obs["spread"], found.std(axis=1).mean(axis=1), atol=1e-3)
    expected = torch.load(run.checkpoint, weights_only=True)["validation_pearson_per_gene"]
    np.testing.assert_allclose(prediction.var["expected_pearson"], expected)


def test_scores_in_json_are_those_of_the_prediction_file(trained):
    _, results = trained
    run = Run("small", "heg", results)
    prediction, scores = anndata.read_h5ad(run.prediction), json.loads(run.scores.read_text())["scores"]
    r = [np.corrcoef(prediction.X[:, g], prediction.layers["true"][:, g])[0, 1] for g in range(prediction.n_vars)]
    assert scores["both"]["Pearson"] == pytest.approx(np.nanmean(r), abs=1e-6)
    assert set(scores) == {"both", "gene", "image", "untrained gene", "untrained image", "random"}
    genes = pd.read_csv(run.genes, index_col="gene_id")
    np.testing.assert_allclose(genes.loc[prediction.var_names, "Pearson"], r, atol=1e-6)
    markers = genes.loc[genes["marker"], "Pearson"]
    assert len(markers) > 0
    assert scores["both"]["markers"] == pytest.approx(markers.mean())


def test_losses_and_checkpoint_tell_the_best_epoch(trained):
    _, results = trained
    run = Run("small", "heg", results)
    losses = pd.read_csv(run.losses)
    assert list(losses["epoch"]) == [1, 2]
    facts = torch.load(run.checkpoint, weights_only=True)
    best = losses.loc[losses["validation_pearson"].idxmax()]
    assert facts["epoch"] == best["epoch"]
    assert facts["validation_pearson"] == pytest.approx(best["validation_pearson"])
    assert facts["reference"] == ["DEMO_A1", "DEMO_B1", "DEMO_D1"]
    assert facts["panel"] == list(Processed("small").panel("heg").index)


def test_training_never_opens_the_query_section(trained, tmp_path, monkeypatch):
    opened = []
    for reader in ("read", "patches", "expression"):
        original = getattr(Processed, reader)
        monkeypatch.setattr(Processed, reader, lambda self, section, *rest, original=original:
                            opened.append(section) or original(self, section, *rest))
    main.main(["--dataset", "small", "--save_path", str(tmp_path), *TRAIN, "--max_epochs", "1"])
    assert set(opened) == {"DEMO_A1", "DEMO_B1", "DEMO_D1"}


def test_same_seed_same_training_and_another_seed_another(trained, tmp_path):
    weights = {}
    for name, seed in (("first", "1"), ("again", "1"), ("other", "2")):
        main.main(["--dataset", "small", "--save_path", str(tmp_path / name), *TRAIN, "--max_epochs", "1",
                   "--seed", seed])
        weights[name] = hashes(tmp_path / name)["small/heg_losses.csv"], torch.load(
            tmp_path / name / "small" / "heg_best.pt", weights_only=True)["model"]
    assert weights["first"][0] == weights["again"][0] != weights["other"][0]
    assert all(torch.equal(value, weights["again"][1][key]) for key, value in weights["first"][1].items())


def test_inference_twice_gives_identical_files(trained):
    _, results = trained
    before = hashes(results)
    infer.main(["--dataset", "small", "--save_path", str(results), "--device", "cpu", "--untrained", "--k", "10"])
    assert hashes(results) == before


def test_scoring_again_from_embeddings_needs_no_model(trained, tmp_path):
    _, results = trained
    copy = tmp_path / "run"
    shutil.copytree(results, copy)
    (copy / "small" / "heg_best.pt").unlink()
    infer.main(["--dataset", "small", "--save_path", str(copy), "--from_ebd", "--k", "10", "--no-figures"])
    kept = {name: value for name, value in hashes(results).items() if name.endswith((".h5ad", "genes.csv"))}
    assert {name: hashes(copy)[name] for name in kept} == kept


@pytest.mark.parametrize(("panel_type", "protocol"), [("hvg", "strict"), ("hvg", "paper"), ("heg", "paper")])
def test_the_other_panel_and_protocol_run_too(trained, tmp_path, panel_type, protocol, capsys):
    here = ["--dataset", "small", "--save_path", str(tmp_path), "--type", panel_type, "--protocol", protocol]
    main.main([*here, *TRAIN, "--max_epochs", "1"])
    infer.main([*here, "--device", "cpu", "--retrieval", "image", "--no-figures"])
    name = panel_type if protocol == "strict" else f"{panel_type}_paper"
    run = Run("small", name, tmp_path)
    panel = Processed("small").panel(name)
    width = 256 if panel_type == "heg" else len(panel)
    assert np.load(run.embeddings("DEMO_C1"))["image"].shape[1] == width
    assert ("DEMO_C1" in panel.attrs["sections"]) == (protocol == "paper")
    assert ("query's truth" in capsys.readouterr().out) == (protocol == "paper")


def test_training_improves_on_the_first_epoch(trained, tmp_path):
    main.main(["--dataset", "small", "--save_path", str(tmp_path), *TRAIN, "--max_epochs", "8",
               "--mixup", "0"])  # mixed patches are too hard for so small an encoder to show much of it
    losses = pd.read_csv(tmp_path / "small" / "heg_losses.csv")
    assert losses["train_loss"].iloc[-1] < 0.9 * losses["train_loss"].iloc[0]


# ---------------------------------------------------------------------------------- as commands, and their mistakes


def run_script(project, script, *flags, cwd=None, root=None):
    return subprocess.run([sys.executable, project / "code" / script, *map(str, flags)], cwd=cwd or project,
                          capture_output=True, text=True, timeout=200,
                          env={**os.environ, **({"HECLIP_ROOT": str(root)} if root else {})})


def test_scripts_work_from_the_root_from_code_and_from_elsewhere(trained, project, tmp_path):
    outputs = []
    for folder in (project, project / "code", tmp_path):
        done = run_script(project, "infer.py", "--dataset", "small", "--save_path", trained[1], "--from_ebd", "--k", 10,
                          "--no-figures", cwd=folder)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] == outputs[2]
    assert re.search(r"HEG-50 +-?\d\.\d{3}", outputs[0])


@pytest.mark.parametrize(("script", "flags", "says"), [
    ("main.py", ["--dataset", "nowhere"], "no preprocess script is called nowhere"),
    ("main.py", ["--dataset", "MOB"], "python code/preprocess_MOB.py"),
    ("infer.py", ["--dataset", "small", "--save_path", "EMPTY"], "Train it with main.py"),
    ("infer.py", ["--dataset", "small", "--save_path", "EMPTY", "--from_ebd"], "without --from_ebd"),
    ("main.py", ["--dataset", "small", "--device", "cuda:99"], "Try --device cpu"),
    ("main.py", ["--dataset", "small", "--encoder", "resnet49"], "--encoder resnet49"),
    ("main.py", ["--dataset", "small", "--encoder_weights", "absent.pth"], "absent.pth"),
    ("main.py", ["--dataset", "small", "--val_fraction", "1.5"], "between 0 and 1"),
    ("preprocess_MOB.py", ["--raw", "EMPTY"], "no counts of section MOB1"),
])
def test_a_users_mistake_ends_in_one_clear_line(trained, project, tmp_path, script, flags, says):
    done = run_script(project, script, *[str(tmp_path) if flag == "EMPTY" else flag for flag in flags])
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_non_finite_loss_stops_training_and_keeps_the_old_checkpoint(trained, tmp_path):
    here = ["--dataset", "small", "--save_path", str(tmp_path), *TRAIN, "--max_epochs", "1"]
    main.main(here)
    before = hashes(tmp_path)
    with pytest.raises(InputError, match="diverged"):
        main.main([*here, "--lr", "1e30"])
    assert hashes(tmp_path) == before


def test_a_checkpoint_of_another_panel_or_dataset_is_refused(trained, tmp_path):
    _, results = trained
    for name, says in (("small/hvg_best.pt", "was trained on small heg, not on small hvg"),
                       ("other/heg_best.pt", "was trained on small heg, not on other heg")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((results / "small" / "heg_best.pt").read_bytes())
        dataset, run = name.split("/")
        if dataset == "other":
            prepare("other")
        with pytest.raises(InputError, match=says):
            infer.main(["--dataset", dataset, "--type", run[:3], "--save_path", str(tmp_path), "--device", "cpu"])


def test_a_checkpoint_that_saw_the_query_section_is_refused(trained, tmp_path):
    path = Run("small", "heg", tmp_path).checkpoint
    path.parent.mkdir()
    facts = torch.load(trained[1] / "small" / "heg_best.pt", weights_only=True)
    torch.save({**facts, "reference": ["DEMO_A1", "DEMO_C1"]}, path)
    with pytest.raises(InputError, match="trained on DEMO_C1, which is now the query"):
        infer.main(["--dataset", "small", "--save_path", str(tmp_path), "--device", "cpu"])


def test_embeddings_of_other_spots_are_refused(trained, tmp_path):
    _, results = trained
    for section in "ABCD":
        source, target = (Run("small", "heg", folder).embeddings(f"DEMO_{section}1") for folder in (results, tmp_path))
        target.parent.mkdir(parents=True, exist_ok=True)
        arrays = dict(np.load(source))
        arrays["barcode"] = arrays["barcode"][::-1]
        np.savez(target, **arrays)
    with pytest.raises(InputError, match="made from other spots"):
        infer.main(["--dataset", "small", "--save_path", str(tmp_path), "--from_ebd"])


def test_the_demo_is_the_same_every_time_and_its_slides_are_not_square(tmp_path):
    preprocess_demo.generate(tmp_path / "a", n_sections=1, grid=(8, 10), n_genes=60)
    preprocess_demo.generate(tmp_path / "b", n_sections=2, grid=(8, 10), n_genes=60)
    first = hashes(tmp_path / "a")
    assert {name: hashes(tmp_path / "b")[name] for name in first} == first
    height, width, channels = tifffile.memmap(tmp_path / "a" / "image" / "DEMO_A1.tiff", mode="r").shape
    assert height != width
    assert channels == 4


def test_the_untrained_model_is_the_one_training_started_from(trained, tmp_path):
    main.main(["--dataset", "small", "--save_path", str(tmp_path), *TRAIN, "--max_epochs", "1", "--lr", "0",
               "--wd", "0"])
    run = Run("small", "heg", tmp_path)
    kept = torch.load(run.checkpoint, weights_only=True)["model"]
    for name, value in infer.untrained_model(run.checkpoint).named_parameters():
        if name != "expression_head.bias":  # the mean profile of the training spots
            assert torch.equal(value, kept[name]), name


# ------------------------------------------------------------------------------ recipes, and other sections held out


@pytest.mark.parametrize("recipe", [name for name in TRAINING if name != "heclip"])  # that one is trained above
def test_a_recipe_trains_predicts_and_is_remembered(trained, tmp_path, recipe):
    here = ["--dataset", "small", "--save_path", str(tmp_path)]
    main.main([*here, *TRAIN, "--max_epochs", "1", "--recipe", recipe])
    infer.main([*here, "--device", "cpu", "--no-figures"])
    run = Run("small", "heg", tmp_path)
    facts = torch.load(run.checkpoint, weights_only=True)
    expected = TRAINING[recipe] | {"encoder_lr": TRAINING[recipe]["encoder_lr"] or TRAINING[recipe]["lr"]}
    assert {flag: facts["arguments"][flag] for flag in expected} == expected
    assert facts["config"]["bgr"] == (recipe == "published")
    assert ("log_temperature" in facts["model"]) == (recipe == "clip")
    if recipe == "clip":
        assert facts["model"]["log_temperature"].exp() != pytest.approx(0.1, rel=1e-6)
    scores, prediction = json.loads(run.scores.read_text()), run.prediction.read_bytes()
    used = PREDICTION[recipe] | ({"retrieval": "regression"} if recipe == "regression" else {})
    assert {flag: scores[flag] for flag in ("recipe", *used)} == {"recipe": recipe} | used
    assert set(scores["scores"]) == ({"regression", "random"} if recipe == "regression" else
                                     {"both", "gene", "image", "random"})
    if recipe in ("published", "bleep"):  # not smoothed: the plain mean of the nearest 50
        query, *reference = (np.load(run.embeddings(f"DEMO_{letter}1")) for letter in "CABD")
        key = PREDICTION[recipe]["retrieval"]
        nearest = np.concatenate([part[key] for part in reference])
        similarity = (query["image"] / np.linalg.norm(query["image"], axis=1, keepdims=True)) @ (
            nearest / np.linalg.norm(nearest, axis=1, keepdims=True)).T
        processed = Processed("small")
        expression = np.concatenate([processed.expression(f"DEMO_{letter}1", "heg", processed.panel("heg"))
                                     for letter in "ABD"])
        plain = np.stack([expression[np.argsort(-row)[:50]].mean(axis=0) for row in similarity])
        np.testing.assert_allclose(anndata.read_h5ad(run.prediction).X, plain, atol=1e-3)
    run.prediction.unlink()
    infer.main([*here, "--from_ebd", "--no-figures"])  # knows its recipe without the model
    assert json.loads(run.scores.read_text()) == scores
    assert run.prediction.read_bytes() == prediction


@pytest.fixture(scope="module")
def held_out(trained, tmp_path_factory):
    """A run with DEMO_A1 held out instead, on genes of the other type and without validation: flags, folder."""
    results = tmp_path_factory.mktemp("held_out")
    here = ["--dataset", "small", "--save_path", str(results)]
    main.main([*here, *TRAIN, "--max_epochs", "1", "--query", "DEMO_A1", "--panel", "hvg", "--val_fraction", "0"])
    infer.main([*here, "--device", "cpu", "--no-figures", "--query", "DEMO_A1", "--panel", "hvg"])
    return here, results


def test_another_section_held_out_chooses_another_reference_and_panel(held_out):
    run, processed = Run("small", "heg", held_out[1]), Processed("small")
    facts = torch.load(run.checkpoint, weights_only=True)
    reference = ["DEMO_B1", "DEMO_C1", "DEMO_D1"]
    genes = {name: processed.genes(name) for name in reference}
    panel = choose_panel("hvg", genes, 60, [processed.genes("DEMO_A1").index])
    assert (facts["reference"], facts["panel"], facts["panel_name"]) == (reference, list(panel.index), "hvg")
    assert facts["panel"] != list(processed.panel("hvg").index)
    prediction = anndata.read_h5ad(run.prediction)
    assert list(prediction.obs_names) == list(processed.read("DEMO_A1").obs_names)
    assert list(prediction.var_names) == facts["panel"]
    symbols = processed.panel("hvg").attrs["markers"]
    assert list(prediction.var["marker"]) == [symbol in symbols for symbol in prediction.var["symbol"]]
    scores = json.loads(run.scores.read_text())
    assert (scores["query"], scores["reference"]) == ("DEMO_A1", reference)


def test_without_validation_the_last_epoch_is_kept_and_no_correlation_is_expected(held_out):
    run = Run("small", "heg", held_out[1])
    assert list(pd.read_csv(run.losses).columns) == ["epoch", "train_loss"]
    assert "validation_pearson" not in torch.load(run.checkpoint, weights_only=True)
    assert "expected_pearson" not in anndata.read_h5ad(run.prediction).var


@pytest.mark.parametrize(("flags", "says"), [
    (["--panel", "hvg"], "trained on DEMO_C1, which is now the query"),
    (["--panel", "hvg", "--query", "DEMO_B1"], "trained on DEMO_B1, which is now the query"),
    (["--panel", "hvg", "--query", "DEMO_B1", "--from_ebd"], r"DEMO_B1\.npz was trained on DEMO_B1"),
    (["--panel", "hvg", "--query", "DEMO_Z1"], "no such section, but DEMO_A1, DEMO_B1, DEMO_C1, DEMO_D1"),
    (["--panel", "hvg", "--query", "DEMO_A1", "DEMO_B1"], "2 query sections; exactly one"),
    (["--query", "DEMO_A1"], r"another gene panel: .* --panel \(it was hvg\)"),
    (["--query", "DEMO_A1", "--from_ebd"], "another panel than DEMO_B1 has now"),
])
def test_prediction_of_what_the_model_was_not_trained_for_is_refused(held_out, flags, says):
    here, results = held_out
    before = hashes(results)
    with pytest.raises(InputError, match=says):
        infer.main([*here, "--device", "cpu", "--no-figures", *flags])
    assert hashes(results) == before


def test_holding_out_everything_is_refused(trained):
    with pytest.raises(InputError, match="no section is left to learn from"):
        main.main(["--dataset", "small", *TRAIN, "--query", *(f"DEMO_{letter}1" for letter in "ABCD")])


@pytest.mark.parametrize("name", ["heg", "hvg", "heg_paper"])
def test_the_panel_chosen_anew_is_the_one_on_disk_for_the_same_reference(trained, name, monkeypatch):
    processed = Processed("small")
    reference, query = processed.roles()
    assert (reference, query) == (["DEMO_A1", "DEMO_B1", "DEMO_D1"], ["DEMO_C1"])
    on_disk = processed.panel(name)
    pd.testing.assert_frame_equal(processed.panel_for(name, reference), on_disk)
    if name == "heg_paper":  # chosen by all sections, whoever asks
        pd.testing.assert_frame_equal(processed.panel_for(name, ["DEMO_B1"]), on_disk)
        return
    unknown = processed.panel(name)
    unknown.attrs["sections"] = ["other"]
    monkeypatch.setattr(Processed, "panel", lambda *_: unknown)
    anew = processed.panel_for(name, reference)
    pd.testing.assert_frame_equal(anew, on_disk, check_dtype=False)
    assert anew.attrs["sections"] == reference
    one = processed.panel_for(name, ["DEMO_B1"])
    assert len(one) == 60
    assert list(one.columns) == ["symbol", "marker", "rank_DEMO_B1"]


def test_flags_override_the_recipe_wherever_they_stand():
    for argv in (["--recipe", "clip", "--lr", "0.5", "--pixels", "raw_bgr"],
                 ["--lr", "0.5", "--pixels", "raw_bgr", "--recipe", "clip"]):
        args = main.parse(argv)
        assert {flag: getattr(args, flag) for flag in TRAINING["clip"]} == TRAINING["clip"] | {
            "lr": 0.5, "pixels": "raw_bgr"}
    assert main.parse([]).recipe == "heclip"
    assert main.parse(["--lr", "0.5"]).encoder_lr == 0.5  # as the heads'
    assert main.parse(["--lr", "0.5", "--encoder_lr", "0"]).encoder_lr == 0


def test_help_tells_the_default_recipes_values(capsys):
    with pytest.raises(SystemExit):
        main.parse(["--help"])
    assert "of the loss (default: 4.0)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("script", "flag"), [(infer, "--smoothing"), (main, "--colour_jitter")])
@pytest.mark.parametrize("value", ["-0.1", "nan", "inf", "much"])
def test_widths_and_strengths_below_zero_are_refused(script, flag, value, capsys):
    with pytest.raises(SystemExit):
        script.parse([f"{flag}={value}"])
    assert flag in capsys.readouterr().err


def test_the_learning_rate_rises_for_a_twentieth_and_falls_along_half_a_cosine_to_zero():
    factors = [main.learning_rate_factor(step, 200, "cosine") for step in range(1, 201)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert factors[104] == pytest.approx(0.5)  # half of the way from step 10 to 200
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == pytest.approx(0, abs=1e-12)
    assert factors[57] == pytest.approx((1 + math.cos(math.pi * 48 / 190)) / 2)
    for steps in (1, 2, 3, 20):
        few = [main.learning_rate_factor(step, steps, "cosine") for step in range(1, steps + 1)]
        assert few[0] == 1  # one step at least at the full rate
        assert all(0 <= factor <= 1 for factor in few)
    assert {main.learning_rate_factor(step, 200, "constant") for step in (1, 7, 200)} == {1}
