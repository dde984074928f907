"""The scripts as a user runs them: the demo at a small size, from preprocessing to figures."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from makers import (
    QUERY,
    REFERENCE,
    TRAIN,
    hashes,
    network,
    prepare,
    run_script,
    small_dataset,
    untrained,
)
from test_prediction import slow_predict

import infer
import main
import preprocess_demo
import preprocess_MOB
from heclip import command
from heclip.checkpoint import load_checkpoint
from heclip.dataset import Processed, Run
from heclip.files import InputError
from heclip.panel import choose_panel
from heclip.parallel import Ranks
from heclip.prediction import embed_sections
from heclip.script import preprocess
from heclip.settings import PREDICTING, TRAINING, Predicting, Training, parse_training

ALL = ["DEMO_A1", "DEMO_B1", "DEMO_C1", "DEMO_D1"]
ONE_EPOCH = [*TRAIN, "--max_epochs", "1"]
FAST = ["--device", "cpu", "--no-figures", "--views", "1"]


def plain_umap(groups, path, title):
    """Stands in for a UMAP, whose compilation takes longer than all else here."""
    assert len({np.shape(rows)[1] for rows in groups.values()}) == 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(title + "".join(f"{name} {np.sum(rows):.6g}" for name, rows in groups.items()))


# ------------------------------------------------------------------------------- preprocessing


def test_sections_by_several_workers_or_one_by_one_give_the_same_files():
    folders, rest = {}, ["DEMO_A1", "DEMO_B1", "DEMO_C1"]
    for name, calls in (("workers", [["--workers", "2"]]),
                        ("jobs", [["--section", "DEMO_D1"], ["--section", *rest], []])):
        folder = small_dataset(f"by_{name}").raw / "processed"
        for flags in calls:
            prepare(f"by_{name}", *flags)
            if flags == ["--section", "DEMO_D1"]:  # a part of the sections chooses no panel
                assert set(hashes(folder)) == {"DEMO_D1.h5ad", "DEMO_D1.patches.npy"}
        folders[name] = hashes(folder)
    assert len(folders["jobs"]) == 12
    assert folders["workers"] == folders["jobs"]


def test_the_demo_is_the_same_every_time_and_its_slides_are_not_square(tmp_path):
    preprocess_demo.generate(tmp_path / "a", n_sections=1, grid=(8, 10), n_genes=60)
    preprocess_demo.generate(tmp_path / "b", n_sections=2, grid=(8, 10), n_genes=60)
    first = hashes(tmp_path / "a")
    assert {name: hashes(tmp_path / "b")[name] for name in first} == first
    image = tifffile.memmap(tmp_path / "a" / "image" / "DEMO_A1.tiff", mode="r")
    height, width, channels = image.shape
    assert height != width
    assert channels == 4


def test_names_of_sections_and_donors_are_text_even_na_and_numbers(tmp_path, monkeypatch):
    processed = Processed("names")
    monkeypatch.setattr(processed, "sections_path", tmp_path / "sections.csv")
    processed.sections_path.write_text(
        "section,donor,role,n_spots,mpp,crop_px,patch_px,digest\n"
        "NA,NA,reference,10,0.5,32,32,0012\n007,1,query,10,0.5,32,32,1e10\nnull,,reference,10,0.5,"
        "32,32,nan\n")
    table = processed.sections()
    assert list(table.index) == ["NA", "007", "null"]
    assert list(table["donor"]) == ["NA", "1", ""]
    assert list(table["digest"]) == ["0012", "1e10", "nan"]
    assert processed.roles() == (["NA", "null"], ["007"])
    assert processed.roles(["NA"]) == (["007", "null"], ["NA"])


def replaced(path, array):
    """Save other patches in the place of a section's, and return what was there."""
    before = path.read_bytes()
    np.save(path, array)
    return before


@pytest.mark.parametrize("change", [lambda patches: patches[::-1], lambda patches: patches[:-1],
                                    lambda patches: patches[:, ::2, ::2]],
                         ids=["other_order", "one_spot_fewer", "smaller"])
def test_patches_of_another_version_than_the_h5ad_are_refused(trained, change):
    processed = Processed("small")
    path = processed.patches_path(QUERY)
    before = replaced(path, change(np.load(path)))
    try:
        for flags in (FAST, [*FAST, "--ebd_only"]):
            with pytest.raises(InputError, match=r"DEMO_C1\.patches\.npy and .*DEMO_C1\.h5ad were "
                                                 "not made together. Delete both and run python"):
                infer.main(["--dataset", "small", "--save_path", str(trained), *flags,
                            "--overwrite"])
    finally:
        path.write_bytes(before)


