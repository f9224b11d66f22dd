"""Blockwise attention: the results and the gradients of transformers' "sdpa", block by block."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pretrain import attention
from pretrain.attention import BLOCKWISE
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
    model = request.param(tiny_config).eval()
    twin = request.param(tiny_config).eval()
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
