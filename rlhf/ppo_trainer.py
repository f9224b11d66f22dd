"""PPO on today's TRL: the rollouts of `GRPOTrainer`, with a critic instead of the group baseline.

One round (Schulman et al. 2017, https://arxiv.org/abs/1707.06347; for language models Ziegler et al.
2019, https://arxiv.org/abs/1909.08593, and Ouyang et al. 2022, https://arxiv.org/abs/2203.02155):

    1. the policy answers a batch of prompts                       TRL
    2. reward functions or reward models score the answers         TRL
    3. score and distance to the reference -> a reward a token     `compute_rewards`
    4. with the critic's values -> advantages and returns          `compute_gae`
    5. `num_iterations` passes over the answers, in minibatches    `policy_loss`, `value_loss`

Shapes: B answers, P prompt tokens (padded left), T answer tokens (padded right). `mask` (B, T) is 1
on the tokens that the policy wrote, the end token included, and 0 on padding.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate.utils import DummyOptim
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import disable_dropout_in_model, get_config_model_id

# What GRPO offers and PPO cannot honour: the only accepted value, and what to do instead.
_SAMPLING = "the ratio and the KL need the probabilities that were sampled from; use temperature"
FIXED_SETTINGS = {
    "loss_type": ("dapo", "PPO averages its loss over the tokens of the batch, as 'dapo' does"),
    "importance_sampling_level": ("token", "PPO clips token by token"),
    "scale_rewards": ("none", "PPO has no group to scale by; see whiten_advantages"),
    "multi_objective_aggregation": ("sum_then_normalize", "PPO adds rewards up; see reward_weights"),
    "delta": (None, "PPO clips with epsilon and epsilon_high"),
    "off_policy_mask_threshold": (None, "PPO clips with epsilon and epsilon_high"),
    "top_entropy_quantile": (1.0, "PPO trains on every token"),
    "use_adaptive_entropy": (False, "use a fixed entropy_coef"),
    "use_bias_correction_kl": (True, "PPO's KL is part of the reward, not of the loss"),
    "mask_truncated_completions": (False, "use missing_eos_penalty"),
    "disable_dropout": (True, "with dropout the ratio is not 1 on the first pass"),
    "top_p": (1.0, _SAMPLING),
    "top_k": (0, _SAMPLING),
    "min_p": (None, _SAMPLING),
    "repetition_penalty": (1.0, _SAMPLING),
}


def _setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class PPOConfig(GRPOConfig):
    """`GRPOConfig` with PPO's own settings, which keep the names of TRL's former `PPOConfig`.

    Inherited: `beta` is the KL coefficient (the former `kl_coef`), `epsilon` the policy's clip range,
    `num_iterations` the PPO epochs over a rollout of `generation_batch_size` answers, and
    `steps_per_generation / gradient_accumulation_steps` the minibatches in it. With one answer a
    prompt TRL still wants an even number of answers in a rollout.

    Raises:
        ValueError: a setting that PPO cannot honour (`FIXED_SETTINGS`), or a value out of range.
    """

    vf_coef: float = _setting(0.1, "Weight of the value loss.")
    cliprange_value: float = _setting(0.2, "How far a value may move from that of the rollout.")
    gamma: float = _setting(1.0, "Discount factor, a token.")
    lam: float = _setting(0.95, "Lambda of the generalised advantage estimation.")
    kl_target: float | None = _setting(None, "Adapt the KL coefficient to this KL (nats an answer).")
    missing_eos_penalty: float | None = _setting(None, "Off the score of an answer without its end.")
    whiten_advantages: bool = _setting(True, "Bring a rollout's advantages to mean 0, variance 1.")
    value_learning_rate: float | None = _setting(None, "Of the critic; None: that of the policy.")
    # Inherited from GRPO, with a default for PPO
    beta: float = _setting(0.05, "KL coefficient of the reward; the first one, with kl_target.")
    num_iterations: int = _setting(4, "PPO epochs over a rollout.")
    num_generations: int = _setting(1, "Answers sampled for a prompt: independent of each other.")
    num_generations_eval: int = _setting(1, "The same, in evaluation.")
    scale_rewards: str = _setting("none", "Has to be 'none'.")
    disable_dropout: bool = _setting(True, "Has to be True.")

    def __post_init__(self):
        answers_per_prompt = self.num_generations
        if answers_per_prompt == 1:  # TRL's check guards the group baseline; a critic needs no group
            self.num_generations = 2
        super().__post_init__()
        self.num_generations = answers_per_prompt
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # each step trains all of both models
        for name, (accepted, advice) in FIXED_SETTINGS.items():
            if getattr(self, name) != accepted:
                raise ValueError(f"PPO cannot use {name}={getattr(self, name)!r}: {advice}. "
                                 f"Remove the setting or set it to {accepted!r}.")
        inf = float("inf")  # beta > 0, because without it TRL loads no reference to stay close to
        for low, names, high in ((1e-8, ("beta", "kl_target", "cliprange_value"), inf),
                                 (0.0, ("gamma", "lam"), 1.0),
                                 (0.0, ("vf_coef", "missing_eos_penalty"), inf)):
            for name in names:
                if (value := getattr(self, name)) is not None and not low <= value <= high:
                    raise ValueError(f"PPO needs {low} <= {name} <= {high}, got {value}.")


def masked_mean_var(x, mask, reduce: Callable = lambda t: t) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population variance of `x` where `mask` is 1; `reduce` adds up over processes."""
    total, count = reduce(torch.stack([(x * mask).sum(), mask.sum().to(x.dtype)]))
    mean = total / count.clamp(min=1)
    return mean, reduce(((x - mean) ** 2 * mask).sum()) / count.clamp(min=1)