# ---------------------------------------------------------------------- from training to figures


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that was trained and inferred on the small data set."""
    prepare("small", "--protocol", "paper")
    results = tmp_path_factory.mktemp("run")
    here = ["--dataset", "small", "--save_path", str(results)]
    main.main([*here, *TRAIN, "--max_epochs", "2"])
    infer_again(results)
    return results


def infer_again(results):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer.figures, "umap_figure", plain_umap)
        infer.main(["--dataset", "small", "--save_path", str(results), "--device", "cpu",
                    "--untrained", "--k", "10", "--views", "2"])


def scores_of(run):
    return json.loads(run.scores.read_text())


def test_every_output_is_where_the_readme_says(trained):
    assert set(hashes(trained)) == {
        "small/heg_best.pt", "small/heg_last.pt", "small/heg_losses.csv",
        "small/heg_prediction.h5ad", "small/heg_genes.csv", "small/heg_scores.json",
        "small/heg_prediction.html", *(f"ebd/small/heg/{section}.npz" for section in ALL),
        "figure/MAP/small_heg.png", "figure/CAL/small_heg.png",
        "figure/EBD/small_heg.pdf", "figure/EXP/small_heg.pdf"}


def test_the_prediction_is_the_mean_of_the_nearest_reference_spots_smoothed(trained):
    run, processed = Run("small", "heg", trained), Processed("small")
    panel = processed.panel("heg")
    sections = [dict(np.load(run.embeddings(section)))
                | {"expression": processed.expression(section, panel)} for section in REFERENCE]
    prediction, how = anndata.read_h5ad(run.prediction), Predicting(k=10)
    expression, rows, similarity = slow_predict(
        np.load(run.embeddings(QUERY))["image"], prediction.obsm["spatial"], sections, how)
    np.testing.assert_allclose(prediction.X, expression, atol=1e-4)
    np.testing.assert_allclose(prediction.obs["similarity"], similarity.mean(axis=1), atol=1e-5)
    reference = np.concatenate([section["expression"] for section in sections])
    spread = reference[rows].std(axis=1).mean(axis=1)
    np.testing.assert_allclose(prediction.obs["spread"], spread, atol=1e-3)
    truth = processed.expression(QUERY, panel)
    np.testing.assert_array_equal(prediction.layers["true"], truth)
    assert list(prediction.var_names) == list(panel.ids)
    assert list(prediction.obs_names) == list(processed.barcodes(QUERY))
    np.testing.assert_allclose(prediction.var["expected_pearson"],
                               load_checkpoint(run.checkpoint).validation)
    about = json.loads(prediction.uns["heclip"])
    assert (about["query"], about["reference"]) == (QUERY, REFERENCE)
    assert about["how"] == vars(replace(how, views=2))
    assert about["model"]["digest"] == load_checkpoint(run.checkpoint).digest


def test_scores_in_json_are_those_of_the_prediction_file(trained):
    run = Run("small", "heg", trained)
    prediction, scores = anndata.read_h5ad(run.prediction), scores_of(run)["scores"]
    r = [np.corrcoef(prediction.X[:, gene], prediction.layers["true"][:, gene])[0, 1]
         for gene in range(prediction.n_vars)]
    assert scores["both"]["Pearson"] == pytest.approx(np.nanmean(r), abs=1e-6)
    assert list(scores) == ["both", "gene", "image", "untrained gene", "untrained image", "random"]
    genes = pd.read_csv(run.genes, index_col="gene_id")
    np.testing.assert_allclose(genes.loc[prediction.var_names, "Pearson"], r, atol=1e-6)
    markers = genes.loc[genes["marker"], "Pearson"]
    assert len(markers) > 0
    assert scores["both"]["markers"] == pytest.approx(markers.mean())


def test_only_the_retrieval_that_was_asked_for_is_scored(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    run = Run("small", "heg", tmp_path / "run")
    both = scores_of(run)["scores"]
    infer.main(["--dataset", "small", "--save_path", str(run.top), "--device", "cpu",
                "--no-figures", "--untrained", "--k", "10", "--views", "2", "--retrieval", "gene"])
    scores = scores_of(run)["scores"]
    assert list(scores) == ["gene", "untrained gene", "random"]
    assert scores["gene"] == both["gene"]  # the same as next to both
    assert scores["untrained gene"] == both["untrained gene"]


def test_losses_and_checkpoint_say_which_epoch_was_the_best(trained):
    run, processed = Run("small", "heg", trained), Processed("small")
    losses = pd.read_csv(run.losses)
    assert list(losses) == ["epoch", "train_loss", "validation_loss", "validation_pearson"]
    assert list(losses["epoch"]) == [1, 2]
    model = load_checkpoint(run.checkpoint)
    best = losses.loc[losses["validation_pearson"].idxmax()]
    assert model.epoch == best["epoch"]
    assert np.nanmean(model.validation) == pytest.approx(best["validation_pearson"])
    assert model.reference == processed.sections().loc[REFERENCE, "digest"].to_dict()
    assert list(model.panel.ids) == list(processed.panel("heg").ids)
    assert (model.patch_px, round(model.patch_um)) == (32, 39)
    assert (model.settings.max_epochs, model.settings.recipe) == (2, "heclip")


def test_a_section_validates_by_being_predicted_from_the_others(trained):
    processed, run = Processed("small"), Run("small", "heg", trained)
    model = load_checkpoint(run.checkpoint)
    sizes = processed.sections().loc[REFERENCE, "n_spots"]
    held_out = (sizes / sizes.sum() - model.settings.val_fraction).abs().idxmin()
    expression = {name: processed.expression(name, model.panel) for name in REFERENCE}
    how = main.PREDICTING["heclip"]  # by one view, as all trainings of the tests
    embeddings = embed_sections(model, processed, expression, how.views, torch.device("cpu"), 16)
    sections = [embeddings[name] | {"expression": expression[name]}
                for name in REFERENCE if name != held_out]
    predicted, _, _ = slow_predict(embeddings[held_out]["image"], processed.xy(held_out), sections,
                                   how)
    r = [np.corrcoef(*pair)[0, 1] for pair in zip(predicted.T, expression[held_out].T, strict=True)]
    assert np.nanmean(r) == pytest.approx(np.nanmean(model.validation), abs=0.002)
    np.testing.assert_allclose(r, model.validation, atol=0.05)


def test_training_never_opens_the_query_section(trained, tmp_path, monkeypatch):
    opened = []
    for reader in ("opened", "patches", "expression"):
        original = getattr(Processed, reader)
        monkeypatch.setattr(Processed, reader, lambda self, section, *rest, original=original:
                            opened.append(section) or original(self, section, *rest))
    main.main(["--dataset", "small", "--save_path", str(tmp_path), *ONE_EPOCH])
    assert set(opened) == set(REFERENCE)


def test_same_seed_same_training_and_another_seed_another(trained, tmp_path):
    losses, weights = {}, {}
    for name, seed in (("first", "1"), ("again", "1"), ("other", "2")):
        main.main(["--dataset", "small", "--save_path", str(tmp_path / name), *ONE_EPOCH,
                   "--seed", seed])
        run = Run("small", "heg", tmp_path / name)
        losses[name] = run.losses.read_bytes()
        weights[name] = load_checkpoint(run.checkpoint).network.state_dict()
    assert losses["first"] == losses["again"] != losses["other"]
    for key, value in weights["first"].items():
        assert torch.equal(value, weights["again"][key])


def test_inference_twice_gives_identical_files(trained):
    """But for the page: within one process Bokeh numbers its parts on and on."""
    before = hashes(trained)
    infer_again(trained)
    after = hashes(trained)
    assert {path for path in before if after[path] != before[path]} <= {"small/heg_prediction.html"}
    assert after.keys() == before.keys()


def test_scoring_again_from_embeddings_needs_no_model(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (copy / "small" / "heg_best.pt").unlink()
    infer.main(["--dataset", "small", "--save_path", str(copy), "--from_ebd", "--k", "10",
                "--no-figures"])
    kept = {name: digest for name, digest in hashes(trained).items()
            if name.endswith((".h5ad", "genes.csv"))}
    assert {name: hashes(copy)[name] for name in kept} == kept


@pytest.mark.parametrize(("kind", "protocol"), [("hvg", "strict"), ("heg", "paper")])
def test_the_other_panel_and_protocol_run_too(trained, tmp_path, kind, protocol, capsys):
    here = ["--dataset", "small", "--save_path", str(tmp_path), "--type", kind,
            "--protocol", protocol]
    main.main([*here, *ONE_EPOCH])
    infer.main([*here, *FAST, "--retrieval", "image"])
    name = kind if protocol == "strict" else f"{kind}_paper"
    run = Run("small", name, tmp_path)
    panel = Processed("small").panel(kind, protocol)
    width = 256 if kind == "heg" else len(panel)
    assert np.load(run.embeddings(QUERY))["image"].shape[1] == width
    assert (QUERY in panel.sections) == (protocol == "paper")
    assert ("query's truth" in capsys.readouterr().out) == (protocol == "paper")
    assert list(scores_of(run)["scores"]) == ["image", "random"]


def test_training_improves_on_the_first_epoch(trained, tmp_path):
    # Mixed patches are too hard for so small an encoder to show much of it.
    main.main(["--dataset", "small", "--save_path", str(tmp_path), *TRAIN, "--max_epochs", "8",
               "--mixup", "0", "--val_fraction", "0"])
    losses = pd.read_csv(tmp_path / "small" / "heg_losses.csv")
    assert losses["train_loss"].iloc[-1] < 0.9 * losses["train_loss"].iloc[0]


def test_the_untrained_model_is_the_one_training_started_from(trained, tmp_path):
    main.main(["--dataset", "small", "--save_path", str(tmp_path), *ONE_EPOCH, "--lr", "0",
               "--wd", "0"])
    model = load_checkpoint(Run("small", "heg", tmp_path).checkpoint)
    kept = model.network.state_dict()
    for name, value in infer.untrained_model(model).network.named_parameters():
        if name != "expression_head.bias":  # the mean profile of the training spots
            assert torch.equal(value, kept[name]), name


# ----------------------------------------------------------------- as commands, and their mistakes


def test_a_script_does_the_same_from_elsewhere(trained, project, tmp_path, capsys):
    flags = ["--dataset", "small", "--save_path", str(trained), "--from_ebd", "--k", "10",
             "--no-figures"]
    done = run_script(project / "code/infer.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    infer.main(flags)  # from the root
    assert done.stdout == capsys.readouterr().out
    assert re.search(r"HEG-50 +-?\d\.\d{3}", done.stdout)


def test_a_mistake_of_a_script_is_one_line_without_a_traceback(project):
    done = run_script(project / "code/main.py", "--dataset", "nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "no preprocess script is called nowhere" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("script", ["main.py", "infer.py"])
def test_a_wrong_flag_is_answered_before_the_slow_imports(project, script):
    """Runs the script as __main__ and prints, as it ends, whether torch was imported."""
    code = ("import atexit, runpy, sys; sys.argv = [sys.argv[1], '--nonsense']; "
            "sys.path.insert(0, 'code'); "
            "atexit.register(lambda: print({'torch', 'numpy', 'anndata'} & set(sys.modules))); "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code, f"code/{script}"], cwd=project,
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "error: unrecognized arguments: --nonsense" in done.stderr
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(("script", "flags", "says"), [
    (main, ["--dataset", "MOB"], "python code/preprocess_MOB.py"),
    (infer, ["--dataset", "small", "--save_path", "EMPTY"], "Train it with main.py"),
    (infer, ["--dataset", "small", "--save_path", "EMPTY", "--from_ebd"], "without --from_ebd"),
    (main, ["--dataset", "small", "--device", "cuda:99"], "Try --device cpu"),
    (main, ["--dataset", "small", "--encoder", "resnet49"], "--encoder resnet49"),
    (main, ["--dataset", "small", "--encoder_weights", "absent.pth"], "absent.pth"),
    (main, ["--freeze", "--colour_jitter", "0.2"], "--colour_jitter 0.2 with --freeze"),
    (main, ["--freeze", "--no-pretrained"], "nothing would ever train the encoder"),
    (main, ["--recipe", "regression", "--temperature", "2"], "a squared error has no temperature"),
    (preprocess_MOB, ["--raw", "EMPTY"], "no counts of section MOB1"),
])
def test_a_users_mistake_ends_in_one_clear_line(trained, tmp_path, monkeypatch, script, flags,
                                                says):
    flags = [str(tmp_path) if flag == "EMPTY" else flag for flag in flags]
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        command.run(lambda: script.main(flags))
    message = str(ended.value.code)  # which Python prints, and exits with 1
    assert message.startswith("error: ")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(("parse", "flags", "says"), [
    (parse_training, ["--seed", "-1"], "argument --seed: -1 is not a whole number"),
    (parse_training, ["--val_fraction", "1.5"],
     "argument --val_fraction: 1.5 does not lie between 0 and 1"),
    (parse_training, ["--colour_jitter=-0.1"], "argument --colour_jitter: -0.1 is not"),
    (parse_training, ["--lr", "nan"], "argument --lr: nan is not"),
    (parse_training, ["--temperature", "0"], "argument --temperature: 0 is not above 0"),
    (parse_training, ["--batch_size", "0"], "argument --batch_size: 0 is not at least 1"),
    (parse_training, ["--mixup", "much"], "argument --mixup: invalid"),
    (parse_training, ["--loss", "clip"], "unrecognized arguments: --loss"),
    (infer.parse, ["--seed", "-1"], "argument --seed: -1 is not a whole number"),
    (infer.parse, ["--smoothing", "inf"], "argument --smoothing: inf is not"),
    (infer.parse, ["--views", "3"], "argument --views: invalid choice"),
    (infer.parse, ["--panel", "hvg"], "unrecognized arguments: --panel"),
    (parse_training, ["--rec", "clip"], "unrecognized arguments: --rec"),
    *((infer.parse, ["--image", "x.tif", *flags], f"leave out {flags[0]}") for flags in (
        ["--query", "A"], ["--seed", "1"], ["--seed", "0"], ["--panel_file", "x"], ["--ebd_only"],
        ["--from_ebd"], ["--untrained"])),
    *((infer.parse, flags, f"{flags[0]} goes with --image") for flags in (
        ["--mpp", "0.5"], ["--pitch", "50"], ["--positions", "x"], ["--spatialdata", "x"],
        ["--name", "x"], ["--whole_image"])),
    (infer.parse, ["--image", "x.tif", "--positions", "x", "--whole_image"],
     "argument --whole_image: not allowed with argument --positions"),
    *((infer.parse, ["--from_ebd", *flags], f"leave out {flags[0]}") for flags in (
        ["--checkpoint", "x"], ["--untrained"], ["--panel_file", "x"], ["--compile"])),
])
def test_a_wrong_flag_is_shown_with_the_usage_and_exit_code_2(parse, flags, says, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(flags)
    assert ended.value.code == 2
    *usage, error = capsys.readouterr().err.strip().splitlines()
    assert usage[0].startswith("usage: ")
    assert "error: " in error
    assert says in error


# --------------------------------------------------------------- a model on what it was trained for


def test_a_non_finite_loss_stops_training_and_keeps_the_old_checkpoint(trained, tmp_path):
    here = ["--dataset", "small", "--save_path", str(tmp_path), *ONE_EPOCH]
    main.main(here)
    before = hashes(tmp_path)
    with pytest.raises(InputError, match="diverged"):
        main.main([*here, "--lr", "1e30", "--overwrite"])
    assert hashes(tmp_path) == before


def test_a_checkpoint_of_another_panel_or_dataset_is_refused(trained, tmp_path):
    prepare("other")
    for name, says in (("small/hvg_best.pt", ".*--type hvg"),
                       ("other/heg_best.pt", "--dataset other"),
                       ("small/heg_paper_best.pt", ".*--protocol paper")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(trained / "small" / "heg_best.pt", path)
        protocol = "paper" if "paper" in name else "strict"
        refusal = f"was trained on small heg, and is asked for as {says}"
        with pytest.raises(InputError, match=refusal):
            infer.main(["--dataset", path.parent.name, "--type", path.name[:3], "--protocol",
                        protocol, "--save_path", str(tmp_path), *FAST])


def test_a_checkpoint_that_saw_the_query_section_is_refused(trained, tmp_path):
    table = Processed("small").sections()
    untrained(Run("small", "heg", tmp_path).checkpoint, "small",
              reference=table.loc[["DEMO_A1", QUERY], "digest"].to_dict())
    with pytest.raises(InputError, match="trained on DEMO_C1, which is now the query"):
        infer.main(["--dataset", "small", "--save_path", str(tmp_path), *FAST, "--query", QUERY])


@pytest.mark.parametrize("from_ebd", [[], ["--from_ebd"]])
def test_a_query_whose_spots_are_in_the_reference_is_refused(trained, tmp_path, from_ebd):
    """Under another name, from embeddings too: as if a copy had been made after preprocessing."""
    processed = Processed("small")
    before = processed.fingerprints()
    if from_ebd:
        shutil.copytree(trained / "ebd" / "small", tmp_path / "ebd" / "small")
    shutil.copytree(trained / "small", tmp_path / "small")
    try:
        own = before[QUERY].copy()
        own[:3] = before["DEMO_D1"][:3]
        np.savez(processed.fingerprints_path, **before | {QUERY: own})
        with pytest.raises(InputError, match="DEMO_C1 and DEMO_D1 hold the same spots"):
            infer.main(["--dataset", "small", "--save_path", str(tmp_path), *FAST, "--views", "2",
                        *from_ebd])
    finally:
        np.savez(processed.fingerprints_path, **before)


def test_check_of_a_dataset_script_shows_what_there_is_and_writes_nothing(trained, capsys):
    dataset = small_dataset("small")
    folder = dataset.raw.parent
    before = hashes(folder)
    preprocess(dataset, ["--check"])
    said = capsys.readouterr().out
    for part in ("DEMO_C1", "genes are in every section", "All is well"):
        assert part in said
    wrong = [replace(section, n_spots=7, image=["none.tif"]) for section in dataset.sections[:1]]
    with pytest.raises(InputError, match="2 to fix"):
        preprocess(replace(dataset, sections=wrong), ["--check"])
    said = capsys.readouterr().out
    for part in ("1. DEMO_A1: ", "looked for none.tif", "has 7"):
        assert part in said
    assert hashes(folder) == before


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A run whose dataset was preprocessed again with wider patches after training: its folder."""
    prepare("changed")
    results = tmp_path_factory.mktemp("changed")
    here = ["--dataset", "changed", "--save_path", str(results)]
    main.main([*here, *ONE_EPOCH])
    infer.main([*here, *FAST])
    prepare("changed", "--patch_um", "60")
    return results


