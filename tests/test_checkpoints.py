"""Foreign checkpoints go in, native files come out: GPT-2's own, llama and qwen3."""

import json
import os
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from conftest import SENTENCES
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel as TheirGPT2
from transformers import TrainingArguments

import stages
from pretrain.checkpoints import sync_to_disk
from pretrain.data import PackedCollator, load_blocks
from pretrain.hardware import choose_attention, set_up_process, training_defaults
from pretrain.modeling_gpt import GPT2LMHeadModel
from pretrain.prepare import PrepareArguments
from pretrain.prepare import main as prepare
from pretrain.train import PretrainArguments, load_model, main, make_config

LLAMA = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip
LOAD_ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
assert not any(name in sys.modules for name in ("pretrain", "stages", "tokenizer"))
print(type(model).__module__, model.config.architectures[0])
torch.save(model(torch.arange(10, 40)[None]).logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def data_dir(tokenizer, tmp_path_factory):
    """Packed blocks of 64 tokens, several documents in each."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer.save_pretrained(folder / "tokenizer")
    return make_blocks(folder / "prepare", folder / "tokenizer")


def make_blocks(directory, tokenizer):
    """Run pretrain.prepare with a tokenizer's directory or name."""
    rows = (json.dumps({"text": text}, ensure_ascii=False) for text in SENTENCES * 40)
    text, words = directory.with_suffix(".jsonl"), sys.argv
    text.write_text("\n".join(rows), encoding="utf-8")
    sys.argv = ["prepare"]
    files = [str(text)]
    prepare(PrepareArguments(
        files, files, tokenizer=str(tokenizer), output_dir=str(directory), block_size=64,
    ))  # fmt: skip
    sys.argv = words
    return directory


def train(monkeypatch, data_dir, output_dir, *words):
    """Run pretrain.train for eight steps; returns its losses."""
    argv = [
        "--data_dir", str(data_dir), "--output_dir", str(output_dir), "--max_steps", "8",
        "--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_strategy", "no",
        "--learning_rate", "2e-3", "--eval_documents", "4", *words,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train", *argv])
    main(*stages.parse_args([PretrainArguments, TrainingArguments], argv, training_defaults()))
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]


def load_alone(directory, tmp_path):
    """Logits of ids 10 to 39 and the class, in a process that has transformers only."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD_ALONE, str(directory), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "logits.pt"), done.stdout.split()


def write_checkpoint(directory, config, tokenizer, style):
    """A GPT-2 of transformers' own class, in today's, the old, or the Hub's way of naming."""
    torch.manual_seed(1)
    model = TheirGPT2(config).eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if style != "today":
        weights = load_file(directory / "model.safetensors")
        mask = torch.ones(1, 1, config.n_positions, config.n_positions).tril()
        for layer in range(config.n_layer):
            weights[f"transformer.h.{layer}.attn.bias"] = mask.clone()
            if style == "old":
                weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        if style == "hub":
            weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("style", ["today", "old", "hub"])
def test_a_gpt2_checkpoint_loads_with_equal_logits(
    style, data_dir, tiny_config, tokenizer, tmp_path
):
    theirs = write_checkpoint(tmp_path / "gpt2", tiny_config, tokenizer, style)
    args = PretrainArguments(str(data_dir), model_name_or_path=str(tmp_path / "gpt2"))
    ours = load_model(args, tokenizer, block_size=64).eval()
    assert type(ours) is GPT2LMHeadModel
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


def test_a_gpt2_checkpoint_trains_further_and_stays_native(
    monkeypatch, data_dir, tiny_config, tokenizer, tmp_path
):
    first = train(monkeypatch, data_dir, tmp_path / "first", "--config_overrides",
                  '{"n_layer": 2, "n_embd": 64, "n_head": 4}')  # fmt: skip
    more = train(monkeypatch, data_dir, tmp_path / "more", "--model_name_or_path",
                 str(tmp_path / "first"))  # fmt: skip
    assert first[0] > 5.5 and more[0] < first[-1] + 0.1, (first, more)
    assert more[-1] < more[0]
    logits, (module, architecture) = load_alone(tmp_path / "more", tmp_path)
    assert (module, architecture) == (
        "transformers.models.gpt2.modeling_gpt2", "GPT2LMHeadModel",
    )  # fmt: skip
    ours = GPT2LMHeadModel.from_pretrained(tmp_path / "more", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = ours(torch.arange(10, 40)[None]).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["local", "they/gpt2"])
def test_a_model_with_its_own_tokenizer_trains_further(
    name, monkeypatch, data_dir, tiny_config, tokenizer, tmp_path
):
    """From a directory or from the Hub; the tokenizer's file is older than this transformers."""
    folder = tmp_path / "hub/models--they--gpt2/snapshots" / ("0" * 40)
    if name == "local":
        folder = name = tmp_path / "local"
    write_checkpoint(folder, tiny_config, tokenizer, "hub")
    file = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    (tmp_path / "hub/models--they--gpt2/refs").mkdir(parents=True)
    (tmp_path / "hub/models--they--gpt2/refs/main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    blocks = make_blocks(tmp_path / "blocks", name)
    for shard in data_dir.glob("*.parquet"):
        assert shard.read_bytes() == (blocks / shard.name).read_bytes()
    train(monkeypatch, blocks, tmp_path / "more", "--model_name_or_path", str(name))
    stages.require_input(tmp_path / "more", "tokenizer.json")


def test_a_model_with_another_tokenizer_is_refused(data_dir, tiny_config, tokenizer, tmp_path):
    write_checkpoint(tmp_path / "gpt2", tiny_config, tokenizer, "today")
    file = (tmp_path / "gpt2/tokenizer.json").read_text(encoding="utf-8")
    swapped = file.replace('"a":', '"?":').replace('"b":', '"a":').replace('"?":', '"b":')
    (tmp_path / "gpt2/tokenizer.json").write_text(swapped, encoding="utf-8")
    args = PretrainArguments(str(data_dir), model_name_or_path=str(tmp_path / "gpt2"))
    with pytest.raises(ValueError, match="other tokenizers: their ids mean different text"):
        load_model(args, tokenizer, block_size=64)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda weights: weights.pop("transformer.h.1.mlp.c_fc.weight"),
         r"missing \['transformer.h.1.mlp.c_fc.weight'\]"),
        (lambda weights: weights.update({"transformer.h.1.adapter": torch.ones(3)}),
         r"unexpected \['transformer.h.1.adapter'\]"),
    ],
)  # fmt: skip
def test_weights_are_never_made_up(change, named, data_dir, tiny_config, tokenizer, tmp_path):
    write_checkpoint(tmp_path / "gpt2", tiny_config, tokenizer, "today")
    weights = load_file(tmp_path / "gpt2/model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "gpt2/model.safetensors", metadata={"format": "pt"})
    args = PretrainArguments(str(data_dir), model_name_or_path=str(tmp_path / "gpt2"))
    with pytest.raises(ValueError, match=f"does not hold this model.*{named}"):
        load_model(args, tokenizer, block_size=64)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_other_architectures_pretrain_and_save_native_files(
    model_type, monkeypatch, data_dir, tokenizer, tmp_path
):
    output_dir = tmp_path / "out"
    losses = train(monkeypatch, data_dir, output_dir, "--model_type", model_type,
                   "--config_overrides", json.dumps(LLAMA))  # fmt: skip
    assert losses[0] > 5.5 and losses[-1] < losses[0] - 0.5, losses
    config = json.loads((output_dir / "config.json").read_text())
    assert config["model_type"] == model_type and "resid_pdrop" not in config
    args = PretrainArguments(str(data_dir), model_name_or_path=str(output_dir))  # knows its type
    ours = load_model(args, tokenizer, block_size=64).eval()
    assert ours.config._attn_implementation == choose_attention()
    logits, (module, _) = load_alone(output_dir, tmp_path)
    assert module == f"transformers.models.{model_type}.modeling_{model_type}"
    with torch.no_grad():
        expected = ours(torch.arange(10, 40)[None]).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3"])
def test_packed_documents_are_apart_in_every_architecture(model_type, data_dir, tokenizer):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4} if model_type == "gpt2" else LLAMA
    args = PretrainArguments(str(data_dir), model_type, sizes)
    model = load_model(args, tokenizer, block_size=64).eval()
    assert model.config._attn_implementation == choose_attention()
    model.config.use_cache = False  # as the Trainer sets it
    block = load_blocks(data_dir, "train")[1]
    batch = PackedCollator(tokenizer.bos_token_id)([block])
    starts = [0, *(batch["input_ids"][0] == tokenizer.bos_token_id).nonzero().flatten().tolist()]
    starts = sorted(set(starts))
    assert len(starts) > 2
    with torch.no_grad():
        packed = model(batch["input_ids"], position_ids=batch["position_ids"]).logits
        parts = zip(starts, [*starts[1:], 64], strict=True)
        alone = [model(batch["input_ids"][:, a:b]).logits for a, b in parts]
        whole = model(batch["input_ids"]).logits
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-4, rtol=0)
    assert (packed - whole).abs().max() > 1e-2, "without positions the documents see each other"


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_checkpointing_gives_the_same_gradients(model_type, data_dir, tokenizer):
    batch = PackedCollator(tokenizer.bos_token_id)([load_blocks(data_dir, "train")[1]])
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        args = PretrainArguments(str(data_dir), model_type, LLAMA)
        model = load_model(args, tokenizer, block_size=64).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config_overrides": "{n_layer: 2}"}, "config_overrides '{n_layer: 2}' is not JSON"),
        ({"config_overrides": "[2]"}, r"config_overrides '\[2\]' are no sizes: write {name: num"),
        ({"eval_documents": 0}, "eval_documents is 0"),  # said before it trains, not afterwards
    ],
)
def test_arguments_that_cannot_be_right_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        PretrainArguments(**given)


