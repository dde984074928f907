"""Encoders by any name that timm takes. The hub is a folder made here, in its cache's layout."""

import json

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from makers import panel_of

from heclip import model as model_module
from heclip.checkpoint import Trained, load_checkpoint, save_checkpoint
from heclip.features import digest
from heclip.files import InputError
from heclip.model import HECLIP, ModelConfig, configure, create_encoder, load_encoder_weights
from heclip.settings import Training

HUB = "hf-hub:owner/encoder"
MEAN, STD = (0.707, 0.578, 0.703), (0.211, 0.230, 0.177)
ARGUMENTS = {"init_values": 1e-5, "dynamic_img_size": True, "img_size": 112}


def write_encoder(folder, seed=0, architecture="test_vit", arguments=ARGUMENTS, **facts):
    """An encoder as timm saves it for a hub: a config.json, a model.safetensors. Returns it."""
    torch.manual_seed(seed)
    network = timm.create_model(architecture, num_classes=0, **arguments).eval()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({
        "architecture": architecture, "num_classes": 0, "num_features": 64, "model_args": arguments,
        "pretrained_cfg": {"input_size": [3, 160, 160], "fixed_input_size": True, "mean": MEAN,
                           "std": STD, "num_classes": 0, "first_conv": "patch_embed.proj",
                           "classifier": "head"} | facts}))
    safetensors.torch.save_file(
        {key: value.contiguous() for key, value in network.state_dict().items()},
        folder / "model.safetensors")
    return network


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of owner/encoder in a cache of the hub, which is reached by no other way."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "hub" / "models--owner--encoder"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0123456789")
    return place / "snapshots" / "0123456789"


def save(path, model, frozen=None):
    """Write the checkpoint of a model of five genes."""
    settings = Training(encoder=HUB, colour_jitter=0.0, freeze=frozen is not None)
    panel = panel_of(*"ABCDE", kind=model.config.kind)
    reference = {"A": "digest"}
    save_checkpoint(path, Trained(model, settings, panel, reference, 256, 100.0, frozen=frozen))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_name_on_the_hub_becomes_its_network_arguments_and_pixel_statistics(hub):
    source = write_encoder(hub)
    config = configure(HUB, "heg", 5, 256)
    assert (config.encoder, config.encoder_args) == ("test_vit", ARGUMENTS)
    assert (config.mean, config.std, config.image_size) == (MEAN, STD, 112)
    model = HECLIP(config).eval()
    load_encoder_weights(model.image_encoder, HUB, None, config.encoder_args)
    pixels = torch.randn(2, 3, 112, 112)
    assert torch.equal(model.encode_features(pixels), source(pixels))


def test_a_model_is_built_again_without_asking_the_hub(hub, tmp_path, monkeypatch):
    write_encoder(hub)
    model = HECLIP(configure(HUB, "hvg", 5, 256)).eval()
    save(tmp_path / "best.pt", model)
    monkeypatch.setattr(timm.models._factory, "load_model_config_from_hf", pytest.fail)
    loaded = load_checkpoint(tmp_path / "best.pt").network
    pixels = torch.randn(2, 3, 112, 112)
    assert torch.equal(loaded.encode_image(pixels), model.encode_image(pixels))


def test_the_size_that_a_hub_leaves_unsaid_is_kept(hub):
    # then timm builds it for 224, and test_vit for 160
    write_encoder(hub, arguments={}, fixed_input_size=False)
    config = configure(HUB, "heg", 5, 224)
    assert config.encoder_args == {"img_size": 224}
    load_encoder_weights(HECLIP(config).image_encoder, HUB, None, config.encoder_args)


def test_a_downloaded_folder_is_an_encoder_too(tmp_path):
    source = write_encoder(tmp_path / "encoder")
    config = configure(f"local-dir:{tmp_path / 'encoder'}", "heg", 5, 256)
    assert (config.encoder, config.mean) == ("test_vit", MEAN)
    target = create_encoder(config.encoder, config.encoder_args)
    load_encoder_weights(target, f"local-dir:{tmp_path / 'encoder'}", None, config.encoder_args)
    assert same(target.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    "name", ["hf-hub:owner/absent", "local-dir:absent", "ftp:owner/encoder", "owner/encoder"])
def test_an_encoder_that_cannot_be_found_is_an_error_that_names_it(hub, name):
    with pytest.raises(InputError,
                       match=f"^--encoder {name}: .*" + ("hf auth login" if "hub" in name else "")):
        configure(name, "heg", 5, 256)


# ---------------------------------------------------------------- a checkpoint of a frozen encoder


def frozen_checkpoint(path):
    config = configure(HUB, "heg", 5, 256)
    model = HECLIP(config).eval()
    load_encoder_weights(model.image_encoder, HUB, None, config.encoder_args)
    save(path, model, frozen={"weights": digest(model.image_encoder), "hub": HUB})
    return model


