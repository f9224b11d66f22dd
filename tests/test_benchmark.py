"""The benchmarks' own arithmetic, and that each runs; what they measure is no test's business."""

import argparse
import json
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load_script
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


def test_preparing_is_compared_on_the_same_text(tmp_path, tokenizer):
    """All three variants, through the command; the two ratios are of the speeds shown."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = "The river runs past the mill, and 12 people of the village know it well. "
    rows = (json.dumps({"text": f"{number} {text}"}) for number in range(3000))
    (tmp_path / "text.jsonl").write_text("\n".join(rows) + "\n")
    command = [sys.executable, "scripts/benchmark.py", "prepare", "--text", "TEXT", "--tokenizer",
               "TOKENIZER", "--json", str(tmp_path / "out.json")]  # fmt: skip
    command[4], command[6] = str(tmp_path / "text.jsonl"), str(tmp_path / "tokenizer")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    size = sum(len(f"{number} {text}") for number in range(3000)) / 1e6
    assert result["bare"]["megabytes"] == pytest.approx(size)
    assert result["datasets"]["megabytes"] == pytest.approx(size)
    assert result["ours"]["megabytes"] > size, "and the held-out rows"
    ratio = result["ours"]["megabytes_per_second"] / result["bare"]["megabytes_per_second"]
    assert f"{ratio:.2f} x Rust tokenizer" in done.stdout
    assert result["ours"]["memory_gb"] > 0.1


def test_preparing_without_a_tokenizer_names_the_command():
    run_all = runpy.run_path(str(ROOT / "scripts/benchmark_prepare.py"))["run_all"]
    with pytest.raises(FileNotFoundError, match="output/no/tokenizer does not.*tokenizer.train"):
        run_all(argparse.Namespace(tokenizer="output/no/tokenizer", text=None))


def test_the_corpus_that_is_made(tmp_path):
    made = runpy.run_path(str(ROOT / "scripts/benchmark_prepare.py"))["write_corpus"]
    generated = tmp_path / "generated.jsonl"
    rows = [{"text": f"The river is {number} miles long."} for number in range(50)]
    rows += [{"text": f"小河长{number}里。"} for number in range(50)]
    generated.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for path in paths:
        made(generated, path, megabytes=0.3)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    texts = [json.loads(line)["text"] for line in paths[0].read_text(encoding="utf-8").splitlines()]
    assert 0.3e6 <= paths[0].stat().st_size < 0.35e6
    assert len(set(texts)) == len(texts) and 0.2 < sum("小" in t for t in texts) / len(texts) < 0.8
    assert max(map(len, texts)) > 4_000 and min(map(len, texts)) < 300


def test_both_ppos_get_the_same_settings(tmp_path, capsys):
    """The stage's own parser takes our words; TRL's job has the same numbers."""
    from trl import ModelConfig

    import rlhf.train_ppo as stage
    import stages

    ppo = load_script("benchmark_ppo")
    parser = argparse.ArgumentParser()
    ppo.add_commands(parser.add_subparsers())
    args = parser.parse_args(["ppo", "--trl_python", "other/python", "--rollouts", "6"])
    words = ppo.our_command(args, tmp_path, tmp_path / "prompts.json", every=3, seed=5)
    assert words[1:3] == ["-m", "rlhf.train_ppo"]
    classes = [stage.PPOArguments, stage.PPOConfig, ModelConfig]
    _, ours, _ = stages.parse_args(classes, [*words[3:], "--use_cpu", "true"])
    python, _, job = ppo.trl_command(args, tmp_path, tmp_path / "prompts.json", every=3, seed=5)
    job = json.loads(job)
    assert python == "other/python" and job["rollouts"] == 6
    for name in ppo.SETTINGS:
        assert getattr(ours, name) == job[name], name
    assert ours.generation_batch_size == ppo.MINIBATCH * ppo.MINIBATCHES
    assert ours.max_steps == 6 * ppo.MINIBATCHES * ppo.EPOCHS and ours.save_steps == 24
    policy = {"rollouts": 3, "seconds": 2.0, "score": 1.5, "gain": 0.5, "stop_rate": 1.0}
    runs = [{"cpu_seconds": 4.0, "policies": [policy | {"score": score}]} for score in (1.0, 2.0)]
    ppo.print_ppo({"ours": runs, "trl": runs})
    assert capsys.readouterr().out.count("1.50") == 2  # the mean of two seeds
