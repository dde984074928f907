"""Predict the query section's expression from its image, score the prediction, and draw it.

    python code/infer.py --dataset GSE240429 --type heg

reads GSE/<dataset>/processed and the checkpoint that main.py wrote (--checkpoint takes another, of HECLIP's authors
too); embeds every section into ebd/; retrieves for each query patch its nearest reference spots; and writes
<type>_prediction.h5ad, <type>_genes.csv and <type>_scores.json to save/<dataset>/ and maps, UMAPs and calibration to
figure/. With --image it predicts a slide that has no expression instead.
"""

import argparse
import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from heclip import command, figures
from heclip.batches import Patches, encode_patches
from heclip.checkpoint import check_fits, load_checkpoint
from heclip.dataset import Processed, Run, first_line, run_name
from heclip.features import features_of, kept
from heclip.files import InputError, atomic_path, write_h5ad
from heclip.metrics import mean_defined, score, score_further
from heclip.model import HECLIP, load_encoder_weights
from heclip.prediction import predict_slide_command
from heclip.recipes import PREDICTION
from heclip.retrieval import average_expression, centre, random_spots, retrieve, spread
from heclip.spots import smooth


def parse(argv=None):
    flags = command.parser("Predict the query section's expression from its image, and score it.")
    flags.add_argument("--recipe", choices=list(PREDICTION),
                       help="sets the flags from --retrieval to --smoothing; default: the one the model was trained by")
    flags.add_argument("--retrieval", choices=["gene", "image", "both"],
                       help="which embeddings of the reference the prediction is retrieved by; all three are scored")
    flags.add_argument("--k", type=command.positive,
                       help="reference spots averaged for each query spot; with both, K of each")
    flags.add_argument("--centre", action=argparse.BooleanOptionalAction,
                       help="compare embeddings less the mean of their section, which its stain and batch move")
    flags.add_argument("--views", type=int, choices=[1, 2, 4, 8],
                       help="symmetries of each patch whose embeddings are averaged")
    flags.add_argument("--smoothing", type=command.not_negative, metavar="PITCHES",
                       help="width of a Gaussian over neighbouring spots of the prediction; 0: none")
    flags.add_argument("--checkpoint", metavar="FILE",
                       help="the model, wherever it is; a <type>_best.pt of the published code too, which is of the "
                            "type that it says. Default: main.py's")
    flags.add_argument("--panel_file", metavar="CSV",
                       help="the model's genes in its order, ids in the first column; default: the dataset's panel")
    part = flags.add_mutually_exclusive_group()
    part.add_argument("--ebd_only", action="store_true", help="write the embeddings and stop")
    part.add_argument("--from_ebd", action="store_true", help="start from saved embeddings; needs no model and no GPU")
    flags.add_argument("--untrained", action="store_true",
                       help="score also the model as it was before training: what training has added")
    flags.add_argument("--no-figures", dest="figures", action="store_false", help="scores only")
    slide = flags.add_argument_group("a slide without expression")
    slide.add_argument("--image", metavar="FILE", help="predict this slide instead: .svs, .ndpi, .mrxs, .tif, .jpg ...")
    slide.add_argument("--mpp", type=float, metavar="UM", help="µm per full-resolution pixel, over what the file says")
    slide.add_argument("--pitch", type=float, metavar="UM",
                       help="distance of neighbouring spots, if not the reference's")
    slide.add_argument("--positions", metavar="FILE", help="spots in full-resolution pixels, as a position file, "
                                                           "instead of a lattice over the tissue")
    slide.add_argument("--spatialdata", metavar="DIR",
                       help="write the prediction as SpatialData too; needs the package spatialdata")
    args = flags.parse_args(argv)
    if args.image and (args.ebd_only or args.from_ebd or args.untrained):
        flags.error("--image goes with none of --ebd_only, --from_ebd and --untrained")
    if not args.image and (args.mpp or args.pitch or args.positions or args.spatialdata):
        flags.error("--mpp, --pitch, --positions and --spatialdata go with --image")
    return args


