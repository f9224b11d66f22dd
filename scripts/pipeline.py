"""Run a whole recipe, stage by stage. Finished and unchanged stages are skipped.

    python scripts/pipeline.py configs/tiny
    python scripts/pipeline.py configs/tiny --from sft --skip ppo --set sft.learning_rate=1e-4
    python scripts/pipeline.py configs/tiny --launch configs/launch/multi_gpu.yaml

Each stage's own command is printed before it runs. Without --launch the stages share one process
that has imported the libraries (a fork server): on a small machine the imports would otherwise take
as long as the training.
"""

import argparse
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

import yaml

import stages

PRELOADED = ["commandline", "torch", "transformers", "peft"]
PRELOADED += ["trl.trainer.grpo_trainer", "trl.trainer.sft_trainer"]
CORPORA = Path("data/generated")


def main(args: argparse.Namespace) -> None:
    """Make the corpora, run the chosen stages, write the report."""
    started_at = time.time()
    recipe = Path(args.recipe)
    chosen = choose_stages(recipe, args.first, args.last, args.skip)
    overrides = group_overrides(args.set, chosen)
    make_corpora(recipe)
    run = start_fork_server() if args.launch is None else None
    output_dir = None
    for stage in chosen:
        argv = ["--config", f"{recipe.as_posix()}/{stage}.yaml", *overrides.get(stage, [])]
        output_dir = read_output_dir(argv)
        if stages.is_unchanged(output_dir, argv):
            print(f"\n{stage}: finished and unchanged, skipped ({output_dir})", flush=True)
            continue
        command = [*launcher(stage, args.launch), stages.STAGES[stage].module, *argv]
        print(f"\n$ {shlex.join(command)}", flush=True)
        if run is not None:
            code = run(stages.STAGES[stage].module, argv)
        else:
            code = subprocess.run([sys.executable, *python_words(command)]).returncode
        if code:
            sys.exit(
                f"\n{stage} failed (exit code {code}). Once it is mended, run the same command "
                "again: what is finished is skipped, what was interrupted goes on."
            )
    command = ["scripts/report.py", str(Path(output_dir).parent)]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, *command], check=True)
    print(f"\n{recipe.name}: all done in {time.time() - started_at:.0f} s")


def choose_stages(recipe: Path, first: str | None, last: str | None, skip: list[str]) -> list[str]:
    """The recipe's stages from `first` to `last`, without the skipped ones, in their order.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: a stage that the recipe does not have, or nothing left to run.
    """
    there = [stage for stage in stages.STAGES if (recipe / f"{stage}.yaml").is_file()]
    if not there:
        known = ", ".join(
            sorted(f"configs/{p.parent.name}" for p in Path("configs").glob("*/sft.yaml"))
        )
        raise FileNotFoundError(f"{recipe} holds no stage's YAML. Recipes: {known}")
    for name in [first, last, *skip]:
        if name is not None and name not in there:
            raise ValueError(f"'{name}' is not a stage of {recipe}: {', '.join(there)}")
    start = there.index(first) if first else 0
    end = there.index(last) + 1 if last else len(there)
    chosen = [stage for stage in there[start:end] if stage not in skip]
    if not chosen:
        raise ValueError(f"no stage is left between --from {first} and --to {last}")
    return chosen


def group_overrides(settings: list[str], chosen: list[str]) -> dict[str, list[str]]:
    """`sft.learning_rate=1e-4` -> {"sft": ["--learning_rate", "1e-4"]}.

    Raises:
        ValueError: not of that form, or a stage that does not run.
    """
    grouped: dict[str, list[str]] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        stage, dot, name = key.partition(".")
        if not (equals and dot and name) or stage not in chosen:
            raise ValueError(
                f"--set {setting}: write STAGE.KEY=VALUE with one of {', '.join(chosen)}, "
                "e.g. --set sft.learning_rate=1e-4"
            )
        grouped.setdefault(stage, []).extend([f"--{name}", value])
    return grouped


def make_corpora(recipe: Path) -> None:
    """Generate the embedded corpora where the recipe reads them and they are absent or stale."""
    configs = "".join(path.read_text(encoding="utf-8") for path in recipe.glob("*.yaml"))
    if CORPORA.as_posix() not in configs:
        return
    sources = [p for pattern in ("*.py", "*.json", "*/*.jsonl") for p in Path("data").glob(pattern)]
    sources = [path for path in sources if CORPORA not in path.parents]
    made = list(CORPORA.glob("*.*"))
    newest = max(path.stat().st_mtime for path in sources)
    if made and min(path.stat().st_mtime for path in made) >= newest:
        return
    print("\n$ python data/generate.py", flush=True)
    subprocess.run([sys.executable, "data/generate.py"], check=True)


def read_output_dir(argv: list[str]) -> str:
    """Where a stage writes: its YAML's output_dir, or the flag that overrides it."""
    if "--output_dir" in argv:
        return argv[argv.index("--output_dir") + 1]
    config = yaml.safe_load(Path(argv[1]).read_text(encoding="utf-8"))
    if "output_dir" not in config:
        raise ValueError(f"{argv[1]} names no output_dir")
    return config["output_dir"]


def launcher(stage: str, launch: str | None) -> list[str]:
    """The words before a stage's module."""
    if launch is None or not stages.STAGES[stage].trains:
        return ["python", "-m"]
    return ["accelerate", "launch", "--config_file", launch, "-m"]


def python_words(command: list[str]) -> list[str]:
    """The command for this environment's own interpreter, whatever is on the PATH."""
    if command[0] == "python":
        return command[1:]
    return ["-m", "accelerate.commands.launch", *command[2:]]


def start_fork_server():
    """A function (module, argv) -> exit code: runs a module in a new process, imports done."""
    if not hasattr(os, "fork"):
        return lambda module, argv: subprocess.run([sys.executable, "-m", module, *argv]).returncode
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def run(module: str, argv: list[str]) -> int:
        process = context.Process(target=run_module, args=(module, argv))
        process.start()
        process.join()
        return process.exitcode

    return run


def run_module(module: str, argv: list[str]) -> None:
    """What `python -m module argv` does, in this process."""
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", help="a folder of YAML files, one a stage, e.g. configs/tiny")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="start with this stage")
    parser.add_argument("--to", dest="last", metavar="STAGE", help="end with this stage")
    parser.add_argument("--skip", nargs="+", default=[], metavar="STAGE", help="leave these out")
    parser.add_argument("--launch", metavar="YAML", help="a file of configs/launch, for accelerate")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="STAGE.KEY=VALUE", help="override keys of the YAMLs"
    )
    with stages.plain_errors():
        main(parser.parse_args())
