"""The losses against formulas in loops and by hand; HECLIP's gradient by finite differences."""

from math import exp, log

import numpy as np
import pytest
import torch

from heclip.loss import LOSSES, bleep_loss, clip_loss, image_centric_loss, regression_loss

IMAGE = [[1.0, -0.5], [0.3, 0.8], [-0.6, 0.2]]
EXPRESSION = [[0.7, 0.1], [-0.4, 0.9], [0.5, -1.1]]


def softmax(row):
    top = max(row)
    return [exp(value - top) / sum(exp(other - top) for other in row) for value in row]


def slow_loss(image, expression, temperature=1.0):
    """loss_i = - sum_j targets_ji log softmax(logits_i)_j; the mean over i."""
    def products(left, right):
        return [[sum(a * b for a, b in zip(x, y, strict=True)) / temperature for y in right]
                for x in left]

    logits = products(image, expression)
    targets = [softmax(row) for row in products(image, image)]
    losses = []
    for i in range(len(image)):
        likely = softmax(logits[i])
        losses.append(-sum(targets[j][i] * log(likely[j]) for j in range(len(image))))
    return sum(losses) / len(losses)


def test_the_loss_of_two_spots_is_the_one_worked_out_by_hand():
    a = log(3) ** 0.5
    image = torch.tensor([[0.0, 0.0], [0.0, a]])
    expression = torch.tensor([[5.0, 0.0], [-7.0, log(2) / a]])
    # Logits (0, 0) and (0, ln 2): likelihoods (1/2, 1/2) and (1/3, 2/3).
    # Products of the images (0, 0) and (0, ln 3): targets (1/2, 1/2) and (1/4, 3/4), whose columns
    # are taken.
    first = (1 / 2 + 1 / 4) * log(2)
    second = 1 / 2 * log(3) + 3 / 4 * log(3 / 2)
    loss = image_centric_loss(image, expression).item()
    assert loss == pytest.approx((first + second) / 2, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_of_three_spots_equals_the_formula_in_loops(temperature):
    loss = image_centric_loss(torch.tensor(IMAGE), torch.tensor(EXPRESSION), temperature)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(slow_loss(IMAGE, EXPRESSION, temperature), abs=1e-6)


def test_the_temperature_is_one_by_default_and_matters():
    image, expression = torch.tensor(IMAGE), torch.tensor(EXPRESSION)
    assert image_centric_loss(image, expression) == image_centric_loss(image, expression, 1.0)
    warmer = image_centric_loss(image, expression, 2.0)
    assert abs(image_centric_loss(image, expression) - warmer) > 0.01


def test_the_targets_are_transposed_as_published():
    # One image is far longer than the other, so the two ways differ by much.
    image, expression = [[3.0, 0.0], [0.5, 0.2]], [[1.0, -2.0], [0.4, 0.7]]
    fast = image_centric_loss(torch.tensor(image), torch.tensor(expression)).item()
    similar = torch.softmax(torch.tensor(image) @ torch.tensor(image).T, dim=1)
    likely = torch.log_softmax(torch.tensor(image) @ torch.tensor(expression).T, dim=1)
    assert abs(fast - -(similar * likely).sum(1).mean().item()) > 0.05
    assert fast == pytest.approx(slow_loss(image, expression), abs=1e-6)


def test_the_order_of_the_spots_does_not_count():
    rng = np.random.default_rng(0)
    image, expression = torch.from_numpy(rng.normal(0, 1, (2, 12, 5))).float()
    order = torch.from_numpy(rng.permutation(12))
    assert torch.allclose(image_centric_loss(image, expression),
                          image_centric_loss(image[order], expression[order]))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_flow_to_both_embeddings_and_through_the_targets(temperature):
    image, expression = (torch.tensor(x, requires_grad=True) for x in (IMAGE, EXPRESSION))
    image_centric_loss(image, expression, temperature).backward()
    step = 1e-6  # the formula in loops is in double precision
    for values, gradient in ((IMAGE, image.grad), (EXPRESSION, expression.grad)):
        for i in range(3):
            for d in range(2):
                sides = []
                for sign in (step, -step):
                    moved = [list(row) for row in values]
                    moved[i][d] += sign
                    pair = (moved, EXPRESSION) if values is IMAGE else (IMAGE, moved)
                    sides.append(slow_loss(*pair, temperature))
                assert gradient[i, d].item() == pytest.approx(
                    (sides[0] - sides[1]) / (2 * step), abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_loss_is_computed_in_float32_whatever_the_embeddings_type(dtype):
    image, expression = torch.tensor(IMAGE).to(dtype), torch.tensor(EXPRESSION).to(dtype)
    loss = image_centric_loss(image, expression)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_loss(image.tolist(), expression.tolist()), abs=1e-6)


def test_long_embeddings_give_a_finite_loss():
    # products far beyond exp's range
    image = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) * 10
    assert torch.isfinite(image_centric_loss(image, image))


