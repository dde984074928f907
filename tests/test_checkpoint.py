"""A checkpoint gives back the same model, is used only on what it was trained for, and is never
half written or replaced by accident."""

import json
import re
import zipfile
from dataclasses import asdict, replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from makers import network, panel_of

from heclip import checkpoint
from heclip.checkpoint import (
    Trained,
    check_replaceable,
    from_facts,
    load_checkpoint,
    load_progress,
    save_checkpoint,
    save_progress,
    saved_digest,
)
from heclip.dataset import Run
from heclip.files import InputError
from heclip.settings import TRAINING, Training

SETTINGS = Training(dataset="demo", query=("C",), encoder="test_resnet", pretrained=False)
PANEL = panel_of("G1", "G2", "G3", "G4", markers=["G2", "G9"])
REFERENCE = {"A": "aaaa", "B": "bbbb"}


def stepped(kind="heg", seed=0):
    """A network whose every entry, the batch statistics too, is no longer what a new one has."""
    model = network(kind, seed=seed, embedding_dim=8, temperature=2.0).train()
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    image, expression, _ = model(torch.randn(6, 3, 32, 32), torch.rand(6, 4))
    ((image - 1) ** 2).mean().add((expression**2).mean()).backward()
    optimiser.step()
    return model.eval()


def trained(kind="heg", seed=0, **changes):
    fields = dict(settings=replace(SETTINGS, type=kind), panel=PANEL, reference=REFERENCE,
                  patch_px=32, patch_um=39.0, epoch=3, validation=[0.5, 0.25, 0.0, 0.25])
    return Trained(stepped(kind, seed), **fields | changes)


@torch.inference_mode()
def embeddings(model):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    return model(pixels, torch.rand(3, 4, generator=generator))[:2]


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path / "heg_best.pt", trained())
    return tmp_path / "heg_best.pt"


# ----------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("kind", ["heg", "hvg"])
def test_a_loaded_model_gives_the_same_embeddings_to_the_last_bit(kind, tmp_path):
    before = trained(kind)
    save_checkpoint(tmp_path / "new" / "best.pt", before)
    torch.manual_seed(99)
    loaded = load_checkpoint(tmp_path / "new" / "best.pt")
    assert not loaded.network.training
    assert loaded.network.config == before.network.config
    for one, same in zip(embeddings(loaded.network), embeddings(before.network), strict=True):
        assert torch.equal(one, same)


def test_a_loaded_model_knows_all_that_it_was_trained_on(saved):
    loaded, before = load_checkpoint(saved), trained()
    for field in ("settings", "reference", "patch_px", "patch_um", "epoch", "validation"):
        assert getattr(loaded, field) == getattr(before, field)
    pd.testing.assert_frame_equal(loaded.panel.genes, before.panel.genes)
    assert replace(loaded.panel, genes=None) == replace(before.panel, genes=None)
    assert list(loaded.panel.is_marker) == [False, True, False, False]
    assert loaded.path == saved
    assert loaded.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert loaded.digest == saved_digest(saved) != ""


def test_what_a_model_knows_survives_json(saved):
    loaded = load_checkpoint(saved)
    again = from_facts(json.loads(json.dumps(loaded.facts())))
    assert again.facts() == loaded.facts()
    assert again.settings == loaded.settings  # the tuple of query sections too
    assert again.network is None


def test_the_file_loads_with_plain_torch_and_without_running_code(saved):
    content = torch.load(saved, weights_only=True)
    assert content["config"] == asdict(stepped().config)
    assert all(isinstance(value, torch.Tensor) for value in content["model"].values())


def test_the_digest_follows_weights_and_pixels_and_nothing_else(tmp_path):
    def digest(**changes):
        save_checkpoint(tmp_path / "best.pt", trained(**changes))
        return saved_digest(tmp_path / "best.pt")

    first = digest()
    assert digest(epoch=4, validation=None) == first
    assert digest(seed=1) != first
    model = trained()
    model.network.config = replace(model.network.config, bgr=True)
    save_checkpoint(tmp_path / "best.pt", model)
    assert saved_digest(tmp_path / "best.pt") != first
    (tmp_path / "best.pt").write_text("damaged")
    assert saved_digest(tmp_path / "best.pt") is saved_digest(tmp_path / "absent.pt") is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


