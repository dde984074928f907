"""Features of an encoder that stays as it was pretrained, computed once for each section and saved.

    GSE/<dataset>/processed/features/<encoder>_<S>px_<key>/<section>.npy     float16 (n_spots, 8, F)

holds the encoder's features of every patch in each of its 8 symmetries. The key stands for the
encoder's weights and for all steps that prepare its pixels. <section>.json next to it records the
patches that the features were computed from, and the .npy file itself. So features are never used
with other patches, nor a record with another file.

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
from .files import InputError, atomic_path, locked, sha256

FORMAT = 1


def digest(network):
    """SHA-256 of a network's weights and statistics with names and shapes, as hexadecimal text."""
    total = hashlib.sha256()
    for key, value in network.state_dict().items():
        total.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def folder(processed, config, weights):
    """The folder of the features of an encoder with this config and digest of weights."""
    made_by = {"format": FORMAT, "weights": weights}
    for key in ("encoder", "encoder_args", "image_size", "mean", "std", "bgr"):
        made_by[key] = getattr(config, key)
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{safe_model_name(config.encoder)}_{config.image_size}px_{key}"
    return processed.folder / "features" / name


def saved_features(processed, section, config, weights):
    """The saved features of a section, float16 (n_spots, 8, F) as a memory map, or None.

    They are None if there are none, if the section's patches have changed since, or if the file is
    not the one that its record describes. The last happens while another process replaces the two
    files, or after that process was killed. Raises InputError if the section's patches and
    expression were not made together.
    """
    place = folder(processed, config, weights)
    path = place / f"{section}.npy"
    try:
        made = json.loads((place / f"{section}.json").read_text())
        features = np.load(path, mmap_mode="r")  # opened before the check, which is of this file
        unchanged = (is_as_recorded(path, made["features"])
                     and is_as_recorded(processed.patches_path(section), made["patches"]))
    except (OSError, ValueError, EOFError, KeyError, TypeError, RecursionError):
        # They are absent, or damaged.
        return None
    if unchanged:
        processed.patches(section)  # an error if they were not made together with the expression
    return features if unchanged else None


def record(path):
    """The facts by which `is_as_recorded` recognises a file."""
    size, modified = stamp(path)
    return {"bytes": size, "modified_ns": modified, "sha256": sha256(path)}


def is_as_recorded(path, made):
    """Whether a file is the one of an earlier `record`.

    Hashing would read gigabytes that are not needed otherwise (1 GB/s measured), so a file of the
    same size and time is trusted. If the time differs, as after a copy to another disk, the
    contents decide.
    """
    size, modified = stamp(path)
    if [size, modified] == [made["bytes"], made["modified_ns"]]:
        return True
    return size == made["bytes"] and sha256(path) == made["sha256"]


def stamp(path):
    """Size of a file in bytes, and time of its last change in ns."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def features_of(processed, section, model, weights, device, batch_size):
    """The features of a section as `saved_features` gives them; without any, they are computed.

    model: HECLIP on the device, in evaluation mode. weights: the digest of its encoder. Of several
    processes that need the same features, one computes them and the others wait.
    Raises InputError if a feature is not finite in half precision, or if the patches are replaced
    during the computation.
    """
    features = saved_features(processed, section, model.config, weights)
    if features is not None:
        return features
    path = folder(processed, model.config, weights) / f"{section}.npy"
    with locked(path):
        # Another process may have saved them while this one waited.
        features = saved_features(processed, section, model.config, weights)
        if features is None:
            compute(processed, section, model, path, device, batch_size)
            features = saved_features(processed, section, model.config, weights)
    if features is None:
        raise InputError(f"{processed.patches_path(section)} was replaced while its features were "
                         "computed. Run again when preprocessing is done")
    return features


@torch.inference_mode()
def compute(processed, section, model, path, device, batch_size):
    """Write the features of a section to `path`, and then the record that makes them valid.

    The old record does not fit the new features, so features are never used with the wrong record.
    Raises InputError if a feature is not finite in half precision.
    """
    # Record the patches before opening them. If they are replaced in between, the record does not
    # fit them, and the features are not used. In the other order, features of the old patches would
    # be used for the new ones.
    made_from = record(processed.need(processed.patches_path(section)))
    patches = Patches([processed.patches(section)], device)
    n = len(patches.sections[0])
    header = {"descr": "<f2", "fortran_order": False,
              "shape": (n, len(SYMMETRIES), model.n_features)}
    bar = tqdm(total=n, desc=f"features of {section}", unit="patch", leave=False, disable=None)
    with atomic_path(path) as temporary, open(temporary, "wb") as file, bar:
        np.lib.format.write_array_header_1_0(file, header)
        for batch in patches.stream(torch.arange(n).split(batch_size)):
            features = torch.empty(len(batch), len(SYMMETRIES), model.n_features)
            for i, turns in enumerate(SYMMETRIES):
                with autocast(device):
                    turned = augment(batch, turns.expand(len(batch), 3))
                    pixels = to_pixels(turned, model.config)
                    features[:, i] = model.encode_features(pixels).float().cpu()
            features = features.half()
            if not features.isfinite().all():
                raise InputError(
                    f"{model.config.encoder} gives features of {section} that are not finite, or "
                    "too large for half precision. Use --pixels standardised and the encoder's own "
                    "weights")
            file.write(features.numpy().tobytes())
            bar.update(len(batch))
    with atomic_path(path.with_suffix(".json")) as temporary:
        made = {"patches": made_from, "features": record(path)}
        temporary.write_text(json.dumps(made) + "\n")