def masked_whiten(x, mask, reduce: Callable = lambda t: t) -> torch.Tensor:
    """`x` (B, T) shifted and scaled to mean 0 and variance 1 under `mask`, and 0 outside of it."""
    mean, var = masked_mean_var(x, mask, reduce)
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask


def explained_variance(values, returns, mask, reduce: Callable = lambda t: t) -> torch.Tensor:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one."""
    _, var_error = masked_mean_var(returns - values, mask, reduce)
    _, var_returns = masked_mean_var(returns, mask, reduce)
    return 1 - var_error / var_returns.clamp(min=1e-8)


def last_token(mask) -> torch.Tensor:
    """Index (B, 1) of the last real token of each answer; none is empty."""
    return mask.sum(dim=1, keepdim=True).long() - 1


def ends_with_eos(completion_ids, mask, eos_token_ids: list[int]) -> torch.Tensor:
    """Whether the last real token of each answer (B, T) is an end token, (B,) bool."""
    last_ids = completion_ids.gather(1, last_token(mask)).squeeze(1)
    return torch.isin(last_ids, torch.tensor(eos_token_ids, device=last_ids.device))


def compute_rewards(scores, kl, mask, kl_coef: float) -> torch.Tensor:
    """The reward of each token (B, T), Ziegler et al. 2019, eq. 2.

    Every token pays `kl_coef` times its share of the KL, estimated by log pi_old - log pi_ref (B, T);
    the last real token of an answer earns its score (B,).
    """
    rewards = -kl_coef * kl * mask
    return rewards.scatter_add(1, last_token(mask), scores.to(rewards.dtype).unsqueeze(1))


def compute_gae(rewards, values, mask, gamma: float, lam: float):
    """Generalised advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438).

        delta_t = r_t + gamma * V_{t+1} - V_t        A_t = delta_t + gamma * lam * A_{t+1}

    All (B, T). `values[:, t]` is the critic's opinion before token t is written. Beyond the last
    real token the episode is over: value and advantage are 0. Returns advantages and returns
    (advantages + values, what the critic should have said), 0 outside of the mask.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def policy_loss(logps, old_logps, advantages, low: float, high: float):
    """Clipped surrogate (Schulman et al. 2017, eq. 7): loss, ratio, clipped or not, each (B, T)."""
    ratio = torch.exp(logps - old_logps)
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.max(unclipped, clipped), ratio, clipped > unclipped


