"""The benchmarks' own arithmetic, and that each runs; what they measure is no test's business."""

import runpy

import pytest
import torch
from conftest import ROOT
from transformers import GPT2Config

from pretrain.modeling_gpt import GPT2LMHeadModel

BENCHMARK = runpy.run_path(str(ROOT / "scripts/benchmark.py"))


class Uniform(torch.nn.Module):
    """Every token is equally likely; remembers how many it was asked for."""

    config = GPT2Config(n_positions=16)

    def forward(self, input_ids, use_cache):
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 50)})


@pytest.mark.parametrize("stride", [15, 8, 4, 1])
@pytest.mark.parametrize("length", [5, 16, 61, 64])
def test_every_token_is_counted_once(stride, length):
    nats = BENCHMARK["count_nats"](Uniform(), torch.randint(0, 50, (length,)), stride)
    assert nats == pytest.approx(length * torch.log(torch.tensor(50.0)).item(), rel=1e-5)


def test_windows_see_what_came_before(tiny_config):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(tiny_config)
    ids = torch.randint(0, 250, (40,))
    whole = model(input_ids=torch.cat([torch.tensor([2]), ids])[None], use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(whole[0, :-1], ids, reduction="sum").item()
    assert tiny_config.n_positions > 41
    assert BENCHMARK["count_nats"](model, ids, 10) == pytest.approx(expected, rel=1e-5)


def test_batches_cover_the_text_once_an_epoch():
    ids = torch.arange(16 * 3 * 10 + 25)
    batches = BENCHMARK["draw_batches"](ids, context=10)
    epoch = torch.cat([next(batches) for _ in range(3)])
    assert epoch.shape == (48, 10) and len(epoch.unique()) == 480
    assert torch.equal(epoch[:, 1:] - epoch[:, :-1], torch.ones(48, 9, dtype=torch.long))


def test_tables_show_ratios(capsys):
    figures = {"peak_fp32": 200.0, "peak_bf16": 900.0, "tokens_per_second": 300.0, "gflops": 250.0,
               "share": 0.28, "memory_gb": 8.0, "start_s": 9.0}  # fmt: skip
    ours = figures | {"tokens_per_second": 900.0, "memory_gb": 4.0}
    BENCHMARK["print_tables"]({"7M": {"default": figures, "ours": ours}})
    shown = capsys.readouterr().out
    assert "| LadderLM | 900 | 250 | 0.28 | 4.00 | 9.00 |" in shown
    assert "default settings: speed 3.00, memory 0.50" in shown


def test_shakespeare_runs_on_a_small_text(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The river runs past the mill and the mill stands still. " * 900)
    since = BENCHMARK["time"].time() - BENCHMARK["STARTED_AT"]
    result = BENCHMARK["benchmark_shakespeare"](text, since + 8)
    assert result["steps"] > 5 and 0 < result["nats_per_character"] < 3