@pytest.mark.parametrize(("script", "flags", "says"), [
    (infer, FAST, "trained on patches of 39 µm in 32 px, and DEMO_A1, DEMO_B1, DEMO_D1 was made "
                  "again since, .* patches of 60 µm in 32 px"),
    (infer, [*FAST, "--from_ebd"], "was made before DEMO_A1 was preprocessed again"),
    (main, [*ONE_EPOCH, "--resume"], "is of another run: its sections were made again since: "
                                     "patches of 39 µm, now 60 µm"),
    (main, ONE_EPOCH, "holds another model: its sections .* patches of 39 µm, now 60 µm"),
])
def test_patches_that_changed_after_training_are_refused(changed, script, flags, says):
    before = hashes(changed)
    with pytest.raises(InputError, match=says):
        script.main(["--dataset", "changed", "--save_path", str(changed), *flags])
    assert hashes(changed) == before


def test_one_section_preprocessed_in_another_way_is_refused(tmp_path):
    """`--section` writes no section table: the sections must not be trusted to agree with it."""
    prepare("one_changed")
    untrained(Run("one_changed", "heg", tmp_path).checkpoint, "one_changed")
    prepare("one_changed", "--section", QUERY, "--patch_um", "60")
    here = ["--dataset", "one_changed", "--save_path", str(tmp_path)]
    with pytest.raises(InputError, match=r"DEMO_C1\.h5ad was preprocessed in another way since"):
        infer.main([*here, *FAST])
    prepare("one_changed", "--section", "DEMO_A1", "--patch_um", "60")
    with pytest.raises(InputError, match=r"DEMO_A1\.h5ad was preprocessed in another way since"):
        main.main([*here, *ONE_EPOCH, "--overwrite"])


