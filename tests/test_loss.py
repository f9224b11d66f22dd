"""The fused loss: value and gradients of the plain one, over several chunks."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from pretrain import loss
from pretrain.loss import next_token_loss
from pretrain.modeling_gpt import GPT2LMHeadModel


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(loss, "ROWS", 7)


@pytest.mark.parametrize("count", [None, 100])
def test_value_and_gradients_equal_the_plain_loss(count):
    torch.manual_seed(0)
    hidden = torch.randn(3, 20, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, (3, 20))
    labels[0, :5] = -100
    logits = (hidden @ weight.T)[:, :-1].reshape(-1, 50)
    targets = labels[:, 1:].reshape(-1)
    plain = cross_entropy(logits, targets, reduction="sum") / (count or (targets >= 0).sum())
    fused = next_token_loss(hidden, weight, labels, count)
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)
    for one, other in zip(
        torch.autograd.grad(fused * 3, (hidden, weight)),
        torch.autograd.grad(plain * 3, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_model_in_training_has_the_loss_of_its_logits(tiny_config):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(tiny_config).train()
    ids = torch.randint(10, 250, (2, 20))
    labels = ids.masked_fill(ids < 100, -100)
    trained = model(input_ids=ids, labels=labels)
    assert trained.logits is None
    torch.testing.assert_close(trained.loss, model.eval()(input_ids=ids, labels=labels).loss)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.train()(input_ids=ids, labels=labels).loss
    assert rounded.dtype == torch.float32 and abs(rounded - trained.loss) < 0.02
