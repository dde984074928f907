"""Train HECLIP on the reference sections of a dataset.

    python code/main.py --dataset GSE240429 --type heg                           one GPU, or the CPU
    torchrun --nproc_per_node 8 code/main.py --dataset GSE240429 --type heg      several

reads GSE/<dataset>/processed. It writes save/<dataset>/<type>_best.pt, the epoch with the best
validation score, <type>_losses.csv, and <type>_last.pt, from which --resume continues. The query
section is never opened.

    python code/main.py --dataset GSE240429 --type heg --freeze

leaves the encoder as it was pretrained and trains the heads on its features, which are computed
once.
"""

from heclip import command
from heclip.settings import Training, parse_training

if __name__ == "__main__":
    command.run(parse_training)  # a wrong flag is answered here: the imports below take seconds

import math
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from heclip import parallel
from heclip.batches import (
    Patches,
    Spots,
    augment,
    encode_patches,
    mix,
    random_shares,
    random_stains,
    random_turns,
    split_spots,
    stain,
    to_pixels,
)
from heclip.checkpoint import (
    Trained,
    check_replaceable,
    load_progress,
    save_checkpoint,
    save_progress,
)
from heclip.dataset import Processed, Run
from heclip.features import digest, features_of
from heclip.files import InputError, atomic_path, locked
from heclip.loss import LOSSES, regression_loss
from heclip.metrics import mean_defined, pearson_per_gene
from heclip.model import HECLIP, configure, load_encoder_weights
from heclip.panel import run_name
from heclip.prediction import Reference, predict
from heclip.settings import PREDICTING

VALIDATIONS = 5  # approximate number of validations in a training


class History(NamedTuple):
    """The results of a training: a dict per epoch, its speed, and the number of training spots.

    The dicts hold epoch and train_loss; where validated, validation_loss and validation_pearson.
    """

    losses: list
    patches_per_second: list
    n_training: int


class Split(NamedTuple):
    """Indices of the training and of the validation spots, int64, sorted."""

    training: torch.Tensor
    validation: torch.Tensor


class Fit(NamedTuple):
    """What the steps of one training share.

    trained: the model and what it is trained on. model: its network, with gradients averaged over
    the ranks if there are several. batch_size: B, over all ranks.
    """

    trained: Trained
    model: torch.nn.Module
    optimiser: torch.optim.Optimizer
    spots: Spots
    split: Split
    batch_size: int
    ranks: parallel.Ranks

    def say(self, text):
        """Print on one rank only."""
        if self.ranks.rank == 0:
            print(text, flush=True)


def train(settings: Training, run: Run) -> History:
    """Train a model as `settings` say, and write it where `run` says.

    The model appears when training has finished. Until then, readers get the earlier model. Raises
    InputError if the data are missing or too few, or if another model is there already.
    """
    ranks = parallel.start(command.pick_device(settings.device))
    if settings.freeze and ranks.world > 1:
        raise InputError("--freeze under torchrun: heads alone train in seconds. Run python "
                         "code/main.py instead")
    with locked(run.checkpoint) if ranks.rank == 0 else nullcontext():
        torch.manual_seed(settings.seed)
        history = run_epochs(set_up(settings, ranks), run, settings)
    parallel.finish()
    return history


# -------------------------------------------------------------------------- data, model, optimiser


