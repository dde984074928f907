"""Predict the query section's expression from its image, score the prediction, and draw it.

    python code/infer.py --dataset GSE240429 --type heg

reads GSE/<dataset>/processed and the checkpoint that main.py wrote; embeds every section into ebd/; retrieves for each
query patch its K nearest reference spots; and writes <type>_prediction.h5ad, <type>_genes.csv and <type>_scores.json
to save/<dataset>/ and maps and UMAPs to figure/. With --image it predicts a slide that has no expression instead.
"""

import json

import anndata
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from heclip import command, figures
from heclip.batches import Patches, encode_patches
from heclip.checkpoint import check_fits, load_checkpoint
from heclip.dataset import Processed, Run, first_line, run_name
from heclip.files import InputError, atomic_path, write_h5ad
from heclip.metrics import mean_defined, score
from heclip.model import HECLIP, load_encoder_weights
from heclip.prediction import predict_slide_command
from heclip.retrieval import average_expression, random_spots, retrieve


def parse(argv=None):
    flags = command.parser("Predict the query section's expression from its image, and score it.")
    flags.add_argument("--retrieval", choices=["gene", "image"], default="gene",
                       help="which embeddings of the reference the prediction is retrieved by; both are scored")
    flags.add_argument("--k", type=command.positive, default=50, help="reference spots averaged for each query spot")
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
    name = run_name(args.type, args.protocol)
    run = Run(args.dataset, name, args.save_path)
    processed = Processed(args.dataset)
    table, panel = processed.sections(), processed.panel(name)
    reference, query = (list(table.index[table["role"] == role]) for role in ("reference", "query"))
    if len(query) != 1:
        raise InputError(f"{processed.sections_path} has {len(query)} query sections; exactly one is predicted")
    query = query[0]

    barcodes, truth = {}, {}  # section -> (n_spots,), (n_spots, G)
    for section in [*reference, query]:
        adata = processed.read(section)  # all genes; the last one, the query's, is kept
        barcodes[section] = np.array(adata.obs_names, dtype=str)
        truth[section] = processed.expression(section, name, panel, adata)

    # 1. Embed every section: image (n_spots, D) and gene (n_spots, D).
    if args.from_ebd:
        embeddings = {section: read_embeddings(run, section, barcodes[section], panel) for section in truth}
    else:
        device = command.pick_device(args.device)
        model, facts = load_checkpoint(run.checkpoint)
        check_fits(run.checkpoint, facts, args.dataset, name, panel)
        if args.compile:
            model.image_encoder.compile()
        if query in facts["reference"]:
            raise InputError(f"{run.checkpoint} was trained on {query}, which is now the query section. Train again")
        embeddings = embed(model, processed, truth, device, args.batch_size)
        for section, arrays in embeddings.items():
            with atomic_path(run.embeddings(section)) as path, open(path, "wb") as file:
                np.savez(file, **arrays, barcode=barcodes[section], panel=np.array(panel.index, dtype=str))
        print(f"embeddings in {run.embeddings(query).parent}")
        if args.ebd_only:
            return
    models = {"": embeddings}
    if args.untrained:
        device = command.pick_device(args.device)
        models["untrained "] = embed(untrained_model(run), processed, truth, device, args.batch_size)

    # 2. Retrieve and average; 3. score, beside what chance gives.
    reference_expression = np.concatenate([truth[section] for section in reference])  # (N, G)
    index = {}  # retrieval -> (n_query, K) rows of the reference
    for label, of_model in models.items():
        for kind in ("gene", "image"):
            nearest = np.concatenate([of_model[section][kind] for section in reference])  # (N, D)
            index[f"{label}{kind}"], similarity = retrieve(of_model[query]["image"], nearest, args.k)
            if label + kind == args.retrieval:
                best_similarity = similarity[:, 0]
    index["random"] = random_spots(len(truth[query]), len(reference_expression), args.k, args.seed)

    ranked_on = truth[query] if args.protocol == "paper" else reference_expression
    summaries = {}
    for label, rows in index.items():
        predicted = average_expression(rows, reference_expression)  # (n_query, G)
        per_gene, summaries[label] = score(predicted, truth[query], ranked_on)
        if panel["marker"].any():
            summaries[label]["markers"] = mean_defined(per_gene["Pearson"][panel["marker"].to_numpy()])
        if label == args.retrieval:
            prediction, genes = predicted, pd.DataFrame(per_gene, index=panel.index)

    write_results(run, args, adata, query, panel, prediction, truth[query], best_similarity, genes, summaries,
                  reference)
    print_scores(args, query, reference, panel, summaries)
    if args.figures:
        draw(run, args, panel, genes, embeddings, query, reference, prediction, truth[query])


