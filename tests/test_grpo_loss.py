"""TRL's GRPO, as the recipes use it, against its formula written out row by row."""

import pytest
import torch
from datasets import Dataset
from transformers import GPT2LMHeadModel
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from pretrain.hardware import training_defaults
from rlhf.rollouts import FastGRPOTrainer
from rlhf.train_grpo import count_positions_of_reference
from sft.model import complete_head, load_model
from sft.train import load_chat_tokenizer

QUESTIONS = ["Who are you?", "12 + 30 = ", "小河流过磨坊。The river runs past the mill."]
TEMPERATURE, EPSILON, BETA = 0.8, 0.1, 0.3


def count_vowels(completions, **columns):
    return [float(sum(chat[0]["content"].count(v) for v in "aeiou")) for chat in completions]


def answer_logps(model, prompt, answer):
    """Log-probability of each token of one answer, without padding; at the sampling temperature."""
    logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(dim=-1).gather(1, answer[:, None])[:, 0]


def group_advantages(rewards, prompts):
    """(r - mean) / std among the answers to the same prompt (Shao et al. 2024, section 4.1.2)."""
    advantages = []
    for reward, prompt in zip(rewards, prompts, strict=True):
        group = [r for r, p in zip(rewards, prompts, strict=True) if p.tolist() == prompt.tolist()]
        group = torch.tensor(group)
        advantages.append((reward - group.mean()) / (group.std() + 1e-4))
    return advantages


def grpo_loss(model, old, reference, prompts, answers, rewards, loss_type):
    """Shao et al. 2024, eq. 3: clipped ratio x advantage - beta x KL, with the estimator k3."""
    rows = []
    advantages = group_advantages(rewards, prompts)
    for prompt, answer, advantage in zip(prompts, answers, advantages, strict=True):
        logps = answer_logps(model, prompt, answer)
        with torch.no_grad():
            old_logps, ref_logps = (answer_logps(m, prompt, answer) for m in (old, reference))
        ratio = (logps - old_logps).exp()
        clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
        difference = ref_logps - logps
        kl = difference.exp() - difference - 1
        # The answers are the old policy's: as an estimate of the new one's KL, each token counts
        # by the ratio (DeepSeek-V3.2, 2025; TRL's use_bias_correction_kl).
        rows.append(-torch.min(ratio * advantage, clipped * advantage) + BETA * kl * ratio)
    if loss_type == "grpo":  # every answer counts alike
        return torch.stack([row.mean() for row in rows]).mean()
    return torch.cat(rows).mean()  # "dapo": every token does


def make_trainer(base_dir, output_dir, reward_funcs=count_vowels, **settings):
    given = training_defaults() | {
        "output_dir": str(output_dir), "use_cpu": True, "bf16": False, "report_to": [],
        "per_device_train_batch_size": 12, "num_generations": 4, "max_completion_length": 8,
        "temperature": TEMPERATURE, "epsilon": EPSILON, "beta": BETA, "num_iterations": 2,
    }  # fmt: skip
    tokenizer = load_chat_tokenizer(base_dir)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in QUESTIONS]
    trainer = FastGRPOTrainer(
        model=load_model(ModelConfig(model_name_or_path=str(base_dir)), tokenizer),
        reward_funcs=reward_funcs,
        args=GRPOConfig(**given | settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    complete_head(trainer.model)
    count_positions_of_reference(trainer)
    return trainer


def plain_copy(policy):
    """transformers' model with the same weights: of TRL's, a copy would call the original."""
    copy = GPT2LMHeadModel(policy.config).eval()
    copy.load_state_dict(policy.state_dict())
    return copy


def drift(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


def unpad(ids, mask):
    return [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_loss_and_gradient_equal_the_reference(base_dir, tmp_path, loss_type):
    trainer = make_trainer(base_dir, tmp_path, loss_type=loss_type)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    policy = trainer.model
    torch.manual_seed(1)
    reference = plain_copy(policy)
    drift(policy)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    old = plain_copy(policy)
    drift(policy)  # as after some steps: ratios differ from 1, and some are clipped
    loss = trainer.compute_loss(policy, inputs)
    metrics = trainer._metrics["train"]
    assert 0.1 < metrics["clip_ratio/region_mean"][0] < 0.9 and metrics["kl"][0] > 0.01

    prompts = unpad(inputs["prompt_ids"], inputs["prompt_mask"])
    answers = unpad(inputs["completion_ids"], inputs["completion_mask"])
    assert len({len(prompt) for prompt in prompts}) == 3, "without padding the test shows less"
    texts = trainer.processing_class.batch_decode(answers, skip_special_tokens=True)
    rewards = count_vowels([[{"content": text}] for text in texts])
    arguments = (prompts, answers, rewards, loss_type)
    expected = grpo_loss(policy, old, reference, *arguments)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    weights = [policy.transformer.h[0].mlp.c_fc.weight, policy.transformer.wte.weight]
    for ours, theirs in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True
    ):
        assert ours.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("equal_groups", [1, 3])
def test_answers_without_advantage_cost_nothing_and_change_nothing(
    base_dir, tmp_path, equal_groups
):
    def count_vowels_of_some(prompts, completions, **columns):
        equal = QUESTIONS[:equal_groups]
        rewards = count_vowels(completions)
        return [
            1.0 if prompt[0]["content"] in equal else reward
            for prompt, reward in zip(prompts, rewards, strict=True)
        ]

    trainer = make_trainer(base_dir, tmp_path, beta=0.0, reward_funcs=count_vowels_of_some)
    policy = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    torch.manual_seed(1)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    drift(policy)
    left = max(12 - 4 * equal_groups, 1)  # of 12 answers; a backward needs one
    seen = []
    handle = policy.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    weights = [policy.transformer.h[0].mlp.c_fc.weight, policy.transformer.wte.weight]
    ours = trainer.compute_loss(policy, inputs)
    handle.remove()
    theirs = GRPOTrainer._compute_loss(trainer, policy, inputs)
    assert seen == [left]
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    for gradient, expected in zip(
        torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True
    ):
        assert (expected.abs().max() > 1e-3) == (equal_groups < 3)
        torch.testing.assert_close(gradient, expected, rtol=0.0, atol=1e-6)
