"""The road that led to a model: what each stage made, from what, in sha256.

A stage's run.json holds the road of its inputs (`lineage`), so that it is known where the inputs
have been deleted or the model has been copied elsewhere:

    python -m stages lineage output/tiny/grpo

Light imports only: `stages` imports this module.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from provenance import hash_data, hash_outputs, read_json

# What a stage passes on, and the files that it is made of.
PARTS = {
    "weights": ("*.safetensors",),
    "tokenizer": ("tokenizer.json",),
    "template": ("chat_template.jinja",),
    "data": ("*.parquet",),
}
KEPT = {  # must stay the same all the way, or the ids and turns of one stage mean another thing
    "tokenizer": "tokenizer.json",
    "template": "chat_template.jinja",
}


def trace(inputs: Iterable[str | os.PathLike]) -> list[dict[str, Any]]:
    """The steps that led to some directories, the oldest first; each step once.

    Returns:
        Steps: {"stage", "directory", "command", "git_commit", "made": {part: sha256},
        "inputs": {directory: {part: sha256}}, "data": {file: sha256}}. Of a directory that no
        stage of ours has made, `stage` is None; of a name on the Hub `made` is empty as well.
    """
    steps: dict[tuple, dict[str, Any]] = {}
    for given in inputs:
        for step in _road(Path(given)):
            steps.setdefault((step["directory"], *step["made"].values()), step)
    return list(steps.values())


def _road(directory: Path) -> list[dict[str, Any]]:
    record = read_json(directory / "run.json")
    if record is None:
        made = summarize(hash_outputs(directory)) if directory.is_dir() else {}
        return [{"stage": None, "directory": directory.as_posix(), "made": made}]
    read = record.get("fingerprint", {"inputs": {}, "data": {}})
    before = record["lineage"] if "lineage" in record else trace(read["inputs"])
    own = {
        "stage": record["stage"],
        "directory": directory.as_posix(),
        "command": record.get("command"),
        "git_commit": record.get("git_commit"),
        "made": summarize(record.get("outputs") or {}),
        "inputs": {name: summarize(files) for name, files in read["inputs"].items()},
        "data": read["data"],
    }
    return [*before, own]


def summarize(files: dict[str, str]) -> dict[str, str]:
    """One sha256 for each of `PARTS` that is there, from sha256 by file name.

    Of several files (shards) it is that of their hashes, in the order of their names.
    """
    found = {}
    for part, patterns in PARTS.items():
        names = sorted(n for n in files if any(Path(n).match(pattern) for pattern in patterns))
        if names:
            hashes = [files[name] for name in names]
            joined = hashlib.sha256("".join(hashes).encode()).hexdigest()
            found[part] = hashes[0] if len(hashes) == 1 else joined
    return found


def check_road(directory: Path, record: dict[str, Any]) -> None:
    """Raise a ValueError where a directory's tokenizer or template changed on its road.

    A template may be given by name (`chat_template_path`) to a model that came without one or with
    another, and brings its control tokens along: from the stage on that did so, it is that stage's.
    """
    made, road = summarize(record["outputs"]), record.get("lineage", [])
    given = record.get("arguments", {}).get("chat_template_path")
    for step in road:
        for part, name in KEPT.items():
            was, now = step["made"].get(part), made.get(part)
            # A stage of ours that read somebody else's model was compared with it when it was read;
            # and where it saves their tokenizer, transformers writes the same in other bytes.
            behind = part == "tokenizer" or any(s["stage"] for s in road)
            replaced = not step["stage"] and behind
            if was and was != now and not given and not replaced:
                raise ValueError(
                    f"{directory / name} (sha256 {str(now)[:12]}) is not the one it was made with: "
                    f"{step['directory']}, on the road that led to it, had {was[:12]}. Run the "
                    f"stages again from there on; the road: python -m stages lineage {directory}"
                )


def format_road(directory: str | os.PathLike) -> str:
    """The road to a directory as text, the oldest step first, checked against the disk.

    Raises:
        FileNotFoundError: there is no run.json.
    """
    directory = Path(directory)
    if not (directory / "run.json").is_file():
        raise FileNotFoundError(
            f"{directory}/run.json does not exist: name a directory that a stage has written"
        )
    steps = _road(directory)
    made = {(step["directory"], tuple(step["made"].items())) for step in steps}
    return "\n\n".join(_format_step(number, step, made) for number, step in enumerate(steps, 1))


def _format_step(number: int, step: dict[str, Any], made: set[tuple]) -> str:
    now = hash_outputs(step["directory"]) if Path(step["directory"]).is_dir() else None
    if now is None:
        disk = "not on this disk" if step["made"] else "a name on the Hub"
    else:
        disk = "on disk, unchanged" if summarize(now) == step["made"] else "CHANGED SINCE"
    lines = [f"{number}. {step['stage'] or 'somebody else'}: {step['directory']} ({disk})"]
    if step.get("command"):
        commit = f"   at {step['git_commit'][:12]}" if step.get("git_commit") else ""
        lines.append(f"   {step['command']}{commit}")
    for name, parts in step.get("inputs", {}).items():
        known = (Path(name).as_posix(), tuple(parts.items())) in made
        other = "" if known or not parts else "   ANOTHER VERSION than the one above"
        lines.append(f"   from  {name}{other}")
    for name, digest in step.get("data", {}).items():
        same = digest is None or not Path(name).exists() or hash_data(Path(name)) == digest
        changed = "" if same else "   CHANGED SINCE"
        lines.append(f"   data  {name}  {(digest or 'by name')[:12]}{changed}")
    parts = [f"{part} {digest[:12]}" for part, digest in step["made"].items()]
    return "\n".join([*lines, f"   made  {'  '.join(parts) or 'unknown'}"])


def main(argv: Sequence[str]) -> None:
    """Print the road to a directory."""
    parser = argparse.ArgumentParser(prog="python -m stages", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    lineage = commands.add_parser("lineage", help="print the road that led to a model")
    lineage.add_argument("directory", help="a stage's output, such as output/tiny/grpo")
    print(format_road(parser.parse_args(argv).directory))
