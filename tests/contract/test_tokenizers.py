"""A model that cannot read the policy's token ids is refused before Ray starts, by name and with both sizes."""

import json
import re
from pathlib import Path

import pytest
from hosttools import parse_host_flags, save_tiny_model

from pama_plugin.errors import ConfigError
from pama_plugin.host.preflight.tokenizers import check_vocabularies, read_vocabulary

pytestmark = pytest.mark.contract

TOKENS = 20


@pytest.fixture
def policy(tmp_path: Path) -> str:
    return save_tiny_model(tmp_path / "policy", TOKENS)


@pytest.mark.parametrize("size", [TOKENS, TOKENS + 44], ids=["the same", "padded"])
def test_every_token_of_the_policy_has_an_embedding(size, policy, tmp_path) -> None:
    assert check_vocabularies(policy, {"r": save_tiny_model(tmp_path / "r", size)}) == []


def test_a_smaller_vocabulary_is_refused(policy, tmp_path) -> None:
    model = save_tiny_model(tmp_path / "small", TOKENS - 1)
    message = f"^r: .*vocabulary.*policy, found 19 in {model} and 20 in {policy}$"
    with pytest.raises(ConfigError, match=message):
        check_vocabularies(policy, {"same": policy, "r": model})


def test_the_size_that_counts_is_the_tokenizers(tmp_path) -> None:
    """Two sizes of one family pad their embeddings differently; both read the same tokens."""
    policy = save_tiny_model(tmp_path / "policy", TOKENS, embeddings=64)
    assert check_vocabularies(policy, {"r": save_tiny_model(tmp_path / "r", TOKENS, embeddings=32)}) == []


def test_a_vocabulary_is_ids_to_tokens(policy) -> None:
    assert read_vocabulary(policy) == {index: f"t{index}" for index in range(TOKENS)}


@pytest.mark.parametrize("location", ["./nowhere", "/no/such/folder"])
def test_a_policy_that_is_not_there_is_refused(location, policy) -> None:
    with pytest.raises(ConfigError, match=f"^--actor.model_name_or_path: .*{location}: "):
        check_vocabularies(location, {"r": policy})


def test_a_broken_model_is_refused(policy, tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"^r: .*{tmp_path}: Unrecognized model"):
        check_vocabularies(policy, {"r": str(tmp_path)})


def test_a_model_out_of_reach_is_left_to_the_host(policy) -> None:
    (warning,) = check_vocabularies(policy, {"r": "org/model"})
    assert re.search("vocabularies were not compared: .*hub is out of reach", warning)


