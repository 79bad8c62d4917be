"""What the policy does, whatever its rewards: distance from the reference, and fluency."""

from torch import Tensor


def distance(log_probs_BA: Tensor, reference_BA: Tensor, mask_BA: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of each response from the reference model, and how likely the reference finds it.

    Args:
        log_probs_BA: log-probabilities of the tokens by the policy.
        reference_BA: the same by the reference.
        mask_BA: true at tokens of the response.

    Returns:
        (B,) ``Σ_t log π − log π_ref``, a one-sample estimate of the KL divergence in nats per response; and (B,) the
        mean of ``−log π_ref`` over the tokens of the response, NaN for an empty one.

    >>> import torch
    >>> policy, reference = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-2.0, -4.0, -9.0]])
    >>> distance(policy, reference, torch.tensor([[True, True, False]]))
    (tensor([3.]), tensor([3.]))
    """
    reference_BA = reference_BA.float()
    nats_B = (log_probs_BA.float() - reference_BA).masked_fill(~mask_BA, 0).sum(1)
    return nats_B, -reference_BA.masked_fill(~mask_BA, 0).sum(1) / mask_BA.sum(1)
