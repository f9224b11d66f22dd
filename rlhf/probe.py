"""Is there anything to learn? Sample answers before GRPO starts, and see whether rewards differ.

GRPO learns from the difference between the answers to one prompt. Where all of them are right, or
all are wrong, there is no gradient: a run on such prompts costs its time and changes nothing. So
`rlhf.train_grpo` samples `num_generations` answers for some prompts of each level first, as the
training will, and stops where fewer than one prompt in twenty has answers that differ in reward.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from transformers import GenerationConfig, set_seed
from trl import GRPOConfig

import stages
from pretrain.callbacks import say
from rlhf.reward_functions import verifiable_reward
from rlhf.reward_model import load_reward_model, score_conversations

LEAST_MIXED = 0.05  # share of the prompts whose answers differ in reward


class Outcome(NamedTuple):
    """What became of the k answers to one prompt."""

    level: int
    rewards: list[float]  # k sums, weighted
    right: list[float]  # k, of the verifier; empty without one
    truncated: list[bool]  # k, cut off at max_completion_length

    @property
    def is_mixed(self) -> bool:
        """Whether the answers differ in reward, so that GRPO has a gradient."""
        return max(self.rewards) - min(self.rewards) > 1e-6


def require_mixed_outcomes(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict],
    reward_funcs: Sequence[Callable | str],
    args: GRPOConfig,
    prompts: int,
) -> dict[str, float]:
    """Print what the answers to some prompts are worth, and refuse where nothing can be learned.

    The random state is afterwards that of the seed: a run is the same with and without a probe.

    Args:
        rows: what will be trained on.
        reward_funcs: as of `rlhf.reward_functions.make_reward_functions`.
        prompts: how many of the rows to try, spread over the levels; 0 tries none.

    Returns:
        {"probe_prompts", "probe_mixed_share", "probe_mean_reward"} for run.json.

    Raises:
        ValueError: fewer than one prompt in twenty has answers that differ in reward.
    """
    if prompts <= 0:
        return {}
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        say("probe: left out, as ZeRO-3 has the model in pieces; start once without it to see")
        return {}
    chosen = choose_rows(rows, prompts, args.seed)
    own = chosen[args.process_index :: args.world_size]
    outcomes = gather_object(sample_outcomes(model, tokenizer, own, reward_funcs, args))
    set_seed(args.seed)
    if stages.is_main_process():
        say(f"{show_outcomes(outcomes, args)}\n")
    check_outcomes(outcomes, args)
    return {
        "probe_prompts": len(outcomes),
        "probe_mixed_share": fmean(one.is_mixed for one in outcomes),
        "probe_mean_reward": fmean(fmean(one.rewards) for one in outcomes),
    }


def choose_rows(rows: Sequence[dict], count: int, seed: int) -> list[dict]:
    """`count` rows, as many of each level as there are of the others, drawn by the seed."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    seen: dict[int, int] = {}
    ranks = []
    for i in order:
        level = rows[i].get("level", 1)
        seen[level] = seen.get(level, 0) + 1
        ranks.append((seen[level], level, i))
    return [rows[i] for _, _, i in sorted(ranks)[:count]]