def test_embeddings_of_an_earlier_model_or_of_other_views_are_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    here = ["--dataset", "small", "--save_path", str(tmp_path / "run"), "--from_ebd",
            "--no-figures"]
    with pytest.raises(InputError, match="averages 2 views of each patch, not the 8 of --views"):
        infer.main([*here, "--views", "8"])
    untrained(Run("small", "heg", tmp_path / "run").checkpoint, "small", seed=1)
    with pytest.raises(InputError, match="was made by another model than the one that is there"):
        infer.main(here)


# ----------------------------------------------------------------- nothing is replaced by accident


def test_a_model_of_another_recipe_or_other_sections_is_not_replaced(trained, tmp_path):
    shutil.copytree(trained / "small", tmp_path / "small")
    here, before = ["--dataset", "small", "--save_path", str(tmp_path)], hashes(tmp_path)
    for flags, says in ((["--recipe", "clip"], "--recipe was heclip, is clip"),
                        (["--query", "DEMO_A1"], "its reference was DEMO_A1, DEMO_B1, DEMO_D1"),
                        (["--panel", "hvg"], "its panel differs")):
        with pytest.raises(InputError, match=f"holds another model: .*{says}.*--overwrite"):
            main.main([*here, *TRAIN, "--max_epochs", "2", *flags])
    assert hashes(tmp_path) == before
    main.main([*here, *ONE_EPOCH, "--recipe", "clip", "--overwrite"])
    model = load_checkpoint(tmp_path / "small" / "heg_best.pt")
    assert model.settings.recipe == "clip"


