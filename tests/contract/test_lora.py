"""A policy with LoRA adapters: what OpenRLHF's own weight sync sends to vLLM."""

import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pama_plugin.errors import ConfigError, PamaError

pytestmark = pytest.mark.contract

# PEFT asks for bitsandbytes when it is imported, so these are skipped here: ``test_a_base_in_4_bits`` runs them in a
# process that has it.
IN_A_PROCESS_WITH_BITSANDBYTES = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="run by test_a_base_in_4_bits"
)


def load(folder: str, **settings):
    import openrlhf.trainer.ray.vllm_engine  # noqa: F401  before deepspeed
    from openrlhf.models import Actor

    return Actor(folder, attn_implementation="eager", **({"param_dtype": "fp32", "lora_rank": 4} | settings))


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("policy")
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, tie_word_embeddings=True, attention_bias=True, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def adapt(actor) -> None:
    """As training would: PEFT starts with B = 0, the identity."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in actor.model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) / 10


class Engine:
    """Stands in for a vLLM engine: records what it is told to receive."""

    def __init__(self) -> None:
        self.told: list[tuple[str, torch.dtype, tuple[int, ...], bool]] = []
        self.update_weight = SimpleNamespace(remote=self._remote)

    def _remote(self, name, *, dtype, shape, empty_cache) -> None:
        self.told.append((name, dtype, tuple(shape), empty_cache))


def sync(actor, monkeypatch) -> tuple[Engine, dict[str, torch.Tensor]]:
    """OpenRLHF's ``broadcast_to_vllm`` without processes."""
    from openrlhf.trainer.ray import ppo_actor

    from pama_plugin.host.actors.policy import merged

    engine, sent = Engine(), []
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(ppo_actor, "torch_dist_barrier_and_cuda_sync", lambda: None)
    monkeypatch.setattr(ppo_actor, "current_stream", lambda: None)
    monkeypatch.setattr(ppo_actor.ray, "get", lambda refs: refs)
    trainer = object.__new__(ppo_actor.ActorPPOTrainer)
    trainer.strategy = SimpleNamespace(
        args=SimpleNamespace(vllm=SimpleNamespace(), ds=SimpleNamespace(zero_stage=0, tensor_parallel_size=1))
    )
    trainer.actor = SimpleNamespace(model=SimpleNamespace(module=actor.model))
    trainer.vllm_engines, trainer.use_cuda_ipc = [engine], False
    trainer._model_update_group = SimpleNamespace(broadcast=lambda data, **_: sent.append(data.clone()))
    with merged(actor.model):
        trainer.broadcast_to_vllm()
    return engine, dict(zip([name for name, *_ in engine.told], sent, strict=True))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_vllm_is_sent_the_merged_model_under_the_plain_models_names(policy, targets, monkeypatch) -> None:
    plain = load(policy, lora_rank=0).model
    actor = load(policy, target_modules=targets, lora_alpha=8)
    adapt(actor)
    before = {name: parameter.clone() for name, parameter in actor.model.named_parameters()}
    engine, sent = sync(actor, monkeypatch)

    assert [(name, shape) for name, _, shape, _ in engine.told] == [
        (name, tuple(parameter.shape)) for name, parameter in plain.named_parameters()
    ]
    assert [last for *_, last in engine.told] == [False] * (len(sent) - 1) + [True]
    after = dict(actor.model.named_parameters())
    assert list(after) == list(before), "the model lists its own parameters again"
    assert all(torch.equal(after[name], value) for name, value in before.items()), "nothing was written"
    expected = actor.model.merge_and_unload()
    changed = 0
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(sent[name], parameter.data, rtol=0, atol=1e-7)
        changed += not torch.equal(sent[name], dict(plain.named_parameters())[name])
    assert changed == (14 if targets == "all-linear" else 4)


