"""Predict the query section's expression from its image, score the prediction, and draw it.

    python code/infer.py --dataset GSE240429 --type heg

reads GSE/<dataset>/processed and the model that main.py wrote, or the model of --checkpoint, which
may be one of HECLIP's authors. It writes the embeddings of every section to ebd/. For each query
patch it retrieves the nearest reference spots. It writes <type>_prediction.h5ad, <type>_genes.csv,
<type>_scores.json and the page <type>_prediction.html to save/<dataset>/, and maps, UMAPs and
calibration to figure/. With --image it predicts a slide that has no expression instead.
"""

import argparse
from pathlib import Path

from heclip import command
from heclip.files import InputError, first_line
from heclip.settings import PREDICTING, SWITCH, add_predicting_flags, predicting

RANDOM_SEED = 42
MAPPED_GENES = 6  # maps of a slide, if the dataset names no markers
MODEL = {"dataset": "GSE240429", "type": "heg", "protocol": "strict"}  # if no flag says otherwise
OF_A_SECTION = ("query", "seed", "panel_file", "ebd_only", "from_ebd", "untrained")
OF_A_SLIDE = ("mpp", "pitch", "positions", "whole_image", "spatialdata", "name")


def make_parser():
    """The parser of all flags."""
    flags = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Predict the query section's expression from its image, and score it.")
    model = flags.add_argument_group("the model")
    model.add_argument("--dataset", help=f"its dataset (default: {MODEL['dataset']})")
    model.add_argument("--type", choices=["heg", "hvg"], help=f"(default: {MODEL['type']})")
    model.add_argument("--protocol", choices=["strict", "paper"],
                       help=f"(default: {MODEL['protocol']})")
    model.add_argument("--checkpoint", metavar="FILE",
                       help="the model's file, instead of the three flags above; or a "
                            "<type>_best.pt of the published code, for the data of --dataset")
    model.add_argument("--panel_file", metavar="CSV",
                       help="the genes of a published model in its order, ids in the first column; "
                            "default: the dataset's panel")
    how = flags.add_argument_group("how it predicts; each default is that of the model's recipe")
    how.add_argument("--recipe", choices=list(PREDICTING),
                     help="sets the flags from --retrieval to --smoothing")
    add_predicting_flags(how)
    run = flags.add_argument_group("the run")
    run.add_argument("--query", metavar="SECTION",
                     help="the section to predict; default: the one that the model has not seen")
    part = run.add_mutually_exclusive_group()
    part.add_argument("--ebd_only", action="store_true", help="write the embeddings and stop")
    part.add_argument("--from_ebd", action="store_true",
                      help="start from saved embeddings; needs no model and no GPU")
    run.add_argument("--untrained", action="store_true",
                     help="score the model before training too, to show what training adds")
    run.add_argument("--no-figures", dest="figures", action="store_false",
                     help="no figures and no page, scores only")
    run.add_argument("--overwrite", action="store_true",
                     help="replace the prediction of another section, slide or model")
    run.add_argument("--save_path", metavar="DIR", help=command.SAVE_PATH_HELP)
    run.add_argument("--batch_size", type=command.positive, default=128, help="patches at a time")
    run.add_argument("--device", default="auto", help=command.DEVICE_HELP)
    run.add_argument("--compile", action=SWITCH, default=False,
                     help="compile the encoder: about a minute at first, then faster")
    run.add_argument("--seed", type=command.seed, help="of the random spots (default: 42)")
    add_slide_flags(flags)
    return flags


def add_slide_flags(flags):
    """Add the flags of a slide without expression."""
    slide = flags.add_argument_group("a slide without expression")
    slide.add_argument("--image", metavar="FILE",
                       help="predict this slide instead: .svs, .ndpi, .mrxs, .tif, .jpg ...")
    slide.add_argument("--mpp", type=float, metavar="UM",
                       help="µm per full-resolution pixel; overrides the file's own")
    slide.add_argument("--pitch", type=float, metavar="UM",
                       help="distance of neighbouring spots, if not the reference's")
    spots = slide.add_mutually_exclusive_group()
    spots.add_argument("--positions", metavar="FILE",
                       help="position file of the spots, in full-resolution pixels, instead of a "
                            "lattice over the tissue")
    spots.add_argument("--whole_image", action="store_true",
                       help="the lattice covers all of the image: it shows tissue and no glass")
    slide.add_argument("--name", help="of the slide in the results; default: the stem of its file")
    slide.add_argument("--spatialdata", metavar="DIR",
                       help="write the prediction as SpatialData too; needs the package "
                            "spatialdata")


