"""Reading rows and documents, the error messages, and the split."""

import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from tokenizer import formats
from tokenizer.corpus import list_files, read_documents, read_rows, split_documents

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return write


def read_all(data_files, **options):
    return [(row.source.rsplit("/", 1)[-1], row.value) for row in read_rows(data_files, **options)]


ROWS = [{"text": "你好"}, {"text": "a\nb"}]


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("x.jsonl", '{"text": "你好"}\n\n{"text": "a\\nb"}\n', (1, 3)),
        ("x.jsonl.gz", '{"text": "你好"}\n{"text": "a\\nb"}', (1, 2)),
        ("x.json", '\n[\n  {"text": "你好"},\n\n  {"text":\n "a\\nb"}\n]\n', (3, 5)),
        ("x.json", '["你好", "a\\nb"]', (1, 1)),
        ("x.json", '{"text": "你好"}\n{"text": "a\\nb"}\n', (1, 2)),
        ("x.csv", 'text\n你好\n"a\nb"\n', (2, 3)),
        ("X.CSV", '\ufefftext,,\r\n你好,,\r\n"a\r\nb",,\r\n', (2, 3)),
    ],
)
def test_read_rows(write, name, content, lines):
    expected = [(f"{name}:{line}", row) for line, row in zip(lines, ROWS, strict=True)]
    assert read_all(write(name, content)) == expected