def value_loss(values, old_values, returns, cliprange: float):
    """Half the squared error, of the value kept near its old one if that is worse; clipped or not."""
    near_old = old_values + (values - old_values).clamp(-cliprange, cliprange)
    error, clipped_error = (values - returns) ** 2, (near_old - returns) ** 2
    return 0.5 * torch.max(error, clipped_error), clipped_error > error


def update_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """The proportional controller of Ziegler et al. 2019, section 2.2; KL in nats an answer."""
    return kl_coef * (1 + 0.1 * max(-0.2, min(0.2, kl / target - 1)))


def positions(attention_mask) -> torch.Tensor:
    """Position of each token (B, L), counted from the first real one, as `generate` counts them.

    Left to itself, as by TRL, GPT-2 counts the padding on the left too, and gives the tokens other
    probabilities than those that they were sampled with.
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def token_logps(policy, input_ids, attention_mask, length: int):
    """Log-probability and entropy (B, T) of the last `length` tokens of `input_ids` (B, P + T).

    TRL has given `policy` a fused head, which divides the logits by the temperature.
    """
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :-length] = -100
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    output = policy(**inputs, position_ids=positions(attention_mask), fused_lm_head=True)
    entropy = None if output.entropy is None else output.entropy[:, -length:]
    return output.log_probs[:, -length:], entropy


def token_values(value_model, input_ids, attention_mask, length: int) -> torch.Tensor:
    """The critic's value (B, T) before each of the last `length` tokens of `input_ids` (B, P + T)."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    hidden = value_model.base_model(**inputs, position_ids=positions(attention_mask))
    return value_model.score(hidden.last_hidden_state[:, -length - 1 : -1]).squeeze(-1).float()


class PolicyAndValueModel(nn.Module):
    """Policy and critic in one module, so that DDP and DeepSpeed have one thing to wrap."""

    def __init__(self, policy, value_model):
        super().__init__()
        self.policy, self.value_model = policy, value_model
        self.config = policy.config  # DeepSpeed resolves its "auto" sizes with it

    def forward(self, input_ids, attention_mask, length: int):
        """Log-probabilities, entropies and values (B, T) of the last `length` tokens."""
        logps, entropy = token_logps(self.policy, input_ids, attention_mask, length)
        return logps, entropy, token_values(self.value_model, input_ids, attention_mask, length)


