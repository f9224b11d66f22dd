"""rlhf/ppo_trainer.py: the mathematics by hand, and the trainer on a tiny GPT-2."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import log_softmax
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    PreTrainedTokenizerFast,
)

from rlhf.ppo_config import PPOConfig
from rlhf.ppo_trainer import PPOTrainer, backbone_inputs

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
WORDS = ["user", "assistant", *"abcdefghijklmnopqrst"]


@pytest.fixture(scope="module")
def tokenizer():
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
    vocabulary = {word: i for i, word in enumerate(specials + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|im_start|>"],
        padding_side="left",
    )
    fast.chat_template = TEMPLATE
    return fast


def _config(tokenizer, **kwargs):
    return GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0, **kwargs,
    )


@pytest.fixture(scope="module")
def policy_dir(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("policy")
    AutoModelForCausalLM.from_config(_config(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def reward_dir(tokenizer, tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("reward")
    config = _config(tokenizer, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def prompts():
    contents = ["a", "b c d e f", "g h", "i j k", "l", "m n o p", "q", "r s t a b c d"] * 2
    return Dataset.from_list([{"prompt": [{"role": "user", "content": c}]} for c in contents])


def share_of_a(completions, **kwargs):
    words = [completion[0]["content"].split() for completion in completions]
    return [w.count("a") / max(len(w), 1) for w in words]


def _args(output_dir, **kwargs):
    settings = {
        "output_dir": str(output_dir), "per_device_train_batch_size": 4, "steps_per_generation": 2,
        "num_iterations": 2, "max_completion_length": 8, "learning_rate": 1e-2, "max_steps": 4,
        "logging_steps": 1, "save_strategy": "no", "bf16": False, "use_cpu": True, "report_to": [],
        "gradient_checkpointing": False, "disable_tqdm": True, "lr_scheduler_type": "constant",
    }
    return PPOConfig(**{**settings, **kwargs})


def _trainer(policy_dir, tokenizer, prompts, output_dir, *, kind=PPOTrainer, reward=share_of_a,
             value_model=None, peft_config=None, **kwargs):
    return kind(
        policy_dir, reward, _args(output_dir, **kwargs), value_model=value_model,
        train_dataset=prompts, processing_class=copy.deepcopy(tokenizer), peft_config=peft_config,
    )


def _logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class RecordingTrainer(PPOTrainer):
    """Keeps the weights, the batch and the loss of every step."""

    def _compute_loss(self, model, inputs):
        before = copy.deepcopy((self.model.state_dict(), self.value_model.state_dict()))
        loss = super()._compute_loss(model, inputs)
        if not hasattr(self, "steps"):
            self.steps = []
        self.steps.append((before, dict(inputs), loss.item()))
        return loss


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small lose by threads, and much so beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recorded(policy_dir, reward_dir, tokenizer, prompts, tmp_path_factory):
    """Two rollouts of two micro-batches, two epochs each; the critic is the reward model's copy."""
    trainer = _trainer(
        policy_dir, tokenizer, prompts, tmp_path_factory.mktemp("recorded"), kind=RecordingTrainer,
        reward=reward_dir, value_model=reward_dir, beta=0.3, missing_eos_penalty=2.0, vf_coef=0.7,
        gradient_accumulation_steps=2, temperature=0.7, learning_rate=3e-2, entropy_coef=0.01,
    )
    trainer.train()
    return trainer


def test_ratio_is_one_on_the_first_pass(recorded):
    ratios, clips = _logged(recorded, "ppo/ratio"), _logged(recorded, "ppo/clip_fraction")
    assert len(ratios) == 4  # steps 0 and 2 are first passes
    for first_pass in (0, 2):
        assert ratios[first_pass] == pytest.approx(1.0, abs=1e-6)
        assert clips[first_pass] == 0.0
    assert abs(ratios[1] - 1.0) > 1e-4  # the second epoch has moved away, so the test can fail