def flip_a_weight(path):
    """Change one byte in the middle of the largest tensor, as a failing disk or a bad copy does."""
    content = bytearray(path.read_bytes())
    weights = max(stepped().state_dict().values(), key=torch.numel).numpy().tobytes()
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
    torch.save(stepped().state_dict(), path)


def whole_module(path):
    torch.save(stepped(), path)


def change(path, part, **entries):
    content = torch.load(path, weights_only=True)
    (content[part] if part else content).update(entries)
    torch.save(content, path)


def later_format(path):
    change(path, None, format=99)


def unknown_option(path):
    change(path, "config", colour="blue")


def unknown_setting(path):
    change(path, "settings", colour="blue")


def other_config(path):
    change(path, "config", n_genes=5)


# torch warns of a tensor that is taken for a dict
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("spoil", [truncate, flip_a_weight, empty, text, folder, tensor,
                                   plain_weights, whole_module, later_format, unknown_option,
                                   unknown_setting, other_config])
def test_a_damaged_or_foreign_file_is_an_error_that_names_it(spoil, saved):
    spoil(saved)
    says = re.escape(f"{saved} is not a checkpoint of main.py, or is damaged")
    with pytest.raises(InputError, match=says):
        load_checkpoint(saved)


def test_a_missing_checkpoint_is_an_error_that_says_what_makes_it(tmp_path):
    says = re.escape(f"{tmp_path / 'best.pt'} is missing. Train it with main.py")
    with pytest.raises(InputError, match=says):
        load_checkpoint(tmp_path / "best.pt")


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(saved, failure, monkeypatch):
    def fail(content, path):
        path.write_bytes(b"half")
        raise failure

    before = saved.read_bytes()
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(type(failure)):
        save_checkpoint(saved, trained(seed=5))
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_later_save_replaces_the_earlier_one(saved):
    later = trained(seed=5, epoch=7)
    save_checkpoint(saved, later)
    loaded = load_checkpoint(saved)
    assert loaded.epoch == 7
    assert torch.equal(embeddings(loaded.network)[0], embeddings(later.network)[0])


# ------------------------------------------------------------------- what it may be used on


def processed(dataset="demo", **changes):
    """Stands in for Processed. Sections A, B and C, 32 px of 39 µm; changes: section -> columns."""
    columns = {"crop_px": 30, "mpp": 1.3, "patch_px": 32}
    rows = {name: columns | {"digest": name.lower() * 4} | changes.get(name, {}) for name in "ABC"}
    rows = {name: row for name, row in rows.items() if not row.pop("absent", False)}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("section")
    return SimpleNamespace(dataset=dataset, sections=lambda: table, sections_path="sections.csv",
                           check_made_from=lambda sections: None)


@pytest.mark.parametrize(("entry", "value", "says"), [
    ("config", {"n_genes": 10**9}, "its config does not fit its weights"),
    ("config", {"embedding_dim": 10**6}, "its config does not fit its weights"),
    ("config", {"n_genes": "4"}, ""), ("config", {"encoder": "vit_giant_patch14_dinov2"}, "fit"),
    ("digest", "[" * 50_000, "a text of 50,000 characters"),  # torch took a minute to refuse it
    ("panel", {}, ""), ("patch_px", "32", "its patch_px is '32'"),
    ("reference", ["A"], "its reference is"), ("digest", None, "its digest is None")])
def test_a_checkpoint_with_another_entry_is_refused(saved, entry, value, says):
    content = torch.load(saved, weights_only=True)
    content[entry] = content[entry] | value if entry == "config" else value
    torch.save(content, saved)
    with pytest.raises(InputError, match=rf"is not a checkpoint of main\.py.*{says}"):
        load_checkpoint(saved)


def test_a_compressed_checkpoint_is_refused(saved):
    with zipfile.ZipFile(saved) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    with pytest.raises(InputError, match="its members are compressed"):
        load_checkpoint(saved)


def test_a_model_may_predict_what_it_has_not_seen(saved):
    loaded = load_checkpoint(saved)
    loaded.check(processed(), "C")
    loaded.check(processed(), None)  # a slide
    loaded.check(processed(C={"digest": "changed", "crop_px": 32}), "C")  # 7 % wider, and new to it
    loaded.check(processed(), "slide.svs", width_um=40)


