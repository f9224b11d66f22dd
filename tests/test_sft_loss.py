"""The loss of SFT against a short reference, packed, accumulated, weighted and with noise."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import ModelConfig, SFTConfig

from sft.loss import ChatTrainer, held_out_loss
from sft.model import load_model, make_lora_config
from sft.rendering import render
from sft.train import load_chat_tokenizer

CONVERSATIONS = [
    [("Who are you?", "I am LadderLM, a small model.")],
    [("12 + 30", "42"), ("再见", "再见!")],
    [("小河流过哪里？", "小河流过磨坊。")],
    [("Hi", "Hello")],
]


def make_rows(weights=()):
    rows = []
    for number, pairs in enumerate(CONVERSATIONS):
        messages = []
        for question, answer in pairs:
            turn = {"role": "assistant", "content": answer}
            if number < len(weights) and weights[number] != 1:
                turn["loss_weight"] = weights[number]
            messages += [{"role": "user", "content": question}, turn]
        rows.append({"messages": messages})
    return rows


@pytest.fixture(scope="module")
def chat_tokenizer(base_dir):
    return load_chat_tokenizer(base_dir)


@pytest.fixture
def make_trainer(base_dir, chat_tokenizer, tmp_path):
    def make(rows, peft=False, **overrides):
        settings = {"max_length": 64, "report_to": [], "use_cpu": True, "bf16": False}
        settings |= {"gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no"}
        settings |= {"shuffle_dataset": False, "per_device_train_batch_size": 4}
        model_args = ModelConfig(model_name_or_path=str(base_dir), use_peft=peft, lora_r=4)
        model = load_model(model_args, chat_tokenizer)
        return ChatTrainer(
            model=model,
            args=SFTConfig(output_dir=str(tmp_path), **settings | overrides),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            processing_class=chat_tokenizer,
            peft_config=make_lora_config(model_args, chat_tokenizer, model),
        )

    return make


def reference_loss(model, tokenizer, rows):
    """The mean over all trained tokens of weight * -log p(token | what stands before it)."""
    total, count = 0.0, 0
    for row in rows:
        text, answers = "", []
        for turn in row["messages"]:
            text += f"<|im_start|>{turn['role']}\n"
            if turn["role"] == "assistant":
                # Trained: what is written, and the token that ends it; neither role nor newline.
                answers.append((len(text), len(text) + len(turn["content"] + "<|im_end|>"),
                                turn.get("loss_weight", 1)))  # fmt: skip
            text += turn["content"] + "<|im_end|>\n"
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids, places = torch.tensor(encoded["input_ids"]), encoded["offset_mapping"]
        log_probs = model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
        for position in range(1, len(ids)):
            for start, end, weight in answers:
                if start <= places[position][0] < end and weight:
                    total -= weight * log_probs[position - 1, ids[position]]
                    count += 1
    return total / count


def losses_and_gradient(trainer, batches):
    """The summed loss of the batches, as one optimizer step has them, and a gradient of it."""
    trainer.model.train()
    labels = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=labels)
        loss.backward()
        total += loss.item()
    return total, trainer.model.transformer.h[0].mlp.c_fc.weight.grad.clone()


@pytest.mark.parametrize("weights", [(), (1, 0.5, 2, 1), (1, 0, 1, 1)])
def test_the_loss_equals_a_short_reference(make_trainer, chat_tokenizer, base_dir, weights):
    rows = make_rows(weights)
    rendered, _ = render(rows, chat_tokenizer, 64)
    assert ("loss_weights" in rendered[0]) == (0.5 in weights)
    trainer = make_trainer(rendered)
    (batch,) = trainer.get_train_dataloader()
    loss, gradient = losses_and_gradient(trainer, [batch])
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    expected = reference_loss(model, chat_tokenizer, rows)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert gradient == pytest.approx(model.transformer.h[0].mlp.c_fc.weight.grad, abs=1e-5)


def test_accumulated_small_batches_are_one_large_batch(make_trainer, chat_tokenizer):
    """Rows of 3 to 20 trained tokens: a mean of the batches' means would be another loss.

    Plain gradient descent: Adam's first steps are as large for a gradient of rounding errors.
    """
    rendered, _ = render(make_rows(), chat_tokenizer, 64)
    settings = {"max_steps": 2, "learning_rate": 0.5, "logging_steps": 1, "optim": "sgd"}
    runs = []
    for size, steps in ((4, 1), (1, 4), (2, 2)):
        trainer = make_trainer(
            rendered, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            **settings,
        )  # fmt: skip
        trainer.train()
        logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        runs.append((logged, trainer.model.transformer.h[1].mlp.c_proj.weight.detach()))
    for logged, weight in runs[1:]:
        assert logged == pytest.approx(runs[0][0], abs=1e-5)
        torch.testing.assert_close(weight, runs[0][1], atol=2e-5, rtol=0)


def test_packing_changes_no_tokens_loss(make_trainer, chat_tokenizer):
    rendered, _ = render(make_rows() * 3, chat_tokenizer, 64)
    apart = make_trainer(rendered, per_device_train_batch_size=12)
    packed = make_trainer(rendered, packing=True, per_device_train_batch_size=12)
    assert len(packed.train_dataset) < len(apart.train_dataset) == 12
    found = []
    for trainer in (apart, packed):
        tokens = []
        for batch in trainer.get_train_dataloader():
            with torch.no_grad():
                output = trainer.model(**batch, use_cache=False, fused_lm_head=True)
            labels = batch["labels"][:, 1:]
            trained = labels != -100
            tokens += zip(labels[trained].tolist(), output.log_probs[trained].tolist(), strict=True)
        found.append(sorted(tokens))
    assert len(found[0]) == sum(sum(row["assistant_masks"]) for row in rendered)
    assert [token for token, _ in found[0]] == [token for token, _ in found[1]]
    assert [p for _, p in found[0]] == pytest.approx([p for _, p in found[1]], abs=1e-5)


def test_weights_and_packing_are_refused_together(make_trainer, chat_tokenizer):
    rendered, _ = render(make_rows((0.5,)), chat_tokenizer, 64)
    with pytest.raises(ValueError, match="packing: true keeps no loss_weight"):
        make_trainer(rendered, packing=True)
    for change in ({"loss_type": "dft"}, {"label_smoothing_factor": 0.1}):
        with pytest.raises(ValueError, match="would not weigh a token by its loss_weight"):
            make_trainer(rendered, **change)


@pytest.mark.parametrize("peft", [False, True])
def test_neftune_noise_is_there_in_training_alone(make_trainer, chat_tokenizer, peft):
    rendered, _ = render(make_rows(), chat_tokenizer, 64)
    seen = {}
    for alpha in (None, 5.0):
        trainer = make_trainer(
            rendered, peft, neftune_noise_alpha=alpha, max_steps=1, logging_steps=1,
            learning_rate=0.0,
        )  # fmt: skip
        trainer.train()
        (loss,) = (line["loss"] for line in trainer.state.log_history if "loss" in line)
        seen[alpha] = loss, trainer.evaluate()["eval_loss"]
    assert abs(seen[None][0] - seen[5.0][0]) > 1e-3
    assert seen[None][1] == pytest.approx(seen[5.0][1], abs=1e-6)


def test_held_out_loss_weighs_every_token_the_same(chat_tokenizer, base_dir):
    rows = make_rows()
    rendered, summary = render(rows, chat_tokenizer, 64)
    model = AutoModelForCausalLM.from_pretrained(base_dir).eval()
    expected = reference_loss(model, chat_tokenizer, rows).item()
    for size in (1, 3, 4):
        found = held_out_loss(model, rendered, batch_size=size)
        assert found["value"] == pytest.approx(expected, abs=1e-5)
    assert found["n"] == summary.trained_tokens and found["low"] < found["value"] < found["high"]