def reference_loss(policy, critic, reference, score_of, batch, args):
    """PPO's loss of a batch that is a whole rollout, written out with loops."""
    logps, values, entropies, old, rewards = [], [], [], [], []
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        answer = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        ids, start = torch.cat([prompt, answer]).unsqueeze(0), len(prompt) - 1
        index = torch.arange(len(answer))
        logits = policy(ids).logits[0, start:-1] / args.temperature
        every = log_softmax(logits, dim=-1)
        logps.append(every[index, answer])
        entropies.append(-(every.exp() * every).sum(-1))
        hidden = critic.transformer(ids).last_hidden_state
        values.append(critic.score(hidden)[0, start:-1, 0])
        ref_logits = reference(ids).logits[0, start:-1] / args.temperature
        old.append(logps[-1].detach())
        reward = -args.beta * (old[-1] - log_softmax(ref_logits, dim=-1)[index, answer])
        reward[-1] += score_of(prompt, answer)
        reward[-1] -= 0.0 if answer[-1] == 2 else args.missing_eos_penalty
        rewards.append(reward.detach())
    advantages = []
    for reward, value in zip(rewards, values, strict=True):
        value = [*value.tolist(), 0.0]
        advantage = [0.0] * (len(reward) + 1)
        for t in reversed(range(len(reward))):
            delta = reward[t].item() + args.gamma * value[t + 1] - value[t]
            advantage[t] = delta + args.gamma * args.lam * advantage[t + 1]
        advantages.append(torch.tensor(advantage[:-1]))
    flat = torch.cat(advantages)
    returns = flat + torch.cat(values).detach()
    white = (flat - flat.mean()) / flat.std(unbiased=False)
    ratio = torch.exp(torch.cat(logps) - torch.cat(old))
    policy_term = -torch.min(ratio * white, ratio.clamp(0.8, 1.2) * white)
    value_term = 0.5 * (torch.cat(values) - returns) ** 2
    entropy_term = -args.entropy_coef * torch.cat(entropies)
    return (policy_term + args.vf_coef * value_term + entropy_term).mean()


def test_loss_of_a_step_equals_a_reference(recorded, policy_dir, reward_dir, tokenizer):
    """The two micro-batches of the first step of the second rollout hold the whole rollout."""
    (weights, first, loss_a), (_, second, loss_b) = recorded.steps[4:6]
    policy, reference = (AutoModelForCausalLM.from_pretrained(policy_dir) for _ in range(2))
    load = AutoModelForSequenceClassification.from_pretrained
    critic, reward_model = load(reward_dir), load(reward_dir)
    policy.load_state_dict(weights[0])
    critic.load_state_dict(weights[1])

    def score_of(prompt, answer):  # TRL shows the reward model the answer as a finished message
        words = tokenizer.decode(prompt), tokenizer.decode(answer, skip_special_tokens=True)
        return reward_model(
            **tokenizer(" ".join([*words, "<|im_end|>"]), return_tensors="pt")
        ).logits[0, 0]

    width = max(first["prompt_ids"].shape[1], second["prompt_ids"].shape[1])
    assert first["prompt_ids"].shape[1] == width  # split from one rollout, so padded alike
    assert (first["prompt_mask"].sum(1) < width).any()  # left padding is part of the test
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    batch = {name: torch.cat([first[name], second[name]]) for name in names}
    expected = reference_loss(policy, critic, reference, score_of, batch, recorded.args)
    assert loss_a + loss_b == pytest.approx(expected.item(), abs=1e-5)


def test_each_loss_reaches_only_its_own_model(policy_dir, tokenizer, prompts, tmp_path):
    def gradients(vf_coef, scale):
        class Trainer(RecordingTrainer):
            def _clip_grad_norm(self, model):
                self.norms = [
                    sum(p.grad.abs().sum().item() for p in part.parameters() if p.grad is not None)
                    for part in (self.model, self.value_model)
                ]
                return super()._clip_grad_norm(model)

            def _generate_and_score_completions(self, inputs):
                rollout = super()._generate_and_score_completions(inputs)
                rollout["advantages"] *= scale
                return rollout

        trainer = _trainer(policy_dir, tokenizer, prompts, tmp_path, kind=Trainer, max_steps=1,
                           vf_coef=vf_coef)
        trainer.train()
        return trainer.norms

    policy, critic = gradients(vf_coef=0.0, scale=1.0)
    assert policy > 1e-3 and critic == 0.0
    policy, critic = gradients(vf_coef=0.5, scale=0.0)
    assert policy == 0.0 and critic > 1e-3


def test_training_raises_the_reward_and_the_critic_learns(policy_dir, tokenizer, prompts, tmp_path):
    trainer = _trainer(
        policy_dir, tokenizer, prompts, tmp_path, max_steps=60, learning_rate=3e-3, beta=0.01,
        per_device_train_batch_size=8, vf_coef=0.5, value_learning_rate=1e-2, kl_target=1.0,
    )
    trainer.train()
    reward = _logged(trainer, "reward")
    assert sum(reward[-3:]) / 3 > sum(reward[:3]) / 3 + 0.3
    assert _logged(trainer, "ppo/explained_variance")[-1] > 0.2
    kl, coef = _logged(trainer, "ppo/kl"), _logged(trainer, "ppo/kl_coef")
    assert coef[0] == 0.01
    for i in range(len(coef) - 1):
        assert (coef[i + 1] > coef[i]) == (kl[i] > 1.0)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [3e-3, 3e-3, 1e-2, 1e-2]