def parse(argv=None):
    """The command line as a namespace. Ends the script if flags do not go together."""
    flags = make_parser()
    args = flags.parse_args(argv)
    given = {flag for flag, value in vars(args).items() if value is not None and value is not False}
    if args.image and (useless := given & set(OF_A_SECTION)):
        flags.error(f"--image goes with none of --{', --'.join(OF_A_SECTION)}; leave out "
                    f"--{', --'.join(sorted(useless))}")
    if not args.image and (useless := given & set(OF_A_SLIDE)):
        flags.error(f"--{', --'.join(sorted(useless))} goes with --image")
    if args.from_ebd and (useless := given & {"checkpoint", "untrained", "panel_file", "compile"}):
        flags.error(f"--from_ebd starts from embeddings and reads no model; leave out "
                    f"--{', --'.join(sorted(useless))}")
    return args


if __name__ == "__main__":
    command.run(parse)  # a wrong flag is answered here: the imports below take seconds

import json
import shlex
import sys
import warnings
from dataclasses import asdict, dataclass, replace

import anndata
import numpy as np
import pandas as pd
import torch

from heclip import api, figures
from heclip.checkpoint import Trained, changes, from_facts, load_checkpoint
from heclip.dataset import Processed, Run
from heclip.files import atomic_path, write_h5ad
from heclip.metrics import mean_defined, score, score_further
from heclip.model import HECLIP, load_encoder_weights
from heclip.page import write_page
from heclip.panel import given_panel, run_name
from heclip.prediction import (
    embed_sections,
    predict,
    read_embeddings,
    reference_of,
    save_embeddings,
)
from heclip.retrieval import average_expression, crowded, random_spots
from heclip.settings import Predicting
from heclip.spots import smooth


@dataclass
class Job:
    """One section to predict, and the data read for it.

    query: its name. sections: names of the reference. expression: section -> (n_spots, G).
    embeddings: section -> {"image", "gene"}, (n_spots, D) each.
    """

    trained: Trained
    processed: Processed
    run: Run
    how: Predicting
    query: str
    sections: list
    expression: dict
    embeddings: dict


def main(argv=None):
    """Predict, score and draw as the command line says."""
    args = parse(argv)
    if args.image:
        return predict_slide(args, argv)

    # 1. Read the model, check what it may be used on, and embed the reference and the query.
    job = read_saved(args) if args.from_ebd else read_and_embed(args)
    if args.ebd_only:
        return
    spots, truth = job.processed.spots(job.query), job.expression[job.query]
    xy = spots.obsm["spatial"]

    # 2. Predict: retrieve the nearest reference spots, average their expression, and smooth it.
    reference = reference_of(job.sections, job.expression, job.embeddings)
    image = job.embeddings[job.query]["image"]
    predicted = predict(image, xy, reference, job.how, job.trained.is_regression)
    predictions = columns(job.trained, job.how, predicted)
    if args.untrained:
        predictions |= predict_untrained(args, job, xy)
    if note := crowded(job.how.k, len(reference.expression)):
        print(f"warning: {note}", file=sys.stderr)
    seed = RANDOM_SEED if args.seed is None else args.seed
    index = random_spots(len(truth), len(reference.expression), job.how.k, seed)
    chance = average_expression(index, reference.expression)
    predictions["random"] = smooth(chance, xy, job.how.smoothing)

    # 3. Score the predictions, and random spots for comparison.
    summaries, genes = score_all(job, predictions, spots, reference.expression)

    # 4. Write.
    result = as_anndata(job, spots, predicted, reference, genes)
    write_results(job, result, genes, summaries)
    print_scores(job, summaries)

    # 5. Write the page and draw.
    if args.figures:
        page, run = page_path(job.run.prediction), job.run
        write_page(page, run.prediction, run.scores, command=command_line(argv))
        draw(job, result, genes, reference)
        print(f"look at {page} in a browser; scores in {run.scores}; figures in "
              f"{run.figure('MAP').parents[1]}: MAP, CAL, EBD, EXP")


