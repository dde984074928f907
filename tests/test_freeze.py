"""Frozen encoders: features on disk are the encoder's of these patches, and it stays as it is."""

import contextlib
import errno
import json
import os
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from makers import prepare
from test_batches import write_section

import infer
import main
from heclip import features as features_module, parallel, prediction
from heclip.batches import SYMMETRIES, Patches, augment, encode_patches
from heclip.checkpoint import load_checkpoint
from heclip.dataset import Processed, Run
from heclip.features import digest, features_of, saved_features
from heclip.files import InputError, sha256
from heclip.model import HECLIP, configure

CPU = torch.device("cpu")


def a_model(seed=0, image_size=32, pixels="standardised"):
    torch.manual_seed(seed)
    model = HECLIP(configure("test_resnet", "heg", 4, 6, image_size, pixels, embedding_dim=8))
    with torch.no_grad():  # not the neutral batch norms of a new network
        for key, value in model.image_encoder.state_dict().items():
            if key.endswith(("running_mean", "bias")):
                value.uniform_(-0.2, 0.2)
            elif value.ndim == 1:
                value.uniform_(0.5, 1.5)
    return model.eval()


def make(processed, model, batch_size=4):
    return features_of(processed, "A", model, digest(model.image_encoder), CPU, batch_size)


@pytest.fixture
def processed(tmp_path, monkeypatch):
    made = Processed("frozen")
    made.folder = tmp_path / "processed"
    write_section(made, "A", 7)
    return made


def files(processed):
    """The names of the saved files, without locks."""
    return {path.name for path in (processed.folder / "features").rglob("*")
            if path.is_file() and path.suffix != ".lock"}


# ------------------------------------------------------------------------------ saved features


@pytest.mark.parametrize("pixels", ["standardised", "raw_bgr"])
def test_features_are_the_encoders_output_for_each_symmetry(processed, pixels):
    model, patches = a_model(pixels=pixels, image_size=6), np.load(processed.patches_path("A"))
    found = make(processed, model)
    assert (found.dtype, found.shape) == (np.float16, (7, 8, 96))
    for row, patch in enumerate(patches):
        for i, (flip_x, flip_y, swap) in enumerate(SYMMETRIES.tolist()):
            turned = patch[:, ::-1] if flip_x else patch
            turned = turned[::-1] if flip_y else turned
            turned = turned.swapaxes(0, 1) if swap else turned
            if pixels == "raw_bgr":
                image = torch.tensor(turned[..., ::-1].copy()).float()
            else:
                image = (torch.tensor(turned.copy()) / 255
                         - torch.tensor(model.config.mean)) / torch.tensor(model.config.std)
            with torch.inference_mode():
                expected = model.image_encoder(image.permute(2, 0, 1)[None])[0]
            np.testing.assert_allclose(found[row, i], expected, rtol=2e-3, atol=2e-3)
    assert len(np.unique(found[0], axis=0)) == 8


