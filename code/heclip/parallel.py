"""Training on several processes (torchrun): this process's rank, and the exchange of embeddings.

R ranks, B global batch. Each rank encodes B / R spots. The loss is computed on all B, so that the
contrastive batch is the global one, whatever the number of processes.
"""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist

from .files import InputError


class Ranks(NamedTuple):
    """This process among those that train together: its rank, their number, and its device."""

    rank: int
    world: int
    device: torch.device

    def mine(self, rows):
        """This rank's share of the rows of a global batch: every R-th."""
        return rows[self.rank::self.world]


def start(device):
    """Join the processes that torchrun started. Returns Ranks.

    Raises InputError for several processes on a device that is neither a GPU nor the CPU.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Ranks(0, 1, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise InputError(f"torchrun with --device {device.type}: several processes need GPUs or "
                         "the CPU")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), world, device)


def distribute(model, device):
    """Average the gradients of `model` over all ranks, and on GPUs its batch-norm statistics."""
    if not dist.is_initialized():
        return model
    if device.type == "cuda":
        import timm

        model = timm.layers.convert_sync_batchnorm(model)  # knows timm's own batch-norm layers
    own = [device] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=own)


class Gather(torch.autograd.Function):
    """Rows of each rank, (B / R, D) -> all rows, (B, D), rank by rank.

    The gradient of each row returns to its rank.
    """

    @staticmethod
    def forward(ctx, rows):
        everyones = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, rows.contiguous())
        return torch.cat(everyones)

    @staticmethod
    def backward(ctx, gradient):
        # Every rank computes the loss of the whole batch, so this sums R equal shares. Averaging
        # parameter gradients over ranks then divides by R. What remains is the gradient that a
        # single process would have.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(rows):
    """All ranks' rows, with gradient: (B / R, D) -> (B, D). A single process gets its own rows."""
    return Gather.apply(rows) if dist.is_initialized() else rows


def gather_interleaved(rows):
    """All ranks' rows, without gradient, in the order before each rank took every R-th: (n, D)."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows.cpu())
    whole = torch.empty(sum(map(len, parts)), rows.shape[1], dtype=rows.dtype)
    for rank, part in enumerate(parts):
        whole[rank::len(parts)] = part
    return whole.to(rows.device)


def finish():
    """Leave the group of processes together, because one that leaves early can stop the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
