"""How fast pretrain.prepare is, against the bare Rust tokenizer and against `datasets.map`.

Run by `python scripts/benchmark.py prepare`. Each variant is a process of its own, on the same text
and the same tokenizer, in turn:

    bare      `Tokenizer.encode_batch` of the Rust library on all cores; reading is not counted
    ours      `python -m pretrain.prepare`, from its start to its end: read, encode, pack, write
    datasets  `datasets.map(batched=True, num_proc=2)` to tokenize, then to group into blocks;
              loading is not counted
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import stages

VARIANTS = {
    "bare": "Rust tokenizer, encode_batch",
    "ours": "pretrain.prepare, the whole command",
    "datasets": "datasets.map, num_proc=2, then grouping",
}
BLOCK_SIZE = 1024
DOCUMENTS_PER_BATCH = 1_000


def add_commands(commands) -> None:
    """Add the words of `prepare` to the parsers of benchmark.py."""
    prepare = commands.add_parser("prepare", help="speed of pretrain.prepare")
    prepare.add_argument("--tokenizer", type=Path, default=Path("output/tiny/tokenizer"))
    prepare.add_argument("--text", type=Path, help="JSON lines; made where it is not there")
    prepare.add_argument("--megabytes", type=float, default=500.0, help="of the text that is made")
    prepare.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    prepare.add_argument("--repeats", type=int, default=1)
    prepare.add_argument("--json", type=Path, help="also write the numbers there")
    prepare.set_defaults(run=run_all)
    one = commands.add_parser("measure_prepare", help="one variant, in this process, as JSON")
    one.add_argument("variant", choices=("bare", "datasets"))
    one.add_argument("text", type=Path)
    one.add_argument("tokenizer", type=Path)
    one.set_defaults(run=run_one, json=None)


def run_all(args: argparse.Namespace) -> dict:
    """Make the text if need be, measure, and print the table.

    Raises:
        FileNotFoundError: there is no tokenizer; the message has the command.
    """
    stages.require_input(args.tokenizer, "tokenizer.json")
    with tempfile.TemporaryDirectory() as folder:
        text = args.text or Path(folder, "text.jsonl")
        if not text.is_file():
            write_corpus(Path("data/generated/pretrain_train.jsonl"), text, args.megabytes)
        result = benchmark_preparing(text, args.tokenizer, args.variants, args.repeats)
    print_preparing(result)
    return result


def run_one(args: argparse.Namespace) -> None:
    """Print {"seconds", "bytes"} of a variant that runs in this process."""
    measure = measure_bare if args.variant == "bare" else measure_datasets
    print(json.dumps(measure(args.text, args.tokenizer)))


def benchmark_preparing(
    text: Path, tokenizer: Path, variants: list[str], repeats: int
) -> dict:
    """Run every variant `repeats` times, in turn.

    Returns:
        {variant: {"megabytes_per_second" (of the text, UTF-8), "seconds", "memory_gb"}}, medians;
        memory is the sum over the processes of the variant, at its highest.
    """
    measured = {variant: [] for variant in variants}
    for repeat in range(repeats):
        for variant in variants:
            print(f"  {variant}, repeat {repeat + 1} of {repeats}", file=sys.stderr)
            with tempfile.TemporaryDirectory() as folder:
                measured[variant].append(run(variant, text, tokenizer, Path(folder)))
    return {
        variant: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for variant, runs in measured.items()
    }


def run(variant: str, text: Path, tokenizer: Path, folder: Path) -> dict:
    """One run of a variant in a fresh process; see `benchmark_preparing`."""
    script = Path(__file__).with_name("benchmark.py")
    command = [sys.executable, str(script), "measure_prepare", variant, str(text), str(tokenizer)]
    if variant == "ours":
        held_out = folder / "held_out.jsonl"
        with open(text, encoding="utf-8") as file:
            held_out.write_text("".join(islice(file, 2_000)), encoding="utf-8")
        command = [sys.executable, "-m", "pretrain.prepare", "--tokenizer", str(tokenizer)]
        command += ["--data_files", str(text), "--validation_files", str(held_out)]
        command += ["--block_size", str(BLOCK_SIZE), "--output_dir", str(folder / "prepare")]
    environment = os.environ | {"HF_HOME": str(folder), "TMPDIR": str(folder)}
    started_at, log = time.time(), folder / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment
        )
        memory = watch_memory(process)
    seconds, output = time.time() - started_at, process.stdout.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed (exit code {process.returncode}):\n{log.read_text()}")
    if variant == "ours":
        meta = json.loads((folder / "prepare/meta.json").read_text(encoding="utf-8"))
        done = {"seconds": seconds, "bytes": sum(meta[s]["bytes"] for s in ("train", "validation"))}
    else:
        done = json.loads(output.splitlines()[-1])
    speed = done["bytes"] / done["seconds"] / 1e6
    figures = {"megabytes_per_second": speed, "seconds": done["seconds"], "memory_gb": memory}
    return figures | {"megabytes": done["bytes"] / 1e6}


def watch_memory(process: subprocess.Popen) -> float:
    """Wait for a process; the most memory that it and its children had together, in GB."""
    import psutil

    highest, watched = 0, psutil.Process(process.pid)
    while process.poll() is None:
        try:
            family = [watched, *watched.children(recursive=True)]
            highest = max(highest, sum(one.memory_info().rss for one in family))
        except psutil.NoSuchProcess:  # it ended in between
            pass
        time.sleep(0.1)
    return highest / 1e9


def measure_bare(text: Path, tokenizer: Path) -> dict:
    """The time within `encode_batch` alone."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    seconds = size = 0
    with open(text, encoding="utf-8") as file:
        while lines := list(islice(file, DOCUMENTS_PER_BATCH)):
            texts = [json.loads(line)["text"] for line in lines]
            size += sum(len(text.encode()) for text in texts)
            started_at = time.perf_counter()
            backend.encode_batch(texts, add_special_tokens=False)
            seconds += time.perf_counter() - started_at
    return {"seconds": seconds, "bytes": size}


