"""The plan of a run before it starts: parameters, tokens, FLOPs, memory by component, disk, time.

`python -m pretrain.train --dry_run true` prints it for this machine, `scripts/plan.py` for others.
"""

import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import yaml
from transformers import PretrainedConfig, TrainingArguments

import stages
from pretrain.costs import (
    SETTINGS,
    Parameters,
    activation_bytes,
    build_on_meta,
    count_parameters,
    flops_per_token,
    optimizer_bytes,
    state_bytes,
)

LIBRARIES = 550_000_000  # bytes once everything is imported; a CUDA context is about as large
WORK_SPACE = 200_000_000  # what runs of three sizes took beyond all that is reckoned here
BYTES_PER_TOKEN_ON_DISK = 1.7  # int32 ids in zstd parquet, measured with 50k entries


class Sizes(NamedTuple):
    """What the model must fit: entries of the vocabulary, tokens a block, training tokens."""

    vocab_size: int
    block_size: int
    tokens: int | None


class Machine(NamedTuple):
    """Where a run is to run: processes (GPUs), bytes of memory each has, and how it computes."""

    processes: int
    memory: int
    low_precision: bool
    attention: str


class Plan(NamedTuple):
    """All that is known of a run beforehand. Bytes are those of one process."""

    config: PretrainedConfig
    machine: Machine
    parameters: Parameters
    context: int
    tokens_per_step: int
    steps: int
    data_tokens: int | None
    flops_per_token: float
    optimizer: str
    optimizer_states: int
    activations: dict[str, int]
    checkpoints: int

    def memory(self, setting: str) -> int:
        """Bytes of one process at its peak under one of `costs.SETTINGS`."""
        states = state_bytes(
            self.parameters, setting, self.machine.processes, self.optimizer_states
        )
        return LIBRARIES + WORK_SPACE + states.device + sum(self.activations.values())


def find_sizes(data_dir: str) -> Sizes:
    """Read sizes off prepare's output; before it has run, off the recipe that would make it.

    Raises:
        ValueError: neither is there.
    """
    directory = Path(data_dir)
    meta = stages.read_json(directory / "meta.json")
    if meta is not None:
        tokenizer = stages.read_json(directory / "tokenizer.json")
        entries = {*tokenizer["model"]["vocab"], *(t["content"] for t in tokenizer["added_tokens"])}
        return Sizes(len(entries), meta["block_size"], meta["train"]["tokens"])
    recipe = Path("configs") / directory.parent.name
    paths = [recipe / "tokenizer.yaml", recipe / "prepare.yaml"]
    if not all(path.is_file() for path in paths):
        raise ValueError(
            f"{data_dir} does not exist, nor do the recipe's {paths[0]} and {paths[1]}: without "
            "them nobody knows the vocabulary and the length of a block"
        )
    tokenizer, prepare = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths)
    return Sizes(tokenizer["vocab_size"], prepare["block_size"], prepare.get("max_tokens"))


def make_plan(
    config: PretrainedConfig,
    sizes: Sizes,
    training_args: TrainingArguments,
    optimizer: str,
    machine: Machine,
) -> Plan:
    """Reckon a run's costs. Nothing of the model's size is allocated.

    Raises:
        ValueError: neither max_steps nor the number of training tokens is known.
    """
    model = build_on_meta(config)
    parameters = count_parameters(model)
    rows = training_args.per_device_train_batch_size
    tokens_per_step = rows * training_args.gradient_accumulation_steps * machine.processes
    tokens_per_step *= sizes.block_size
    steps = training_args.max_steps
    if steps <= 0:
        if not sizes.tokens:
            raise ValueError("max_steps is not set and the data is not prepared yet: set max_steps")
        epoch = math.ceil(sizes.tokens / tokens_per_step)  # its last step is a smaller one
        steps = math.ceil(training_args.num_train_epochs * epoch)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    embedding = model.get_output_embeddings().weight.numel()
    head = embedding if tied or optimizer == "muon" else 0
    states = optimizer_bytes(parameters, optimizer, head)
    kept = (training_args.save_total_limit or 1) + 1  # one more while the newest is written
    return Plan(
        config=config,
        machine=machine,
        parameters=parameters,
        context=sizes.block_size,
        tokens_per_step=tokens_per_step,
        steps=steps,
        data_tokens=sizes.tokens,
        flops_per_token=flops_per_token(config, sizes.block_size),
        optimizer=optimizer,
        optimizer_states=states,
        activations=activation_bytes(
            config,
            rows,
            sizes.block_size,
            machine.low_precision,
            machine.attention,
            training_args.gradient_checkpointing,
        ),
        checkpoints=kept if training_args.save_strategy != "no" else 0,
    )


