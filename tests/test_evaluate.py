"""evaluate.py on three small generated sections of two donors: what each fold may see, and what is kept."""

import contextlib
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from test_scripts import hashes

import evaluate
import preprocess_demo
from heclip import recipes
from heclip.dataset import Processed
from heclip.expression import choose_panel
from heclip.files import InputError
from heclip.metrics import bootstrap, pearson_per_gene, score, score_further
from heclip.preprocess import preprocess

A, B, C = "DEMO_A1", "DEMO_B1", "DEMO_C1"
TRAINED = ["HECLIP", "published heg"]
UNTRAINED = [*evaluate.FROZEN, *evaluate.NULLS, *evaluate.CEILINGS]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A dataset on disk, and flags for it: encoder weights from a file, one epoch."""
    sections = [replace(section, n_spots=None, donor=donor)
                for section, donor in zip(preprocess_demo.DATASET.sections, "xxy", strict=False)]
    dataset = replace(preprocess_demo.DATASET, name="evaluated", sections=sections, n_hvg=30, n_heg=30, patch_px=32)
    preprocess_demo.generate(dataset.raw, n_sections=3, grid=(11, 9), n_genes=100)
    with contextlib.redirect_stdout(io.StringIO()):
        preprocess(dataset, ["--protocol", "paper"])
    torch.manual_seed(0)
    weights = tmp_path_factory.mktemp("weights") / "test_resnet.pth"
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), weights)
    return ["--dataset", "evaluated", "--encoder", "test_resnet", "--encoder_weights", str(weights), "--batch_size",
            "16", "--device", "cpu"]


class Recorder:
    """Runs evaluate.py; what it trained, and which sections were opened while it trained and at all."""

    def __init__(self):
        self.trainings, self.opened_in_training, self.opened = [], [], set()

    def run(self, flags, *more):
        inside = False

        def train(argv):
            nonlocal inside
            inside = True
            self.trainings.append(argv)
            self.opened_in_training.append(set())
            original_train(argv)
            inside = False

        def watch(original):
            def reader(processed, section, *rest):
                self.opened.add(section)
                if inside:
                    self.opened_in_training[-1].add(section)
                return original(processed, section, *rest)
            return reader

        original_train = evaluate.train.main
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setattr(evaluate.train, "main", train)
            for name in ("read", "patches", "expression"):
                patch.setattr(Processed, name, watch(getattr(Processed, name)))
            evaluate.main([*flags, "--max_epochs", "1", *more])
        return out.getvalue()


def run(flags, *more):
    recorder = Recorder()
    return recorder, recorder.run(flags, *more)


def scores(folder):
    table = pd.read_csv(folder / "evaluation.csv")
    return table.set_index(["protocol", "query", "method", "seed", "score"])["value"].sort_index()


@pytest.fixture(scope="module")
def evaluated(flags, tmp_path_factory):
    """(flags, folder, recorder, output) of a run: two folds, two seeds, two methods that train and all that do not."""
    folder = tmp_path_factory.mktemp("evaluated")
    here = [*flags, "--save_path", str(folder), "--query", A, C, "--methods", *TRAINED, *UNTRAINED]
    return here, folder, *run(here)


def kept(folder, query, method, seed):
    place = folder / "evaluation" / "strict" / query / f"{method.replace(', ', '_').replace(' ', '_')}_{seed}"
    return json.loads((place / "settings.json").read_text()), np.load(place / "prediction.npy")


def test_every_method_is_scored_on_every_fold_with_every_seed(evaluated):
    _, folder, recorder, _ = evaluated
    rows = scores(folder)
    runs = set(rows.index.droplevel(["protocol", "score"]))
    seeded = [*TRAINED, "random spots", *evaluate.CEILINGS]
    assert runs == {(query, method, seed) for query in (A, C) for method in [*TRAINED, *UNTRAINED]
                    for seed in ([1, 2] if method in seeded else [0])} | {
                        (query, "HECLIP, mean of 2 seeds", 0) for query in (A, C)}
    assert len(recorder.trainings) == 8
    assert ("strict", A, "mean profile", 0, "Pearson") not in rows.index  # constant: undefined, and not 0
    assert ("strict", A, "mean profile", 0, "Pearson, low") not in rows.index
    for seed in (1, 2):
        attainable = rows["strict", A, "attainable", seed, "Pearson"]
        assert 1 > attainable > rows["strict", A, "one half of the counts", seed, "Pearson"] > 0.1


def test_no_training_opens_the_held_out_section_and_the_panel_is_its_reference_s(evaluated):
    _, folder, recorder, _ = evaluated
    processed, panels = Processed("evaluated"), []
    for query, reference, opened in ((A, [B, C], recorder.opened_in_training[:4]),
                                     (C, [A, B], recorder.opened_in_training[4:])):
        assert opened == [set(reference)] * 4
        genes = {name: processed.genes(name) for name in (A, B, C)}
        panel = choose_panel("hvg", {name: genes[name] for name in reference}, 30, [genes[query].index])
        for method, seed in (("HECLIP", 1), ("random spots", 2), ("frozen encoder, ridge", 0)):
            settings, prediction = kept(folder, query, method, seed)
            assert settings["genes"] == list(panel.index)
            assert settings["reference"] == reference
            assert prediction.shape == (len(processed.read(query)), len(panel))
        panels.append(list(panel.index))
    assert panels[0] != panels[1]


def test_the_numbers_are_those_of_the_kept_predictions(evaluated):
    _, folder, _, _ = evaluated
    rows, processed = scores(folder), Processed("evaluated")
    settings, first = kept(folder, A, "HECLIP", 1)
    panel = pd.DataFrame(index=settings["genes"])
    section = processed.read(A)
    truth = processed.expression(A, "hvg", panel, section)
    reference = np.concatenate([processed.expression(name, "hvg", panel) for name in (B, C)])
    for method, seed, prediction in (("HECLIP", 1, first), (
            "HECLIP, mean of 2 seeds", 0, (first + kept(folder, A, "HECLIP", 2)[1]) / 2)):
        own = rows["strict", A, method, seed]
        expected = score(prediction, truth, reference)[1] | score_further(prediction, truth, section.obs,
                                                                          section.obsm["spatial"])
        expected["HEG-10, ranked on truth"] = score(prediction, truth, truth)[1]["HEG-10"]
        expected["Pearson, low"], expected["Pearson, high"] = bootstrap(prediction, truth, section.obsm["spatial"],
                                                                        slice(None))
        for name, value in expected.items():
            assert name not in own.index if np.isnan(value) else own[name] == pytest.approx(value, abs=1e-6), name
        assert own["Pearson, low"] < own["Pearson"] < own["Pearson, high"]
        assert own["HEG-50"] != pytest.approx(own["HEG-10"])


def test_nulls_and_nearest_images_are_what_their_names_say(evaluated):
    here, folder, _, _ = evaluated
    processed = Processed("evaluated")
    settings, by_size = kept(folder, C, "library size, no image", 0)
    panel = pd.DataFrame(index=settings["genes"])
    sections = [processed.read(name) for name in (A, B, C)]
    reference = np.concatenate([processed.expression(name, "hvg", panel) for name in (A, B)])
    size = [np.log(section.layers["counts"].toarray().sum(axis=1) + 1.0) for section in sections]
    for gene in (0, 7):
        line = np.polyfit(np.concatenate(size[:2]), reference[:, gene], 1)
        np.testing.assert_allclose(by_size[:, gene], np.polyval(line, size[2]), atol=1e-4)
    _, mean = kept(folder, C, "mean profile", 0)
    np.testing.assert_allclose(mean, np.tile(reference.mean(axis=0), (len(mean), 1)), rtol=1e-5)
    _, placed = kept(folder, C, "array position, no image", 0)
    places = [section.obs[["array_row", "array_col"]].to_numpy() for section in sections]
    distance = np.linalg.norm(places[2][:, None] - np.concatenate(places[:2]), axis=2)
    furthest = np.sort(distance, axis=1)[:, 49:51]
    clear = furthest[:, 0] < furthest[:, 1]  # no tie for the fiftieth place
    assert clear.sum() > 3
    expected = np.stack([reference[np.argsort(row)[:50]].mean(axis=0) for row in distance])
    np.testing.assert_allclose(placed[clear], expected[clear], atol=1e-5)
    args = evaluate.parse(here)
    features = [evaluate.frozen_features(args, processed, name) for name in (A, B, C)]
    features = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in features]
    similar = features[2] @ np.concatenate(features[:2]).T
    expected = np.stack([reference[np.argsort(-row)[:50]].mean(axis=0) for row in similar])
    np.testing.assert_allclose(kept(folder, C, "frozen encoder, nearest images", 0)[1], expected, atol=1e-3)


def test_the_table_shows_mean_and_deviation_over_folds_and_seeds(evaluated):
    _, folder, _, out = evaluated
    rows = scores(folder)
    values = [rows["strict", query, "HECLIP", seed, "Pearson"] for query in (A, C) for seed in (1, 2)]
    assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in out
    assert "HECLIP / published heg: Pearson " in out
    assert "nan" not in out


def test_a_second_run_trains_nothing_and_prints_the_same_table(evaluated, tmp_path):
    here, folder, _, out = evaluated
    shutil.copytree(folder, tmp_path / "copy")
    recorder, again = run([*here, "--save_path", str(tmp_path / "copy")])
    assert not recorder.trainings
    again, out = (text[text.index("\nevaluated, "):text.index("every score of")] for text in (again, out))
    assert again == out
    assert hashes(tmp_path / "copy") == hashes(folder)


ONE = ["--query", A, "--methods", "HECLIP", "--seeds", "2"]


@pytest.mark.parametrize("changed", ["--batch_size", "recipe"])
def test_a_changed_setting_or_recipe_trains_again_and_replaces_what_was_kept(evaluated, tmp_path, changed, monkeypatch):
    here, folder, _, _ = evaluated
    shutil.copytree(folder, tmp_path / "copy")
    here = [*here, "--save_path", str(tmp_path / "copy"), *ONE]
    if changed == "recipe":
        monkeypatch.setitem(recipes.TRAINING, "heclip", recipes.OURS | {"temperature": 2.0})
    else:
        here += ["--batch_size", "8"]
    recorder, _ = run(here)
    assert len(recorder.trainings) == 1
    key = ("strict", A, "HECLIP", 2, "Pearson")
    assert scores(tmp_path / "copy")[key] != pytest.approx(scores(folder)[key], abs=1e-6)
    assert not run(here)[0].trainings
    other = "evaluation/strict/DEMO_A1/HECLIP_1/prediction.npy"
    assert hashes(tmp_path / "copy")[other] == hashes(folder)[other]


@pytest.mark.parametrize("epochs", ["1", "2"])  # 2: what was begun is of other settings
def test_a_run_killed_between_training_and_prediction_ends_as_if_it_had_not_been(evaluated, tmp_path, epochs,
                                                                                  monkeypatch):
    here, folder, _, _ = evaluated
    here = [*here, "--save_path", str(tmp_path), *ONE]
    with monkeypatch.context() as patch:
        def killed(argv):
            raise KeyboardInterrupt

        patch.setattr(evaluate.infer, "main", killed)
        with pytest.raises(KeyboardInterrupt):
            run(here, "--max_epochs", epochs)
    assert list(tmp_path.rglob("heg_last.pt"))
    assert not list(tmp_path.rglob("scores.json"))
    recorder, _ = run(here)
    assert recorder.opened_in_training == [{B, C}]
    key = ("strict", A, "HECLIP", 2)
    pd.testing.assert_series_equal(scores(tmp_path)[key], scores(folder)[key])  # the same seed, the same numbers
    assert {path.name for path in (tmp_path / "evaluation/strict/DEMO_A1/HECLIP_2").iterdir()} == {
        "settings.json", "scores.json", "prediction.npy", "log.txt"}


def test_a_donor_is_held_out_whole(flags, tmp_path):
    recorder, out = run([*flags, "--save_path", str(tmp_path), *ONE, "--folds", "donor", "--methods", "HECLIP",
                         "frozen encoder, ridge"])
    assert recorder.opened == {A, C}
    assert recorder.opened_in_training == [{C}]  # the only section of the other donor
    assert kept(tmp_path, A, "HECLIP", 2)[0]["reference"] == [C]
    assert "held out with its donor" in out


def test_sections_that_take_no_part_are_not_opened(flags, tmp_path):
    recorder, _ = run([*flags, "--save_path", str(tmp_path), "--sections", B, A, "--methods", "regression",
                       "frozen encoder, ridge", *UNTRAINED[2:], "--seeds", "1"])
    assert recorder.opened == {A, B}
    assert recorder.opened_in_training == [{B}, {A}]
    assert set(scores(tmp_path).index.unique("query")) == {A, B}


def test_both_protocols_stand_side_by_side(flags, tmp_path):
    _, out = run([*flags, "--save_path", str(tmp_path), "--protocol", "strict", "paper", "--methods", "random spots",
                  "array position, no image", "--panel", "heg"])
    means = scores(tmp_path).xs("Pearson", level="score").groupby(["method", "protocol"]).mean()
    gap = means["random spots", "paper"] - means["random spots", "strict"]
    assert f"{gap:+.3f}" in out.split("paper minus strict:")[1]


def test_ridge_chooses_its_strength_on_the_reference_alone():
    rng = np.random.default_rng(0)
    section = np.repeat(["a", "b", "c"], [30, 25, 1])  # the last has too few spots to be scored
    features = rng.normal(0, 1, (56, 20)).astype(np.float32)
    expression = (features @ rng.normal(0, 0.3, (20, 6)) + rng.normal(0, 2, (56, 6))).astype(np.float32)
    query = rng.normal(0, 1, (9, 20)).astype(np.float32)
    reached = []
    for alpha in 10.0 ** np.arange(7):
        r = []
        for name in ("a", "b"):
            inside = section == name
            pca = PCA(20).fit(features[~inside])
            model = Ridge(alpha).fit(pca.transform(features[~inside]), expression[~inside])
            r.append(pearson_per_gene(model.predict(pca.transform(features[inside])), expression[inside]).mean())
        reached.append(sum(r))
    best = 10.0 ** np.argmax(reached)
    assert best > 1  # or a choice that fails would go unseen
    predicted = evaluate.ridge(features, expression, section, query)
    np.testing.assert_allclose(predicted, Ridge(best).fit(features, expression).predict(query), atol=1e-4)
    np.testing.assert_allclose(evaluate.ridge(features, expression, section, query[:1]), predicted[:1], atol=1e-5)
    alone = evaluate.ridge(features, expression, np.repeat("a", 56), query)
    assert np.isfinite(alone).all()


@pytest.mark.parametrize(("more", "says"), [
    (["--sections", A, "DEMO_Z1"], "has no section DEMO_Z1, but DEMO_A1, DEMO_B1, DEMO_C1"),
    (["--query", "DEMO_Z1"], "has no section DEMO_Z1"),
    (["--sections", A, B, "--query", C], "--query DEMO_C1 is not among --sections DEMO_A1 DEMO_B1"),
    (["--sections", A], "at least two are needed"),
    (["--sections", A, B, "--folds", "donor"], "DEMO_A1, DEMO_B1 are of one donor"),
])
def test_folds_that_cannot_be_are_one_clear_error(flags, tmp_path, more, says):
    with pytest.raises(InputError, match=says):
        run([*flags, "--save_path", str(tmp_path), *more])
    assert not list(tmp_path.iterdir())


def test_an_unknown_method_is_refused_with_the_names_of_all(flags, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(["--methods", "guessing"])
    assert "frozen encoder, ridge" in capsys.readouterr().err
