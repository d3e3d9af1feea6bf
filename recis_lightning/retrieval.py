"""Losses of two-tower retrieval: sampled softmax, with its logQ correction."""

from __future__ import annotations

import torch
from torch import Tensor

from recis_lightning.arguments import check_bound, check_ids


def log_q_correction(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Return ``logits - log(probabilities)``, for a softmax over candidates that were sampled.

    A softmax over a sample counts a candidate as often as it is drawn. Less the logarithm of that
    probability, its sums estimate, up to a factor, those over all candidates.

    Args:
        logits: [*, n], floating; scores of n candidates.
        probabilities: [n] floating, with which each candidate is drawn, in (0, 1]; as of
            ``HashTable.sample`` and ``HashTable.sampling_probabilities``.

    Returns:
        [*, n] in the dtype of ``logits``.

    Raises:
        TypeError: An argument is no floating tensor.
        ValueError: The shapes do not fit, or a probability is not in (0, 1].

    Example:
        >>> log_q_correction(torch.zeros(2), torch.tensor([1.0, 0.5]))
        tensor([0.0000, 0.6931])

    Source: Bengio and Senécal, "Adaptive importance sampling to accelerate training of a neural
    probabilistic language model", 2008; Yi et al., "Sampling-bias-corrected neural modeling for
    large corpus item recommendations", 2019.
    """
    _check_floating("logits", logits)
    _check_floating("probabilities", probabilities)
    if probabilities.dim() != 1 or logits.shape[-1:] != probabilities.shape:
        raise ValueError(
            f"probabilities: expected shape {list(logits.shape[-1:])}, one for each of the last "
            f"dimension of logits, got {list(probabilities.shape)}"
        )
    if not bool(((probabilities > 0) & (probabilities <= 1)).all()):  # NaN is neither
        raise ValueError(
            "probabilities: expected all in (0, 1]; an id that was never drawn or counted has 0"
        )
    return logits - probabilities.double().log().to(logits.device, logits.dtype)


def sampled_softmax_loss(
    queries: Tensor,
    items: Tensor,
    item_ids: Tensor,
    probabilities: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return the mean softmax cross entropy of each query's item among all items of the batch.

    The first items belong to the queries, one each, in their order, and are negatives for the other
    queries ("in-batch"); more items may follow, which are negatives for all. An item with the id of
    a query's own is no negative for it. With ``probabilities``, logits are corrected by
    ``log_q_correction``.

    On several ranks each takes its own batch, and negatives from it; DDP averages the gradients.

    Args:
        queries: [b, dim], floating.
        items: [n, dim] of the same dtype, n >= b.
        item_ids: int64 or int32 [n].
        probabilities: [n], with which each item came into the batch: for in-batch negatives their
            share of training samples, as ``HashTable.sampling_probabilities``; for drawn ones those
            of ``HashTable.sample``. None corrects nothing.
        temperature: What scores are divided by, > 0; small for vectors of length 1.

    Returns:
        A scalar in the dtype of ``queries``; 0 for an empty batch.

    Raises:
        TypeError, ValueError: An argument is not what it should be.

    Example:
        Three equal scores, of which the last is the query's own item once more:

        >>> ids = torch.tensor([7, 8, 7])
        >>> sampled_softmax_loss(torch.zeros(1, 2), torch.zeros(3, 2), ids)  # log(2)
        tensor(0.6931)

    Source: Yi et al., 2019, equation 3, who correct the score of the query's own item too; drawn
    negatives beside those in the batch: Yang et al., "Mixed negative sampling for learning
    two-tower neural networks in recommendations", 2020.
    """
    _check_floating("queries", queries)
    _check_floating("items", items)
    ids = check_ids(item_ids, "item_ids")
    check_bound("temperature", temperature)
    if temperature == 0:
        raise ValueError("temperature: expected a number > 0, got 0")
    num_queries, num_items = len(queries) if queries.dim() else 0, items.shape[:1]
    if queries.dim() != 2 or items.dim() != 2 or queries.shape[1] != items.shape[1]:
        raise ValueError(
            f"queries, items: expected [b, dim] and [n, dim], got {list(queries.shape)} and "
            f"{list(items.shape)}"
        )
    if len(items) < num_queries:
        raise ValueError(
            f"items: expected one for each of {num_queries} queries at least, got {len(items)}"
        )
    if ids.shape != num_items:
        raise ValueError(f"item_ids: expected shape {list(num_items)}, got {list(ids.shape)}")
    logits = queries @ items.T / temperature
    if probabilities is not None:
        logits = log_q_correction(logits, probabilities)
    if not num_queries:
        return logits.sum()  # 0, with a gradient
    ids = ids.to(logits.device)
    own = torch.arange(num_queries, device=logits.device)
    is_own_again = ids[:num_queries, None] == ids
    is_own_again[own, own] = False
    logits = logits.masked_fill(is_own_again, -torch.inf)
    return torch.nn.functional.cross_entropy(logits, own)


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a floating Tensor, got {got}")


__all__ = ["log_q_correction", "sampled_softmax_loss"]
