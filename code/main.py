"""Train HECLIP on the reference sections of a dataset.

    python code/main.py --dataset GSE240429 --type heg

reads GSE/<dataset>/processed, and writes save/<dataset>/<type>_best.pt, the epoch with the best validation score, and
<type>_losses.csv. The query section is never opened.
"""

import argparse
import math

import pandas as pd
import torch
from tqdm import tqdm

from heclip import command
from heclip.batches import Spots, augment, split_spots, to_pixels
from heclip.checkpoint import save_checkpoint
from heclip.dataset import Processed, Run, run_name
from heclip.files import InputError, atomic_path
from heclip.loss import image_centric_loss
from heclip.metrics import mean_defined, pearson_per_gene
from heclip.model import HECLIP, configure, load_encoder_weights
from heclip.retrieval import average_expression, retrieve


def parse(argv=None):
    flags = command.parser("Train HECLIP on the reference sections of a dataset.")
    flags.add_argument("--max_epochs", type=command.positive, default=15)
    flags.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW")
    flags.add_argument("--wd", type=float, default=1e-3, help="weight decay of AdamW")
    flags.add_argument("--temperature", type=float, default=1.0, help="of the loss; 4 did as well on some data")
    flags.add_argument("--val_fraction", type=float, default=0.2,
                       help="share of the reference spots kept for validation")
    flags.add_argument("--encoder", default="resnet50", help="any timm model; tf_efficientnet_lite0 suits a CPU")
    flags.add_argument("--encoder_weights", metavar="FILE", help="local state dict of timm or torchvision")
    flags.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True,
                       help="start from ImageNet weights; --no-pretrained from scratch")
    flags.add_argument("--image_size", type=command.positive, metavar="PX",
                       help="side of the encoder's input; default: the patch's own")
    args = flags.parse_args(argv)
    if not 0 < args.val_fraction < 1:
        raise InputError(f"--val_fraction {args.val_fraction}: must lie between 0 and 1")
    if args.temperature <= 0:
        raise InputError(f"--temperature {args.temperature}: must be above 0")
    return args


def main(argv=None):
    args = parse(argv)
    torch.manual_seed(args.seed)
    device = command.pick_device(args.device)
    name = run_name(args.type, args.protocol)
    run = Run(args.dataset, name, args.save_path)

    # Data: the reference sections' spots, split so that no validation patch shows training tissue.
    processed = Processed(args.dataset)
    table = processed.sections()
    panel = processed.panel(name)
    reference = list(table.index[table["role"] == "reference"])
    patch_px = int(table["patch_px"].iloc[0])
    spots = Spots(processed, reference, name, panel, device)
    training, validation = split_spots(spots, patch_px, args.val_fraction, args.protocol, args.seed)
    if len(training) < 2 or len(validation) < 2:
        raise InputError(f"{len(training)} training and {len(validation)} validation spots are too few: with patches "
                         f"of {patch_px} px, --val_fraction {args.val_fraction} leaves none apart. Choose another")
    print(f"{args.dataset} {name}: {len(panel)} genes; {', '.join(reference)}: {len(training)} training and "
          f"{len(validation)} validation spots, {len(spots) - len(training) - len(validation)} between them left out")

    # Model.
    config = configure(args.encoder, args.type, len(panel), patch_px, args.image_size, temperature=args.temperature)
    model = HECLIP(config)
    if args.pretrained:
        load_encoder_weights(model.image_encoder, args.encoder, args.encoder_weights)
    model.to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.wd)

    # Training. Every epoch sees each training spot once, in another order and another of its 8 symmetries.
    generator = torch.Generator().manual_seed(args.seed)
    batch_size = min(args.batch_size, len(training))
    losses, best = [], -math.inf
    for epoch in range(1, args.max_epochs + 1):
        model.train()
        order = training[torch.randperm(len(training), generator=generator)]
        batches = order[:len(order) // batch_size * batch_size].split(batch_size)  # the partial last batch is dropped
        total = torch.zeros((), device=device)
        bar = tqdm(batches, desc=f"epoch {epoch}/{args.max_epochs}", leave=False, disable=None)
        for step, index in enumerate(bar, 1):
            pixels = to_pixels(augment(spots.patches[index], generator), config)  # (B, 3, S, S)
            with command.autocast(device):
                image, expression = model(pixels, spots.expression[index.to(device)])  # (B, D), (B, D)
            loss = image_centric_loss(image, expression, config.temperature)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.detach()
            if step % 10 == 0:  # reading the loss waits for the GPU
                bar.set_postfix(loss=f"{total.item() / step:.3f}")

        train_loss = total.item() / len(batches)
        if not math.isfinite(train_loss):
            raise InputError(f"the training loss of epoch {epoch} is {train_loss}: training has diverged. Lower --lr "
                             f"(now {args.lr}) or raise --temperature (now {args.temperature})")
        validation_loss, score = validate(model, spots, training, validation, batch_size)
        if math.isnan(score):
            raise InputError(f"no gene varies over the {len(validation)} validation spots, so no epoch can be called "
                             "the best. Raise --val_fraction")
        losses.append({"epoch": epoch, "train_loss": train_loss, "validation_loss": validation_loss,
                       "validation_pearson": score})
        print(f"epoch {epoch}: training loss {train_loss:.3f}, validation loss {validation_loss:.3f}, "
              f"validation Pearson {score:.4f}{' *' if score > best else ''}", flush=True)
        if score > best:
            best = score
            save_checkpoint(run.checkpoint, model, dataset=args.dataset, name=name, panel=list(panel.index),
                            reference=reference, epoch=epoch, validation_pearson=score, arguments=vars(args))
        with atomic_path(run.losses) as path:
            pd.DataFrame(losses).to_csv(path, index=False)
    print(f"best: validation Pearson {best:.4f}; model in {run.checkpoint}")


@torch.inference_mode()
def validate(model, spots, training, validation, batch_size):
    """Loss over the validation spots, and the score that selects the epoch: the task itself, on held-out tissue.

    Each validation patch retrieves its 50 nearest training spots by their expression embeddings; the score is the
    mean Pearson correlation per gene within each section, averaged over sections and genes.
    """
    model.eval()
    loss, images = 0.0, []
    for index in validation.split(batch_size):
        with command.autocast(spots.expression.device):
            image, expression = model(to_pixels(spots.patches[index], model.config),
                                      spots.expression[index.to(spots.expression.device)])
        loss += image_centric_loss(image, expression, model.config.temperature).item() * len(index)
        images.append(image.float())
    reference = spots.expression[training.to(spots.expression.device)]
    nearest, _ = retrieve(torch.cat(images), model.encode_expression(reference))
    prediction = average_expression(nearest, reference.cpu().numpy())  # (n_validation, G)
    truth = spots.expression[validation.to(spots.expression.device)].cpu().numpy()
    section = spots.section[validation.numpy()]
    scores = [mean_defined(pearson_per_gene(prediction[section == s], truth[section == s])) for s in set(section)]
    return loss / len(validation), sum(scores) / len(scores)


if __name__ == "__main__":
    command.run(main)