def test_code_that_comes_with_a_model_does_not_run_on_the_driver(policy, tmp_path, monkeypatch) -> None:
    """To look at a vocabulary is no reason; the host runs it in its actors."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    model = Path(save_tiny_model(tmp_path / "own", TOKENS))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "its own", "auto_map": {"AutoConfig": "code.Config"}}
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (warning,) = check_vocabularies(policy, {"r": str(model)})
    assert re.search(f"vocabulary was not compared: r: {model} .*code", warning)
    small = save_tiny_model(tmp_path / "small", TOKENS - 1)
    with pytest.raises(ConfigError, match=f"^s: .*vocabulary.*policy, found 19 in {small} and 20 in {policy}$"):
        check_vocabularies(policy, {"r": str(model), "s": small})
    assert not (tmp_path / "ran").exists()


def test_a_model_that_the_hub_does_not_have_is_refused(policy, monkeypatch) -> None:
    """As transformers reports it; the hub itself cannot be asked here."""
    from huggingface_hub.errors import RepositoryNotFoundError

    from pama_plugin.host.preflight import tokenizers

    def missing(*_, **__):
        raise OSError("org/model is not a valid model identifier\nhint") from RepositoryNotFoundError.__new__(
            RepositoryNotFoundError
        )

    monkeypatch.setattr(tokenizers.AutoConfig, "from_pretrained", missing)
    with pytest.raises(ConfigError, match="^r: .*org/model: .* not a valid model identifier$"):
        check_vocabularies(policy, {"r": "org/model"})


@pytest.mark.parametrize("models", [{}, {"r": "org/model"}])
def test_without_a_policy_or_models_there_is_nothing_to_compare(models) -> None:
    assert check_vocabularies(None, models) == []


@pytest.mark.parametrize("flag", ["--pama.objective", "--critic.model_name_or_path"])
def test_a_run_with_it_is_refused_at_its_start(flag, policy, tmp_path) -> None:
    from pama_plugin.host import seam
    from pama_plugin.settings.flags import add_flags

    small = save_tiny_model(tmp_path / "small", TOKENS - 1)
    flags = ["--loss", "pama", "--pama.objective", "length=builtin:length", "--actor.model_name_or_path", policy]
    flags += ["--pama.objective", f"r=rm:{small}", "--algo.advantage.estimator", "reinforce"]
    if flag != "--pama.objective":
        flags[-4:] = [flag, small]
    with pytest.raises(ConfigError, match=f"^{flag}( r)?: .*vocabulary.*found 19 in {small} and 20 in"):
        seam.install(parse_host_flags(*flags, extend=add_flags))


@pytest.mark.parametrize("model_type", ["llama", "its own"])
def test_code_of_a_reward_model_is_not_run_unless_it_is_trusted(model_type, policy, tmp_path, capsys) -> None:
    """Neither by a run's checks nor by pama score: with a known model type, too, where only OpenRLHF would run it."""
    import json

    from pama_plugin.cli import main
    from pama_plugin.host import seam
    from pama_plugin.host.preflight.weights import check_code
    from pama_plugin.settings.flags import add_flags

    folder = Path(save_tiny_model(tmp_path / "model", TOKENS))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused = "--pama.objective r: trust_remote_code .*found auto_map in the config.json of .*model"

    flags = ["--loss", "pama", "--pama.objective", "length=builtin:length", "--actor.model_name_or_path", policy]
    flags += ["--pama.objective", f"r=rm:{folder}", "--algo.advantage.estimator", "reinforce"]
    with pytest.raises(ConfigError, match=refused):
        seam.install(parse_host_flags(*flags, extend=add_flags))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "t1", "response": "t2"}\n')
    with pytest.raises(SystemExit):
        main(["score", str(tmp_path / "rows.jsonl"), "--pama.objective", f"r=rm:{folder}", "--tokenizer", policy])
    assert re.search(refused, capsys.readouterr().err) and not (tmp_path / "ran").exists()
    check_code("r", str(folder), trusted=True)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded"])
def test_a_model_without_a_value_head_would_score_at_random(tmp_path, kind) -> None:
    import json

    import torch
    from safetensors.torch import save_file

    from pama_plugin.host.preflight.weights import check_value_head

    def write(**heads: torch.Tensor) -> None:
        weights = {"model.embed.weight": torch.zeros(2, 2)} | {f"{name}.weight": head for name, head in heads.items()}
        if kind == "safetensors":
            save_file(weights, tmp_path / "model.safetensors")
        elif kind == "bin":
            torch.save(weights, tmp_path / "pytorch_model.bin")
        else:
            index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    def check(prefix: str | None = None) -> None:
        check_value_head("--pama.objective r", str(tmp_path), prefix)

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"--pama.objective r: .*{tmp_path}: "):
        check()
    write(classifier=torch.zeros(1, 2))
    with pytest.raises(
        ConfigError, match=r"--pama.objective r: .*score\.weight.*found none in .*value_head_prefix=.*kind hf"
    ):
        check()
    write(value_head=torch.zeros(1, 2))
    check("value_head")
    with pytest.raises(ConfigError, match=r"--pama.objective r: .*score\.weight.*found none"):
        check()
    (tmp_path / "config.json").write_text('{"value_head_prefix": "value_head"}')
    check()
    check_value_head("--pama.objective r", "org/on-the-hub", None)
