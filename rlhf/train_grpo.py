"""Group relative policy optimisation of a chat model (Shao et al. 2024).

Paid by verifiers (`reward_funcs: verifier`, verifiable rewards), by a reward model
(`reward_funcs: output/tiny/reward`), or by several of them with `reward_weights`. Before training
it looks whether there is anything to learn (`rlhf.probe`).

Reads   a chat model's directory, tasks or prompts (`data_files`)
Writes  a chat model that from_pretrained loads; answers.jsonl, metrics.jsonl, eval.json, run.json

    python -m rlhf.train_grpo --config configs/tiny/grpo.yaml
    accelerate launch --config_file configs/launch/cpu.yaml \
        -m rlhf.train_grpo --config configs/tiny/grpo.yaml
    deepspeed --num_gpus 2 rlhf/train_grpo.py --config configs/tiny/grpo.yaml \
        --deepspeed configs/deepspeed/zero2.json
"""

import math
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer, ModelConfig

import stages
from pretrain.callbacks import watch
from pretrain.checkpoints import train_or_resume
from pretrain.hardware import set_up_process, training_defaults
from rlhf.data import fit_prompts, load_prompts
from rlhf.eval import evaluate_policy
from rlhf.guards import UNREAD_BY_POLICIES, watch_guards
from rlhf.probe import require_mixed_outcomes
from rlhf.reference import keep_reference
from rlhf.reward_functions import REWARD_NAMES, make_reward_functions
from rlhf.reward_model import require_judge
from rlhf.rollouts import FastGRPOTrainer
from sft.model import (
    complete_head,
    context_length,
    count_real_positions,
    load_model,
    make_lora_config,
    refuse_unread,
)
from sft.tasks import load_tasks
from sft.train import load_chat_tokenizer, save_chat_model

LEGEND = """the log: reward is the weighted sum of rewards/*; frac_reward_zero_std the share of
prompts whose answers all got the same (they teach nothing); completions/clipped_ratio the share of
answers cut off; clip_ratio/region_mean the share of tokens beyond epsilon, entropy in nats a token,
both of the answers that teach; kl in nats a token"""


@dataclass
class GRPOArguments:
    """The tasks, what pays, and how the result is measured."""

    data_files: list[str] = field(default_factory=list, metadata={"help": "tasks or prompts"})
    reward_funcs: list[str] = field(
        default_factory=lambda: ["verifier"],
        metadata={"help": "names in rlhf.reward_functions, or reward models' directories"},
    )
    kinds: list[str] = field(default_factory=list, metadata={"help": "only tasks of these kinds"})
    max_level: int | None = field(default=None, metadata={"help": "leave harder tasks out"})
    curriculum: bool = field(
        default=False, metadata={"help": "easy levels first; all are open from half of the run on"}
    )
    probe_prompts: int = field(
        default=64,
        metadata={"help": "prompts to sample answers for before training; 0: train in any case"},
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "judges the answers at the end"}
    )
    eval_config: str | None = field(default=None, metadata={"help": "YAML of sft.eval"})


def main(args: GRPOArguments, training_args: GRPOConfig, model_args: ModelConfig) -> None:
    """Load tasks and models, train or resume, merge and save, evaluate, record."""
    set_up_process(training_args)
    check_settings(args, training_args)
    refuse_unread(training_args, model_args, **UNREAD_BY_POLICIES)
    base = stages.require_input(model_args.model_name_or_path, "config.json", "tokenizer.json")
    reward_funcs = make_reward_functions(args.reward_funcs, training_args.max_completion_length)
    judges = [name for name in args.reward_funcs if name not in REWARD_NAMES]
    judges += [args.reward_model] if args.reward_model else []
    for judge in judges:
        require_judge(judge, base)
    run = stages.start_run(
        "grpo",
        training_args.output_dir,
        [args, training_args, model_args],
        [base, *judges],
        args.data_files,
    )
    set_seed(training_args.seed)
    tokenizer = load_chat_tokenizer(base)
    model = load_model(model_args, tokenizer)
    room = context_length(model) - training_args.max_completion_length
    rows, summary = load_data(args, tokenizer, room)
    outcome = {}
    if run.checkpoint is None:
        outcome = require_mixed_outcomes(
            model, tokenizer, rows, reward_funcs, training_args, args.probe_prompts
        )
    trainer = FastGRPOTrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=lay_out_run(rows, training_args, args.curriculum),
        processing_class=tokenizer,
        peft_config=make_lora_config(model_args, tokenizer),
    )
    complete_head(trainer.model)
    count_positions_of_reference(trainer)
    watch(trainer, *watch_guards(trainer, args.eval_config, run))
    keep_reference(trainer, run.checkpoint)
    train_or_resume(trainer, run)
    parity = save_chat_model(trainer, tokenizer, base)
    if trainer.is_world_process_zero():
        metrics = evaluate_policy(
            training_args.output_dir, args.eval_config, args.reward_model, base
        )
        run.finish(metrics, data=summary.to_dict(), **outcome, **parity)


