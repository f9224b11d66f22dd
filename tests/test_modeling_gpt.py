"""The model file: equal to transformers' GPT-2 on the same files, packed equal to unpacked."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from pretrain.modeling_gpt import GPT2LMHeadModel


@pytest.fixture(scope="module")
def pair(base_dir):
    """Our model and transformers' own on the same files, in eval mode."""
    ours = GPT2LMHeadModel.from_pretrained(base_dir).eval()
    theirs = AutoModelForCausalLM.from_pretrained(base_dir).eval()
    assert type(theirs).__module__.startswith("transformers.")
    return ours, theirs


@pytest.fixture(scope="module")
def ids(pair):
    """Token ids (3, 20)."""
    return torch.randint(10, pair[0].config.vocab_size, (3, 20), generator=_seeded())


def _seeded():
    return torch.Generator().manual_seed(0)


def test_logits_and_gradients_equal_transformers(pair, ids):
    outputs = [model(input_ids=ids, labels=ids) for model in pair]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-4, rtol=0)
    gradients = []
    for model, output in zip(pair, outputs, strict=True):
        model.zero_grad()
        output.loss.backward()
        gradients.append(dict(model.named_parameters()))
    for name, parameter in gradients[0].items():
        torch.testing.assert_close(parameter.grad, gradients[1][name].grad, atol=1e-5, rtol=1e-4)


def rows_of(kind, ids):
    """The model's arguments for full, left-padded or packed rows; padding has no label."""
    if kind == "full":
        return {"input_ids": ids, "labels": ids}
    if kind == "packed":
        starts = torch.zeros(20, dtype=torch.long)
        starts[[8, 13]] = torch.tensor([8, 5])
        positions = (torch.arange(20) - starts.cumsum(0)).expand(3, -1)
        labels = ids.masked_fill(positions == 0, -100)
        return {"input_ids": ids, "position_ids": positions, "labels": labels, "use_cache": False}
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


@pytest.mark.parametrize("kind", ["full", "left-padded", "packed"])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_equal_transformers(pair, ids, kind, training):
    kwargs, results = rows_of(kind, ids), []
    for model in pair:
        model.zero_grad()
        model.train(training)  # ours fuses the loss with the head then
        output = model(**kwargs)
        output.loss.backward()
        model.eval()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append((output.loss.detach(), model(**kwargs).logits.detach(), gradients))
    (loss, logits, ours), (their_loss, their_logits, theirs) = results
    seen = kwargs.get("attention_mask", torch.ones_like(ids)).bool()
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[seen], their_logits[seen], atol=1e-4, rtol=0)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, theirs[name], atol=1e-4, rtol=1e-4, msg=name)


def test_token_by_token_equals_transformers_and_the_whole_row(pair, ids):
    kwargs = rows_of("left-padded", ids)
    mask, positions = kwargs["attention_mask"], kwargs["position_ids"]
    steps = []
    for model in pair:
        cache, logits = None, []
        for t in range(ids.shape[1]):
            output = model(
                input_ids=ids[:, t : t + 1], attention_mask=mask[:, : t + 1],
                position_ids=positions[:, t : t + 1], past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = output.past_key_values
            logits.append(output.logits)
        steps.append(torch.cat(logits, 1)[mask.bool()])
    torch.testing.assert_close(steps[0], steps[1], atol=1e-4, rtol=0)
    kwargs.pop("labels")
    torch.testing.assert_close(steps[0], pair[0](**kwargs).logits[mask.bool()], atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "blockwise"])
def test_checkpointing_gives_the_same_gradients(base_dir, ids, attention):
    gradients = []
    for checkpointing in (False, True):
        model = GPT2LMHeadModel.from_pretrained(base_dir, attn_implementation=attention).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls = []
        model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        model(**rows_of("packed", ids)).loss.backward()
        assert len(calls) == 1 + checkpointing, "the layer is computed once more on the way back"
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5, msg=name)


def test_left_padding_equals_transformers_and_no_padding(pair, ids):
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    kwargs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    ours, theirs = (model(**kwargs).logits for model in pair)
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-4, rtol=0)
    alone = pair[0](input_ids=ids[:1, 7:]).logits
    torch.testing.assert_close(ours[:1, 7:], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "blockwise"])
def test_packed_documents_do_not_see_each_other(base_dir, ids, attention):
    model = GPT2LMHeadModel.from_pretrained(base_dir, attn_implementation=attention).eval()
    positions = torch.cat([torch.arange(8), torch.arange(12)]).expand(3, -1)
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    first, second = (model(input_ids=part).logits for part in (ids[:, :8], ids[:, 8:]))
    torch.testing.assert_close(packed, torch.cat([first, second], 1), atol=1e-4, rtol=0)


def test_later_tokens_leave_earlier_logits_alone(pair, ids):
    changed = ids.clone()
    changed[:, 12] = 9
    before, after = (pair[0](input_ids=x).logits for x in (ids, changed))
    torch.testing.assert_close(before[:, :12], after[:, :12], atol=0, rtol=0)
    assert (before[:, 12:] - after[:, 12:]).abs().max() > 1e-3


def test_cached_generation_equals_transformers(pair, ids):
    kwargs = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(*(model.generate(ids, **kwargs) for model in pair))


def test_initialisation_scales_residual_projections():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=8, n_embd=128, n_head=4, vocab_size=300, bos_token_id=2,
                        eos_token_id=3)  # fmt: skip
    block = GPT2LMHeadModel(config).transformer.h[3]
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_a_config_that_this_file_does_not_honour_is_refused():
    with pytest.raises(ValueError, match="plain GPT-2.*relu"):
        GPT2LMHeadModel(GPT2Config(activation_function="relu"))
