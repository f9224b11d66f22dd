"""Take a trained directory elsewhere: a GGUF file, the Hub, or an adapter merged into its base.

Reads   a GPT-2 or Llama directory that from_pretrained loads (or a LoRA adapter), its run.json,
        eval.json and answers.jsonl
Writes  output_dir (default: export/<name> beside it): README.md, the model card, with every kind;
        gguf: <name>-<type>.gguf, parity.json, Modelfile; merged: a plain model directory

    python scripts/export.py output/tiny/grpo --to gguf --type q8_0
    python scripts/export.py output/tiny/grpo --to card
    python scripts/export.py output/tiny/grpo --to hub --repo_id me/ladderlm-tiny
    python scripts/export.py output/tiny/sft/adapter --to merged

A GGUF file is read back before it gets its name: tensors, token ids, greedy answers, in
transformers and, where llama-cpp-python is installed, in llama.cpp. parity.json says how it went.
"""

import argparse
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import model_card
import torch

import provenance
import sft.model
import stages

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
CHATML_PROBE = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
CHATML = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
OLLAMA_CHATML = (
    "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n"
    "{{ end }}<|im_start|>assistant\n"
)
# What goes to the Hub. Checkpoints, optimizer states and training_args.bin (a pickle) stay here.
PUBLISHED = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
             "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
             "run.json", "eval.json", "curves.png")  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Export one directory."""
    directory = Path(args.directory)
    is_adapter = (directory / "adapter_config.json").is_file()
    stages.require_input(directory, "adapter_config.json" if is_adapter else "config.json")
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is no directory but a name on the Hub, and there is nothing here to "
            f"export. Fetch it first: hf download {directory} --local-dir {directory.name}"
        )
    if is_adapter != (args.to == "merged"):
        raise ValueError(
            f"{directory} {'is' if is_adapter else 'is no'} LoRA adapter, and --to {args.to} takes "
            + ("a whole model: merge it first, with --to merged" if is_adapter else "an adapter")
        )
    if args.to == "hub" and not args.repo_id:
        raise ValueError("--to hub needs --repo_id, e.g. --repo_id me/ladderlm-tiny")
    config = stages.read_json(directory / "config.json") or {}
    if args.to in ("gguf", "hub"):
        sft.model.require_generator(directory, config.get("architectures"))
    output_dir = Path(args.output_dir or directory.parent / "export" / directory.name)
    output_dir.mkdir(parents=True, exist_ok=True)
    if args.to == "merged":
        merge(directory, output_dir)
        directory = output_dir  # the card is of what was made
    if args.to == "gguf":
        export_gguf(directory, output_dir, args.type)
    files = sorted(path.name for path in output_dir.glob("*.gguf"))
    card = model_card.write_card(directory, args.repo_id or directory.name, files)
    (output_dir / "README.md").write_text(card, encoding="utf-8", errors="replace")
    print(f"model card: {output_dir / 'README.md'}")
    if args.to == "hub":
        push(directory, output_dir, args.repo_id, args.private)
    if not model_card.is_classifier(config):
        print(how_to_serve(directory, output_dir, files))


def merge(adapter: Path, output_dir: Path) -> None:
    """A plain model directory from an adapter and the base that its config names."""
    from peft import PeftConfig

    import sft.merge

    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    stages.require_input(base, "config.json")
    sft.merge.main(str(adapter), base, None, str(output_dir))


def export_gguf(directory: Path, output_dir: Path, type_name: str) -> Path:
    """Write <name>-<type>.gguf, check it, enter it in parity.json, write the Modelfile.

    Raises:
        ValueError: an unsupported model, or the `gguf` package is missing.
        RuntimeError: the file does not hold what was written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("--to gguf needs the gguf package: pip install -r requirements-extras.txt")
    import gguf_file
    import gguf_parity
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    stages.require_input(directory, "config.json", "tokenizer.json")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    path = output_dir / f"{directory.name}-{type_name}.gguf"
    beside = path.with_name(f"{path.stem}.partial.gguf")
    try:
        counts = gguf_file.write_gguf(model, tokenizer, beside, type_name, directory.name)
        parity = {
            "made_from": provenance.hash_outputs(directory),
            "bytes": beside.stat().st_size,
            "sha256": hashlib.sha256(beside.read_bytes()).hexdigest(),
            "types": counts,
        } | gguf_parity.check(beside, model, tokenizer, type_name)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    record = stages.read_json(output_dir / "parity.json") or {}
    stages.write_json(output_dir / "parity.json", record | {path.name: parity})
    (output_dir / "Modelfile").write_text(make_modelfile(path, model, tokenizer), encoding="utf-8")
    print(describe(path, parity))
    return path


