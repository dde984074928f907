"""Checkpoints of the published code: made here with the names and shapes that it saves, and random
weights."""

import json
import re
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from makers import prepare, untrained
from torch import nn

import infer
from heclip import checkpoint, model
from heclip.dataset import Processed, Run
from heclip.files import InputError
from heclip.settings import PREDICTING


class Head(nn.Module):
    """Its projection head, as described: Linear, GELU, Linear, residual, LayerNorm. Dropout does
    nothing here."""

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
        network = timm.create_model(encoder, num_classes=0, global_pool="avg")
        self.image_encoder = Inner(network)
        self.spot_encoder = Inner(nn.Linear(n_genes, n_genes))
        self.image_projection = Head(network.num_features, 256 if kind == "heg" else n_genes)
        if kind == "heg":
            self.spot_projection = Head(n_genes, 256)


def write(path, kind, n_genes, encoder="resnet50", rename=lambda key: key, seed=0):
    torch.manual_seed(seed)
    network = Published(kind, n_genes, encoder).eval()
    torch.save({rename(key): value for key, value in network.state_dict().items()}, path)
    return network


@pytest.fixture
def small_encoder(monkeypatch):
    """A small network by the name of resnet50, which takes seconds."""
    create = model.create_encoder
    monkeypatch.setattr(model, "create_encoder", lambda name, arguments: create(
        "test_resnet" if name == "resnet50" else name, arguments))


def test_a_real_resnet50_gives_the_embeddings_it_gives_there(tmp_path):
    source = write(tmp_path / "heg_best.pt", "heg", 37)
    weights = source.state_dict()
    assert len(weights) == 332
    assert weights["image_projection.projection.weight"].shape == (256, 2048)
    network = checkpoint.load_checkpoint(tmp_path / "heg_best.pt").network
    assert not network.training
    pixels, expression = torch.rand(2, 3, 64, 64) * 255, torch.rand(2, 37)
    with torch.inference_mode():
        image = source.image_projection(source.image_encoder.model(pixels))
        gene = source.spot_projection(expression)
        torch.testing.assert_close(network.encode_image(pixels), image)
        torch.testing.assert_close(network.encode_expression(expression), gene)


@pytest.mark.parametrize(("kind", "width", "rename"), [
    ("heg", 256, lambda key: key),
    ("hvg", 37, lambda key: f"module.{key}"),
    ("heg", 256, lambda key: "module." + key.replace("spot", "well")),
    ("hvg", 37, lambda key: key.replace("spot", "well")),
], ids=["heg-plain", "hvg-module", "heg-module-well", "hvg-well"])
def test_its_entries_say_its_type_and_number_of_genes_however_named(small_encoder, tmp_path, kind,
                                                                    width, rename):
    source = write(tmp_path / "best.pt", kind, 37, "test_resnet", rename)
    trained = checkpoint.load_checkpoint(tmp_path / "best.pt")
    config = trained.network.config
    assert (config.kind, config.n_genes, config.encoder) == (kind, 37, "resnet50")
    assert config.image_size == 256
    assert config.bgr  # 0 to 255, blue first
    assert (config.mean, config.std) == ((0, 0, 0), (1 / 255,) * 3)
    assert (trained.settings.recipe, trained.settings.type) == ("published", kind)
    assert trained.panel is trained.reference is trained.patch_um is None  # it does not say
    assert trained.digest == checkpoint.model_digest(trained.network)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        image = trained.network.encode_image(pixels)
        assert image.shape == (2, width)
        torch.testing.assert_close(
            image, source.image_projection(source.image_encoder.model(pixels)))


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
    says = re.escape(f"{tmp_path / 'best.pt'} is not a checkpoint")
    with pytest.raises(InputError, match=says):
        checkpoint.load_checkpoint(tmp_path / "best.pt")


# --------------------------------------------------------------------------- predicting with it


@pytest.fixture(scope="module")
def dataset():
    prepare("published", "--protocol", "paper")
    return Processed("published")


@pytest.fixture
def small_images(small_encoder, monkeypatch):
    """Images of the patch's own size, for speed."""
    def load(path):
        trained = checkpoint.load_checkpoint(path)
        if trained.reference is None:
            trained.network.config = replace(trained.network.config, image_size=32)
        return trained

    monkeypatch.setattr(infer, "load_checkpoint", load)


def run_infer(folder, *flags):
    infer.main(["--dataset", "published", "--save_path", str(folder), "--device", "cpu",
                "--no-figures", *map(str, flags)])


