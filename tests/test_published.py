"""Checkpoints of the published code: made here with the names and shapes that it saves, and random weights."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from test_scripts import prepare
from torch import nn

import infer
from heclip import checkpoint as checkpoint_module
from heclip.checkpoint import load_checkpoint
from heclip.dataset import Processed, Run
from heclip.files import InputError


class Head(nn.Module):
    """Its projection head, as described: Linear, GELU, Linear, residual, LayerNorm (dropout does nothing here)."""

    def __init__(self, features, width):
        super().__init__()
        self.projection, self.fc = nn.Linear(features, width), nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x):
        x = self.projection(x)
        return self.layer_norm(x + self.fc(nn.functional.gelu(x)))


class Inner(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


class Published(nn.Module):
    def __init__(self, kind, n_genes, encoder="resnet50"):
        super().__init__()
        self.image_encoder = Inner(timm.create_model(encoder, num_classes=0, global_pool="avg"))
        self.spot_encoder = Inner(nn.Linear(n_genes, n_genes))
        features = self.image_encoder.model.num_features
        self.image_projection = Head(features, 256 if kind == "heg" else n_genes)
        if kind == "heg":
            self.spot_projection = Head(n_genes, 256)


def write(path, kind, n_genes, encoder="resnet50", rename=lambda key: key):
    torch.manual_seed(0)
    model = Published(kind, n_genes, encoder).eval()
    torch.save({rename(key): value for key, value in model.state_dict().items()}, path)
    return model


@pytest.fixture
def small_encoder(monkeypatch):
    """resnet50 takes seconds; what is tested beside it is the same for a small network of its name."""
    create = checkpoint_module.HECLIP.__init__.__globals__["create_encoder"]
    monkeypatch.setitem(checkpoint_module.HECLIP.__init__.__globals__, "create_encoder",
                        lambda name, arguments: create({"resnet50": "test_resnet"}.get(name, name), arguments))


def test_a_real_resnet50_gives_the_embeddings_it_gives_there(tmp_path):
    source = write(tmp_path / "heg_best.pt", "heg", 37)
    weights = source.state_dict()
    assert len(weights) == 332
    assert weights["image_projection.projection.weight"].shape == (256, 2048)
    model, facts = load_checkpoint(tmp_path / "heg_best.pt")
    assert facts == {}
    assert not model.training
    pixels, expression = torch.rand(2, 3, 64, 64) * 255, torch.rand(2, 37)
    with torch.inference_mode():
        image = source.image_projection(source.image_encoder.model(pixels))
        gene = source.spot_projection(expression)
        torch.testing.assert_close(model.encode_image(pixels), image)
        torch.testing.assert_close(model.encode_expression(expression), gene)


@pytest.mark.parametrize("rename", [lambda key: key, lambda key: f"module.{key}",
                                    lambda key: key.replace("spot", "well"),
                                    lambda key: "module." + key.replace("spot", "well")])
@pytest.mark.parametrize(("kind", "width"), [("heg", 256), ("hvg", 37)])
def test_type_and_genes_are_told_by_its_entries_however_named(small_encoder, tmp_path, kind, width, rename):
    source = write(tmp_path / "best.pt", kind, 37, "test_resnet", rename)
    model, _ = load_checkpoint(tmp_path / "best.pt")
    config = model.config
    assert (config.kind, config.n_genes, config.encoder, config.image_size) == (kind, 37, "resnet50", 256)
    assert (config.bgr, config.mean, config.std) == (True, (0, 0, 0), (1 / 255,) * 3)  # 0 to 255, blue first
    pixels = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert model.encode_image(pixels).shape == (2, width)
        torch.testing.assert_close(model.encode_image(pixels),
                                   source.image_projection(source.image_encoder.model(pixels)))


@pytest.mark.parametrize("spoil", [
    lambda weights: weights.pop("image_projection.fc.bias"),
    lambda weights: weights.pop("image_encoder.model.conv1.0.weight"),
    lambda weights: weights.update({"image_encoder.model.layer9.weight": torch.zeros(3)}),
    lambda weights: weights.update({"spot_encoder.model.bias": torch.zeros(36)}),
])
def test_a_file_that_lacks_or_adds_an_entry_is_refused(small_encoder, tmp_path, spoil):
    weights = write(tmp_path / "best.pt", "heg", 37, "test_resnet").state_dict()
    spoil(weights)
    torch.save(weights, tmp_path / "best.pt")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'best.pt'} is not a checkpoint")):
        load_checkpoint(tmp_path / "best.pt")


# ------------------------------------------------------------------------------ predicting with it


@pytest.fixture(scope="module")
def dataset():
    prepare("published")
    return Processed("published")


@pytest.fixture
def small_images(small_encoder, monkeypatch):
    """Images of the patch's own size, for speed."""
    def load(path):
        model, facts = load_checkpoint(path)
        model.config = replace(model.config, image_size=32)
        return model, facts

    monkeypatch.setattr(infer, "load_checkpoint", load)


