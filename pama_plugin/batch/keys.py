"""Keys of the metrics in the trackers, and of the columns in which OpenRLHF transports them. Imports nothing."""

# Prefixes of columns: OpenRLHF transports one number per response and key. The trainer removes the columns, except for
# problem codes, which are removed when the table is built.
REWARD, SECONDS, PROBLEM = "reward/", "seconds/", "pama/problem/"
SAMPLED = "pama/sampled_log_prob"  # the log-probability of a response by vLLM; removed when it has been compared
FAILURES, ABSTAINED = "pama/failures/", "pama/abstained/"
PAMA, EXPLAINED = "pama/", "explained_variance/"
OUR_COLUMNS = (REWARD, SECONDS, PAMA, EXPLAINED)
# Keys and prefixes of metrics that are no columns.
ACTIVE, CONFLICT, STEPS_AT_FRONT = f"{PAMA}active_fraction", f"{PAMA}conflict_rate", f"{PAMA}steps_at_front"
KL, REFERENCE_NLL, UNIFORM = f"{PAMA}kl_response", f"{PAMA}reference_nll", f"{PAMA}uniform_prompts"
SPREAD, AT_BEST, GROUP_CORRELATION = f"{PAMA}spread/", f"{PAMA}at_best/", f"{PAMA}group_correlation/"
PREFERENCE, FOLLOWS = f"{PAMA}preference/", f"{PAMA}follows/"
COEFFICIENT, GAIN = f"{PAMA}coefficient/", f"{PAMA}gain/"
GRADIENT, REWARD_MEAN, REWARD_STD = f"{PAMA}gradient_", "reward_mean/", "reward_std/"
COSINE = f"{GRADIENT}cosine/"
CRITIC_LOSS, REWARD_TIMING = "critic_loss/", "timing/reward/"
# Of evaluations; OpenRLHF adds the prefix ``eval/``.
ALL = "all"  # name of the union of all datasets
OVER_ALL = f"eval_{ALL}/"
AT_PREFERENCE, FOLLOWED = "eval_preference/", "eval_follows/"


def label(preference: tuple[float, ...]) -> str:
    """A preference as part of a metric key.

    >>> label((0.25, 0.75)), label((1 / 3, 2 / 3))
    ('0.25_0.75', '0.333_0.667')
    """
    return "_".join(f"{weight:.3g}" for weight in preference)
