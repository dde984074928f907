"""evaluate.py on three small generated sections of two donors: what a fold sees, what is kept."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

import evaluate
import preprocess_demo
from heclip.dataset import Processed
from heclip.files import InputError, sha256
from heclip.metrics import bootstrap, pearson_per_gene, score, score_further
from heclip.panel import choose_panel
from heclip.script import preprocess

A, B, C = "DEMO_A1", "DEMO_B1", "DEMO_C1"
TRAINED = ["HECLIP", "published heg"]
UNTRAINED = [*evaluate.FROZEN, *evaluate.NULLS, *evaluate.CEILINGS]
READERS = ("read", "spots", "xy", "patches", "expression")  # of Processed


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A dataset on disk, and flags for it: encoder weights from a file."""
    sections = [replace(section, n_spots=None, donor=donor)
                for section, donor in zip(preprocess_demo.DATASET.sections, "xxy", strict=False)]
    dataset = replace(preprocess_demo.DATASET, name="evaluated", sections=sections, n_hvg=30,
                      n_heg=30, patch_px=32)
    preprocess_demo.generate(dataset.raw, n_sections=3, grid=(11, 9), n_genes=100)
    with contextlib.redirect_stdout(io.StringIO()):
        preprocess(dataset, ["--protocol", "paper"])
    torch.manual_seed(0)
    weights = tmp_path_factory.mktemp("weights") / "test_resnet.pth"
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), weights)
    return ["--dataset", "evaluated", "--encoder", "test_resnet", "--encoder_weights", str(weights),
            "--batch_size", "16", "--device", "cpu"]


class Recorder:
    """Runs evaluate.py; notes what it trained, and which sections were opened when."""

    def __init__(self):
        self.trainings, self.opened_in_training, self.opened = [], [], set()

    def run(self, flags, *more):
        inside = False

        def train(settings, run):
            nonlocal inside
            inside = True
            self.trainings.append(settings)
            self.opened_in_training.append(set())
            original_train(settings, run)
            inside = False

        def watch(original):
            def reader(processed, section, *rest):
                self.opened.add(section)
                if inside:
                    self.opened_in_training[-1].add(section)
                return original(processed, section, *rest)
            return reader

        original_train, out = evaluate.train, io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
            patch.setattr(evaluate, "train", train)
            for name in READERS:
                patch.setattr(Processed, name, watch(getattr(Processed, name)))
            evaluate.main([*flags, "--max_epochs", "1", *more])
        return out.getvalue()


def run(flags, *more):
    recorder = Recorder()
    return recorder, recorder.run(flags, *more)


def rows_of(folder):
    """evaluation.csv as it stands: all columns are text."""
    return pd.read_csv(folder / "evaluation.csv", dtype=str, keep_default_na=False)


def same_rows(table, other):
    """Whether two tables have the same rows, in whatever order."""
    first, second = (sorted(rows.itertuples(index=False, name=None)) for rows in (table, other))
    return first == second


def scores(folder):
    """The values of a table in which no run has two settings."""
    table = rows_of(folder).astype({"seed": int, "value": float})
    values = table.set_index(["protocol", "query", "method", "seed", "score"])["value"].sort_index()
    assert values.index.is_unique
    return values


def hashes(folder):
    """The contents of the files below a folder, but for locks."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")}


def results(folder, query, method, seed):
    """The folders of one method and seed: one for each setting."""
    name = f"{method.replace(', ', '_').replace(' ', '_')}_{seed}_*"
    return list((folder / "evaluation" / "strict" / query).glob(name))


def kept(folder, query, method, seed):
    """What is kept of one method and seed: (settings, prediction)."""
    [place] = results(folder, query, method, seed)
    return json.loads((place / "settings.json").read_text()), np.load(place / "prediction.npy")


@pytest.fixture(scope="module")
def evaluated(flags, tmp_path_factory):
    """(flags, folder, recorder, output) of a run of two folds and two seeds.

    Two methods that train, and all that do not.
    """
    folder = tmp_path_factory.mktemp("evaluated")
    here = [*flags, "--save_path", str(folder), "--query", A, C, "--methods", *TRAINED, *UNTRAINED]
    return here, folder, *run(here)


@pytest.fixture
def copied(evaluated, tmp_path):
    """(flags, folder): a copy of that run's results, to go on from."""
    here, folder, _, _ = evaluated
    shutil.copytree(folder, tmp_path / "copy")
    return [*here, "--save_path", str(tmp_path / "copy")], tmp_path / "copy"


