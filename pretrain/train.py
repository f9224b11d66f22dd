"""Pretrain a causal language model on packed blocks.

Reads   the output of pretrain.prepare (blocks, meta.json, tokenizer)
Writes  a model directory that from_pretrained loads; metrics.jsonl, runs/ (TensorBoard),
        samples.jsonl, curves.png, eval.json, run.json

    python -m pretrain.train --config configs/tiny/pretrain.yaml
    accelerate launch --config_file configs/launch/cpu.yaml \
        -m pretrain.train --config configs/tiny/pretrain.yaml
    deepspeed --num_gpus 2 pretrain/train.py --config configs/tiny/pretrain.yaml \
        --deepspeed configs/deepspeed/zero2.json --optimizer adamw
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

import stages
from pretrain.attention import PACKED
from pretrain.budget import Budget, plan_steps, schedule_settings
from pretrain.callbacks import Throughput, watch
from pretrain.checkpoints import save_model, train_or_resume
from pretrain.costs import flops_per_token
from pretrain.data import PackedCollator, load_blocks, spread_blocks, unpack_documents
from pretrain.eval import evaluate_language_model
from pretrain.hardware import (
    can_compile,
    choose_attention,
    measure_memory,
    set_up_process,
    training_defaults,
)
from pretrain.modeling_gpt import GPT2LMHeadModel
from pretrain.monitors import HeldOut, LossGuard, Samples
from pretrain.optimizer import make_optimizer
from pretrain.plan import Machine, Plan, Sizes, find_sizes, format_plan, make_plan
from pretrain.sample import SAMPLE_PROMPTS, continue_text


@dataclass
class PretrainArguments:
    """What is trained on what."""

    data_dir: str = field(
        default="output/my/prepare", metadata={"help": "pretrain.prepare's output"}
    )
    model_type: str = field(default="gpt2", metadata={"help": "gpt2, llama, qwen3, ..."})
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": "sizes, in the names of the architecture's config (JSON)"}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "go on from these weights, of any architecture, instead of new ones"},
    )
    optimizer: str = field(default="muon", metadata={"help": "muon or adamw"})
    eval_documents: int = field(
        default=400, metadata={"help": "held-out documents measured at the end"}
    )
    minutes: float | None = field(
        default=None, metadata={"help": "train so long: fixes max_steps from the first steps' time"}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "evaluations in a row without a better one, then stop"}
    )

    def __post_init__(self):
        given = self.config_overrides
        if isinstance(given, str):
            try:
                self.config_overrides = json.loads(given)
            except ValueError as error:
                raise ValueError(f"config_overrides {given!r} is not JSON: {error}") from None
        if not isinstance(self.config_overrides, dict | None):
            raise ValueError(f"config_overrides {given!r} are no sizes: write {{name: number}}")
        if self.eval_documents < 1:
            raise ValueError(f"eval_documents is {self.eval_documents}: eval.json needs some")


class PretrainTrainer(Trainer):
    """transformers' Trainer with our optimizers and a guarded loss, through its public hooks."""

    def __init__(self, *args, optimizer_name: str, loss_guard: LossGuard, **kwargs):
        super().__init__(*args, **kwargs)
        self.optimizer_name = optimizer_name
        self.loss_guard = loss_guard
        self.tokens_seen = 0  # by all processes, since this one began
        self.add_callback(loss_guard)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """The model's own loss; in training the guard looks at it, and the tokens are counted."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            # An epoch's last batch is a smaller one, and all are where the data does not fill any.
            self.tokens_seen += inputs["input_ids"].numel() * self.args.world_size
            step = self.state.global_step + 1
            self.loss_guard.see(self.model, loss, inputs["input_ids"], step)
        return loss

    def create_optimizer(self, model=None):
        """AdamW or Muon over the model's parameters.

        Raises:
            ValueError: Muon under DeepSpeed, whose ZeRO flattens the matrices that Muon needs; or
                transformers' own `optim`, which would be ignored.
        """
        if self.optimizer is None:
            args = self.args
            if args.optim not in (TrainingArguments.optim, "adamw_torch"):
                raise ValueError(f"optim is {args.optim.value}: here it is --optimizer muon, adamw")
            if self.optimizer_name == "muon" and self.is_deepspeed_enabled:
                raise ValueError("ZeRO flattens the matrices that Muon needs: --optimizer adamw")
            self.optimizer = make_optimizer(
                self.optimizer_name,
                self.model if model is None else model,
                args.learning_rate,
                args.weight_decay,
                (args.adam_beta1, args.adam_beta2),
                args.adam_epsilon,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The recipe's schedule, whose decay may be a share of the steps."""
        given = self.args.lr_scheduler_kwargs
        self.args.lr_scheduler_kwargs = schedule_settings(self.args, num_training_steps)
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self.args.lr_scheduler_kwargs = given
        return scheduler


