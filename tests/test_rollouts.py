"""rlhf/rollouts.py: the same answers as `generate`, from the probabilities of the full model."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    TopKLogitsWarper,
)
from trl import GRPOConfig

import rlhf.rollouts
from pretrain.modeling_gpt import GPT2LMHeadModel
from rlhf.policy_copy import copy_weights, plain_weights, why_not_copied
from rlhf.rollouts import (
    FastGRPOTrainer,
    choose_token,
    compile_step,
    copy_for_rollouts,
    decode_one_token,
    sample_answers,
)
from sft.model import complete_head

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6, 7], [20, 21]]
LLAMA = dict(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    max_position_embeddings=256,
)  # fmt: skip


def make_policy(kind, tiny_config):
    torch.manual_seed(0)
    config = copy.deepcopy(tiny_config)
    config.initializer_range, config.n_positions = 0.3, 256  # peaked, so that greedy is no tie
    if kind == "llama":
        return AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA)).eval()
    if kind == "ours":
        return GPT2LMHeadModel(config).eval()
    return AutoModelForCausalLM.from_config(config).eval()


def copied(policy, dtype=torch.float32):
    model = copy_for_rollouts(policy, dtype)
    copy_weights(policy, model)
    return model


def full_logps(policy, prompt, answer, temperature=1.0):
    """Log-probabilities (V,) before each token of an answer, by one forward over the text."""
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([prompt + answer])).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(dim=-1)


@pytest.mark.parametrize("kind", ["gpt2", "ours", "llama"])
def test_greedy_answers_are_those_of_generate(kind, tiny_config):
    policy = make_policy(kind, tiny_config)
    answers, _ = sample_answers(copied(policy), PROMPTS, 70, [], temperature=0)  # beyond 64 places
    ends = [answers[0][3], answers[2][40]]
    ended, _ = sample_answers(copied(policy), PROMPTS, 70, ends, temperature=0)
    for prompt, answer, cut in zip(PROMPTS, answers, ended, strict=True):
        ids = torch.tensor([prompt])
        expected = policy.generate(ids, do_sample=False, max_new_tokens=70, eos_token_id=None,
                                   pad_token_id=0)[0, len(prompt) :].tolist()  # fmt: skip
        assert answer == expected
        first = next((i for i, token in enumerate(answer) if token in ends), len(answer))
        assert cut == answer[: first + 1]


@pytest.mark.parametrize("kind", ["gpt2", "ours", "llama"])
def test_samples_come_from_the_distribution_of_the_full_model(kind, tiny_config):
    policy = make_policy(kind, tiny_config)
    torch.manual_seed(1)
    rows_of_steps = []

    def step(model, tokens, *args):
        rows_of_steps.append(len(tokens))
        return decode_one_token(model, tokens, *args)

    prompts, ends = PROMPTS * 4, list(range(0, 100, 7))
    answers, logps = sample_answers(copied(policy), prompts, 30, ends, 0.7, (), step)
    for prompt, answer, got in zip(prompts, answers, logps, strict=True):
        index = torch.tensor(answer)[:, None]
        expected = full_logps(policy, prompt, answer, 0.7).gather(1, index)[:, 0]
        torch.testing.assert_close(torch.tensor(got), expected, rtol=0, atol=1e-4)
        assert not set(answer[:-1]) & set(ends) and (answer[-1] in ends or len(answer) == 30)
    # Rows that have ended leave as soon as they are a quarter of the batch.
    lengths = torch.tensor([len(answer) for answer in answers])
    assert rows_of_steps == sorted(rows_of_steps, reverse=True) and rows_of_steps[-1] < 20
    for i, rows in enumerate(rows_of_steps):
        assert int((lengths > i + 1).sum()) <= rows
        assert int((lengths > i + 1).sum()) > 0.75 * rows


def test_prompts_of_one_token_are_answered(tiny_config):
    policy = make_policy("ours", tiny_config)
    answers, _ = sample_answers(copied(policy), [[8], [8]], 5, [], temperature=0)
    expected = policy.generate(torch.tensor([[8]]), do_sample=False, max_new_tokens=5,
                               eos_token_id=None, pad_token_id=0)  # fmt: skip
    assert answers == [expected[0, 1:].tolist()] * 2


def test_bf16_answers_are_near_the_full_model(tiny_config):
    policy = make_policy("ours", tiny_config)
    answers, logps = sample_answers(copied(policy, torch.bfloat16), PROMPTS, 20, [])
    for prompt, answer, got in zip(PROMPTS, answers, logps, strict=True):
        index = torch.tensor(answer)[:, None]
        expected = full_logps(policy, prompt, answer).gather(1, index)[:, 0]
        assert (torch.tensor(got) - expected).abs().mean() < 0.1  # log-probabilities about -2


def test_tokens_are_chosen_with_their_probability():
    logits = torch.tensor([0.0, 2.0, float("-inf"), 1.0, -1.0, float("-inf")])
    chance = ((torch.arange(20000) + 0.5) / 20000)[:, None]  # every part of [0, 1) alike
    tokens, logps = choose_token(logits.expand(20000, -1), chance, temperature=0.5)
    expected = torch.softmax(logits / 0.5, dim=-1)
    shares = torch.bincount(tokens[:, 0], minlength=6) / 20000
    torch.testing.assert_close(shares, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logps.exp(), expected[tokens], rtol=1e-5, atol=0)
    edges = torch.tensor([[0.0], [1 - 2**-24]])  # the ends of what torch.rand returns
    logits = torch.tensor([[float("-inf"), 1.0, 0.0, float("-inf")]]).expand(2, -1)
    assert choose_token(logits, edges, 1.0)[0].tolist() == [[1], [2]]
    assert choose_token(logits, edges, 0)[0].tolist() == [[1], [1]]
    warpers = (TopKLogitsWarper(1),)
    assert choose_token(logits, edges, 1.0, warpers)[0].tolist() == [[1], [1]]


def lora_policy(base_dir):
    policy = AutoModelForCausalLM.from_pretrained(base_dir)
    config = LoraConfig(
        r=4, target_modules="all-linear", trainable_token_indices=[4, 5], task_type="CAUSAL_LM"
    )
    policy = get_peft_model(policy, config).eval()
    complete_head(policy)
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_" in name or "trainable_tokens" in name:
            torch.nn.init.normal_(parameter.data, std=0.2)
    return policy


def test_a_lora_policy_is_copied_merged_and_stays_as_it_is(base_dir):
    policy = lora_policy(base_dir)
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    model, ids = copied(policy), torch.tensor([[4, 5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, policy(input_ids=ids).logits,
                                   rtol=0, atol=1e-4)  # fmt: skip
        with policy.disable_adapter():
            base = policy(input_ids=ids).logits
        assert (model(input_ids=ids).logits - base).abs().max() > 0.1
    assert all(torch.equal(weight, before[n]) for n, weight in policy.state_dict().items())
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.5)
    copy_weights(policy, model)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, policy(input_ids=ids).logits,
                                   rtol=0, atol=1e-4)  # fmt: skip
    names = {name for name, _ in plain_weights(policy)}
    assert names == {n for n, _ in model.named_parameters(remove_duplicate=False)}


def test_a_copy_takes_no_random_numbers_of_the_run(tiny_config):
    policy = make_policy("ours", tiny_config)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    copied(policy)
    assert torch.equal(torch.rand(1), expected)


def test_what_cannot_be_copied_is_named(base_dir):
    assert why_not_copied(lora_policy(base_dir)) is None
    sizes = {key: LLAMA[key] for key in LLAMA if key != "initializer_range"}
    windows = AutoModelForCausalLM.from_config(MistralConfig(**sizes, sliding_window=8))
    assert why_not_copied(windows) == "its cache is not made of plain layers"
    policy = AutoModelForCausalLM.from_pretrained(base_dir)
    dora = get_peft_model(policy, LoraConfig(target_modules=["c_attn"], use_dora=True))
    assert "more than a plain LoRA" in why_not_copied(dora)


@pytest.fixture
def make_trainer(base_dir, tokenizer, tmp_path):
    def make(**settings):
        rows = [{"prompt": [{"role": "user", "content": f"{i} + {i}?"}]} for i in range(8)]
        args = GRPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, beta=0.0,
            max_completion_length=6, max_steps=2, learning_rate=1e-2, logging_steps=1,
            save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True, bf16=False,
            gradient_checkpointing=False, **settings,
        )  # fmt: skip
        return FastGRPOTrainer(
            str(base_dir), lambda completion_ids, **_: [float(ids[0]) for ids in completion_ids],
            args, train_dataset=Dataset.from_list(rows), processing_class=copy.deepcopy(tokenizer),
        )  # fmt: skip

    return make


def test_grpo_samples_from_the_policy_as_it_is_now(make_trainer, monkeypatch):
    seen = []

    def record(model, prompts, *args, **kwargs):
        answers = sample_answers(model, prompts, *args, **kwargs)
        seen.append((prompts[0], answers[0][0], answers[1][0], copy.deepcopy(model.state_dict())))
        return answers

    monkeypatch.setattr(rlhf.rollouts, "sample_answers", record)
    trainer = make_trainer(temperature=0.7)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert len(seen) == 2
    assert all(torch.equal(weight, start[name]) for name, weight in seen[0][3].items())
    assert any(not torch.equal(weight, start[name]) for name, weight in seen[1][3].items())
    assert trainer.args.max_completion_length == 6 and all(len(one[1]) <= 6 for one in seen)


def test_what_is_not_supported_is_left_to_trl_and_said(make_trainer, monkeypatch, capsys):
    monkeypatch.setattr(rlhf.rollouts, "sample_answers", None)
    trainer = make_trainer(repetition_penalty=1.2)
    trainer.train()
    assert capsys.readouterr().out.count("repetition_penalty=1.2") == 1
    assert trainer.state.global_step == 2


def test_long_runs_are_compiled(make_trainer, monkeypatch):
    compiled = []

    def compile_as_if(model, count, *args):
        compiled.append(count)
        return decode_one_token

    monkeypatch.setattr(rlhf.rollouts, "compile_step", compile_as_if)
    for steps, expected in ((12, [8]), (13, [8])):  # 2 rounds of 6 tokens
        monkeypatch.setattr(rlhf.rollouts, "COMPILED_STEPS", steps)
        make_trainer().train()
        assert compiled == expected


@pytest.mark.slow
def test_the_compiled_step_is_the_same_step_and_compiled_once(tiny_config):
    model = copied(make_policy("ours", tiny_config))
    step = compile_step(model, 20, 1.0)
    assert step is not decode_one_token
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count, ends in ((20, range(0, 500, 9)), (7, []), (3, [])):
            prompts = (PROMPTS * 4)[:count]
            runs = []
            for each in (decode_one_token, step):
                torch.manual_seed(0)
                runs.append(sample_answers(model, prompts, 70, list(ends), 1.0, (), each))
            assert runs[0][0] == runs[1][0]
            for ours, theirs in zip(runs[0][1], runs[1][1], strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4)
