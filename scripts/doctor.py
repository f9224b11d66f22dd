"""What stands in the way of a run: versions, machine, configs, inputs, data, memory, time, disk.

    python scripts/doctor.py                        # the machine
    python scripts/doctor.py configs/tiny           # and a recipe
    python scripts/doctor.py configs/my/sft.yaml --lang zh

Exit code 1 where something must be mended, with the line that mends it; nothing is written. The
words are in doctor.messages.yaml, in English and Chinese.
"""

import argparse
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from doctor_data import Finding, check_data, check_labels, check_rows, judge

import stages

ROOT = Path(__file__).parents[1]
REACHED = 0.4  # of the peak, by training steps; only for a rough time
LEAST_FREE = 2e9  # bytes
SIGNS = {"ok": "✓", "warn": "!", "fail": "✗", "title": ""}
INPUTS = ("tokenizer", "data_dir", "model_name_or_path", "reward_model")
FILES = ("data_files", "validation_files", "test_files")
FILES += ("chat_files", "fact_files", "task_files", "text_files")  # of eval.yaml


def main(args: argparse.Namespace) -> int:
    """Look at everything, print it, return the exit code."""
    found = check_versions()
    if all(one.verdict != "fail" for one in found):
        try:
            paths = list_configs(args.config)
        except FileNotFoundError as error:
            sys.exit(f"doctor: {error}")
        found += check_machine()
        for path in paths:
            found += check_stage(path, is_recipe=Path(args.config).is_dir())
    say(found, args.lang)
    return int(any(one.verdict == "fail" for one in found))


def list_stages() -> dict[str, Any]:
    """What a recipe can have a YAML of: the stages in their order, the classifier, the guards."""
    import stages

    others = {"classifier": stages.BRANCHES["classifier"], "eval": stages.Stage("sft.eval", False)}
    return stages.STAGES | others


def find_stage(path: Path) -> str | None:
    """The stage that a YAML is named after: grpo.yaml and grpo_reward.yaml are GRPO's."""
    return next((name for name in list_stages() if f"{path.stem}_".startswith(f"{name}_")), None)