def test_settings_of_the_optimizer_count(monkeypatch, data_dir, tmp_path):
    sizes = ("--config_overrides", '{"n_layer": 1, "n_embd": 32, "n_head": 2}')
    plain = train(monkeypatch, data_dir, tmp_path / "plain", *sizes)
    slow = train(monkeypatch, data_dir, tmp_path / "slow", *sizes, "--adam_epsilon", "1e6")
    assert plain[0] == slow[0] and plain[-1] < slow[-1] - 0.02, (plain, slow)
    with pytest.raises(ValueError, match="optim is sgd: here it is --optimizer"):
        train(monkeypatch, data_dir, tmp_path / "sgd", *sizes, "--optim", "sgd")


def test_fp16_on_a_cpu_is_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, fp16=True, report_to=[])
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        set_up_process(args)


@pytest.mark.parametrize(
    "words",
    [
        ["--max_steps", "0"],
        ["--max_steps", "-1", "--num_train_epochs", "0"],
        ["--per_device_train_batch_size", "9999", "--dataloader_drop_last", "true"],
    ],
)
def test_a_run_that_takes_no_step_does_not_finish(words, monkeypatch, data_dir, tmp_path):
    with pytest.raises(ValueError, match="no step was taken .max_steps .*: the model is as it was"):
        train(monkeypatch, data_dir, tmp_path, *words)
    assert not stages.read_json(tmp_path / "run.json")["finished"]
    assert not (tmp_path / "model.safetensors").exists()