def test_a_frozen_encoder_of_the_hub_is_not_in_the_checkpoint_but_found_again(hub, tmp_path):
    write_encoder(hub)
    model = frozen_checkpoint(tmp_path / "best.pt")
    kept = torch.load(tmp_path / "best.pt", weights_only=True)["model"]
    assert {key.split(".")[0] for key in kept} == {"image_projection", "expression_projection"}
    assert same(load_checkpoint(tmp_path / "best.pt").network.state_dict(), model.state_dict())


def test_other_weights_under_the_same_name_are_refused(hub, tmp_path):
    write_encoder(hub)
    frozen_checkpoint(tmp_path / "best.pt")
    write_encoder(hub, seed=1)
    with pytest.raises(InputError,
                       match=r"best\.pt was trained on other weights of hf-hub:owner/encoder"):
        load_checkpoint(tmp_path / "best.pt")


def test_a_hub_that_has_lost_it_is_an_error_that_names_the_encoder(hub, tmp_path):
    write_encoder(hub)
    frozen_checkpoint(tmp_path / "best.pt")
    (hub / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"weights of hf-hub:owner/encoder could not be fetched"):
        load_checkpoint(tmp_path / "best.pt")


# ------------------------------------------------------------------------------ input sizes


@pytest.mark.parametrize(("arguments", "size", "kept"), [
    ({}, 96, {"img_size": 96}),  # built for the size
    ({"dynamic_img_size": True}, 96, {"dynamic_img_size": True}),  # takes any
    ({"dynamic_img_size": True}, None, {"dynamic_img_size": True}),  # its own, not the patch's
])
def test_a_transformer_takes_the_size_it_is_given(arguments, size, kept):
    config = configure("test_vit", "heg", 5, 256, size, encoder_args=arguments)
    assert (config.image_size, config.encoder_args) == (size or 160, kept)
    assert HECLIP(config).encode_image(
        torch.randn(2, 3, config.image_size, config.image_size)).shape == (2, 256)


def test_position_embeddings_are_resized_alike_from_a_hub_and_from_a_file(hub):
    source = write_encoder(hub, arguments={})
    config = configure(HUB, "heg", 5, 256, 96)
    by_name, by_file = (create_encoder(config.encoder, config.encoder_args) for _ in range(2))
    assert by_name.pos_embed.shape[1] < source.pos_embed.shape[1]
    load_encoder_weights(by_name, HUB, None, config.encoder_args)
    load_encoder_weights(by_file, HUB, hub / "model.safetensors", config.encoder_args)
    assert same(by_name.state_dict(), by_file.state_dict())
    assert torch.equal(by_name.cls_token, source.cls_token)


def test_a_size_that_the_encoder_cannot_take_is_an_error():
    with pytest.raises(InputError, match=r"--encoder test_vit: .*divisible"):
        configure("test_vit", "heg", 5, 256, 100, encoder_args={"dynamic_img_size": True})


# ------------------------------------------------------------------- outputs, and layers by name


@pytest.mark.parametrize("registers", [0, 3])
def test_tokens_become_the_class_token_next_to_the_mean_of_the_patches(registers):
    config = configure("test_vit", "heg", 5, 256,
                       encoder_args={"global_pool": "", "reg_tokens": registers})
    model = HECLIP(config).eval()
    pixels = torch.randn(2, 3, 160, 160)
    tokens, prefix = model.image_encoder(pixels), model.image_encoder.num_prefix_tokens
    features = model.encode_features(pixels)
    assert features.shape == (2, 128) == (2, model.n_features)
    torch.testing.assert_close(features[1],
                               torch.cat([tokens[1, 0], sum(tokens[1, prefix:]) / (100)]))


@pytest.mark.parametrize("encoder", ["test_resnet", "test_convnext"])
def test_a_map_is_no_vector(encoder):
    with pytest.raises(InputError, match=rf"--encoder {encoder} gives \(2, .*global_pool"):
        configure(encoder, "heg", 5, 64, encoder_args={"global_pool": ""})


def test_layers_are_given_by_name_and_stay_names_in_the_config():
    arguments = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
    config = configure("test_vit", "heg", 5, 256, encoder_args=arguments)
    assert config.encoder_args == arguments
    mlp = HECLIP(config).image_encoder.blocks[0].mlp
    assert isinstance(mlp, timm.layers.GluMlp)
    assert isinstance(mlp.act, torch.nn.SiLU)


def test_an_encoder_never_keeps_its_classifier():
    config = configure("test_vit", "heg", 5, 256, encoder_args={"num_classes": 10})
    assert HECLIP(config).encode_features(torch.randn(2, 3, 160, 160)).shape == (2, 64)


def test_an_unknown_argument_is_an_error():
    with pytest.raises(InputError, match=r"--encoder test_vit: .*colour"):
        configure("test_vit", "heg", 5, 256, encoder_args={"colour": "blue"})


def test_configs_of_earlier_checkpoints_have_no_arguments():
    old = ModelConfig("heg", 5, "test_resnet", 32, MEAN, STD)
    assert old.encoder_args == {}
    assert model_module.HECLIP(old).n_features == 96
