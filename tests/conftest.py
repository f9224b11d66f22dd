"""Small, real things that several tests share: a tokenizer, a model, a copy of the repository."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

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
    from pretrain.prepare import PrepareArguments, write_split

    directory = tmp_path_factory.mktemp("prepare")
    args = PrepareArguments(output_dir=str(directory), block_size=32)
    texts = [f"{SENTENCES[i % 4]} {i} + {i} = {2 * i}." for i in range(70)]
    for split, documents in (("train", texts), ("validation", texts[:6])):
        counts = write_split(split, documents, tokenizer, args)
        assert split == "validation" or counts["blocks"] >= 48, counts
    table = pq.read_table(directory / "train-00000.parquet")
    pq.write_table(table.slice(0, 48), directory / "train-00000.parquet")
    tokenizer.save_pretrained(directory)
    return directory
