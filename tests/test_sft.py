"""SFT: what is trained, how LoRA is merged, how answers are generated and measured."""

import importlib.util
import json
from argparse import Namespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config
from trl import ModelConfig, SFTConfig, SFTTrainer

from pretrain.callbacks import MetricsFile, StopOnNaN
from pretrain.modeling_gpt import GPT2LMHeadModel
from sft.chat import Conversation, make_sampling
from sft.eval import EvalArguments, generate_answers, measure_answers, repetition
from sft.model import (
    check_vocabulary,
    complete_head,
    load_model,
    make_lora_config,
    merge_adapter,
    refuse_unread,
    set_stop_tokens,
)
from sft.rendering import encode_prompt, render
from sft.train import SFTArguments, load_chat_tokenizer, load_data

ROWS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in [("Who are you?", "I am LadderLM."), ("你是谁？", "我是天梯。"), ("12 + 30", "42")]
]


@pytest.fixture
def chat_tokenizer(base_dir):
    return load_chat_tokenizer(base_dir)


def make_trainer(base_dir, tokenizer, tmp_path, model_args, **overrides):
    rows, _ = render(ROWS * 4, tokenizer, 64)
    settings = {"max_length": 64, "learning_rate": 1e-2, "max_steps": 40, "report_to": []}
    settings |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    settings |= {"disable_tqdm": True, "save_strategy": "no", "logging_steps": 10} | overrides
    trainer = SFTTrainer(
        model=load_model(model_args, tokenizer),
        args=SFTConfig(output_dir=str(tmp_path), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=make_lora_config(model_args, tokenizer),
    )
    complete_head(trainer.model)
    return trainer


def answers_of(model, tokenizer):
    prompts = [{"prompt": row["messages"][:1], "source": "chat", "lang": "en"} for row in ROWS]
    return [row["answer"] for row in generate_answers(model, tokenizer, prompts, 16, 2)]


def test_the_chat_tokenizer_ends_turns_at_im_end(base_dir, chat_tokenizer):
    assert chat_tokenizer.eos_token == "<|im_end|>"
    assert chat_tokenizer.pad_token == "<pad>"


def test_labels_are_the_assistants_tokens_and_their_end(base_dir, chat_tokenizer, tmp_path):
    model_args = ModelConfig(model_name_or_path=str(base_dir))
    trainer = make_trainer(base_dir, chat_tokenizer, tmp_path, model_args)
    batch = next(iter(trainer.get_train_dataloader()))
    trained = [chat_tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert set(trained) <= {"I am LadderLM.<|im_end|>", "我是天梯。<|im_end|>", "42<|im_end|>"}


def test_what_is_held_out_and_dropped_is_said(chat_tokenizer, tmp_path, capsys):
    long = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "42 " * 90}]
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    rows = [*ROWS[:1], {"messages": long}]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = SFTConfig(
        output_dir=str(tmp_path), max_length=64, use_cpu=True, bf16=False, report_to=[]
    )
    splits, _ = load_data(SFTArguments([str(train)], [str(held_out)]), chat_tokenizer, settings)
    said = capsys.readouterr().out
    assert len(splits["validation"]) == 1
    assert "dropped  1 x validation: longer than max_length=64 tokens (first: row 2" in said
    assert "seen     1 validation rows have a prompt that is trained on, too" in said


def test_full_finetuning_learns_to_answer_and_to_stop(base_dir, chat_tokenizer, tmp_path):
    model_args = ModelConfig(model_name_or_path=str(base_dir))
    trainer = make_trainer(base_dir, chat_tokenizer, tmp_path, model_args)
    trainer.train()
    set_stop_tokens(trainer.model, chat_tokenizer)
    assert trainer.model.generation_config.eos_token_id == [3, 5]
    assert answers_of(trainer.model, chat_tokenizer) == ["I am LadderLM.", "我是天梯。", "42"]


@pytest.mark.parametrize("four_bits", [False, True])
def test_lora_trains_the_chat_tokens_and_merges(base_dir, chat_tokenizer, tmp_path, four_bits):
    model_args = ModelConfig(
        model_name_or_path=str(base_dir), use_peft=True, lora_r=8, load_in_4bit=four_bits,
        use_bnb_nested_quant=True,
    )  # fmt: skip
    trainer = make_trainer(base_dir, chat_tokenizer, tmp_path, model_args, max_steps=150)
    if four_bits:
        kinds = {type(module).__name__ for module in trainer.model.modules()}
        assert "Linear4bit" in kinds
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    merged, parity = merge_adapter(base_dir, tmp_path / "adapter", chat_tokenizer)
    assert parity["merge_max_logit_difference"] < 1e-4
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    moved = (merged.transformer.wte.weight - base.transformer.wte.weight).abs().sum(dim=1)
    assert set(moved.nonzero().flatten().tolist()) == {4, 5}, "only the chat tokens' rows"
    assert merged.lm_head.weight.data_ptr() == merged.transformer.wte.weight.data_ptr()
    set_stop_tokens(merged, chat_tokenizer)
    if not four_bits:  # the merged model lacks the rounding that the 4-bit model trained around
        english, *others = answers_of(merged, chat_tokenizer)
        assert english.startswith("I am LadderLM") and others == ["我是天梯。", "42"]


