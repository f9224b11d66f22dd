"""PPO on today's TRL: the rollouts of `GRPOTrainer`, with a critic instead of the group baseline.

One round (Schulman et al. 2017, arXiv:1707.06347; on text: Ziegler et al. 2019, arXiv:1909.08593):
    1. the policy answers a batch of prompts                       `FastRollouts`
    2. reward functions or reward models score the answers         TRL
    3. score and distance to the reference -> a reward a token     `compute_rewards`
    4. with the critic's values -> advantages and returns          `compute_gae`
    5. `num_iterations` passes over the answers, in minibatches    `policy_loss`, `value_loss`

Shapes: B answers, P prompt tokens (padded left), T answer tokens (padded right). `mask` (B, T) is 1
on the tokens that the policy wrote, the end token included, and 0 on padding.
"""

import os
from functools import partial

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import AutoModelForSequenceClassification
from trl import GRPOTrainer
from trl.trainer.utils import disable_dropout_in_model, get_config_model_id

from rlhf.ppo_config import PPOConfig
from rlhf.ppo_math import (
    compute_gae,
    compute_rewards,
    ends_with_eos,
    explained_variance,
    masked_mean_var,
    masked_whiten,
    policy_loss,
    update_kl_coef,
    value_loss,
)
from rlhf.rollouts import FastRollouts


def backbone_inputs(input_ids, attention_mask) -> dict[str, torch.Tensor]:
    """Both (B, L), and the positions, counted from the first real token on, as `generate` does.

    By itself, as under TRL, GPT-2 counts left padding too: not the probabilities sampled from.
    """
    positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}


def trim(input_ids, attention_mask, length: int):
    """Both (B, L) without the columns at their ends in which no row has a token; `length` of them
    less, and how many were cut on the right. A minibatch is narrower than its rollout."""
    used = attention_mask.any(dim=0).nonzero()
    start, stop = used[0].item(), max(used[-1].item() + 1, input_ids.shape[1] - length + 1)
    cut = input_ids.shape[1] - stop
    return input_ids[:, start:stop], attention_mask[:, start:stop], length - cut, cut


def token_logps(policy, input_ids, attention_mask, length: int):
    """Log-probability and entropy (B, T) of the last `length` tokens of `input_ids` (B, P + T)."""
    input_ids, attention_mask, length, cut = trim(input_ids, attention_mask, length)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :-length] = -100
    inputs = backbone_inputs(input_ids, attention_mask)
    output = policy(**inputs, labels=labels, fused_lm_head=True)  # TRL's: logits / temperature
    entropy = None if output.entropy is None else pad(output.entropy[:, -length:], (0, cut))
    return pad(output.log_probs[:, -length:], (0, cut)), entropy


def token_values(value_model, input_ids, attention_mask, length: int) -> torch.Tensor:
    """The critic's value (B, T) before each of the last `length` tokens of `input_ids`."""
    input_ids, attention_mask, length, cut = trim(input_ids, attention_mask, length)
    inputs = backbone_inputs(input_ids, attention_mask)
    hidden = value_model.base_model(**inputs, use_cache=False).last_hidden_state
    return pad(value_model.score(hidden[:, -length - 1 : -1]).squeeze(-1).float(), (0, cut))


class PolicyAndValueModel(nn.Module):
    """Policy and critic in one module, so that DDP and DeepSpeed have one thing to wrap."""

    def __init__(self, policy, value_model):
        super().__init__()
        self.policy, self.value_model = policy, value_model
        self.config = policy.config  # DeepSpeed resolves its "auto" sizes with it

    def forward(self, *inputs):  # as of `token_values`
        return *token_logps(self.policy, *inputs), token_values(self.value_model, *inputs)


