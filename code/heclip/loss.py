"""The image-centric contrastive loss: a pure function of a batch's embeddings."""

import torch
import torch.nn.functional as F


def image_centric_loss(image, expression, temperature=1.0):
    """HECLIP's loss: each image finds its expression; images that look alike share their targets.

    With unnormalised embeddings I (`image`) and E (`expression`), both (B, D), and temperature T:
    logits = I Eᵀ / T, targets = softmax over rows of I Iᵀ / T, loss_i = - sum_j targets_ji log softmax(logits_i)_j.
    As published, the targets are transposed (their rows need not sum to 1) and gradients flow through them.
    Returns the mean over i. Computed in float32 whatever the embeddings' type.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, expression = image.float(), expression.float()
        logits = image @ expression.T / temperature  # (B, B)
        targets = F.softmax(image @ image.T / temperature, dim=1)  # (B, B)
        return -(targets.T * F.log_softmax(logits, dim=1)).sum(dim=1).mean()