def test_bom_and_crlf(write):
    path = write("x.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert list(read_documents(path)) == ["a", "b"]
    assert list(read_documents(write("x.txt", b"\xef\xbb\xbfa\r\nb\r\n"))) == ["a\nb\n"]


def test_parquet_and_gz(tmp_path, write):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    expected = [("x.parquet:1", ROWS[0]), ("x.parquet:2", ROWS[1])]
    assert read_all(str(tmp_path / "x.parquet")) == expected
    zipped = write("y.parquet.gz", (tmp_path / "x.parquet").read_bytes())
    assert [value for _, value in read_all(zipped)] == ROWS
    with pytest.raises(ValueError, match="z.parquet: not a readable parquet"):
        read_all(write("z.parquet", "PAR?"))


def test_tsv_has_no_quotes_and_perhaps_no_header(write):
    assert read_all(write("a.tsv", 'q\ta\n"hi\t1\n')) == [("a.tsv:2", {"q": '"hi', "a": "1"})]
    row = {"column_1": "How many?", "column_2": "1"}
    assert read_all(write("b.tsv", "How many?\t1\n")) == [("b.tsv:1", row)]
    named = read_all(write("c.tsv", "ham\tok\n"), columns=["label", "text"])
    assert named == [("c.tsv:1", {"label": "ham", "text": "ok"})]


def test_csv_cell_beyond_the_limit_of_the_library(write):
    long = "a" * 200_000
    assert list(read_documents(write("x.csv", f"text\n{long}\n"))) == [long]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", "", r"x.txt: it is empty"),
        ("x.json", "[]", r"x.json: it is empty"),
        ("x.jsonl", "\n", r"x.jsonl: it is empty"),
        ("x.doc", "a", r"x.doc: unknown ending '.doc'.*\.jsonl.*\.gz"),
        ("x", "a", r"x: unknown ending ''.*Rename.*looks like \.txt"),
        ("x", "ham\ta\n", r"x: unknown ending ''.*looks like \.tsv"),
        ("x.dat", '{"a": 1}\n', r"x.dat: unknown ending '.dat'.*looks like \.jsonl"),
        ("x.txt", b"a\nb\xe9c\n", r"x.txt:2: not UTF-8 \(byte 0xe9\).*cp1252.*iconv"),
        ("x.csv", b"text\n\xa3\n", r"x.csv:2: not UTF-8.*iconv"),
        ("x.txt", "a".encode("utf-16"), r"x.txt:1: not UTF-8.*encoding utf-16"),
        ("x.jsonl", '{"a": 1}\n{"a": oops}\n', r"x.jsonl:2: malformed JSON at column 7.*oops"),
        ("x.json", '[{"a": 1},\n\n{"a" 2}]', r"x.json:3: malformed JSON at column 6.*a\" 2"),
        ("x.json", '[{"a":\n1\n"b"}]', r"x.json:3: malformed JSON at column 1.*delimiter"),
        ("x.json", '[{"a": 1},\n{"a": 2}', r"x.json:2: an array must end with '\]'"),
        ("x.json", '[{"a": 1}]\nmore', r"x.json:1: an array must end with '\]'"),
        ("x.jsonl", '{"a": 1}\n7\n', r"x.jsonl:2: a row must be an object.*not 7"),
        ("x.jsonl", '{"a": "\\ud83d"}', r"x.jsonl:1: half of a surrogate pair"),
        ("x.csv", "a,b\n1,2\n1,2,3\n", r"x.csv:3: 3 cells .*2 columns"),
        ("x.csv", "a,b\n1\n", r"x.csv:2: 1 cells .*2 columns"),
        ("x.csv", "a,\n1,2\n", r"x.csv:2: the cell '2' stands in a column without a name"),
        ("x.csv", "a,b,a\n1,2,3\n", r"x.csv:1: the header names the column 'a' twice"),
        ("x.tsv", "a\ta\n1\t2\n", r"x.tsv:1: the header names the column 'a' twice"),
        ("x.csv", "a,b\r1,2\r", r"x.csv:1: .*CR alone.*tr '\\r' '\\n' < x.csv"),
        ("x.csv", "a,b\n1,x\ry\n", r"x.csv:2: .*CR alone"),
        ("x.tsv", "a\tb\r1\t2\r", r"x.tsv:1: CR alone"),
        ("x.csv", 'a\n"b\n', r"x.csv:2: malformed row"),
    ],
)
def test_bad_file(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_all(write(name, content))


def test_broken_gzip(write):
    path = write("x.txt.gz", "hello" * 100)
    Path(path).write_bytes(Path(path).read_bytes()[:-9])
    with pytest.raises(ValueError, match="x.txt.gz: broken gzip"):
        read_all(path)
    Path(path).write_bytes(b"hello")
    with pytest.raises(ValueError, match="x.txt.gz: broken gzip"):
        read_all(path)


def test_list_files(write, tmp_path, caplog):
    b, a = write("d/b.txt", "b"), write("d/sub/a.jsonl.gz", "{}")
    write("d/README.md", "no data"), write("d/.hidden.txt", "x")
    assert list_files(str(tmp_path / "d")) == [Path(b), Path(a)]
    assert "README.md" in caplog.text
    assert list_files([str(tmp_path / "d/*.txt")]) == [Path(b)]
    assert list_files(tmp_path / "d" / "b.txt") == [Path(b)]
    with pytest.raises(ValueError, match="b.txt: named twice"):
        list_files([b, str(tmp_path / "d")])
    with pytest.raises(ValueError, match="names no file"):
        list_files([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no data file"):
        list_files(str(tmp_path / "empty"))


def test_missing_file(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no/where.txt: no such file"):
        list(read_rows("no/where.txt"))
    monkeypatch.chdir(tmp_path)
    for name in ("data/generated", "data/generated/x.jsonl"):
        with pytest.raises(FileNotFoundError, match=r"python data/generate.py"):
            list(read_rows(name))
    (tmp_path / "data/generated").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"python data/generate.py"):
        list_files("data/generated")
    with pytest.raises(FileNotFoundError) as error:
        list(read_rows("nothing*.txt"))
    assert "generate.py" not in str(error.value)


def test_hub_and_saved_data_sets(tmp_path, monkeypatch):
    class FakeDatasets:
        @staticmethod
        def load_dataset(*args, **options):
            if args[0] == "user/gone":
                raise ConnectionError("no network")
            return [{"text": repr((args, options))}]

        @staticmethod
        def load_from_disk(path):
            return {"train": []} if path.endswith("both") else [{"text": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    source, value = read_all("allenai/c4:en")[0]
    assert source == "c4:en:1"
    assert "('allenai/c4', 'en'), {'split': 'train', 'streaming': False}" in value["text"]
    assert "'streaming': True" in next(read_documents("allenai/c4:en"))
    assert "'split': 'test'" in read_all("allenai/c4:en:test")[0][1]["text"]
    with pytest.raises(FileNotFoundError, match=r"user/gone: .*network.*: no network"):
        read_all("user/gone")
    for name, mark in (("one", "state.json"), ("both", "dataset_dict.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / mark).write_text("{}")
    assert read_all(str(tmp_path / "one")) == [("one:1", {"text": "a"})]
    with pytest.raises(ValueError, match=r"both: holds the splits \['train'\]"):
        read_all(str(tmp_path / "both"))


def test_real_saved_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert list(read_documents(str(tmp_path / "saved"))) == ["你好", "a\nb"]


def test_documents_fields_and_counts(write):
    rows = [{"text": "a"}, {"content": "b"}, {"paragraphs": ["c", "d"]}, {"text": " "}]
    rows += [{"text": None}, {"text": "e", "content": "not this"}]
    path = write("x.json", json.dumps(rows))
    documents = read_documents(path)
    assert list(documents) == ["a", "b", "c\nd", "e"]
    assert (documents.read, documents.empty) == (4, 2)
    with pytest.raises(ValueError, match=r"x.json:1: no field body.*\['text'\].*\"body\": "):
        next(read_documents(path, text_field="body"))
    with pytest.raises(ValueError, match=r"y.jsonl:1: field 'text' must be a text.*not 7"):
        next(read_documents(write("y.jsonl", '{"text": 7}')))


def test_txt_documents(write, monkeypatch):
    path = write("x.txt", "a\nb\n\n\nc\n")
    assert list(read_documents(path)) == ["a\nb\n\n\nc\n"]
    assert list(read_documents(path, txt_documents="line")) == ["a", "b", "c"]
    assert list(read_documents(path, txt_documents="paragraph")) == ["a\nb\n", "c\n"]
    assert list(read_documents(write("x.dev", "a\nb\n"))) == ["a", "b"]
    with pytest.raises(ValueError, match=r"txt_documents='word'.*paragraph"):
        read_documents(path, txt_documents="word")
    monkeypatch.setattr(formats, "LARGEST_DOCUMENT", 3)
    assert list(read_documents(path)) == ["a\nb\n", "\n\nc\n"]


def test_inputs_are_not_written(write):
    path = write("x.jsonl", '{"text": "a"}\n')
    os.chmod(path, 0o444)
    before = Path(path).stat().st_mtime_ns
    assert list(read_documents(path)) == ["a"]
    assert Path(path).stat().st_mtime_ns == before


def test_split_by_hash():
    documents = [f"document {number}" for number in range(2000)]
    train, validation = split_documents(documents + documents[:50], 0.1)
    assert 150 < len(set(validation)) < 250
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(documents + documents[:50])
    again = split_documents(reversed(documents), 0.1)
    assert set(again[1]) == set(validation)
    assert set(split_documents(documents, 0.1, seed=1)[1]) != set(validation)


def test_split_of_one_long_document():
    text = "".join(f"line {number}\n" for number in range(1000))
    train, validation = split_documents([text], 0.1)
    assert train[0] + validation[0] == text
    assert train[0].endswith("\n")
    assert 0.08 < len(validation[0]) / len(text) < 0.16
    solid = "x" * 1000
    assert split_documents([solid], 0.1) == (["x" * 900], ["x" * 100])


def test_split_cuts_a_play_among_short_documents():
    play = "To be or not to be\n" * 5000
    short = [f"poem {number}" for number in range(200)]
    train, validation = split_documents([*short, play], 0.1)
    assert 0.08 < max(map(len, validation)) / len(play) < 0.16
    assert sum(len(document) < 20 for document in validation) < 40


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_split_share(share):
    with pytest.raises(ValueError, match=f"validation_share={share} must lie between"):
        split_documents(["a b", "c d"], share)


def test_split_refuses_an_empty_side():
    with pytest.raises(ValueError, match=r"validation side is empty.*validation_share=0.0001"):
        split_documents(["a"] * 100, 0.0001)
    with pytest.raises(ValueError, match=r"train side is empty.*validation_share=0.1"):
        split_documents([], 0.1)


@needs_shared
@pytest.mark.parametrize(
    ("name", "options", "count", "empty"),
    [
        ("pretrain/tinyshakespeare.txt", {}, 1, 0),
        ("pretrain/the-verdict.txt", {}, 1, 0),
        ("pretrain/c4_demo.jsonl", {}, 300, 0),
        ("pretrain/wiki_demo.txt", {"txt_documents": "line"}, 30, 0),
        ("pretrain/tinystories_197k.txt", {"txt_documents": "paragraph"}, 1230, 0),
        ("pretrain/poet.tang.0.json", {}, 1000, 0),
        ("pretrain/ci.song.0.json", {}, 1000, 0),
        ("pretrain/flores101_eng.dev", {}, 997, 0),
        ("pretrain/flores101_zho_simpl.dev", {}, 997, 0),
        ("evaluation/wikitext2_valid.txt", {}, 1, 0),
        ("evaluation/arc_easy.jsonl", {"text_field": "query"}, 2376, 0),
        ("classification/fewclue_eprstmt_test_public.json", {"text_field": "sentence"}, 610, 0),
        ("messy/blns.json", {}, 513, 2),
    ],
)
def test_shared_documents(name, options, count, empty):
    documents = read_documents(str(SHARED / name), **options)
    texts = list(documents)
    assert (len(texts), documents.empty) == (count, empty)
    train, validation = split_documents(texts, 0.1)
    characters = sum(map(len, train + validation))
    assert 0.05 < sum(map(len, validation)) / characters < 0.16


@needs_shared
def test_shared_play_is_whole():
    path = SHARED / "pretrain/tinyshakespeare.txt"
    assert next(read_documents(str(path))) == path.read_text(encoding="utf-8")


@needs_shared
def test_shared_messy_tables():
    spectrum = SHARED / "messy/csv-spectrum"
    names = {path.name: list(read_rows(str(path))) for path in list_files(str(spectrum))}
    assert names["escaped_quotes.csv"][0].value == {"a": "1", "b": 'ha "ha" ha'}
    assert names["newlines_crlf.csv"][1].value["a"] == "Once upon \na time"
    assert names["utf8.csv"][1].value["c"] == "ʤ"
    with pytest.raises(ValueError, match=r"spam_kaggle.csv:\d+: not UTF-8.*iconv"):
        list(read_rows(str(SHARED / "messy/spam_kaggle.csv")))
    with pytest.raises(ValueError, match="SMSSpamCollection: unknown ending"):
        list(read_rows(str(SHARED / "classification/SMSSpamCollection")))


@needs_shared
@pytest.mark.parametrize("name", [
    "classification/SMSSpamCollection",
    "messy/SMSSpamCollection_crlf",
])
def test_shared_spam_as_tsv(name, tmp_path):
    (tmp_path / "spam.tsv").write_bytes((SHARED / name).read_bytes())
    rows = list(read_rows(str(tmp_path / "spam.tsv"), columns=["label", "text"]))
    assert len(rows) == 5574
    assert {row.value["label"] for row in rows} == {"ham", "spam"}
