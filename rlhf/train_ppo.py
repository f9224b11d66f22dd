"""Proximal policy optimisation of a chat model (Ouyang et al. 2022).

Paid by a reward model (`reward_model`), by functions (`reward_funcs: verifier`), or by both.

Reads   a chat model's directory, a reward model's directory, prompts or tasks (`data_files`)
Writes  a chat model that from_pretrained loads; answers.jsonl, metrics.jsonl, eval.json, run.json

    python -m rlhf.train_ppo --config configs/tiny/ppo.yaml
    accelerate launch --config_file configs/launch/cpu.yaml \
        -m rlhf.train_ppo --config configs/tiny/ppo.yaml
    deepspeed --num_gpus 2 rlhf/train_ppo.py --config configs/tiny/ppo.yaml \
        --deepspeed configs/deepspeed/zero2.json
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import set_seed
from trl import ModelConfig

import stages
from pretrain.callbacks import watch
from pretrain.checkpoints import train_or_resume
from pretrain.hardware import set_up_process, training_defaults
from rlhf.data import fit_prompts, load_prompts
from rlhf.eval import evaluate_policy
from rlhf.guards import UNREAD_BY_POLICIES, watch_guards
from rlhf.ppo_config import PPOConfig
from rlhf.ppo_trainer import PPOTrainer
from rlhf.reference import keep_reference
from rlhf.reward_functions import REWARD_NAMES, make_reward_functions
from rlhf.reward_model import require_judge
from sft.model import (
    complete_head,
    context_length,
    load_model,
    make_lora_config,
    refuse_unread,
)
from sft.tasks import load_tasks
from sft.train import load_chat_tokenizer, save_chat_model


@dataclass
class PPOArguments:
    """The prompts, what pays, and how the result is measured."""

    data_files: list[str] = field(default_factory=list, metadata={"help": "prompts or tasks"})
    reward_model: str | None = field(
        default=None, metadata={"help": "pays, judges at the end, and is where the critic begins"}
    )
    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "names in rlhf.reward_functions, which pay as well"}
    )
    eval_config: str | None = field(default=None, metadata={"help": "YAML of sft.eval"})


def main(args: PPOArguments, training_args: PPOConfig, model_args: ModelConfig) -> None:
    """Load prompts and models, train or resume, merge and save, evaluate, record."""
    set_up_process(training_args)
    refuse_unread(training_args, model_args, **UNREAD_BY_POLICIES)
    base = stages.require_input(model_args.model_name_or_path, "config.json", "tokenizer.json")
    reward_funcs = choose_reward_funcs(args, base, training_args.max_completion_length)
    run = stages.start_run(
        "ppo",
        training_args.output_dir,
        [args, training_args, model_args],
        [base, *([args.reward_model] if args.reward_model else [])],
        args.data_files,
    )
    set_seed(training_args.seed)
    tokenizer = load_chat_tokenizer(base)
    model = load_model(model_args, tokenizer)
    load = load_tasks if "verifier" in args.reward_funcs else load_prompts
    rows, summary = load(args.data_files)
    room = context_length(model) - training_args.max_completion_length
    rows = fit_prompts(rows, tokenizer, room, summary)
    if stages.is_main_process():
        print(summary)
    trainer = PPOTrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=training_args,
        value_model=args.reward_model,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=make_lora_config(model_args, tokenizer),
    )
    complete_head(trainer.model)
    watch(trainer, *watch_guards(trainer, args.eval_config, run))
    keep_reference(trainer, run.checkpoint)
    train_or_resume(trainer, run)
    parity = save_chat_model(trainer, tokenizer, base)
    if trainer.is_world_process_zero():
        metrics = evaluate_policy(
            training_args.output_dir, args.eval_config, args.reward_model, base
        )
        run.finish(metrics, data=summary.to_dict(), **parity)


def choose_reward_funcs(args: PPOArguments, base: Path, max_completion_length: int) -> list:
    """What pays: the reward model's directory, if there is one, and functions."""
    unknown = [name for name in args.reward_funcs if name not in REWARD_NAMES]
    if unknown or not (args.reward_model or args.reward_funcs):
        raise ValueError(
            f"reward_funcs={args.reward_funcs} and reward_model={args.reward_model}: name a reward "
            f"model's directory, or functions among {sorted(REWARD_NAMES)}, or both"
        )
    if args.reward_model:
        require_judge(args.reward_model, base)
    judges = [args.reward_model] if args.reward_model else []
    return judges + make_reward_functions(args.reward_funcs, max_completion_length)


if __name__ == "__main__":
    classes = [PPOArguments, PPOConfig, ModelConfig]
    with stages.plain_errors():
        main(*stages.parse_args(classes, defaults=training_defaults()))