def run_infer(folder, *flags):
    infer.main(["--dataset", "published", "--save_path", str(folder), "--device", "cpu", "--no-figures",
                *map(str, flags)])


@pytest.mark.parametrize("kind", ["heg", "hvg"])
def test_it_predicts_by_its_own_recipe_and_says_what_it_cannot_know(small_images, dataset, tmp_path, kind, capsys):
    write(tmp_path / "best.pt", kind, len(dataset.panel(kind)), "test_resnet")
    run_infer(tmp_path, "--checkpoint", tmp_path / "best.pt")
    said = capsys.readouterr().out
    assert "whether it has seen DEMO_C1" in said
    scores = pd.read_json(Run("published", kind, tmp_path).scores, typ="series")
    assert (scores["recipe"], scores["retrieval"], scores["k"], scores["views"]) == ("published", "image", 50, 1)
    assert (scores["type"], scores["n_genes"]) == (kind, len(dataset.panel(kind)))


def test_another_number_of_genes_is_refused_and_the_panel_can_be_given(small_images, dataset, tmp_path):
    write(tmp_path / "best.pt", "heg", 37, "test_resnet")
    with pytest.raises(InputError, match=r"is a heg model of 37 genes, but the panel has \d+\. .*--panel_file"):
        run_infer(tmp_path, "--checkpoint", tmp_path / "best.pt")
    genes = list(dataset.genes("DEMO_A1").index[[*range(40, 4, -1), 60]])
    pd.DataFrame({"symbol": "x"}, index=pd.Index(genes, name="id")).to_csv(tmp_path / "genes.csv")
    run_infer(tmp_path, "--checkpoint", tmp_path / "best.pt", "--panel_file", tmp_path / "genes.csv")
    run = Run("published", "heg", tmp_path)
    assert list(np.load(run.embeddings("DEMO_A1"))["panel"]) == genes  # in the file's order
    true = pd.read_csv(run.genes, index_col="gene_id")
    assert set(true.index) == set(genes)
    assert true["symbol"].tolist() == dataset.genes("DEMO_A1").loc[true.index, "symbol"].tolist()


@pytest.mark.parametrize(("content", "says"), [
    (None, "No such file"),
    ("", "No columns"),
    ("gene_id\n", "it holds no genes"),
    ("gene_id\nNOGENE\n", "'NOGENE' first, are not in"),
    ("gene_id\nTWICE\nTWICE\n", "stands in it twice"),
])
def test_a_bad_panel_file_is_an_error_that_names_it(small_encoder, dataset, tmp_path, content, says):
    file = tmp_path / "genes.csv"
    if content is not None:
        file.write_text(content.replace("TWICE", dataset.genes("DEMO_A1").index[0]))
    write(tmp_path / "best.pt", "heg", 37, "test_resnet")
    with pytest.raises(InputError, match=f"--panel_file {re.escape(str(file))}: .*{says}"):
        run_infer(tmp_path, "--checkpoint", tmp_path / "best.pt", "--panel_file", file)


@pytest.mark.parametrize(("flags", "says"), [
    (["--untrained"], "--untrained: .*does not say how its training began"),
    (["--from_ebd"], "--checkpoint with --from_ebd"),
    (["--protocol", "paper", "--panel_file", "x.csv"], "--panel_file with --protocol paper"),
])
def test_flags_that_make_no_sense_with_it_are_refused(small_encoder, dataset, tmp_path, flags, says):
    write(tmp_path / "best.pt", "heg", len(dataset.panel("heg")), "test_resnet")
    prepare("published", "--protocol", "paper")
    with pytest.raises(InputError, match=says):
        run_infer(tmp_path, "--checkpoint", tmp_path / "best.pt", *flags)
