"""Cross-validated scores of every method on one dataset, with several seeds, nulls and a ceiling.

    python code/evaluate.py --dataset MOB --encoder tf_efficientnet_lite0 --image_size 64

holds out each section in turn (--folds donor: each donor's sections together) and chooses the panel
on the others. Each method trains as in main.py and predicts as in infer.py, once per seed. All
predictions are scored alike: same patches, panel, reference and query.

Each result is kept in save/<dataset>/evaluation/<protocol>/<query>/<method>_<seed>_<settings>/.
There `settings` is a digest of all that shapes the result; settings.json has it in full. A kept
result is not computed again, and other settings get a folder of their own.
save/<dataset>/evaluation.csv has every score, one per row. A run replaces its own rows there and
leaves all others.

To choose a recipe without looking at a held-out section, name the others: `--sections MOB2 MOB4`
holds out one of these at a time, and reads of all other sections only which genes they have.
"""

import argparse
from dataclasses import asdict, dataclass, replace

from heclip import command
from heclip.files import InputError, first_line
from heclip.settings import (
    HELP,
    PREDICTING,
    TRAINING,
    WHERE_IT_RUNS,
    Training,
    add_flags,
    recipe_settings,
)

FREEZE = replace(recipe_settings("heclip", freeze=True), max_epochs=40, batch_size=128)
TRAINED = {
    "HECLIP": (TRAINING["heclip"], PREDICTING["heclip"]),
    "HECLIP, frozen encoder": (FREEZE, PREDICTING["heclip"]),
    "published heg": (TRAINING["published"], PREDICTING["published"]),
    "published hvg": (replace(TRAINING["published"], type="hvg"), PREDICTING["published"]),
    "BLEEP": (TRAINING["bleep"], PREDICTING["bleep"]),
    "CLIP": (TRAINING["clip"], PREDICTING["clip"]),
    "regression": (TRAINING["regression"], PREDICTING["regression"]),
}
FROZEN = ("frozen encoder, ridge", "frozen encoder, nearest images")
NULLS = ("library size, no image", "array position, no image", "random spots", "mean profile")
CEILINGS = ("one half of the counts", "attainable")
METHODS = (*TRAINED, *FROZEN, *NULLS, *CEILINGS)
NEED_PRETRAINED = ("HECLIP, frozen encoder", *FROZEN)
SEEDED = (*TRAINED, "random spots", *CEILINGS)

ENCODER = ("encoder", "encoder_args", "encoder_weights", "pretrained", "image_size")
LENGTH = ("max_epochs", "batch_size")  # a frozen encoder has its own, see FREEZE
SHARED = ("dataset", "panel", "device", *ENCODER)
KEY = ["protocol", "query", "method", "seed", "settings"]  # columns that name one run
COLUMNS = ("Pearson", "HEG-50", "HVG-50", "Spearman", "Pearson per spot", "RMSE, log-normalised",
           "SSIM, windows", "Moran's I, ratio", "Hit@5", "recall@5")


@dataclass(frozen=True)
class Plan:
    """What to evaluate: the flags.

    shared: settings that all methods share, namely dataset, panel, encoder, length and device. Its
    other fields are not used. sections, query: names, or None for all. save_path: a folder, or None
    for save/<dataset>.
    """

    shared: Training
    protocols: list
    folds: str
    sections: list | None
    query: list | None
    methods: list
    seeds: list
    save_path: str | None


