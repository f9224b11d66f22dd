"""Proximal policy optimisation of a chat model against a reward model (Ouyang et al. 2022).

Reads   a chat model's directory, a reward model's directory, prompts (`data_files`)
Writes  a chat model that from_pretrained loads; answers.jsonl, metrics.jsonl, eval.json, run.json

    python -m rlhf.train_ppo --config configs/tiny/ppo.yaml
    accelerate launch --config_file configs/launch/cpu.yaml \
        -m rlhf.train_ppo --config configs/tiny/ppo.yaml
    deepspeed --num_gpus 2 rlhf/train_ppo.py --config configs/tiny/ppo.yaml \
        --deepspeed configs/deepspeed/zero2.json
"""

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import set_seed
from trl import ModelConfig

import stages
from pretrain.callbacks import watch
from pretrain.checkpoints import train_or_resume
from pretrain.hardware import set_up_process, training_defaults
from rlhf.data import fit_prompts, load_prompts
from rlhf.eval import evaluate_policy
from rlhf.ppo_trainer import PPOConfig, PPOTrainer
from sft.model import complete_head, context_length, load_model, make_lora_config
from sft.train import load_chat_tokenizer, save_chat_model


@dataclass
class PPOArguments:
    """The prompts, the reward model, and how the result is measured."""

    data_files: list[str] = field(default_factory=list, metadata={"help": "prompts"})
    reward_model: str = field(default="output/my/reward", metadata={"help": "pays and judges"})
    eval_config: str | None = field(default=None, metadata={"help": "YAML of sft.eval"})


def main(args: PPOArguments, training_args: PPOConfig, model_args: ModelConfig) -> None:
    """Load prompts and models, train or resume, merge and save, evaluate, record."""
    set_up_process(training_args)
    base = stages.require_input(model_args.model_name_or_path, "config.json", "tokenizer.json")
    reward_model = stages.require_input(args.reward_model, "config.json", "tokenizer.json")
    stages.require_same_tokenizer(base, reward_model)
    run = stages.start_run(
        "ppo",
        training_args.output_dir,
        [args, training_args, model_args],
        [base, reward_model],
        args.data_files,
    )
    set_seed(training_args.seed)
    tokenizer = load_chat_tokenizer(base)
    model = load_model(model_args, tokenizer)
    rows, summary = load_prompts(args.data_files)
    room = context_length(model) - training_args.max_completion_length
    rows = fit_prompts(rows, tokenizer, room, summary)
    if stages.is_main_process():
        print(summary)
    trainer = PPOTrainer(
        model=model,
        reward_funcs=str(reward_model),
        args=training_args,
        value_model=str(reward_model),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=make_lora_config(model_args, tokenizer),
    )
    complete_head(trainer.model)
    watch(trainer)
    train_or_resume(trainer, run)
    parity = save_chat_model(trainer, tokenizer, base)
    if trainer.is_world_process_zero():
        metrics = evaluate_policy(
            training_args.output_dir, args.eval_config, str(reward_model), base
        )
        run.finish(metrics, data=summary.to_dict(), **parity)


if __name__ == "__main__":
    classes = [PPOArguments, PPOConfig, ModelConfig]
    main(*stages.parse_args(classes, defaults=training_defaults()))