def set_up(settings, ranks):
    """The data, the network before its first step, and the optimiser: a Fit."""
    processed = Processed(settings.dataset)
    reference, _ = processed.roles(settings.query)
    processed.check_made_from(reference)
    table = processed.sections().loc[reference]
    panel = processed.panel(settings.panel_type, settings.protocol, reference)
    spots = Spots(processed, reference, panel, ranks.device)
    split = Split(*split_spots(spots, table["crop_px"], settings.val_fraction, settings.protocol,
                               settings.seed))
    check_split(settings, split, table)
    batch_size = min(settings.batch_size, len(split.training) // ranks.world * ranks.world)
    if batch_size % ranks.world:
        raise InputError(f"--batch_size {batch_size} cannot be shared equally by {ranks.world} "
                         "processes. Choose a multiple")

    patch_px, patch_um = int(table["patch_px"].iloc[0]), float(table.eval("crop_px * mpp").mean())
    network = build(settings, panel, patch_px, spots.expression[split.training.to(ranks.device)])
    network.to(ranks.device, memory_format=torch.channels_last)
    # How and where the training runs does not change the model.
    learned = replace(settings, resume=False, overwrite=False, save_path=None)
    trained = Trained(network, learned, panel, table["digest"].to_dict(), patch_px, patch_um)
    compiled = settings.compile
    if compiled is None:
        compiled = ranks.device.type == "cuda" and not settings.freeze
    if compiled:
        network.image_encoder.compile()
    model = parallel.distribute(network, ranks.device)
    fit = Fit(trained, model, adamw(network, settings, ranks.device), spots, split, batch_size,
              ranks)
    if settings.freeze:
        freeze(fit, processed)
    fit.say(f"{settings.dataset} {trained.name}: {len(panel)} genes; {', '.join(reference)}: "
            f"{len(split.training)} training and {len(split.validation)} validation "
            f"spots{where_validated(spots, split)}")
    fit.say(f"{settings.encoder} at {network.config.image_size} px on {ranks.world} x "
            f"{ranks.device.type}; {spots.patches.where()}")
    if compiled:
        fit.say("the encoder is compiled during the first epoch")
    return fit


def check_split(settings, split, table):
    """Raise InputError if there are too few spots on either side."""
    training, validation = map(len, split)
    if training < 2 or (settings.val_fraction and validation < 2):
        raise InputError(
            f"{training} training and {validation} validation spots are too few. With patches of "
            f"{table['crop_px'].max()} px, --val_fraction {settings.val_fraction} does not leave "
            "enough spots whose patches do not overlap. Choose another")


def where_validated(spots, split):
    """In words, which spots are the validation spots."""
    held_out = set(spots.section[split.validation.numpy()])
    if held_out and not held_out & set(spots.section[split.training.numpy()]):
        return f" ({', '.join(sorted(held_out))})"
    between = len(spots) - len(split.training) - len(split.validation)
    return f", {between} between them left out"


def build(settings, panel, patch_px, expression):
    """The network before its first step. expression: that of the training spots, (n, G)."""
    kind = "regression" if settings.loss == "regression" else settings.type
    config = configure(settings.encoder, kind, len(panel), patch_px, settings.image_size,
                       settings.pixels, settings.encoder_args, temperature=settings.temperature,
                       learned_temperature=settings.loss == "clip",
                       expression_head=settings.expression_loss > 0)
    network = HECLIP(config)
    if settings.pretrained:
        load_encoder_weights(network.image_encoder, settings.encoder, settings.encoder_weights,
                             config.encoder_args)
    if network.predictor:  # which starts from the mean profile
        network.predictor.bias.data = expression.mean(dim=0).cpu()
    return network


def adamw(network, settings, device):
    """The optimiser. Encoder and heads have separate learning rates."""
    encoder = list(network.image_encoder.parameters())
    heads = [parameter for key, parameter in network.named_parameters()
             if not key.startswith("image_encoder.")]
    groups = [{"params": encoder, "lr": settings.encoder_rate, "full_lr": settings.encoder_rate},
              {"params": heads, "lr": settings.lr, "full_lr": settings.lr}]
    return torch.optim.AdamW(groups, weight_decay=settings.wd, fused=device.type == "cuda")


def freeze(fit, processed):
    """Leave the encoder as it is, and replace the patches by its features of all 8 symmetries."""
    trained, network, device = fit.trained, fit.trained.network, fit.ranks.device
    network.image_encoder.requires_grad_(False)
    weights = digest(network.image_encoder)
    settings = trained.settings
    from_hub = settings.encoder.startswith("hf-hub:") and not settings.encoder_weights
    trained.frozen = {"weights": weights, "hub": settings.encoder if from_hub else None}
    network.eval()
    features = [features_of(processed, section, network, weights, device, settings.batch_size)
                for section in trained.reference]
    fit.spots.patches = Patches(features, device)


# --------------------------------------------------------------------------------------- the epochs


def run_epochs(fit, run, settings):
    """Train epoch by epoch, keep the best, and write what the next epoch depends on."""
    trained, rank = fit.trained, fit.ranks.rank
    losses, speeds = [], []
    if settings.resume and run.last.exists():
        losses = load_progress(run.last, trained, fit.optimiser)
        fit.say(f"resuming after epoch {len(losses)}")
    elif rank == 0:
        if not settings.overwrite:
            check_replaceable(run, trained)
        run.unfinished.unlink(missing_ok=True)
    best = max((row.get("validation_pearson", -math.inf) for row in losses), default=-math.inf)

    for epoch in range(len(losses) + 1, settings.max_epochs + 1):
        loss, speed = one_epoch(fit, epoch)
        speeds.append(speed)
        losses.append({"epoch": epoch, "train_loss": loss})
        report, is_best = f"epoch {epoch}: training loss {loss:.3f}", settings.val_fraction == 0
        if is_validated(epoch, settings):
            validation_loss, score = validate(fit)
            losses[-1] |= {"validation_loss": validation_loss, "validation_pearson": score}
            is_best, best = score > best, max(score, best)
            report += (f", validation loss {validation_loss:.3f}, validation Pearson {score:.4f}"
                       + (" *" if is_best else "  "))
        trained.epoch = epoch
        fit.say(f"{report}  {speed:,.0f} patches/s")
        if rank == 0:
            if is_best:
                save_checkpoint(run.unfinished, trained)
            with atomic_path(run.losses) as path:
                pd.DataFrame(losses).to_csv(path, index=False)
            save_progress(run.last, trained, fit.optimiser, losses)

    if rank == 0 and run.unfinished.exists():
        os.replace(run.unfinished, run.checkpoint)
    if settings.val_fraction:
        fit.say(f"best: validation Pearson {best:.4f}; model in {run.checkpoint}")
    else:
        fit.say(f"model of the last epoch in {run.checkpoint}")
    return History(losses, speeds, len(fit.split.training))


def is_validated(epoch, settings):
    """Whether an epoch is validated: about VALIDATIONS of them and the last; all with --freeze.

    A validation encodes all patches in all views of the recipe. That takes as long as several
    epochs, but with the features of a frozen encoder it does not.
    """
    every = 1 if settings.freeze else max(1, round(settings.max_epochs / VALIDATIONS))
    return settings.val_fraction > 0 and (epoch % every == 0 or epoch == settings.max_epochs)


def one_epoch(fit, epoch):
    """See each training spot once, in a new order and as one of its 8 symmetries.

    Everything random is drawn from the seed and the epoch's number, so that a resumed run gives
    the same model as an uninterrupted one. Returns (mean loss, patches per second).
    """
    settings, ranks, start = fit.trained.settings, fit.ranks, time.perf_counter()
    fit.model.train()
    seed = settings.seed * 100_003 + epoch
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed * ranks.world + ranks.rank)  # dropout
    order = fit.split.training[torch.randperm(len(fit.split.training), generator=generator)]
    n_batches = len(order) // fit.batch_size  # whole ones only
    batches = order[:n_batches * fit.batch_size].split(fit.batch_size)
    mine = [ranks.mine(index) for index in batches]
    steps, total = n_batches * settings.max_epochs, torch.zeros((), device=ranks.device)
    bar = tqdm(zip(mine, fit.spots.patches.stream(mine), strict=True),
               f"epoch {epoch}/{settings.max_epochs}", n_batches, leave=False,
               disable=None if ranks.rank == 0 else True)
    for step, (index, patches) in enumerate(bar, 1):
        factor = learning_rate_factor((epoch - 1) * n_batches + step, steps, settings.schedule)
        for group in fit.optimiser.param_groups:
            group["lr"] = group["full_lr"] * factor
        expression = fit.spots.expression[index.to(ranks.device)]  # (B / R, G)
        loss = batch_loss(fit, patches, expression, generator)
        fit.optimiser.zero_grad()
        loss.backward()
        fit.optimiser.step()
        total += loss.detach()
        if step % 10 == 0 and not bar.disable:  # reading the loss waits for the GPU
            bar.set_postfix(loss=f"{total.item() / step:.3f}")
    mean = total.item() / n_batches
    if not math.isfinite(mean):
        raise InputError(f"the training loss of epoch {epoch} is {mean}: training has diverged. "
                         f"Lower --lr (now {settings.lr}) or raise --temperature (now "
                         f"{settings.temperature})")
    return mean, n_batches * fit.batch_size / (time.perf_counter() - start)


