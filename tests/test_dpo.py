"""DPO: the loss, its reference, and what is said of the pairs before the first step."""

import json
import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, ModelConfig

from rlhf.eval import answer_logps, evaluate_implicit_rewards
from rlhf.pairs import check_shared_prompts, share_on_disk, tokenize_pairs
from rlhf.train_dpo import DPOArguments, main
from sft.model import complete_head, load_model, make_lora_config
from sft.train import load_chat_tokenizer, save_chat_model

QUICK = {
    "use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False,
    "disable_tqdm": True, "save_strategy": "no", "max_length": 64, "logging_steps": 1,
    "per_device_train_batch_size": 3, "precompute_ref_log_probs": True,
}  # fmt: skip
PAIRS = [
    {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    for question, chosen, rejected in [
        ("Who are you?", "I am LadderLM.", "Go."),
        ("12 + 30", "42", "The mill runs past the river."),
        ("你是谁？", "我是天梯。", "小"),
    ]
]


@pytest.fixture
def chat_tokenizer(base_dir):
    return load_chat_tokenizer(base_dir)


def make_trainer(base_dir, tokenizer, tmp_path, model_args=None, **changes):
    model_args = model_args or ModelConfig(model_name_or_path=str(base_dir))
    trainer = DPOTrainer(
        model=load_model(model_args, tokenizer),
        args=DPOConfig(output_dir=str(tmp_path / "out"), **QUICK | changes),
        train_dataset=share_on_disk(Dataset.from_list(PAIRS), tmp_path / "pairs"),
        processing_class=tokenizer,
        peft_config=make_lora_config(model_args, tokenizer),
    )
    complete_head(trainer.model)
    trainer.model.train()
    return trainer


def move(model):
    """Another policy than the reference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)


def reference_logps(model, ids, prompt_length):
    """log p of each answer token behind the prompt."""
    logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return torch.stack([logps[t - 1, ids[t]] for t in range(prompt_length, len(ids))])


def reference_loss(kind, chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    """One pair: Rafailov 2023 (sigmoid), Zhao 2023 (hinge), Azar 2023 (ipo), D'Oosterlinck 2024."""
    up, down = (chosen - ref_chosen).sum(), (rejected - ref_rejected).sum()
    if kind == "sigmoid":
        return -torch.log(torch.sigmoid(beta * (up - down)))
    if kind == "hinge":
        return torch.clamp(1 - beta * (up - down), min=0)
    if kind == "ipo":  # by token, as its authors have it
        return (up / len(chosen) - down / len(rejected) - 1 / (2 * beta)) ** 2
    if kind == "apo_zero":
        return 1 - torch.sigmoid(beta * up) + torch.sigmoid(beta * down)
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kinds", "weights"),
    [(["sigmoid"], None), (["hinge"], None), (["ipo"], None), (["apo_zero"], None),
     (["sigmoid", "sft"], [1.0, 0.5])],
    ids=["sigmoid", "hinge", "ipo", "apo_zero", "sigmoid+sft"],
)  # fmt: skip
def test_the_loss_is_that_of_a_short_reference(base_dir, chat_tokenizer, tmp_path, kinds, weights):
    changes = {"loss_type": kinds, "loss_weights": weights}
    trainer = make_trainer(base_dir, chat_tokenizer, tmp_path, **changes)
    policy, start = trainer.model.eval(), AutoModelForCausalLM.from_pretrained(base_dir).eval()
    move(policy)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(policy, dict(batch)).item()
    total, tokens = 0.0, []
    for prompt, *sides in tokenize_pairs(PAIRS, chat_tokenizer):
        logps = [reference_logps(m, ids, len(prompt)) for m in (policy, start) for ids in sides]
        total += reference_loss(kinds[0], *logps).item() / len(PAIRS)
        tokens += logps[0].tolist()
    if "sft" in kinds:
        total += 0.5 * -sum(tokens) / len(tokens)  # nats a token of the chosen answers
    assert loss == pytest.approx(total, abs=1e-5 * max(1, total))
    assert abs(total - math.log(2)) > 1e-3, "the policy is not the reference"


LOSS_TYPES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