# ----------------------------------------------------------------------------------------- 1. read


def read_and_embed(args):
    """A Job from the model. Every section is embedded, and the embeddings are saved in ebd/."""
    trained = read_model(args)
    processed = Processed(trained.settings.dataset)
    run = Run(processed.dataset, trained.name, args.save_path)
    sections, query = choose_sections(processed, trained, args.query)
    trained.check(processed, query)
    processed.check_apart(query, sections)
    if trained.panel is None:
        trained = with_panel(trained, processed, sections, args.panel_file)
        print(f"{trained.path}: published {trained.settings.type} model of {len(trained.panel)} "
              f"genes. It does not say what it was trained on. Whether it has seen {query}, and "
              "whether its genes are these in this order, cannot be checked")
    check_replaceable(run.prediction, trained, query, args.overwrite)
    how = predicting(args.recipe or trained.settings.recipe, vars(args))
    expression = {section: processed.expression(section, trained.panel)
                  for section in [*sections, query]}
    device = command.pick_device(args.device)
    if args.compile:
        trained.network.image_encoder.compile()
    embeddings = embed_sections(trained, processed, expression, how.views, device, args.batch_size)
    save_embeddings(run, trained, processed, embeddings, sections, how.views)
    print(f"embeddings in {run.embeddings(query).parent}")
    return Job(trained, processed, run, how, query, sections, expression, embeddings)


def read_saved(args):
    """A Job from the embeddings in ebd/, without a model."""
    asked = {flag: getattr(args, flag) or default for flag, default in MODEL.items()}
    processed = Processed(asked["dataset"])
    run = Run(processed.dataset, run_name(asked["type"], asked["protocol"]), args.save_path)
    query = args.query or the_one(processed.roles()[1], processed)
    trained, sections, embeddings, views = read_embeddings(run, processed, query, args.views)
    trained.check(processed, query)
    processed.check_apart(query, sections)
    check_replaceable(run.prediction, trained, query, args.overwrite)
    how = predicting(args.recipe or trained.settings.recipe, vars(args) | {"views": views})
    expression = {section: processed.expression(section, trained.panel) for section in embeddings}
    return Job(trained, processed, run, how, query, sections, expression, embeddings)


def read_model(args):
    """The Trained that the flags ask for. A published one gets the dataset of the flags.

    Raises InputError if the model is missing, or is not the one that the flags describe.
    """
    asked = {flag: getattr(args, flag) or default for flag, default in MODEL.items()}
    name = run_name(asked["type"], asked["protocol"])
    path = args.checkpoint or Run(asked["dataset"], name, args.save_path).checkpoint
    trained = load_checkpoint(path)
    settings = trained.settings
    if trained.reference is None:
        if args.untrained:
            raise InputError(f"--untrained: {path} does not say how its training began. Leave the "
                             "flag out")
        chosen = replace(settings, dataset=asked["dataset"], protocol=asked["protocol"])
        return replace(trained, settings=chosen)
    if args.panel_file:
        raise InputError(f"--panel_file: {path} contains its genes; a list is for published "
                         "checkpoints")
    given = asked
    if args.checkpoint:
        given = {flag: getattr(args, flag) for flag in MODEL}
    if any(value not in (None, getattr(settings, flag)) for flag, value in given.items()):
        asked = " ".join(f"--{flag} {value}" for flag, value in given.items() if value)
        raise InputError(f"{path} was trained on {settings.dataset} {trained.name}, and is asked "
                         f"for as {asked}. Name its own --dataset, --type and --protocol, or "
                         "train again")
    return trained


def choose_sections(processed, trained, query):
    """(reference sections, query section) of a model. It must not have been trained on the query.

    query: a name; None: the only section that the model has not seen.
    """
    if trained.reference is None:
        sections, held_out = processed.roles(query and [query])
        return sections, the_one(held_out, processed)
    processed.roles(query and [query])  # an unknown name is an error
    table = processed.sections()
    held_out = [section for section in table.index if section not in trained.reference]
    with_role = [section for section in held_out if table.at[section, "role"] == "query"]
    return list(trained.reference), query or the_one(with_role or held_out, processed)