def main(args: PretrainArguments, training_args: TrainingArguments) -> None:
    """Load blocks and model, train or resume, save, evaluate, record; or only plan."""
    set_up_process(training_args)
    if stages.is_dry_run():
        print(format_plan(plan_run(args, training_args)))
        if args.minutes is not None:
            print(f"minutes      {args.minutes:g}: as many steps as they hold, not the run's")
        if not Path(args.data_dir).is_dir():
            return print(f"{args.data_dir} is not there yet: the plan is all, no step was tried")
    stages.require_input(args.data_dir, "train-*.parquet", "validation-*.parquet", "tokenizer.json")
    run = stages.start_run(
        "pretrain", training_args.output_dir, [args, training_args], [args.data_dir]
    )
    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.data_dir)
    train, validation = (load_blocks(args.data_dir, split) for split in ("train", "validation"))
    model = load_model(args, tokenizer, block_size=len(train[0]["input_ids"]))
    if args.minutes is not None:
        plan_steps(training_args, args.minutes, run.checkpoint)
    trainer = PretrainTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=spread_blocks(validation, 64),
        data_collator=PackedCollator(
            tokenizer.bos_token_id, tokenizer.eos_token_id, lengths=choose_attention() == PACKED
        ),
        processing_class=tokenizer,
        optimizer_name=args.optimizer,
        loss_guard=LossGuard(args.data_dir, train),
    )
    throughput = watch_pretraining(trainer, args)
    train_or_resume(trainer, run)
    save_model(trainer)
    if not trainer.is_world_process_zero():
        return
    model = AutoModelForCausalLM.from_pretrained(training_args.output_dir, dtype=torch.float32)
    texts = unpack_documents(validation, tokenizer, args.eval_documents)
    metrics = evaluate_language_model(model, tokenizer, texts, training_args.output_dir)
    samples = [continue_text(model, tokenizer, prompt) for prompt in SAMPLE_PROMPTS]
    run.finish(
        metrics,
        parameters=model.num_parameters(),
        samples=samples,
        steps=trainer.state.global_step,
        flops_per_token=throughput.flops_per_token,
        peak_flops_per_second=throughput.peak_flops_per_second,
    )


def watch_pretraining(trainer: PretrainTrainer, args: PretrainArguments) -> Throughput:
    """Measure speed, held-out bits per byte and samples; keep to `minutes`.

    Returns:
        What measures the speed: it knows a token's FLOPs, and the peak once training has begun.
    """
    tokenizer = trainer.processing_class
    context = len(trainer.train_dataset[0]["input_ids"])
    cost = flops_per_token(trainer.model.config, context)
    throughput = Throughput(lambda: trainer.tokens_seen, cost)
    callbacks = [HeldOut(trainer.eval_dataset, tokenizer), Samples(trainer, tokenizer), throughput]
    if args.minutes is not None:
        callbacks.append(Budget(args.minutes))  # the last: an evaluation's time has its samples
    watch(trainer, *callbacks, early_stopping_patience=args.early_stopping_patience)
    return throughput


def load_model(args: PretrainArguments, tokenizer, block_size: int):
    """A new model of the recipe's sizes, or an existing one, with its vocabulary checked.

    Raises:
        ValueError: the model's vocabulary is smaller than the tokenizer's or another one, its
            context shorter than a block, or its checkpoint lacks weights.
    """
    if args.model_name_or_path:
        stages.require_input(args.model_name_or_path, "config.json")
        check_vocabulary(args, tokenizer)
        model_type = AutoConfig.from_pretrained(args.model_name_or_path).model_type
        family = GPT2LMHeadModel if model_type == "gpt2" else AutoModelForCausalLM
        if args.config_overrides and stages.is_main_process():
            print(f"pretrain: {args.model_name_or_path} has its sizes, not config_overrides")
        model, loaded = family.from_pretrained(
            args.model_name_or_path,
            dtype=torch.float32,
            attn_implementation=choose_attention(),
            output_loading_info=True,
        )
        if loaded["missing_keys"] or loaded["unexpected_keys"]:
            raise ValueError(
                f"{args.model_name_or_path} does not hold this model, and weights are never made "
                f"up: missing {sorted(loaded['missing_keys'])}, "
                f"unexpected {sorted(loaded['unexpected_keys'])}"
            )
    else:
        special = {
            f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")
        }
        config = make_config(args, len(tokenizer), block_size, special)
        is_gpt2 = args.model_type == "gpt2"
        make = GPT2LMHeadModel._from_config if is_gpt2 else AutoModelForCausalLM.from_config
        model = make(config, attn_implementation=choose_attention())
        model.generation_config = GenerationConfig(**special)
    if model.config.vocab_size < len(tokenizer):
        raise ValueError(
            f"the model knows {model.config.vocab_size} ids, the tokenizer makes {len(tokenizer)}"
        )
    if model.config.max_position_embeddings < block_size:
        raise ValueError(
            f"a block has {block_size} tokens, the model's context "
            f"{model.config.max_position_embeddings}"
        )
    return model