def list_configs(config: str | None) -> list[Path]:
    """Every YAML of a recipe in the order of the stages, or the one that is named.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(config) if config else None
    if path is None or path.is_file():
        return [path] if path else []
    order, paths = [*list_stages(), None], sorted(path.glob("*.yaml"))
    paths.sort(key=lambda one: order.index(find_stage(one)))
    if not any(map(find_stage, paths)):
        known = sorted(path.parent for path in ROOT.glob("configs/*/sft.yaml"))
        names = ", ".join(os.path.relpath(path) for path in known)
        raise FileNotFoundError(f"{config} is no stage's YAML and no recipe; recipes: {names}")
    return paths


def check_versions() -> list[Finding]:
    """Python and each line of requirements.txt against what is installed."""
    found = [Finding("title", "title_versions")]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    window = re.search(r'requires-python = "(.*)"', project)[1]
    words = {"version": platform.python_version(), "window": window}
    found.append(judge(is_in_window(words["version"], window), "python_ok", "python_bad", words))
    fine = []
    for line in read_requirements(ROOT / "requirements.txt"):
        name, window = re.fullmatch(r"([\w.-]+)(.*)", line).groups()
        words = {"name": name, "window": window, "line": line}
        try:
            words["version"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding("fail", "package_missing", words))
            continue
        if is_in_window(words["version"], window):
            fine.append(f"{name} {words['version']}")
        else:
            found.append(Finding("fail", "package_bad", words))
    return [*found, Finding("ok", "packages_ok", {"count": len(fine), "names": ", ".join(fine)})]


def read_requirements(path: Path) -> list[str]:
    """Its lines without comments, options and markers."""
    lines = (re.split(r"\s+#|;|^#", line)[0] for line in path.read_text("utf-8").splitlines())
    return [line.replace(" ", "") for line in lines if line.strip() and not line.startswith("-")]


def is_in_window(version: str, window: str) -> bool:
    """Whether a version satisfies ">=1.2,<2"; a local part such as "+cpu" does not count."""
    return all(_holds(version, clause) for clause in window.split(",") if clause)


def _holds(version: str, clause: str) -> bool:
    sign, wanted = re.fullmatch(r"(==|>=|<=|<|>)(.*)", clause).groups()
    mine, other = ([int(n) for n in re.findall(r"\d+", v.split("+")[0])] for v in (version, wanted))
    width = max(len(mine), len(other))
    mine, other = (numbers + [0] * (width - len(numbers)) for numbers in (mine, other))
    return {"==": mine == other, ">=": mine >= other, "<=": mine <= other,
            "<": mine < other, ">": mine > other}[sign]  # fmt: skip


def check_machine() -> list[Finding]:
    """Cores, memory, and what training will use of them."""
    import torch

    from pretrain.hardware import (
        choose_attention,
        measure_free_memory,
        measure_memory,
        quiet_logs,
        training_defaults,
    )

    quiet_logs()
    defaults = training_defaults()
    device = "cpu" if defaults["use_cpu"] else "cuda" if torch.cuda.is_available() else "mps"
    dtype = "bf16" if defaults["bf16"] else "fp16" if defaults["fp16"] else "fp32"
    free, total = measure_free_memory(), measure_memory()
    words = {"cores": os.cpu_count(), "threads": torch.get_num_threads(),
             "free": f"{free / 1e9:.1f}", "total": f"{total / 1e9:.1f}"}  # fmt: skip
    used = {"device": device, "dtype": dtype, "attention": choose_attention()}
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    return [
        Finding("title", "title_machine"),
        Finding("ok", "cores", words),
        *([Finding("warn", "little_memory", words)] if free < LEAST_FREE else []),
        Finding("ok", "device", used),
        Finding("ok", "compile_there" if compiler else "compile_absent"),
    ]


def check_stage(path: Path, is_recipe: bool) -> list[Finding]:
    """One YAML: it parses, its inputs and data are there, its rows fit, its batch and costs."""
    stage, known = find_stage(path), list_stages()
    found = [Finding("title", "title_stage", {"stage": stage or "?", "config": path.as_posix()})]
    if stage is None:
        return [*found, Finding("fail", "config_nameless", {"names": ", ".join(known)})]
    try:
        parsed = parse(stage, path)
    except (ValueError, TypeError, FileNotFoundError) as error:
        return [*found, Finding("fail", "config_bad", {"error": error})]
    found.append(Finding("ok", "config_ok"))
    values = {key: value for one in reversed(parsed) for key, value in vars(one).items()}
    found += [one for key in INPUTS for one in check_input(values.get(key), path, is_recipe)]
    is_ready = all(one.message not in ("input_later", "input_bad") for one in found)
    found += check_eval_config(values.get("eval_config"))
    names = [name for key in FILES for name in values.get(key) or []]
    found += [one for name in names for one in check_data(name, values)]
    is_ready = is_ready and all(one.verdict != "fail" for one in found)
    if is_ready and stage == "classifier":
        found += attempt(lambda: check_labels(values))
    elif is_ready and known[stage].trains and stage != "pretrain":
        found += attempt(lambda: check_rows(stage, path, values))
    if known[stage].trains:
        found.append(describe_batch(parsed[1]))
    if stage == "pretrain":
        found += attempt(lambda: check_costs(*parsed))
    elif known[stage].trains and os.path.isdir(values["model_name_or_path"] or ""):
        out = parsed[1].output_dir
        found += attempt(lambda: [check_disk(count_bytes(stage, *parsed[1:]), out)])
    return found


def parse(stage: str, path: Path) -> tuple:
    """The stage's dataclasses, by its own strict parser."""
    import stages
    from pretrain.hardware import training_defaults

    module = importlib.import_module(list_stages()[stage].module)
    classes = [kind for kind in module.main.__annotations__.values() if is_dataclass(kind)]
    defaults = training_defaults() if list_stages()[stage].trains else None
    return stages.parse_args(classes, ["--config", str(path)], defaults)


def attempt(check: Any) -> list[Finding]:
    """What a check finds; its ValueError is a finding too."""
    try:
        return check()
    except (ValueError, OSError) as error:
        return [Finding("fail", "rows_bad", {"error": error})]


def check_input(directory: str | None, path: Path, is_recipe: bool) -> list[Finding]:
    """Whether the stage before has run, and its tokenizer and template are what they were."""
    import stages

    if directory is None:
        return []
    here, words = Path(directory), {"directory": directory}
    later = path.with_name(f"{here.name}.yaml")
    if is_recipe and not here.is_dir() and later.is_file() and later != path:
        return [Finding("ok", "input_later", words | {"maker": later.as_posix()})]
    try:
        stages.require_input(directory)
    except (ValueError, FileNotFoundError) as error:
        return [Finding("fail", "input_bad", {"error": error})]
    return [Finding("ok", "input_ok" if here.is_dir() else "input_hub", words)]