class PPOTrainer(GRPOTrainer):
    """PPO with TRL's rollouts: conversational prompts, reward functions and models, PEFT, vLLM.

    `model`, `reward_funcs` and `kwargs` are those of `GRPOTrainer`. `value_model` is the critic: an
    `AutoModelForSequenceClassification` with one label (best a copy of the reward model), or a path
    to one; None: the policy's backbone, with a head that says 0. ValueError for what PPO cannot do.

    `self.model` stays the plain policy, which TRL generates with and saves. Only the training loop
    sees `PolicyAndValueModel`: one module is one DDP reducer, one DeepSpeed engine, one optimizer
    and one clipped gradient norm, without any synchronisation code here.
    """

    _tag_names, _name = ["trl", "ppo"], "PPO"
    _paper = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}

    def __init__(self, model, reward_funcs, args: PPOConfig, *, value_model=None, **kwargs):
        def refuse(wrong, message: str) -> None:
            if wrong:
                raise ValueError(message)

        refuse(not isinstance(args, PPOConfig), f"PPOTrainer got {type(args)}: pass a PPOConfig.")
        for name in ("tools", "environment_factory", "optimizers"):
            given = kwargs.get(name) not in (None, [], (None, None))
            refuse(given, f"PPOTrainer cannot use {name}: leave it out, or use GRPOTrainer.")
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        shared = isinstance(value_model, nn.Module) and any(value_model is func for func in funcs)
        refuse(shared, "value_model is the reward model itself, which training would change: "
                       "pass a copy, or its path.")
        super().__init__(model, reward_funcs, args, **kwargs)
        refuse(self._is_vlm or self.aux_loss_enabled, "PPOTrainer cannot train vision models, nor "
               "mixtures of experts with router_aux_loss_coef > 0: use GRPOTrainer.")
        sharded = self.is_fsdp_enabled or getattr(args.deepspeed_plugin, "zero_stage", 0) == 3
        refuse(sharded, "PPOTrainer cannot run under FSDP or ZeRO-3: use DDP, ZeRO-1 or ZeRO-2.")
        prompts, rows = args.generation_batch_size // args.num_generations, self.train_dataset
        refuse(hasattr(rows, "__len__") and len(rows) < prompts, f"A rollout takes {prompts} prompts, "
               f"more than train_dataset has: lower generation_batch_size.")
        critic = value_model
        if not isinstance(critic, nn.Module):
            critic = AutoModelForSequenceClassification.from_pretrained(
                critic or get_config_model_id(self.model.config), num_labels=1, dtype=torch.float32
            )
        head = getattr(critic, "score", None)
        refuse(getattr(head, "out_features", 0) != 1, f"value_model {type(critic).__name__} has no "
               "`score` head with one output: load a sequence classifier with num_labels=1.")
        size = critic.get_input_embeddings().num_embeddings
        refuse(size < len(self._tokenizer), f"value_model embeds {size} tokens, the tokenizer has "
               f"{len(self._tokenizer)}: use a critic with the policy's tokenizer.")
        if value_model is None:
            nn.init.zeros_(head.weight)  # no opinion is better than a random one
        if args.gradient_checkpointing:
            critic.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        disable_dropout_in_model(critic)
        self.kl_coef = args.beta
        self.value_model = critic.requires_grad_(True).to(self.accelerator.device)
        self.policy_and_value = PolicyAndValueModel(self.model, self.value_model)

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(x, reduction="sum")

    def _log_means(self, weight, **tensors) -> None:
        """Log each tensor's mean under `weight` (of the same shape), over all processes."""
        sums = [(x.detach() * weight).sum().float() for x in (*tensors.values(), weight.bool())]
        *sums, count = self._sum(torch.stack(sums)).tolist()
        for name, total in zip(tensors, sums, strict=True):
            self._metrics["train" if self.model.training else "eval"][f"ppo/{name}"].append(total / count)

    def _in_chunks(self, function, model, ids, mask, length: int) -> torch.Tensor:
        """`function`, `token_logps` or `token_values`, in batches of the size used in training."""
        args, training = self.args, self.model.training
        size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        with self.accelerator.autocast():
            parts = zip(ids.split(size), mask.split(size), strict=True)
            return torch.cat([function(model, *part, length) for part in parts])

    def _get_per_token_logps_and_entropies(self, model, ids, mask, length, **kwargs):
        return self._in_chunks(lambda *x: token_logps(*x)[0], model, ids, mask, length), None, None

    def _generate_single_turn(self, *args, **kwargs):
        # `model_wrapped` cannot generate. The bare policy can, but would do so without autocast.
        wrapped, self.model_wrapped = self.model_wrapped, self.model
        try:
            with self.accelerator.autocast():
                return super()._generate_single_turn(*args, **kwargs)
        finally:
            self.model_wrapped = wrapped

    def _calculate_rewards(self, inputs, prompts, *args):
        rewards = super()._calculate_rewards(inputs, prompts, *args)  # of all processes
        scores = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        if rewards.isnan().all(dim=1).any() or not scores.isfinite().all():
            raise ValueError("An answer got no finite score from any reward function: return a number.")
        self._scores = scores[self.accelerator.process_index * len(prompts) :][: len(prompts)]
        return rewards

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs):
        """TRL's rollout, with `values`, `advantages` and `returns` (B, T) for the passes over it."""
        rollout = super()._generate_and_score_completions(inputs)
        mask, ref_logps = rollout["completion_mask"], rollout["ref_per_token_logps"]
        ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
        everything = ids, torch.cat([rollout["prompt_mask"], mask], dim=1), mask.shape[1]
        if "old_per_token_logps" not in rollout:  # TRL computes them only if it needs them itself
            logps, *_ = self._get_per_token_logps_and_entropies(self.model, *everything)
            rollout["old_per_token_logps"] = logps
        values = self._in_chunks(token_values, self.value_model, *everything)

        kl = (rollout["old_per_token_logps"] - ref_logps) * mask
        non_eos = ~ends_with_eos(rollout["completion_ids"], mask, self.eos_token_ids)
        scores = self._scores - (self.args.missing_eos_penalty or 0.0) * non_eos
        rewards = compute_rewards(scores, kl, mask, self.kl_coef)
        advantages, returns = compute_gae(rewards, values, mask, self.args.gamma, self.args.lam)
        explained = explained_variance(values, returns, mask, self._sum)
        if self.args.whiten_advantages:
            advantages = masked_whiten(advantages, mask, self._sum)
        rollout.update(values=values, advantages=advantages, returns=returns)

        answers = torch.ones_like(scores)
        metrics = self._metrics["train" if self.model.training else "eval"]
        totals = {"kl": kl.sum(1), "score": scores, "return": rewards.sum(1), "non_eos_rate": non_eos}
        self._log_means(answers, **totals)
        self._log_means(mask, kl_per_token=kl, value=values)
        score_std = masked_mean_var(scores, answers, self._sum)[1].sqrt()
        metrics["ppo/score_std"].append(score_std.item())
        metrics["ppo/explained_variance"].append(explained.item())
        metrics["ppo/kl_coef"].append(self.kl_coef)
        if self.model.training and self.args.kl_target is not None:
            self.kl_coef = update_kl_coef(self.kl_coef, metrics["ppo/kl"][-1], self.args.kl_target)
        # TRL has logged its group baseline, which PPO does not use.
        metrics.pop("frac_reward_zero_std", None)
        shown = self.accelerator.gather((advantages * mask).sum(1) / mask.sum(1)).tolist()
        self._logs["advantages"] = type(self._logs["advantages"])(
            [*self._logs["advantages"]][: -len(shown)] + shown, self._logs["advantages"].maxlen
        )
        return rollout

    def _compute_loss(self, model, inputs):
        """Policy loss + vf_coef * value loss - entropy_coef * entropy, averaged over the tokens."""
        if model is self.model:  # evaluation comes with the bare policy
            model = self.policy_and_value
        mask, args = inputs["completion_mask"], self.args
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        with self.accelerator.autocast():
            attention_mask = torch.cat([inputs["prompt_mask"], mask], dim=1)
            logps, entropy, values = model(ids, attention_mask, mask.shape[1])
        old_logps, advantages = inputs["old_per_token_logps"], inputs["advantages"]
        policy, ratio, clipped = policy_loss(
            logps, old_logps, advantages, self.epsilon_low, self.epsilon_high
        )
        if "importance_sampling_ratio" in inputs:  # vLLM's probabilities differ a little
            policy = policy * inputs["importance_sampling_ratio"]
        value, value_clipped = value_loss(
            values, inputs["values"], inputs["returns"], args.cliprange_value
        )
        self._log_means(mask, policy_loss=policy, value_loss=value, entropy=entropy, ratio=ratio,
                        clip_fraction=clipped, value_clip_fraction=value_clipped)
        loss = policy + args.vf_coef * value
        if self.entropy_coef != 0.0:
            loss = loss - self.entropy_coef * entropy
        # A mean over the tokens of all processes and accumulation steps, however they are split: the
        # rollout's tokens, shared among its steps. DDP will divide by the number of processes.
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * self.current_gradient_accumulation_steps / args.steps_per_generation
        return (loss * mask).sum() / tokens

    @contextmanager
    def _both_models(self):
        """Shows Trainer policy and critic as its model."""
        policy, self.model = self.model, self.policy_and_value
        try:
            yield
        finally:
            self.model = policy

    def _prepare_for_training(self, *args, **kwargs):
        if self.model_wrapped is self.model:
            self.model_wrapped = self.policy_and_value
        with self._both_models():
            prepared = super()._prepare_for_training(*args, **kwargs)
        self.callback_handler.model = self.model
        return prepared

    def create_optimizer(self, model=None):
        """Trainer's optimizer over both models, the critic in parameter groups of its own."""
        if self.optimizer is None:
            critic = {id(parameter) for parameter in self.value_model.parameters()}
            for group in list(super().create_optimizer(self.policy_and_value).param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in critic]
                group["params"] = [p for p in group["params"] if id(p) not in critic]
                lr = self.args.value_learning_rate or group["lr"]
                self.optimizer.add_param_group({**group, "params": own, "lr": lr})
        elif isinstance(self.optimizer, DummyOptim) and self.args.value_learning_rate is not None:
            raise ValueError("DeepSpeed's configuration brings an optimizer, which would ignore "
                             "value_learning_rate: remove one of the two.")
        return self.optimizer

    def _save(self, output_dir=None, state_dict=None):
        """The policy as a plain model, the critic in `value_model/` beside it."""
        output_dir, parts = output_dir or self.args.output_dir, {}
        for part in ("policy.", "value_model."):  # DeepSpeed hands over the weights of both
            weights = {k: v for k, v in (state_dict or {}).items() if k.startswith(part)}
            parts[part] = {k.removeprefix(part): v for k, v in weights.items()} or None
        super()._save(output_dir, parts["policy."])
        if self.args.should_save:
            path = os.path.join(output_dir, "value_model")
            self.value_model.save_pretrained(path, state_dict=parts["value_model."])

    def _save_optimizer_and_scheduler(self, output_dir):
        with self._both_models():  # or DeepSpeed would drop a PEFT policy's base, and miss it later
            super()._save_optimizer_and_scheduler(output_dir)

    def _get_train_sampler(self, dataset=None):
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def _save_checkpoint(self, model, trial):
        """TRL's checkpoint and the current rollout, so that a run resumes exactly from any step."""
        folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        path = os.path.join(self._get_output_dir(trial=trial), folder)
        os.makedirs(path, exist_ok=True)
        state = {"step": self._step, "kl_coef": self.kl_coef, "rollout": self._buffered_inputs}
        torch.save(state, os.path.join(path, f"ppo_state_{self.args.process_index}.pt"))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        path = os.path.join(checkpoint, f"ppo_state_{self.args.process_index}.pt")
        if not os.path.isfile(path):
            raise ValueError(f"{path} is missing: resume from a checkpoint of PPOTrainer, with as many "
                             "processes as wrote it.")
        state = torch.load(path, map_location=self.accelerator.device.type, weights_only=True)
        self._step, self.kl_coef = state["step"], state["kl_coef"]
        self._buffered_inputs = state["rollout"]
        if not self.is_deepspeed_enabled:  # which has loaded both models already
            saved = AutoModelForSequenceClassification.from_pretrained(
                os.path.join(checkpoint, "value_model"), dtype=self.value_model.dtype
            )
            self.value_model.load_state_dict(saved.state_dict())
        for _ in range(int(self.state.epoch) if self._sampler.shuffle else 0):
            # The orders of the past epochs: TRL would begin with the first one again.
            torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)