def parse(argv=None):
    """The command line as a Plan. Raises InputError if settings contradict each other."""
    defaults = replace(Training(), dataset="MOB", max_epochs=30)
    flags = argparse.ArgumentParser(
        description="Cross-validated scores of every method on one dataset.", formatter_class=HELP)
    add_flags(flags, defaults, ["dataset"])
    flags.add_argument("--panel", choices=["heg", "hvg"], default="hvg",
                       help="genes that are predicted and scored")
    flags.add_argument("--protocol", nargs="+", choices=["strict", "paper"], default=["strict"],
                       help="with both, the table shows the gap between them")
    flags.add_argument("--folds", choices=["section", "donor"], default="section",
                       help="what is held out together")
    flags.add_argument("--sections", nargs="+", metavar="NAME", help="take part; default: all")
    flags.add_argument("--query", nargs="+", metavar="NAME",
                       help="hold out only these in turn; default: all")
    flags.add_argument("--methods", nargs="+", metavar="NAME", choices=METHODS,
                       help=f"default: all of {'; '.join(METHODS)}. With --no-pretrained: those "
                            "that need no pretrained encoder")
    flags.add_argument("--seeds", nargs="+", type=command.seed, default=[1, 2],
                       help="run once with each of these whatever is random")
    add_flags(flags, defaults, [*ENCODER, *LENGTH, "device"])
    flags.add_argument("--save_path", metavar="DIR", help="default: save/<dataset>")
    args = flags.parse_args(argv)
    useless = NEED_PRETRAINED if not args.pretrained else ()
    if in_vain := [name for name in args.methods or () if name in useless]:
        raise InputError(f"--methods {in_vain[0]!r} with --no-pretrained: nothing would ever train "
                         "its encoder. Leave one of them out")
    shared = {name: getattr(args, name) for name in (*SHARED, *LENGTH)}
    methods = once(args.methods) or [name for name in METHODS if name not in useless]
    return Plan(Training(**shared), once(args.protocol), args.folds, once(args.sections),
                once(args.query), methods, once(args.seeds), args.save_path)


def once(values):
    """A list without repetitions, or None."""
    return values and list(dict.fromkeys(values))


if __name__ == "__main__":
    command.run(parse)  # a wrong flag is answered here: the imports below take seconds

import contextlib
import hashlib
import json
import shutil
from functools import cache, cached_property
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from scipy.spatial import cKDTree
from tqdm import tqdm

from heclip.batches import Patches, encode_patches
from heclip.checkpoint import load_checkpoint
from heclip.dataset import ROOT, Processed, Run
from heclip.expression import log_normalise
from heclip.files import atomic_path, locked, sha256
from heclip.metrics import (
    bootstrap,
    ceiling_per_gene,
    halves,
    mean_defined,
    pearson_per_gene,
    rank_genes,
    score,
    score_further,
)
from heclip.model import HECLIP, configure, load_encoder_weights
from heclip.panel import Panel, run_name
from heclip.prediction import embed_sections, predict, reference_of
from heclip.retrieval import average_expression, random_spots, retrieve
from main import train


@dataclass(frozen=True)
class Fold:
    """One held-out section and what predicts it: n query spots, N reference spots, G genes.

    held_out: all sections that are not in the reference, the query among them. spots: the query
    without genes, AnnData of n x 0. truth: its expression, (n, G). expression: that of the
    reference, (N, G). sizes: spots of each reference section.
    """

    processed: Processed
    query: str
    held_out: list
    reference: list
    panel: Panel
    spots: anndata.AnnData
    truth: np.ndarray
    expression: np.ndarray
    sizes: list

    @cached_property
    def counts(self):
        """The query's counts of all genes, AnnData n x all genes, read when first needed."""
        whole = self.processed.read(self.query)
        return anndata.AnnData(whole.layers["counts"], obs=whole.obs[[]], var=whole.var[[]])

    def by_section(self):
        """Reference section -> its expression, (n_spots, G)."""
        parts = np.split(self.expression, np.cumsum(self.sizes)[:-1])
        return dict(zip(self.reference, parts, strict=True))


def main(argv=None):
    plan = parse(argv)
    processed = Processed(plan.shared.dataset)
    folds = choose_folds(plan, processed)
    table = results_folder(plan).with_suffix(".csv")
    rows = []
    features = {}  # of the frozen encoder: section -> (n_spots, F), for all folds
    for protocol in plan.protocols:
        for query, reference in folds.items():
            fold = open_fold(processed, plan.shared.panel, protocol, query, reference)
            print(f"{protocol}: {query} from {', '.join(reference)}; {len(fold.panel)} genes",
                  flush=True)
            of_fold = evaluate_fold(plan, fold, features)
            add_rows(table, of_fold)
            rows += of_fold
    report(plan, pd.DataFrame(rows))
    print(f"every score of every fold and seed in {table}")


def results_folder(plan):
    """Where results are kept. The table of scores has the same path, with .csv."""
    save = Path(plan.save_path) if plan.save_path else ROOT / "save" / plan.shared.dataset
    return save / "evaluation"


# -------------------------------------------------------------------------------------------- folds