def test_every_method_is_scored_on_every_fold_with_every_seed(evaluated):
    _, folder, recorder, _ = evaluated
    rows = scores(folder)
    runs = set(rows.index.droplevel(["protocol", "score"]))
    seeded = [*TRAINED, "random spots", *evaluate.CEILINGS]
    expected = {(query, method, seed) for query in (A, C) for method in [*TRAINED, *UNTRAINED]
                for seed in ([1, 2] if method in seeded else [0])}
    assert runs == expected | {(query, "HECLIP, mean of 2 seeds", 0) for query in (A, C)}
    assert len(recorder.trainings) == 8
    assert ("strict", A, "mean profile", 0, "Pearson") not in rows.index  # undefined, and not 0
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
        chosen_by = {name: genes[name] for name in reference}
        panel = choose_panel("hvg", chosen_by, 30, [genes[query].index])
        for method, seed in (("HECLIP", 1), ("random spots", 2), ("frozen encoder, ridge", 0)):
            settings, prediction = kept(folder, query, method, seed)
            assert settings["genes"] == list(panel.ids)
            assert settings["reference"] == reference
            assert prediction.shape == (len(processed.read(query)), len(panel))
        panels.append(list(panel.ids))
    assert panels[0] != panels[1]


def test_the_numbers_are_those_of_the_kept_predictions(evaluated):
    _, folder, _, _ = evaluated
    rows, processed = scores(folder), Processed("evaluated")
    settings, first = kept(folder, A, "HECLIP", 1)
    panel = processed.panel("hvg", "strict", [B, C])
    assert list(panel.ids) == settings["genes"]
    section, truth = processed.read(A), processed.expression(A, panel)
    xy = section.obsm["spatial"]
    reference = np.concatenate([processed.expression(name, panel) for name in (B, C)])
    second = kept(folder, A, "HECLIP", 2)[1]
    for method, seed, prediction in (("HECLIP", 1, first),
                                     ("HECLIP, mean of 2 seeds", 0, (first + second) / 2)):
        own = rows["strict", A, method, seed]
        expected = score(prediction, truth, reference)[1]
        expected |= score_further(prediction, truth, section.obs, xy)
        expected["HEG-10, ranked on truth"] = score(prediction, truth, truth)[1]["HEG-10"]
        low, high = bootstrap(prediction, truth, xy, slice(None))
        expected |= {"Pearson, low": low, "Pearson, high": high}
        for name, value in expected.items():
            if np.isnan(value):
                assert name not in own.index
            else:
                assert own[name] == pytest.approx(value, abs=1e-6), name
        assert own["Pearson, low"] < own["Pearson"] < own["Pearson, high"]
        assert own["HEG-50"] != pytest.approx(own["HEG-10"])