@pytest.mark.parametrize(("given", "query", "says"), [
    (processed("other"), "C", "demo, not on other"),
    (processed(), "B", "B, which is now the query section"),
    (processed(B={"absent": True}), "C", r"B, which sections\.csv lacks"),
    (processed(B={"digest": "other", "crop_px": 60}), "C",
     "patches of 39 µm in 32 px, and B was made again since, .* patches of 78 µm in 32 px"),
    (processed(A={"digest": "other", "patch_px": 64}), None,
     "patches of 39 µm in 32 px, and A was made again since, .* patches of 39 µm in 64 px"),
    (processed(C={"crop_px": 60}), "C", "patches of 39 µm, but those of C show 78 µm"),
])
def test_a_model_is_refused_what_it_was_not_trained_for(saved, given, query, says):
    loaded = load_checkpoint(saved)
    with pytest.raises(InputError, match=f"{re.escape(str(saved))} was trained on .*{says}"):
        loaded.check(given, query)


def test_patches_of_another_width_are_refused(saved):
    with pytest.raises(InputError, match=r"39 µm, but those of slide\.svs show 50 µm"):
        load_checkpoint(saved).check(processed(), "slide.svs", width_um=50)


# ------------------------------------------------------------------------ not replaced by accident


@pytest.fixture
def run(tmp_path):
    """The places of a model that was trained: a checkpoint and its progress."""
    run = Run("demo", "heg", tmp_path)
    model = trained()
    save_checkpoint(run.checkpoint, model)
    save_progress(run.last, model, torch.optim.AdamW(model.network.parameters()), [])
    return run


def test_the_same_model_may_be_trained_again(run):
    check_replaceable(run, trained(seed=8, epoch=1, validation=None))
    elsewhere = replace(SETTINGS, device="cuda", compile=True, save_path="x", resume=True)
    check_replaceable(run, trained(settings=elsewhere))


OTHERS = [
    (dict(settings=replace(TRAINING["published"], dataset="demo", query=("C",),
                           encoder="test_resnet", pretrained=False)),
     "--recipe was heclip, is published"),
    (dict(settings=replace(SETTINGS, lr=0.1)), r"--lr was 0\.001, is 0\.1"),
    (dict(settings=replace(SETTINGS, max_epochs=30)), "--max_epochs was 15, is 30"),
    (dict(settings=replace(SETTINGS, seed=1)), "--seed was 42, is 1"),
    (dict(panel=panel_of("G1", "G2", "G4", "G3")), "its panel differs"),
    (dict(panel=panel_of("G1", "G2")), r"its panel differs \(4 genes, now 2\)"),
    (dict(reference={"A": "aaaa"}), "its reference was A, B, is A"),
    (dict(reference={"A": "aaaa", "B": "new"}, patch_um=60.0),
     "its sections were made again since: patches of 39 µm, now 60 µm"),
    (dict(frozen={"weights": "w", "hub": None}), "its frozen encoder differs"),
]


@pytest.mark.parametrize(("other", "says"), OTHERS)
def test_another_model_is_not_replaced(run, other, says):
    for kept, gone in ((run.checkpoint, run.last), (run.last, run.checkpoint)):
        before, removed = kept.read_bytes(), gone.read_bytes()
        gone.unlink()  # either of the two is enough
        with pytest.raises(InputError, match=f"{re.escape(str(kept))} holds another model: .*{says}"
                                             ".*--overwrite"):
            check_replaceable(run, trained(**other))
        assert kept.read_bytes() == before
        gone.write_bytes(removed)


def test_a_published_or_unreadable_file_is_not_replaced(run):
    weights = {"spot_encoder.model.bias": torch.zeros(4)}
    for spoil, says in ((lambda path: torch.save(weights, path), "it is a published checkpoint"),
                        (truncate, "it cannot be read"), (later_format, "it cannot be read")):
        save_checkpoint(run.checkpoint, trained())
        spoil(run.checkpoint)
        with pytest.raises(InputError, match=f"holds another model: {says}"):
            check_replaceable(run, trained())


