"""The guards: the same held-out numbers for every chat model.

stop_rate        share of the answers that end by themselves
repetition       share of an answer's token triples that it has said before
length           tokens an answer
language_match   share of the answers in the language of the question
fact_accuracy    share of held-out factual questions answered right
task_accuracy    share of held-out verifiable tasks solved, also by level and kind
pass@k           the chance that one of k sampled answers solves a task (with --samples)
rouge, bleu, chrf    what the answers share with their references
bits_per_byte, perplexity    what the model still knows of plain text

    python -m sft.eval output/tiny/sft --config configs/tiny/eval.yaml
    python -m sft.eval output/tiny/sft output/tiny/dpo --text_files my.txt --output_dir output/mine

The numbers are added to the directory's eval.json; every answer, beside its reference and that of
the model before, is in its answers.jsonl, every text's bits in its texts.jsonl. Other questions
than a stage's own need an --output_dir: by its numbers the guards and the report compare.
"""

import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import stages
from comparison import UNITS, read_jsonl
from pretrain.eval import (
    evaluate_language_model,
    mean_with_interval,
    print_metrics,
    save_metrics,
    share_with_interval,
)
from sft.data import load_conversations
from sft.model import context_length, require_generator
from sft.overlap import measure_corpora, score_rouge
from sft.rendering import encode_prompt
from sft.tasks import load_tasks
from sft.verifiers import verify
from tokenizer.corpus import read_documents
from tokenizer.eval import detect_language
from tokenizer.files import is_hub_name, list_files