def main(argv=None):
    args = parse(argv)
    if args.image:
        return predict_slide_command(args)
    if args.from_ebd and args.checkpoint:
        raise InputError("--checkpoint with --from_ebd: saved embeddings need no model. Leave one of them out")
    model, facts = None, {}
    if args.checkpoint:
        model, facts = load_checkpoint(Path(args.checkpoint))
        if not facts:  # of the published code, where a model's type is part of its file's name
            args.type = model.config.kind
    run = Run(args.dataset, run_name(args.type, args.protocol), args.save_path)
    processed = Processed(args.dataset)
    reference, query = processed.roles(args.query)
    if len(query) != 1:
        raise InputError(f"{processed.sections_path} has {len(query)} query sections; exactly one is predicted at a "
                         "time. Name it with --query")
    query = query[0]
    checkpoint = Path(args.checkpoint or run.checkpoint)
    if args.from_ebd:
        kept = read_embeddings(run, query)
        origin, trained_on = run.embeddings(query), list(kept["reference"])
        recipe, regression = str(kept["recipe"]), bool(kept["regression"])
    else:
        if not model:
            model, facts = load_checkpoint(checkpoint)
        origin, trained_on = checkpoint, facts.get("reference", reference)
        recipe = facts["arguments"]["recipe"] if facts else "published"
        regression = model.config.kind == "regression"
    if query in trained_on:
        raise InputError(f"{origin} was trained on {query}, which is now the query section. Name one that was held out "
                         "with --query, or train again")
    reference = [section for section in reference if section in trained_on]
    args.recipe = args.recipe or recipe
    panel_name = run_name(args.panel or args.type, args.protocol)
    panel = processed.panel_for(panel_name, reference)
    if args.panel_file:
        panel = processed.panel_from(args.panel_file, panel_name, reference[0])
    if facts:
        check_fits(checkpoint, facts, args.dataset, run.name, panel)
    elif model:
        check_fits_published(checkpoint, model, panel, args)
        print(f"{checkpoint}: published {args.type} model of {len(panel)} genes. It does not say what it was trained "
              f"on: whether it has seen {query}, and whether its genes are these in this order, cannot be checked")
    for flag, value in PREDICTION[args.recipe].items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)

    barcodes, truth = {}, {}  # section -> (n_spots,), (n_spots, G)
    for section in [*reference, query]:
        adata = processed.read(section)  # all genes; the last one, the query's, is kept
        barcodes[section] = np.array(adata.obs_names, dtype=str)
        truth[section] = processed.expression(section, panel_name, panel, adata)
    reference_expression = np.concatenate([truth[section] for section in reference])  # (N, G)

    # 1. Embed every section: image (n_spots, D) and gene (n_spots, D).
    if args.from_ebd:
        embeddings = {section: read_embeddings(run, section) for section in truth}
        for section, arrays in embeddings.items():
            check_rows(run.embeddings(section), section, arrays, barcodes[section], panel)
    else:
        device = command.pick_device(args.device)
        if args.compile:
            model.image_encoder.compile()
        embeddings = embed(model, processed, truth, device, args, facts.get("frozen"))
        for section, arrays in embeddings.items():
            if "validation_pearson_per_gene" in facts:
                arrays["expected_pearson"] = np.array(facts["validation_pearson_per_gene"])
            with atomic_path(run.embeddings(section)) as path, open(path, "wb") as file:
                np.savez(file, **arrays, barcode=barcodes[section], panel=np.array(panel.index, dtype=str),
                         reference=np.array(trained_on), recipe=recipe, regression=regression)
        print(f"embeddings in {run.embeddings(query).parent}")
        if args.ebd_only:
            return

    # 2. Centre embeddings, retrieve the K nearest reference spots, average their expression, smooth over neighbours.
    models = {"": embeddings}
    if args.untrained:
        models["untrained "] = embed(untrained_model(checkpoint), processed, truth, command.pick_device(args.device),
                                     args, facts.get("frozen"))
    neighbours = {}  # label -> (index, similarity), (n_query, K) each
    for label, of_model in models.items():
        for kind in ("gene", "image"):
            sections = [of_model[section][kind] for section in reference]  # (N_s, D) each
            image = of_model[query]["image"]
            image, nearest = centre(image, sections) if args.centre else (image, np.concatenate(sections))
            neighbours[label + kind] = retrieve(image, nearest, args.k)
    neighbours["both"] = [np.hstack(pair) for pair in zip(neighbours["gene"], neighbours["image"], strict=True)]
    neighbours["random"] = random_spots(len(truth[query]), len(reference_expression), args.k, args.seed), None
    xy = adata.obsm["spatial"]
    predictions = {label: smooth(average_expression(index, reference_expression), xy, args.smoothing)
                   for label, (index, _) in neighbours.items()}  # (n_query, G) each
    index, similarity = neighbours[args.retrieval]
    if regression:  # the image's embedding is its predicted expression
        predictions = {f"{label}regression": smooth(of_model[query]["image"], xy, args.smoothing)
                       for label, of_model in models.items()} | {"random": predictions["random"]}
        args.retrieval = "regression"
    prediction = predictions[args.retrieval]

    # 3. Score, beside what chance gives.
    ranked_on = truth[query] if args.protocol == "paper" else reference_expression
    summaries = {}
    for label, predicted in predictions.items():
        per_gene, summaries[label] = score(predicted, truth[query], ranked_on)
        summaries[label] |= score_further(predicted, truth[query], adata.obs, xy)
        if panel["marker"].any():
            summaries[label]["markers"] = mean_defined(per_gene["Pearson"][panel["marker"].to_numpy()])
        if label == args.retrieval:
            genes = pd.DataFrame(per_gene, index=panel.index)
    if "expected_pearson" in embeddings[query]:
        genes["expected_pearson"] = embeddings[query]["expected_pearson"]

    certainty = {"similarity": similarity.mean(axis=1), "spread": spread(index, reference_expression)}
    write_results(run, args, adata, query, panel, prediction, truth[query], certainty, genes, summaries, reference)
    print_scores(args, query, reference, panel, summaries)
    if args.figures:
        draw(run, args, panel, genes, embeddings, query, reference, prediction, truth[query])


