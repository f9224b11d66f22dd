"""Small, real things that several tests share: a tokenizer, a model, a copy of the repository."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
SENTENCES = [
    "The river runs past the mill. 12 + 30 = 42.",
    "小河流过磨坊。十二加三十等于四十二。",
    "Who are you? I am LadderLM, a small model.",
    "你是谁？我是天梯，一个小模型。",
]


def pytest_collection_modifyitems(config, items):
    """Leave out what is slow, whatever else `-m` asks for, unless it is asked for by name."""
    if "slow" in config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of 512 entries, trained like the real one."""
    from tokenizer.train import train_bpe, wrap

    return wrap(train_bpe(SENTENCES * 20, vocab_size=512, max_token_length=16), 128)


@pytest.fixture(scope="session")
def tiny_config(tokenizer):
    """A GPT-2 config of 2 layers, 64 channels, context 64, for `tokenizer`."""
    from transformers import GPT2Config

    return GPT2Config(
        n_layer=2, n_embd=64, n_head=4, n_positions=64, vocab_size=len(tokenizer),
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


@pytest.fixture(scope="session")
def base_dir(tokenizer, tiny_config, tmp_path_factory):
    """A base model's directory with random weights and the tokenizer."""
    import torch

    from pretrain.modeling_gpt import GPT2LMHeadModel

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("base")
    GPT2LMHeadModel(tiny_config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def blocks_dir(tokenizer, tmp_path_factory):
    """What pretrain.prepare leaves: 48 training blocks of 32 tokens, and its tokenizer."""
    directory = tmp_path_factory.mktemp("prepare")
    texts = [f"{SENTENCES[i % 4]} {i} + {i} = {2 * i}." for i in range(70)]
    write_blocks(directory / "train-00000", tokenizer, texts, 32, most=48)
    write_blocks(directory / "validation-00000", tokenizer, texts[:6], 32)
    tokenizer.save_pretrained(directory)
    return directory


def write_blocks(path, tokenizer, texts, block_size, first=0, most=None):
    """A shard of packed blocks, written out: <bos>, the text's ids, <eos>, and so on."""
    ends = tokenizer.bos_token, tokenizer.eos_token
    ids = tokenizer("".join(f"{ends[0]}{text}{ends[1]}" for text in texts))["input_ids"]
    starts = range(0, len(ids) - block_size + 1, block_size)[first:most]
    blocks = [ids[start : start + block_size] for start in starts]
    assert most is None or len(blocks) == most - first, len(blocks)
    table = pa.table({"input_ids": pa.array(blocks, pa.list_(pa.int32()))})
    pq.write_table(table, path.with_suffix(".parquet"))


@pytest.fixture(scope="session")
def prepared_dir(tokenizer, tmp_path_factory):
    """Blocks of 32 tokens as `pretrain.prepare` writes them: two training shards, validation."""
    directory = tmp_path_factory.mktemp("prepare")
    train = [f"The river {i} runs past the mill." for i in range(80)]
    held_out = ["Who are you? I am LadderLM. 小河流过磨坊。"] * 12
    write_blocks(directory / "train-00000", tokenizer, train, 32, most=20)
    write_blocks(directory / "train-00001", tokenizer, train, 32, first=20)
    write_blocks(directory / "validation-00000", tokenizer, held_out, 32)
    tokenizer.save_pretrained(directory)
    return directory


class Clock:
    """A clock that only the test moves."""

    now = 100.0

    def __call__(self):
        return self.now


def quick_arguments(output_dir, **changes):
    """TrainingArguments of a quick run on the CPU that reports to nobody."""
    from transformers import TrainingArguments

    from pretrain.hardware import training_defaults

    given = training_defaults() | {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    given |= {"output_dir": str(output_dir), "per_device_train_batch_size": 4, "logging_steps": 1}
    return TrainingArguments(**given | changes)


def pretrain(data_dir, output_dir, own=None, **changes):
    """A whole run of pretrain.train with a model of one layer; the lines of its metrics.jsonl."""
    from pretrain.train import PretrainArguments, main

    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2}
    args = PretrainArguments(str(data_dir), config_overrides=sizes, eval_documents=4, **own or {})
    main(args, quick_arguments(output_dir, **changes))
    return read_lines(output_dir / "metrics.jsonl")


def load_script(name):
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_lines(path):
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def generate_corpora(folder: Path, hash_seed: str) -> Path:
    """data/generate.py in a fresh process."""
    command = [sys.executable, str(ROOT / "data/generate.py"), "--output_dir", str(folder)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": hash_seed})
    return folder


@pytest.fixture(scope="session")
def corpora_dir(tmp_path_factory):
    return generate_corpora(tmp_path_factory.mktemp("corpora"), "0")


@pytest.fixture(scope="session")
def corpora(corpora_dir):
    rows = {}
    for path in corpora_dir.iterdir():
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            rows[path.stem] = [json.loads(line) for line in lines]
        else:
            with path.open(encoding="utf-8", newline="") as file:
                rows[path.stem] = list(csv.DictReader(file))
    return rows


def says(row):
    """All texts of a row, whatever its format."""
    if "text" in row:
        return row["text"]
    parts = [row.get("answer", "")]
    for column in ("messages", "prompt", "chosen", "rejected"):
        parts += [m["content"] for m in row.get(column, []) if m["role"] != "system"]
    return "\n".join(parts)


def questions(row):
    """What the user says, as a list of texts."""
    return [m["content"] for m in row.get("messages", row.get("prompt", [])) if m["role"] == "user"]