def test_the_prediction_of_another_section_or_model_is_not_replaced(trained, tmp_path):
    here = ["--save_path", str(tmp_path), *FAST]
    digest = Processed("small").sections()["digest"]
    models = {"ours": {}, "other recipe": {"recipe": "bleep"},
              "other reference": {"reference": digest[["DEMO_A1", "DEMO_D1"]].to_dict()}}
    for name, changes in models.items():
        untrained(tmp_path / f"{name}.pt", "small", **changes)

    def predict(name, *flags):
        infer.main([*here, "--checkpoint", str(tmp_path / f"{name}.pt"), *flags])

    predict("ours")
    before = hashes(tmp_path)
    with pytest.raises(InputError, match="another prediction: --recipe was heclip, is bleep"):
        predict("other recipe")
    with pytest.raises(InputError, match="another prediction: it is of DEMO_C1, not of DEMO_B1"):
        predict("other reference", "--query", "DEMO_B1")
    assert hashes(tmp_path) == before
    predict("ours", "--k", "20")  # the same section by the same model, in another way
    predict("other reference", "--query", "DEMO_B1", "--overwrite")
    assert scores_of(Run("small", "heg", tmp_path))["query"] == "DEMO_B1"


def test_results_of_a_given_checkpoint_are_named_by_the_model(trained, tmp_path):
    untrained(tmp_path / "my model.pt", "small", kind="hvg", protocol="paper")
    infer.main(["--checkpoint", str(tmp_path / "my model.pt"), "--save_path", str(tmp_path),
                *FAST])
    run = Run("small", "hvg_paper", tmp_path)
    assert set(hashes(tmp_path)) == {
        "my model.pt", *(f"ebd/small/hvg_paper/{section}.npz" for section in ALL),
        *(f"small/hvg_paper_{what}" for what in ("prediction.h5ad", "genes.csv", "scores.json"))}
    assert (scores_of(run)["type"], scores_of(run)["protocol"]) == ("hvg", "paper")
    with pytest.raises(InputError, match="trained on small hvg_paper, and is asked for as"):
        infer.main(["--checkpoint", str(tmp_path / "my model.pt"), "--save_path", str(tmp_path),
                    *FAST, "--type", "heg", "--protocol", "strict"])


