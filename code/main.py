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
    """The results of a training: a dict per epoch, its speed, and the number of training spots."""

    losses: list  # dicts: epoch, train_loss; where validated, validation_loss, validation_pearson
    patches_per_second: list
    n_training: int


def train(settings: Training, run: Run) -> History:
    """Train a model as `settings` say, and write it where `run` says.

    The model appears when training has finished. Until then, readers get the earlier model. Raises
    InputError if the data are missing or too few, or if another model is there already.
    """
    ranks = parallel.start(command.pick_device(settings.device))
    with locked(run.checkpoint) if ranks.rank == 0 else nullcontext():
        history = fit(settings, run, ranks)
    parallel.finish()
    return history


def fit(settings, run, ranks):
    """What `train` does, as one rank. The caller prevents other trainings of this model."""
    rank, world, device = ranks
    say = print if rank == 0 else lambda *_, **__: None
    if settings.freeze and world > 1:
        raise InputError("--freeze under torchrun: heads alone train in seconds. Run python "
                         "code/main.py instead")
    torch.manual_seed(settings.seed)

    # Data: the spots of the reference sections. Usually one section is held out for validation.
    processed = Processed(settings.dataset)
    reference, _ = processed.roles(settings.query)
    processed.check_made_from(reference)
    table = processed.sections().loc[reference]
    panel = processed.panel(settings.panel_type, settings.protocol, reference)
    spots = Spots(processed, reference, panel, device)
    split = Split(*split_spots(spots, table["crop_px"], settings.val_fraction, settings.protocol,
                               settings.seed))
    training, validation = split
    check_split(settings, split, table)
    batch_size = min(settings.batch_size, len(training) // world * world)
    if batch_size % world:
        raise InputError(f"--batch_size {batch_size} cannot be shared equally by {world} "
                         "processes. Choose a multiple")
    say(f"{settings.dataset} {run.name}: {len(panel)} genes; {', '.join(reference)}: "
        f"{len(training)} training and {len(validation)} validation "
        f"spots{where_validated(spots, split)}")

    # Model. `model` is the network with gradients averaged over the ranks, if there are several.
    patch_px, patch_um = int(table["patch_px"].iloc[0]), float(table.eval("crop_px * mpp").mean())
    network = build(settings, panel, patch_px, spots.expression[training.to(device)])
    network.to(device, memory_format=torch.channels_last)
    # How and where the training runs does not change the model.
    learned = replace(settings, resume=False, overwrite=False, save_path=None)
    trained = Trained(network, learned, panel, table["digest"].to_dict(), patch_px, patch_um)
    by_itself = device.type == "cuda" and not settings.freeze
    if settings.compile or (settings.compile is None and by_itself):
        network.image_encoder.compile()
        say("the encoder is compiled during the first epoch")
    model = parallel.distribute(network, device)
    optimiser = adamw(network, settings, device)
    if settings.freeze:
        freeze(trained, processed, spots, settings.batch_size)
    say(f"{settings.encoder} at {network.config.image_size} px on {world} x {device.type}; "
        f"{spots.patches.where()}")

    losses, speeds = [], []
    if settings.resume and run.last.exists():
        losses = load_progress(run.last, trained, optimiser)
        say(f"resuming after epoch {len(losses)}")
    elif rank == 0:
        if not settings.overwrite:
            check_replaceable(run, trained)
        run.unfinished.unlink(missing_ok=True)
    best = max((row.get("validation_pearson", -math.inf) for row in losses), default=-math.inf)
    steps = len(training) // batch_size * settings.max_epochs

    # Training. Each epoch sees each training spot once, in a new order and in one of its 8
    # symmetries. Everything random is drawn from the seed and the epoch's number, so that a resumed
    # run gives the same model as an uninterrupted one.
    for epoch in range(len(losses) + 1, settings.max_epochs + 1):
        start = time.perf_counter()
        model.train()
        generator = torch.Generator().manual_seed(settings.seed * 100_003 + epoch)
        torch.manual_seed((settings.seed * 100_003 + epoch) * world + rank)  # dropout
        order = training[torch.randperm(len(training), generator=generator)]
        batches = order[:len(order) // batch_size * batch_size].split(batch_size)  # whole ones only
        mine = [ranks.mine(index) for index in batches]
        total = torch.zeros((), device=device)
        bar = tqdm(zip(mine, spots.patches.stream(mine), strict=True),
                   f"epoch {epoch}/{settings.max_epochs}", len(mine), leave=False,
                   disable=None if rank == 0 else True)
        for step, (index, patches) in enumerate(bar, 1):
            factor = learning_rate_factor((epoch - 1) * len(mine) + step, steps, settings.schedule)
            for group in optimiser.param_groups:
                group["lr"] = group["full_lr"] * factor
            expression = spots.expression[index.to(device)]  # (B / R, G)
            loss = batch_loss(model, network, patches, expression, settings, generator, ranks)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.detach()
            if step % 10 == 0 and not bar.disable:  # reading the loss waits for the GPU
                bar.set_postfix(loss=f"{total.item() / step:.3f}")

        train_loss = total.item() / len(batches)
        if not math.isfinite(train_loss):
            raise InputError(f"the training loss of epoch {epoch} is {train_loss}. Training has "
                             f"diverged. Lower --lr (now {settings.lr}) or raise --temperature "
                             f"(now {settings.temperature})")
        speeds.append(len(batches) * batch_size / (time.perf_counter() - start))
        losses.append({"epoch": epoch, "train_loss": train_loss})
        report, is_best = f"epoch {epoch}: training loss {train_loss:.3f}", True
        if len(validation):
            is_best = False
        if is_validated(epoch, settings) and len(validation):
            validation_loss, per_gene = validate(trained, spots, split, batch_size, ranks)
            score = mean_defined(per_gene)
            if math.isnan(score):
                raise InputError(f"no gene varies over the {len(validation)} validation spots, so "
                                 "no epoch can be chosen as the best. Raise --val_fraction")
            losses[-1] |= {"validation_loss": validation_loss, "validation_pearson": score}
            is_best, best = score > best, max(score, best)
            trained.validation = per_gene.tolist()
            report += (f", validation loss {validation_loss:.3f}, validation Pearson {score:.4f}"
                       + (" *" if is_best else "  "))
        trained.epoch = epoch
        say(f"{report}  {speeds[-1]:,.0f} patches/s", flush=True)
        if rank == 0:
            if is_best:
                save_checkpoint(run.unfinished, trained)
            with atomic_path(run.losses) as path:
                pd.DataFrame(losses).to_csv(path, index=False)
            save_progress(run.last, trained, optimiser, losses)
    if rank == 0 and run.unfinished.exists():
        os.replace(run.unfinished, run.checkpoint)
    if len(validation):
        say(f"best: validation Pearson {best:.4f}; model in {run.checkpoint}")
    else:
        say(f"model of the last epoch in {run.checkpoint}")
    return History(losses, speeds, len(training))


class Split(NamedTuple):
    """Indices of the training and of the validation spots, int64, sorted."""

    training: torch.Tensor
    validation: torch.Tensor


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


def is_validated(epoch, settings):
    """Whether an epoch is validated: about VALIDATIONS of them and the last; all with --freeze.

    A validation encodes all patches in all views of the recipe, which takes as long as several
    epochs.
    """
    every = 1 if settings.freeze else max(1, round(settings.max_epochs / VALIDATIONS))
    return epoch % every == 0 or epoch == settings.max_epochs


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


def freeze(trained, processed, spots, batch_size):
    """Leave the encoder as it is, and replace the patches by its features of all 8 symmetries.

    Modifies trained and spots.
    """
    network, settings, device = trained.network, trained.settings, spots.expression.device
    network.image_encoder.requires_grad_(False)
    weights = digest(network.image_encoder)
    from_hub = settings.encoder.startswith("hf-hub:") and not settings.encoder_weights
    trained.frozen = {"weights": weights, "hub": settings.encoder if from_hub else None}
    network.eval()
    features = [features_of(processed, section, network, weights, device, batch_size)
                for section in trained.reference]
    spots.patches = Patches(features, device)


def batch_loss(model, network, patches, expression, settings, generator, ranks):
    """The loss of one global batch of B spots, of which this rank has B / R.

    patches: uint8 (B / R, P, P, 3), or features (B / R, 8, F). expression: (B / R, G). Random
    numbers are drawn for the whole batch on every rank, and each rank takes its share.
    """
    n = len(expression) * ranks.world
    patches = augment(patches, ranks.mine(random_turns(n, generator)))
    if settings.colour_jitter:
        patches = stain(patches, ranks.mine(random_stains(n, generator)), settings.colour_jitter)
    if settings.mixup:
        shares = ranks.mine(random_shares(n, settings.mixup, generator))
        patches, expression = mix(patches, shares), mix(expression, shares)
    pixels = to_pixels(patches, network.config)  # (B / R, 3, S, S)
    with command.autocast(ranks.device):
        image, gene, predicted = model(pixels, expression)  # (B / R, D), (B / R, D), (B / R, G)
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


@torch.inference_mode()
def validate(trained, spots, split, batch_size, ranks):
    """The loss over the validation spots, and the score that selects the epoch.

    The validation spots of each section are predicted from the training spots as infer.py would
    predict them, with the recipe's own settings. Returns (loss, Pearson correlation per gene). The
    correlation, (G,), is the mean over sections where it is defined.
    """
    network, settings = trained.network.eval(), trained.settings
    how = PREDICTING[settings.recipe]
    if settings.protocol == "paper":  # spots drawn at random lack neighbours to smooth over
        how = replace(how, smoothing=0.0)
    device = spots.expression.device

    def embed(index):  # (n,) -> (n, D)
        own = encode_patches(network, spots.patches, ranks.mine(index),
                             max(1, batch_size // ranks.world), how.views)
        return parallel.gather_interleaved(own)

    image = embed(split.validation)
    truth = spots.expression[split.validation.to(device)]
    gene = network.encode_expression(truth)
    loss_of = LOSSES[settings.loss]
    loss = sum(loss_of(i, g, network.temperature).item() * len(i)
               for i, g in zip(image.split(batch_size), gene.split(batch_size), strict=True))

    known = spots.expression[split.training.to(device)]
    section = spots.section[split.training.numpy()]
    names, sizes = np.unique(section, return_counts=True)
    order = [name for name in trained.reference if name in names]
    embeddings = {"gene": network.encode_expression(known)}
    if how.retrieval != "gene" and not trained.is_regression:
        embeddings["image"] = embed(split.training)
    sizes = [int(sizes[names == name][0]) for name in order]
    reference = Reference(order, sizes, known.cpu().numpy(), embeddings)
    section, xy = spots.section[split.validation.numpy()], spots.xy[split.validation.numpy()]
    truth, scores = truth.cpu().numpy(), []
    for rows in (np.flatnonzero(section == name) for name in dict.fromkeys(section)):
        predicted = predict(image[rows], xy[rows], reference, how, trained.is_regression)
        scores.append(pearson_per_gene(predicted.expression, truth[rows]))
    return loss / len(image), mean_over_sections(np.stack(scores))


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
