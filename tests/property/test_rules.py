"""Every built-in rule has the properties of ``pama_plugin.testing``, with listed exceptions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pama_plugin import aggregate, available_rules
from pama_plugin.aggregation import get_rule
from pama_plugin.testing import PROPERTIES, check_rule

pytestmark = pytest.mark.property

SETTINGS = {
    "pama, token": ("pama", {}),
    "pama, sequence": ("pama", dict(level="sequence")),
    "pama, batch": ("pama", dict(level="batch")),
    "pama, Noon": ("pama", dict(noon=True)),
    "pama, Noon by sequence": ("pama", dict(level="sequence", noon=True)),
    "pama, soft": ("pama", dict(soft=3.0)),
    "pama, soft and Noon": ("pama", dict(soft=3.0, noon=True)),
    "pama, leak": ("pama", dict(leak=0.2, noon=True)),
    "pama, not rescaled": ("pama", dict(rescale="none")),
    "pama, whitened": ("pama", dict(whiten=True)),
    "linear": ("linear", {}),
    "linear, sequence": ("linear", dict(level="sequence")),
    "min_norm, sequence": ("min_norm", dict(level="sequence")),
    "gram:upgrad, sequence": ("gram:upgrad", dict(level="sequence")),
    "ctwa, sequence": ("ctwa", dict(level="sequence")),
    "morlhf": ("morlhf", {}),
    "min_norm": ("min_norm", {}),
    "min_norm, Noon": ("min_norm", dict(noon=True)),
    "gdpo": ("gdpo", {}),
    "gdpo, as published": ("gdpo", dict(whiten_sum=True)),
    "gd2po": ("gd2po", {}),
    "gd2po, as published": ("gd2po", dict(whiten_sum=True)),
    "rvpo": ("rvpo", {}),
    "rvpo, whitened": ("rvpo", dict(whiten_sum=True)),
    "dvao": ("dvao", {}),
    "saw": ("saw", {}),
    "saw, as published": ("saw", dict(whiten_sum=True)),
    "ctwa": ("ctwa", {}),
    "pareto_rank": ("pareto_rank", {}),
    "tchebycheff": ("tchebycheff", {}),
    "tchebycheff, augmented": ("tchebycheff", dict(augment=0.1)),
    "tchebycheff, smooth": ("tchebycheff", dict(smooth=0.5)),
    "lagrangian": (
        "lagrangian",
        dict(violations_K=lambda k: [None] * (k - 1) + [0.5]),
    ),
    "gram:upgrad": ("gram:upgrad", {}),
    "gram:upgrad, balanced": ("gram:upgrad", dict(balance=0.5)),
    "gram:cagrad": ("gram:cagrad", {}),
    "gram:pcgrad": ("gram:pcgrad", {}),
    "gram:imtl_g": ("gram:imtl_g", {}),
    "gram:aligned_mtl": ("gram:aligned_mtl", {}),
}

WHITEN = {"gdpo", "gdpo, as published", "gd2po", "gd2po, as published", "rvpo", "rvpo, whitened", "pareto_rank"}
WHITEN |= {"saw", "saw, as published", "pama, whitened"}
WITHOUT_UNIT = {"morlhf", "tchebycheff", "tchebycheff, augmented", "tchebycheff, smooth", "gd2po, as published"}
WITHOUT_UNIT |= {"pama, batch", "pama, not rescaled"}

# Properties that a rule does not have, and the reason.
EXCEPT = {
    **{
        (setting, "scale_of_one_objective_does_not_matter"): "it does not whiten each objective"
        for setting in SETTINGS.keys() - WHITEN
    },
    **{
        (setting, "independent_objectives_come_out_at_unit_rms"): "it is not rescaled, or has no unit size"
        for setting in WITHOUT_UNIT
    },
    ("pama, whitened", "metrics_are_what_they_say"): "the metrics describe the whitened advantages",
    **{
        (rule, "coefficients_follow_the_order"): "coefficients are not unique if the Gram matrix is singular"
        for rule in ("min_norm", "min_norm, Noon", "min_norm, sequence")
    },
    ("gram:pcgrad", "order_of_objectives_does_not_matter"): "it projects in a fixed random order",
    ("gram:pcgrad", "coefficients_follow_the_order"): "it projects in a fixed random order",
    ("tchebycheff, smooth", "scale_is_followed"): "μ has the unit of the rewards",
    **{
        (rule, "metrics_are_what_they_say"): "the metrics describe the means over each response"
        for rule in ("pama, sequence", "pama, Noon by sequence", "linear, sequence", "min_norm, sequence")
        + ("gram:upgrad, sequence", "ctwa, sequence")
    },
    ("saw", "independent_objectives_come_out_at_unit_rms"): "its unit size is that of rewards that vary alike",
    ("gram:upgrad, balanced", "scale_is_followed"): "the result scales with the power 1 − balance",
    ("pareto_rank", "weights_have_a_say"): "only the order of each reward matters",
    ("gram:imtl_g", "weights_have_a_say"): "it is invariant to scale",
    ("lagrangian", "order_of_objectives_does_not_matter"): "the last objective is the constraint",
    ("lagrangian", "coefficients_follow_the_order"): "the last objective is the constraint",
}


def test_all_rules_are_here() -> None:
    assert {rule for rule, _ in SETTINGS.values()} == set(available_rules())


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_result_has_the_precision_of_the_input(setting) -> None:
    rule, options = SETTINGS[setting]
    options = {key: value(2) if callable(value) else value for key, value in options.items()}
    advantages_KBA = torch.randn(2, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if "rewards_KB" in get_rule(rule).parameters:
        options["rewards_KB"] = advantages_KBA.squeeze(-1)
    result = aggregate(rule, advantages_KBA, torch.ones(4, 1), groups_B=[0, 0, 1, 1], **options)
    assert result.advantages.dtype == result.coefficients.dtype == torch.float64


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_property(setting, name) -> None:
    if (setting, name) in EXCEPT:
        pytest.skip(EXCEPT[setting, name])
    rule, options = SETTINGS[setting]
    check_rule(rule, name, **options)


# Where the weights of one response affect others: rvpo subtracts a mean, pama at batch level has one c.
MIXED = {"pama, batch", "rvpo", "rvpo, whitened", "gdpo, as published", "gd2po, as published", "saw, as published"}


@pytest.mark.parametrize("setting", SETTINGS.keys() - MIXED)
@given(objectives=st.integers(2, 4), seed=st.integers(0, 2**32 - 1))
def test_a_response_gets_what_it_would_get_if_all_had_its_weights(setting, objectives, seed) -> None:
    rule, options = SETTINGS[setting]
    options = {key: value(objectives) if callable(value) else value for key, value in options.items()}
    generator = torch.Generator().manual_seed(seed)
    advantages_KB1 = torch.randn(objectives, 24, 1, generator=generator)
    weights_KP, which_B = torch.rand(objectives, 2, generator=generator) + 0.1, torch.arange(24) % 2
    if "rewards_KB" in get_rule(rule).parameters:
        options["rewards_KB"] = advantages_KB1.squeeze(-1)

    def combine(weights) -> torch.Tensor:
        same = dict(groups_B=torch.arange(24) // 4, weights=weights)
        return aggregate(rule, advantages_KB1, torch.ones(24, 1), **same, **options).advantages

    mixed_B1 = combine(weights_KP[:, which_B])
    for index, weights_K in enumerate(weights_KP.T):
        alone_B1 = combine(weights_K)
        torch.testing.assert_close(mixed_B1[which_B == index], alone_B1[which_B == index], atol=1e-4, rtol=1e-3)
