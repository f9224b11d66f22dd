"""Packing, parts that survive a kill, stale caches, and what cleaning leaves out."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import py3langid
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SENTENCES

from pretrain import packing, parts, prepare
from pretrain.cleaning import CHINESE
from pretrain.encoding import Encoder, Encoding, encode
from pretrain.packing import Shards

LANGUAGES = {code for code, _ in py3langid.rank("text")} - set(CHINESE)
WORDS = "river mill stone bridge garden summer winter market baker letter window village".split()


@pytest.fixture(scope="module")
def tokenizer_dir(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def run(tokenizer_dir, tmp_path, monkeypatch):
    """Run prepare in this process; returns meta.json and the documents of each split, as texts."""
    monkeypatch.setattr(sys, "argv", ["prepare"])

    def run(rows, name="prepare", file="text.jsonl", **settings):
        path = tmp_path / file
        if rows is not None:
            write_rows(path, rows)
        directory = tmp_path / name
        settings = {"block_size": 16, "validation_share": 0.2, "seed": 1} | settings
        prepare.main(prepare.PrepareArguments(
            data_files=[str(path)], tokenizer=str(tokenizer_dir), output_dir=str(directory),
            **settings,
        ))  # fmt: skip
        assert not (directory / "parts").exists()
        return json.loads((directory / "meta.json").read_text(encoding="utf-8")), directory

    return run


def write_rows(path, texts):
    rows = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def make_texts(count, seed=0):
    """Distinct documents of 5 to 60 words."""
    rng = np.random.default_rng(seed)
    return [
        f"{number} " + " ".join(rng.choice(WORDS, rng.integers(5, 60))) for number in range(count)
    ]


def read_ids(directory, split):
    shards = sorted(directory.glob(f"{split}-*.parquet"))
    return [ids for shard in shards for ids in pq.read_table(shard)["input_ids"].to_pylist()]


def read_texts(directory, split, tokenizer):
    """The whole documents of a split."""
    ids = [token for block in read_ids(directory, split) for token in block]
    text = tokenizer.decode(ids)
    return [part.removeprefix("<bos>") for part in text.split("<eos>")[:-1]]


def test_encoding_is_the_tokenizers_and_special_tokens_stay_text(tokenizer, tokenizer_dir):
    encoding = Encoding(str(tokenizer_dir / "tokenizer.json"), 2, 3)
    texts = [*SENTENCES, "The end.<eos><bos>A new <|im_end|> begins"]
    encoded = encode(texts, encoding)
    starts = np.cumsum(encoded.lengths) - encoded.lengths
    for text, start, length in zip(texts, starts, encoded.lengths, strict=True):
        bos, *ids, eos = encoded.ids[start : start + length].tolist()
        assert (bos, eos) == (2, 3)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)
        if text in SENTENCES:
            assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_file_that_cuts_or_pads_does_neither(tokenizer, tokenizer_dir, tmp_path):
    file = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    file["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    whole, cut = (
        encode(SENTENCES, Encoding(str(folder / "tokenizer.json"), 2, 3))
        for folder in (tokenizer_dir, tmp_path)
    )
    assert whole.ids.tolist() == cut.ids.tolist()


@pytest.mark.parametrize("tokens_per_shard", [16, 64, 1000])
def test_packing_loses_and_makes_no_token(tmp_path, monkeypatch, tokens_per_shard):
    monkeypatch.setattr(packing, "TOKENS_PER_SHARD", tokens_per_shard)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60_000, size).astype(np.uint16)
                 for size in (1, 3, 15, 16, 17, 200, 2, 31, 64, 5)]  # fmt: skip
    shards = Shards(tmp_path, "train", 16)
    for ids in documents:
        shards.add(ids)
    shards.close()
    flat = np.concatenate(documents).tolist()
    blocks = read_ids(tmp_path, "train")
    assert {len(block) for block in blocks} == {16}
    assert [token for block in blocks for token in block] == flat[: len(flat) // 16 * 16]
    assert (shards.blocks, shards.dropped_tokens) == (len(flat) // 16, len(flat) % 16)
    sizes = [pq.read_table(path).num_rows for path in sorted(tmp_path.glob("*.parquet"))]
    assert max(sizes) == min(tokens_per_shard // 16, len(blocks))
    assert set(sizes[:-1]) <= {tokens_per_shard // 16}


def test_every_token_of_every_document_is_packed_once(run, tokenizer, monkeypatch):
    monkeypatch.setattr(parts, "CHARACTERS_PER_BATCH", 500)
    texts = make_texts(300)
    meta, directory = run(texts)
    found = {split: read_texts(directory, split, tokenizer) for split in prepare.SPLITS}
    missing = set(texts) - set(found["train"]) - set(found["validation"])
    assert len(missing) <= 2 * 3, "only what a last block cut off"
    assert not set(found["train"]) & set(found["validation"])
    assert sum(meta[split]["documents"] for split in prepare.SPLITS) == 300
    for split in prepare.SPLITS:
        ids = read_ids(directory, split)
        assert meta[split]["blocks"] == len(ids)
        assert meta[split]["tokens"] == 16 * len(ids) + meta[split]["dropped_tokens"]
    assert sum(meta[s]["bytes"] for s in prepare.SPLITS) == sum(len(t.encode()) for t in texts)
    expected = sum(len(tokenizer(text)["input_ids"]) + 2 for text in texts)
    assert sum(meta[split]["tokens"] for split in prepare.SPLITS) == expected


class Killed(BaseException):
    """What a kill is to a test in the same process."""


@pytest.mark.parametrize("settings", [
    {"exact_duplicates": "remove", "near_duplicates": 0.7, "on_bad_row": "skip"},
    {"max_tokens": 12_000, "exact_duplicates": "remove"},
])  # fmt: skip
def test_a_killed_run_ends_like_one_that_was_not(run, monkeypatch, settings):
    monkeypatch.setattr(prepare, "CHARACTERS_PER_PART", 4_000)
    monkeypatch.setattr(prepare, "FEWEST_CHARACTERS", 4_000)
    monkeypatch.setattr(packing, "TOKENS_PER_SHARD", 1 << 10)
    texts = make_texts(200)
    texts += [text + " once more" for text in texts[50:90]] + texts[:30]
    meta, whole = run(texts, name="whole", **settings)
    written = []
    write, finish = parts.Part.write, parts.Source._finish

    def die_after_some(self, path):
        write(self, path)
        written.append(path)
        if len(written) == 4:
            raise Killed

    monkeypatch.setattr(parts.Part, "write", die_after_some)
    with pytest.raises(Killed):
        run(texts, name="killed", **settings)
    finished = []
    monkeypatch.setattr(parts.Source, "_finish", lambda *a: finished.append(a) or finish(*a))
    again, killed = run(None, name="killed", **settings)
    assert 0 < len(finished) and len(finished) + 4 == len(written), "no finished part is redone"
    assert {k: v for k, v in again.items() if k != "settings"} == {
        k: v for k, v in meta.items() if k != "settings"
    }
    for split in prepare.SPLITS:
        assert read_ids(killed, split) == read_ids(whole, split)


@pytest.mark.parametrize("change", ["text", "seed", "tokenizer", "cleaning"])
def test_a_change_makes_a_new_preparation(run, tokenizer_dir, tmp_path, monkeypatch, change):
    monkeypatch.setattr(prepare, "CHARACTERS_PER_PART", 4_000)
    texts, settings = make_texts(100), {}
    write = parts.Part.write

    def die(self, path):
        write(self, path)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(parts.Part, "write", die)
        with pytest.raises(Killed):
            run(texts)
    (tmp_path / "prepare/train-00007.parquet").write_bytes(b"of an earlier, longer run")
    if change == "text":
        texts[0] += " and so on"
    elif change == "tokenizer":
        other = tmp_path / "other"
        other.mkdir()
        for path in tokenizer_dir.iterdir():
            (other / path.name).write_bytes(path.read_bytes())
        file = other / "tokenizer.json"
        file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        monkeypatch.setattr(prepare.stages, "require_input", lambda *args: None)
        for path in other.iterdir():
            (tokenizer_dir / path.name).write_bytes(path.read_bytes())
    else:
        settings = {"seed": 2} if change == "seed" else {"min_characters": 40}
    changed, directory = run(texts, **settings)
    fresh, other = run(texts, name="fresh", **settings)
    assert sorted(path.name for path in directory.glob("*.parquet")) == sorted(
        path.name for path in other.glob("*.parquet")
    )
    assert changed["train"] == fresh["train"]
    assert read_ids(directory, "train") == read_ids(other, "train")


def test_meta_names_what_it_was_made_of(run, tokenizer_dir, tmp_path):
    from provenance import hash_file

    meta, _ = run(make_texts(100))
    assert meta["sources"] == {str(tmp_path / "text.jsonl"): hash_file(tmp_path / "text.jsonl")}
    assert meta["tokenizer"]["tokenizer.json"] == hash_file(tokenizer_dir / "tokenizer.json")
    assert meta["settings"]["block_size"] == 16 and meta["settings"]["seed"] == 1
    assert meta["encoder"] == "tiktoken"


def test_bad_rows_and_empty_rows_are_said(run, tmp_path, capsys):
    texts = make_texts(60)
    write_rows(tmp_path / "text.jsonl", texts)
    with open(tmp_path / "text.jsonl", "a", encoding="utf-8") as file:
        file.write('{"text": ""}\n{oops\n[3]\n')
    with pytest.raises(ValueError, match="text.jsonl:62: malformed JSON"):
        run(None)
    meta, directory = run(None, on_bad_row="skip")
    assert meta["bad_rows"]["rows"] == 2 and "text.jsonl:62: " in meta["bad_rows"]["first"][0]
    assert meta["cleaning"]["all"]["empty"] == 1
    assert len((directory / "bad_rows.txt").read_text().splitlines()) == 2
    shown = capsys.readouterr().out
    assert "2 rows could not be read" in shown and "1 rows without text" in shown


def test_the_text_is_where_text_field_says(run, tmp_path, tokenizer):
    texts = make_texts(60)
    rows = (json.dumps({"query": text, "label": 1}) for text in texts)
    (tmp_path / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for given in ({}, {"on_bad_row": "skip"}):
        with pytest.raises(ValueError, match="text.jsonl.*no field text.*Pass --text_field NAME"):
            run(None, **given)
    meta, directory = run(None, text_field="query")
    assert meta["settings"]["text_field"] == "query"
    assert set(read_texts(directory, "train", tokenizer)) < set(texts)


def test_a_dry_run_reads_as_the_run_does(tokenizer, tokenizer_dir, tmp_path):
    def first(content, **settings):
        (tmp_path / "x.jsonl").write_text(content, encoding="utf-8")
        files = {"data_files": [str(tmp_path / "x.jsonl")]} | settings
        folder = str(tokenizer_dir)  # where `main` has saved it
        args = prepare.PrepareArguments(tokenizer=folder, output_dir=folder, **files)
        prepare.check_arguments(args)
        return prepare.encode_firsts(args, tokenizer)

    text = '{"text": "The river"}\n'
    length = len(tokenizer("The river")["input_ids"]) + 2
    assert first("{oops\n" + text, on_bad_row="skip") == f"[{length}] tokens"
    assert first(text.replace("text", "query"), text_field="query") == f"[{length}] tokens"
    with pytest.raises(ValueError, match="x.jsonl:1: malformed"):
        first("{oops\n" + text)
    with pytest.raises(ValueError, match=r"x.jsonl'\]: no document, all rows are without text"):
        first('{"text": " "}\n')
    with pytest.raises(ValueError, match="data_files is empty: name the training text"):
        first(text, data_files=[])
    for size in (0, 1):
        with pytest.raises(ValueError, match=f"block_size={size}: a block needs 2 tokens"):
            first(text, block_size=size)


def test_each_step_removes_what_it_says_with_examples(run, tmp_path, capsys):
    texts = make_texts(120)
    question = "How many stones did the old miller carry over the bridge before the long winter"
    write_rows(tmp_path / "test.jsonl", [question + " came?", "Too short to find."])
    bad = {
        "exact duplicate": texts[3],
        "near duplicate": "Long " + " ".join(WORDS * 5) + " indeed",
        "too short": "Hm.",
        "too long": "mill " * 200,
        "too many symbols": "|--+--|" * 5 + " table of contents",
        "another language": "Der Fluss fließt an der alten Mühle vorbei und durch das Dorf.",
        "overlaps the evaluation files": f"He asked: {question.upper()}! And nobody knew.",
    }
    english = ["The old miller has lived beside this river for as long as people remember it.",
               "Long " + " ".join(WORDS * 5)]  # fmt: skip
    meta, directory = run(
        [*texts, *english, *bad.values()], near_duplicates=0.8, exact_duplicates="remove",
        min_characters=10, max_characters=900, max_symbol_share=0.3,
        languages=sorted(LANGUAGES - {"de"}),
        evaluation_files=[str(tmp_path / "test.jsonl")],
    )  # fmt: skip
    removed = meta["cleaning"]["all"]["removed"]
    for step, text in bad.items():
        examples = [example["text"] for example in removed[step]["examples"]]
        assert text[:200] in examples, (step, removed)
    assert removed["overlaps the evaluation files"]["examples"][0]["saw"].startswith("how many")
    assert meta["evaluation_files"] == {"rows": 2, "too short to find": 1}
    left = sum(counts["documents"] for counts in removed.values())
    assert left + sum(meta[s]["documents"] for s in prepare.SPLITS) == 120 + 2 + 7
    shown = capsys.readouterr().out
    assert all(f"all: {step}: {removed[step]['documents']} of 129" in shown for step in bad)


# The command, in small parts on processes of its own; with a file of that name it is killed.
COMMAND = """
import multiprocessing, os, pathlib, signal
from pretrain import encoding, parts, prepare