def test_a_rate_of_0_leaves_the_critic_as_it_was(policy_dir, tokenizer, prompts, tmp_path):
    trainer = _trainer(policy_dir, tokenizer, prompts, tmp_path, value_learning_rate=0.0)
    before = copy.deepcopy(trainer.value_model.state_dict())
    trainer.train()
    assert all(torch.equal(w, before[n]) for n, w in trainer.value_model.state_dict().items())


def test_saved_policy_is_a_plain_model(recorded, tmp_path):
    recorded.save_model(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    for name, weight in recorded.model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=0, atol=0)
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "value_model")
    for name, weight in recorded.value_model.state_dict().items():
        torch.testing.assert_close(critic.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize("step", [4, 6, 9])  # a boundary between rollouts, within one, second epoch
def test_resumed_run_is_bit_equal(step, policy_dir, tokenizer, prompts, tmp_path):
    def run(resume=None, save="no"):
        trainer = _trainer(
            policy_dir, tokenizer, prompts, tmp_path, max_steps=16, save_strategy=save,
            save_steps=step, kl_target=0.5, learning_rate=3e-3,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run(save="steps")
    resumed = run(resume=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.kl_coef == straight.kl_coef != 0.05
    for name in ("model", "value_model"):
        pairs = getattr(straight, name).state_dict(), getattr(resumed, name).state_dict()
        for key, weight in pairs[0].items():
            assert torch.equal(weight, pairs[1][key]), f"{name}: {key}"
    assert _logged(resumed, "ppo/score")[-1] == _logged(straight, "ppo/score")[-1]


def test_lora_policy_trains_against_its_base(policy_dir, tokenizer, prompts, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    trainer = _trainer(policy_dir, tokenizer, prompts, tmp_path, peft_config=lora, max_steps=8)
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora_" not in n}
    critic = copy.deepcopy(trainer.value_model.state_dict())
    trainer.train()
    kl = _logged(trainer, "ppo/kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-5) and abs(kl[1]) > 1e-4
    for name, parameter in trainer.model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name
    assert not torch.equal(critic["score.weight"], trainer.value_model.score.weight)
    trainer.save_model(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_evaluation_logs_and_changes_nothing(policy_dir, tokenizer, prompts, tmp_path):
    trainer = _trainer(policy_dir, tokenizer, prompts, tmp_path, kl_target=0.1, max_steps=1)
    trainer.train()
    before = trainer.kl_coef, copy.deepcopy(trainer.model.state_dict())
    metrics = trainer.evaluate(prompts)
    assert math.isfinite(metrics["eval_loss"]) and trainer.kl_coef == before[0]
    assert "eval_ppo/kl" in trainer.state.log_history[-1]
    assert all(torch.equal(w, before[1][n]) for n, w in trainer.model.state_dict().items())


def test_positions_start_at_the_first_real_token():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert backbone_inputs(mask, mask)["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "grpo"}, "loss_type='grpo'.*set it to 'dapo'"),
        ({"scale_rewards": "group"}, "whiten_advantages"),
        ({"mask_truncated_completions": True}, "missing_eos_penalty"),
        ({"disable_dropout": False}, "ratio is not 1"),
        ({"top_k": 50}, "top_k=50.*temperature"),
        ({"beta": 0.0}, "beta.*got 0.0"),
        ({"lam": 1.5}, "lam <= 1.0, got 1.5"),
        ({"missing_eos_penalty": -1.0}, "got -1.0"),
        ({"temperature": 0.0}, "temperature <= inf, got 0.0"),
    ],
)
def test_settings_that_ppo_cannot_honour_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        _args(tmp_path, **settings)


def test_wrong_models_and_data_are_refused(policy_dir, reward_dir, tokenizer, prompts, tmp_path):
    reward = AutoModelForSequenceClassification.from_pretrained(reward_dir)
    with pytest.raises(ValueError, match="pass a copy"):
        _trainer(policy_dir, tokenizer, prompts, tmp_path, reward=reward, value_model=reward)
    two = AutoModelForSequenceClassification.from_config(_config(tokenizer, num_labels=2))
    with pytest.raises(ValueError, match="has 2 outputs.*num_labels=1"):
        _trainer(policy_dir, tokenizer, prompts, tmp_path, value_model=two)
    config = _config(tokenizer, num_labels=1)
    config.vocab_size = 5
    small = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ValueError, match="5 tokens.*policy's tokenizer"):
        _trainer(policy_dir, tokenizer, prompts, tmp_path, value_model=small)
    with pytest.raises(ValueError, match="takes 8 prompts: .*lower"):
        _trainer(policy_dir, tokenizer, prompts.select(range(3)), tmp_path)
    with pytest.raises(ValueError, match="no finite score"):
        _trainer(policy_dir, tokenizer, prompts, tmp_path,
                 reward=lambda completions, **_: [None] * len(completions)).train()
