"""Scores one can believe: every method on every fold of a dataset, several seeds, beside nulls and a ceiling.

    python code/evaluate.py --dataset MOB --encoder tf_efficientnet_lite0 --image_size 64

holds out each section in turn (--folds donor: each donor's sections together), chooses the panel on the others, trains
with main.py and predicts with infer.py as a user would, once a method and a seed, and scores all predictions alike:
same patches, panel, reference and query. Results so far are kept in save/<dataset>/evaluation/, and what is there
already is not run again; evaluation.csv beside it holds every number, a row each.

To choose a recipe without looking at a held-out section, name the others: `--sections MOB2 MOB4` leaves one of these
out at a time, and reads nothing of any other but which genes it has.
"""

import argparse
import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from heclip.recipes import PREDICTION
from scipy.spatial import cKDTree
from tqdm import tqdm

import infer
import main as train
from heclip import command
from heclip.batches import Patches, encode_patches
from heclip.dataset import ROOT, Processed, run_name
from heclip.expression import log_normalise
from heclip.files import InputError, atomic_path, sha256
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
from heclip.retrieval import average_expression, random_spots, retrieve

# Trained methods: flags of main.py, then flags of infer.py that differ from the recipe's own.
TRAINED = {
    "HECLIP": (["--recipe", "heclip"], []),
    "HECLIP, frozen encoder": (["--freeze", "--max_epochs", "40", "--batch_size", "128"], []),
    "published heg": (["--recipe", "published"], []),
    "published hvg": (["--recipe", "published", "--type", "hvg"], []),
    "BLEEP": (["--recipe", "bleep"], []),
    "CLIP": (["--recipe", "clip"], []),
    "regression": (["--recipe", "regression"], []),
}
FROZEN = ("frozen encoder, ridge", "frozen encoder, nearest images")
NULLS = ("library size, no image", "array position, no image", "random spots", "mean profile")
CEILINGS = ("one half of the counts", "attainable")
COLUMNS = ("Pearson", "HEG-50", "HVG-50", "Spearman", "Pearson per spot", "RMSE, log-normalised", "SSIM, windows",
           "Moran's I, ratio", "Hit@5", "recall@5")


@dataclass
class Fold:
    """One held-out section, and what it is predicted from: n query spots, N reference spots, G genes."""

    query: str
    held_out: list  # all but the reference: the query, its donor's if donors are held out, what takes no part
    reference: list
    panel: pd.DataFrame
    section: anndata.AnnData  # the query, all genes
    truth: np.ndarray  # (n, G)
    expression: np.ndarray  # (N, G), of the reference
    sizes: list  # spots of each reference section