def the_one(held_out, processed):
    """The only section of a list. Raises InputError if there is none or more than one."""
    if len(held_out) != 1:
        raise InputError(f"{processed.sections_path} has {len(held_out)} query sections; exactly "
                         "one is predicted at a time. Name it with --query")
    return held_out[0]


def with_panel(trained, processed, sections, panel_file):
    """A published model with the panel whose genes it is assumed to predict.

    Raises InputError if their number differs.
    """
    settings, n_genes = trained.settings, trained.network.config.n_genes
    panel = processed.panel(settings.type, settings.protocol, sections)
    if panel_file:
        if settings.protocol == "paper":
            raise InputError("--panel_file with --protocol paper: the corrected expression exists "
                             "for the dataset's own panel only. Leave one of them out")
        panel = given_panel(panel_file, panel, processed.genes(sections[0]))
    if len(panel) != n_genes:
        raise InputError(f"{trained.path} is a {settings.type} model of {n_genes} genes, but the "
                         f"panel has {len(panel)}. Give its own genes, in its order, with "
                         "--panel_file CSV")
    return replace(trained, panel=panel)


def check_replaceable(path, trained, query, overwrite):
    """Raise InputError if `path` holds the prediction of another query or of another model."""
    if overwrite or not path.exists():
        return
    try:
        about = json.loads(anndata.read_h5ad(path, backed="r").uns["heclip"])
        changed = [] if about["query"] == query else [f"it is of {about['query']}, not of {query}"]
        changed += changes(from_facts(about["model"]), trained)
    except Exception as error:  # another program's file
        changed = [f"it was not written by infer.py, or is damaged ({first_line(error)})"]
    if changed:
        raise InputError(f"{path} holds another prediction: {'; '.join(changed)}. Keep both with "
                         "--save_path DIR (a slide: with --name NAME), or replace it with "
                         "--overwrite")


# ------------------------------------------------------------------------- 2. and 3. predict, score


def columns(trained, how, predicted, prefix=""):
    """The predictions to score, name -> (n, G): the one asked for, and each retrieval alone."""
    label = "regression" if trained.is_regression else how.retrieval
    every = {label: predicted.expression}
    every |= {kind: alone.expression for kind, alone in (predicted.alone or {}).items()}
    return {prefix + name: expression for name, expression in every.items()}


def predict_untrained(args, job, xy):
    """Predictions of the model as it was before its first step, by each retrieval alone."""
    trained, device = untrained_model(job.trained), command.pick_device(args.device)
    embeddings = embed_sections(trained, job.processed, job.expression, job.how.views, device,
                                args.batch_size)
    reference = reference_of(job.sections, job.expression, embeddings)
    image = embeddings[job.query]["image"]
    predicted = predict(image, xy, reference, job.how, trained.is_regression)
    every = columns(trained, job.how, predicted, "untrained ")
    every.pop("untrained both", None)
    return every


def untrained_model(trained):
    """The model before its first step: the pretrained encoder, and heads with random weights."""
    settings = trained.settings
    torch.manual_seed(settings.seed)
    network = HECLIP(trained.network.config)
    if trained.frozen:
        network.image_encoder = trained.network.image_encoder
    elif settings.pretrained:
        load_encoder_weights(network.image_encoder, settings.encoder, settings.encoder_weights,
                             network.config.encoder_args)
    return replace(trained, network=network.eval(), digest="")


def score_all(job, predictions, spots, reference_expression):
    """Scores of every prediction, and scores per gene of the first.

    Returns (name -> score -> number, DataFrame by gene).
    """
    panel, truth = job.trained.panel, job.expression[job.query]
    ranked_on = truth if panel.protocol == "paper" else reference_expression
    summaries, genes = {}, None
    for label, expression in predictions.items():
        per_gene, summary = score(expression, truth, ranked_on)
        summary |= score_further(expression, truth, spots.obs, spots.obsm["spatial"])
        if panel.is_marker.any():
            summary["markers"] = mean_defined(per_gene["Pearson"][panel.is_marker])
        summaries[label] = summary
        if genes is None:
            genes = pd.DataFrame(per_gene, index=panel.ids)
    if job.trained.validation is not None:
        genes["expected_pearson"] = np.array(job.trained.validation)
    return summaries, genes