def check_vocabulary(args: PretrainArguments, tokenizer) -> None:
    """Raise a ValueError where the model came with another tokenizer than the data's.

    Vocabularies are compared, not files: transformers writes somebody else's file in its own way.
    """
    name, directory = args.model_name_or_path, Path(args.model_name_or_path)
    if directory.is_dir() and not (directory / "tokenizer.json").is_file():
        return  # weights alone
    if AutoTokenizer.from_pretrained(name).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{name} and {args.data_dir} have other tokenizers: their ids mean different text. "
            f"Make the data with: python -m pretrain.prepare --tokenizer {name} ..."
        )


def make_config(args: PretrainArguments, vocab_size: int, block_size: int, special: dict):
    """The recipe's sizes, in any architecture; what the recipe leaves open fits the data.

    Args:
        special: `bos_token_id`, `eos_token_id`, `pad_token_id`.

    Raises:
        ValueError: an architecture of another kind, a key of `config_overrides` that its config
            does not have, or heads that do not share keys evenly.
    """
    known = AutoConfig.for_model(args.model_type)
    names = known.attribute_map  # GPT-2 says n_positions for max_position_embeddings
    overrides = {names.get(key, key): value for key, value in (args.config_overrides or {}).items()}
    if not all(hasattr(known, key) for key in ("num_attention_heads", "max_position_embeddings")):
        raise ValueError(
            f"model_type {args.model_type} is no decoder with attention and a context, such as "
            "gpt2, llama, qwen3"
        )
    unknown = [key for key in overrides if not hasattr(known, key)]
    if unknown:
        raise ValueError(
            f"config_overrides: {args.model_type} has no {', '.join(unknown)}; its sizes are named "
            f"{', '.join(key for key, value in known.to_dict().items() if type(value) is int)}"
        )
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": block_size}
    # Few epochs over much text: dropout would only slow it down.
    sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {names.get(key, key): value for key, value in sizes.items() if hasattr(known, key)}
    config = AutoConfig.for_model(args.model_type, **special, **(sizes | overrides))
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if groups and heads % groups:
        raise ValueError(
            f"num_attention_heads is {heads}, no multiple of num_key_value_heads {groups}: set "
            "both in config_overrides"
        )
    return config


def choose_config(args: PretrainArguments, sizes: Sizes):
    """The config of the model that would be trained, before there is data."""
    if args.model_name_or_path:
        return AutoConfig.from_pretrained(args.model_name_or_path)
    return make_config(args, sizes.vocab_size, sizes.block_size, {})


def plan_run(args: PretrainArguments, training_args: TrainingArguments) -> Plan:
    """The plan of this run on this machine. The data need not be there.

    Raises:
        ValueError: Muon with ZeRO, or sizes that neither the data nor the recipe tells.
    """
    sizes = find_sizes(args.data_dir)
    config = choose_config(args, sizes)
    low_precision = training_args.bf16 or training_args.fp16
    memory = measure_memory() // (1 if torch.cuda.is_available() else training_args.world_size)
    machine = Machine(training_args.world_size, memory, low_precision, choose_attention())
    return make_plan(config, sizes, training_args, args.optimizer, machine)


if __name__ == "__main__":
    # Every parameter is used in every step: DDP need not search for those that are not. Batches
    # have one shape, but for an epoch's last: what was compiled serves to the end.
    defaults = {"ddp_find_unused_parameters": False, "torch_compile": can_compile()}
    defaults = training_defaults() | defaults
    with stages.plain_errors():
        main(*stages.parse_args([PretrainArguments, TrainingArguments], defaults=defaults))
