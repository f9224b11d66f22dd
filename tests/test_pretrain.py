"""Packing, collating, optimizers, and the numbers of evaluation."""

import importlib.util
import math

import pytest
import torch
from conftest import write_blocks

from pretrain.data import PackedCollator, load_blocks, spread_blocks, unpack_documents
from pretrain.eval import bits_per_byte, mean_with_interval, share_with_interval
from pretrain.hardware import can_compile, choose_attention, supports_bf16, training_defaults
from pretrain.modeling_gpt import GPT2LMHeadModel
from pretrain.optimizer import make_optimizer, orthogonalize


def test_collator_restarts_positions_and_masks_bos():
    rows = [{"input_ids": torch.tensor([7, 8, 3, 2, 9, 9, 3, 2])}]
    batch = PackedCollator(bos_token_id=2)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert batch["labels"].tolist() == [[-100, 8, 3, -100, 9, 9, 3, -100]]


def test_where_one_token_is_both_ends_the_end_is_learned():
    """GPT-2's own tokenizer: the first of two begins a block, or ends what the last one began."""
    rows = [{"input_ids": torch.tensor(ids)} for ids in ([0, 8, 9, 0, 0, 7, 6, 0], [9, 0, 0, 7])]
    for row, positions, labels in zip(
        rows,
        ([0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1]),
        ([-100, 8, 9, 0, -100, 7, 6, 0], [-100, 0, -100, 7]),
        strict=True,
    ):
        batch = PackedCollator(bos_token_id=0, eos_token_id=0)([row])
        assert batch["position_ids"].tolist() == [positions]
        assert batch["labels"].tolist() == [labels]


def test_whole_documents_come_back_from_blocks(tokenizer, tmp_path):
    documents = [f"Document {i}. 小河。" for i in range(9)]
    write_blocks(tmp_path / "train-00000", tokenizer, documents, 16)
    blocks = load_blocks(tmp_path, "train")
    whole = unpack_documents(blocks, tokenizer, limit=99)
    assert whole[:-1] == documents[: len(whole) - 1], "the last one may be cut"
    few = unpack_documents(blocks, tokenizer, limit=4)
    assert len(few) == 4 and few == [text for text in whole if text in few]
    assert few != whole[:4], "not the first ones: they may all be of one file"


def test_a_few_blocks_are_of_all_files(tokenizer, tmp_path):
    write_blocks(tmp_path / "validation-00000", tokenizer, ["The river runs."] * 40, 16)
    write_blocks(tmp_path / "validation-00001", tokenizer, ["小河流过磨坊。"] * 40, 16)
    blocks = load_blocks(tmp_path, "validation")
    shown = [tokenizer.decode(ids) for ids in spread_blocks(blocks, 6)["input_ids"]]
    assert len(shown) == 6 and "river" in shown[0] and "小河" in shown[5]
    whole = spread_blocks(blocks, 999)["input_ids"]
    assert torch.equal(torch.stack(list(whole)), torch.stack(list(blocks["input_ids"])))


def test_one_document_longer_than_its_blocks_is_measured(tokenizer, tmp_path):
    write_blocks(tmp_path / "train-00000", tokenizer, ["The river runs. " * 40], 16)
    blocks = load_blocks(tmp_path, "train")
    (play,) = unpack_documents(blocks, tokenizer, limit=400)
    assert len(blocks) > 3 and play.startswith("The river runs. The river") and len(play) > 500


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_optimizer_learns_a_sentence(tiny_config, name):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(tiny_config)
    optimizer = make_optimizer(name, model, learning_rate=1e-2, weight_decay=0.1)
    ids = torch.randint(
        10, tiny_config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1)
    )
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 5 and losses[-1] < 1.0, losses


def test_weight_decay_spares_embeddings_norms_and_biases(tiny_config):
    model = GPT2LMHeadModel(tiny_config)
    matrices, others = make_optimizer("adamw", model, 1e-3, 0.1).param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(matrices["params"]) == 4 * tiny_config.n_layer
    assert any(p is model.transformer.wte.weight for p in others["params"])
    assert sum(len(group["params"]) for group in (matrices, others)) == len(
        list(model.parameters())
    )


def test_unknown_optimizer_is_refused(tiny_config):
    with pytest.raises(ValueError, match="'sgd' is not one of adamw, muon"):
        make_optimizer("sgd", GPT2LMHeadModel(tiny_config), 1e-3, 0.1)


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (3, 32, 96)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert 0.5 < values.min() and values.max() < 1.3


def test_bits_per_byte_of_a_uniform_model(tokenizer, tiny_config):
    model = GPT2LMHeadModel(tiny_config)
    torch.nn.init.zeros_(model.transformer.wte.weight)  # tied: every logit is 0
    documents = ["The river runs.", "小河流过磨坊。" * 30]  # the second is longer than the context
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in documents)
    expected = tokens * math.log2(len(tokenizer)) / sum(len(t.encode()) for t in documents)
    assert bits_per_byte(model, tokenizer, documents)["value"] == pytest.approx(expected, rel=1e-4)


def test_intervals():
    assert share_with_interval([True] * 8 + [False] * 2) == {
        "value": 0.8, "low": pytest.approx(0.490162, abs=1e-5),
        "high": pytest.approx(0.943318, abs=1e-5), "n": 10, "unit": "share",
    }  # fmt: skip
    mean = mean_with_interval([1.0, 2.0, 3.0], "nats")
    assert (mean["value"], mean["high"]) == (2.0, pytest.approx(2 + 1.96 / math.sqrt(3), abs=1e-5))


def test_dtype_and_attention_follow_the_hardware():
    assert training_defaults()["bf16"] == supports_bf16()
    if not torch.cuda.is_available():
        assert supports_bf16() == torch.cpu._is_avx512_bf16_supported()
    if training_defaults()["use_cpu"]:
        assert choose_attention() == "blockwise" and not can_compile()


@pytest.mark.parametrize(
    ("capability", "attention"), [((8, 0), "packed"), ((7, 5), "sdpa"), ((6, 1), "sdpa")]
)
def test_a_gpu_is_used_for_what_it_can(monkeypatch, tmp_path, capability, attention):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capability >= (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_attention() == attention
    assert training_defaults()["bf16"] == (capability >= (8, 0)) != training_defaults()["fp16"]
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    assert not can_compile() or importlib.util.find_spec("triton")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CC", "cc")
    assert can_compile() == (capability >= (7, 0))
