"""What the policy does, whatever its rewards: distance from the reference, fluency, and agreement with its sampler."""

from torch import Tensor

SAME_MODEL = 0.1  # nats per token; the rounding of kernels, hundredths at a token, mostly cancels


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


def divergence(sampled_B: Tensor, policy_B: Tensor, tokens_B: Tensor) -> float:
    """KL divergence of the policy from the model that sampled, ``Σ_b log π_sampler − log π``, in nats per token.

    Args:
        sampled_B: log-probabilities of the responses by the model that sampled them; NaN where they are not known.
        policy_B: the same by the policy.
        tokens_B: number of tokens of each response.

    Returns:
        0 on average if both are the same model, and if no response is known.

    >>> import torch
    >>> divergence(torch.tensor([-3.0, torch.nan]), torch.tensor([-4.0, -1.0]), torch.tensor([2, 2]))
    0.5
    """
    known_B = ~sampled_B.isnan()
    gaps_B = (sampled_B - policy_B).masked_fill(~known_B, 0)
    return float(gaps_B.sum() / (tokens_B * known_B).sum().clamp(min=1))