# ---------------------------------------------------------------------------- 4. and 5. write, draw


def as_anndata(job, spots, predicted, reference, genes):
    """The prediction as AnnData, spots x panel, ready for scanpy and squidpy.

    X is predicted and layers["true"] measured, both log-normalised.
    obs: the spots' own columns, and how far to trust each (see `Predicted.certainty`).
    var: symbol, marker, pearson, the correlation that the gene reached, and expected_pearson, the
    one that it reached on the validation spots in training, without the query.
    uns["heclip"]: JSON of the model, the query, and how it was predicted.
    """
    reached = genes[genes.columns.intersection(["Pearson", "expected_pearson"])]
    about = {"query": job.query, "reference": job.sections, "how": asdict(job.how),
             "unit": "log-normalised expression", "model": job.trained.facts()}
    return anndata.AnnData(
        predicted.expression,
        obs=spots.obs.assign(**predicted.certainty(reference)),
        var=job.trained.panel.genes[["symbol", "marker"]].join(
            reached.rename(columns={"Pearson": "pearson"})),
        obsm={"spatial": spots.obsm["spatial"]},
        layers={"true": job.expression[job.query]},
        uns={"spatial": spots.uns["spatial"], "heclip": json.dumps(about)})


def write_results(job, result, genes, summaries):
    """Write the prediction as h5ad, the scores per gene as CSV, and all summaries as JSON."""
    panel, settings = job.trained.panel, job.trained.settings
    with atomic_path(job.run.prediction) as path:
        write_h5ad(result, path)
    table = panel.genes[["symbol", "marker"]].join(genes)
    with atomic_path(job.run.genes) as path:
        table.sort_values("Pearson", ascending=False, kind="stable").to_csv(path)
    how = asdict(job.how)
    if job.trained.is_regression:
        how["retrieval"] = "regression"
    ranked_on = "query truth" if settings.protocol == "paper" else "reference"
    scores = {"dataset": settings.dataset, "type": settings.type, "protocol": settings.protocol,
              "query": job.query, "reference": job.sections, "n_spots": result.n_obs,
              "n_genes": len(panel), "recipe": settings.recipe, **how, "genes_ranked_on": ranked_on,
              "scores": {label: without_nan(summary) for label, summary in summaries.items()}}
    with atomic_path(job.run.scores) as path:
        path.write_text(json.dumps(scores, indent=2) + "\n")


def without_nan(summary):
    """Scores for JSON: None instead of NaN."""
    defined = {name: value for name, value in summary.items() if not np.isnan(value)}
    return {name: defined.get(name) for name in summary}


def print_scores(job, summaries):
    """Print the results table: one row per score, one column per prediction.

    The prediction on disk comes first.
    """
    names = {"gene": "gene retrieval", "image": "image retrieval", "both": "both retrievals",
             "untrained gene": "untrained, gene", "untrained image": "untrained, image",
             "random": "random spots"}
    settings, how = job.trained.settings, job.how
    scores = pd.DataFrame({names.get(label, label): summary
                           for label, summary in summaries.items()})
    print(f"\n{settings.dataset} {settings.type}, protocol {settings.protocol}: {job.query} "
          f"predicted from {', '.join(job.sections)}; {len(job.trained.panel)} genes, K = {how.k}, "
          f"{how.views} views, smoothing {how.smoothing}" + (", centred." if how.centre else "."))
    where = "query's truth, as published." if settings.protocol == "paper" else "reference."
    print(f"HEG-n, HVG-n: mean Pearson of the n genes highest, or most variable, in the {where}")
    print_undefined(summaries, len(job.trained.panel))
    print(scores.to_string(
        float_format=lambda value: f"{value:.3f}" if value % 1 else f"{value:.0f}"))


def print_undefined(summaries, n_genes):
    """Say which predictions have genes that cannot be scored, and how many."""
    for label, summary in summaries.items():
        if n := summary["undefined genes"]:
            print(f"{label}: {n} of {n_genes} genes are not scored, because the prediction or the "
                  "truth is the same in all spots, to rounding")