def test_four_bits_without_lora_is_refused(base_dir, chat_tokenizer):
    model_args = ModelConfig(model_name_or_path=str(base_dir), load_in_4bit=True)
    with pytest.raises(ValueError, match="needs use_peft"):
        load_model(model_args, chat_tokenizer)


def test_a_lora_is_what_the_recipe_says(base_dir, chat_tokenizer):
    given = {"model_name_or_path": str(base_dir), "use_peft": True}
    for asked, expected in (
        (None, "all-linear"), (["all-linear"], "all-linear"), (["c_attn"], {"c_attn"})
    ):  # fmt: skip
        model_args = ModelConfig(**given)
        model_args.lora_target_modules = asked  # as stages.parse_args leaves it
        assert make_lora_config(model_args, chat_tokenizer).target_modules == expected
    other = ModelConfig(**given, lora_task_type="SEQ_CLS")  # the adapter would load as a classifier
    assert make_lora_config(other, chat_tokenizer).task_type == "CAUSAL_LM"
    head = ["c_attn", "lm_head"]
    for change in ({"lora_modules_to_save": head}, {"lora_target_modules": head}):
        with pytest.raises(ValueError, match="has lm_head: of it the chat tokens' rows are"):
            make_lora_config(ModelConfig(**given, **change), chat_tokenizer)


def test_what_would_be_ignored_is_refused(base_dir, chat_tokenizer, tmp_path):
    quiet = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": []}
    for change in ({"eos_token": "<eos>"}, {"pad_token": "<eos>"}, {"model_init_kwargs": {"a": 1}}):
        (name,) = change
        with pytest.raises(ValueError, match=f"{name}=.*which this stage does not read"):
            refuse_unread(SFTConfig(**quiet | change))
    smooth = SFTConfig(**quiet, label_smoothing_factor=0.1)
    refuse_unread(smooth)  # SFT has it
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1, .* read: none. Leave it out"):
        refuse_unread(smooth, label_smoothing_factor="none")
    with pytest.raises(ValueError, match="model_revision='v1'"):
        refuse_unread(smooth, ModelConfig(model_revision="v1"))
    eight = ModelConfig(model_name_or_path=str(base_dir), load_in_8bit=True)
    with pytest.raises(ValueError, match="load_in_8bit needs use_peft"):
        load_model(eight, chat_tokenizer)
    auto = ModelConfig(model_name_or_path=str(base_dir), dtype="auto")
    assert load_model(auto, chat_tokenizer).dtype == torch.float32
    auto.load_in_4bit = auto.use_peft = True
    with pytest.raises(ValueError, match="name what is computed in"):
        load_model(auto, chat_tokenizer)


