"""Measure how fast this machine pretrains, against plain transformers, in one run.

    python scripts/benchmark.py pretrain
    python scripts/benchmark.py pretrain --sizes 7M --repeats 5 --json output/benchmark.json
    python scripts/benchmark.py shakespeare --text shakespeare.txt
    python scripts/benchmark.py rollout [--model output/tiny/sft]
    python scripts/benchmark.py prepare --tokenizer output/tiny/tokenizer --megabytes 500
    python scripts/benchmark.py ppo --trl_python OTHER/bin/python

`pretrain` starts a fresh process for each model size, variant and repeat, the variants in turn, so
that a machine whose speed drifts does so for all of them. Each process measures the peak of this
machine's matrix products right before and after its steps. Numbers are medians over the repeats.

`shakespeare` goes from a raw text file, in one cold process, to a held-out loss in nats a character
on the last tenth of the file. Everything counts: imports, the tokenizer's training, evaluations.
"""

import time

STARTED_AT = time.time()  # before the libraries: they are part of what `shakespeare` times

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import random  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import commandline  # noqa: E402, F401 (quiets a library that the measured processes load)

SIZES = {
    "124M": {
        "config": dict(n_layer=12, n_embd=768, n_head=12, vocab_size=50304, n_positions=1024),
        "batch_size": 4,
        "steps": {"skipped": 2, "timed": 3},
    },
    "7M": {
        "config": dict(n_layer=6, n_embd=256, n_head=8, vocab_size=8192, n_positions=256),
        "batch_size": 16,
        "steps": {"skipped": 5, "timed": 30},
    },
}
VARIANTS = {
    "default": "transformers, Trainer, default settings",
    "bf16": "transformers, Trainer, bf16",
    "bf16_compile": "transformers, Trainer, bf16 + torch.compile",
    "ours": "LadderLM",
    "ours_bare": "LadderLM, the same step in a bare loop",
}
FIGURES = {
    "tokens_per_second": "tokens/s",
    "gflops": "GFLOP/s",
    "share": "of the peak",
    "memory_gb": "peak memory, GB",
    "start_s": "to the first step, s",
}
# Five small layers and a context of 128: on two cores more steps beat more parameters here.
RECIPE = {
    "vocab_size": 4096,
    "config": dict(n_layer=5, n_embd=128, n_head=4, n_positions=128),
    "batch_size": 16,
    "learning_rate": 1.2e-2,
    "weight_decay": 0.6,  # the text is read five times
    "warmup": 0.03,
}


def benchmark_pretraining(sizes: list[str], variants: list[str], repeats: int) -> dict:
    """Run every variant `repeats` times, in turn.

    Returns:
        {size: {variant: {figure: median}}}; figures as in `measure`.
    """
    measured = {size: {variant: [] for variant in variants} for size in sizes}
    for size in sizes:
        for repeat in range(repeats):
            for variant in variants:
                print(f"  {size} {variant}, repeat {repeat + 1} of {repeats}", file=sys.stderr)
                command = [sys.executable, __file__, "measure", size, variant]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    sys.exit(f"{' '.join(command)} failed (exit code {done.returncode})")
                measured[size][variant].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        size: {
            variant: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for variant, runs in by_variant.items()
        }
        for size, by_variant in measured.items()
    }


def measure(size: str, variant: str) -> dict:
    """Train for a few steps in this process.

    Returns:
        peak_fp32, peak_bf16: of a matrix product, in GFLOP/s; tokens_per_second; gflops: model
        FLOPs a second (PaLM, appendix B); share: of the higher peak; memory_gb: highest resident
        memory of the process; start_s: from its start to the end of the first step, without peaks.
    """
    import torch

    from pretrain.costs import flops_per_token, measure_peak
    from pretrain.hardware import set_up_process
    from provenance import measure_peak_memory

    if variant.startswith("ours"):
        set_up_process()
    cpu, began_at = torch.device("cpu"), time.time()
    peaks, fp32 = [measure_peak(cpu, torch.bfloat16)], measure_peak(cpu, torch.float32)
    aside_s = time.time() - began_at  # no user waits for that
    steps = SIZES[size]["steps"]
    count = steps["skipped"] + steps["timed"]
    ends, tokens, config = train(size, variant, count)
    memory = measure_peak_memory() / 1e9
    peaks.append(measure_peak(cpu, torch.bfloat16))
    gaps = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
    tokens_per_second = tokens / statistics.median(gaps[steps["skipped"] - 1 :])
    flops = tokens_per_second * flops_per_token(config, config.n_positions)
    return {
        "peak_fp32": fp32 / 1e9,
        "peak_bf16": max(peaks) / 1e9,
        "tokens_per_second": tokens_per_second,
        "gflops": flops / 1e9,
        "share": flops / max(*peaks, fp32),  # of a machine without bf16 the peak in fp32
        "memory_gb": memory,
        "start_s": ends[0] - STARTED_AT - aside_s,
    }