def embed(model, processed, truth, device, batch_size):
    """Image and gene embeddings of every section: section -> {"image", "gene"}, float32 (n_spots, D), rows as in truth.

    No augmentation: the same input gives the same embedding.
    """
    model.to(device, memory_format=torch.channels_last)
    embeddings = {}
    for section, expression in tqdm(truth.items(), desc="embed", unit="section", leave=False, disable=None):
        image = encode_patches(model, Patches([processed.patches(section)], device), torch.arange(len(expression)),
                               batch_size)
        with torch.inference_mode():
            gene = model.encode_expression(torch.from_numpy(expression).to(device))
        embeddings[section] = {"image": image.cpu().numpy(), "gene": gene.cpu().numpy()}
    return embeddings


def untrained_model(run):
    """The checkpoint's model as it was before its first step: pretrained encoder, heads as they were drawn."""
    trained, facts = load_checkpoint(run.checkpoint)
    torch.manual_seed(facts["arguments"]["seed"])
    model = HECLIP(trained.config)
    if facts["arguments"]["pretrained"]:
        load_encoder_weights(model.image_encoder, trained.config.encoder, facts["arguments"]["encoder_weights"])
    return model.eval()


def read_embeddings(run, section, barcodes, panel):
    """Saved embeddings of a section, or an error if they are of other spots or another panel."""
    path = run.embeddings(section)
    if not path.exists():
        raise InputError(f"{path} is missing. Make it by running infer.py without --from_ebd")
    try:
        with np.load(path) as file:
            arrays = dict(file)
        same = np.array_equal(arrays["barcode"], barcodes) and np.array_equal(arrays["panel"], panel.index)
    except Exception as error:  # zip and numpy raise many kinds
        raise InputError(f"{path} is damaged ({first_line(error)}). Run infer.py without --from_ebd") from None
    if not same:
        raise InputError(f"{path} was made from other spots or another panel than {section} has now. "
                         "Run infer.py without --from_ebd")
    return arrays


def write_results(run, args, section, query, panel, prediction, truth, similarity, genes, summaries, reference):
    """The prediction as AnnData, the scores per gene by name, and the row of the results table."""
    adata = anndata.AnnData(prediction, obs=section.obs.assign(similarity=similarity),
                            var=panel[["symbol", "marker"]].assign(pearson=genes["Pearson"]),
                            obsm={"spatial": section.obsm["spatial"]}, layers={"true": truth},
                            uns={"spatial": section.uns["spatial"]})
    with atomic_path(run.prediction) as path:
        write_h5ad(adata, path)
    with atomic_path(run.genes) as path:
        panel[["symbol", "marker"]].join(genes).sort_values("Pearson", ascending=False, kind="stable").to_csv(path)
    scores = {"dataset": args.dataset, "type": args.type, "protocol": args.protocol, "query": query,
              "reference": reference, "n_spots": len(truth), "n_genes": len(panel), "k": args.k,
              "genes_ranked_on": "query truth" if args.protocol == "paper" else "reference",
              "scores": {label: {key: None if np.isnan(value) else value for key, value in summary.items()}
                         for label, summary in summaries.items()}}
    with atomic_path(run.scores) as path:
        path.write_text(json.dumps(scores, indent=2) + "\n")


def print_scores(args, query, reference, panel, summaries):
    """The results table: a row a score, a column a way of choosing the K spots."""
    names = {"gene": "gene retrieval", "image": "image retrieval", "untrained gene": "untrained, gene",
             "untrained image": "untrained, image", "random": f"{args.k} random spots"}
    scores = pd.DataFrame(summaries).rename(columns=names)
    print(f"\n{args.dataset} {args.type}, protocol {args.protocol}: {query} predicted from {', '.join(reference)}; "
          f"{len(panel)} genes, K = {args.k}.")
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
    print(f"scores in {run.scores}; figures in {run.figure('MAP').parents[1]}: MAP, EBD, EXP")


if __name__ == "__main__":
    command.run(main)