def choose_folds(plan, processed):
    """The sections to hold out in turn, each with its reference: query -> list of sections.

    Raises InputError for names that are not there, and if nothing would be left to learn from.
    """
    table, origin = processed.sections(), processed.sections_path
    takes_part = plan.sections or list(table.index)
    asked = plan.query or []
    if absent := [name for name in [*takes_part, *asked] if name not in table.index]:
        raise InputError(f"{origin} has no section {absent[0]}, but {', '.join(table.index)}")
    if absent := [name for name in asked if name not in takes_part]:
        raise InputError(f"--query {absent[0]} is not among --sections {' '.join(takes_part)}. "
                         "Add it there")
    table = table[table.index.isin(takes_part)]
    together = table["donor"] if plan.folds == "donor" else table.index.to_series()
    if together.nunique() < 2:
        raise InputError(f"{origin}: {', '.join(table.index)} are of one {plan.folds}; at least "
                         "two are needed to hold one out")
    folds = {query: list(table.index[together != together[query]])
             for query in plan.query or list(table.index)}
    for query, reference in folds.items():
        processed.check_apart(query, reference)
        if plan.folds == "donor":
            check_donors(table["donor"], query, reference)
    return folds


def check_donors(donor, query, reference):
    """Raise InputError if a section of the query's donor is in its reference.

    donor: Series by section.
    """
    if same := [name for name in reference if donor[name] == donor[query]]:
        raise InputError(f"{query} is held out with its donor {donor[query]!r}, but {same[0]} of "
                         "the same donor is in its reference")


def open_fold(processed, kind, protocol, query, reference):
    """Read a fold. Its reference chooses the panel, in the paper protocol all sections.

    kind: "hvg" or "heg".
    """
    processed.check_apart(query, reference)
    held_out = [name for name in processed.sections().index if name not in reference]
    panel = processed.panel(kind, protocol, reference)
    parts = [processed.expression(section, panel) for section in reference]
    sizes = [len(part) for part in parts]
    return Fold(processed, query, held_out, reference, panel, processed.spots(query),
                processed.expression(query, panel), np.concatenate(parts), sizes)


# ---------------------------------------------------------------------------- results, kept on disk


def evaluate_fold(plan, fold, features):
    """The rows of all methods and seeds on one fold: dicts of KEY and scores.

    features: what `frozen` keeps from fold to fold.
    """
    rows = []
    for method in plan.methods:
        own, predictions = [], []
        for seed in plan.seeds if method in SEEDED else [0]:
            row, prediction = evaluate(plan, fold, method, seed, features)
            own.append(row)
            predictions.append(prediction)
        rows += own
        if method == "HECLIP" and len(own) > 1:
            key = {name: own[0][name] for name in KEY}
            key |= {"method": f"HECLIP, mean of {len(own)} seeds", "seed": 0, "settings":
                    short_digest({"settings": key["settings"], "seeds": plan.seeds})}
            rows.append(key | all_scores(np.mean(predictions, axis=0), fold))
    return rows


def evaluate(plan, fold, method, seed, features):
    """One method on one fold with one seed: as kept on disk, or made now and kept.

    Returns (row of KEY and scores, prediction (n, G); None for a ceiling, which predicts nothing).
    """
    facts = facts_of(plan, fold, method)
    settings, protocol = short_digest(facts), fold.panel.protocol
    name = f"{method.replace(', ', '_').replace(' ', '_')}_{seed}_{settings}"
    place = results_folder(plan) / protocol / fold.query / name
    done, predicted = place / "scores.json", place / "prediction.npy"
    with locked(done):  # another process may be making the same
        if not done.exists():
            with atomic_path(place / "settings.json") as path:
                path.write_text(json.dumps(facts | {"seed": seed}, indent=1) + "\n")
            if method in CEILINGS:
                scores = ceiling(fold, method, seed)
            else:
                prediction = predict_by(plan, fold, method, seed, place, features)
                scores = all_scores(prediction, fold)
                with atomic_path(predicted) as path, open(path, "wb") as file:
                    np.save(file, prediction)
            with atomic_path(done) as path:
                path.write_text(json.dumps(scores, indent=1) + "\n")
        shutil.rmtree(place / plan.shared.dataset, ignore_errors=True)  # the model, if there is one
    key = [protocol, fold.query, method, seed, settings]
    row = dict(zip(KEY, key, strict=True)) | json.loads(done.read_text())
    return row, None if method in CEILINGS else np.load(predicted)