def test_a_turn_of_features_is_the_feature_of_the_turned_patch(processed):
    model, turns = a_model(), SYMMETRIES[[3, 0, 7, 5, 1, 6, 2]]
    (features,) = Patches([make(processed, model)], CPU).stream([torch.arange(7)])
    patches = torch.from_numpy(np.load(processed.patches_path("A")))
    by_patch = torch.cat([
        encode_patches(model, Patches([augment(patches, turns).numpy()], CPU), torch.arange(7), 7)])
    with torch.inference_mode():
        by_feature = model.encode_image(augment(features, turns).float())
    torch.testing.assert_close(by_feature, by_patch, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("views", [1, 2, 8])
def test_embeddings_from_features_are_those_from_patches(processed, views):
    model, index = a_model(), torch.tensor([6, 0, 0, 3, 5])
    from_patches = encode_patches(model, Patches([processed.patches("A")], CPU), index, 2, views)
    from_features = encode_patches(model, Patches([make(processed, model)], CPU), index, 2, views)
    torch.testing.assert_close(from_features, from_patches, rtol=5e-3, atol=5e-3)


def test_features_too_large_for_half_precision_are_refused_and_nothing_is_kept(processed):
    model = a_model()
    model.encode_features = lambda pixels: torch.full((len(pixels), 96), 70000.0)
    with pytest.raises(InputError, match="too large for half precision"):
        make(processed, model)
    assert files(processed) == set()


# ------------------------------------------------------------------------------ when it is used


def computed(processed, model, monkeypatch):
    """How many batches the encoder is given when the features are asked for."""
    calls, original = [], model.encode_features
    monkeypatch.setattr(model, "encode_features",
                        lambda pixels: calls.append(1) or original(pixels))
    make(processed, model)
    return len(calls)


def test_features_are_computed_once(processed, monkeypatch):
    first = np.array(make(processed, a_model()))
    assert computed(processed, a_model(), monkeypatch) == 0
    np.testing.assert_array_equal(make(processed, a_model()), first)
    assert files(processed) == {"A.npy", "A.json"}


@pytest.mark.parametrize("change", [{"seed": 1}, {"image_size": 48}, {"pixels": "raw_bgr"}])
def test_another_encoder_size_or_pixel_convention_has_features_of_its_own(
        processed, change, monkeypatch):
    before = np.array(make(processed, a_model()))
    assert computed(processed, a_model(**change), monkeypatch) == 16
    assert computed(processed, a_model(), monkeypatch) == 0
    np.testing.assert_array_equal(make(processed, a_model()), before)


def test_a_single_changed_statistic_changes_the_digest():
    one, other = a_model().image_encoder, a_model().image_encoder
    assert digest(one) == digest(other)
    other.get_buffer("bn1.running_var")[0] += 1e-3
    assert digest(one) != digest(other)


def test_patches_made_again_are_encoded_again(processed, monkeypatch):
    old = np.array(make(processed, a_model()))
    write_section(processed, "A", 7, seed=1)
    model = a_model()
    assert saved_features(processed, "A", model.config, digest(model.image_encoder)) is None
    assert computed(processed, model, monkeypatch) == 16
    assert not np.array_equal(make(processed, a_model()), old)


def test_patches_that_were_only_copied_are_known_by_their_contents(processed, monkeypatch):
    make(processed, a_model())
    os.utime(processed.patches_path("A"), (1, 1))
    assert computed(processed, a_model(), monkeypatch) == 0


def test_kept_features_do_not_hide_that_patches_were_not_made_with_the_expression(processed):
    make(processed, a_model())
    patches = processed.patches_path("A").read_bytes()
    write_section(processed, "A", 7, seed=1)
    processed.patches_path("A").write_bytes(patches)
    model = a_model()
    with pytest.raises(InputError, match="were not made together"):
        saved_features(processed, "A", model.config, digest(model.image_encoder))


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(143), OSError(errno.ENOSPC, "No space left")])
def test_writing_that_is_stopped_leaves_no_file(processed, error, monkeypatch):
    model, calls = a_model(), []

    def stop(pixels):
        calls.append(1)
        if len(calls) > 10:
            raise error
        return torch.zeros(len(pixels), 96)

    monkeypatch.setattr(model, "encode_features", stop)
    with pytest.raises(type(error)):
        make(processed, model)
    assert files(processed) == set()


def test_features_killed_before_their_sidecar_are_not_used(processed, monkeypatch):
    make(processed, a_model())
    place = next((processed.folder / "features").iterdir())
    (place / "A.json").rename(place / ".A.json.part")
    assert computed(processed, a_model(), monkeypatch) == 16


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-50]),
                                   lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["A.npy", "A.json"])
def test_damaged_files_are_made_again(processed, name, damage):
    before = np.array(make(processed, a_model()))
    damage(next((processed.folder / "features").iterdir()) / name)
    np.testing.assert_array_equal(make(processed, a_model()), before)


# ------------------------------------------------------------------------------ several processes


def test_who_wants_features_that_another_computes_waits_for_them(
        processed, monkeypatch, when_waiting):
    begun, go_on, calls = threading.Event(), threading.Event(), {"first": 0, "second": 0}

    def counting(model, name):
        original = model.encode_features

        def encode(pixels):
            calls[name] += 1
            if name == "first":
                begun.set()
                go_on.wait(60)
            return original(pixels)

        monkeypatch.setattr(model, "encode_features", encode)
        return model

    first, second = (counting(a_model(), name) for name in calls)
    thread = threading.Thread(target=make, args=(processed, first))
    thread.start()
    begun.wait(60)
    when_waiting(go_on.set)
    try:
        found = make(processed, second)
    finally:
        go_on.set()
        thread.join()
    assert calls == {"first": 16, "second": 0}
    np.testing.assert_array_equal(found, make(processed, a_model()))
    assert files(processed) == {"A.npy", "A.json"}


def test_features_of_another_write_than_the_sidecars_are_not_used(processed, monkeypatch):
    # As when a writer was killed between the two files, or has not come to the second.
    before = np.array(make(processed, a_model()))
    place = next((processed.folder / "features").iterdir())
    np.save(place / "A.npy", np.zeros_like(before))
    model = a_model()
    assert saved_features(processed, "A", model.config, digest(model.image_encoder)) is None
    np.testing.assert_array_equal(make(processed, model), before)