def embed(model, processed, truth, device, args, frozen=None):
    """Image and gene embeddings of every section: section -> {"image", "gene"}, float32 (n_spots, D), rows as in truth.

    Nothing is random: the same input gives the same embedding. frozen: of the checkpoint's facts, if the encoder was
    not trained. Its features are read where they are kept, and made to be kept where all views of them are wanted.
    """
    model.to(device, memory_format=torch.channels_last)
    embeddings = {}
    for section, expression in tqdm(truth.items(), desc="embed", unit="section", leave=False, disable=None):
        patches = None
        if frozen and args.views == 8:
            patches = features_of(processed, section, model, frozen["weights"], device, args.batch_size)
        elif frozen:
            patches = kept(processed, section, model.config, frozen["weights"])
        if patches is None:
            patches = processed.patches(section)
        image = encode_patches(model, Patches([patches], device), torch.arange(len(expression)), args.batch_size,
                               args.views)
        with torch.inference_mode():
            gene = model.encode_expression(torch.from_numpy(expression).to(device))
        embeddings[section] = {"image": image.cpu().numpy(), "gene": gene.cpu().numpy()}
    return embeddings


def check_fits_published(path, model, panel, args):
    """Raise InputError unless a checkpoint of the published code can be used on this panel."""
    if args.untrained:
        raise InputError(f"--untrained: {path} does not say how its training began. Leave the flag out")
    if len(panel) != model.config.n_genes:
        raise InputError(f"{path} is a {model.config.kind} model of {model.config.n_genes} genes, but the panel has "
                         f"{len(panel)}. Give its own genes, in its order, with --panel_file CSV")


def untrained_model(checkpoint):
    """The checkpoint's model as it was before its first step: pretrained encoder, heads as they were drawn."""
    trained, facts = load_checkpoint(checkpoint)
    torch.manual_seed(facts["arguments"]["seed"])
    model = HECLIP(trained.config)
    if facts.get("frozen"):
        model.image_encoder = trained.image_encoder
    elif facts["arguments"]["pretrained"]:
        load_encoder_weights(model.image_encoder, facts["arguments"]["encoder"], facts["arguments"]["encoder_weights"],
                             trained.config.encoder_args)
    return model.eval()


def read_embeddings(run, section):
    """What was saved with the embeddings of a section, and on what and by which recipe their model was trained."""
    path = run.embeddings(section)
    if not path.exists():
        raise InputError(f"{path} is missing. Make it by running infer.py without --from_ebd")
    try:
        with np.load(path) as file:
            arrays = dict(file)
        if absent := {"image", "gene", "barcode", "panel", "reference", "recipe", "regression"} - arrays.keys():
            raise ValueError(f"it holds no {min(absent)}")
        return arrays
    except Exception as error:  # zip and numpy raise many kinds
        raise InputError(f"{path} is damaged ({first_line(error)}). Run infer.py without --from_ebd") from None