@pytest.mark.parametrize(("kind", "protocol"), [("heg", "strict"), ("hvg", "paper")])
def test_it_predicts_by_its_own_recipe_and_says_what_it_cannot_know(small_images, dataset, tmp_path,
                                                                    kind, protocol, capsys):
    panel = dataset.panel(kind, protocol)
    write(tmp_path / "best.pt", kind, len(panel), "test_resnet")
    flags = ["--checkpoint", tmp_path / "best.pt", "--protocol", protocol]
    run_infer(tmp_path, *flags)
    assert "Whether it has seen DEMO_C1" in capsys.readouterr().out
    name = kind if protocol == "strict" else f"{kind}_paper"  # by its entries, not by --type
    run = Run("published", name, tmp_path)
    scores = json.loads(run.scores.read_text())
    how = PREDICTING["published"]
    assert {key: scores[key] for key in vars(how)} == vars(how)
    assert (scores["recipe"], scores["type"], scores["protocol"]) == ("published", kind, protocol)
    assert scores["n_genes"] == len(panel)
    prediction = anndata.read_h5ad(run.prediction)
    assert list(prediction.var_names) == list(panel.ids)
    assert "expected_pearson" not in prediction.var
    before = run.prediction.read_bytes()
    run_infer(tmp_path, *flags)  # the same model may replace its own prediction
    assert run.prediction.read_bytes() == before
    run_infer(tmp_path, "--from_ebd", "--type", kind, "--protocol", protocol)
    assert run.prediction.read_bytes() == before


def test_another_model_does_not_replace_its_prediction(small_images, dataset, tmp_path):
    n_genes = len(dataset.panel("heg"))
    write(tmp_path / "one.pt", "heg", n_genes, "test_resnet")
    write(tmp_path / "two.pt", "heg", n_genes, "test_resnet", seed=1)
    untrained(tmp_path / "ours.pt", "published")
    run_infer(tmp_path, "--checkpoint", tmp_path / "one.pt")
    for other, says in (("two.pt", "its weights differ"),
                        ("ours.pt", "one of them is a published checkpoint")):
        with pytest.raises(InputError, match=f"holds another prediction: .*{says}"):
            run_infer(tmp_path, "--checkpoint", tmp_path / other)
    run_infer(tmp_path, "--checkpoint", tmp_path / "two.pt", "--overwrite")


def test_another_number_of_genes_is_refused_and_the_panel_can_be_given(small_images, dataset,
                                                                       tmp_path):
    write(tmp_path / "best.pt", "heg", 37, "test_resnet")
    says = r"is a heg model of 37 genes, but the panel has \d+\. .*--panel_file"
    with pytest.raises(InputError, match=says):
        run_infer(tmp_path, "--checkpoint", tmp_path / "best.pt")
    genes = list(dataset.genes("DEMO_A1").index[[*range(40, 4, -1), 60]])
    pd.DataFrame({"symbol": "x"}, index=pd.Index(genes, name="id")).to_csv(tmp_path / "genes.csv")
    run_infer(tmp_path, "--checkpoint", tmp_path / "best.pt", "--panel_file",
              tmp_path / "genes.csv")
    run = Run("published", "heg", tmp_path)
    with np.load(run.embeddings("DEMO_A1")) as file:
        about = json.loads(str(file["about"]))
    assert about["trained"]["panel"]["ids"] == genes  # in the file's order
    assert list(anndata.read_h5ad(run.prediction).var_names) == genes
    table = pd.read_csv(run.genes, index_col="gene_id")
    assert set(table.index) == set(genes)
    symbols = dataset.genes("DEMO_A1").loc[table.index, "symbol"]
    assert table["symbol"].tolist() == symbols.tolist()


@pytest.mark.parametrize(("content", "says"), [
    (None, "No such file"),
    ("", "No columns"),
    ("gene_id\n", "it holds no genes"),
    ("gene_id\nNOGENE\n", "1 of its 1 genes are in no section, 'NOGENE' first"),
    ("gene_id\nTWICE\nTWICE\n", "it lists gene .* twice"),
])
def test_a_bad_panel_file_is_an_error_that_names_it(small_encoder, dataset, tmp_path, content,
                                                    says):
    file = tmp_path / "genes.csv"
    if content is not None:
        file.write_text(content.replace("TWICE", dataset.genes("DEMO_A1").index[0]))
    write(tmp_path / "best.pt", "heg", 37, "test_resnet")
    with pytest.raises(InputError, match=f"--panel_file {re.escape(str(file))}: .*{says}"):
        run_infer(tmp_path, "--checkpoint", tmp_path / "best.pt", "--panel_file", file)


@pytest.mark.parametrize(("flags", "says"), [
    (["--untrained"], "--untrained: .*does not say how its training began"),
    (["--protocol", "paper", "--panel_file", "x.csv"], "--panel_file with --protocol paper"),
    (["--image", "x.tif"], "is a published checkpoint, .*needs a model of main.py"),
])
def test_what_makes_no_sense_with_it_is_refused(small_encoder, dataset, tmp_path, flags, says):
    write(tmp_path / "best.pt", "heg", len(dataset.panel("heg")), "test_resnet")
    with pytest.raises(InputError, match=says):
        run_infer(tmp_path, "--checkpoint", tmp_path / "best.pt", *flags)


def test_a_panel_file_with_a_model_of_main_is_refused(dataset, tmp_path):
    untrained(tmp_path / "best.pt", "published")
    says = r"--panel_file: .*best\.pt contains its genes"
    with pytest.raises(InputError, match=says):
        run_infer(tmp_path, "--checkpoint", tmp_path / "best.pt", "--panel_file", "x.csv")
