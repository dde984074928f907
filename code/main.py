"""Train HECLIP on the reference sections of a dataset.

    python code/main.py --dataset GSE240429 --type heg                           one GPU, or the CPU
    torchrun --nproc_per_node 8 code/main.py --dataset GSE240429 --type heg      several

reads GSE/<dataset>/processed, and writes save/<dataset>/<type>_best.pt, the epoch with the best validation score,
<type>_losses.csv, and <type>_last.pt, from which --resume goes on. The query section is never opened.

    python code/main.py --dataset GSE240429 --type heg --freeze

leaves the encoder as it was pretrained and trains the heads on its features, which are computed once.
"""

import argparse
import json
import math
import time

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from heclip import command, parallel
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
from heclip.checkpoint import load_progress, save_checkpoint, save_progress
from heclip.dataset import Processed, Run, run_name
from heclip.features import digest, features_of
from heclip.files import InputError, atomic_path
from heclip.loss import LOSSES, regression_loss
from heclip.metrics import mean_defined, pearson_per_gene
from heclip.model import HECLIP, configure, load_encoder_weights
from heclip.recipes import FROZEN, TRAINING
from heclip.retrieval import average_expression, retrieve


def parse(argv=None):
    flags = command.parser("Train HECLIP on the reference sections of a dataset.")
    flags.add_argument("--recipe", choices=list(TRAINING), default="heclip",
                       help="sets the flags from --loss to --wd; see heclip/recipes.py")
    flags.add_argument("--loss", choices=list(LOSSES))
    flags.add_argument("--temperature", type=float, help="of the loss")
    flags.add_argument("--expression_loss", type=command.not_negative, metavar="WEIGHT",
                       help="of a second loss: the squared error of a layer that predicts expression itself; it "
                            "teaches the encoder, and is not used to predict")
    flags.add_argument("--pixels", choices=["standardised", "raw_bgr"],
                       help="standardised as the encoder was pretrained, or 0 to 255 and blue first, as published")
    flags.add_argument("--colour_jitter", type=command.not_negative, metavar="X",
                       help="random stain: each colour channel times 1 ± X, plus up to ± 80 X")
    flags.add_argument("--mixup", type=command.not_negative, metavar="A",
                       help="mix patches and their expression in pairs, in shares drawn from Beta(A, A); 0: none")
    flags.add_argument("--schedule", choices=["cosine", "constant"],
                       help="cosine: the learning rate warms up over a twentieth of the steps and falls to zero")
    flags.add_argument("--lr", type=float, help="learning rate of AdamW for the heads")
    flags.add_argument("--encoder_lr", type=float, help="and for the encoder; default: the same")
    flags.add_argument("--wd", type=float, help="weight decay of AdamW")
    flags.add_argument("--max_epochs", type=command.positive, default=15)
    flags.add_argument("--val_fraction", type=float, default=0.2,
                       help="share of the reference spots kept for validation; 0: train on all, keep the last epoch")
    flags.add_argument("--encoder", default="resnet50",
                       help="any timm model, hf-hub:OWNER/NAME or local-dir:FOLDER; tf_efficientnet_lite0 suits a CPU")
    flags.add_argument("--encoder_args", type=json.loads, metavar="JSON",
                       help="""further arguments of timm.create_model, such as '{"global_pool": "avg"}'""")
    flags.add_argument("--encoder_weights", metavar="FILE", help="local state dict of timm or torchvision")
    flags.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True,
                       help="start from ImageNet weights; --no-pretrained from scratch")
    flags.add_argument("--freeze", action="store_true",
                       help="leave the encoder as pretrained and train the heads on its features, computed once and "
                            "kept in GSE/<dataset>/processed/features; other defaults, see heclip/recipes.py")
    flags.add_argument("--image_size", type=command.positive, metavar="PX",
                       help="side of the encoder's input; default: the patch's own")
    flags.add_argument("--resume", action="store_true",
                       help="go on after the last finished epoch of the same run; start it if there is none")
    flags.set_defaults(**TRAINING["heclip"])  # what --help shows
    known = flags.parse_known_args(argv)[0]
    flags.set_defaults(**TRAINING[known.recipe] | (FROZEN if known.freeze else {}))
    args = flags.parse_args(argv)
    if args.encoder_lr is None:
        args.encoder_lr = args.lr
    if not 0 <= args.val_fraction < 1:
        raise InputError(f"--val_fraction {args.val_fraction}: must lie between 0 and 1")
    if args.temperature <= 0:
        raise InputError(f"--temperature {args.temperature}: must be above 0")
    if args.freeze and args.colour_jitter:
        raise InputError(f"--colour_jitter {args.colour_jitter} with --freeze: features are computed once, of the "
                         "colours as they are. Leave one of them out")
    if args.freeze and not args.pretrained:
        raise InputError("--freeze with --no-pretrained: nothing would ever train the encoder. Leave one of them out")
    return args