def draw(job, result, genes, reference):
    """UMAPs of embeddings and expression under the published names; maps; calibration."""
    run, settings = job.run, job.trained.settings
    title = f"{settings.dataset} {settings.type}"
    image = {section: of["image"] for section, of in job.embeddings.items()}
    figures.umap_figure(
        {"query": image[job.query],
         "reference": np.concatenate([image[section] for section in job.sections])},
        run.figure("EBD"), title=f"{title}: image embeddings")
    figures.umap_figure({"true": result.layers["true"], "predicted": result.X}, run.figure("EXP"),
                        title=f"{title}: {job.query}")
    order = genes["Pearson"].dropna().sort_values(ascending=False, kind="stable")
    if len(order):
        captions = {gene: "best" for gene in order.index[:2]}
        captions[order.index[len(order) // 2]] = "median"
        captions |= {gene: "marker" for gene in result.var_names[result.var["marker"]]}
        shown = [(gene, f"{caption} · r = {genes.loc[gene, 'Pearson']:.2f}")
                 for gene, caption in captions.items()]
        figures.expression_maps(result, shown, run.figure("MAP", suffix="png"))
    figures.calibration_figure(result, run.figure("CAL", suffix="png"),
                               title=f"{title}: {job.query}")


def page_path(prediction):
    """Path of a prediction's page, next to the prediction."""
    return prediction.with_suffix(".html")


def command_line(argv):
    """The command that runs this script with `argv`; None: with the flags that it was given."""
    return shlex.join(["python", "code/infer.py", *(sys.argv[1:] if argv is None else argv)])


# ----------------------------------------------------------------------- a slide without expression


def predict_slide(args, argv):
    """The work of --image: predict a slide, write prediction and page, and draw two figures.

    argv: the command line, for the page.
    """
    trained = read_model(args)
    run = Run(trained.settings.dataset, trained.name, args.save_path)
    name = args.name or Path(args.image).stem
    path = run.slide_prediction(name)
    if Path(args.image).exists():  # else opening it raises the error
        check_replaceable(path, trained, api.slide_identity(args.image), args.overwrite)
    warned = []

    def show(message, *_):
        warned.append(str(message))
        print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        result = api.predict_with(
            trained, args.image, args.mpp, pitch=args.pitch, positions=args.positions,
            whole_image=args.whole_image, run=run, name=name,
            how=predicting(args.recipe or trained.settings.recipe, vars(args)),
            batch_size=args.batch_size, device=args.device, compile=args.compile)
    with atomic_path(path) as temporary:
        write_h5ad(result, temporary)
    mpp = result.uns["spatial"][name]["metadata"]["mpp"]
    print(f"{args.image}, {mpp:.4g} µm per pixel: {result.n_obs:,} spots, {result.n_vars:,} genes "
          f"predicted in {path}")
    if "spread" in result.obs:
        print("mean over spots: similarity to the retrieved spots "
              f"{result.obs['similarity'].mean():.3f}, their spread "
              f"{result.obs['spread'].mean():.3f}")
    if args.spatialdata:
        api.write_spatialdata(result, args.spatialdata)
    if args.figures:
        spots, maps = run.figure("QC", name, "jpg"), run.figure("MAP", name, "png")
        figures.spots_over_slide(result, name, spots)
        figures.predicted_maps(result, genes_to_map(result), maps)
        page = page_path(path)
        write_page(page, path, command=command_line(argv), warned=warned)
        print(f"Look at {page} in a browser, and at {spots}: spots must lie on all tissue and on "
              f"nothing else. Maps in {maps}")


def genes_to_map(prediction):
    """The genes of a slide's maps, [(gene id, caption)].

    They are the dataset's markers, or without markers the genes whose predictions vary most.
    """
    markers = prediction.var_names[prediction.var["marker"]]
    if len(markers):
        return [(gene, "marker") for gene in markers]
    order = np.argsort(-prediction.X.var(axis=0), kind="stable")[:MAPPED_GENES]
    return [(gene, "most varied") for gene in prediction.var_names[order]]


if __name__ == "__main__":
    command.run(main)
