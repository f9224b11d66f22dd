"""Our PPO against the last one that TRL shipped (1.12): score over wall time, from one start.

Run by `python scripts/benchmark.py ppo --trl_python OTHER/bin/python`, where OTHER is a virtual
environment with TRL 1.12:

    python -m venv OTHER && OTHER/bin/pip install "trl==1.12.0" torch==2.13.0

Both start from the same SFT and reward model, see the same prompts, sample as many answers of the
same length at temperature 1, and take as many optimizer steps with the same learning rates, clip
ranges and KL coefficient. Each runs in a process of its own, in turn. The policies that they leave
on the way answer the same held-out prompts, and the reward model judges them as it judges any.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VARIANTS = {"ours": "LadderLM, rlhf.train_ppo", "trl": "TRL 1.12, PPOTrainer"}
MINIBATCH, MINIBATCHES, EPOCHS = 32, 4, 2  # a rollout of 128 answers serves 8 optimizer steps
SETTINGS = {"learning_rate": 2e-4, "missing_eos_penalty": 4.0, "vf_coef": 0.5, "seed": 0}
SETTINGS |= {"beta": 0.05, "max_completion_length": 40}
FIGURES = {
    "seconds": "wall time, s",
    "score": "score",
    "gain": "over the start",
    "stop_rate": "stop rate",
}


def add_commands(commands) -> None:
    """Add the words of `ppo` to the parsers of benchmark.py."""
    ppo = commands.add_parser("ppo", help="PPO against the last one of TRL")
    ppo.add_argument("--trl_python", required=True, help="python of an environment with TRL 1.12")
    ppo.add_argument("--recipe", type=Path, default=Path("output/tiny"), help="with sft and reward")
    ppo.add_argument("--prompts", default="data/generated/sft_train.jsonl")
    ppo.add_argument("--test", default="data/generated/sft_test.jsonl", help="held-out prompts")
    ppo.add_argument("--rollouts", type=int, default=20)
    ppo.add_argument("--measured", type=int, default=4, help="policies measured on the way")
    ppo.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    ppo.add_argument("--json", type=Path, help="also write the numbers there")
    ppo.set_defaults(run=run_all)


def run_all(args: argparse.Namespace) -> dict:
    """Run both with every seed, measure, and print the table.

    Returns:
        {variant: [for each seed {"cpu_seconds": of the whole process, "policies": [{"rollouts",
        and the keys of FIGURES}]}]}.
    """
    every = max(args.rollouts // args.measured, 1)
    result = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.json")
        prompts.write_text(json.dumps(encode_prompts(args)), encoding="utf-8")
        for seed in args.seeds:
            for variant in VARIANTS:
                print(f"  {variant}, seed {seed}", file=sys.stderr)
                directory = Path(folder, f"{variant}-{seed}")
                command = {"ours": our_command, "trl": trl_command}[variant]
                words = command(args, directory, prompts, every, seed)
                seconds = run(words, directory)
                marks = range(every, args.rollouts + 1, every)
                found = [measure(args, directory, rollouts) for rollouts in marks]
                result[variant].append({"cpu_seconds": seconds, "policies": found})
    print_ppo(result)
    return result


def encode_prompts(args: argparse.Namespace) -> list[list[int]]:
    """Ids of the prompts as `rlhf.train_ppo` asks them."""
    from transformers import AutoTokenizer

    from rlhf.data import load_prompts

    tokenizer = AutoTokenizer.from_pretrained(args.recipe / "sft")
    rows, _ = load_prompts([args.prompts])
    return [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        for row in rows
    ]


def our_command(args, directory: Path, prompts: Path, every: int, seed: int) -> list[str]:
    """The stage's own command."""
    steps = MINIBATCHES * EPOCHS
    settings = SETTINGS | {
        "model_name_or_path": args.recipe / "sft", "reward_model": args.recipe / "reward",
        "data_files": args.prompts, "output_dir": directory, "seed": seed, "bf16": False,
        "per_device_train_batch_size": MINIBATCH, "steps_per_generation": MINIBATCHES,
        "num_iterations": EPOCHS, "max_steps": args.rollouts * steps, "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant", "logging_steps": steps, "save_strategy": "steps",
        "save_steps": every * steps, "save_total_limit": 100, "report_to": "none",
    }  # fmt: skip
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    return [sys.executable, "-m", "rlhf.train_ppo", *words]


