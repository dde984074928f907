"""The one way to predict: for sections, slides, evaluation and validation.

`embed_section` and `embed_expression` make embeddings with a model. `predict` takes matrices and
needs no model.

Symbols: n patches of the query, N reference spots, G genes, D embedding width, K neighbours.
"""

import json
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from .batches import Patches, encode_patches
from .checkpoint import from_facts, saved_digest
from .features import features_of, saved_features
from .files import InputError, atomic_path, first_line
from .limits import read_arrays
from .retrieval import average_expression, centre, retrieve, spread
from .spots import smooth

KINDS = {"gene": ("gene",), "image": ("image",), "both": ("gene", "image")}


@dataclass(frozen=True)
class Reference:
    """The spots that predictions are drawn from, section after section.

    sizes: number of spots of each section. expression: float32 (N, G). embeddings: "gene" or
    "image" -> (N, D), the kinds that are needed.
    """

    sections: list
    sizes: list
    expression: np.ndarray
    embeddings: dict

    def by_section(self, kind):
        """The embeddings of one kind, section by section: a list of (N_s, D)."""
        return torch.as_tensor(self.embeddings[kind]).split(self.sizes)


@dataclass(frozen=True)
class Predicted:
    """Predicted log-normalised expression, float32 (n, G), and what it was retrieved from.

    index: rows of the reference, (n, K), or (n, 2 K) with both retrievals. similarity: their cosine
    similarities, of the same shape. Both are None for a regression, which retrieves nothing. alone:
    with both retrievals, the Predicted of each, "gene" or "image" -> Predicted.
    """

    expression: np.ndarray
    index: np.ndarray | None = None
    similarity: np.ndarray | None = None
    alone: dict | None = None

    def certainty(self, reference):
        """Columns of obs that say how far to trust each spot, (n,) each; none for a regression.

        similarity: the mean cosine similarity of the retrieved spots. spread: how much the
        retrieved spots differ, as their standard deviation, mean over genes.
        """
        if self.index is None:
            return {}
        return {"similarity": self.similarity.mean(axis=1),
                "spread": spread(self.index, reference.expression)}


def predict(image, xy, reference, how, regression=False):
    """Predict each patch's expression: the mean of its K nearest reference spots, smoothed.

    image: image embeddings (n, D). xy: spot centres (n, 2), in any unit. how: see `Predicting`.
    regression: the embeddings are the predicted expression, (n, G), and no reference is used.
    """
    if regression:
        return Predicted(smooth(np.asarray(image), xy, how.smoothing))
    found = {}
    for kind in KINDS[how.retrieval]:
        query, nearest = image, reference.embeddings[kind]
        if how.centre:
            query, nearest = centre(image, reference.by_section(kind))
        found[kind] = retrieve(query, nearest, how.k)

    def average(index, similarity, alone=None):
        expression = average_expression(index, reference.expression)
        return Predicted(smooth(expression, xy, how.smoothing), index, similarity, alone)

    if len(found) == 1:
        return average(*next(iter(found.values())))
    index, similarity = (np.hstack(parts) for parts in zip(*found.values(), strict=True))
    return average(index, similarity, {kind: average(*pair) for kind, pair in found.items()})


# ---------------------------------------------------------------------------- embeddings by a model


def embed_section(trained, processed, section, views, device, batch_size):
    """Image embeddings of a section's patches: float32 (n_spots, D). Nothing is random.

    Saved features of a frozen encoder are read. If there are none, they are computed and saved, but
    only if all 8 views are wanted.
    """
    network, patches = trained.network, None
    if trained.frozen and views == 8:
        weights = trained.frozen["weights"]
        patches = features_of(processed, section, network, weights, device, batch_size)
    elif trained.frozen:
        patches = saved_features(processed, section, network.config, trained.frozen["weights"])
    if patches is None:
        patches = processed.patches(section)
    every = torch.arange(len(patches))
    patches = Patches([patches], device)
    return encode_patches(network, patches, every, batch_size, views).cpu().numpy()


@torch.inference_mode()
def embed_expression(network, expression, device):
    """Gene embeddings of log-normalised expression (n, G): float32 (n, D)."""
    return network.encode_expression(torch.from_numpy(expression).to(device)).cpu().numpy()