def check_eval_config(name: str | None) -> list[Finding]:
    """Whether the guards' YAML is there and parses: it is read only when a stage has trained."""
    if name is None:
        return []
    try:
        parse("eval", Path(name))
    except (ValueError, TypeError, FileNotFoundError) as error:
        return [Finding("fail", "eval_bad", {"name": name, "error": error})]
    return [Finding("ok", "eval_ok", {"name": name})]


def describe_batch(training_args: Any) -> Finding:
    """The batch of one step."""
    numbers = (training_args.per_device_train_batch_size,
               training_args.gradient_accumulation_steps, training_args.world_size)  # fmt: skip
    words = dict(zip(("per_device", "accumulation", "processes"), numbers, strict=True))
    return Finding("ok", "batch", {"batch": numbers[0] * numbers[1] * numbers[2], **words})


def check_costs(recipe: Any, training_args: Any) -> list[Finding]:
    """Memory, time and disk of pretraining, by the plan (`pretrain.plan`)."""
    import torch

    from pretrain.costs import peak_flops
    from pretrain.train import plan_run

    plan = plan_run(recipe, training_args)
    needed, there = plan.memory("ddp"), plan.machine.memory
    words = {"needed": f"{needed / 1e9:.2f}", "there": f"{there / 1e9:.1f}"}
    found = [judge(needed <= there, "memory_ok", "memory_bad", words)]
    dtype = torch.bfloat16 if training_args.bf16 else torch.float32
    peak = peak_flops(training_args.device, dtype) * plan.machine.processes
    seconds = plan.flops_per_token * plan.tokens_per_step * plan.steps / (REACHED * peak)
    words = {"minutes": f"{seconds / 60:,.0f}", "steps": f"{plan.steps:,}"}
    words |= {"share": f"{REACHED:.0%}", "peak": f"{peak / 1e12:.2f}"}
    found.append(Finding("ok", "time", words))
    size = 4 * plan.parameters.total
    size += plan.checkpoints * (size + plan.optimizer_states)
    return [*found, check_disk(size, training_args.output_dir)]


def count_bytes(stage: str, training_args: Any, model_args: Any) -> int:
    """What a stage that starts from a model writes at most: all in fp32, AdamW's two states.

    The output is the whole model, with LoRA the adapter too. A checkpoint is what is trained and
    the optimizer's states of it. PPO has a critic in both, about as large as the policy.
    """
    from peft import get_peft_model
    from transformers import AutoConfig, AutoTokenizer

    from pretrain.costs import build_on_meta
    from sft.model import make_lora_config

    base = model_args.model_name_or_path
    model = build_on_meta(AutoConfig.from_pretrained(base))
    whole = model.num_parameters()
    lora = make_lora_config(model_args, AutoTokenizer.from_pretrained(base), model)
    adapter = get_peft_model(model, lora).num_parameters(only_trainable=True) if lora else 0
    critic = whole if stage == "ppo" else 0
    kept = (training_args.save_total_limit or 1) + 1  # one more while the newest is written
    checkpoints = kept if training_args.save_strategy != "no" else 0
    return 4 * (whole + adapter + critic) + 12 * ((adapter or whole) + critic) * checkpoints


def check_disk(size: int, output_dir: str) -> Finding:
    """Whether so many bytes are free where an output goes."""
    there = [one for one in Path(output_dir).absolute().parents if one.is_dir()]
    free = shutil.disk_usage(there[0]).free
    words = {"needed": f"{size / 1e9:.2f}", "free": f"{free / 1e9:.1f}"}
    return judge(size <= free, "disk_ok", "disk_bad", words)


def say(found: list[Finding], language: str) -> None:
    """Print the findings and the verdict."""
    import yaml

    path = Path(__file__).with_name("doctor.messages.yaml")
    texts = yaml.safe_load(path.read_text(encoding="utf-8"))
    counts = {v: sum(one.verdict == v for one in found) for v in ("fail", "warn")}
    words = {"failures": counts["fail"], "warnings": counts["warn"]}
    last = "ill" if counts["fail"] else "warned" if counts["warn"] else "healthy"
    for one in found:
        text = texts[one.message][language].format(**one.words)
        print(f"\n{text}" if one.verdict == "title" else f"  {SIGNS[one.verdict]} {text}")
    print("\n" + texts[last][language].format(**words))


def find_language() -> str:
    """`zh` where the environment asks for Chinese, else `en`."""
    names = (os.environ.get(name, "") for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "zh" if next(filter(None, names), "").lower().startswith("zh") else "en"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", nargs="?", help="a recipe's folder or a stage's YAML")
    parser.add_argument("--lang", choices=("en", "zh"), default=find_language())
    with stages.plain_errors():
        sys.exit(main(parser.parse_args()))