# ---------------------------------------------------------------- the losses it is compared with


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def cross_entropy(logits, targets):
    """Mean over rows of - sum_j targets_ij log softmax(logits_i)_j."""
    return sum(-dot(target, map(log, softmax(row)))
               for row, target in zip(logits, targets, strict=True)) / len(logits)


def transposed(matrix):
    return [list(column) for column in zip(*matrix, strict=True)]


def slow_clip(image, expression, temperature):
    def cosine(x, y):
        return dot(x, y) / (dot(x, x) * dot(y, y)) ** 0.5

    logits = [[cosine(x, y) / temperature for y in expression] for x in image]
    own = [[float(i == j) for j in range(len(image))] for i in range(len(image))]
    return (cross_entropy(logits, own) + cross_entropy(transposed(logits), own)) / 2


def slow_bleep(image, expression, temperature):
    n = range(len(image))
    logits = [[dot(y, x) / temperature for x in image] for y in expression]
    alike = [[(dot(image[i], image[j]) + dot(expression[i], expression[j])) / 2 for j in n]
             for i in n]
    targets = [softmax([value * temperature for value in row]) for row in alike]
    other_way = cross_entropy(transposed(logits), transposed(targets))
    return (cross_entropy(logits, targets) + other_way) / 2


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(("fast", "slow"), [(clip_loss, slow_clip), (bleep_loss, slow_bleep)])
def test_the_two_sided_losses_equal_their_formulas_in_loops(fast, slow, temperature):
    loss = fast(torch.tensor(IMAGE), torch.tensor(EXPRESSION), temperature)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(slow(IMAGE, EXPRESSION, temperature), rel=1e-5)


def test_clip_of_two_spots_is_worked_out_by_hand_and_length_does_not_count():
    image = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    expression = torch.tensor([[2.0, 0.0], [0.0, 7.0]])
    # Cosines 1 and 0, divided by 1 / ln 3: likelihoods 3/4 and 1/4 on every row and column.
    assert clip_loss(image, expression, 1 / log(3)).item() == pytest.approx(log(4 / 3))
    assert clip_loss(image, expression.flip(0), 1 / log(3)).item() == pytest.approx(log(4))


def test_a_learned_temperature_has_the_gradient_of_the_formula():
    temperature = torch.tensor(0.5, requires_grad=True)
    clip_loss(torch.tensor(IMAGE), torch.tensor(EXPRESSION), temperature).backward()
    step = 1e-5
    slope = (slow_clip(IMAGE, EXPRESSION, 0.5 + step)
             - slow_clip(IMAGE, EXPRESSION, 0.5 - step)) / (2 * step)
    assert temperature.grad.item() == pytest.approx(slope, rel=1e-3)


def test_regression_is_the_mean_squared_error_whatever_the_temperature():
    predicted = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    expression = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert regression_loss(predicted, expression).item() == pytest.approx((4 + 9) / 4)
    assert regression_loss(predicted, expression, 7.0) == regression_loss(predicted, expression)


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_loss_is_finite_float32_for_long_half_precision_embeddings_and_so_is_its_gradient(
        name):
    drawn = 10 * torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    image, expression = drawn.bfloat16()
    image.requires_grad_()
    loss = LOSSES[name](image, expression, 0.1)
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(image.grad).all()
