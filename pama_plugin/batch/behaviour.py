"""What the policy does, whatever its rewards: distance from the reference, fluency, and agreement with its sampler."""

from torch import Tensor

SAME_MODEL = 0.3  # nats at a token; bfloat16 kernels of one model differ by hundredths


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


def disagreement(sampled_BA: Tensor, log_probs_BA: Tensor, mask_BA: Tensor) -> float:
    """How far sampler and policy are apart: mean of ``|log π_sampler − log π|`` over the tokens of the responses.

    Args:
        sampled_BA: log-probabilities of the tokens by the model that sampled them.
        log_probs_BA: the same by the policy.
        mask_BA: true at tokens of the response.

    Returns:
        Nats at a token; 0 without any token.

    >>> import torch
    >>> mask = torch.tensor([[True, True, False]])
    >>> disagreement(torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, -2.0, -1.0]]), mask)
    0.25
    """
    gaps_BA = (sampled_BA.float() - log_probs_BA.float()).abs().masked_fill(~mask_BA, 0)
    return float(gaps_BA.sum() / mask_BA.sum().clamp(min=1))