def test_nulls_and_nearest_images_are_what_their_names_say(evaluated):
    here, folder, _, _ = evaluated
    processed = Processed("evaluated")
    _, by_size = kept(folder, C, "library size, no image", 0)
    panel = processed.panel("hvg", "strict", [A, B])
    sections = [processed.read(name) for name in (A, B, C)]
    reference = np.concatenate([processed.expression(name, panel) for name in (A, B)])
    size = [np.log(section.layers["counts"].toarray().sum(axis=1) + 1.0) for section in sections]
    for gene in (0, 7):
        line = np.polyfit(np.concatenate(size[:2]), reference[:, gene], 1)
        np.testing.assert_allclose(by_size[:, gene], np.polyval(line, size[2]), atol=1e-4)
    _, mean = kept(folder, C, "mean profile", 0)
    expected = np.tile(reference.mean(axis=0), (len(mean), 1))
    np.testing.assert_allclose(mean, expected, rtol=1e-5)
    _, placed = kept(folder, C, "array position, no image", 0)
    places = [section.obs[["array_row", "array_col"]].to_numpy() for section in sections]
    distance = np.linalg.norm(places[2][:, None] - np.concatenate(places[:2]), axis=2)
    furthest = np.sort(distance, axis=1)[:, 49:51]
    clear = furthest[:, 0] < furthest[:, 1]  # no tie for the fiftieth place
    assert clear.sum() > 3
    expected = np.stack([reference[np.argsort(row)[:50]].mean(axis=0) for row in distance])
    np.testing.assert_allclose(placed[clear], expected[clear], atol=1e-5)
    encoder = evaluate.parse(here).shared
    features = [evaluate.frozen_features(processed, name, encoder) for name in (A, B, C)]
    features = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in features]
    similar = features[2] @ np.concatenate(features[:2]).T
    expected = np.stack([reference[np.argsort(-row)[:50]].mean(axis=0) for row in similar])
    _, nearest = kept(folder, C, "frozen encoder, nearest images", 0)
    np.testing.assert_allclose(nearest, expected, atol=1e-3)


def test_the_table_shows_mean_and_deviation_over_folds_and_seeds(evaluated):
    _, folder, _, out = evaluated
    rows = scores(folder)
    values = [rows["strict", query, "HECLIP", seed, "Pearson"]
              for query in (A, C) for seed in (1, 2)]
    assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in out
    assert "HECLIP / published heg: Pearson " in out
    assert "nan" not in out


def test_a_second_run_trains_nothing_and_prints_the_same_table(evaluated, copied):
    _, folder, _, out = evaluated
    here, copy = copied
    recorder, again = run(here)
    assert not recorder.trainings
    again, out = (text[text.index("\nevaluated, "):text.index("every score of")]
                  for text in (again, out))
    assert again == out
    assert hashes(copy) == hashes(folder)


# -------------------------------------------------------------------------------- what is kept


ONE = ["--query", A, "--methods", "HECLIP", "--seeds", "2"]


@pytest.mark.parametrize("changed", ["--batch_size", "recipe", "prediction"])
def test_a_changed_setting_trains_again_and_keeps_the_earlier_result(evaluated, copied, changed,
                                                                     monkeypatch):
    """It once deleted the earlier result, and its rows."""
    folder = evaluated[1]
    here, copy = copied
    training, how = evaluate.TRAINED["HECLIP"]
    more = []
    if changed == "recipe":
        monkeypatch.setitem(evaluate.TRAINED, "HECLIP", (replace(training, temperature=2.0), how))
    elif changed == "prediction":
        monkeypatch.setitem(evaluate.TRAINED, "HECLIP", (training, replace(how, k=7)))
    else:
        more = ["--batch_size", "8"]
    recorder, _ = run(here, *ONE, *more)
    assert len(recorder.trainings) == 1

    earlier, now = hashes(folder), hashes(copy)
    del earlier["evaluation.csv"]
    assert earlier.items() <= now.items()
    assert len(results(copy, A, "HECLIP", 2)) == 2
    old, rows = rows_of(folder), rows_of(copy)
    pd.testing.assert_frame_equal(rows[:len(old)], old)
    new = rows[len(old):].astype({"value": float}).set_index("score")
    assert set(new["method"]) == {"HECLIP"}
    assert set(new["settings"]).isdisjoint(old["settings"])
    assert new["value"]["Pearson"] != pytest.approx(
        scores(folder)["strict", A, "HECLIP", 2, "Pearson"], abs=1e-6)

    assert not run(here, *ONE, *more)[0].trainings
    monkeypatch.undo()
    assert not run(here, *ONE)[0].trainings
    assert same_rows(rows_of(copy), rows)
    assert hashes(copy).keys() == now.keys()


def test_fewer_methods_keep_the_rows_of_all_others(copied):
    """The table once held the rows of the last run alone."""
    here, copy = copied
    before = rows_of(copy)
    run(here, "--query", A, "--methods", "mean profile", "--seeds", "5")
    assert same_rows(rows_of(copy), before)


