"""The image-centric contrastive loss, and the losses it is compared with, as pure functions.

The contrastive losses take image and expression embeddings of a batch, (B, D) each, and the
temperature T. All return a scalar, computed in float32 whatever the type of the embeddings.
"""

import torch
import torch.nn.functional as F


def image_centric_loss(image, expression, temperature=1.0):
    """HECLIP's loss: each image finds its expression; images that look alike share their targets.

    With unnormalised embeddings I (`image`) and E (`expression`), both (B, D), and temperature T:
    logits = I Eᵀ / T,
    targets = softmax over rows of I Iᵀ / T,
    loss_i = - sum_j targets_ji log softmax(logits_i)_j.
    As published, the targets are transposed (their rows need not sum to 1), and gradients flow
    through them. Returns the mean over i.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, expression = image.float(), expression.float()
        logits = image @ expression.T / temperature  # (B, B)
        targets = F.softmax(image @ image.T / temperature, dim=1)  # (B, B)
        return -(targets.T * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def clip_loss(image, expression, temperature):
    """Each image finds its expression and each expression its image, by cosine.

    image, expression: (B, D). As in Radford et al., ICML 2021.
    """
    with torch.autocast(image.device.type, enabled=False):
        image = F.normalize(image.float(), dim=1)
        expression = F.normalize(expression.float(), dim=1)
        logits = image @ expression.T / temperature  # (B, B)
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def bleep_loss(image, expression, temperature=1.0):
    """Both directions, with targets smoothed by how alike the images and the expressions are.

    image, expression: (B, D) I and E. With
    logits = E Iᵀ / T,
    targets = softmax over rows of (I Iᵀ + E Eᵀ) / 2 · T,
    it is the mean of the cross-entropies of the rows and of the columns (Xie et al., NeurIPS 2023).
    """
    with torch.autocast(image.device.type, enabled=False):
        image, expression = image.float(), expression.float()
        logits = expression @ image.T / temperature  # (B, B)
        alike = (image @ image.T + expression @ expression.T) / 2
        targets = F.softmax(alike * temperature, dim=1)  # (B, B)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets.T)) / 2


def regression_loss(predicted, expression, temperature=None):
    """Mean squared error of the predicted expression, (B, G) each. The temperature is not used."""
    with torch.autocast(predicted.device.type, enabled=False):
        return F.mse_loss(predicted.float(), expression.float())


LOSSES = {"image_centric": image_centric_loss, "clip": clip_loss, "bleep": bleep_loss,
          "regression": regression_loss}