@dataclass
class EvalArguments:
    """What every chat model is measured on; answers are greedy, so that they repeat."""

    chat_files: list[str] = field(default_factory=list, metadata={"help": "held-out conversations"})
    fact_files: list[str] = field(default_factory=list, metadata={"help": "held-out questions"})
    task_files: list[str] = field(default_factory=list, metadata={"help": "held-out tasks"})
    text_files: list[str] = field(default_factory=list, metadata={"help": "held-out plain text"})
    max_rows: int = field(default=500, metadata={"help": "rows of each kind, the first ones"})
    max_new_tokens: int = 64
    batch_size: int = 64
    samples: int = field(
        default=0, metadata={"help": "answers sampled to each task as well: pass@1 to pass@samples"}
    )
    temperature: float = field(default=0.8, metadata={"help": "of these samples"})
    output_dir: str | None = field(
        default=None, metadata={"help": "a folder a model goes here; default: the models' own"}
    )

    def __post_init__(self):
        for name in ("max_rows", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it has to be 1 or more")
        if self.samples < 0 or (self.samples and self.temperature <= 0):
            raise ValueError(
                f"samples={self.samples} at temperature={self.temperature}: answers are sampled "
                "above 0; the greedy one is always measured"
            )


def read_eval_config(eval_config: str | None) -> EvalArguments | None:
    """Read the YAML and find its files, before hours of training that end in this evaluation.

    Raises:
        FileNotFoundError: the YAML, or a file that it names, does not exist.
        ValueError: it has an unknown key.
    """
    if eval_config is None:
        return None
    (args,) = stages.parse_args([EvalArguments], ["--config", eval_config])
    files = [*args.chat_files, *args.fact_files, *args.task_files, *args.text_files]
    list_files([name for name in files if not is_hub_name(name)])
    return args


def evaluate_stage(directory: str, eval_config: str | None) -> dict[str, dict]:
    """Measure the model in a directory and write its answers.jsonl and texts.jsonl there.

    Args:
        directory: a chat model.
        eval_config: YAML with the keys of `EvalArguments`; None measures nothing.
    """
    args = read_eval_config(eval_config)
    if args is None:
        return {}
    return evaluate_directory(directory, args, directory, find_previous(directory))


def evaluate_directory(
    directory: str, args: EvalArguments, output_dir: str | Path, previous: str | None
) -> dict[str, dict]:
    """Measure the model in `directory`; answers and texts go to `output_dir`.

    Args:
        previous: the directory whose answers are put beside, as `previous`; None puts none.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_for_generation(directory)
    metrics, answers = evaluate_chat(model, tokenizer, args, output_dir)
    del model
    if answers:
        if previous:
            add_previous(answers, previous, tokenizer, args)
        write_jsonl(Path(output_dir) / "answers.jsonl", answers)
    return metrics


def find_previous(directory: str | Path) -> str | None:
    """The model that a stage started from, as its run.json says; None where nothing says it."""
    record = stages.read_json(Path(directory) / "run.json") or {}
    return next(iter(record.get("fingerprint", {}).get("inputs", {})), None)


def add_previous(answers: list[dict], previous: str, tokenizer: Any, args: EvalArguments) -> None:
    """Put the previous model's `previous` answer into the rows that it has answered.

    Where it left no answers.jsonl (a base model does not chat), it answers the first prompt of each
    kind now, with the chat template of its successor.
    """
    path = Path(previous) / "answers.jsonl"
    if path.is_file():
        before = read_jsonl(path)
    elif (Path(previous) / "config.json").is_file():
        kinds: dict[tuple, dict] = {}
        for row in answers:
            kinds.setdefault((row["source"], row["lang"], row.get("kind")), row)
        rows = [{"prompt": row["prompt"]} for row in kinds.values()]
        model, _ = load_for_generation(previous)
        before = generate_answers(model, tokenizer, rows, args.max_new_tokens, args.batch_size)
    else:
        return
    said = {json.dumps(row["prompt"]): row["answer"] for row in before}
    for row in answers:
        if (answer := said.get(json.dumps(row["prompt"]))) is not None:
            row["previous"] = answer


def load_for_generation(directory: str) -> tuple[Any, Any]:
    """The model and the tokenizer of a directory, ready to generate from; no reward model's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    require_generator(directory, model.config.architectures)
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model, AutoTokenizer.from_pretrained(directory)


def evaluate_chat(
    model: Any, tokenizer: Any, args: EvalArguments, output_dir: str | Path | None = None
) -> tuple[dict, list[dict]]:
    """Generate an answer to every held-out prompt and measure the answers, and the plain text.

    Returns:
        {metric: {"value", "low", "high", "n", "unit"}}, and the answers: rows with `prompt`,
        `answer`, `finished`, `tokens`, `source`, `scores` (of this row, by metric), `samples` where
        some were drawn, and what the prompt's row had besides.

    Raises:
        ValueError: the arguments name nothing to measure.
    """
    rows = load_prompts(args)
    if not rows and not args.text_files:
        raise ValueError("nothing to measure: set chat_files, fact_files, task_files or text_files")
    answers = generate_answers(model, tokenizer, rows, args.max_new_tokens, args.batch_size)
    sample_answers(model, tokenizer, answers, args)
    metrics = measure_answers(answers)
    if args.text_files:
        texts = islice(read_documents(args.text_files), args.max_rows)
        metrics |= evaluate_language_model(model, tokenizer, texts, output_dir)
    return metrics, answers


def load_prompts(args: EvalArguments) -> list[dict]:
    """Held-out prompts: conversations without their last turn, factual questions, tasks."""
    rows = []
    for conversation in load_conversations(args.chat_files)[0] if args.chat_files else []:
        *prompt, last = conversation.pop("messages")
        rows.append(conversation | {"prompt": prompt, "reference": last["content"]})
    rows = [row | {"source": "chat"} for row in rows[: args.max_rows]]
    for source, files in (("fact", args.fact_files), ("task", args.task_files)):
        tasks, summary = load_tasks(files) if files else ([], None)
        if summary and summary.dropped:
            print(f"held-out {source}s\n{summary}")
        rows += [t | {"reference": t["answer"], "source": source} for t in tasks[: args.max_rows]]
    for row in rows:
        row["lang"] = detect_language(row["prompt"][-1]["content"])
    return rows


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: Any,
    rows: list[dict],
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
) -> list[dict]:
    """Answer each row's `prompt`, in batches of similar length, padded on the left.

    Greedily, or sampled at a `temperature` above 0.

    Returns:
        The rows in their order with `answer` (text), `finished` (ended by a stop token),
        `tokens` (with the stop token) and `ids`.

    Raises:
        ValueError: a prompt leaves no room for an answer in the model's context.
    """
    if not rows:
        return []
    prompts = [encode_prompt(row["prompt"], tokenizer) for row in rows]
    context = context_length(model)
    longest = max(range(len(rows)), key=lambda i: len(prompts[i]))
    room = context - len(prompts[longest])
    if room < 1:
        raise ValueError(
            f"a held-out prompt has {len(prompts[longest])} tokens, the model's context is "
            f"{context}: {rows[longest]['prompt'][-1]['content'][:80]!r}"
        )
    stops = model.generation_config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [stops])
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    answered: list[dict] = [{}] * len(rows)
    for start in tqdm(range(0, len(order), batch_size), desc="answers", disable=None):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        pads = [width - len(prompts[i]) for i in chosen]
        batch = {
            "input_ids": [[tokenizer.pad_token_id] * p + prompts[i] for i, p in zip(chosen, pads)],  # noqa: B905
            "attention_mask": [[0] * p + [1] * (width - p) for p in pads],
        }
        output = model.generate(
            **{key: torch.tensor(value, device=model.device) for key, value in batch.items()},
            max_new_tokens=min(max_new_tokens, context - width),
            **({"do_sample": False} | sampling),
        )
        for i, ids in zip(chosen, output[:, width:].tolist(), strict=True):
            end = next((k for k, token in enumerate(ids) if token in stops), None)
            ids = ids if end is None else ids[: end + 1]
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            answered[i] = rows[i] | {
                "answer": text, "finished": end is not None, "tokens": len(ids), "ids": ids,
            }  # fmt: skip
    return answered


