"""How fast answers are sampled: TRL's default path and ours, in turn, in one process.

`python scripts/benchmark.py rollout` runs it.
"""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config

from pretrain.hardware import set_up_process, supports_bf16
from rlhf.policy_copy import copy_weights
from rlhf.rollouts import compile_step, copy_for_rollouts, decode_one_token, sample_answers

SEVEN_MILLION = dict(n_layer=6, n_embd=256, n_head=8, vocab_size=8192, n_positions=256)
PATHS = {
    "trl": "transformers' generate, as GRPOTrainer calls it",
    "trl_autocast": "the same under bf16 autocast",
    "ours": "rlhf.rollouts",
    "ours_compiled": "rlhf.rollouts, compiled",
}


def benchmark_rollouts(
    model_dir: str | None, rows: int, prompt_tokens: int, new_tokens: int, repeats: int
) -> dict:
    """Sample `rows` answers of `new_tokens` to different prompts, by every path.

    Args:
        model_dir: a causal language model; None: GPT-2 of 7M parameters with random weights.
        prompt_tokens: of the longest prompt; the others are up to a quarter shorter.

    Returns:
        {"parameters", "compile_s", "tokens_per_second": {path: median}}. Ours includes copying the
        policy's weights, without compiling, which happens once a run.
    """
    set_up_process()
    torch.manual_seed(0)
    if model_dir is None:
        model = AutoModelForCausalLM.from_config(GPT2Config(**SEVEN_MILLION))
    else:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.eval()
    lengths = [prompt_tokens - i % (prompt_tokens // 4 + 1) for i in range(rows)]
    prompts = [torch.randint(5, model.config.vocab_size, (n,)).tolist() for n in lengths]
    copied = copy_for_rollouts(model, torch.bfloat16 if supports_bf16() else torch.float32)
    copy_weights(model, copied)
    started_at = time.perf_counter()
    step = compile_step(copied, rows, 1.0)
    compile_s = time.perf_counter() - started_at

    def by_generate() -> int:
        return generate(model, prompts, new_tokens).numel()

    def by_autocast() -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=supports_bf16()):
            return by_generate()

    def by_ours(step=decode_one_token) -> int:
        copy_weights(model, copied)
        return sum(map(len, sample_answers(copied, prompts, new_tokens, [], step=step)[0]))

    runs = (by_generate, by_autocast, by_ours, lambda: by_ours(step))
    paths = dict(zip(PATHS, runs, strict=True))
    return {
        "parameters": model.num_parameters(),
        "compile_s": compile_s,
        "tokens_per_second": measure(paths, repeats),
    }


def generate(model, prompts: list[list[int]], new_tokens: int) -> torch.Tensor:
    """Answers (B, T) by `generate`, with the generation config that GRPOTrainer makes."""
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=True, pad_token_id=0, bos_token_id=0, temperature=1.0,
        top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0, cache_implementation=None,
        disable_compile=True, eos_token_id=-1,  # none: all answers are of one length
    )  # fmt: skip
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return output[:, width:]


def measure(paths: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Median tokens a second; the paths in turn, so that a drifting machine drifts for all."""
    rates: dict[str, list[float]] = {name: [] for name in paths}
    for repeat in range(repeats + 1):
        for name, run in paths.items():
            started_at = time.perf_counter()
            tokens = run()
            if repeat:  # the first warms up
                rates[name].append(tokens / (time.perf_counter() - started_at))
    return {name: statistics.median(each) for name, each in rates.items()}


def print_table(result: dict) -> None:
    """One Markdown table: paths down, with the ratio to TRL's default."""
    rates = result["tokens_per_second"]
    print(f"\n{result['parameters'] / 1e6:.1f}M parameters; compiled in "
          f"{result['compile_s']:.0f} s, once a run")  # fmt: skip
    print("\n| | tokens/s | |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {PATHS[name]} | {rate:.0f} | {rate / rates['trl']:.2f} x |")
