"""The policy with LoRA adapters: what vLLM is sent, and its log-probabilities without them.

OpenRLHF's ``broadcast_to_vllm`` sends ``model.named_parameters()`` one by one, and a PEFT model's have names and shapes
that vLLM does not know. While it runs, the model lists what the plain model would, and an adapted matrix is

    W + Σ_a s_a · B_a A_a          (Hu et al., LoRA, arXiv 2106.09685, Eq. 3; s_a = α / r)

made when it is sent, added in float32, rounded to the base's precision, and dropped afterwards. The base is never
written, so nothing drifts in bfloat16. So the base is also the reference model: the policy with its adapters off.
A base in 4 bits (--ds.load_in_4bit) is sent as the numbers that its layers compute with.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import deepspeed
import ray
import torch
from openrlhf.trainer.ray import ppo_actor
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pama_plugin.errors import ConfigError, PamaError
from pama_plugin.host.protocols import Strategy

ADAPTED_MODEL, BASE = "base_model.model.", "base_layer."


class MergedWeight:
    """Stands in for a parameter that is adapted, or stored in 4 bits, in OpenRLHF's weight sync.

    ``data`` exists within ``deepspeed.zero.GatheredParameters([merged])``, which OpenRLHF enters on every rank before
    it sends a parameter; with ZeRO-3 the shards of base and adapters are gathered there.
    """

    requires_grad = True  # of a policy that reads images OpenRLHF sends these only
    data: Tensor

    def __init__(self, base: Any, layer: Any = None) -> None:
        self.base, self.layer = base, layer
        self.quantization = getattr(base, "quant_state", None)
        self.dtype = (self.quantization or base).dtype
        self.shape = self.quantization.shape if self.quantization else getattr(base, "ds_shape", base.shape)
        self.ds_shape = self.shape

    @contextmanager
    def gathered(self, gather: Any, **options: Any) -> Iterator[None]:
        adapters = self.layer.named_parameters() if self.layer else ()
        with gather([self.base, *(value for name, value in adapters if "lora_" in name)], **options), torch.no_grad():
            weight = (dequantize_bnb_weight(self.base) if self.quantization else self.base.data).float()
            for adapter in self.layer.active_adapters if self.layer else ():
                weight = weight + self.layer.get_delta_weight(adapter).float()
            self.data = weight.to(self.dtype)
            yield
            del self.data


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What ``named_parameters`` of the model without adapters would yield, in its order."""
    adapted = {
        f"{name}.{BASE}weight": module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    for name, parameter in nn.Module.named_parameters(model):
        if ".lora_" not in name:
            stands_in = name in adapted or hasattr(parameter, "quant_state")
            value = MergedWeight(parameter, adapted.get(name)) if stands_in else parameter
            yield name.removeprefix(ADAPTED_MODEL).replace(f".{BASE}", "."), value


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within it, ``model.named_parameters()`` are those of the merged model, and DeepSpeed can gather them."""
    gather = deepspeed.zero.GatheredParameters

    def gather_any(parameters: list[Any], **options: Any) -> Any:
        one = parameters[0]
        return one.gathered(gather, **options) if isinstance(one, MergedWeight) else gather(parameters, **options)

    named: Any = model
    named.named_parameters = lambda *_, **__: plain_parameters(model)
    deepspeed.zero.GatheredParameters = gather_any
    try:
        yield
    finally:
        del named.named_parameters
        deepspeed.zero.GatheredParameters = gather


def refuse_layers(model: nn.Module) -> None:
    """Raise ``ConfigError`` for adapters on what is no matrix, and on one that two layers share.

    vLLM would change both layers, PEFT changes one.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.removeprefix(ADAPTED_MODEL).replace(f".{BASE}", "."))
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(getattr(module.get_base_layer(), "weight", None), Tensor):
            raise ConfigError(
                "--ds.lora.target_modules must name linear layers, such as q_proj v_proj: adapters on the experts or "
                f"the router of a mixture cannot be sent to vLLM, found {name.removeprefix(ADAPTED_MODEL)}"
            )
        if getattr(module, "source_cls", None) is Conv1D:
            raise ConfigError(
                "--ds.load_in_4bit must be left out for a model of Conv1D layers, as GPT-2 has, which are stored "
                f"transposed, found {name.removeprefix(ADAPTED_MODEL)}"
            )
        if isinstance(module, LoraLayer) and len(tied := owners[id(module.get_base_layer().weight)]) > 1:
            raise ConfigError(
                f"--ds.lora.target_modules must leave out weights that two layers share, found {' and '.join(tied)}"
            )


def keep_4_bits(model: nn.Module) -> None:
    """Have layers of 4 bits keep their numbers.

    On a CPU with AVX512-BF16, bitsandbytes packs them for evaluation with rounded scales, and cannot train them then.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_what_is_trained(model: nn.Module) -> None:
    """Have ``load_state_dict`` load the adapters only: a checkpoint of a base in 4 bits has nothing else."""
    stock, module = model.load_state_dict, cast(Any, model)

    def load_state_dict(state: Mapping[str, Any], **_: Any) -> Any:
        result = stock(state, strict=False)
        trained = {name for name, parameter in nn.Module.named_parameters(model) if parameter.requires_grad}
        if lost := sorted(trained & set(result.missing_keys)):
            raise PamaError(f"the checkpoint must hold every adapter, found none for {lost[0]}")
        return result

    module.load_state_dict = load_state_dict


@ray.remote(num_gpus=1)
class PolicyModelActor(ppo_actor.PolicyModelActor.__ray_metadata__.modified_class):
    """OpenRLHF's policy with LoRA adapters."""

    def init_model_from_pretrained(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        in_4_bits, prepare = strategy.args.ds.load_in_4bit, strategy.prepare

        def prepare_policy(pair: tuple[Any, Any]) -> Any:
            """OpenRLHF calls it once, after it builds the model and before DeepSpeed wraps it."""
            refuse_layers(pair[0].model)
            if in_4_bits:
                keep_4_bits(pair[0].model)
                load_what_is_trained(pair[0].model)
            return prepare(pair)

        strategy.prepare = prepare_policy
        super().init_model_from_pretrained(strategy, *args, **kwargs)
        if in_4_bits:  # the base is that of the model's files; its numbers could not be loaded again
            engine = self.actor.model
            engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)

    def broadcast_to_vllm(self) -> None:
        with merged(self.actor.model.module):
            super().broadcast_to_vllm()

    def forward_without_adapters(self, *args: Any, **kwargs: Any) -> Tensor:
        """The log-probabilities of the reference model: the base, which no step changes."""
        with self.actor.model.module.disable_adapter():
            log_probs: Tensor = self.forward(*args, **kwargs)
        return log_probs