def test_published_models_are_told_apart_by_their_weights():
    known = dict(reference=None, patch_um=None, epoch=0, validation=None)
    one, same, other = (trained(**known, digest=digest) for digest in ("x", "x", "y"))
    assert checkpoint.changes(one, same) == []
    assert checkpoint.changes(one, other) == ["its weights differ"]
    assert checkpoint.changes(one, trained()) != []
    assert checkpoint.changes(trained(), one) != []


# --------------------------------------------------------------------------------------- resuming

LOSSES = [{"epoch": 1, "train_loss": 2.5, "validation_pearson": 0.1}]
CONSTANT = replace(SETTINGS, schedule="constant", max_epochs=2)


def step(model, optimiser, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(6, 3, 32, 32, generator=generator)
    image, expression, _ = model(pixels, torch.rand(6, 4, generator=generator))
    optimiser.zero_grad()
    ((image - 1) ** 2).mean().add((expression - 1).abs().mean()).backward()
    optimiser.step()


def started(seed, **changes):
    model = trained(seed=seed, **{"settings": CONSTANT} | changes)
    return model, torch.optim.AdamW(model.network.parameters(), 1e-2)


@pytest.fixture
def interrupted(tmp_path):
    """A run that stopped after its second step: (file, Trained, optimiser)."""
    model, optimiser = started(0)
    step(model.network, optimiser, 1)
    step(model.network, optimiser, 2)
    save_progress(tmp_path / "heg_last.pt", model, optimiser, LOSSES)
    return tmp_path / "heg_last.pt", model, optimiser


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(interrupted):
    path, model, optimiser = interrupted
    other, other_optimiser = started(7)
    assert load_progress(path, other, other_optimiser) == LOSSES
    step(model.network, optimiser, 3)
    step(other.network, other_optimiser, 3)
    for one, same in zip(model.network.state_dict().values(), other.network.state_dict().values(),
                         strict=True):
        assert torch.equal(one, same)


@pytest.mark.parametrize(("setting", "value"), [
    ("max_epochs", 30), ("device", "cuda"), ("compile", True), ("save_path", "elsewhere"),
    ("resume", True), ("overwrite", True)])
def test_what_does_not_change_the_epochs_done_may_differ_on_resuming(setting, value, interrupted):
    changed = replace(CONSTANT, **{setting: value})
    assert load_progress(interrupted[0], *started(7, settings=changed)) == LOSSES


def test_under_a_schedule_that_ends_with_the_epochs_their_number_may_not_differ(tmp_path):
    model, optimiser = started(0, settings=SETTINGS)
    save_progress(tmp_path / "last.pt", model, optimiser, LOSSES)
    assert load_progress(tmp_path / "last.pt", *started(7, settings=SETTINGS)) == LOSSES
    longer = replace(SETTINGS, max_epochs=30)
    with pytest.raises(InputError, match="--max_epochs was 15, is 30"):
        load_progress(tmp_path / "last.pt", *started(7, settings=longer))


@pytest.mark.parametrize(("other", "says"), [
    (dict(settings=replace(CONSTANT, lr=0.1)), r"--lr was 0\.001, is 0\.1"),
    (dict(settings=replace(CONSTANT, mixup=0.0)), r"--mixup was 0\.4, is 0\.0"),
    (dict(settings=replace(CONSTANT, dataset="MOB")), "--dataset was demo, is MOB"),
    *((other, says) for other, says in OTHERS if "settings" not in other),
])
def test_another_run_is_not_resumed_and_the_model_is_left_as_it_was(other, says, interrupted):
    model, optimiser = started(7, **other)
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    with pytest.raises(InputError, match=f"{re.escape(str(interrupted[0]))} is of another run: "
                                         f".*{says}.*--resume"):
        load_progress(interrupted[0], model, optimiser)
    for key, value in model.network.state_dict().items():
        assert torch.equal(before[key], value)


@pytest.mark.parametrize("spoil", [truncate, text, empty, later_format])
def test_damaged_progress_is_an_error_that_names_the_file(spoil, interrupted):
    spoil(interrupted[0])
    with pytest.raises(InputError, match=re.escape(f"{interrupted[0]} is damaged")):
        load_progress(interrupted[0], *started(7))