def test_an_evaluation_does_not_change_the_training_of_a_4_bit_model(
    tiny_config, chat_tokenizer, tmp_path
):
    GPT2LMHeadModel(GPT2Config(**tiny_config.to_dict() | {"n_embd": 96})).save_pretrained(tmp_path)
    args = ModelConfig(model_name_or_path=str(tmp_path), load_in_4bit=True, use_peft=True)
    ids, gradients = torch.arange(10, 30)[None], []
    for evaluates in (False, True):
        model = load_model(args, chat_tokenizer)
        assert "Linear4bit" in {type(module).__name__ for module in model.modules()}
        if evaluates:
            with torch.no_grad():
                model.eval()(input_ids=ids)
        model.train()
        weight = model.get_input_embeddings().weight.requires_grad_(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_a_tokenizer_too_large_for_the_model_is_refused(base_dir, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    model.resize_token_embeddings(100)
    with pytest.raises(ValueError, match="the model knows 100: they do not belong together"):
        check_vocabulary(model, tokenizer)


def test_padding_on_the_left_does_not_move_positions(base_dir, chat_tokenizer):
    model = load_model(ModelConfig(model_name_or_path=str(base_dir)), chat_tokenizer).eval()
    ids = torch.randint(10, 300, (1, 12))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = (padded > 0).long()
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        together = model(input_ids=padded, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_batched_answers_equal_single_ones(base_dir, chat_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base_dir).eval()
    set_stop_tokens(model, chat_tokenizer)
    long = {"role": "user", "content": "The river runs past the mill. Who are you?"}
    rows = [{"prompt": [long]}, {"prompt": [{"role": "user", "content": "Hi"}]}]
    together = generate_answers(model, chat_tokenizer, rows, 12, batch_size=2)
    alone = [generate_answers(model, chat_tokenizer, [row], 12, 1)[0] for row in rows]
    assert [row["ids"] for row in together] == [row["ids"] for row in alone]


def test_flags_with_which_nothing_can_be_said_are_refused():
    for change in ({"max_new_tokens": 0}, {"batch_size": 0}, {"max_rows": 0}, {"samples": -1}):
        with pytest.raises(ValueError, match=next(iter(change))):
            EvalArguments(**change)
    with pytest.raises(ValueError, match="temperature=0"):
        EvalArguments(samples=2, temperature=0)
    flags = {"max_new_tokens": 8, "num_beams": 1, "temperature": 0.7, "top_k": 5, "top_p": 0.9}
    flags |= {"repetition_penalty": 1.0, "greedy": False}
    assert make_sampling(Namespace(**flags))["do_sample"]
    for change in ({"max_new_tokens": 0}, {"num_beams": 0}, {"temperature": -1.0}, {"top_k": -5},
                   {"top_p": 2.0}, {"repetition_penalty": 0.0}):  # fmt: skip
        with pytest.raises(ValueError, match=f"--{next(iter(change))} .*: it has to be"):
            make_sampling(Namespace(**flags | change))


def test_a_long_prompt_does_not_cut_the_answers_to_others(base_dir, chat_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base_dir).eval()
    model.generation_config.eos_token_id = [3]
    texts = ("12 + 30 = 42. " * 3, "Hi")
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    assert 44 < len(encode_prompt(rows[0]["prompt"], chat_tokenizer)) < 64
    long, short = generate_answers(model, chat_tokenizer, rows, 20, batch_size=1)
    assert long["tokens"] < 20 and (short["tokens"] == 20 or short["finished"])


def test_a_prompt_longer_than_the_context_is_refused(base_dir, chat_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    rows = [{"prompt": [{"role": "user", "content": "mill " * 200}]}]
    with pytest.raises(ValueError, match="context is 64: 'mill"):
        generate_answers(model, chat_tokenizer, rows, 8, 1)


def test_guards_measure_what_they_say():
    answer = {"source": "chat", "lang": "en", "finished": True, "tokens": 5, "ids": [1, 2, 3, 4, 5]}
    task = {"source": "task", "lang": "zh", "reference": "7", "verifier": "number", "level": 1,
            "kind": "addition", "ids": [1] * 6, "tokens": 6}  # fmt: skip
    metrics = measure_answers([
        answer | {"answer": "Hello"},
        answer | {"answer": "你好", "ids": [9]},
        task | {"answer": "3 + 4 = 7", "finished": True},
        task | {"answer": "8", "finished": False, "level": 2},
    ])  # fmt: skip
    values = {name: metric["value"] for name, metric in metrics.items()}
    assert values["stop_rate"] == 0.75
    assert values["language_match"] == 0.5
    assert values["task_accuracy"] == 0.5
    assert (values["task_accuracy/level_1"], values["task_accuracy/level_2"]) == (1.0, 0.0)
    assert values["repetition"] == pytest.approx((0 + 0 + 0.75 + 0.75) / 4)


def test_repetition():
    assert repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(0.25)
    assert repetition([1, 2]) == 0.0


class EchoModel(torch.nn.Module):
    """Counts the prompts' lengths and answers nothing."""

    def __init__(self, config):
        super().__init__()
        self.config, self.generation_config, self.device = config, GenerationConfig(), "cpu"
        self.lengths = []

    def generate(self, ids, **kwargs):
        self.lengths.append(ids.shape[1])
        assert ids.shape[1] + kwargs["max_new_tokens"] <= self.config.max_position_embeddings
        return torch.cat([ids, torch.tensor([[5]])], dim=1)


def test_a_long_conversation_forgets_its_oldest_turns_aloud(chat_tokenizer, tiny_config, capsys):
    chat = Conversation(EchoModel(tiny_config), chat_tokenizer, {"max_new_tokens": 20}, "Be kind.")
    for _ in range(6):
        chat.answer("Who are you?")
    assert "forgotten" in capsys.readouterr().out
    assert chat.turns[0]["role"] == "user" and len(chat.turns) < 12
    with pytest.raises(ValueError, match="too long"):
        chat.answer("mill " * 100)
    chat.reset()
    assert chat.turns == [] and chat.system == "Be kind."


def test_a_loss_that_is_not_a_number_stops_the_run():
    from types import SimpleNamespace

    state, args = SimpleNamespace(global_step=7), SimpleNamespace(learning_rate=1.0)
    with pytest.raises(ValueError, match="loss is nan at step 7"):
        StopOnNaN().on_log(args, state, None, logs={"loss": float("nan")})
    StopOnNaN().on_log(args, state, None, logs={"loss": 1.0})


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    from types import SimpleNamespace

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "loss": 2}\n{"step": 10, "loss": 1}\n')
    state = SimpleNamespace(global_step=5, is_world_process_zero=True)
    MetricsFile(str(tmp_path)).on_train_begin(None, state, None)
    assert path.read_text() == '{"step": 5, "loss": 2}\n'


def test_bitsandbytes_is_there():
    assert importlib.util.find_spec("bitsandbytes"), "QLoRA would be skipped in silence"
