"""Group relative policy optimisation of a chat model (Shao et al. 2024).

Paid by verifiers (`reward_funcs: verifier`, verifiable rewards), by a reward model
(`reward_funcs: output/tiny/reward`), or by several of them.

Reads   a chat model's directory, tasks or prompts (`data_files`)
Writes  a chat model that from_pretrained loads; answers.jsonl, metrics.jsonl, eval.json, run.json

    python -m rlhf.train_grpo --config configs/tiny/grpo.yaml
    accelerate launch --config_file configs/launch/cpu.yaml \
        -m rlhf.train_grpo --config configs/tiny/grpo.yaml
    deepspeed --num_gpus 2 rlhf/train_grpo.py --config configs/tiny/grpo.yaml \
        --deepspeed configs/deepspeed/zero2.json
"""

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer, ModelConfig

import stages
from pretrain.callbacks import watch
from pretrain.checkpoints import train_or_resume
from pretrain.hardware import set_up_process, training_defaults
from rlhf.data import fit_prompts, load_prompts, load_tasks
from rlhf.eval import evaluate_policy
from rlhf.reward_functions import REWARD_FUNCTIONS
from sft.model import complete_head, context_length, load_model, make_lora_config
from sft.train import load_chat_tokenizer, save_chat_model


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
    reward_model: str | None = field(
        default=None, metadata={"help": "judges the answers at the end"}
    )
    eval_config: str | None = field(default=None, metadata={"help": "YAML of sft.eval"})


def main(args: GRPOArguments, training_args: GRPOConfig, model_args: ModelConfig) -> None:
    """Load tasks and models, train or resume, merge and save, evaluate, record."""
    set_up_process(training_args)
    base = stages.require_input(model_args.model_name_or_path, "config.json", "tokenizer.json")
    judges = [name for name in args.reward_funcs if name not in REWARD_FUNCTIONS]
    judges += [args.reward_model] if args.reward_model else []
    for judge in judges:
        stages.require_input(judge, "config.json", "tokenizer.json")
        stages.require_same_tokenizer(base, judge)
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
    tasks, summary = load_data(args, tokenizer, room)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[REWARD_FUNCTIONS.get(name, name) for name in args.reward_funcs],
        args=training_args,
        train_dataset=tasks,
        processing_class=tokenizer,
        peft_config=make_lora_config(model_args, tokenizer),
    )
    complete_head(trainer.model)
    watch(trainer)
    train_or_resume(trainer, run)
    parity = save_chat_model(trainer, tokenizer, base)
    if trainer.is_world_process_zero():
        metrics = evaluate_policy(
            training_args.output_dir, args.eval_config, args.reward_model, base
        )
        run.finish(metrics, data=summary.to_dict(), **parity)


def load_data(args: GRPOArguments, tokenizer, max_prompt_length: int):
    """Tasks where a verifier pays, plain prompts where only reward models do; and the summary."""
    if "verifier" not in args.reward_funcs:
        rows, summary = load_prompts(args.data_files)
    else:
        rows, summary = load_tasks(args.data_files)
        rows = choose_tasks(rows, args.kinds, args.max_level, summary)
    rows = fit_prompts(rows, tokenizer, max_prompt_length, summary)
    if stages.is_main_process():
        print(summary)
    return Dataset.from_list(rows), summary


def choose_tasks(rows: list[dict], kinds: list[str], max_level: int | None, summary) -> list[dict]:
    """The tasks of some kinds and up to some level; the others are counted in `summary`."""
    unknown = set(kinds) - {row["kind"] for row in rows}
    if unknown:
        known = sorted({row["kind"] for row in rows})
        raise ValueError(f"no task is of kind {sorted(unknown)}; there are {known}")
    kept = []
    for row in rows:
        if kinds and row["kind"] not in kinds:
            summary.drop(f"kind not in {kinds}", row["kind"])
        elif max_level is not None and row["level"] > max_level:
            summary.drop(f"level above max_level={max_level}", row["kind"])
        else:
            kept.append(row)
    return kept


if __name__ == "__main__":
    classes = [GRPOArguments, GRPOConfig, ModelConfig]
    main(*stages.parse_args(classes, defaults=training_defaults()))