def check_rows(path, section, arrays, barcodes, panel):
    """Raise InputError unless saved embeddings are of these spots and this panel."""
    if not (np.array_equal(arrays["barcode"], barcodes) and np.array_equal(arrays["panel"], panel.index)):
        raise InputError(f"{path} was made from other spots or another panel than {section} has now. "
                         "Run infer.py without --from_ebd")


def write_results(run, args, section, query, panel, prediction, truth, certainty, genes, summaries, reference):
    """The prediction as AnnData, the scores per gene by name, and the row of the results table.

    certainty: columns of obs. similarity: of the patch to the spots retrieved for it, their mean cosine;
    spread: how much those spots differ, see `retrieval.spread`. var["expected_pearson"] is what the gene reached on
    the validation spots, before the query was looked at.
    """
    adata = anndata.AnnData(prediction, obs=section.obs.assign(**certainty),
                            var=panel[["symbol", "marker"]].join(
                                genes[genes.columns.intersection(["Pearson", "expected_pearson"])]
                                .rename(columns={"Pearson": "pearson"})),
                            obsm={"spatial": section.obsm["spatial"]}, layers={"true": truth},
                            uns={"spatial": section.uns["spatial"]})
    with atomic_path(run.prediction) as path:
        write_h5ad(adata, path)
    with atomic_path(run.genes) as path:
        panel[["symbol", "marker"]].join(genes).sort_values("Pearson", ascending=False, kind="stable").to_csv(path)
    scores = {"dataset": args.dataset, "type": args.type, "protocol": args.protocol, "query": query,
              "reference": reference, "n_spots": len(truth), "n_genes": len(panel),
              **{flag: getattr(args, flag) for flag in ("recipe", *PREDICTION["heclip"])},
              "genes_ranked_on": "query truth" if args.protocol == "paper" else "reference",
              "scores": {label: {key: None if np.isnan(value) else value for key, value in summary.items()}
                         for label, summary in summaries.items()}}
    with atomic_path(run.scores) as path:
        path.write_text(json.dumps(scores, indent=2) + "\n")


def print_scores(args, query, reference, panel, summaries):
    """The results table: a row a score, a column a way of choosing the spots; first the one that is written to disk."""
    names = {"gene": "gene retrieval", "image": "image retrieval", "both": "both retrievals",
             "untrained gene": "untrained, gene", "untrained image": "untrained, image", "random": "random spots"}
    order = sorted(summaries, key=lambda label: label != args.retrieval)
    scores = pd.DataFrame({names.get(label, label): summaries[label] for label in order})
    print(f"\n{args.dataset} {args.type}, protocol {args.protocol}: {query} predicted from {', '.join(reference)}; "
          f"{len(panel)} genes, K = {args.k}, {args.views} views, smoothing {args.smoothing}"
          f"{', centred' if args.centre else ''}.")
    print("HEG-n, HVG-n: mean Pearson of the n genes highest, or most variable, in the "
          + ("query's truth, as published." if args.protocol == "paper" else "reference."))
    print(scores.to_string(float_format=lambda value: f"{value:.3f}" if value % 1 else f"{value:.0f}"))


def draw(run, args, panel, genes, embeddings, query, reference, prediction, truth):
    """UMAPs of embeddings and expression under the published names, and maps of telling genes over the tissue."""
    title = f"{args.dataset} {args.type}"
    figures.umap_figure({"query": embeddings[query]["image"],
                         "reference": np.concatenate([embeddings[section]["image"] for section in reference])},
                        run.figure("EBD"), title=f"{title}: image embeddings")
    figures.umap_figure({"true": truth, "predicted": prediction}, run.figure("EXP"), title=f"{title}: {query}")
    order = genes["Pearson"].dropna().sort_values(ascending=False, kind="stable")
    if len(order):
        captions = {gene: "best" for gene in order.index[:2]} | {order.index[len(order) // 2]: "median"}
        captions |= {gene: "marker" for gene in panel.index[panel["marker"]]}
        figures.expression_maps(anndata.read_h5ad(run.prediction),
                                [(gene, f"{caption} · r = {genes.loc[gene, 'Pearson']:.2f}")
                                 for gene, caption in captions.items()], run.figure("MAP"))
    figures.calibration_figure(anndata.read_h5ad(run.prediction), run.figure("CAL"), title=f"{title}: {query}")
    print(f"scores in {run.scores}; figures in {run.figure('MAP').parents[1]}: MAP, CAL, EBD, EXP")


if __name__ == "__main__":
    command.run(main)