def facts_of(plan, fold, method):
    """All that shapes a method's result on a fold, but for the seed: plain values."""
    digest, protocol = fold.processed.sections()["digest"], fold.panel.protocol
    # In the paper protocol, expression is corrected over all sections.
    used = list(digest.index) if protocol == "paper" else [*fold.reference, fold.query]
    facts = {"method": method, "protocol": protocol, "query": fold.query,
             "reference": fold.reference, "sections": digest[used].to_dict(),
             "genes": list(fold.panel.ids)}
    if method in TRAINED:
        training, how = settings_of(plan, fold, method)
        learned = {name: value for name, value in asdict(training).items()
                   if name not in ("seed", *WHERE_IT_RUNS)}
        facts |= {"training": learned, "prediction": asdict(how)}
    if method in FROZEN:
        facts |= {name: getattr(plan.shared, name) for name in ENCODER}
    if plan.shared.encoder_weights and method in (*TRAINED, *FROZEN):
        facts |= {"weights_sha256": file_digest(plan.shared.encoder_weights)}
    return facts


file_digest = cache(sha256)  # of each file once


def short_digest(facts):
    """A short name for plain values: twelve hexadecimal digits."""
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def add_rows(path, rows):
    """Add scores to the CSV at `path`, in place of earlier ones of the same runs. Other rows stay.

    rows: dicts of KEY and scores. Other processes may add rows at the same time. Raises InputError
    if the file is damaged.
    """
    added = pd.DataFrame(rows).melt(KEY, var_name="score").dropna()
    added = added.astype(dict.fromkeys(KEY, str))
    with locked(path):
        if path.exists():
            try:
                earlier = pd.read_csv(path, dtype=str, keep_default_na=False)
            except ValueError as error:
                raise InputError(f"{path} is damaged ({first_line(error)}). Move it away and run "
                                 f"again; the scores are kept in {path.with_suffix('')}") from None
            earlier = earlier.reindex(columns=added.columns, fill_value="")
            same = pd.MultiIndex.from_frame(earlier[KEY]).isin(pd.MultiIndex.from_frame(added[KEY]))
            added = pd.concat([earlier[~same], added])
        with atomic_path(path) as temporary:
            added.to_csv(temporary, index=False)


# -------------------------------------------------------------------------------------- the methods


def predict_by(plan, fold, method, seed, place, features):
    """A method's prediction of a fold's query, (n, G). place: the folder of this result."""
    if method in TRAINED:
        print(f"  {method}, seed {seed}", flush=True)
        training, how = settings_of(plan, fold, method)
        return train_and_predict(plan, fold, replace(training, seed=seed), how, place)
    if method in FROZEN:
        return frozen(fold, method, plan.shared, features)
    return null(fold, method, seed)


def settings_of(plan, fold, method):
    """(Training, Predicting) of a trained method on a fold. It trains on all reference spots."""
    training, how = TRAINED[method]
    names = SHARED if training.freeze else (*SHARED, *LENGTH)
    shared = {name: getattr(plan.shared, name) for name in names}
    training = replace(training, **shared, protocol=fold.panel.protocol, query=tuple(fold.held_out),
                       val_fraction=0.0, resume=True)
    return training, how