def measure_datasets(text: Path, tokenizer_dir: Path) -> dict:
    """What transformers' run_clm.py does: map to tokenize, map to group; both on two processes."""
    import datasets
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    loaded = datasets.load_dataset("json", data_files=str(text), split="train")
    columns = loaded.column_names
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id

    def encode(batch):
        rows = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [[ends[0], *ids, ends[1]] for ids in rows]}

    def group(batch):
        ids = [token for row in batch["input_ids"] for token in row]
        whole = len(ids) // BLOCK_SIZE * BLOCK_SIZE
        return {"input_ids": [ids[i : i + BLOCK_SIZE] for i in range(0, whole, BLOCK_SIZE)]}

    started_at = time.perf_counter()
    encoded = loaded.map(encode, batched=True, num_proc=2, remove_columns=columns)
    encoded.map(group, batched=True, num_proc=2)
    seconds = time.perf_counter() - started_at
    size = sum(len(text.encode()) for batch in loaded.iter(1_000) for text in batch["text"])
    return {"seconds": seconds, "bytes": size}


def write_corpus(generated: Path, path: Path, megabytes: float) -> None:
    """Write documents as long as web pages, made of the rows of the project's own corpus.

    Rows are drawn anew and joined, and their digits are, so that no document is there twice; half
    the documents are English, half Chinese.
    """
    rows = {"en": [], "zh": []}
    with open(generated, encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)["text"]
            rows["zh" if re.search("[\u4e00-\u9fff]", text) else "en"].append(text)
    rng, size = random.Random(0), 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            wanted, parts, length = 100 * 100 ** rng.random(), [], 0  # 100 to 10,000 characters
            pool = rows[rng.choice(("en", "zh"))]
            while length < wanted:
                parts.append(rng.choice(pool))
                length += len(parts[-1])
            text = re.sub(r"\d", lambda _: str(int(rng.random() * 10)), "\n".join(parts))
            size += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode()) - len(text)


def print_preparing(result: dict) -> None:
    """The table, and the two ratios that are promised."""
    print("| | MB/s | seconds | memory, GB |\n|---|---|---|---|")
    for variant, figures in result.items():
        print(
            f"| {VARIANTS[variant]} | {figures['megabytes_per_second']:.2f} "
            f"| {figures['seconds']:.1f} | {figures['memory_gb']:.2f} |"
        )
    for other, wanted in (("bare", "0.85"), ("datasets", "1.5")):
        if "ours" in result and other in result:
            ours, theirs = (result[name]["megabytes_per_second"] for name in ("ours", other))
            print(f"pretrain.prepare: {ours / theirs:.2f} x {VARIANTS[other]} (at least {wanted})")