# ------------------------------------------------------------ recipes, and other sections held out


@pytest.mark.parametrize("recipe", [name for name in TRAINING if name != "heclip"])
def test_a_recipe_trains_predicts_and_is_remembered(trained, tmp_path, recipe):
    here = ["--dataset", "small", "--save_path", str(tmp_path)]
    main.main([*here, *ONE_EPOCH, "--recipe", recipe])
    infer.main([*here, "--device", "cpu", "--no-figures"])
    run = Run("small", "heg", tmp_path)
    model = load_checkpoint(run.checkpoint)
    expected = TRAINING[recipe]
    for flag in ("recipe", "loss", "temperature", "expression_loss", "pixels", "colour_jitter",
                 "mixup", "schedule", "lr", "encoder_lr", "wd"):
        assert getattr(model.settings, flag) == getattr(expected, flag), flag
    assert model.network.config.bgr == (recipe == "published")
    learned = model.network.state_dict().get("log_temperature")
    assert (learned is not None) == (recipe == "clip")
    if recipe == "clip":
        assert learned.exp() != pytest.approx(0.1, rel=1e-6)
    scores, prediction = scores_of(run), anndata.read_h5ad(run.prediction)
    used = vars(PREDICTING[recipe])
    if recipe == "regression":
        used = used | {"retrieval": "regression"}
    assert {flag: scores[flag] for flag in ("recipe", *used)} == {"recipe": recipe} | used
    assert list(scores["scores"]) == [used["retrieval"], "random"]
    image = np.load(run.embeddings(QUERY))["image"]
    if recipe == "regression":
        np.testing.assert_array_equal(prediction.X, image)
        assert not {"similarity", "spread"} & set(prediction.obs)
    else:
        processed = Processed("small")
        panel = processed.panel("heg")
        sections = [dict(np.load(run.embeddings(section)))
                    | {"expression": processed.expression(section, panel)} for section in REFERENCE]
        expression, _, _ = slow_predict(image, None, sections, PREDICTING[recipe])
        np.testing.assert_allclose(prediction.X, expression, atol=1e-3)
    written = run.prediction.read_bytes()
    run.prediction.unlink()
    infer.main([*here, "--from_ebd", "--no-figures"])  # knows its recipe without the model
    assert scores_of(run) == scores
    assert run.prediction.read_bytes() == written