def check_settings(args: GRPOArguments, training_args: GRPOConfig) -> None:
    """Raise a ValueError for settings that would be ignored, or leave nothing to learn from."""
    if training_args.temperature <= 0:
        raise ValueError(
            f"temperature={training_args.temperature} gives every answer to a prompt the same "
            "words, and so the same reward: GRPO learns from their differences. 1.0 is usual"
        )
    if training_args.beta < 0:
        raise ValueError(f"beta={training_args.beta} pays for distance to the reference: 0 or more")
    if training_args.max_steps == 0:
        raise ValueError("max_steps=0 trains nothing; leave it out to go by num_train_epochs")
    weights, names = training_args.reward_weights, args.reward_funcs
    if weights and len(weights) != len(names):
        raise ValueError(f"reward_weights={weights}: give one to each of reward_funcs={names}")


def count_positions_of_reference(trainer: GRPOTrainer) -> None:
    """Let the reference, which TRL loads itself, count positions as `load_model`'s policy does.

    GPT-2 would count the padding on the left, and the KL would not be 0 for equal weights.
    """
    if trainer.ref_model is not None:
        reference = trainer.accelerator.unwrap_model(trainer.ref_model)
        reference.base_model.register_forward_pre_hook(count_real_positions, with_kwargs=True)


def load_data(args: GRPOArguments, tokenizer, max_prompt_length: int):
    """Tasks where a verifier pays, plain prompts where none does; and the summary."""
    load = load_tasks if "verifier" in args.reward_funcs else load_prompts
    rows, summary = load(args.data_files)
    rows = choose_tasks(rows, args.kinds, args.max_level, summary)
    rows = fit_prompts(rows, tokenizer, max_prompt_length, summary)
    if stages.is_main_process():
        print(summary, LEGEND, sep="\n")
    return rows, summary


def choose_tasks(rows: list[dict], kinds: list[str], max_level: int | None, summary) -> list[dict]:
    """The rows of some kinds and up to some level; the others are counted in `summary`.

    A prompt that is no task has no kind, and is of level 1, where its row does not say it.
    """
    known = sorted({str(row.get("kind", "")) for row in rows})
    unknown = set(kinds) - set(known)
    if unknown:
        raise ValueError(f"no task is of kind {sorted(unknown)}; there are {known}")
    kept = []
    for row in rows:
        kind = str(row.get("kind", ""))
        if kinds and kind not in kinds:
            summary.drop(f"kind not in {kinds}", kind)
        elif max_level is not None and int(row.get("level", 1)) > max_level:
            summary.drop(f"level above max_level={max_level}", kind)
        else:
            kept.append(row)
    return kept


def lay_out_run(rows: list[dict], training_args: GRPOConfig, curriculum: bool) -> Dataset:
    """The prompts of the whole run in their order, one after the other.

    TRL draws a new order each epoch and begins with that of the first one after a resume. A run
    that is laid out beforehand is one epoch: it goes on where it was, whatever it was killed in.
    `max_steps` and `shuffle_dataset` are set accordingly.

    Raises:
        ValueError: no rows, or a `save_steps` that would cut a rollout, which cannot be resumed.
    """
    args = training_args
    passes = args.steps_per_generation * args.num_iterations
    micro_steps = args.gradient_accumulation_steps
    prompts = args.generation_batch_size // args.num_generations  # of a rollout
    if args.max_steps <= 0:
        rollouts = max(int(args.num_train_epochs * len(rows)) // prompts, 1)
        args.max_steps = max(rollouts * passes // micro_steps, 1)
    save_steps = args.save_steps  # below 1: a share of the run
    save_steps = math.ceil(args.max_steps * save_steps) if save_steps < 1 else save_steps
    if args.save_strategy == "steps" and save_steps * micro_steps % passes:
        raise ValueError(
            f"save_steps={save_steps} would save in the middle of a rollout, which serves "
            f"{passes // micro_steps} steps: make it a multiple of that"
        )
    rollouts = -(-args.max_steps * micro_steps // passes)
    levels = [row.get("level", 1) for row in rows]
    seed = args.seed if args.shuffle_dataset else None
    args.shuffle_dataset = False
    order = order_prompts(levels, rollouts * prompts, curriculum, seed)
    return Dataset.from_list(rows).select(order)


def order_prompts(levels: list[int], count: int, curriculum: bool, seed: int | None) -> list[int]:
    """`count` row numbers: pass after pass over the rows, each in an order of its own.

    With a curriculum of L levels, level n joins the easier ones after (n - 1) / 2L of the run.

    Args:
        levels: of each row.
        seed: of the orders; None keeps the rows as they are.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    gates = sorted(set(levels)) if curriculum else [max(levels)]
    order: list[int] = []
    for number, gate in enumerate(gates, start=1):
        rows = torch.tensor([i for i, level in enumerate(levels) if level <= gate])
        until = count if gate == gates[-1] else count * number // (2 * len(gates))
        while len(order) < until:
            shuffled = torch.randperm(len(rows), generator=generator) if seed is not None else ...
            order += rows[shuffled].tolist()
        del order[until:]
    return order


if __name__ == "__main__":
    classes = [GRPOArguments, GRPOConfig, ModelConfig]
    with stages.plain_errors():
        main(*stages.parse_args(classes, defaults=training_defaults()))