def test_every_loss_type_of_trl_trains(base_dir, chat_tokenizer, tmp_path):
    changes = {"loss_type": LOSS_TYPES, "label_smoothing": 1e-3, "max_steps": 1}
    trainer = make_trainer(base_dir, chat_tokenizer, tmp_path, **changes)
    move(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))
    together = trainer.compute_loss(trainer.model, dict(batch)).item()
    apart = []
    for kind in LOSS_TYPES:
        trainer.loss_types, trainer.loss_weights = [kind], [1.0]
        apart.append(trainer.compute_loss(trainer.model, dict(batch)).item())
    assert together == pytest.approx(sum(apart), rel=1e-5)
    assert len({round(value, 4) for value in apart}) >= 12, "they are different losses"


@pytest.mark.parametrize(
    "lora", [{}, {"use_peft": True}, {"use_peft": True, "load_in_4bit": True}],
    ids=["full", "lora", "qlora"],
)  # fmt: skip
def test_the_first_step_has_no_margin(base_dir, chat_tokenizer, tmp_path, lora):
    """Log-probabilities that were computed before are those that the loss computes."""
    model_args = ModelConfig(model_name_or_path=str(base_dir), **lora)
    bf16 = {"bf16": True} if "load_in_4bit" in lora else {}
    trainer = make_trainer(base_dir, chat_tokenizer, tmp_path, model_args, max_steps=2, **bf16)
    trainer.train()
    first, second = (line for line in trainer.state.log_history if "rewards/margins" in line)
    tolerance = 1e-3 if bf16 else 1e-5  # it rounds rows of a batch of another width otherwise
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=tolerance)
    assert first["rewards/rejected"] == pytest.approx(0.0, abs=tolerance)
    assert first["loss"] == pytest.approx(math.log(2), abs=tolerance)
    assert first["logps/chosen"] < -1.0 and "logps/rejected" in second


def test_implicit_rewards_are_those_of_the_trainer(base_dir, chat_tokenizer, tmp_path):
    trainer = make_trainer(base_dir, chat_tokenizer, tmp_path)
    move(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, dict(batch))
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    save_chat_model(trainer, chat_tokenizer, base_dir)
    metrics = evaluate_implicit_rewards(str(tmp_path / "out"), str(base_dir), PAIRS, 0.1)
    for ours, theirs in (
        ("margin", "rewards/margins"), ("rewards/chosen", "rewards/chosen"),
        ("rewards/rejected", "rewards/rejected"), ("implicit_pair_accuracy", "rewards/accuracies"),
    ):  # fmt: skip
        assert metrics[ours]["value"] == pytest.approx(logged[theirs], abs=1e-4), ours
    tokenized = tokenize_pairs(PAIRS, chat_tokenizer)
    chosen = answer_logps(trainer.model.eval(), tokenized, 1)
    assert sum(chosen) / 3 == pytest.approx(logged["logps/chosen"], abs=1e-3)


def test_a_prompt_that_is_rendered_differently_before_its_answer_is_refused(chat_tokenizer):
    check_shared_prompts(PAIRS, chat_tokenizer)
    whole = chat_tokenizer.chat_template
    chat_tokenizer.chat_template = whole.replace("assistant\\n' -}}", "assistant\\n<think>' -}}")
    with pytest.raises(ValueError, match=r"3 of 3 prompts are tokenised differently.*Who are you"):
        check_shared_prompts(PAIRS, chat_tokenizer)
    chat_tokenizer.chat_template = whole.replace("~ '<|im_end|>'", "~ ''")
    empty = PAIRS[0] | {"chosen": [{"role": "assistant", "content": ""}]}
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("{{- '\\n' -}}", "")
    with pytest.raises(ValueError, match="1 of 2 prompts"):  # nothing is left to compare
        check_shared_prompts([empty, PAIRS[1]], chat_tokenizer)


def run_main(base_dir, tmp_path, **changes):
    """A whole run on `PAIRS`."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    settings = DPOConfig(output_dir=str(tmp_path / "run"), **QUICK | {"max_steps": 1} | changes)
    args = DPOArguments(data_files=[str(path)], test_files=[str(path)])
    main(args, settings, ModelConfig(model_name_or_path=str(base_dir)))
    return json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))


def test_pairs_have_to_fit_the_context(base_dir, tmp_path):
    """TRL's own default is 1,024: a longer pair would fail somewhere in the run."""
    with pytest.raises(ValueError, match="max_length=1024: the model reads 64 tokens at most"):
        run_main(base_dir, tmp_path, max_length=1024)
    assert run_main(base_dir, tmp_path, max_length=None)["finished"]
    with pytest.raises(ValueError, match="beta=0.0 gives no pair a margin"):
        run_main(base_dir, tmp_path, beta=0.0)