def trl_command(args, directory: Path, prompts: Path, every: int, seed: int) -> list[str]:
    """This file under the other environment's Python."""
    job = SETTINGS | {
        "sft": str((args.recipe / "sft").resolve()), "prompts": str(prompts), "every": every,
        "reward": str((args.recipe / "reward").resolve()), "output_dir": str(directory),
        "rollouts": args.rollouts, "seed": seed,
    }  # fmt: skip
    return [args.trl_python, str(Path(__file__).resolve()), json.dumps(job)]


def run(command: list[str], directory: Path) -> float:
    """Run a variant to its end; the seconds that it kept processors busy."""
    directory.mkdir()
    log = directory.with_suffix(".log")
    before = os.times()
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])  # of children: user and system


def measure(args: argparse.Namespace, directory: Path, rollouts: int) -> dict:
    """What the policy after so many rollouts is worth, and when it was there."""
    from rlhf.eval import evaluate_policy

    steps = rollouts * MINIBATCHES * EPOCHS
    policy = directory / f"checkpoint-{steps}"
    lines = map(json.loads, (directory / "metrics.jsonl").read_text("utf-8").splitlines())
    seconds = next(line["elapsed_s"] for line in lines if line["step"] == steps)
    config = directory.parent / "eval.yaml"
    config.write_text(f"chat_files: {args.test}\nmax_rows: 240\nmax_new_tokens: 56\n", "utf-8")
    start, judge = str(args.recipe / "sft"), str(args.recipe / "reward")
    metrics = evaluate_policy(str(policy), str(config), judge, start)
    found = {"rollouts": rollouts, "seconds": seconds, "score": metrics["reward_score"]["value"]}
    found["gain"] = metrics.get("reward_score/gain", {}).get("value", float("nan"))
    return found | {"stop_rate": metrics["stop_rate"]["value"]}


def print_ppo(result: dict) -> None:
    """Means over the seeds. A gain needs the answers of the start to the same prompts."""
    print(f"{'':26}{'rollouts':>10}" + "".join(f"{name:>16}" for name in FIGURES.values()))
    for variant, runs in result.items():
        for rows in zip(*(run["policies"] for run in runs), strict=True):
            means = [statistics.mean(row[key] for row in rows) for key in FIGURES]
            shown = "".join(f"{mean:16.2f}" for mean in means)
            print(f"{VARIANTS[variant]:26}{rows[0]['rollouts']:10}{shown}")
        cpu = statistics.mean(run["cpu_seconds"] for run in runs)
        print(f"{VARIANTS[variant]:26} CPU time of the process, libraries included: {cpu:.0f} s")


def train_with_trl(job: dict) -> None:
    """TRL's last PPO; imports nothing of this project, and runs under another Python."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    directory = Path(job["output_dir"])
    tokenizer = AutoTokenizer.from_pretrained(job["sft"])
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|im_end|>"  # what it looks for where answers without an end pay
    tokenizer.padding_side = "left"
    judge = AutoModelForSequenceClassification
    config = PPOConfig(
        str(directory), seed=job["seed"], use_cpu=True, bf16=False, gradient_checkpointing=False,
        learning_rate=job["learning_rate"], lr_scheduler_type="constant", max_grad_norm=1.0,
        per_device_train_batch_size=MINIBATCH * MINIBATCHES,  # of a rollout
        num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS, stop_token_id=stop,
        total_episodes=job["rollouts"] * MINIBATCH * MINIBATCHES, temperature=1.0,
        response_length=job["max_completion_length"], kl_coef=job["beta"],
        vf_coef=job["vf_coef"], missing_eos_penalty=job["missing_eos_penalty"],
        num_sample_generations=0, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip

    class Keep(TrainerCallback):
        """Writes the policy and the time, as our checkpoints and metrics.jsonl do."""

        started_at = time.time()

        def on_step_end(self, args, state, control, **kwargs):
            steps = state.global_step * MINIBATCHES * EPOCHS
            line = {"step": steps, "elapsed_s": time.time() - self.started_at}
            with open(directory / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if state.global_step % job["every"] == 0:
                policy = trainer.accelerator.unwrap_model(trainer.model).policy
                policy.save_pretrained(directory / f"checkpoint-{steps}")
                AutoTokenizer.from_pretrained(job["sft"]).save_pretrained(
                    directory / f"checkpoint-{steps}"
                )

    rows = json.loads(Path(job["prompts"]).read_text(encoding="utf-8"))
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(job["sft"], dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(job["sft"], dtype=torch.float32),
        reward_model=judge.from_pretrained(job["reward"], dtype=torch.float32),
        value_model=judge.from_pretrained(job["reward"], dtype=torch.float32),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in rows]),
        callbacks=[Keep()],
    )
    Keep.started_at = time.time()
    trainer.train()


if __name__ == "__main__":
    train_with_trl(json.loads(sys.argv[1]))
