"""A mixture: shares, budget, order, counts; and what prepare makes of it."""

import json
import os
import random
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from pretrain.prepare import PrepareArguments, main
from tokenizer.mixture import check_budget, interleave, parse_shares, shuffle, take

NAMES = ("books", "web", "poems")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three files whose documents differ much in length; the first holds long ones."""
    folder = tmp_path_factory.mktemp("text")
    lines = {
        "books": ["The river runs past the mill. " * 40] * 60,
        "web": [f"Who are you? I am number {i}." for i in range(3000)],
        "poems": [f"小河流过磨坊。第{i}首。" for i in range(3000)],
    }
    for name, texts in lines.items():
        rows = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def prepare(monkeypatch, sources, tokenizer, output_dir, shares=(0.5, 0.3, 0.2), **settings):
    """Run prepare on the three files; returns meta.json and the training ids."""
    monkeypatch.setattr(sys, "argv", ["prepare"])
    tokenizer.save_pretrained(output_dir.parent / "tokenizer")
    files = [f"{sources}/{name}.jsonl@{share}" for name, share in zip(NAMES, shares, strict=True)]
    settings = {"max_tokens": 20_000, "validation_share": 0.1, "block_size": 64} | settings
    main(PrepareArguments(
        data_files=files, tokenizer=str(output_dir.parent / "tokenizer"),
        output_dir=str(output_dir), **settings,
    ))  # fmt: skip
    meta = json.loads((output_dir / "meta.json").read_text(encoding="utf-8"))
    return meta, pq.read_table(sorted(output_dir.glob("train-*.parquet"))).to_pydict()["input_ids"]


def test_a_mixture_has_its_shares_budget_and_counts(monkeypatch, sources, tokenizer, tmp_path):
    meta, blocks = prepare(monkeypatch, sources, tokenizer, tmp_path / "a")
    longest = 40 * 30  # one document's tokens at the very most
    for split, budget in (("train", 20_000), ("validation", 2_000)):
        counts = meta[split]
        assert budget <= counts["tokens"] < budget + longest
        by_source = [counts["sources"].pop(f"{sources}/{name}.jsonl") for name in NAMES]
        assert not counts["sources"]
        for key in ("documents", "bytes", "tokens"):
            assert sum(one[key] for one in by_source) == counts[key]
        for share, one in zip((0.5, 0.3, 0.2), by_source, strict=True):
            assert abs(one["tokens"] - share * counts["tokens"]) < longest
    assert list(meta["shares"].values()) == pytest.approx([0.5, 0.3, 0.2])
    assert len(blocks) == meta["train"]["blocks"] == meta["train"]["tokens"] // 64


def test_the_sources_are_mixed_all_along(monkeypatch, sources, tokenizer, tmp_path):
    _, blocks = prepare(monkeypatch, sources, tokenizer, tmp_path / "a", shares=(1, 1, 2))
    half = len(blocks) // 2
    for part in (blocks[:half], blocks[half:]):
        text = tokenizer.decode([token for block in part for token in block])
        assert "river" in text and "Who are you" in text and "小河" in text


def test_the_seed_decides_the_order(monkeypatch, sources, tokenizer, tmp_path):
    runs = [
        prepare(monkeypatch, sources, tokenizer, tmp_path / name, seed=seed)[1]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_held_out_text_is_no_training_text(monkeypatch, sources, tokenizer, tmp_path):
    prepare(monkeypatch, sources, tokenizer, tmp_path / "a", shares=(1, 100, 1))
    numbers = []
    for split in ("train", "validation"):
        rows = pq.read_table(sorted((tmp_path / "a").glob(f"{split}-*"))).to_pydict()["input_ids"]
        text = tokenizer.decode([token for block in rows for token in block])
        numbers.append(set(re.findall(r"I am number (\d+)\.<eos>", text)))
    assert len(numbers[0]) > 500 and len(numbers[1]) > 50
    assert not numbers[0] & numbers[1]


def test_a_source_that_ends_is_named(caplog):
    streams = {"short": iter([1] * 3), "long": iter([1] * 100)}
    mixed = interleave(streams, {"short": 0.5, "long": 0.5}, size=lambda item: item)
    assert len(list(take(mixed, 50, size=lambda item: item))) == 50
    assert "short ended after 3; the other sources go on" in caplog.text


def test_a_budget_larger_than_the_sources_is_said(caplog):
    assert list(take(iter([4, 4]), 100, size=lambda item: item)) == [4, 4]
    assert "the sources ended after 8 of 100" in caplog.text


def test_shuffling_keeps_every_document_in_a_bounded_buffer(monkeypatch):
    monkeypatch.setattr("tokenizer.mixture.SHUFFLED_AT_ONCE", 1000)
    read = []

    def documents():
        for number in range(100):
            read.append(number)
            yield f"{number:>100}"

    shuffled = shuffle(documents(), random.Random(0))
    first = next(shuffled)
    assert len(read) == 11, "no more than the buffer is read ahead"
    texts = [first, *shuffled]
    assert sorted(map(int, texts)) == list(range(100))
    assert texts != sorted(texts)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.txt@0.5", "b.txt"], "b.txt has no share, others have. Write b.txt@0.5"),
        (["a.txt@0", "b.txt@1"], "a.txt@0: the share '0' must be a number above 0"),
        (["a.txt@-1"], "the share '-1' must be a number above 0"),
        (["a.txt@1.2.3"], "the share '1.2.3' must be a number above 0"),
        (["a.txt@1", "a.txt@2"], "a.txt is named twice"),
    ],
)
def test_wrong_shares_are_refused(files, message):
    with pytest.raises(ValueError, match=message):
        parse_shares(files)


def test_shares_of_any_scale_and_names_with_colons():
    shares = parse_shares(["allenai/c4:en@6", "wikimedia/wikipedia:20231101.en@3", "x@1e0"])
    assert shares == pytest.approx(
        {"allenai/c4:en": 0.6, "wikimedia/wikipedia:20231101.en": 0.3, "x": 0.1}
    )
    assert parse_shares(["a.txt", "me@home.txt"]) == {"a.txt": 0.5, "me@home.txt": 0.5}


def test_shares_need_a_budget_and_it_must_be_positive():
    with pytest.raises(ValueError, match="there is no max_tokens.*--max_tokens 1_000_000"):
        check_budget(["a.txt@1"], None, "max_tokens")
    with pytest.raises(ValueError, match="max_bytes=0 must be above 0"):
        check_budget(["a.txt"], 0, "max_bytes")


def test_a_tokenizer_is_trained_on_a_mixture(monkeypatch, sources, tmp_path):
    from tokenizer import train

    monkeypatch.setattr(sys, "argv", ["train"])
    seen, real = [], train.train_bpe

    def record(documents, *sizes):
        seen.extend(documents)
        return real(seen, *sizes)

    monkeypatch.setattr(train, "train_bpe", record)
    files = [f"{sources}/web.jsonl@1", f"{sources}/poems.jsonl@3"]
    arguments = {"data_files": files, "max_bytes": 20_000, "vocab_size": 300}
    train.main(train.TokenizerArguments(output_dir=str(tmp_path / "t"), **arguments))
    chinese = sum(len(text.encode()) for text in seen if "小河" in text)
    total = sum(len(text.encode()) for text in seen)
    assert 20_000 <= total < 20_100
    assert chinese / total == pytest.approx(0.75, abs=0.01)
    record = json.loads((tmp_path / "t/run.json").read_text())
    assert record["held_out"] is True


def test_hub_names_are_asked_of_the_mirror(tmp_path):
    """`HF_ENDPOINT` decides who is asked; a mirror without the data set is a plain error."""
    asked = []

    class Mirror(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = "from tokenizer.corpus import read_documents; next(read_documents('someone/texts:en'))"
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0", "HF_HOME": str(tmp_path), "no_proxy": "127.0.0.1",
    }  # fmt: skip
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    server.shutdown()
    assert any("someone/texts" in path for path in asked), (asked, done.stderr)
    assert "FileNotFoundError: someone/texts:en: no such file, nor does the Hub" in done.stderr
