"""Direct preference optimisation of a chat model (Rafailov et al. 2023).

Reads   a chat model's directory, pairs (`data_files`), optionally a reward model to judge with
Writes  a chat model that from_pretrained loads; answers.jsonl, metrics.jsonl, eval.json, run.json

    python -m rlhf.train_dpo --config configs/tiny/dpo.yaml
    accelerate launch --config_file configs/launch/cpu.yaml \
        -m rlhf.train_dpo --config configs/tiny/dpo.yaml
    deepspeed --num_gpus 2 rlhf/train_dpo.py --config configs/tiny/dpo.yaml \
        --deepspeed configs/deepspeed/zero2.json
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed
from trl import DPOConfig, DPOTrainer, ModelConfig

import stages
from pretrain.callbacks import watch
from pretrain.checkpoints import train_or_resume
from pretrain.hardware import set_up_process, training_defaults
from rlhf.eval import evaluate_implicit_rewards, evaluate_policy
from rlhf.guards import watch_guards
from rlhf.pairs import check_shared_prompts, load_pairs, share_on_disk
from rlhf.reference import keep_reference
from rlhf.reward_model import require_judge
from sft.model import (
    check_max_length,
    complete_head,
    load_model,
    make_lora_config,
    refuse_unread,
)
from sft.train import load_chat_tokenizer, save_chat_model


@dataclass
class DPOArguments:
    """The pairs, and how the result is measured."""

    data_files: list[str] = field(default_factory=list, metadata={"help": "preference pairs"})
    test_files: list[str] = field(default_factory=list, metadata={"help": "held-out pairs"})
    validation_share: float = field(
        default=0.1, metadata={"help": "held out of data_files where there are no test_files"}
    )
    allow_dropped_pairs: bool = field(
        default=False, metadata={"help": "go on where more than 5 % of the pairs are dropped"}
    )
    reward_model: str | None = field(default=None, metadata={"help": "judges the answers"})
    eval_config: str | None = field(default=None, metadata={"help": "YAML of sft.eval"})


def main(args: DPOArguments, training_args: DPOConfig, model_args: ModelConfig) -> None:
    """Load data and model, train or resume, merge and save, evaluate, record."""
    set_up_process(training_args)
    if training_args.beta <= 0:
        raise ValueError(f"beta={training_args.beta} gives no pair a margin; 0.1 is usual")
    refuse_unread(training_args, model_args, label_smoothing_factor="DPO's is label_smoothing")
    base = stages.require_input(model_args.model_name_or_path, "config.json", "tokenizer.json")
    inputs = [base]
    if args.reward_model:
        inputs.append(require_judge(args.reward_model, base))
    run = stages.start_run(
        "dpo",
        training_args.output_dir,
        [args, training_args, model_args],
        inputs,
        args.data_files + args.test_files,
    )
    set_seed(training_args.seed)
    tokenizer = load_chat_tokenizer(base)
    model = load_model(model_args, tokenizer)
    training_args.max_length = check_max_length(training_args.max_length, model)
    train, test, data = load_pairs(args, tokenizer, training_args.max_length)
    check_shared_prompts(list(train) + list(test), tokenizer)
    shared = Path(training_args.output_dir, "pairs")
    trainer = DPOTrainer(
        model=model,
        args=training_args,
        train_dataset=share_on_disk(train, shared / "train"),
        eval_dataset=share_on_disk(test, shared / "test"),
        processing_class=tokenizer,
        peft_config=make_lora_config(model_args, tokenizer),
    )
    complete_head(trainer.model)
    watch(trainer, *watch_guards(trainer, args.eval_config, run))
    explain_logs()
    keep_reference(trainer, run.checkpoint)
    train_or_resume(trainer, run)
    parity = save_chat_model(trainer, tokenizer, base)
    if trainer.is_world_process_zero():
        shutil.rmtree(shared)
        output, beta = training_args.output_dir, training_args.beta
        metrics = evaluate_implicit_rewards(output, base, list(test), beta)
        metrics |= evaluate_policy(output, args.eval_config, args.reward_model, base)
        run.finish(metrics, data=data, **parity)


def explain_logs() -> None:
    """Say once what the logged numbers mean."""
    if stages.is_main_process():
        print(
            "logged   logps: log-probability of a whole answer, nats; rewards: beta x (logps - the "
            "start's logps); margin: chosen - rejected reward; accuracies: share with margin > 0"
        )


if __name__ == "__main__":
    classes = [DPOArguments, DPOConfig, ModelConfig]
    defaults = training_defaults() | {"precompute_ref_log_probs": True}  # one model in memory
    with stages.plain_errors():
        main(*stages.parse_args(classes, defaults=defaults))