@torch.no_grad()
def sample_outcomes(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict],
    reward_funcs: Sequence[Callable | str],
    args: GRPOConfig,
) -> list[Outcome]:
    """Sample k answers to each row's prompt and reward them, as GRPO will."""
    k = args.num_generations
    model.to(args.device).eval()
    size = max(args.per_device_train_batch_size * args.steps_per_generation // k, 1)
    completions = []
    for start in range(0, len(rows), size):
        prompts = [row["prompt"] for row in rows[start : start + size]]
        completions += sample_answers(model, tokenizer, prompts, args)
    model.train()
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    repeated = [row for row in rows for _ in range(k)]
    columns = {name: [row[name] for row in repeated] for name in (rows[0] if rows else ())}
    columns |= {"prompts": columns.pop("prompt", []), "completion_ids": completions}
    scores = []
    for function in reward_funcs:
        if callable(function):
            scores.append(function(completions=chats, **columns))
        else:
            judge = load_reward_model(function)
            said = zip(columns["prompts"], chats, strict=True)
            scores.append(score_conversations(*judge, [prompt + chat for prompt, chat in said]))
    weights = args.reward_weights or [1.0] * len(scores)
    totals = [
        sum(w * s for w, s in zip(weights, one, strict=True)) for one in zip(*scores, strict=True)
    ]
    pairs = zip(reward_funcs, scores, strict=True)
    right = next((score for function, score in pairs if function is verifiable_reward), [])
    ends = find_ends(model, tokenizer)
    cut = [ids[-1] not in ends for ids in completions]
    parts = [[values[i : i + k] for values in (totals, right, cut)] for i in range(0, len(cut), k)]
    return [Outcome(row.get("level", 1), *part) for row, part in zip(rows, parts, strict=True)]


def sample_answers(model: Any, tokenizer: Any, prompts: list, args: GRPOConfig) -> list[list[int]]:
    """`num_generations` sampled answers to each prompt, as token ids with their end token."""
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True,
        tokenizer_kwargs={"padding_side": "left"},
    ).to(model.device)  # fmt: skip
    ends = find_ends(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=args.max_completion_length, do_sample=True, temperature=args.temperature,
        top_p=args.top_p, top_k=args.top_k, min_p=args.min_p, eos_token_id=ends,
        repetition_penalty=args.repetition_penalty, pad_token_id=tokenizer.pad_token_id,
        num_return_sequences=args.num_generations,
    )  # fmt: skip
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
        ids = model.generate(**inputs, generation_config=config)
    answers = ids[:, inputs["input_ids"].shape[1] :].tolist()
    lengths = (next((n for n, i in enumerate(one, 1) if i in ends), None) for one in answers)
    return [one[:length] for one, length in zip(answers, lengths, strict=True)]


def find_ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer while GRPO trains, as TRL's `GRPOTrainer` collects them."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({tokenizer.eos_token_id, *ends} - {None})


def show_outcomes(outcomes: Sequence[Outcome], args: GRPOConfig) -> str:
    """A table, a line a level."""
    verified = bool(outcomes[0].right)
    lines = [
        f"probe: {len(outcomes)} prompts, {args.num_generations} answers each at temperature "
        f"{args.temperature}, before training; a prompt is mixed where its answers differ in reward"
    ]
    counts = f"{'all right':>11}{'all wrong':>11}" if verified else ""
    lines.append(f"{'level':>7}{'prompts':>9}{'reward':>9}{counts}{'mixed':>8}")
    for level in sorted({one.level for one in outcomes}):
        group = [one for one in outcomes if one.level == level]
        line = f"{level:>7}{len(group):>9}{fmean(fmean(one.rewards) for one in group):>9.3f}"
        if verified:
            line += f"{sum(min(one.right) == 1 for one in group):>11}"
            line += f"{sum(max(one.right) == 0 for one in group):>11}"
        lines.append(line + f"{fmean(one.is_mixed for one in group):>8.0%}")
    cut = fmean(fmean(one.truncated) for one in outcomes)
    lines.append(f"{cut:.0%} of the answers are cut off at {args.max_completion_length} tokens")
    return "\n".join(lines)


def check_outcomes(outcomes: Sequence[Outcome], args: GRPOConfig) -> None:
    """Raise a ValueError where nearly every prompt gets one reward, whatever the answer."""
    mixed = sum(one.is_mixed for one in outcomes)
    if mixed >= LEAST_MIXED * len(outcomes):
        return
    wrong = sum(max(one.right, default=1) == 0 for one in outcomes)
    right = sum(min(one.right, default=0) == 1 for one in outcomes)
    if fmean(fmean(one.truncated) for one in outcomes) > 0.5:
        advice = f"raise max_completion_length ({args.max_completion_length}): most are cut off"
    elif right > wrong:
        advice = "the tasks are solved already: take harder ones"
    else:
        advice = (
            "take easier tasks (max_level: 1), let SFT show the form of the answer first, or raise "
            f"num_generations ({args.num_generations}) or temperature ({args.temperature})"
        )
    raise ValueError(
        f"GRPO has nothing to learn from: only {mixed} of {len(outcomes)} prompts have answers "
        f"that differ in reward ({wrong} all wrong, {right} all right). What helps: {advice}. To "
        "train all the same: --probe_prompts 0"
    )

