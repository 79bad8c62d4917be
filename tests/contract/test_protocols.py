"""Every member that the protocols name exists in OpenRLHF."""

import importlib
import inspect
import re

import pytest

from pama_plugin.host import protocols

pytestmark = pytest.mark.contract

CLASSES = {
    "Experience": "openrlhf.trainer.ppo_utils.experience:Experience",
    "Strategy": "openrlhf.utils.deepspeed:DeepspeedStrategy",
    "ActorGroup": "openrlhf.trainer.ray.launcher:RayActorGroup",
    "Trainer": "openrlhf.trainer.ppo_trainer:BasePPOTrainer",
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_has_what_its_protocol_says(name) -> None:
    module, _, attribute = CLASSES[name].partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    kind = getattr(getattr(kind, "__ray_metadata__", None), "modified_class", kind)
    source = "".join(inspect.getsource(base) for base in kind.__mro__ if base is not object)
    protocol = getattr(protocols, name)
    members = {*protocol.__annotations__, *(key for key, value in vars(protocol).items() if inspect.isfunction(value))}
    for member in members - {"__init__", "_no_init_or_replace_init", "__subclasshook__"}:
        assigned = re.search(rf"self\.{member}\b(,[^=\n]*)? ?=|^    {member}: ", source, re.MULTILINE)
        assert hasattr(kind, member) or assigned, f"{kind.__name__} has no {member}"


def test_the_command_has_its_globals() -> None:
    command = importlib.import_module("openrlhf.cli.train_ppo_ray")
    assert all(hasattr(command, name) for name in protocols.Command.__annotations__)