def format_plan(plan: Plan) -> str:
    """The plan as text for a person."""
    machine, parameters = plan.machine, plan.parameters
    tokens = plan.tokens_per_step * plan.steps
    passes = f", {tokens / plan.data_tokens:.2f} passes" if plan.data_tokens else ""
    lines = [
        f"model        {plan.config.model_type}, {parameters.total:,} parameters, "
        f"{parameters.matrices:,} of them in matrix products",
        f"step         {plan.tokens_per_step:,} tokens on {machine.processes} process(es), "
        f"context {plan.context:,}",
        f"run          {plan.steps:,} steps, {tokens:,} tokens{passes}",
        f"FLOPs        {plan.flops_per_token:.3g} a token (6 x matrix parameters + causal "
        f"attention), {plan.flops_per_token * tokens:.3g} in all",
        f"memory       {_gb(machine.memory)} a process; {plan.optimizer}, "
        f"{'16 bits' if machine.low_precision else 'fp32'}, attention {machine.attention}",
    ]
    parts = {"libraries": LIBRARIES, "work space": WORK_SPACE}
    parts |= {f"activations: {name}": size for name, size in plan.activations.items()}
    lines += [f"  {name:28} {_gb(size)}" for name, size in parts.items()]
    lines += [_format_setting(plan, setting) for setting in SETTINGS]
    return "\n".join([*lines, _format_disk(plan)])


def _format_setting(plan: Plan, setting: str) -> str:
    if plan.optimizer == "muon" and setting != "ddp":
        return f"  {setting:14} refused: ZeRO flattens the matrices that Muon needs"
    states = state_bytes(plan.parameters, setting, plan.machine.processes, plan.optimizer_states)
    needed = plan.memory(setting)
    verdict = "fits" if needed <= plan.machine.memory else "DOES NOT FIT"
    host = f" + {_gb(states.host)} of the host's" if states.host else ""
    return (
        f"  {setting:14} states {_gb(states.device)}, in all {_gb(needed)}{host}: {verdict}"
        f"  ({states.source})"
    )


def _format_disk(plan: Plan) -> str:
    weights, total = 4 * plan.parameters.total, plan.parameters.total
    saved = plan.checkpoints * (4 * total + plan.optimizer_states)
    data = BYTES_PER_TOKEN_ON_DISK * (plan.data_tokens or 0)
    known = _gb(data) if plan.data_tokens else "unknown before prepare"
    return f"disk         model {_gb(weights)}, checkpoints {_gb(saved)}, prepared data {known}"


def format_time(plan: Plan, flops_per_second: float | None, tokens_per_second: float | None) -> str:
    """The expected wall time, from a rate a process reaches or the tokens/s of all of them.

    Args:
        flops_per_second: of one process, as reached (not the data sheet's peak).
        tokens_per_second: of all processes, as measured; goes first.
    """
    if flops_per_second and not tokens_per_second:
        tokens_per_second = flops_per_second * plan.machine.processes / plan.flops_per_token
    if not tokens_per_second:
        return "time         unknown: give --flops_per_second (as reached by one GPU) or --metrics"
    seconds = plan.tokens_per_step * plan.steps / tokens_per_second
    return f"time         {_duration(seconds)} at {tokens_per_second:,.0f} tokens/s"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.1f} min"
    return f"{minutes / 60:.1f} h" if minutes < 72 * 60 else f"{minutes / 1440:.1f} days"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def read_throughput(metrics: str | Path) -> float:
    """The median tokens/s of a run's metrics.jsonl.

    Raises:
        ValueError: the file has no `tokens_per_second`.
    """
    lines = Path(metrics).read_text(encoding="utf-8").splitlines()
    rates = [json.loads(line).get("tokens_per_second") for line in lines]
    rates = [rate for rate in rates if rate]
    if not rates:
        raise ValueError(f"{metrics} has no tokens_per_second: name a metrics.jsonl of pretraining")
    return statistics.median(rates)
