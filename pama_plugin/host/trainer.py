"""The host's trainer, in its Ray actor, with our experience maker in place of the stock one."""

from typing import Any

import ray
from openrlhf.trainer import ppo_trainer

from pama_plugin.errors import RewardError
from pama_plugin.host.experience import MultiObjectiveExperienceMaker
from pama_plugin.host.handshake import report, shake_hands


@ray.remote
class PPOTrainer(ppo_trainer.PPOTrainer.__ray_metadata__.modified_class):
    """Swaps the experience maker, shakes hands before the first step and knows which step failed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.experience_maker = MultiObjectiveExperienceMaker(
            self.actor_model_group,
            self.critic_model_group,
            self.reward_model_group,
            self.reference_model_group,
            self.kl_ctl,
            self.strategy,
            self.tokenizer,
        )
        self.steps_done = 0

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Shake hands with every actor, then train; a reward that fails is reported with its step."""
        print(self.shake_hands(), flush=True)
        try:
            super().fit(*args, **kwargs)
        except RewardError as error:
            raise error.at_step(self.steps_done + 1) from error

    def shake_hands(self) -> str:
        def reports(group: Any) -> list[Any]:
            return group.async_run_method("__ray_call__", report) if group is not None else []

        reward_groups = self.reward_model_group.groups if self.reward_model_group is not None else {}
        return shake_hands(
            self.experience_maker.config,
            {
                "policy": [[rank] for rank in reports(self.actor_model_group)],
                "critic": [[rank] for rank in reports(self.critic_model_group)],
                "reward groups": [reports(group) for group in reward_groups.values()],
                "reference": [[rank] for rank in reports(self.reference_model_group)],
                "rollout": [[engine.__ray_call__.remote(report)] for engine in self.vllm_engines],
            },
        )

    def init_checkpoint_states(self) -> dict[str, Any]:
        states: dict[str, Any] = super().init_checkpoint_states()
        self.steps_done = states["global_step"]
        return states

    def train_step(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], int]:
        status, self.steps_done = super().train_step(*args, **kwargs)
        return status, self.steps_done