def test_at_no_moment_of_a_write_are_the_two_files_taken_for_a_pair(processed, monkeypatch):
    make(processed, a_model())
    replace_patches(processed, seed=1)
    model, seen, atomic_path = a_model(), [], features_module.atomic_path
    weights = digest(model.image_encoder)

    @contextlib.contextmanager
    def watched(path):
        seen.append(saved_features(processed, "A", model.config, weights))
        with atomic_path(path) as temporary:
            yield temporary
            seen.append(saved_features(processed, "A", model.config, weights))

    monkeypatch.setattr(features_module, "atomic_path", watched)
    assert make(processed, model) is not None
    assert seen == [None] * 4


def replace_patches(processed, seed):
    """New patches as a new file: the old ones may still be open."""
    processed.patches_path("A").unlink()
    write_section(processed, "A", 7, seed=seed)


@pytest.mark.parametrize("when", ["as they are opened", "during the computation"])
def test_patches_that_are_replaced_meanwhile_are_never_taken_for_those_encoded(
        processed, when, monkeypatch):
    model, changed = a_model(), []

    def then_replace(original):
        def call(*args):
            found = original(*args)
            if not changed:
                changed.append(replace_patches(processed, seed=1))
            return found
        return call

    if when == "as they are opened":
        monkeypatch.setattr(processed, "patches", then_replace(processed.patches))
    else:
        monkeypatch.setattr(model, "encode_features", then_replace(model.encode_features))
    with pytest.raises(InputError, match=r"A\.patches\.npy was replaced"):
        make(processed, model)
    found = np.array(make(processed, a_model()))
    for path in (processed.folder / "features").rglob("*.json"):
        path.unlink()
    np.testing.assert_array_equal(make(processed, a_model()), found)


def test_features_that_were_only_copied_are_known_by_their_contents(processed, monkeypatch):
    make(processed, a_model())
    os.utime(next((processed.folder / "features").rglob("A.npy")), (1, 1))
    assert computed(processed, a_model(), monkeypatch) == 0


@pytest.mark.parametrize("content", ["{}", "null", '{"bytes": 1}',
                                     '{"patches": {}, "features": {}}'])
def test_a_sidecar_that_lacks_something_is_written_again(processed, content, monkeypatch):
    make(processed, a_model())
    next((processed.folder / "features").rglob("A.json")).write_text(content)
    assert computed(processed, a_model(), monkeypatch) == 16
    assert computed(processed, a_model(), monkeypatch) == 0


# ------------------------------------------------------------------------------ training on it


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A small dataset, an encoder's weights, a run trained on its features: (flags, its folder)."""
    prepare("frozen")
    folder = tmp_path_factory.mktemp("frozen")
    encoder = a_model(seed=3).image_encoder
    torch.save(encoder.state_dict(), folder / "weights.pth")
    flags = ["--dataset", "frozen", "--encoder", "test_resnet", "--encoder_weights",
             str(folder / "weights.pth"), "--freeze", "--batch_size", "16", "--device", "cpu",
             "--max_epochs", "3"]
    main.main([*flags, "--save_path", str(folder / "run")])
    return flags, folder


def run_of(folder):
    return Run("frozen", "heg", folder)


def test_training_leaves_the_encoders_weights_and_statistics_untouched(frozen):
    before = torch.load(frozen[1] / "weights.pth", weights_only=True)
    trained = load_checkpoint(run_of(frozen[1] / "run").checkpoint)
    after = trained.network.image_encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert trained.frozen == {"weights": digest(trained.network.image_encoder), "hub": None}


def test_the_heads_are_trained(frozen, tmp_path):
    losses = pd.read_csv(run_of(frozen[1] / "run").losses)
    assert losses["train_loss"].iloc[-1] < 0.9 * losses["train_loss"].iloc[0]
    trained = load_checkpoint(run_of(frozen[1] / "run").checkpoint)
    before = infer.untrained_model(trained).network.state_dict()
    after = trained.network.state_dict()
    changed = {key.split(".")[0] for key in after if not torch.equal(after[key], before[key])}
    assert changed == {"image_projection", "expression_projection"}


def test_training_needs_no_encoder_once_features_are_kept(frozen, tmp_path, monkeypatch):
    monkeypatch.setattr(HECLIP, "encode_features", pytest.fail)
    main.main([*frozen[0], "--save_path", str(tmp_path)])
    same = [sha256(run_of(folder).losses) for folder in (frozen[1] / "run", tmp_path)]
    assert same[0] == same[1]


def test_stopped_and_resumed_training_ends_as_undisturbed(frozen, tmp_path, monkeypatch):
    flags, save = [*frozen[0], "--save_path", str(tmp_path)], main.save_progress

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "save_progress", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        main.main(flags)
    monkeypatch.setattr(main, "save_progress", save)
    main.main([*flags, "--resume"])
    assert sha256(run_of(tmp_path).losses) == sha256(run_of(frozen[1] / "run").losses)
    for path in ("checkpoint", "last"):
        one, two = (torch.load(getattr(run_of(folder), path), weights_only=True)["model"]
                    for folder in (tmp_path, frozen[1] / "run"))
        assert all(torch.equal(one[key], two[key]) for key in two)
    torch.save(a_model(seed=4).image_encoder.state_dict(), tmp_path / "weights.pth")
    flags[flags.index("--encoder_weights") + 1] = str(tmp_path / "weights.pth")
    with pytest.raises(InputError, match="its frozen encoder differs"):
        main.main([*flags, "--resume"])


