"""log_q_correction and sampled_softmax_loss, against plain sums and a full softmax."""

import math

import pytest
import torch

from recis_lightning.retrieval import log_q_correction, sampled_softmax_loss


def vectors(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator, dtype=torch.float64)
    return made.requires_grad_()


def truth(queries, items, ids, probabilities, temperature):
    """Return the loss by plain Python, a query at a time."""
    total = 0.0
    for row, query in enumerate(queries):
        scores = {
            at: float(query @ item) / temperature
            - (0 if probabilities is None else math.log(probabilities[at]))
            for at, item in enumerate(items)
            if at == row or ids[at] != ids[row]
        }
        total += math.log(sum(map(math.exp, scores.values()))) - scores[row]
    return total / len(queries)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("with_probabilities", [False, True])
@pytest.mark.parametrize("num_more", [0, 4])
def test_the_loss_is_that_of_plain_sums(dtype, with_probabilities, num_more):
    """Ids that occur again, in the batch and among the drawn, are no negatives of their own."""
    queries, items = vectors(5, 3), vectors(5 + num_more, 3, seed=1)
    ids = torch.tensor([7, -3, 7, 0, 5, 5, 9, 7, 8][: len(items)], dtype=dtype)
    probabilities = torch.tensor([0.5, 0.1, 0.5, 0.01, 0.2, 0.2, 0.3, 1.0, 1e-9])[: len(items)]
    given = probabilities if with_probabilities else None
    loss = sampled_softmax_loss(queries, items, ids, given, temperature=0.7)
    wanted = truth(
        queries.detach(),
        items.detach(),
        ids.tolist(),
        None if given is None else given.tolist(),
        0.7,
    )
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    loss.backward()
    assert queries.grad.isfinite().all()
    assert items.grad.isfinite().all()


def test_a_query_whose_negatives_are_all_its_own_item_has_no_loss():
    loss = sampled_softmax_loss(vectors(3, 2), vectors(3, 2), torch.tensor([4, 4, 4]))
    assert loss.item() == 0


def test_the_correction_makes_a_sampled_sum_unbiased():
    """The mean over all draws of exp(corrected scores) is the sum over all items, exactly."""
    scores = vectors(6).detach()
    probabilities = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01], dtype=torch.float64)
    corrected = log_q_correction(scores, probabilities).exp()
    assert (probabilities * corrected).sum().item() == pytest.approx(scores.exp().sum().item())


def test_an_empty_batch_has_no_loss_and_a_gradient():
    queries, items = vectors(0, 3), vectors(2, 3)
    loss = sampled_softmax_loss(queries, items, torch.tensor([1, 2]), torch.tensor([0.5, 0.5]))
    assert loss.item() == 0
    loss.backward()
    assert items.grad.tolist() == [[0.0] * 3] * 2
    assert sampled_softmax_loss(queries, items[:0], torch.empty(0, dtype=torch.int64)).item() == 0


def test_bfloat16_logits_stay_bfloat16():
    logits = log_q_correction(torch.zeros(2, 3, dtype=torch.bfloat16), torch.full((3,), 0.25))
    assert logits.dtype is torch.bfloat16
    assert logits.float().sub(math.log(4)).abs().max() < 0.01


TWO, IDS = torch.zeros(2, 3), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((TWO[0], TWO, IDS), ValueError, r"queries, items: expected \[b, dim\]"),
        ((TWO, TWO[:, :2], IDS), ValueError, r"got \[2, 3\] and \[2, 2\]"),
        ((TWO, TWO[:1], IDS[:1]), ValueError, "items: expected one for each of 2 queries"),
        ((TWO, TWO, IDS[:1]), ValueError, r"item_ids: expected shape \[2\], got \[1\]"),
        ((TWO, TWO, IDS.float()), TypeError, "item_ids: expected dtype"),
        ((TWO.long(), TWO, IDS), TypeError, "queries: expected a floating Tensor"),
        ((TWO, [[0.0]], IDS), TypeError, "items: expected a floating Tensor, got list"),
        ((TWO, TWO, IDS, IDS), TypeError, "probabilities: expected a floating Tensor"),
        ((TWO, TWO, IDS, torch.ones(3)), ValueError, r"probabilities: expected shape \[2\]"),
        ((TWO, TWO, IDS, torch.tensor([0.0, 1.0])), ValueError, r"all in \(0, 1\]"),
        ((TWO, TWO, IDS, torch.tensor([1.1, 1.0])), ValueError, r"all in \(0, 1\]"),
        ((TWO, TWO, IDS, torch.tensor([math.nan, 1.0])), ValueError, r"all in \(0, 1\]"),
        ((TWO, TWO, IDS, None, 0), ValueError, "temperature: expected a number > 0"),
        ((TWO, TWO, IDS, None, math.nan), ValueError, "temperature"),
        ((TWO, TWO, IDS, None, "1"), TypeError, "temperature"),
    ],
)
def test_wrong_arguments_are_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        sampled_softmax_loss(*arguments)