@pytest.fixture(scope="module")
def held_out(trained, tmp_path_factory):
    """A run without validation, DEMO_A1 held out, genes of the other type: (flags, folder)."""
    results = tmp_path_factory.mktemp("held_out")
    here = ["--dataset", "small", "--save_path", str(results)]
    main.main([*here, *ONE_EPOCH, "--query", "DEMO_A1", "--panel", "hvg", "--val_fraction", "0"])
    infer.main([*here, *FAST])  # which predicts the section that the model has not seen
    return here, results


def test_another_section_held_out_chooses_another_reference_and_panel(held_out):
    run, processed = Run("small", "heg", held_out[1]), Processed("small")
    model = load_checkpoint(run.checkpoint)
    reference = ["DEMO_B1", "DEMO_C1", "DEMO_D1"]
    genes = {name: processed.genes(name) for name in reference}
    panel = choose_panel("hvg", genes, 60, [processed.genes("DEMO_A1").index])
    assert (list(model.reference), model.panel.kind) == (reference, "hvg")
    assert list(model.panel.ids) == list(panel.ids) != list(processed.panel("hvg").ids)
    assert model.settings.query == ("DEMO_A1",)
    prediction = anndata.read_h5ad(run.prediction)
    assert list(prediction.obs_names) == list(processed.barcodes("DEMO_A1"))
    assert list(prediction.var_names) == list(panel.ids)
    markers = processed.panel("hvg").markers
    expected = [symbol in markers for symbol in prediction.var["symbol"]]
    assert list(prediction.var["marker"]) == expected
    assert any(expected)
    scores = scores_of(run)
    assert (scores["query"], scores["reference"]) == ("DEMO_A1", reference)


def test_without_validation_the_last_epoch_is_kept_and_no_correlation_is_expected(held_out):
    run = Run("small", "heg", held_out[1])
    assert list(pd.read_csv(run.losses).columns) == ["epoch", "train_loss"]
    assert load_checkpoint(run.checkpoint).validation is None
    assert "expected_pearson" not in anndata.read_h5ad(run.prediction).var