def sample_answers(
    model: Any, tokenizer: Any, answers: list[dict], args: EvalArguments
) -> None:
    """Sample `args.samples` answers to each task and leave them in its row as `samples`."""
    tasks = [row for row in answers if row["source"] == "task"] if args.samples else []
    rows = [{"prompt": row["prompt"]} for row in tasks for _ in range(args.samples)]
    settings = (args.max_new_tokens, args.batch_size, args.temperature)
    with torch.random.fork_rng():  # a training that is measured on its way draws as if it were not
        torch.manual_seed(0)
        sampled = generate_answers(model, tokenizer, rows, *settings)
    for i, row in enumerate(tasks):
        own = sampled[i * args.samples : (i + 1) * args.samples]
        row["samples"] = [one["answer"] for one in own]


def measure_answers(answers: list[dict]) -> dict[str, dict]:
    """The guards over generated answers; each row keeps its own values in `scores`."""
    compared = [row for row in answers if row["source"] == "chat" and row.get("reference")]
    values = defaultdict(list)
    for row in answers:
        row["scores"] = score_answer(row)
    pairs = [(row["answer"], row["reference"]) for row in compared]
    for row, rouge in zip(compared, score_rouge(pairs) if pairs else [], strict=True):
        row["scores"] |= {f"{name}/{row['lang']}": rouge[name] for name in rouge}
    for row in answers:
        for name, value in row["scores"].items():
            values[name].append(value)
    metrics = {}
    for name, found in sorted(values.items(), key=lambda item: ("/" in item[0], item[0])):
        is_share = all(isinstance(value, bool) for value in found)
        metrics[name] = (
            share_with_interval(found)
            if is_share
            else mean_with_interval(found, UNITS.get(name, "share"))
        )
    return metrics | measure_corpora(compared)