def describe(path: Path, parity: dict[str, Any]) -> str:
    """What was written and how it read back, in a few lines."""
    types = ", ".join(f"{count} {name}" for name, count in sorted(parity["types"].items()))
    tensors, ours = parity["tensors"], parity["vocabulary"]["token_ids"]
    lines = [
        f"{path}: {parity['bytes']:,} bytes; tensors: {types}",
        f"  read back     tensors {tensors['equal']}/{tensors['of']} equal, "
        f"largest rounding {tensors['max_rounding']:.1e}; token ids {ours['equal']}/{ours['of']}",
    ]
    for name in ("transformers", "llama_cpp"):
        found = parity[name]
        if isinstance(found, str):
            lines.append(f"  {name:13} {found}")
            continue
        ids, greedy = found["token_ids"], found["greedy"]
        line = f"  {name:13} token ids {ids['equal']}/{ids['of']} equal, "
        line += f"greedy answers {greedy['equal']}/{greedy['of']} equal ({found['version']})"
        if ids["different"]:
            line += f"\n{'':16}other ids for: {', '.join(map(repr, ids['different']))}"
        lines.append(line)
    return "\n".join([*lines, f"  all of it: {path.with_name('parity.json')}"])


def make_modelfile(path: Path, model: Any, tokenizer: Any) -> str:
    """A Modelfile for `ollama create`."""
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    lines = ["# ollama create NAME -f Modelfile (not run here)", f"FROM ./{path.name}"]
    if is_chatml(tokenizer):
        lines.append(f'TEMPLATE """{OLLAMA_CHATML}"""')
    elif tokenizer.chat_template:
        lines.append("# Not ChatML: write its TEMPLATE in Go's template language.")
    else:
        lines.append('TEMPLATE "{{ .Prompt }}"')
    lines.append(f"PARAMETER num_ctx {model.config.max_position_embeddings}")
    lines += [f'PARAMETER stop "{tokenizer.decode([i])}"' for i in stops if i is not None]
    return "\n".join(lines) + "\n"


def is_chatml(tokenizer: Any) -> bool:
    """Whether the chat template renders turns as ChatML does."""
    if not tokenizer.chat_template:
        return False
    text = tokenizer.apply_chat_template(CHATML_PROBE, tokenize=False, add_generation_prompt=True)
    return text == CHATML


def push(directory: Path, output_dir: Path, repo_id: str, private: bool) -> None:
    """One commit on the Hub: the model, its card, its records, and GGUF files made before.

    Raises:
        ConnectionError: the Hub cannot be reached, or does not take it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    files = {file.name: file for pattern in PUBLISHED for file in sorted(directory.glob(pattern))}
    exported = ("README.md", "parity.json", "Modelfile", "*.gguf")
    files |= {f.name: f for pattern in exported for f in sorted(output_dir.glob(pattern))}
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(
            repo_id,
            [CommitOperationAdd(name, str(file)) for name, file in files.items()],
            commit_message=f"LadderLM {directory.name}",
        )
    # HTTPError is that of the client's HTTP library, and the parent of what the Hub refuses.
    except (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"nothing was pushed to {repo_id}: {error}\nThe card is written all the same: "
            f"{output_dir / 'README.md'}. Log in with `hf auth login`, see that the network is "
            "there and HF_HUB_OFFLINE is not set, and run the command again"
        ) from error
    print(f"pushed {len(files)} files to {url}: {', '.join(files)}")


def how_to_serve(directory: Path, output_dir: Path, files: list[str]) -> str:
    """Commands that serve the export."""
    config = stages.read_json(directory / "config.json") or {}
    context = config.get("n_positions") or config.get("max_position_embeddings")
    length = f" --max-model-len {context}" if context else ""
    lines = ["Serve it with an OpenAI-compatible API:", f"  transformers serve {directory}"]
    lines.append(f"  vllm serve {directory}{length}    # not run here")
    if files:
        lines.append(f"  ollama create {directory.name} -f {output_dir / 'Modelfile'}")
        lines[-1] += "    # not run here"
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", help="a stage's output, or an adapter (--to merged)")
    parser.add_argument("--to", required=True, choices=("gguf", "hub", "card", "merged"))
    parser.add_argument("--type", choices=TYPES, default="f16", help="of a GGUF's matrices")
    parser.add_argument("--output_dir", help="default: export/<name> beside the directory")
    parser.add_argument("--repo_id", help="name on the Hub, owner/name")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    with stages.plain_errors():
        main(parser.parse_args())
