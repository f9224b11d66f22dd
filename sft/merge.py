"""Merge a LoRA adapter into its full-precision base, and say what the merge changed.

    python -m sft.merge output/tiny/sft/adapter --base output/tiny/pretrain --output_dir merged

Writes a model that from_pretrained loads, with the comparison in run.json.
"""

import argparse
from pathlib import Path

from peft import PeftConfig, TaskType
from transformers import AutoTokenizer

import stages
from sft.model import merge_adapter, set_stop_tokens


def main(adapter: str, base: str | None, tokenizer_dir: str | None, output_dir: str) -> None:
    """Write the merged model and its tokenizer, and print what the merge changed."""
    stages.require_input(adapter, "adapter_config.json")
    config = PeftConfig.from_pretrained(adapter)
    if config.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(
            f"{adapter} is an adapter for {config.task_type}: without its head it would become a "
            "chat model. A reward model's or a classifier's stage writes it merged, beside adapter/"
        )
    base = base or config.base_model_name_or_path
    if Path(output_dir).resolve() == Path(adapter).resolve().parent:
        raise ValueError(f"{output_dir} holds the model that the adapter came with: name another")
    run = stages.start_run("merge", output_dir, [], [base, adapter])
    words = [adapter, "--base", base, "--output_dir", output_dir]
    words += ["--tokenizer", tokenizer_dir] if tokenizer_dir else []
    # Another program (scripts/export.py) may have started it: its words are not this module's.
    run.record["command"] = " ".join(["python -m sft.merge", *words])
    run.record["fingerprint"]["arguments"] = words
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir or adapter)
    model, parity = merge_adapter(base, adapter, tokenizer)
    set_stop_tokens(model, tokenizer)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    for name, value in parity.items():
        print(f"{name:30} {value}")
    run.finish(**parity)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("adapter", help="a directory with adapter_config.json")
    parser.add_argument("--base", help="the base model; default: the one the adapter names")
    parser.add_argument("--tokenizer", help="its tokenizer; default: the one beside the adapter")
    parser.add_argument("--output_dir", required=True)
    arguments = parser.parse_args()
    with stages.plain_errors():
        main(arguments.adapter, arguments.base, arguments.tokenizer, arguments.output_dir)