@pytest.mark.parametrize(("flags", "says"), [
    (["--query", "DEMO_B1"], "trained on DEMO_B1, which is now the query"),
    (["--query", "DEMO_B1", "--from_ebd"], r"DEMO_B1\.npz was trained on DEMO_B1"),
    (["--query", "DEMO_Z1"], "no such section, but DEMO_A1, DEMO_B1, DEMO_C1, DEMO_D1"),
])
def test_prediction_of_what_the_model_was_not_trained_for_is_refused(held_out, flags, says):
    here, results = held_out
    before = hashes(results)
    with pytest.raises(InputError, match=says):
        infer.main([*here, "--device", "cpu", "--no-figures", *flags])
    assert hashes(results) == before


def test_of_several_sections_that_the_model_has_not_seen_one_must_be_named(trained, tmp_path):
    digest = Processed("small").sections()["digest"]
    untrained(tmp_path / "model.pt", "small", reference=digest[["DEMO_C1", "DEMO_D1"]].to_dict())
    with pytest.raises(InputError, match=r"has 2 query sections; exactly one .*--query"):
        infer.main(["--checkpoint", str(tmp_path / "model.pt"), "--save_path", str(tmp_path),
                    *FAST])


def test_holding_out_everything_is_refused(trained):
    with pytest.raises(InputError, match="no section is left to learn from"):
        main.main(["--dataset", "small", *TRAIN, "--query", *ALL])


@pytest.mark.parametrize(("kind", "protocol"), [("heg", "strict"), ("hvg", "strict"),
                                                ("heg", "paper")])
def test_the_panel_chosen_again_is_the_one_on_disk_for_the_same_reference(trained, kind, protocol,
                                                                          monkeypatch):
    processed = Processed("small")
    assert processed.roles() == (REFERENCE, [QUERY])
    on_disk = processed.panel(kind, protocol)
    pd.testing.assert_frame_equal(processed.panel(kind, protocol, REFERENCE).genes, on_disk.genes)
    if protocol == "paper":  # chosen by all sections, whichever is held out
        other = processed.panel(kind, protocol, ["DEMO_B1"])
        pd.testing.assert_frame_equal(other.genes, on_disk.genes)
        return
    of_others = replace(on_disk, sections=["other"])
    monkeypatch.setattr("heclip.dataset.read_panel", lambda path: of_others)
    again = processed.panel(kind, protocol, REFERENCE)
    pd.testing.assert_frame_equal(again.genes, on_disk.genes, check_dtype=False)
    assert replace(again, genes=None) == replace(on_disk, genes=None)
    one = processed.panel(kind, protocol, ["DEMO_B1"])
    assert len(one) == 60
    assert list(one.genes.columns) == ["symbol", "marker", "rank_DEMO_B1"]


# ------------------------------------------------------------------------------------- settings


def test_flags_override_the_recipe_wherever_they_stand():
    for argv in (["--recipe", "clip", "--lr", "0.5", "--pixels", "raw_bgr"],
                 ["--lr", "0.5", "--pixels", "raw_bgr", "--recipe", "clip"]):
        assert parse_training(argv) == replace(TRAINING["clip"], lr=0.5, pixels="raw_bgr")
    assert parse_training([]) == Training()
    assert parse_training(["--lr", "0.5"]).encoder_rate == 0.5  # as the heads'
    assert parse_training(["--lr", "0.5", "--encoder_lr", "0"]).encoder_rate == 0
    assert parse_training(["--query", "A", "B"]).query == ("A", "B")
    frozen = parse_training(["--freeze", "--recipe", "published", "--max_epochs", "3"])
    assert (frozen.mixup, frozen.expression_loss, frozen.max_epochs) == (0, 0, 3)
    assert parse_training(["--freeze"]).max_epochs == 40


def test_help_shows_the_default_recipes_values(capsys):
    with pytest.raises(SystemExit):
        parse_training(["--help"])
    assert "of the loss (default: 4.0)" in " ".join(capsys.readouterr().out.split())


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


def test_patches_and_their_expression_are_mixed_in_the_same_shares():
    level = torch.arange(8.0) * 30
    patches = level.to(torch.uint8).view(8, 1, 1, 1).expand(8, 32, 32, 3)
    model, seen = network(n_genes=1), []

    def spy(pixels, expression):
        seen.append((127.5 * (1 + pixels.mean(dim=(1, 2, 3))), expression[:, 0]))  # from -1 to 1
        return model(pixels, expression)

    trained = SimpleNamespace(
        network=model, settings=replace(Training(), colour_jitter=0.0, expression_loss=0.0))
    fit = main.Fit(trained, spy, None, None, None, 8, Ranks(0, 1, torch.device("cpu")))
    main.batch_loss(fit, patches, level[:, None], torch.Generator().manual_seed(0))
    [(pixels, expression)] = seen
    torch.testing.assert_close(pixels, expression, atol=1e-2, rtol=0)
    assert not torch.allclose(expression, level)