def test_a_base_in_4_bits(request) -> None:
    """The tests below, none of them skipped."""
    folder = Path(sys.executable).parents[1] / "bitsandbytes"
    path = os.pathsep.join([str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    command = [sys.executable, "-m", "pytest", "-q", str(request.path), "-k", "base_in_4_bits_"]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 0 and "3 passed" in run.stdout, run.stdout + run.stderr


@IN_A_PROCESS_WITH_BITSANDBYTES
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_vllm_is_sent_what_a_base_in_4_bits_computes_with(policy, targets, monkeypatch) -> None:
    """A plain model with the weights that are sent has the policy's log-probabilities."""
    from pama_plugin.host.actors.policy import keep_4_bits

    plain = load(policy, lora_rank=0, param_dtype="bf16")
    actor = load(policy, target_modules=targets, lora_alpha=8, param_dtype="bf16", load_in_4bit=True)
    actor.bfloat16()  # as DeepSpeed does; OpenRLHF loads the norms in float32
    keep_4_bits(actor.model)
    adapt(actor)
    _, sent = sync(actor, monkeypatch)
    assert [(name, value.shape, value.dtype) for name, value in sent.items()] == [
        (name, value.shape, torch.bfloat16) for name, value in plain.model.named_parameters()
    ]
    tokens, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 6, dtype=torch.long)
    attention_mask = torch.ones(2, 7, dtype=torch.long)
    with torch.no_grad():
        rounded = actor(tokens, mask, attention_mask)
        before = plain(tokens, mask, attention_mask)
        plain.model.load_state_dict(sent, strict=False)
        after = plain(tokens, mask, attention_mask)
    assert (after - rounded).abs().max() < 0.02 < (before - rounded).abs().max()


@IN_A_PROCESS_WITH_BITSANDBYTES
def test_the_checkpoint_of_a_base_in_4_bits_holds_its_adapters(policy) -> None:
    """Without the base, whose numbers torch would refuse; a checkpoint without an adapter is refused."""
    from pama_plugin.errors import PamaError
    from pama_plugin.host.actors.policy import load_what_is_trained

    trained, resumed = (load(policy, param_dtype="bf16", load_in_4bit=True, target_modules="all-linear") for _ in "ab")
    adapt(trained)
    frozen = {name for name, parameter in trained.model.named_parameters() if not parameter.requires_grad}
    state = {name: value for name, value in trained.model.state_dict().items() if name not in frozen}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        resumed.model.load_state_dict(state, strict=True)
    load_what_is_trained(resumed.model)
    resumed.model.load_state_dict(state, strict=True)
    for name, parameter in trained.model.named_parameters():
        if name not in frozen:
            assert torch.equal(dict(resumed.model.named_parameters())[name], parameter)
    lost = next(name for name in state if "lora_B" in name)
    with pytest.raises(PamaError, match=f"found none for {lost}"):
        resumed.model.load_state_dict({name: value for name, value in state.items() if name != lost}, strict=True)


def test_adapters_on_a_shared_weight_are_refused(policy) -> None:
    """vLLM ties its head to the embedding, so it would get the adapter twice; PEFT's head uses the base."""
    from pama_plugin.host.actors.policy import refuse_layers

    refuse_layers(load(policy, target_modules="all-linear").model)
    with pytest.raises(ConfigError, match=r"must leave out.*found model.embed_tokens.weight and lm_head.weight"):
        refuse_layers(load(policy, target_modules=["embed_tokens"]).model)


def test_adapters_on_what_is_no_matrix_are_refused() -> None:
    """PEFT adapts the experts of a mixture as one parameter, of a module that has no ``weight``."""
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    from pama_plugin.host.actors.policy import refuse_layers

    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_local_experts=2)
    for targets, refused in (["q_proj", "v_proj"], False), ("all-linear", True):
        mixture = MixtralForCausalLM(MixtralConfig(vocab_size=50, num_key_value_heads=2, **shape))
        model = get_peft_model(mixture, LoraConfig(r=4, target_modules=targets))
        with pytest.raises(ConfigError, match="must name linear layers.*mixture") if refused else nullcontext():
            refuse_layers(model)


def test_layers_that_4_bits_store_transposed_are_refused(policy) -> None:
    from transformers.pytorch_utils import Conv1D

    from pama_plugin.host.actors.policy import refuse_layers

    model = load(policy).model
    model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.source_cls = Conv1D  # as transformers marks them
    with pytest.raises(ConfigError, match="--ds.load_in_4bit must be left out.*found model.layers.1.self_attn.q_proj"):
        refuse_layers(model)


@pytest.mark.parametrize("in_4_bits", [False, True])
def test_checkpoints_hold_the_adapters_alone_only_with_a_base_in_4_bits(in_4_bits, policy, monkeypatch) -> None:
    """What our actor changes around the host's own initialisation, which is left out here."""
    from openrlhf.trainer.ray import ppo_actor

    from pama_plugin.host.actors.policy import PolicyModelActor

    actor, saved, prepared = load(policy, target_modules="all-linear"), [], []
    stock = actor.model.load_state_dict

    def init(self, strategy, *_) -> None:
        strategy.prepare((actor, {}))
        engine = SimpleNamespace(module=actor.model, save_checkpoint=lambda *_, **options: saved.append(options))
        self.actor = SimpleNamespace(model=engine)

    host = ppo_actor.PolicyModelActor.__ray_metadata__.modified_class
    monkeypatch.setattr(host, "init_model_from_pretrained", init)
    kind = PolicyModelActor.__ray_metadata__.modified_class
    ours = kind.__new__(kind)
    settings = SimpleNamespace(ds=SimpleNamespace(load_in_4bit=in_4_bits))
    ours.init_model_from_pretrained(SimpleNamespace(args=settings, prepare=prepared.append), policy, 3, [])
    ours.actor.model.save_checkpoint("folder", tag="global_step1")
    assert prepared == [(actor, {})]
    assert saved == [{"tag": "global_step1"} | ({"exclude_frozen_parameters": True} if in_4_bits else {})]
    assert (actor.model.load_state_dict == stock) is not in_4_bits