def embed_sections(trained, processed, expression, views, device, batch_size):
    """Both kinds of embeddings of some sections: section -> {"image", "gene"}, (n_spots, D) each.

    expression: section -> (n_spots, G).
    """
    trained.network.to(device, memory_format=torch.channels_last)
    embeddings = {}
    bar = tqdm(expression.items(), desc="embed", unit="section", leave=False, disable=None)
    for section, values in bar:
        image = embed_section(trained, processed, section, views, device, batch_size)
        gene = embed_expression(trained.network, values, device)
        embeddings[section] = {"image": image, "gene": gene}
    return embeddings


def reference_of(sections, expression, embeddings):
    """The Reference of some sections.

    expression: section -> (n_spots, G). embeddings: section -> kind -> (n_spots, D).
    """
    kinds = embeddings[sections[0]]
    stacked = {}
    for kind in kinds:
        stacked[kind] = np.concatenate([embeddings[section][kind] for section in sections])
    return Reference(
        list(sections), [len(expression[section]) for section in sections],
        np.concatenate([expression[section] for section in sections]), stacked)


# ------------------------------------------------------------------------------- embeddings on disk


def save_embeddings(run, trained, processed, embeddings, reference, views):
    """Write each section's embeddings with the facts of their making: model, views, sections.

    embeddings: section -> {"image", "gene"}, (n_spots, D) each. reference: the sections to retrieve
    from.
    """
    table = processed.sections()
    for section, by_kind in embeddings.items():
        about = {"views": views, "section": table.at[section, "digest"],
                 "reference": list(reference), "trained": trained.facts()}
        with atomic_path(run.embeddings(section)) as path, open(path, "wb") as file:
            np.savez(file, **by_kind, barcode=processed.barcodes(section), about=json.dumps(about))


def load_embeddings(path):
    """The contents that `save_embeddings` wrote: (embeddings by kind, barcodes, about).

    about["trained"] is the Trained, without network.

    Raises InputError if the file is missing, damaged or of an older version.
    """
    if not path.exists():
        raise InputError(f"{path} is missing. Make it by running infer.py without --from_ebd")
    try:
        arrays = read_arrays(path)
        barcodes, about = arrays["barcode"], json.loads(str(arrays["about"]))
        about["trained"] = from_facts(about["trained"], path=path)
        embeddings = {kind: arrays[kind] for kind in ("image", "gene")}
        names = [about["section"], *about["reference"]]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("it does not name its sections")
        for kind, values in embeddings.items():
            if values.ndim != 2 or len(values) != len(barcodes) or not np.isfinite(values).all():
                raise ValueError(f"its {kind} embeddings are not finite numbers, one row per spot")
        return embeddings, barcodes, about
    except Exception as error:  # zip, numpy and JSON raise many kinds
        raise InputError(f"{path} is damaged, or of an older version ({first_line(error)}). Run "
                         "infer.py without --from_ebd") from None


def fresh_embeddings(run, processed, section, views, model_digest):
    """A section's saved embeddings by kind. Raises InputError if they are not those asked for.

    model_digest: that of the model that must have made them.
    """
    path = run.embeddings(section)
    embeddings, barcodes, about = load_embeddings(path)
    fault = None
    if about["trained"].digest != model_digest:
        fault = "was made by another model than the one that is there now"
    elif about["section"] != processed.sections().at[section, "digest"]:
        fault = f"was made before {section} was preprocessed again"
    elif about["views"] != views:
        fault = f"averages {about['views']} views of each patch, not the {views} of --views"
    elif not np.array_equal(barcodes, processed.barcodes(section)):
        fault = f"was made from other spots than {section} has now"
    if fault:
        raise InputError(f"{path} {fault}. Run infer.py without --from_ebd")
    return embeddings


def read_embeddings(run, processed, query, views):
    """Saved embeddings of a query section and of its reference.

    The model need not be there. If it is there, it must be the one that made them. views: the
    number that must have been averaged; None: any.
    Returns (Trained without network, reference sections, section -> embeddings by kind, views).
    """
    path = run.embeddings(query)
    _, _, about = load_embeddings(path)
    trained = about["trained"]
    made_by = saved_digest(run.checkpoint) or trained.digest
    views = views or about["views"]
    embeddings = {section: fresh_embeddings(run, processed, section, views, made_by)
                  for section in [*about["reference"], query]}
    return trained, about["reference"], embeddings, views