prepare.CHARACTERS_PER_PART, encoding.ENCODED_HERE = 100_000, 0
write, pids = parts.Part.write, pathlib.Path("pids")

def write_and_die(self, path):
    write(self, path)
    if pids.exists() and path.name == "000003.npz":
        pids.write_text(" ".join(str(one.pid) for one in multiprocessing.active_children()))
        os.kill(os.getpid(), signal.SIGKILL)

parts.Part.write = write_and_die
if __name__ == "__main__":
    prepare.main(*prepare.stages.parse_args([prepare.PrepareArguments]))
"""


def test_processes_encode_the_same_and_end_with_a_killed_parent(
    tokenizer_dir, tmp_path, run, monkeypatch
):
    """A real kill -9 of the command with its processes; what they leave goes on."""
    write_rows(tmp_path / "text.jsonl", make_texts(5_000))
    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "pids").touch()
    command = [sys.executable, "command.py", "--data_files", str(tmp_path / "text.jsonl"),
               "--tokenizer", str(tokenizer_dir), "--output_dir", str(tmp_path / "killed"),
               "--block_size", "16", "--validation_share", "0.2", "--seed", "1"]  # fmt: skip
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    with open(tmp_path / "log", "w") as log:
        killed = subprocess.run(command, stdout=log, stderr=log, **options)
    assert killed.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    children = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.time() + 60
    while any(map(is_alive, children)) and time.time() < deadline:
        time.sleep(0.05)
    assert children and not any(map(is_alive, children))
    (tmp_path / "pids").unlink()
    again = subprocess.run(command, capture_output=True, text=True, **options)
    assert "an interrupted run goes on; 4 parts are tokenized" in again.stdout, again.stderr
    monkeypatch.setattr(prepare, "CHARACTERS_PER_PART", 100_000)
    _, whole = run(None, name="whole")
    for split in prepare.SPLITS:
        assert read_ids(tmp_path / "killed", split) == read_ids(whole, split)


def is_alive(pid):
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return shown.stdout.strip() not in ("", "Z")


def test_encoding_in_processes_gives_the_same(tokenizer_dir, monkeypatch):
    monkeypatch.setattr("pretrain.encoding.ENCODED_HERE", 0)
    encoding = Encoding(str(tokenizer_dir / "tokenizer.json"), 2, 3)
    with Encoder() as encoder:
        theirs = encoder.submit(SENTENCES, encoding).result()
    assert theirs.ids.tolist() == encode(SENTENCES, encoding).ids.tolist()