def train(size: str, variant: str, count: int) -> tuple[list[float], int, object]:
    """`count` optimizer steps on random blocks: (when each ended, tokens a step, the config)."""
    import torch
    from transformers import GPT2Config, TrainerCallback, set_seed

    set_seed(0)
    batch_size = SIZES[size]["batch_size"]
    sizes = SIZES[size]["config"] | {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    context, vocabulary = config.n_positions, config.vocab_size
    blocks = torch.randint(1, vocabulary, (count * batch_size, context)).unbind()
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.time())

    with tempfile.TemporaryDirectory() as output_dir:
        make = make_ours if variant.startswith("ours") else make_theirs
        trainer = make(config, blocks, variant, output_dir, batch_size, count)
        trainer.add_callback(Clock())
        if variant == "ours_bare":
            train_bare(trainer, ends)
        else:
            trainer.train()
    assert len(ends) == count, f"{len(ends)} steps instead of {count}"
    return ends, batch_size * context, config


def make_theirs(config, blocks, variant: str, output_dir: str, batch_size: int, count: int):
    """transformers' own model and Trainer."""
    from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

    options = {} if variant == "default" else {"bf16": True}
    args = TrainingArguments(
        output_dir,
        use_cpu=True,
        per_device_train_batch_size=batch_size,
        max_steps=count,
        torch_compile=variant == "bf16_compile",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in blocks]
    return Trainer(GPT2LMHeadModel(config), args, train_dataset=rows)


def make_ours(config, blocks, variant: str, output_dir: str, batch_size: int, count: int):
    """What pretrain.train makes, with AdamW as the others have it."""
    from transformers import TrainingArguments

    from pretrain.data import PackedCollator
    from pretrain.hardware import choose_attention, training_defaults
    from pretrain.modeling_gpt import GPT2LMHeadModel
    from pretrain.monitors import LossGuard
    from pretrain.train import PretrainTrainer

    args = TrainingArguments(
        output_dir,
        per_device_train_batch_size=batch_size,
        max_steps=count,
        save_strategy="no",
        **training_defaults() | {"disable_tqdm": True},
    )
    model = GPT2LMHeadModel._from_config(config, attn_implementation=choose_attention())
    return PretrainTrainer(
        model,
        args,
        train_dataset=[{"input_ids": ids} for ids in blocks],
        data_collator=PackedCollator(bos_token_id=0),
        optimizer_name="adamw",
        loss_guard=LossGuard("", []),
    )


def train_bare(trainer, ends: list[float]) -> None:
    """The same step without the Trainer: forward, backward, clip, update."""
    import torch

    args, model = trainer.args, trainer.model.train()
    optimizer = trainer.create_optimizer()
    rows = trainer.train_dataset
    for start in range(0, len(rows), args.train_batch_size):
        batch = trainer.data_collator(rows[start : start + args.train_batch_size])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ends.append(time.time())


def print_tables(medians: dict) -> None:
    """One Markdown table a size: variants down, figures across, with the ratios that matter."""
    for size, by_variant in medians.items():
        peaks = [statistics.median(run[k] for run in by_variant.values())
                 for k in ("peak_fp32", "peak_bf16")]  # fmt: skip
        print(f"\n{size}: matrix products reach {peaks[0]:.0f} GFLOP/s in fp32, "
              f"{peaks[1]:.0f} in bf16")  # fmt: skip
        print(f"\n| | {' | '.join(FIGURES.values())} |\n|---|{'---|' * len(FIGURES)}")
        for variant, run in by_variant.items():
            shown = [f"{run[key]:.{2 if run[key] < 10 else 0}f}" for key in FIGURES]
            print(f"| {VARIANTS[variant]} | {' | '.join(shown)} |")
        ours = by_variant.get("ours")
        for variant, run in by_variant.items() if ours else ():
            if variant != "ours":
                speed = ours["tokens_per_second"] / run["tokens_per_second"]
                memory = ours["memory_gb"] / run["memory_gb"]
                print(f"LadderLM / {VARIANTS[variant]}: speed {speed:.2f}, memory {memory:.2f}")