def test_rows_replace_those_of_the_same_run_only_and_names_stay_text(tmp_path):
    path = tmp_path / "evaluation.csv"
    path.write_text("protocol,query,method,seed,settings,score,value\n"
                    "strict,NA,mine,007,1e5,Pearson,0.10\n"
                    "strict,007,mine,1,00,Pearson,0.2\n"
                    "strict,007,mine,1,00,SSIM,0.3\n"
                    "strict,7,mine,1,00,Pearson,0.4\n")
    key = ["strict", "007", "mine", 1, "00"]
    row = dict(zip(evaluate.KEY, key, strict=True)) | {"Pearson": 0.5, "Spearman": None}
    evaluate.add_rows(path, [row])
    assert path.read_text() == ("protocol,query,method,seed,settings,score,value\n"
                                "strict,NA,mine,007,1e5,Pearson,0.10\n"
                                "strict,7,mine,1,00,Pearson,0.4\n"
                                "strict,007,mine,1,00,Pearson,0.5\n")


def test_rows_of_a_table_without_settings_stay(tmp_path):
    path = tmp_path / "evaluation.csv"
    path.write_text("protocol,query,method,seed,score,value\nstrict,A,mine,1,Pearson,0.1\n")
    row = dict(zip(evaluate.KEY, ["strict", "A", "mine", 1, "ab"], strict=True))
    evaluate.add_rows(path, [row | {"Pearson": 0.5}])
    rows = rows_of(tmp_path)
    assert list(rows["settings"]) == ["", "ab"]
    assert list(rows["value"]) == ["0.1", "0.5"]


def test_a_damaged_table_is_one_clear_error_and_stays(tmp_path):
    path = tmp_path / "evaluation.csv"
    path.write_text('protocol,query\n"a,b\nc,d,e\n')
    row = dict(zip(evaluate.KEY, ["strict", "A", "mine", 1, "ab"], strict=True))
    with pytest.raises(InputError, match=r"evaluation\.csv is damaged .* Move it away"):
        evaluate.add_rows(path, [row | {"Pearson": 0.5}])
    assert path.read_text().startswith("protocol,query\n")


def test_two_runs_at_once_lose_no_rows_of_each_other(tmp_path):
    path, start = tmp_path / "evaluation.csv", threading.Barrier(2)

    def add(query):
        start.wait()
        for seed in range(15):
            key = ["strict", query, "mine", seed, "ab"]
            evaluate.add_rows(path, [dict(zip(evaluate.KEY, key, strict=True)) | {"Pearson": 0.5}])

    threads = [threading.Thread(target=add, args=[query]) for query in "AB"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = rows_of(tmp_path)
    assert len(rows) == 30
    assert set(zip(rows["query"], rows["seed"], strict=True)) == {
        (query, str(seed)) for query in "AB" for seed in range(15)}


def killed(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("where", "epochs"), [
    ("load_checkpoint", "1"),  # trained, not predicted
    ("all_scores", "1"),  # predicted, not scored
    ("load_checkpoint", "2"),  # what was begun is of other settings
])
def test_a_run_that_was_killed_after_training_ends_as_if_it_had_not_been(
        evaluated, tmp_path, where, epochs, monkeypatch):
    here, folder, _, _ = evaluated
    here = [*here, "--save_path", str(tmp_path), *ONE]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, where, killed)
        with pytest.raises(KeyboardInterrupt):
            run(here, "--max_epochs", epochs)
    begun = results(tmp_path, A, "HECLIP", 2)
    assert list(begun[0].rglob("heg_last.pt"))
    assert not list(tmp_path.rglob("scores.json"))
    recorder, _ = run(here)
    assert recorder.opened_in_training == [{B, C}]
    key = ("strict", A, "HECLIP", 2)
    pd.testing.assert_series_equal(scores(tmp_path)[key], scores(folder)[key])
    [done] = [place for place in results(tmp_path, A, "HECLIP", 2)
              if (place / "scores.json").exists()]
    assert set(hashes(done)) == {"settings.json", "scores.json", "prediction.npy", "log.txt"}
    resumed = "resuming after epoch 1" in (done / "log.txt").read_text()
    assert resumed == (epochs == "1")
    if epochs == "2":
        assert list(begun[0].rglob("heg_last.pt"))


