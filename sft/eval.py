"""The guards: the same held-out numbers for every chat model.

stop_rate        share of the answers that end by themselves
repetition       share of an answer's token triples that it has said before
length           tokens an answer
language_match   share of the answers in the language of the question
fact_accuracy    share of held-out factual questions answered right
task_accuracy    share of held-out verifiable tasks solved, also by level and kind
bits_per_byte    what the model still knows of plain text

    python -m sft.eval output/tiny/sft --config configs/tiny/eval.yaml
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import stages
from pretrain.eval import bits_per_byte, mean_with_interval, share_with_interval
from sft.data import load_conversations
from sft.model import context_length
from sft.verifiers import verify
from tokenizer.corpus import read_documents, read_rows
from tokenizer.eval import detect_language


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


def evaluate_stage(directory: str, eval_config: str | None) -> dict[str, dict]:
    """Measure the model in a directory and write its answers.jsonl there.

    Args:
        directory: a chat model.
        eval_config: YAML with the keys of `EvalArguments`; None measures nothing.
    """
    if eval_config is None:
        return {}
    (args,) = stages.parse_args([EvalArguments], ["--config", eval_config])
    metrics, answers = evaluate_chat(*load_for_generation(directory), args)
    write_jsonl(Path(directory) / "answers.jsonl", answers)
    return metrics


def load_for_generation(directory: str) -> tuple[Any, Any]:
    """The model and the tokenizer of a directory, ready to generate from."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model, AutoTokenizer.from_pretrained(directory)


def evaluate_chat(model: Any, tokenizer: Any, args: EvalArguments) -> tuple[dict, list[dict]]:
    """Generate an answer to every held-out prompt and measure the answers.

    Returns:
        {metric: {"value", "low", "high", "n", "unit"}}, and the answers: rows with `prompt`,
        `answer`, `finished`, `tokens`, `source` and what the prompt's row had besides.
    """
    rows = load_prompts(args)
    answers = generate_answers(model, tokenizer, rows, args.max_new_tokens, args.batch_size)
    metrics = measure_answers(answers)
    if args.text_files:
        texts = list(read_documents(args.text_files))[: args.max_rows]
        metrics["bits_per_byte"] = bits_per_byte(model, tokenizer, texts)
    return metrics, answers


def load_prompts(args: EvalArguments) -> list[dict]:
    """Held-out prompts: conversations without their last turn, factual questions, tasks."""
    rows = []
    for conversation in load_conversations(args.chat_files)[0] if args.chat_files else []:
        *prompt, last = conversation.pop("messages")
        rows.append(conversation | {"prompt": prompt, "reference": last["content"]})
    rows = [row | {"source": "chat"} for row in rows[: args.max_rows]]
    for source, files in (("fact", args.fact_files), ("task", args.task_files)):
        for row in islice(read_rows(files) if files else [], args.max_rows):
            missing = {"prompt", "answer", "verifier"} - set(row.value)
            if missing:
                raise ValueError(
                    f"{row.source}: a held-out {source} needs prompt, answer and verifier; "
                    f"{', '.join(sorted(missing))} is missing. Example: "
                    '{"prompt": [{"role": "user", "content": "1 + 1"}], "answer": "2", '
                    '"verifier": "number"}'
                )
            reference = {"reference": row.value["answer"], "source": source}
            rows.append({"level": 1, "kind": source} | row.value | reference)
    for row in rows:
        row["lang"] = detect_language(row["prompt"][-1]["content"])
    if not rows:
        raise ValueError("nothing to measure: set chat_files, fact_files or task_files")
    return rows


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: Any, rows: list[dict], max_new_tokens: int, batch_size: int
) -> list[dict]:
    """Answer each row's `prompt` greedily, in batches of similar length, padded on the left.

    Returns:
        The rows in their order with `answer` (text), `finished` (ended by a stop token),
        `tokens` (with the stop token) and `ids`.

    Raises:
        ValueError: a prompt leaves no room for an answer in the model's context.
    """
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        for row in rows
    ]
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
            max_new_tokens=min(max_new_tokens, room),
            do_sample=False,
        )
        for i, ids in zip(chosen, output[:, width:].tolist(), strict=True):
            end = next((k for k, token in enumerate(ids) if token in stops), None)
            ids = ids if end is None else ids[: end + 1]
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            answered[i] = rows[i] | {
                "answer": text, "finished": end is not None, "tokens": len(ids), "ids": ids,
            }  # fmt: skip
    return answered


def measure_answers(answers: list[dict]) -> dict[str, dict]:
    """The guards over generated answers; facts and tasks are judged by their verifiers."""
    metrics = {
        "stop_rate": share_with_interval(a["finished"] for a in answers),
        "repetition": mean_with_interval([repetition(a.pop("ids")) for a in answers], "share"),
        "length": mean_with_interval([a["tokens"] for a in answers], "tokens"),
    }
    spoken = [a for a in answers if a["source"] != "task" and any(map(str.isalpha, a["answer"]))]
    metrics["language_match"] = share_with_interval(
        detect_language(a["answer"]) == a["lang"] for a in spoken
    )
    hits = defaultdict(list)
    for row in answers:
        if row["source"] == "chat":
            continue
        row["right"] = verify(row["answer"], row["reference"], row["verifier"])
        hits[f"{row['source']}_accuracy"].append(row["right"])
        if row["source"] == "task":
            hits[f"task_accuracy/level_{row['level']}"].append(row["right"])
            hits[f"task_accuracy/{row['kind']}"].append(row["right"])
    return metrics | {name: share_with_interval(values) for name, values in sorted(hits.items())}


def repetition(ids: list[int]) -> float:
    """Share of the token triples that occurred before in the same answer; 0 is none."""
    triples = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """One JSON object a line, UTF-8."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def main(directory: str, args: EvalArguments) -> None:
    """Print the guards of one directory."""
    stages.require_input(directory, "config.json", "tokenizer.json")
    metrics, _ = evaluate_chat(*load_for_generation(directory), args)
    for name, m in metrics.items():
        print(
            f"{name:28} {m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}] {m['unit']} n={m['n']}"
        )


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m sft.eval DIRECTORY --config configs/tiny/eval.yaml")
    main(sys.argv[1], *stages.parse_args([EvalArguments], sys.argv[2:]))