class PPOTrainer(FastRollouts, GRPOTrainer):
    """PPO with TRL's rollouts: conversational prompts, reward functions and models, PEFT, vLLM.

    Arguments as in `GRPOTrainer`, and `value_model`, the critic: an
    `AutoModelForSequenceClassification` with one label (best a copy of the reward model) or a path;
    None: the policy's backbone, with a head that says 0.

    `self.model` stays the plain policy, which TRL generates with and saves. Only the training loop
    sees `PolicyAndValueModel`: one DDP reducer or DeepSpeed engine, optimizer and gradient norm.
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
        shared = isinstance(value_model, nn.Module) and any(value_model is f for f in funcs)
        refuse(shared, "Training value_model would change the reward: pass a copy, or its path.")
        super().__init__(model, reward_funcs, args, **kwargs)
        refuse(self._is_vlm or self.aux_loss_enabled, "No images or routers in PPO: use GRPO.")
        sharded = self.is_fsdp_enabled or getattr(args.deepspeed_plugin, "zero_stage", 0) == 3
        refuse(sharded, "PPOTrainer runs under DDP, ZeRO-1 or ZeRO-2, not under FSDP or ZeRO-3.")
        rows, prompts = self.train_dataset, args.generation_batch_size // args.num_generations
        refuse(not hasattr(rows, "__len__") or len(rows) < prompts, f"A rollout takes {prompts} "
               "prompts: give a train_dataset with as many, or lower generation_batch_size.")
        critic = value_model or get_config_model_id(self.model.config)
        if not isinstance(critic, nn.Module):
            load = AutoModelForSequenceClassification.from_pretrained
            critic = load(critic, num_labels=1, dtype=torch.float32)
        outputs = getattr(getattr(critic, "score", None), "out_features", 0)
        size, needed = critic.get_input_embeddings().num_embeddings, len(self._tokenizer)
        refuse(outputs != 1 or size < needed, f"value_model has {outputs} outputs, {size} tokens, "
               f"needs 1 and {needed}: set num_labels=1, and use the policy's tokenizer.")
        if value_model is None:
            nn.init.zeros_(critic.score.weight)  # no opinion is better than a random one
        if args.gradient_checkpointing:
            critic.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        disable_dropout_in_model(critic)
        self.kl_coef, self._sum = args.beta, partial(self.accelerator.reduce, reduction="sum")
        self.value_model = critic.requires_grad_(True).to(self.accelerator.device)
        self.policy_and_value = PolicyAndValueModel(self.model, self.value_model)

    def _log_means(self, weight, **tensors) -> None:
        """Log each tensor's mean under `weight` (of the same shape), over all processes."""
        sums = [(x.detach() * weight).sum().float() for x in (*tensors.values(), weight.bool())]
        *sums, count = self._sum(torch.stack(sums)).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, total in zip(tensors, sums, strict=True):
            metrics[f"ppo/{name}"].append(total / count)

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
        with self.accelerator.autocast():
            completions = super()._generate_single_turn(*args, **kwargs)
        self.model_wrapped = wrapped
        return completions

    def _calculate_rewards(self, inputs, prompts, *args):
        rewards = super()._calculate_rewards(inputs, prompts, *args)  # of all processes
        scores = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        if rewards.isnan().all(dim=1).any() or not scores.isfinite().all():
            raise ValueError("An answer got no finite score: let a reward function return one.")
        self._scores = scores[self.accelerator.process_index * len(prompts) :][: len(prompts)]
        return rewards

    @staticmethod
    def _model_inputs(batch: dict):
        """`input_ids` and `attention_mask` (B, P + T) of a batch of TRL's, and the length T."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        return ids, mask, batch["completion_ids"].shape[1]

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs):
        """TRL's rollout, with `values`, `advantages`, `returns` (B, T) for the passes over it."""
        rollout = super()._generate_and_score_completions(inputs)
        args, mask, sequence = self.args, rollout["completion_mask"], self._model_inputs(rollout)
        if "old_per_token_logps" not in rollout:  # TRL computes them only if it needs them itself
            logps, *_ = self._get_per_token_logps_and_entropies(self.model, *sequence)
            rollout["old_per_token_logps"] = logps
        values = self._in_chunks(token_values, self.value_model, *sequence)
        kl = (rollout["old_per_token_logps"] - rollout["ref_per_token_logps"]) * mask
        non_eos = ~ends_with_eos(rollout["completion_ids"], mask, self.eos_token_ids)
        scores = self._scores - (args.missing_eos_penalty or 0.0) * non_eos
        rewards = compute_rewards(scores, kl, mask, self.kl_coef)
        advantages, returns = compute_gae(rewards, values, mask, args.gamma, args.lam)
        if args.whiten_advantages:
            advantages = masked_whiten(advantages, mask, self._sum)
        rollout.update(values=values, advantages=advantages, returns=returns)
        sums = {"kl": kl.sum(1), "return": rewards.sum(1), "score": scores, "non_eos_rate": non_eos}
        self._log_means(torch.ones_like(scores), **sums)
        self._log_means(mask, kl_per_token=kl, value=values)
        metrics = self._metrics["train" if self.model.training else "eval"]
        _, variance = masked_mean_var(scores, torch.ones_like(scores), self._sum)
        explained = explained_variance(values, returns, mask, self._sum)
        metrics["ppo/score_std"].append(variance.sqrt().item())
        metrics["ppo/explained_variance"].append(explained.item())
        metrics["ppo/kl_coef"].append(self.kl_coef)
        if self.model.training and args.kl_target is not None:
            self.kl_coef = update_kl_coef(self.kl_coef, metrics["ppo/kl"][-1], args.kl_target)
        metrics.pop("frac_reward_zero_std", None)  # of the group baseline, like TRL's advantages
        shown = self.accelerator.gather((advantages * mask).sum(1) / mask.sum(1)).tolist()
        for i, advantage in enumerate(reversed(shown), start=1):
            self._logs["advantages"][-i] = advantage
        return rollout

    def _compute_loss(self, model, inputs):
        """Policy loss + vf_coef * value loss - entropy_coef * entropy, averaged over the tokens."""
        model = self.policy_and_value if model is self.model else model  # bare, in evaluation
        mask, args = inputs["completion_mask"], self.args
        with self.accelerator.autocast():
            logps, entropy, values = model(*self._model_inputs(inputs))
        names = ("old_per_token_logps", "advantages", "values", "returns")
        old_logps, advantages, old_values, returns = (inputs[name] for name in names)
        clip = self.epsilon_low, self.epsilon_high
        policy, ratio, clipped = policy_loss(logps, old_logps, advantages, *clip)
        if "importance_sampling_ratio" in inputs:  # vLLM's probabilities differ a little
            policy = policy * inputs["importance_sampling_ratio"]
        value, value_cut = value_loss(values, old_values, returns, args.cliprange_value)
        self._log_means(mask, policy_loss=policy, value_loss=value, entropy=entropy, ratio=ratio,
                        clip_fraction=clipped, value_clip_fraction=value_cut)
        loss = policy + args.vf_coef * value
        if self.entropy_coef != 0.0:
            loss = loss - self.entropy_coef * entropy
        # A mean over all tokens of the step, however they are split; DDP averages over processes.
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * self.current_gradient_accumulation_steps / args.steps_per_generation
        return (loss * mask).sum() / tokens

    def _prepare_for_training(self, *args, **kwargs):
        policy, self.model = self.model, self.policy_and_value
        if self.model_wrapped is policy:
            self.model_wrapped = self.policy_and_value
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.model = self.callback_handler.model = policy
        return prepared

    def create_optimizer(self, model=None):
        """Trainer's optimizer over both models, the critic in parameter groups of its own."""
        if self.optimizer is None:
            critic = {id(parameter) for parameter in self.value_model.parameters()}
            for group in list(super().create_optimizer(self.policy_and_value).param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in critic]
                group["params"] = [p for p in group["params"] if id(p) not in critic]
                lr = self.args.value_learning_rate  # 0: the critic stays what it was
                lr = group["lr"] if lr is None else lr
                self.optimizer.add_param_group({**group, "params": own, "lr": lr})
        return self.optimizer

    def _save(self, output_dir=None, state_dict=None):
        """The policy as a plain model, the critic in `value_model/` beside it."""
        def part(prefix):  # DeepSpeed hands over the weights of both
            weights = (state_dict or {}).items()
            return {k.removeprefix(prefix): v for k, v in weights if k.startswith(prefix)} or None
        super()._save(output_dir, part("policy."))
        if self.args.should_save:
            path = os.path.join(output_dir or self.args.output_dir, "value_model")
            self.value_model.save_pretrained(path, state_dict=part("value_model."))

    def _save_optimizer_and_scheduler(self, output_dir):
        # As a PEFT model's, DeepSpeed's checkpoint would lack the base, and fail to load.
        policy, self.model = self.model, self.policy_and_value
        super()._save_optimizer_and_scheduler(output_dir)
        self.model = policy

    def _get_train_sampler(self, dataset=None):
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def _save_checkpoint(self, model, trial):
        """TRL's checkpoint and the current rollout, so that a run resumes exactly from any step."""
        path = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        os.makedirs(path, exist_ok=True)
        state = self._step, self.kl_coef, self._buffered_inputs
        torch.save(state, os.path.join(path, f"ppo_state_{self.args.process_index}.pt"))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        path = os.path.join(checkpoint, f"ppo_state_{self.args.process_index}.pt")
        if not os.path.isfile(path):
            raise ValueError(f"{path} is missing: resume PPO, with as many processes as before.")
        state = torch.load(path, map_location=self.accelerator.device.type, weights_only=True)
        self._step, self.kl_coef, self._buffered_inputs = state
        if not self.is_deepspeed_enabled:  # which has loaded both models already
            path, critic = os.path.join(checkpoint, "value_model"), self.value_model
            critic.load_state_dict(critic.from_pretrained(path, dtype=critic.dtype).state_dict())
        for _ in range(int(self.state.epoch)):  # TRL would begin with the first epoch's order again
            next(iter(self._sampler))