# ------------------------------------------------------------------------------- what is held out


@pytest.fixture
def table():
    """The section table on disk, to be changed: put back afterwards."""
    path = Processed("evaluated").sections_path
    before = path.read_text()
    yield SimpleNamespace(
        set=lambda **columns: Processed("evaluated").sections().assign(**columns).to_csv(path))
    path.write_text(before)


@pytest.mark.parametrize("donor", ["x", "NA"])
def test_a_donor_is_held_out_whole(flags, tmp_path, donor, table):
    """A donor called NA was once read as missing, and its section was in its own reference."""
    table.set(donor=[donor, donor, "y"])
    recorder, out = run([*flags, "--save_path", str(tmp_path), *ONE, "--folds", "donor",
                         "--methods", "HECLIP", "frozen encoder, ridge"])
    assert recorder.opened == {A, C}
    assert recorder.opened_in_training == [{C}]  # the only section of the other donor
    assert kept(tmp_path, A, "HECLIP", 2)[0]["reference"] == [C]
    assert "held out with its donor" in out


def test_a_section_of_the_querys_donor_in_the_reference_is_an_error():
    donor = pd.Series({A: "NA", B: "NA", C: "y"})
    with pytest.raises(InputError, match="DEMO_A1 is held out with its donor 'NA', but DEMO_B1"):
        evaluate.check_donors(donor, A, [B, C])
    evaluate.check_donors(donor, A, [C])


def test_a_fold_whose_query_is_in_its_reference_is_not_opened(flags):
    with pytest.raises(InputError, match="DEMO_A1 is in its own reference"):
        evaluate.open_fold(Processed("evaluated"), "hvg", "strict", A, [A, C])


def test_a_section_that_is_another_s_copy_is_refused_before_any_training(flags, tmp_path, table):
    table.set(digest=["1", "2", "1"])
    with pytest.raises(InputError, match="DEMO_A1 and DEMO_C1 were made from the same files"):
        run([*flags, "--save_path", str(tmp_path), *ONE])
    assert not list(tmp_path.iterdir())


def test_sections_that_take_no_part_are_not_opened(flags, tmp_path):
    recorder, _ = run([*flags, "--save_path", str(tmp_path), "--sections", B, A, "--methods",
                       "regression", "frozen encoder, ridge", *UNTRAINED[2:], "--seeds", "1"])
    assert recorder.opened == {A, B}
    assert recorder.opened_in_training == [{B}, {A}]
    assert set(scores(tmp_path).index.unique("query")) == {A, B}


def test_both_protocols_stand_side_by_side(flags, tmp_path):
    _, out = run([*flags, "--save_path", str(tmp_path), "--protocol", "strict", "paper",
                  "--methods", "random spots", "array position, no image", "--panel", "heg"])
    pearson = scores(tmp_path).xs("Pearson", level="score")
    means = pearson.groupby(["method", "protocol"]).mean()
    gap = means["random spots", "paper"] - means["random spots", "strict"]
    assert f"{gap:+.3f}" in out.split("paper minus strict:")[1]


# ------------------------------------------------------------------------------- methods and flags


def test_no_pretrained_and_encoder_args_reach_training_and_the_frozen_encoder(flags, tmp_path):
    weights = flags.index("--encoder_weights")
    scratch = [*flags[:weights], *flags[weights + 2:], "--no-pretrained"]
    layers = ["--encoder_args", '{"act_layer": "tanh"}']
    recorder, _ = run([*scratch, *layers, "--save_path", str(tmp_path), *ONE])
    [settings] = recorder.trainings
    assert not settings.pretrained
    assert settings.encoder_args == {"act_layer": "tanh"}
    assert kept(tmp_path, A, "HECLIP", 2)[0]["training"]["encoder_args"] == {"act_layer": "tanh"}

    nearest = ["--save_path", str(tmp_path), *ONE, "--methods", "frozen encoder, nearest images"]
    run([*flags, *nearest])
    run([*flags, *layers, *nearest])
    places = results(tmp_path, A, "frozen encoder, nearest images", 0)
    one, other = (np.load(place / "prediction.npy") for place in places)
    assert not np.allclose(one, other)