def test_sizes_may_have_the_names_of_the_architecture():
    args = PretrainArguments(config_overrides={"n_positions": 128, "num_hidden_layers": 3})
    config = make_config(args, vocab_size=500, block_size=64, special={})
    assert (config.n_positions, config.n_layer, config.vocab_size) == (128, 3, 500)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.0, 0.0, 0.0)


def test_a_size_that_the_architecture_does_not_have_is_refused():
    args = PretrainArguments(model_type="llama", config_overrides={"n_layers": 3})
    with pytest.raises(ValueError, match="llama has no n_layers.*num_hidden_layers"):
        make_config(args, vocab_size=500, block_size=64, special={})


def test_heads_that_cannot_share_keys_are_refused():
    """qwen3 has 32 key-value heads where the recipe is silent, llama as many as there are heads."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    args = PretrainArguments(model_type="llama", config_overrides=sizes)
    assert make_config(args, 500, 64, {}).num_key_value_heads == 2
    args = PretrainArguments(model_type="qwen3", config_overrides=sizes)
    with pytest.raises(ValueError, match="is 2, no multiple of num_key_value_heads 32: set both"):
        make_config(args, 500, 64, {})
    with pytest.raises(ValueError, match="model_type mamba is no decoder with attention"):
        make_config(PretrainArguments(model_type="mamba"), 500, 64, {})


@pytest.mark.parametrize(
    ("gpu", "bf16", "expected"),
    [
        (True, True, {"bf16": True, "fp16": False}),
        (True, False, {"bf16": False, "fp16": True}),
        (False, True, {"bf16": True, "fp16": False}),
        (False, False, {"bf16": False, "fp16": False}),
    ],
)
def test_dtype_by_capability(monkeypatch, gpu, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    defaults = training_defaults()
    assert {name: defaults[name] for name in expected} == expected




def test_windows_opens_no_directories(tmp_path, monkeypatch):
    (tmp_path / "weights").write_text("x")
    opened = []
    plain = os.open
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "open", lambda p, flags: opened.append((p, flags)) or plain(p, flags))
    sync_to_disk(tmp_path)
    assert opened == [(tmp_path / "weights", os.O_RDWR)]
