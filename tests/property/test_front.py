"""A policy on the Pareto front stays there, and before the front the default is no slower than unit root mean square.

On a front one true reward rises only if another falls. The combined advantages then consist of noise, and must be as
small as the noise. With these rewards every policy is on the front, including the uniform policy at the start. All
seeds are fixed.
"""

import functools

import pytest
import torch
from toy import Combine, Optimizer, Walk, by, by_reward, independent, noise_like, on_the_front, to_unit_rms, train

from pama_plugin import aggregate, available_rules
from pama_plugin.aggregation import get_rule
from pama_plugin.aggregation.rules.gram import WEIGHTINGS

pytestmark = pytest.mark.property

PAMA = by("pama")
COMBINES: dict[str, Combine] = {"pama": PAMA, "noise": noise_like(PAMA), "unit rms": to_unit_rms(PAMA)}
SGD, ADAM, ADAM_WITH_KL = Optimizer("sgd", 2.0), Optimizer("adam", 0.02), Optimizer("adam", 0.02, kl=0.1)
AROUND = 1.5  # by chance, root mean squares over 8 seeds differ by about a quarter


@functools.cache
def walk(objectives: int, optimizer: Optimizer, combine: str) -> Walk:
    return train(on_the_front, COMBINES[combine], optimizer, objectives=objectives, noise=0.2, steps=200, seeds=8)


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("optimizer", [SGD, ADAM, ADAM_WITH_KL], ids=["sgd", "adam", "adam with a KL loss"])
def test_a_policy_on_the_front_stays_there(optimizer, objectives) -> None:
    """No objective drifts farther than with the same numbers with random signs."""
    noise = walk(objectives, optimizer, "noise").drift
    assert (walk(objectives, optimizer, "pama").drifts_K < AROUND * noise).all()


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("optimizer", [SGD, ADAM_WITH_KL], ids=["sgd", "adam with a KL loss"])
def test_unit_rms_drifts_farther_than_noise(optimizer, objectives) -> None:
    """A former default, dividing by the root mean square of the result, drifts farther than noise of its true size.

    Adam without KL is not tested: it divides every gradient by its running size, so no constant makes a step smaller,
    and both drift as far as noise of any size. A KL loss does not shrink with the advantages: it keeps up the running
    size, and pulls back.
    """
    assert walk(objectives, optimizer, "unit rms").drift > AROUND * walk(objectives, optimizer, "noise").drift


@pytest.mark.parametrize("objectives", [2, 4])
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_before_the_front_it_is_no_slower(optimizer, objectives) -> None:
    now, before = (
        train(independent, combine, optimizer, objectives=objectives, noise=0.0, steps=40, seeds=8).rise
        for combine in (PAMA, to_unit_rms(PAMA))
    )
    assert now > 0.95 * before > 0


# The combined advantages on a front of two and of three objectives when the noise is a hundred times smaller:
# "vanishes" if they shrink in proportion, "remains" if the rule amplifies noise or moves along the front. The
# docstrings of the rules explain the reason.
ON_THE_FRONT = {
    "pama": (by("pama"), "vanishes", "vanishes"),
    "pama, Noon": (by("pama", noon=True), "vanishes", "vanishes"),
    "pama, sequence": (by("pama", level="sequence"), "vanishes", "vanishes"),
    "pama, soft": (by("pama", soft=4.0), "vanishes", "vanishes"),
    "pama, batch": (by("pama", level="batch"), "remains", "remains"),
    "linear": (by("linear"), "vanishes", "remains"),
    "min_norm": (by("min_norm"), "vanishes", "vanishes"),
    "min_norm, Noon": (by("min_norm", noon=True), "remains", "remains"),
    "morlhf": (by_reward("morlhf"), "remains", "remains"),
    "tchebycheff": (by_reward("tchebycheff"), "remains", "remains"),
    "gdpo": (by("gdpo"), "vanishes", "remains"),
    "gdpo, as published": (by("gdpo", whiten_sum=True), "remains", "remains"),
    "gd2po": (by("gd2po"), "vanishes", "vanishes"),
    "gd2po, as published": (by("gd2po", whiten_sum=True), "vanishes", "vanishes"),
    "rvpo": (by("rvpo"), "remains", "remains"),
    "dvao": (by("dvao"), "vanishes", "remains"),
    "saw": (by("saw"), "vanishes", "remains"),
    "ctwa": (by("ctwa"), "vanishes", "remains"),
    "pareto_rank": (by("pareto_rank"), "remains", "remains"),
    "gram:upgrad": (by("gram:upgrad"), "vanishes", "vanishes"),
    "gram:cagrad": (by("gram:cagrad"), "vanishes", "remains"),
    "gram:pcgrad": (by("gram:pcgrad"), "vanishes", "remains"),
    "gram:imtl_g": (by("gram:imtl_g"), "vanishes", "vanishes"),
    "gram:aligned_mtl": (by("gram:aligned_mtl"), "vanishes", "vanishes"),
}


def test_every_rule_has_its_behaviour_on_the_front() -> None:
    named = {name.partition(",")[0] for name in ON_THE_FRONT} | {"lagrangian"}  # which needs a constraint
    assert named == set(available_rules())


@pytest.mark.parametrize("rule", ON_THE_FRONT)
@pytest.mark.parametrize("objectives", [2, 3])
def test_combined_advantages_on_the_front(objectives, rule) -> None:
    combine, *expected = ON_THE_FRONT[rule]
    frozen = Optimizer("sgd", 0.0)
    rms, rms_with_little_noise = (
        float(train(on_the_front, combine, frozen, objectives=objectives, noise=noise, steps=4, seeds=4).rms.mean())
        for noise in (0.2, 0.002)
    )
    behaviour = "vanishes" if rms_with_little_noise < rms / 20 else "remains"
    assert behaviour == expected[objectives - 2], (rms, rms_with_little_noise)


WHITENED = {"gdpo", "gd2po", "rvpo", "saw", "dvao"}  # they whiten within the group


@pytest.mark.parametrize(
    "rule", ["pama", "linear", "ctwa", "min_norm", *(f"gram:{name}" for name in WEIGHTINGS), *sorted(WHITENED)]
)
def test_a_group_that_barely_agrees(rule) -> None:
    """In one of sixteen groups the two objectives agree, at a few thousandths; in the others they are opposed."""
    rows_GN = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    opposed_2B = torch.tensor([[1.0], [-1.0]]) * (rows_GN - rows_GN.mean(-1, keepdim=True)).flatten()
    opposed_2B[:, 8:12] = torch.tensor([1e-3, 2e-3, 3e-3, 4e-3])
    named = {"rewards_KB": opposed_2B + 3} if "rewards_KB" in get_rule(rule).parameters else {}
    result = aggregate(rule, opposed_2B.unsqueeze(-1), torch.ones(64, 1), groups_B=torch.arange(64) // 4, **named)
    largest = float(result.advantages[8:12].abs().max())
    assert (largest > 1) if rule in WHITENED else (largest < 5 * 4e-3)