@pytest.mark.parametrize("flags",
                         [["--recipe", "regression"], ["--type", "hvg"], ["--recipe", "clip"]])
def test_every_kind_of_model_trains_frozen(frozen, tmp_path, flags):
    here = ["--save_path", str(tmp_path)]
    main.main([*frozen[0], *here, *flags, "--max_epochs", "1"])
    which = flags if flags[0] == "--type" else []
    infer.main(["--dataset", "frozen", "--device", "cpu", "--no-figures", *here, *which])


@pytest.mark.parametrize(("flags", "says"), [
    (["--colour_jitter", "0.1"], "--colour_jitter 0.1 with --freeze"),
    (["--no-pretrained"], "--freeze with --no-pretrained"),
])
def test_what_cannot_be_done_frozen_is_refused(frozen, tmp_path, flags, says):
    with pytest.raises(InputError, match=says):
        main.main([*frozen[0], *flags, "--save_path", str(tmp_path)])


def test_several_processes_are_refused(frozen, tmp_path, monkeypatch):
    monkeypatch.setattr(main.parallel, "start", lambda device: parallel.Ranks(0, 2, device))
    with pytest.raises(InputError, match="--freeze under torchrun"):
        main.main([*frozen[0], "--save_path", str(tmp_path)])


# ------------------------------------------------------------------------------ predicting with it


def predict(frozen, folder, *flags):
    """Embeddings of the query, after infer.py on a copy of the run."""
    run = run_of(folder)
    run.folder.mkdir(parents=True)
    run.checkpoint.write_bytes(run_of(frozen[1] / "run").checkpoint.read_bytes())
    infer.main(["--dataset", "frozen", "--save_path", str(folder), "--device", "cpu",
                "--no-figures", *flags])
    return np.load(run.embeddings("DEMO_C1"))["image"], json.loads(run.scores.read_text())


def query_files():
    return sorted((Processed("frozen").folder / "features").rglob("DEMO_C1.*"))


def test_inference_is_the_same_with_the_cache_and_without(frozen, tmp_path, monkeypatch):
    made, scores = predict(frozen, tmp_path / "making")
    assert [path.name for path in query_files()] == ["DEMO_C1.json", "DEMO_C1.npy"]
    with monkeypatch.context() as patched:
        patched.setattr(HECLIP, "encode_features", pytest.fail)
        again, again_scores = predict(frozen, tmp_path / "kept")
    np.testing.assert_array_equal(again, made)
    assert again_scores == scores
    with monkeypatch.context() as patched:  # as though nothing of it had ever been frozen
        for name in ("features_of", "saved_features"):
            patched.setattr(prediction, name, lambda *_: None)
        by_pixels, _ = predict(frozen, tmp_path / "pixels")
    np.testing.assert_allclose(by_pixels, made, rtol=5e-3, atol=5e-3)


def test_a_single_view_uses_what_is_kept_and_makes_nothing(frozen, tmp_path):
    for path in query_files():
        path.unlink()
    without, _ = predict(frozen, tmp_path / "without", "--views", "1")
    assert query_files() == []
    predict(frozen, tmp_path / "making")
    kept_of_all, _ = predict(frozen, tmp_path / "with", "--views", "1")
    np.testing.assert_allclose(kept_of_all, without, rtol=5e-3, atol=5e-3)
    assert not np.array_equal(kept_of_all, without)  # half precision shows that it was used


def test_a_checkpoint_is_used_wherever_it_lies(frozen, tmp_path):
    predict(frozen, tmp_path / "own")
    (tmp_path / "mine.pt").write_bytes(run_of(frozen[1] / "run").checkpoint.read_bytes())
    infer.main(["--dataset", "frozen", "--save_path", str(tmp_path / "other"), "--device", "cpu",
                "--no-figures", "--checkpoint", str(tmp_path / "mine.pt"), "--untrained"])
    own, other = (json.loads(run_of(tmp_path / name).scores.read_text())["scores"]
                  for name in ("own", "other"))
    assert {key: other[key] for key in own} == own
    assert other.keys() == own.keys() | {"untrained gene", "untrained image"}


def test_features_of_a_version_to_come_are_not_mistaken_for_these(processed, monkeypatch):
    make(processed, a_model())
    monkeypatch.setattr(features_module, "FORMAT", 99)
    assert computed(processed, a_model(), monkeypatch) == 16