def benchmark_shakespeare(path: Path, seconds: float) -> dict:
    """Train on the first nine tenths of a text until `seconds` after this process began.

    Returns:
        {"curve": [[s, nats a character], ...], "nats_per_character", "seconds", ...}
    """
    import torch
    from transformers import GPT2Config

    from pretrain.hardware import choose_attention, set_up_process, supports_bf16
    from pretrain.modeling_gpt import GPT2LMHeadModel
    from pretrain.optimizer import make_optimizer
    from tokenizer.train import train_bpe

    set_up_process()
    text = path.read_text(encoding="utf-8")
    border = len(text) * 9 // 10
    bpe = train_bpe([text[:border]], RECIPE["vocab_size"], max_token_length=16)
    train, held_out = (torch.tensor(bpe.encode(t).ids) for t in (text[:border], text[border:]))
    torch.manual_seed(0)
    sizes = RECIPE["config"] | {"vocab_size": bpe.get_vocab_size()}
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel._from_config(config, attn_implementation=choose_attention()).train()
    peak_rate = RECIPE["learning_rate"]
    optimizer = make_optimizer("muon", model, peak_rate, RECIPE["weight_decay"])
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=supports_bf16())
    began, curve, steps = time.time() - STARTED_AT, [], 0
    reserve = 0.05 * (seconds - began)  # the last evaluation slides over the text
    for batch in draw_batches(train, config.n_positions):
        now = time.time() - STARTED_AT
        done = (now - began) / (seconds - reserve - began)
        if done >= 1:
            break
        warm = min(1.0, done / RECIPE["warmup"])
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * warm * (1 + math.cos(math.pi * done)) / 2
        with bf16:
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        if now > (1.6 * curve[-1][0] if curve else 7):  # each costs a few steps
            with bf16:
                nats = count_nats(model, held_out, config.n_positions - 1) / (len(text) - border)
            curve.append([round(time.time() - STARTED_AT, 1), round(nats, 3)])
            print(f"{curve[-1][0]:6} s  {nats:.3f} nats a character", flush=True)
    with bf16:
        nats = count_nats(model, held_out, config.n_positions // 4) / (len(text) - border)
    ended = time.time() - STARTED_AT
    print(f"{ended:6.1f} s  {nats:.3f} nats a character, each token behind at least "
          f"{config.n_positions * 3 // 4} others; {steps} steps")  # fmt: skip
    return {"curve": curve, "nats_per_character": nats, "seconds": ended, "steps": steps}


def draw_batches(ids, context: int):
    """Rows of `context` tokens; they cover the text once an epoch, cut elsewhere each time."""
    import torch

    rng = random.Random(0)
    while True:
        starts = list(range(rng.randrange(context), len(ids) - context, context))
        rng.shuffle(starts)
        for i in range(0, len(starts) - RECIPE["batch_size"] + 1, RECIPE["batch_size"]):
            chosen = starts[i : i + RECIPE["batch_size"]]
            yield torch.stack([ids[start : start + context] for start in chosen])


def count_nats(model, ids, stride: int) -> float:
    """Negative log-likelihood of a text in nats, every token once, by windows that overlap.

    Args:
        ids: (N,), the text's tokens. The first is predicted from <bos>.
        stride: tokens that each window adds, less than the context; the others of a window were
            counted before.
    """
    import torch

    from tokenizer.special_tokens import BOS, SPECIAL_TOKENS

    bos = torch.tensor([list(SPECIAL_TOKENS).index(BOS)])
    context = model.config.n_positions
    ids = torch.cat([bos, ids])
    starts = range(0, max(1, len(ids) - context + stride), stride)
    windows = [ids[start : start + context] for start in starts]
    rows = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True)
    targets = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True, padding_value=-100)
    targets[1:, : context - stride] = -100
    total = 0.0
    model.eval()
    with torch.no_grad():
        for part, target in zip(rows.split(32), targets.split(32), strict=True):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            ).item()
    model.train()
    return total


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    pretrain = commands.add_parser("pretrain", help="speed and memory against transformers")
    pretrain.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    pretrain.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    pretrain.add_argument("--repeats", type=int, default=3)
    pretrain.add_argument("--json", type=Path, help="also write the numbers there")
    shakespeare = commands.add_parser("shakespeare", help="held-out loss over wall time")
    shakespeare.add_argument("--text", type=Path, required=True, help="UTF-8 text")
    shakespeare.add_argument("--seconds", type=float, default=68.0, help="of wall time in all")
    shakespeare.add_argument("--json", type=Path, help="also write the numbers there")
    rollout = commands.add_parser("rollout", help="sampling speed against TRL's default")
    rollout.add_argument("--model", help="a causal language model; without: 7M random weights")
    for name, default in (("rows", 64), ("prompt_tokens", 32), ("new_tokens", 64), ("repeats", 3)):
        rollout.add_argument(f"--{name}", type=int, default=default)
    rollout.add_argument("--json", type=Path, help="also write the numbers there")
    import benchmark_ppo
    import benchmark_prepare

    benchmark_prepare.add_commands(commands)
    benchmark_ppo.add_commands(commands)
    one = commands.add_parser("measure", help="one variant, in this process, as JSON")
    one.add_argument("size", choices=SIZES)
    one.add_argument("variant", choices=VARIANTS)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Run what was asked for."""
    if args.command == "measure":
        print(json.dumps(measure(args.size, args.variant)))
        return
    if args.command == "pretrain":
        result = benchmark_pretraining(args.sizes, args.variants, args.repeats)
        print_tables(result)
    elif args.command == "rollout":
        from rlhf.rollout_benchmark import benchmark_rollouts, print_table

        sizes = (args.rows, args.prompt_tokens, args.new_tokens)
        print_table(result := benchmark_rollouts(args.model, *sizes, args.repeats))
    elif args.command in ("prepare", "measure_prepare", "ppo"):
        result = args.run(args)
    else:
        result = benchmark_shakespeare(args.text, args.seconds)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(parse())