def batch_loss(fit, patches, expression, generator):
    """The loss of one global batch of B spots, of which this rank has B / R.

    patches: uint8 (B / R, P, P, 3), or features (B / R, 8, F). expression: (B / R, G). Random
    numbers are drawn for the whole batch on every rank, and each rank takes its share.
    """
    network, settings, ranks = fit.trained.network, fit.trained.settings, fit.ranks
    n = len(expression) * ranks.world
    patches = augment(patches, ranks.mine(random_turns(n, generator)))
    if settings.colour_jitter:
        stains = ranks.mine(random_stains(n, generator))
        patches = stain(patches, stains, settings.colour_jitter)
    if settings.mixup:
        shares = ranks.mine(random_shares(n, settings.mixup, generator))
        patches, expression = mix(patches, shares), mix(expression, shares)
    pixels = to_pixels(patches, network.config)  # (B / R, 3, S, S)
    with command.autocast(ranks.device):
        image, gene, predicted = fit.model(pixels, expression)  # (B / R, D) twice, (B / R, G)
    image, gene = parallel.gather(image.float()), parallel.gather(gene.float())
    loss = LOSSES[settings.loss](image, gene, network.temperature)
    if settings.expression_loss:
        error = regression_loss(parallel.gather(predicted.float()), parallel.gather(expression))
        loss = loss + settings.expression_loss * error
    return loss