def score_answer(row: dict) -> dict[str, float | bool]:
    """What is measured of one answer; facts and tasks are judged by their verifiers."""
    scores = {"stop_rate": row["finished"], "repetition": repetition(row.pop("ids")),
              "length": row["tokens"]}  # fmt: skip
    if row["source"] != "task" and any(map(str.isalpha, row["answer"])):
        scores["language_match"] = detect_language(row["answer"]) == row["lang"]
    if row["source"] == "chat":
        return scores
    row["right"] = verify(row["answer"], row["reference"], row["verifier"])
    scores[f"{row['source']}_accuracy"] = row["right"]
    if row["source"] == "task":
        scores[f"task_accuracy/level_{row['level']}"] = row["right"]
        scores[f"task_accuracy/{row['kind']}"] = row["right"]
    if samples := row.get("samples"):
        right = sum(verify(text, row["reference"], row["verifier"]) for text in samples)
        ks = {2**i for i in range(len(samples).bit_length())} | {len(samples)}
        for k in sorted(k for k in ks if k <= len(samples)):
            scores[f"pass@{k}"] = estimate_pass_at(k, len(samples), right)
    return scores


def estimate_pass_at(k: int, n: int, right: int) -> float:
    """The chance that one of k answers is right, without bias from n >= k answers (Chen 2021)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def repetition(ids: list[int]) -> float:
    """Share of the token triples that occurred before in the same answer; 0 is none."""
    triples = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """One JSON object a line, UTF-8."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def check_own_questions(directory: str, args: EvalArguments) -> None:
    """Raise a ValueError where other questions than its stage's would replace a stage's numbers.

    Samples are drawn besides and a batch is divided as one likes: these may differ.
    """
    record = stages.read_json(Path(directory) / "run.json") or {}
    config = record.get("arguments", {}).get("eval_config")
    asks = [args.chat_files, args.fact_files, args.task_files, args.text_files]
    if not any(asks) or (config is None and record.get("stage") != "pretrain"):
        return  # nothing is asked, now or by the stage
    free = {"samples": 0, "temperature": 0.8, "batch_size": 64, "output_dir": None}
    is_there = config and Path(config).is_file()
    own = stages.parse_args([EvalArguments], ["--config", config])[0] if is_there else None
    if own is None or replace(own, **free) != replace(args, **free):
        raise ValueError(
            f"{directory} holds the numbers of its own stage, made with eval_config={config}; the "
            "guards and the report compare by them. These are other questions: name another place "
            f"with --output_dir, e.g. --output_dir {Path(directory).parent / 'eval'}"
        )


def main(directories: list[str], args: EvalArguments) -> None:
    """Measure directories, each beside the one before it, and keep the numbers."""
    for directory in directories:
        stages.require_input(directory, "config.json", "tokenizer.json")
        if not args.output_dir:
            check_own_questions(directory, args)
    before = None
    for directory in directories:
        output_dir = Path(directory)
        if args.output_dir:
            output_dir = Path(args.output_dir, Path(directory).name)
        elif not output_dir.is_dir():
            raise ValueError(f"{directory} is a name on the Hub: say where to write, --output_dir")
        previous = before or find_previous(directory)
        metrics = evaluate_directory(directory, args, output_dir, previous)
        before = str(output_dir)
        save_metrics(output_dir, metrics)
        print(f"\n{directory} -> {output_dir}/eval.json")
        print_metrics(metrics)


if __name__ == "__main__":
    named = [word.startswith("-") for word in sys.argv[1:]] + [True]
    named = sys.argv[1 : 1 + named.index(True)]
    if not named:
        print("usage: python -m sft.eval DIRECTORY ... --config configs/tiny/eval.yaml")
    if len(sys.argv) == 1:
        sys.exit(2)
    with stages.plain_errors():
        main(named, *stages.parse_args([EvalArguments], sys.argv[1 + len(named) :]))
