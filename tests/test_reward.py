"""The reward model: one score a conversation, honest pairs, numbers checked by hand."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, LlamaConfig
from trl import ModelConfig, RewardConfig, RewardTrainer

from rlhf.calibration import calibrate, correlate, measure_pairs
from rlhf.data import HOLDS_CONTROL, fit_prompts, load_preferences, load_prompts
from rlhf.pairs import check_dropped, describe_pairs, fit_pairs, load_pairs
from rlhf.reward_model import (
    load_reward_model,
    make_reward_lora,
    make_reward_model,
    merge_reward_adapter,
    require_judge,
    score_conversations,
)
from rlhf.train_reward import RewardArguments, evaluate_reward_model
from sft.data import DataSummary
from sft.merge import main as merge
from sft.model import load_model, restore_precision
from sft.train import load_chat_tokenizer

QUICK = {
    "use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False,
    "disable_tqdm": True, "save_strategy": "no", "max_length": 64, "logging_steps": 1,
}  # fmt: skip


def turn(role, content):
    return {"role": role, "content": content}


CHATS = [
    [turn("user", "Who are you?"), turn("assistant", answer)]
    for answer in ("I.", "I am LadderLM, a small model.", "42", "小河流过磨坊。")
]
PAIRS = [
    {"prompt": chat[:1], "chosen": chat[1:], "rejected": [turn("assistant", f"Go {i}")]}
    for i, chat in enumerate(CHATS)
]


@pytest.fixture
def chat_tokenizer(base_dir):
    return load_chat_tokenizer(base_dir)


@pytest.fixture(params=["gpt2", "llama"])
def reward_dir(request, base_dir, chat_tokenizer, tmp_path):
    if request.param == "gpt2":
        model = make_reward_model(ModelConfig(model_name_or_path=str(base_dir)), chat_tokenizer)
    else:
        config = LlamaConfig(
            vocab_size=len(chat_tokenizer), hidden_size=64, intermediate_size=96, num_labels=1,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        )  # fmt: skip
        model = AutoModelForSequenceClassification.from_config(config)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)  # scores of some size
    model.save_pretrained(tmp_path / "reward")
    chat_tokenizer.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


def test_a_control_token_in_an_answer_is_scored_as_text(reward_dir):
    model, tokenizer = load_reward_model(reward_dir)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "a<|im_end|>b"}]
    score_conversations(model, tokenizer, [turns])
    hook.remove()
    assert (seen[0] == end).sum() == 2


def test_a_score_does_not_depend_on_the_batch_or_its_padding(reward_dir):
    model, tokenizer = load_reward_model(reward_dir)
    alone = [score_conversations(model, tokenizer, [chat])[0] for chat in CHATS]
    assert max(alone) - min(alone) > 0.1
    for side in ("left", "right"):
        assert score_conversations(model, tokenizer, CHATS, side) == pytest.approx(alone, abs=1e-5)
    # A plain transformers model, as anybody loads it, in the padding that TRL uses.
    plain = AutoModelForSequenceClassification.from_pretrained(reward_dir).eval()
    assert score_conversations(plain, tokenizer, CHATS) == pytest.approx(alone, abs=1e-5)


def test_one_token_for_pad_and_eos_is_refused(reward_dir, base_dir, chat_tokenizer):
    chat_tokenizer.pad_token = chat_tokenizer.eos_token
    with pytest.raises(ValueError, match="'<|im_end|>' must be set and differ from eos_token"):
        make_reward_model(ModelConfig(model_name_or_path=str(base_dir)), chat_tokenizer)
    chat_tokenizer.save_pretrained(reward_dir)
    with pytest.raises(ValueError, match="must be set and differ"):
        load_reward_model(reward_dir)


def test_only_a_reward_model_pays_and_only_a_chat_model_is_trained(
    reward_dir, base_dir, chat_tokenizer, tmp_path
):
    assert require_judge(reward_dir, base_dir) == reward_dir
    with pytest.raises(ValueError, match="is no reward model but GPT2LMHeadModel"):
        require_judge(base_dir, base_dir)
    classifier = AutoModelForSequenceClassification.from_pretrained(base_dir, num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    chat_tokenizer.save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="gives no single score"):
        require_judge(tmp_path / "classifier", base_dir)
    with pytest.raises(ValueError, match="scores texts and writes none"):
        load_model(ModelConfig(model_name_or_path=str(reward_dir)), chat_tokenizer)


def test_a_reward_models_adapter_makes_no_chat_model(base_dir, chat_tokenizer, tmp_path):
    model_args = ModelConfig(model_name_or_path=str(base_dir), use_peft=True)
    model = make_reward_model(model_args, chat_tokenizer)
    lora = get_peft_model(model, make_reward_lora(model_args, chat_tokenizer))
    lora.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter for SEQ_CLS: without its head"):
        merge(str(tmp_path / "adapter"), str(base_dir), str(base_dir), str(tmp_path / "merged"))


def test_a_recipes_dtype_and_modules_are_the_reward_models(base_dir, chat_tokenizer):
    model_args = ModelConfig(
        model_name_or_path=str(base_dir), dtype="bfloat16", use_peft=True,
        lora_modules_to_save=["wpe"],
    )  # fmt: skip
    assert make_reward_model(model_args, chat_tokenizer).dtype == torch.bfloat16
    assert make_reward_lora(model_args, chat_tokenizer).modules_to_save == ["wpe", "score"]


def make_trainer(base_dir, tokenizer, tmp_path, model_args=None, **changes):
    model_args = model_args or ModelConfig(model_name_or_path=str(base_dir))
    trainer = RewardTrainer(
        model=make_reward_model(model_args, tokenizer),
        args=RewardConfig(output_dir=str(tmp_path / "out"), **QUICK | changes),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        peft_config=make_reward_lora(model_args, tokenizer),
    )
    restore_precision(trainer.model)
    return trainer


def reference_loss(chosen, rejected, center):
    """Bradley-Terry, and the term that keeps the scores around zero (Eisenstein et al. 2023)."""
    margin = -torch.log(1 / (1 + torch.exp(-(chosen - rejected))))
    return margin.mean() + center * ((chosen + rejected) ** 2).mean()


def test_the_loss_is_that_of_a_short_reference(base_dir, chat_tokenizer, tmp_path):
    changes = {"center_rewards_coefficient": 0.1, "per_device_train_batch_size": 4}
    trainer = make_trainer(base_dir, chat_tokenizer, tmp_path, **changes)
    torch.nn.init.normal_(trainer.model.score.weight)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.eval(), dict(batch))
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    scores = [trainer.model(input_ids=ids[mask.bool()][None]).logits[0, 0] for ids, mask in rows]
    chosen, rejected = torch.stack(scores).chunk(2)
    assert loss.item() == pytest.approx(reference_loss(chosen, rejected, 0.1).item(), abs=1e-5)
    assert loss.item() != pytest.approx(reference_loss(rejected, chosen, 0.1).item(), abs=1e-2)


@pytest.mark.parametrize("four_bits", [False, True])
def test_lora_trains_the_head_and_merges(base_dir, chat_tokenizer, tmp_path, four_bits):
    model_args = ModelConfig(
        model_name_or_path=str(base_dir), use_peft=True, lora_r=8, load_in_4bit=four_bits
    )
    changes = {"learning_rate": 1e-2, "max_steps": 30}
    if four_bits:
        changes["bf16"] = True
    trainer = make_trainer(base_dir, chat_tokenizer, tmp_path, model_args, **changes)
    kinds = {name: type(m).__name__ for name, m in trainer.model.named_modules()}
    assert ("Linear4bit" in kinds.values()) == four_bits
    assert kinds["base_model.model.score.modules_to_save.default"] == "Linear"
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    merged, parity = merge_reward_adapter(base_dir, tmp_path / "adapter", chat_tokenizer)
    assert parity["merge_max_score_difference"] < 1e-4
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    (head,) = (value for name, value in saved.items() if name.endswith("score.weight"))
    assert torch.equal(merged.score.weight, head.float())
    merged.save_pretrained(tmp_path / "out")
    chat_tokenizer.save_pretrained(tmp_path / "out")
    metrics = evaluate_reward_model(str(tmp_path / "out"), PAIRS)
    assert metrics["pair_accuracy"]["value"] == 1.0
    assert metrics["margin"]["value"] > 1.0
    assert (tmp_path / "out/margins.png").stat().st_size > 10_000


def write_pairs(path, count, long=0, equal=()):
    rows = [
        {"prompt": f"{i} + {i}", "chosen": "mill " * (200 if i < long else 1) + str(2 * i),
         "rejected": "No" if i not in equal else "mill " * (i < long) + f"mill {2 * i}"}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_many_dropped_pairs_are_an_error_unless_allowed(chat_tokenizer, tmp_path, capsys):
    files = [write_pairs(tmp_path / "a.jsonl", 100, long=6, equal=(50,))]
    args = RewardArguments(data_files=files, validation_share=0.2)
    with pytest.raises(ValueError, match=r"7\.0% of the pairs are dropped.*allow_dropped_pairs"):
        load_pairs(args, chat_tokenizer, 64)
    capsys.readouterr()
    args.allow_dropped_pairs = True
    train, test, record = load_pairs(args, chat_tokenizer, 64)
    shown = capsys.readouterr().out
    assert "refused  1 identical pairs: a.jsonl:51" in shown and "7.0% dropped" in shown
    assert record["identical_pairs"] == [f"{files[0]}:51"]
    # Counted on both sides of the split.
    assert len(train) + len(test) == 93 == record["rows_kept"]
    assert record["held_out_pairs"] == len(test) > 0
    assert train.column_names == ["prompt", "chosen", "rejected"]
    few = [write_pairs(tmp_path / "b.jsonl", 100, long=4, equal=(50,))]
    load_pairs(RewardArguments(data_files=few, validation_share=0.2), chat_tokenizer, 64)


def test_held_out_prompts_that_are_trained_on_are_counted(chat_tokenizer, tmp_path, capsys):
    file = write_pairs(tmp_path / "a.jsonl", 20)
    args = RewardArguments(data_files=[file], test_files=[file])
    assert load_pairs(args, chat_tokenizer, 64)[2]["held_out_prompts_seen"] == 20
    assert "20 held-out pairs have a prompt that is trained on" in capsys.readouterr().out


def test_pairs_that_only_the_template_makes_equal_are_refused(chat_tokenizer, tmp_path):
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "message['content']", "(message['content'] | trim)"
    )
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "Hi", "chosen": c, "rejected": "Yes"} for c in ("Yes ", "No")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded, summary = load_preferences(str(path))
    assert len(loaded) == 2
    assert len(fit_pairs(loaded, chat_tokenizer, 64, summary)) == 1
    assert summary.dropped == {"chosen and rejected are equal": [f"{path}:1"]}


def test_a_text_with_a_control_token_is_left_out(chat_tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    prompts = ["Hi", "Hi<|im_end|>"]
    rows = [{"prompt": prompt, "chosen": "Yes", "rejected": "No"} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded, summary = load_preferences(str(path))
    assert fit_pairs(loaded, chat_tokenizer, 64, summary) == loaded[:1]
    assert summary.dropped == {HOLDS_CONTROL: [f"{path}:2"]}
    prompts, summary = load_prompts(str(path))
    assert fit_prompts(prompts, chat_tokenizer, 64, summary) == prompts[:1]
    assert summary.dropped == {HOLDS_CONTROL: ["prompt 2"]}
    with pytest.raises(ValueError, match="max_completion_length leaves -3 tokens"):
        fit_prompts(prompts, chat_tokenizer, -3, summary)


def test_identical_pairs_are_named_twenty_at_most():
    summary = DataSummary(rows_read=600)
    for i in range(25):
        summary.drop("chosen and rejected are equal", f"some/where/x.jsonl:{i}")
    shown = describe_pairs(summary, 500, 75, 0)
    assert "25 identical pairs: x.jsonl:0, x.jsonl:1," in shown
    assert shown.endswith("x.jsonl:19 and 5 more") and "4.2% dropped" in shown
    check_dropped(summary, False)


def test_calibration_by_hand():
    # A confidence of 0.62 is right in 1 of 2, one of 0.82 in 3 of 3.
    low, high = math.log(0.62 / 0.38), math.log(0.82 / 0.18)
    found = calibrate([low, -low, high, high, high])
    assert found["value"] == pytest.approx((2 * 0.12 + 3 * 0.18) / 5, abs=1e-6)
    assert [(row["from"], row["n"], row["accuracy"]) for row in found["bins"]] == [
        (0.6, 2, 0.5), (0.8, 3, 1.0)
    ]  # fmt: skip
    assert found["low"] <= found["value"] <= found["high"] and found["n"] == 5
    # What is right as often as it says: nearly no error, from many pairs.
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(4000, generator=generator) * 2
    signs = torch.rand(4000, generator=generator) < torch.sigmoid(margins.abs())
    assert calibrate((margins.abs() * (2 * signs - 1)).tolist())["value"] < 0.03


def test_numbers_of_pairs_by_hand():
    metrics = measure_pairs(
        [2.0, 1.0, 0.0, 3.0], [1.0, 2.0, 0.0, -1.0], [(9, 3), (8, 4), (5, 5), (1, 2)],
        ["rude", None, "rude", "wrong"],
    )  # fmt: skip
    assert metrics["pair_accuracy"]["value"] == 0.5  # equal scores are not in the right order
    assert metrics["pair_accuracy/rude"]["value"] == 0.5
    assert metrics["pair_accuracy/wrong"]["n"] == 1
    assert metrics["margin"]["value"] == 1.0
    histogram = metrics["margin"]["histogram"]
    assert sum(histogram["counts"]) == 4 and len(histogram["edges"]) == 21
    expected = sum(math.log(1 + math.exp(-margin)) for margin in (1, -1, 0, 4)) / 4
    assert metrics["loss"]["value"] == pytest.approx(expected, abs=1e-6)
    assert metrics["longer_chosen"] | {"low": 0, "high": 0} == {
        "value": pytest.approx(2 / 3, abs=1e-6), "low": 0, "high": 0, "n": 3, "unit": "share"
    }  # fmt: skip
    assert metrics["length_correlation"]["n"] == 8


def test_correlation_and_its_interval():
    found = correlate([1, 2, 3, 4, 5, 6], [1, 3, 2, 5, 4, 6])
    assert found["value"] == pytest.approx(1 - 6 * 4 / (6 * 35), abs=1e-6)  # Spearman's formula
    z = math.atanh(found["value"])
    assert found["low"] == pytest.approx(math.tanh(z - 1.96 / math.sqrt(3)), abs=1e-5)
    assert correlate([1, 1, 1, 1], [1, 2, 3, 4])["value"] is None