def learning_rate_factor(step, steps, schedule):
    """The factor of the learning rate in step 1 ... `steps`.

    constant: 1. cosine: a short rise to 1, then half a cosine down to 0.
    """
    if schedule == "constant":
        return 1.0
    warm = max(1, steps // 20)
    falling = (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))) / 2
    return min(step / warm, falling)


# --------------------------------------------------------------------------------------- validation


@torch.inference_mode()
def validate(fit):
    """The loss over the validation spots, and the score that selects the epoch.

    The validation spots of each section are predicted from the training spots as infer.py would
    predict them, with the recipe's own settings. Returns (loss, score). The score is the mean
    Pearson correlation over the genes where it is defined; `trained.validation` keeps all of them.
    """
    trained, split, spots = fit.trained, fit.split, fit.spots
    network, settings = trained.network.eval(), trained.settings
    how = PREDICTING[settings.recipe]
    if settings.protocol == "paper":  # spots drawn at random lack neighbours to smooth over
        how = replace(how, smoothing=0.0)
    device, loss_of = fit.ranks.device, LOSSES[settings.loss]
    image = embed(fit, split.validation, how.views)
    truth = spots.expression[split.validation.to(device)]
    gene = network.encode_expression(truth)
    loss = sum(loss_of(i, g, network.temperature).item() * len(i) for i, g in zip(
        image.split(fit.batch_size), gene.split(fit.batch_size), strict=True))

    reference = training_reference(fit, how)
    section, xy = spots.section[split.validation.numpy()], spots.xy[split.validation.numpy()]
    truth, scores = truth.cpu().numpy(), []
    for name in dict.fromkeys(section):
        rows = np.flatnonzero(section == name)
        predicted = predict(image[rows], xy[rows], reference, how, trained.is_regression)
        scores.append(pearson_per_gene(predicted.expression, truth[rows]))
    per_gene = mean_over_sections(np.stack(scores))
    trained.validation, score = per_gene.tolist(), mean_defined(per_gene)
    if math.isnan(score):
        raise InputError(f"no gene varies, as measured or as predicted from the {how.k} nearest "
                         f"spots, over the {len(image)} validation spots, so no epoch can be "
                         "chosen as the best. Raise --val_fraction, or train on more spots")
    return loss / len(image), score


def embed(fit, index, views):
    """Image embeddings of spots by their index, (n,) -> (n, D), shared between the ranks."""
    own = encode_patches(fit.trained.network, fit.spots.patches, fit.ranks.mine(index),
                         max(1, fit.batch_size // fit.ranks.world), views)
    return parallel.gather_interleaved(own)


def training_reference(fit, how):
    """The Reference of the training spots, with the kinds of embeddings that `how` needs."""
    trained, training = fit.trained, fit.split.training
    expression = fit.spots.expression[training.to(fit.ranks.device)]
    section = fit.spots.section[training.numpy()]
    sizes = {name: int((section == name).sum()) for name in trained.reference}
    sizes = {name: size for name, size in sizes.items() if size}
    embeddings = {"gene": trained.network.encode_expression(expression)}
    if how.retrieval != "gene" and not trained.is_regression:
        embeddings["image"] = embed(fit, training, how.views)
    return Reference(list(sizes), list(sizes.values()), expression.cpu().numpy(), embeddings)


def mean_over_sections(scores):
    """The mean of scores (sections, G) where they are defined: (G,), NaN if none is."""
    defined = np.isfinite(scores)
    count = np.where(defined.any(axis=0), defined.sum(axis=0), np.nan)
    return np.where(defined, scores, 0).sum(axis=0) / count


def main(argv=None):
    """Train with the settings of the command line."""
    settings = parse_training(argv)
    name = run_name(settings.type, settings.protocol)
    train(settings, Run(settings.dataset, name, settings.save_path))


if __name__ == "__main__":
    command.run(main)
