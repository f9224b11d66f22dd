"""PPO's settings: those of `GRPOConfig` that it honours, and its own."""

from dataclasses import dataclass, field

from trl import GRPOConfig

# What GRPO offers and PPO cannot honour: the only accepted value, and what to do instead.
_CLIP = "PPO clips token by token, with epsilon and epsilon_high"
_SAMPLE = "ratio and KL need the probabilities that were sampled from; use temperature"
FIXED_SETTINGS = {
    "loss_type": ("dapo", "PPO averages its loss over the tokens of the batch, as 'dapo' does"),
    "importance_sampling_level": ("token", _CLIP), "delta": (None, _CLIP),
    "off_policy_mask_threshold": (None, _CLIP), "repetition_penalty": (1.0, _SAMPLE),
    "scale_rewards": ("none", "PPO has no group to scale by; see whiten_advantages"),
    "multi_objective_aggregation": ("sum_then_normalize", "PPO adds up; see reward_weights"),
    "top_entropy_quantile": (1.0, "PPO trains on every token"), "top_k": (0, _SAMPLE),
    "use_adaptive_entropy": (False, "use a fixed entropy_coef"), "top_p": (1.0, _SAMPLE),
    "use_bias_correction_kl": (True, "PPO's KL is part of the reward, not of the loss"),
    "mask_truncated_completions": (False, "use missing_eos_penalty"), "min_p": (None, _SAMPLE),
    "disable_dropout": (True, "with dropout the ratio is not 1 on the first pass"),
}


def _setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class PPOConfig(GRPOConfig):
    """`GRPOConfig` and PPO's own settings, named as in TRL's former `PPOConfig`. Inherited:
    `beta` is the KL coefficient (formerly `kl_coef`), `epsilon` the clip range of the policy,
    `num_iterations` the PPO epochs over a rollout of `generation_batch_size` answers (even), and
    `steps_per_generation / gradient_accumulation_steps` the number of its minibatches.
    """

    vf_coef: float = _setting(0.1, "Weight of the value loss.")
    cliprange_value: float = _setting(0.2, "How far a value may move from that of the rollout.")
    gamma: float = _setting(1.0, "Discount factor, a token.")
    lam: float = _setting(0.95, "Lambda of the generalised advantage estimation.")
    kl_target: float | None = _setting(None, "Adapt the coefficient to this KL (nats an answer).")
    missing_eos_penalty: float | None = _setting(None, "Taken off an answer without its end.")
    whiten_advantages: bool = _setting(True, "Bring a rollout's advantages to mean 0, variance 1.")
    value_learning_rate: float | None = _setting(None, "Of the critic; None: the policy's.")
    beta: float = _setting(0.05, "KL coefficient of the reward; the first one, with kl_target.")
    num_iterations: int = _setting(4, "PPO epochs over a rollout.")
    num_generations: int = _setting(1, "Answers sampled for a prompt: independent of each other.")
    scale_rewards: str = _setting("none", "Has to be 'none'.")
    disable_dropout: bool = _setting(True, "Has to be True.")

    def __post_init__(self):
        wanted, self.num_generations = self.num_generations, max(self.num_generations, 2)
        super().__post_init__()  # refuses 1 answer a prompt, as no group; a critic needs none
        self.num_generations = wanted
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # each step trains all of both models
        for name, (accepted, advice) in FIXED_SETTINGS.items():
            if getattr(self, name) != accepted:
                raise ValueError(f"PPO cannot use {name}={getattr(self, name)!r}: {advice}. "
                                 f"Remove the setting or set it to {accepted!r}.")
        inf = float("inf")  # beta > 0, because without it TRL loads no reference to stay close to
        for low, names, high in ((1e-8, "beta kl_target cliprange_value temperature", inf),
                                 (0.0, "vf_coef missing_eos_penalty value_learning_rate", inf),
                                 (0.0, "gamma lam", 1.0),
                                 (1, "num_generations num_iterations", inf)):
            for name in names.split():
                if (value := getattr(self, name)) is not None and not low <= value <= high:
                    raise ValueError(f"PPO needs {low} <= {name} <= {high}, got {value}.")