def parse(argv=None):
    flags = argparse.ArgumentParser(description="Cross-validated scores of every method on one dataset.",
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--dataset", default="MOB", help="a dataset that a preprocess script has prepared")
    flags.add_argument("--panel", choices=["heg", "hvg"], default="hvg", help="genes that are predicted and scored")
    flags.add_argument("--protocol", nargs="+", choices=["strict", "paper"], default=["strict"],
                       help="both: side by side, and the gap between them")
    flags.add_argument("--folds", choices=["section", "donor"], default="section", help="what is held out together")
    flags.add_argument("--sections", nargs="+", metavar="NAME", help="take part; default: all")
    flags.add_argument("--query", nargs="+", metavar="NAME", help="hold out only these in turn; default: all")
    flags.add_argument("--methods", nargs="+", metavar="NAME", choices=[*TRAINED, *FROZEN, *NULLS, *CEILINGS],
                       help=f"default: all of {', '.join([*TRAINED, *FROZEN, *NULLS, *CEILINGS])}")
    flags.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    flags.add_argument("--encoder", default="resnet50", help="any timm model")
    flags.add_argument("--encoder_weights", metavar="FILE", help="local state dict of timm or torchvision")
    flags.add_argument("--image_size", type=command.positive, metavar="PX", help="side of the encoder's input")
    flags.add_argument("--max_epochs", type=command.positive, default=30)
    flags.add_argument("--batch_size", type=command.positive, default=128)
    flags.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    flags.add_argument("--save_path", metavar="DIR", help="default: save/<dataset>")
    return flags.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    processed = Processed(args.dataset)
    table = processed.sections()
    takes_part = args.sections or list(table.index)
    if absent := [name for name in [*takes_part, *(args.query or [])] if name not in table.index]:
        raise InputError(f"{processed.sections_path} has no section {absent[0]}, but {', '.join(table.index)}")
    if absent := [name for name in args.query or [] if name not in takes_part]:
        raise InputError(f"--query {absent[0]} is not among --sections {' '.join(takes_part)}. Add it there")
    everything = list(table.index)
    table = table.loc[[name for name in everything if name in takes_part]]
    key = table["donor"] if args.folds == "donor" else table.index.to_series()
    if key.nunique() < 2:
        raise InputError(f"{processed.sections_path}: {', '.join(table.index)} are of one {args.folds}; at least two "
                         "are needed to hold one out")
    folder = (ROOT / "save" / args.dataset if args.save_path is None else Path(args.save_path)) / "evaluation"
    methods = args.methods or [*TRAINED, *FROZEN, *NULLS, *CEILINGS]

    rows = []
    for protocol in args.protocol:
        features = {}  # of the frozen encoder, section by section: for all folds
        for query in args.query or list(table.index):
            reference = list(table.index[key != key[query]])
            held_out = [name for name in everything if name not in reference]
            fold = open_fold(processed, protocol, args.panel, query, held_out, reference)
            print(f"{protocol}: {query} from {', '.join(fold.reference)}; {len(fold.panel)} genes", flush=True)
            for method in methods:
                predictions = []
                for seed in args.seeds if method in TRAINED or method in ("random spots", *CEILINGS) else [0]:
                    place = folder / protocol / query / f"{method.replace(', ', '_').replace(' ', '_')}_{seed}"
                    scores, prediction = evaluate(place, args, protocol, processed, fold, method, seed, features)
                    predictions.append(prediction)
                    rows.append({"protocol": protocol, "query": query, "method": method, "seed": seed} | scores)
                if len(predictions) > 1 and method == "HECLIP":
                    rows.append({"protocol": protocol, "query": query, "seed": 0,
                                 "method": f"HECLIP, mean of {len(predictions)} seeds"}
                                | all_scores(np.mean(predictions, axis=0), fold))
            tidy = pd.DataFrame(rows).melt(["protocol", "query", "method", "seed"], var_name="score").dropna()
            with atomic_path(folder.with_suffix(".csv")) as path:
                tidy.to_csv(path, index=False)
    report(args, pd.DataFrame(rows))
    print(f"every score of every fold and seed in {folder.with_suffix('.csv')}")


def open_fold(processed, protocol, panel, query, held_out, reference):
    """Read a fold; the panel is chosen on its reference."""
    name = run_name(panel, protocol)
    chosen = processed.panel_for(name, reference)
    parts = [processed.expression(section, name, chosen) for section in reference]
    section = processed.read(query)
    return Fold(query, held_out, reference, chosen, section, processed.expression(query, name, chosen, section),
                np.concatenate(parts), [len(part) for part in parts])


def evaluate(place, args, protocol, processed, fold, method, seed, features):
    """Scores and prediction of one method on one fold with one seed: as kept in `place`, or made now and kept there."""
    if method in CEILINGS:
        return ceiling(fold, method, seed), None
    settings = {key: value for key, value in vars(args).items()
                if key in ("dataset", "panel", "folds", "sections", "encoder", "encoder_weights", "image_size",
                           "max_epochs", "batch_size")}
    settings |= {"reference": fold.reference, "sections.csv": sha256(processed.sections_path),
                 "genes": list(fold.panel.index), "method": method}
    if method in TRAINED:
        training, prediction = TRAINED[method]
        recipe = train.parse(training)
        settings |= {"training": vars(recipe),
                     "prediction": PREDICTION[infer.parse(prediction).recipe or recipe.recipe]}
    settings = json.dumps(settings, indent=1) + "\n"
    begun, done = place / "settings.json", place / "scores.json"
    if not begun.exists() or begun.read_text() != settings:
        shutil.rmtree(place, ignore_errors=True)  # whole or half, it is of other settings
        with atomic_path(begun) as path:
            path.write_text(settings)
    if done.exists():
        return json.loads(done.read_text()), np.load(place / "prediction.npy")
    if method in TRAINED:
        prediction = trained(place, args, protocol, fold, method, seed)
    elif method in FROZEN:
        prediction = frozen(args, processed, fold, method, features)
    else:
        prediction = null(processed, fold, method, seed)
    scores = all_scores(prediction, fold)
    with atomic_path(place / "prediction.npy") as path, open(path, "wb") as file:
        np.save(file, prediction)
    with atomic_path(done) as path:
        path.write_text(json.dumps(scores, indent=1) + "\n")
    return scores, prediction


def trained(place, args, protocol, fold, method, seed):
    """Train and predict by the scripts: (n, G). Their output goes to log.txt; of their files none is kept."""
    training, prediction = TRAINED[method]
    which = training[training.index("--type") + 1] if "--type" in training else "heg"
    common = ["--dataset", args.dataset, "--type", which, "--panel", args.panel, "--protocol", protocol, "--save_path",
              str(place), "--batch_size", str(args.batch_size), "--device", args.device, "--seed", str(seed)]
    options = [text for key in ("encoder", "encoder_weights", "image_size", "max_epochs") if getattr(args, key)
               for text in (f"--{key}", str(getattr(args, key)))]
    print(f"  {method}, seed {seed}", flush=True)
    with open(place / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        train.main([*common, *options, *training, "--query", *fold.held_out, "--val_fraction", "0", "--resume"])
        infer.main([*common, *prediction, "--query", fold.query, "--no-figures"])
    path = place / args.dataset / f"{run_name(which, protocol)}_prediction.h5ad"
    predicted = anndata.read_h5ad(path)
    if list(predicted.obs_names) != list(fold.section.obs_names) or list(predicted.var_names) != list(fold.panel.index):
        raise RuntimeError(f"{path} holds other spots or genes than the fold")
    shutil.rmtree(place / args.dataset)
    shutil.rmtree(place / "ebd")
    return np.asarray(predicted.X)


def frozen(args, processed, fold, method, features):
    """What the pretrained encoder gives without any training of it: (n, G). features: section -> (n_spots, F), kept."""
    sections = [*fold.reference, fold.query]
    for section in tqdm([name for name in sections if name not in features], "frozen encoder", leave=False,
                        disable=None):
        features[section] = frozen_features(args, processed, section)
    reference, query = np.concatenate([features[name] for name in fold.reference]), features[fold.query]
    if method == "frozen encoder, nearest images":
        return average_expression(retrieve(query, reference)[0], fold.expression)
    return ridge(reference, fold.expression, np.repeat(fold.reference, fold.sizes), query)


def frozen_features(args, processed, section):
    """Pooled features of the pretrained encoder, float32 (n_spots, F)."""
    device = command.pick_device(args.device)
    patches = processed.patches(section)
    config = configure(args.encoder, "regression", 1, patches.shape[1], args.image_size)
    model = HECLIP(config)
    load_encoder_weights(model.image_encoder, args.encoder, args.encoder_weights, config.encoder_args)
    model.image_projection = torch.nn.Identity()
    model.eval().to(device, memory_format=torch.channels_last)
    index = torch.arange(len(patches))
    return encode_patches(model, Patches([patches], device), index, args.batch_size).cpu().numpy()


def ridge(features, expression, section, query):
    """PCA to 256 features, then ridge regression (Jaume et al., HEST, NeurIPS 2024). Returns (n_query, G).

    alpha is the one that predicts best when each reference section is predicted from the others; with a single
    section, when each fifth of its spots is.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import Ridge

    groups = section if len(set(section)) > 1 else np.arange(len(section)) * 5 // len(section)
    alphas = 10.0 ** np.arange(0, 7)

    def fit_predict(train, test, alphas):
        pca = PCA(min(256, *features[train].shape), random_state=0).fit(features[train])
        inputs, outputs = pca.transform(features[train]), pca.transform(test)
        return [Ridge(alpha).fit(inputs, expression[train]).predict(outputs) for alpha in alphas]

    reached = np.zeros(len(alphas))
    for group in dict.fromkeys(groups):
        inside = groups == group
        for i, predicted in enumerate(fit_predict(~inside, features[inside], alphas)):
            reached[i] += np.nan_to_num(mean_defined(pearson_per_gene(predicted, expression[inside])))  # a lone spot
    return fit_predict(np.ones(len(section), bool), query, [alphas[reached.argmax()]])[0].astype(np.float32)


def null(processed, fold, method, seed):
    """Predictions that use no pixel of the query: (n, G)."""
    n, total = len(fold.truth), len(fold.expression)
    if method == "random spots":
        return average_expression(random_spots(n, total, 50, seed), fold.expression)
    if method == "mean profile":
        return np.tile(fold.expression.mean(axis=0), (n, 1))
    reference = [processed.read(section) for section in fold.reference]
    if method == "array position, no image":  # the 50 reference spots nearest in array coordinates
        places = [adata.obs[["array_row", "array_col"]].to_numpy(float) for adata in (*reference, fold.section)]
        nearest = cKDTree(np.concatenate(places[:-1])).query(places[-1], min(50, total))[1]
        return average_expression(nearest, fold.expression)
    # Library size: each gene as a straight line of the log of the spot's count, fitted on the reference.
    size = [np.log(np.asarray(adata.layers["counts"].sum(axis=1)).ravel() + 1) for adata in (*reference, fold.section)]
    line = np.column_stack([np.concatenate(size[:-1]), np.ones(total)])
    slope, offset = np.linalg.lstsq(line, fold.expression.astype(np.float64), rcond=None)[0]
    return (size[-1][:, None] * slope + offset).astype(np.float32)


def ceiling(fold, method, seed):
    """Scores of the measurement against itself. They need no prediction and hold for any."""
    parts = []
    for counts in halves(fold.section.layers["counts"], seed):
        half = anndata.AnnData(counts, obs=fold.section.obs[[]], var=fold.section.var[[]])
        log_normalise(half)
        parts.append(half[:, fold.panel.index].X.toarray())
    if method == "one half of the counts":
        return all_scores(parts[0], fold, truth=parts[1])
    reached = ceiling_per_gene(*parts)
    heg, hvg = rank_genes(fold.expression)
    return {"Pearson": mean_defined(reached), "HEG-50": mean_defined(reached[heg[:50]]),
            "HVG-50": mean_defined(reached[hvg[:50]])}


def all_scores(prediction, fold, truth=None):
    """Every score of one prediction, (n, G): name -> number. HEG-n and HVG-n ranked on the reference, and on the truth
    as published, so labelled."""
    truth = fold.truth if truth is None else truth
    xy = fold.section.obsm["spatial"]
    per_gene, scores = score(prediction, truth, ranked_on=fold.expression)
    scores |= {f"{name}, ranked on truth": value for name, value in score(prediction, truth, truth)[1].items()
               if name.startswith("H") and "-" in name}
    scores |= score_further(prediction, truth, fold.section.obs, xy)
    if fold.panel["marker"].any():
        scores["markers"] = mean_defined(per_gene["Pearson"][fold.panel["marker"].to_numpy()])
    heg, hvg = rank_genes(fold.expression)
    for name, genes in (("Pearson", slice(None)), ("HEG-50", heg[:50]), ("HVG-50", hvg[:50])):
        scores[f"{name}, low"], scores[f"{name}, high"] = bootstrap(prediction, truth, xy, genes)
    return {name: None if np.isnan(value) else float(value) for name, value in scores.items()}


def report(args, rows):
    """Print the table: mean and standard deviation over folds and seeds, a row a method."""
    methods = list(dict.fromkeys(rows["method"]))
    columns = [name for name in COLUMNS if name in rows]
    rows[columns] = rows[columns].astype(float)
    for protocol, part in rows.groupby("protocol", sort=False):
        print(f"\n{args.dataset}, {args.panel} panel, protocol {protocol}: each of {', '.join(part['query'].unique())} "
              f"held out{' with its donor' if args.folds == 'donor' else ''}; {args.encoder}, "
              f"{args.max_epochs} epochs, seeds {', '.join(map(str, args.seeds))}.\n"
              "Mean ± standard deviation over folds and seeds.")
        mean, deviation = (getattr(part.groupby("method")[columns], name)().loc[methods] for name in ("mean", "std"))
        text = mean.map("{:.3f}".format) + deviation.map(lambda x: "" if np.isnan(x) else f" ± {x:.3f}")
        print(text.replace("nan", "", regex=False).to_string())
        if {"HECLIP", "published heg"} <= set(methods):
            ratio = mean.loc["HECLIP"] / mean.loc["published heg"]
            print("HECLIP / published heg: " + ", ".join(f"{name} {ratio[name]:.3f}" for name in COLUMNS[:3]))
    if len(args.protocol) == 2:
        mean = rows.groupby(["protocol", "method"])[list(COLUMNS[:3])].mean()
        gap = (mean.loc["paper"] - mean.loc["strict"]).loc[methods]
        print("\npaper minus strict:\n" + gap.map("{:+.3f}".format).to_string())


if __name__ == "__main__":
    command.run(main)
