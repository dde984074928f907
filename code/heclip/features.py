"""Features of an encoder that stays as it was pretrained: computed once, kept on disk, section by section.

    GSE/<dataset>/processed/features/<encoder>_<S>px_<key>/<section>.npy     float16 (n_spots, 8, F)

holds what the encoder makes of every patch in each of its 8 symmetries. The key stands for the encoder's weights and
all that is done to pixels before; <section>.json beside each file says of which patches it was made.

Symbols: F features, S side of the encoder's input in pixels.
"""

import hashlib
import json

import numpy as np
import torch
from timm.models import safe_model_name
from tqdm import tqdm

from .batches import SYMMETRIES, Patches, augment, to_pixels
from .command import autocast
from .files import InputError, atomic_path, sha256

FORMAT = 1


def digest(network):
    """SHA-256 over a network's weights and statistics, names and shapes included, as hexadecimal text."""
    total = hashlib.sha256()
    for key, value in network.state_dict().items():
        total.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def folder(processed, config, weights):
    """Where the features of an encoder with this config and digest of weights are kept."""
    made_by = {"format": FORMAT, "weights": weights, **{key: getattr(config, key) for key in
               ("encoder", "encoder_args", "image_size", "mean", "std", "bgr")}}
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]
    return processed.folder / "features" / f"{safe_model_name(config.encoder)}_{config.image_size}px_{key}"


def kept(processed, section, config, weights):
    """The features of a section that are on disk, float16 (n_spots, 8, F) as a memory map, or None.

    None, too, if the section's patches have changed since.
    """
    place = folder(processed, config, weights)
    try:
        made_of = json.loads((place / f"{section}.json").read_text())
        features = np.load(place / f"{section}.npy", mmap_mode="r")
    except (OSError, ValueError, EOFError):  # absent, or spoilt: it can be made anew
        return None
    processed.patches(section)  # an error, unless they were made together with the expression
    # Hashing reads gigabytes that are not needed otherwise (1 GB/s measured): size and time of the file are trusted
    # where they are the same. Where they are not, as after a copy to another disk, its contents decide.
    patches = processed.patches_path(section)
    unchanged = stamp(patches) == [made_of["bytes"], made_of["modified_ns"]] or sha256(patches) == made_of["sha256"]
    return features if unchanged else None


def stamp(path):
    """Size and time of a file."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


@torch.inference_mode()
def features_of(processed, section, model, weights, device, batch_size):
    """The features of a section as `kept` gives them; what is not there is computed and kept.

    model: HECLIP on the device, in evaluation mode. weights: the digest of its encoder.
    """
    if (features := kept(processed, section, model.config, weights)) is not None:
        return features
    place, patches = folder(processed, model.config, weights), Patches([processed.patches(section)], device)
    n = len(patches.sections[0])
    of, sidecar = processed.patches_path(section), place / f"{section}.json"
    size, modified = stamp(of)
    made_of = {"bytes": size, "modified_ns": modified, "sha256": sha256(of)}
    sidecar.unlink(missing_ok=True)  # features are valid by it alone: it goes first and comes last
    with atomic_path(place / f"{section}.npy") as path, open(path, "wb") as file, \
            tqdm(total=n, desc=f"features of {section}", unit="patch", leave=False, disable=None) as bar:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False,
                                                    "shape": (n, len(SYMMETRIES), model.n_features)})
        for batch in patches.stream(torch.arange(n).split(batch_size)):
            features = torch.empty(len(batch), len(SYMMETRIES), model.n_features)
            for i, turns in enumerate(SYMMETRIES):
                with autocast(device):
                    pixels = to_pixels(augment(batch, turns.expand(len(batch), 3)), model.config)
                    features[:, i] = model.encode_features(pixels).float().cpu()
            features = features.half()
            if not features.isfinite().all():
                raise InputError(f"the features of {section} by {model.config.encoder} are not finite, or too large "
                                 "for half precision. Take --pixels standardised and the encoder's own weights")
            file.write(features.numpy().tobytes())
            bar.update(len(batch))
    with atomic_path(sidecar) as path:
        path.write_text(json.dumps(made_of) + "\n")
    return kept(processed, section, model.config, weights)