def test_only_the_policy_has_adapters_and_a_base_in_4_bits(monkeypatch) -> None:
    from openrlhf.trainer.ray import ppo_critic

    from pama_plugin.host.actors.critic import CriticModelActor
    from pama_plugin.host.actors.reward_groups import _strategy_of
    from pama_plugin.settings.objective import parse_objective

    objective = parse_objective("a=rm:org/a")
    ds = SimpleNamespace(load_in_4bit=True, lora=SimpleNamespace(rank=8), value_head_prefix="score")
    strategy = SimpleNamespace(args=SimpleNamespace(ds=ds, pama=SimpleNamespace(trained=(objective,))))
    assert _strategy_of(objective, strategy).args.ds.load_in_4bit is False and ds.load_in_4bit is True

    class Stopped(Exception): ...

    def init(self, strategy, *_) -> None:
        raise Stopped(strategy.args.ds.lora.rank, strategy.args.ds.load_in_4bit)

    host = ppo_critic.CriticModelActor.__ray_metadata__.modified_class
    monkeypatch.setattr(host, "init_model_from_pretrained", init)
    kind = CriticModelActor.__ray_metadata__.modified_class
    with pytest.raises(Stopped) as stopped:
        kind.__new__(kind).init_model_from_pretrained(strategy, "org/b", 3)
    assert stopped.value.args == (0, False)


def test_without_adapters_the_policy_is_the_base(policy) -> None:
    from pama_plugin.host.actors.policy import PolicyModelActor
    from pama_plugin.host.actors.reward_groups import ReferenceInPolicy

    actor = load(policy, target_modules="all-linear")
    adapt(actor)
    plain = load(policy, lora_rank=0)
    tokens, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 6, dtype=torch.long)
    attention_mask = torch.ones(2, 7, dtype=torch.long)
    rank = SimpleNamespace(
        actor=SimpleNamespace(model=SimpleNamespace(module=actor.model)),
        forward=lambda *args, **kwargs: actor(*args, **kwargs),
    )
    forward = PolicyModelActor.__ray_metadata__.modified_class.forward_without_adapters
    with torch.no_grad():
        expected = plain(tokens, mask, attention_mask)
        assert torch.equal(forward(rank, tokens, mask, attention_mask=attention_mask), expected)
        assert not torch.allclose(actor(tokens, mask, attention_mask), expected)

    calls = []
    group = SimpleNamespace(
        duplicate_actors=2, async_run_method_batch=lambda *args, **kwargs: calls.append((args, kwargs))
    )
    reference = ReferenceInPolicy(group)
    assert reference.async_init_model_from_pretrained(None, policy) == [] and reference.duplicate_actors == 2
    reference.async_run_method_batch(method_name="forward", sequences=[tokens])
    assert calls == [(("forward_without_adapters",), {"sequences": [tokens]})]
    with pytest.raises(PamaError, match="log-probabilities only, found append"):
        reference.async_run_method_batch(method_name="append", experience=[])


def test_a_merged_weight_is_rounded_once(policy, monkeypatch) -> None:
    """In bfloat16 the sum is made in float32; PEFT's own merge rounds the product first."""
    actor = load(policy, param_dtype="bf16", lora_alpha=8, target_modules="all-linear")
    adapt(actor)
    layer = actor.model.base_model.model.model.layers[0].mlp.down_proj
    up, down = (weights["default"].weight for weights in (layer.lora_B, layer.lora_A))
    exact = layer.base_layer.weight.double() + 8 / 4 * (up.double() @ down.double())
    _, sent = sync(actor, monkeypatch)
    found = sent["model.layers.0.mlp.down_proj.weight"]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)


def test_a_failed_sync_leaves_the_model_and_deepspeed_as_they_were(policy) -> None:
    import deepspeed

    from pama_plugin.host.actors.policy import merged

    actor = load(policy)
    gather, names = deepspeed.zero.GatheredParameters, [name for name, _ in actor.model.named_parameters()]
    with pytest.raises(RuntimeError, match="lost"), merged(actor.model):
        raise RuntimeError("lost an engine")
    assert deepspeed.zero.GatheredParameters is gather
    assert [name for name, _ in actor.model.named_parameters()] == names
