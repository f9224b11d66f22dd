"""Blockwise and packed attention: the results and the gradients of transformers' "sdpa"."""

import copy

import pytest
import torch
from conftest import pretrain
from transformers import AutoModelForCausalLM, LlamaConfig

from pretrain import attention, train
from pretrain.attention import BLOCKWISE, PACKED, packed_attention
from pretrain.data import PackedCollator
from pretrain.modeling_gpt import GPT2LMHeadModel


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Four queries a block: a row of 14 has three whole blocks and a rest."""
    monkeypatch.setattr(attention, "QUERIES", 4)


def llama(_):
    """Two key-value heads for four query heads."""
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=512,
                         num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(params=[GPT2LMHeadModel, llama], ids=["gpt2", "llama"])
def pair(request, tiny_config):
    """The same weights twice: under "sdpa" and under "blockwise"."""
    torch.manual_seed(0)
    # A config each: it is there that a model keeps the name of its attention.
    model, twin = (request.param(copy.deepcopy(tiny_config)).eval() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    model.set_attn_implementation("sdpa")
    twin.set_attn_implementation(BLOCKWISE)
    return model, twin


IDS = torch.randint(10, 250, (2, 14), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS)
LEFT[0, :6] = 0
INPUTS = {
    "causal": {},
    "left padding": {"attention_mask": LEFT, "position_ids": (LEFT.cumsum(1) - 1).clamp(min=0)},
    "packed": {"position_ids": torch.cat([torch.arange(5), torch.arange(9)]).expand(2, -1)},
}


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_logits_and_gradients_equal_sdpa(pair, inputs):
    real = inputs.get("attention_mask", torch.ones_like(IDS)).bool()
    logits = [model(input_ids=IDS, use_cache=False, **inputs).logits for model in pair]
    assert all(torch.isfinite(x).all() for x in logits)
    torch.testing.assert_close(logits[0][real], logits[1][real], atol=1e-5, rtol=1e-4)
    for x in logits:
        (x[real] ** 2).mean().backward()
    other = dict(pair[1].named_parameters())
    for name, parameter in pair[0].named_parameters():
        torch.testing.assert_close(parameter.grad, other[name].grad, atol=1e-5, rtol=1e-3)


def test_later_keys_are_not_multiplied(pair, monkeypatch):
    seen = []
    plain = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda x, dim: (seen.append(tuple(x.shape[-2:])), plain(x, dim))[1]
    )
    pair[1](input_ids=IDS, use_cache=False)
    assert seen[:4] == [(4, 4), (4, 8), (4, 12), (2, 14)]


def test_generation_equals_sdpa(pair):
    kwargs = {"attention_mask": LEFT, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(model.generate(IDS, **kwargs) for model in pair))


def test_a_row_of_padding_alone_is_finite(pair):
    mask = torch.zeros_like(IDS)
    mask[1] = 1
    loss = pair[1](input_ids=IDS, attention_mask=mask, use_cache=False).logits.sum()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in pair[1].parameters() if p.grad is not None)


def test_the_name_stays_out_of_saved_configs(pair, tmp_path):
    pair[1].save_pretrained(tmp_path)
    assert BLOCKWISE not in (tmp_path / "config.json").read_text()


def flash_by_document(
    query, key, value, ends, key_ends, longest, _, scale, window_size, enable_gqa
):
    """What torch's flash kernel computes over (tokens, heads, d), a document at a time."""
    assert window_size == (-1, 0) and torch.equal(ends, key_ends) and ends[-1] == len(query)
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or enable_gqa
    parts = []
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        assert 0 < end - begin <= longest
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = (q @ k.mT) * scale
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


def test_packed_rows_reach_the_flash_kernel_by_document(pair, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "runs_flash", lambda value: True)
    monkeypatch.setattr(
        attention.varlen,
        "varlen_attn",
        lambda *args, **words: calls.append(1) or flash_by_document(*args, **words),
    )
    ids = IDS.clone()
    ids[0, 5] = ids[1, [0, 3, 12]] = 2  # <bos>: a row goes on in the middle of a document
    batch = PackedCollator(bos_token_id=2, lengths=True)([{"input_ids": row} for row in ids])
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 14, 17, 26, 28]
    sdpa, packed = pair
    packed.set_attn_implementation(PACKED)
    losses = [model(**batch, use_cache=False).loss for model in (sdpa, packed)]
    assert len(calls) == 2, "once a layer"
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    other = dict(packed.named_parameters())
    for name, parameter in sdpa.named_parameters():
        torch.testing.assert_close(parameter.grad, other[name].grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_where_the_flash_kernel_does_not_run_packed_is_sdpa(pair, inputs):
    sdpa, packed = pair
    packed.set_attn_implementation(PACKED)
    logits = [model(input_ids=IDS, use_cache=False, **inputs).logits for model in pair]
    torch.testing.assert_close(*logits)
    kwargs = {"attention_mask": LEFT, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(model.generate(IDS, **kwargs) for model in pair))


def test_torchs_own_kernel_takes_what_it_is_given(monkeypatch):
    """On the meta device: shapes, dtypes and the backward pass, without a GPU."""
    monkeypatch.setattr(attention, "runs_flash", lambda value: True)
    shapes = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
    query, key, value = (torch.empty(2, heads, 14, 8, **shapes) for heads in (4, 2, 2))
    ends = torch.empty(6, dtype=torch.int32, device="meta")
    mixed, _ = packed_attention(
        None, query.float(), key.float(), value, None, ends, scaling=0.3, position_ids=None
    )
    assert mixed.shape == (2, 14, 4, 8) and mixed.dtype == torch.bfloat16
    mixed.sum().backward()
    assert key.grad.shape == key.shape


def test_pretraining_packs_for_a_gpu(prepared_dir, tmp_path, monkeypatch):
    """The whole stage with what a GPU would be given, the flash kernel written out."""
    seen = []

    def flash(query, *args, **kwargs):
        seen.append(query.shape[0])
        return flash_by_document(query, *args, **kwargs)

    monkeypatch.setattr(attention.varlen, "varlen_attn", flash)
    monkeypatch.setattr(attention, "runs_flash", lambda value: value.requires_grad)
    settings = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    plain = pretrain(prepared_dir, tmp_path / "plain", {}, **settings)
    assert not seen
    monkeypatch.setattr(train, "choose_attention", lambda: PACKED)
    packed = pretrain(prepared_dir, tmp_path / "packed", {}, **settings)
    assert seen
    for before, after in zip(plain, packed, strict=True):
        for name in {"loss", "grad_norm", "eval_loss"} & set(before):
            assert after[name] == pytest.approx(before[name], rel=2e-2)