def test_without_pretrained_weights_no_encoder_stays_frozen():
    left_out = set(evaluate.METHODS) - set(evaluate.parse(["--no-pretrained"]).methods)
    assert left_out == {"HECLIP, frozen encoder", *evaluate.FROZEN}
    with pytest.raises(InputError, match="'frozen encoder, ridge' with --no-pretrained"):
        evaluate.parse(["--no-pretrained", "--methods", "HECLIP", "frozen encoder, ridge"])


def test_each_method_trains_by_its_recipe_and_by_the_flags_that_all_share():
    plan = evaluate.parse(["--batch_size", "7", "--max_epochs", "3", "--image_size", "64"])
    panel = SimpleNamespace(protocol="paper")
    for method, (recipe, prediction) in evaluate.TRAINED.items():
        fold = SimpleNamespace(panel=panel, held_out=[A, B])
        training, how = evaluate.settings_of(plan, fold, method)
        length = (40, 128) if method == "HECLIP, frozen encoder" else (3, 7)
        assert (training.max_epochs, training.batch_size) == length
        assert training == replace(
            recipe, dataset="MOB", panel="hvg", protocol="paper", query=(A, B), val_fraction=0.0,
            image_size=64, max_epochs=length[0], batch_size=length[1], resume=True)
        assert how == prediction


def test_ridge_chooses_its_strength_on_the_reference_alone():
    rng = np.random.default_rng(0)
    section = np.repeat(["a", "b", "c"], [30, 25, 1])  # the last has too few spots to be scored
    features = rng.normal(0, 1, (56, 20)).astype(np.float32)
    expression = features @ rng.normal(0, 0.3, (20, 6)) + rng.normal(0, 2, (56, 6))
    expression = expression.astype(np.float32)
    query = rng.normal(0, 1, (9, 20)).astype(np.float32)
    reached = []
    for alpha in 10.0 ** np.arange(7):
        r = []
        for name in ("a", "b"):
            inside = section == name
            pca = PCA(20).fit(features[~inside])
            model = Ridge(alpha).fit(pca.transform(features[~inside]), expression[~inside])
            predicted = model.predict(pca.transform(features[inside]))
            r.append(pearson_per_gene(predicted, expression[inside]).mean())
        reached.append(sum(r))
    best = 10.0 ** np.argmax(reached)
    assert best > 1  # or a choice that fails would go unseen
    predicted = evaluate.ridge(features, expression, section, query)
    expected = Ridge(best).fit(features, expression).predict(query)
    np.testing.assert_allclose(predicted, expected, atol=1e-4)
    first = evaluate.ridge(features, expression, section, query[:1])
    np.testing.assert_allclose(first, predicted[:1], atol=1e-5)
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


def test_an_unknown_method_is_refused_with_the_names_of_all(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(["--methods", "guessing"])
    assert "frozen encoder, ridge" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--seeds", "1", "-1"], ["--encoder_args", "{"],
                                   ["--no-pretrained", "--encoder_weights", "file"]])
def test_a_wrong_flag_is_answered_before_the_imports_that_take_seconds(project, wrong):
    code = ("import runpy, sys\n"
            "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "finally:\n    print('torch' in sys.modules)")
    script = str(project / "code" / "evaluate.py")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = {[script, *wrong]!r}\n"
         f"sys.path.insert(0, {str(project / 'code')!r})\n{code}"],
        capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert wrong[0] in done.stderr
    assert done.stdout.strip() == "False"


def test_what_is_named_twice_counts_once():
    plan = evaluate.parse(["--seeds", "1", "2", "1", "--query", A, A, "--protocol", "paper",
                           "paper"])
    assert (plan.seeds, plan.query, plan.protocols) == ([1, 2], [A], ["paper"])
