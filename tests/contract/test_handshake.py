"""Every rank says what it runs; one that runs stock code, another version or another configuration is named."""

import functools
from types import SimpleNamespace

import pytest

from pama_plugin import __version__
from pama_plugin.errors import ConfigError, HandshakeError
from pama_plugin.settings.load import load_config

pytestmark = pytest.mark.contract

CONFIG = load_config("pama", ["a=builtin:length", "b=rm:org/b"], None, None, None, default_level="token")
OTHER = CONFIG.model_copy(update={"level": "batch"})


@pytest.fixture(scope="module")
def ask(local_ray):
    """A reference to the report of a new actor that has ``config``, in its strategy or in its executor."""
    import ray

    from pama_plugin.host.actors.handshake import report

    @ray.remote
    class Rank:
        def __init__(self, **attributes):
            self.__dict__ |= attributes

    configs = [None, CONFIG, OTHER]

    @functools.cache  # an actor is a process that imports torch: no more of them than there are kinds
    def rank(index: int, vllm: bool):
        config = configs[index]
        args = SimpleNamespace(pama=config) if config else SimpleNamespace()
        holder = {"executor": SimpleNamespace(config=config)} if vllm else {"strategy": SimpleNamespace(args=args)}
        return Rank.options(num_cpus=0).remote(**holder)

    def reference(config, *, vllm: bool = False):
        return rank(configs.index(config), vllm).__ray_call__.remote(report)

    return reference


def test_one_line_when_all_agree(ask) -> None:
    from pama_plugin.host.actors.handshake import shake_hands

    ranks = {
        "policy": [[ask(CONFIG)], [ask(CONFIG)]],
        "critic": [],
        "reward groups": [[ask(CONFIG)], [ask(CONFIG), ask(CONFIG)]],
        "rollout": [[ask(CONFIG, vllm=True)]],
    }
    expected = f"PAMA {__version__} active: 2 objectives, policy 2/2, critic –, reward groups 2/2, rollout 1/1"
    assert shake_hands(CONFIG, ranks) == expected


def test_every_stranger_is_named(ask) -> None:
    from pama_plugin.host.actors.handshake import shake_hands

    ranks = {
        "policy": [[ask(CONFIG)], [ask(None)]],
        "rollout": [[ask(None, vllm=True)]],
        "reward groups": [[ask(OTHER)]],
    }
    with pytest.raises(HandshakeError) as error:
        shake_hands(CONFIG, ranks)
    text = str(error.value)
    assert "found policy 1: stock code; rollout 0: stock code; reward groups 0: another configuration" in text
    assert "policy 0" not in text and "policy 1/2, rollout 0/1, reward groups 0/1" in text


def test_a_rank_that_died_is_named(ask) -> None:
    import ray

    from pama_plugin.host.actors.handshake import shake_hands

    @ray.remote(num_cpus=0)
    def broken():
        raise ModuleNotFoundError("No module named 'pama_plugin'")

    with pytest.raises(HandshakeError, match="policy 0: no answer .*No module named 'pama_plugin'"):
        shake_hands(CONFIG, {"policy": [[broken.remote()]]})


def test_every_node_is_asked_for_the_plugin_and_for_files(local_ray, tmp_path) -> None:
    import ray

    from pama_plugin.host.preflight.nodes import ask_nodes

    file = tmp_path / "rewards.py"
    file.write_text("def f(queries, prompts, labels): ...\n")
    config = load_config("linear", [f"a=py:{file}:f", "b=builtin:json"], None, None, None, default_level="token")
    assert ask_nodes(config, ray.nodes()) == []
    file.unlink()
    (warning,) = ask_nodes(config, ray.nodes())
    assert f"node {ray.nodes()[0]['NodeManagerAddress']} has no {file}" in warning
    unknown = ray.nodes()[0] | {"NodeID": 56 * "0", "NodeManagerAddress": "10.0.0.9"}
    assert "node 10.0.0.9 could not be asked" in ask_nodes(config, [unknown])[0]


def test_nodes_without_this_plugin_are_refused_by_name() -> None:
    from pama_plugin.host.preflight.nodes import Answer, judge

    answers = {"10.0.0.1": Answer(__version__, ()), "10.0.0.2": Answer("0.0.9", ()), "10.0.0.3": Answer(None, ())}
    message = f"GPUs .*{__version__}, as this one, found node 10.0.0.2 has 0.0.9, node 10.0.0.3 has none$"
    with pytest.raises(ConfigError, match=message):
        judge(answers, set(answers))
    assert len(judge(answers, {"10.0.0.1"})) == 2, "no model runs on the others"