def main(argv=None):
    args = parse(argv)
    rank, world, device = parallel.start(command.pick_device(args.device))
    say = print if rank == 0 else lambda *_, **__: None
    if args.freeze and world > 1:
        raise InputError("--freeze under torchrun: heads alone train in seconds. Run it as python code/main.py")
    torch.manual_seed(args.seed)
    name = run_name(args.type, args.protocol)
    run = Run(args.dataset, name, args.save_path)

    # Data: the reference sections' spots, split so that no validation patch shows training tissue.
    processed = Processed(args.dataset)
    table = processed.sections()
    reference, _ = processed.roles(args.query)
    panel_name = run_name(args.panel or args.type, args.protocol)
    panel = processed.panel_for(panel_name, reference)
    patch_px = int(table["patch_px"].iloc[0])
    spots = Spots(processed, reference, panel_name, panel, device)
    training, validation = split_spots(spots, table["crop_px"], args.val_fraction, args.protocol, args.seed)
    if len(training) < 2 or (args.val_fraction and len(validation) < 2):
        raise InputError(f"{len(training)} training and {len(validation)} validation spots are too few: with patches "
                         f"of {table['crop_px'].max()} px, --val_fraction {args.val_fraction} leaves none apart. "
                         "Choose another")
    say(f"{args.dataset} {name}: {len(panel)} genes; {', '.join(reference)}: {len(training)} training and "
        f"{len(validation)} validation spots, {len(spots) - len(training) - len(validation)} between them left out")

    # Model. `network` holds the weights; `model` is the same, with gradients averaged over the ranks if there are some.
    config = configure(args.encoder, "regression" if args.loss == "regression" else args.type, len(panel), patch_px,
                       args.image_size, args.pixels, args.encoder_args, temperature=args.temperature,
                       learned_temperature=args.loss == "clip", expression_head=args.expression_loss > 0)
    network = HECLIP(config)
    if args.pretrained:
        load_encoder_weights(network.image_encoder, args.encoder, args.encoder_weights, config.encoder_args)
    if network.predictor:
        network.predictor.bias.data = spots.expression[training.to(device)].mean(dim=0).cpu()
    network.to(device, memory_format=torch.channels_last)
    if args.compile or (args.compile is None and device.type == "cuda" and not args.freeze):
        network.image_encoder.compile()
        say("the encoder is compiled during the first epoch")
    model = parallel.distribute(network, device)
    encoder = list(network.image_encoder.parameters())
    heads = [parameter for key, parameter in network.named_parameters() if not key.startswith("image_encoder.")]
    optimiser = torch.optim.AdamW([{"params": encoder, "lr": args.encoder_lr}, {"params": heads, "lr": args.lr}],
                                  weight_decay=args.wd, fused=device.type == "cuda")
    loss_of = LOSSES[args.loss]
    frozen = {}
    if args.freeze:  # from here on, features of all 8 symmetries stand in for patches
        network.image_encoder.requires_grad_(False)
        weights = digest(network.image_encoder)
        from_hub = args.encoder.startswith("hf-hub:") and not args.encoder_weights
        frozen = {"frozen": {"weights": weights, "hub": args.encoder if from_hub else None}}
        network.eval()
        spots.patches = Patches([features_of(processed, section, network, weights, device, args.batch_size)
                                 for section in reference], device)
    batch_size = min(args.batch_size, len(training) // world * world)
    if batch_size % world:
        raise InputError(f"--batch_size {batch_size} cannot be shared equally by {world} processes. Choose a multiple")
    say(f"{args.encoder} at {config.image_size} px on {world} x {device.type}; {spots.patches.where()}")

    facts = {"dataset": args.dataset, "name": name, "panel_name": panel_name, "panel": list(panel.index),
             "reference": reference, **frozen,
             "arguments": {key: value for key, value in vars(args).items() if key != "resume"}}
    losses, first = [], 1
    if args.resume and run.last.exists():
        losses = load_progress(run.last, network, optimiser, facts)
        first = len(losses) + 1
        say(f"resuming after epoch {len(losses)}")
    best = max((row.get("validation_pearson", -math.inf) for row in losses), default=-math.inf)
    steps = len(training) // batch_size * args.max_epochs

    # Training. Every epoch sees each training spot once, in another order and another of its 8 symmetries. All that is
    # random in it comes from the seed and the epoch's number, so that a resumed run repeats what it would have been.
    for epoch in range(first, args.max_epochs + 1):
        start = time.perf_counter()
        model.train()
        generator = torch.Generator().manual_seed(args.seed * 100_003 + epoch)
        torch.manual_seed((args.seed * 100_003 + epoch) * world + rank)  # dropout
        order = training[torch.randperm(len(training), generator=generator)]
        batches = order[:len(order) // batch_size * batch_size].split(batch_size)  # the partial last batch is dropped
        mine = [index[rank::world] for index in batches]
        total = torch.zeros((), device=device)
        bar = tqdm(zip(mine, spots.patches.stream(mine), strict=True), f"epoch {epoch}/{args.max_epochs}", len(mine),
                   leave=False, disable=None if rank == 0 else True)
        for step, (index, patches) in enumerate(bar, 1):
            factor = learning_rate_factor((epoch - 1) * len(mine) + step, steps, args.schedule)
            for group, rate in zip(optimiser.param_groups, (args.encoder_lr, args.lr), strict=True):
                group["lr"] = rate * factor
            patches = augment(patches, random_turns(batch_size, generator)[rank::world])
            if args.colour_jitter:
                patches = stain(patches, random_stains(batch_size, generator)[rank::world], args.colour_jitter)
            truth = spots.expression[index.to(device)]  # (B / R, G)
            if args.mixup:
                shares = random_shares(batch_size, args.mixup, generator)[rank::world]
                patches, truth = mix(patches, shares), mix(truth, shares)
            pixels = to_pixels(patches, config)  # (B / R, 3, S, S)
            with command.autocast(device):
                image, expression, predicted = model(pixels, truth)  # (B / R, D), (B / R, D), (B / R, G)
            loss = loss_of(parallel.gather(image.float()), parallel.gather(expression.float()), network.temperature)
            if args.expression_loss:
                loss = loss + args.expression_loss * regression_loss(parallel.gather(predicted.float()),
                                                                     parallel.gather(truth))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.detach()
            if step % 10 == 0 and not bar.disable:  # reading the loss waits for the GPU
                bar.set_postfix(loss=f"{total.item() / step:.3f}")

        train_loss = total.item() / len(batches)
        if not math.isfinite(train_loss):
            raise InputError(f"the training loss of epoch {epoch} is {train_loss}: training has diverged. Lower --lr "
                             f"(now {args.lr}) or raise --temperature (now {args.temperature})")
        speed = len(batches) * batch_size / (time.perf_counter() - start)
        losses.append({"epoch": epoch, "train_loss": train_loss})
        told = f"epoch {epoch}: training loss {train_loss:.3f}"
        keep = True
        if len(validation):
            validation_loss, per_gene = validate(network, spots, training, validation, batch_size, loss_of, rank, world)
            score = mean_defined(per_gene)
            if math.isnan(score):
                raise InputError(f"no gene varies over the {len(validation)} validation spots, so no epoch can be "
                                 "called the best. Raise --val_fraction")
            facts |= {"validation_pearson": score, "validation_pearson_per_gene": per_gene.tolist()}
            losses[-1] |= {"validation_loss": validation_loss, "validation_pearson": score}
            keep, best = score > best, max(score, best)
            told += f", validation loss {validation_loss:.3f}, validation Pearson {score:.4f}{' *' if keep else '  '}"
        say(f"{told}  {speed:,.0f} patches/s", flush=True)
        if rank == 0:
            if keep:
                save_checkpoint(run.checkpoint, network, epoch=epoch, **facts)
            with atomic_path(run.losses) as path:
                pd.DataFrame(losses).to_csv(path, index=False)
            save_progress(run.last, network, optimiser, losses, facts)
    say(f"best: validation Pearson {best:.4f}; model in {run.checkpoint}" if len(validation) else
        f"model of the last epoch in {run.checkpoint}")
    del model  # before the group of processes that it averages over
    parallel.finish()


def learning_rate_factor(step, steps, schedule):
    """What the learning rate of step 1 ... `steps` is multiplied by: 1, or a short rise and half a cosine down to 0."""
    if schedule == "constant":
        return 1.0
    warm = max(1, steps // 20)
    return min(step / warm, (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))) / 2)


@torch.inference_mode()
def validate(model, spots, training, validation, batch_size, loss_of, rank, world):
    """The loss over the validation spots, and what selects the epoch: the task itself, on held-out tissue.

    Each validation patch retrieves its 50 nearest training spots by their expression embeddings (a regression model
    predicts by itself). Returns (loss, Pearson correlation per gene (G,), mean over the sections where it is defined).
    """
    model.eval()
    device = spots.expression.device
    images = parallel.gather_interleaved(
        encode_patches(model, spots.patches, validation[rank::world], max(1, batch_size // world)))  # (n, D)
    truth, reference = spots.expression[validation.to(device)], spots.expression[training.to(device)]
    loss = sum(loss_of(image, expression, model.temperature).item() * len(image)
               for image, expression in zip(images.split(batch_size), model.encode_expression(truth).split(batch_size),
                                            strict=True))
    if model.config.kind == "regression":
        prediction = images.cpu().numpy()  # (n, G)
    else:
        nearest, _ = retrieve(images, model.encode_expression(reference))
        prediction = average_expression(nearest, reference.cpu().numpy())  # (n, G)
    truth, section = truth.cpu().numpy(), spots.section[validation.numpy()]
    scores = np.stack([pearson_per_gene(prediction[section == s], truth[section == s]) for s in dict.fromkeys(section)])
    defined = np.isfinite(scores)
    per_gene = np.where(defined, scores, 0).sum(axis=0) / np.where(defined.any(axis=0), defined.sum(axis=0), np.nan)
    return loss / len(validation), per_gene


if __name__ == "__main__":
    command.run(main)