def train_and_predict(plan, fold, training, how, place):
    """Train, or go on where a killed run stopped, and predict the query: (n, G).

    training, how: settings of training and prediction. place: a folder for the model and log.txt.
    """
    run = Run(training.dataset, run_name(training.type, training.protocol), place)
    with open(place / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        train(training, run)
    trained = load_checkpoint(run.checkpoint)
    trained.check(fold.processed, fold.query)
    if list(trained.reference) != fold.reference or list(trained.panel.ids) != list(fold.panel.ids):
        raise RuntimeError(f"{run.checkpoint} has another reference or panel than the fold")
    device, expression = command.pick_device(training.device), fold.by_section()
    embeddings = embed_sections(trained, fold.processed, expression | {fold.query: fold.truth},
                                how.views, device, plan.shared.batch_size)
    reference = reference_of(fold.reference, expression, embeddings)
    image, xy = embeddings[fold.query]["image"], fold.spots.obsm["spatial"]
    return predict(image, xy, reference, how, trained.is_regression).expression


def frozen(fold, method, encoder, features):
    """What the pretrained encoder gives without any training of it: (n, G).

    encoder: Training whose encoder and device are used. features: section -> (n_spots, F), which is
    filled, so that the next fold need not compute them again.
    """
    sections = [*fold.reference, fold.query]
    lacking = [section for section in sections if section not in features]
    for section in tqdm(lacking, "frozen encoder", leave=False, disable=None):
        features[section] = frozen_features(fold.processed, section, encoder)
    reference = np.concatenate([features[section] for section in fold.reference])
    query = features[fold.query]
    if method == "frozen encoder, nearest images":
        return average_expression(retrieve(query, reference)[0], fold.expression)
    return ridge(reference, fold.expression, np.repeat(fold.reference, fold.sizes), query)


def frozen_features(processed, section, encoder):
    """Pooled features of the pretrained encoder, float32 (n_spots, F). encoder: see `frozen`."""
    device = command.pick_device(encoder.device)
    patches = processed.patches(section)
    config = configure(encoder.encoder, "regression", 1, patches.shape[1], encoder.image_size,
                       encoder_args=encoder.encoder_args)
    model = HECLIP(config)
    load_encoder_weights(model.image_encoder, encoder.encoder, encoder.encoder_weights,
                         config.encoder_args)
    model.image_projection = torch.nn.Identity()
    model.eval().to(device, memory_format=torch.channels_last)
    every = torch.arange(len(patches))
    features = encode_patches(model, Patches([patches], device), every, encoder.batch_size)
    return features.cpu().numpy()


def ridge(features, expression, section, query):
    """PCA to 256 features, then ridge regression (Jaume et al., HEST, NeurIPS 2024).

    features: (N, F), expression: (N, G), section: names (N,), query: (n, F). Returns float32
    (n, G). alpha is the one that predicts best when each reference section is predicted from the
    others. With a single section, each fifth of its spots is predicted from the others.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import Ridge

    groups = section
    if len(set(section)) == 1:
        groups = np.arange(len(section)) * 5 // len(section)
    alphas = 10.0 ** np.arange(0, 7)

    def fit_predict(train, test, alphas):
        pca = PCA(min(256, *features[train].shape), random_state=0).fit(features[train])
        inputs, outputs = pca.transform(features[train]), pca.transform(test)
        return [Ridge(alpha).fit(inputs, expression[train]).predict(outputs) for alpha in alphas]

    reached = np.zeros(len(alphas))
    for group in dict.fromkeys(groups):
        inside = groups == group
        for i, predicted in enumerate(fit_predict(~inside, features[inside], alphas)):
            r = mean_defined(pearson_per_gene(predicted, expression[inside]))
            reached[i] += np.nan_to_num(r)  # undefined for a single spot
    best = alphas[reached.argmax()]
    return fit_predict(np.ones(len(section), bool), query, [best])[0].astype(np.float32)


def null(fold, method, seed):
    """Predictions that use no pixel of the query: (n, G)."""
    n, total = len(fold.truth), len(fold.expression)
    if method == "random spots":
        return average_expression(random_spots(n, total, 50, seed), fold.expression)
    if method == "mean profile":
        return np.tile(fold.expression.mean(axis=0), (n, 1))
    if method == "array position, no image":  # the 50 reference spots nearest in array coordinates
        spots = [*(fold.processed.spots(section) for section in fold.reference), fold.spots]
        places = [part.obs[["array_row", "array_col"]].to_numpy(float) for part in spots]
        nearest = cKDTree(np.concatenate(places[:-1])).query(places[-1], min(50, total))[1]
        return average_expression(nearest, fold.expression)
    # Library size: each gene as a line of the log of a spot's total count, fitted on the reference.
    known = [log_size(fold.processed.read(section).layers["counts"]) for section in fold.reference]
    line = np.column_stack([np.concatenate(known), np.ones(total)])
    slope, offset = np.linalg.lstsq(line, fold.expression.astype(np.float64), rcond=None)[0]
    return (log_size(fold.counts.X)[:, None] * slope + offset).astype(np.float32)


def log_size(counts):
    """The log of each spot's total count plus one: (n, genes), sparse -> (n,)."""
    return np.log(np.asarray(counts.sum(axis=1)).ravel() + 1)


def ceiling(fold, method, seed):
    """Scores of the measurement against itself. They need no prediction and hold for any."""
    parts = []
    for counts in halves(fold.counts.X, seed):
        half = anndata.AnnData(counts, obs=fold.counts.obs, var=fold.counts.var)
        log_normalise(half)
        parts.append(half[:, fold.panel.ids].X.toarray())
    if method == "one half of the counts":
        return all_scores(parts[0], fold, truth=parts[1])
    reached = ceiling_per_gene(*parts)
    heg, hvg = rank_genes(fold.expression)
    return {"Pearson": mean_defined(reached), "HEG-50": mean_defined(reached[heg[:50]]),
            "HVG-50": mean_defined(reached[hvg[:50]])}


# ---------------------------------------------------------------------------- scores, and the table


def all_scores(prediction, fold, truth=None):
    """Every score of one prediction, (n, G): name -> number, None if undefined.

    truth: (n, G); None: the fold's. HEG-n and HVG-n are ranked on the reference. Those ranked on
    the truth, as published, are labelled so.
    """
    truth = fold.truth if truth is None else truth
    xy, is_marker = fold.spots.obsm["spatial"], fold.panel.is_marker
    per_gene, scores = score(prediction, truth, ranked_on=fold.expression)
    ranked_on_truth = score(prediction, truth, truth)[1]
    scores |= {f"{name}, ranked on truth": value for name, value in ranked_on_truth.items()
               if name.startswith(("HEG-", "HVG-"))}
    scores |= score_further(prediction, truth, fold.spots.obs, xy)
    if is_marker.any():
        scores["markers"] = mean_defined(per_gene["Pearson"][is_marker])
    heg, hvg = rank_genes(fold.expression)
    for name, genes in (("Pearson", slice(None)), ("HEG-50", heg[:50]), ("HVG-50", hvg[:50])):
        scores[f"{name}, low"], scores[f"{name}, high"] = bootstrap(prediction, truth, xy, genes)
    return {name: None if np.isnan(value) else float(value) for name, value in scores.items()}


def report(plan, rows):
    """Print a table for each protocol, a row per method, and the gap between two protocols.

    rows: DataFrame of KEY and scores.
    """
    columns = [name for name in COLUMNS if name in rows]
    rows = rows.astype(dict.fromkeys(columns, float))
    methods = list(dict.fromkeys(rows["method"]))
    for protocol, part in rows.groupby("protocol", sort=False):
        print_table(plan, protocol, part, columns, methods)
    if len(plan.protocols) == 2:
        mean = rows.groupby(["protocol", "method"])[list(COLUMNS[:3])].mean()
        gap = (mean.loc["paper"] - mean.loc["strict"]).loc[methods]
        print("\npaper minus strict:\n" + gap.map("{:+.3f}".format).to_string())


def print_table(plan, protocol, rows, columns, methods):
    """Print mean and standard deviation over folds and seeds, a row per method, of one protocol."""
    shared = plan.shared
    with_donor = " with its donor" if plan.folds == "donor" else ""
    print(f"\n{shared.dataset}, {shared.panel} panel, protocol {protocol}: each of "
          f"{', '.join(rows['query'].unique())} held out{with_donor}; {shared.encoder}, "
          f"{shared.max_epochs} epochs, seeds {', '.join(map(str, plan.seeds))}.\n"
          "Mean ± standard deviation over folds and seeds.")
    by_method = rows.groupby("method")[columns]
    mean, deviation = by_method.mean().loc[methods], by_method.std().loc[methods]
    text = mean.map("{:.3f}".format) + deviation.map(plus_minus)
    print(text.replace("nan", "", regex=False).to_string())
    if {"HECLIP", "published heg"} <= set(methods):
        ratio = mean.loc["HECLIP"] / mean.loc["published heg"]
        shown = ", ".join(f"{name} {ratio[name]:.3f}" for name in COLUMNS[:3])
        print(f"HECLIP / published heg: {shown}")


def plus_minus(deviation):
    """A standard deviation as text; none for a single value."""
    return "" if np.isnan(deviation) else f" ± {deviation:.3f}"


if __name__ == "__main__":
    command.run(main)
