"""Compression, encodings, bad rows, and what the messy files of other people hold."""

import gzip
import io
import json
import logging
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

from tokenizer import formats
from tokenizer.bad_rows import BadRows
from tokenizer.corpus import read_documents, read_rows

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")
# Long enough to tell an encoding by; from data/handwritten's world, in two languages.
CHINESE = "小河流过磨坊，村里的人都喜欢在那里散步。\n今天天气很好，我们去山上看花。\n"
WESTERN = "The café by the mill costs £5, señor; the naïve façade was über-expensive.\n"


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        data = content.encode() if isinstance(content, str) else content
        if name.endswith(".gz"):
            data = gzip.compress(data)
        if name.endswith(".zst"):
            sink = pa.BufferOutputStream()
            with pa.CompressedOutputStream(sink, "zstd") as stream:
                stream.write(data)
            data = sink.getvalue().to_pybytes()
        path.write_bytes(data)
        return str(path)

    return write


def places(rows):
    return [row.source.rsplit(":", 1)[1] for row in rows]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", "a\nb\n"),
        ("x.jsonl", '{"text": "a\\nb\\n"}\n'),
        ("x.json", '[{"text": "a\\nb\\n"}]'),
        ("x.csv", 'text\n"a\nb\n"\n'),
        ("x.tsv", "id\ttext\n1\ta b\n"),
    ],
)
def test_every_text_format_compressed(write, name, content, ending):
    expected = ["a b"] if name == "x.tsv" else ["a\nb\n"]
    assert list(read_documents(write(name + ending, content))) == expected


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_parquet_compressed_once_more(write, ending):
    sink = io.BytesIO()
    pa.parquet.write_table(pa.table({"text": ["a", "b"]}), sink)
    assert list(read_documents(write("x.parquet" + ending, sink.getvalue()))) == ["a", "b"]


def test_zstandard_in_several_frames_and_broken(write):
    path = Path(write("x.txt.zst", "a\n" * 1000))
    whole = path.read_bytes()
    path.write_bytes(whole * 2)
    assert list(read_documents(str(path))) == ["a\n" * 2000]
    for broken in (whole[:-5], b"hello"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="x.txt.zst: broken zstandard file.*fetch it again"):
            list(read_documents(str(path)))


def test_another_encoding_is_named_and_read_only_when_asked_for(write, caplog):
    path = write("x.txt", (CHINESE * 3).encode("gb18030"))
    with pytest.raises(ValueError, match="x.txt:1: not UTF-8.*looks like gb18030.*小河.*iconv"):
        list(read_documents(path))
    assert list(read_documents(path, encoding="gb18030")) == [CHINESE * 3]
    assert not caplog.records
    assert list(read_documents(path, encoding="auto")) == [CHINESE * 3]
    assert "read as gb18030: '小河" in caplog.text


@pytest.mark.parametrize("encoding", ["cp1252", "big5", "utf-16", "utf-16-le", "cp1251"])
def test_auto_finds_the_encoding(write, encoding):
    text = {"cp1252": WESTERN, "big5": "小河流過磨坊，村裡的人都喜歡在那裡散步。\n"}.get(encoding)
    text = text or ("Река течёт мимо мельницы.\n" if encoding == "cp1251" else CHINESE)
    path = write("x.csv", ('id,text\n1,"' + text * 4 + '"\n').encode(encoding))
    assert list(read_documents(path, encoding="auto")) == [text * 4]


def test_auto_leaves_utf8_alone_however_late_it_shows(write, caplog):
    path = write("x.txt", "\ufeff" + "plain\n" * 50_000 + "小河\r\n")
    assert next(read_documents(path, encoding="auto")).endswith("plain\n小河\n")
    assert not caplog.records


def test_wrong_encodings_are_refused(write):
    utf8 = write("x.txt", CHINESE)
    with pytest.raises(ValueError, match="x.txt: not ascii, which.*It is UTF-8: leave"):
        list(read_documents(utf8, encoding="ascii"))
    with pytest.raises(ValueError, match="encoding='klingon' is none that Python knows.*cp1252"):
        list(read_documents(utf8, encoding="klingon"))
    with pytest.raises(ValueError, match="finds none. Too little to tell"):
        list(read_documents(write("y.txt", b"caf\xe9\n"), encoding="auto"))
    with pytest.raises(ValueError, match="z.txt:1: not UTF-8.*byte 0x00"):
        list(read_documents(write("z.txt", "plain".encode("utf-16-le")), encoding=None))


def test_utf8_is_not_read_as_another_encoding(write):
    """Most of its bytes are letters there as well, so nothing would fail."""
    files = [write("a.txt", (CHINESE * 3).encode("gb18030")), write("b.txt", CHINESE)]
    for encoding in ("gb18030", "latin-1"):
        with pytest.raises(ValueError, match=f"b.txt: not {encoding}.*pass --encoding auto"):
            list(read_documents(files, encoding=encoding))
    assert list(read_documents(files, encoding="auto")) == [CHINESE * 3, CHINESE]
    with pytest.raises(ValueError, match="c.txt: not gb18030.*It is UTF-8"):
        list(read_documents(write("c.txt", "\ufeffplain\n"), encoding="gb18030"))
    for content, encoding in (("\ufeffplain\n", "utf-8-sig"), ("plain\n", "gb18030")):
        assert list(read_documents(write("d.txt", content), encoding=encoding)) == ["plain\n"]
    wide = write("e.txt", CHINESE.encode("utf-16-le"))
    assert list(read_documents(wide, encoding="utf-16-le")) == [CHINESE]


def test_one_nul_does_not_make_a_text_utf16(write, caplog):
    path = write("x.txt", "a plain\0 text\nof two lines\n" * 20)
    for encoding in (None, "auto"):
        text = next(read_documents(path, encoding=encoding))
        assert text == "a plain\0 text\nof two lines\n" * 20 and not caplog.records


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv", "x.json"])
def test_packed_bytes_under_the_name_of_a_text_are_called_what_they_are(write, tmp_path, name):
    sink = io.BytesIO()
    pa.parquet.write_table(pa.table({"text": ["a", "b"]}), sink)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("x.txt", "a")
    packed = {
        rf"\.gz file. Rename it to {name}\.gz": gzip.compress(b"a"),
        rf"\.zst file. Rename it to {name}\.zst": Path(write("y.zst", "a")).read_bytes(),
        r"\.parquet file. Rename it to x\.parquet": sink.getvalue(),
        r"\.zip file. Unpack it": (tmp_path / "x.zip").read_bytes(),
    }
    for message, content in packed.items():
        for options in ({}, {"bad_rows": BadRows("skip")}, {"encoding": "latin-1"}):
            with pytest.raises(ValueError, match=f"{name}: no text: .*{message}"):
                list(read_documents(write(name, content), **options))
    with pytest.raises(ValueError, match=r"\.gz file. Unpack it"):
        list(read_documents(write("x.txt.gz", gzip.compress(b"a"))))


def test_bad_rows_are_counted_listed_and_written(write, tmp_path):
    good, half = '{"text": "a"}', '{"text": "\\ud83d"}'
    lines = [good, "{oops", '{"body": 1}', half, "[1, 2", '{"text": 7}', good.replace("a", "b")]
    path = write("x.jsonl", "\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    bad_rows = BadRows("skip")
    assert list(read_documents(path, bad_rows=bad_rows)) == ["a", "b"]
    found = [message.split(": ", 1)[0].rsplit(":", 1)[1] for message in bad_rows.messages]
    assert found == ["2", "3", "4", "5", "6", "8"] and bad_rows.count == 6
    assert 'such as {"text": "Once upon' in bad_rows.messages[0]
    bad_rows.report("prepare", tmp_path)
    assert len((tmp_path / "bad_rows.txt").read_text().splitlines()) == 6
    with pytest.raises(ValueError, match=r"x.jsonl:2: malformed JSON.*Expected an object a line"):
        list(read_documents(path))


def test_at_most_ten_bad_rows_are_shown():
    bad_rows = BadRows("skip")
    for number in range(25):
        bad_rows.refuse(f"x:{number}: bad")
    shown = str(bad_rows)
    assert shown.startswith("25 rows") and "x:9: bad" in shown and "x:10: bad" not in shown
    assert shown.endswith("... and 15 more")
    with pytest.raises(ValueError, match="on_bad_row='ignore'; choose raise or skip"):
        BadRows("ignore")


def test_bad_rows_of_tables_and_of_json(write):
    bad_rows = BadRows("skip")
    table = write("x.csv", 'text,n\na,1\nb\n"c"d,1\n"e\nf",2\n')
    values = [row.value["text"] for row in read_rows(table, bad_rows=bad_rows)]
    assert values == ["a", "e\nf"] and bad_rows.count == 2
    taken_in = write("y.csv", 'text,n\na,1\n"b,2\nc,3\nd",4,5\ne,6\n')
    assert [row.value["n"] for row in read_rows(taken_in, bad_rows=bad_rows)] == ["1", "6"]
    assert "y.csv:3: 3 cells" in bad_rows.messages[-1]
    assert "It goes on to line 5, in quotes. Expected a header" in bad_rows.messages.pop()
    bad_rows.count -= 1
    rows = write("x.json", '[{"text": "a"},\n7,\n{"text": "\\ud83d"},\n{"text": "b"}]')
    assert list(read_documents(rows, bad_rows=bad_rows)) == ["a", "b"] and bad_rows.count == 4
    lines = write("y.json", '{"text": "a"}\n{"text" 1}\n{"text": "b"}\n')
    assert list(read_documents(lines, bad_rows=bad_rows)) == ["a", "b"] and bad_rows.count == 5
    array = write("z.json", '[{"text": "a"},\n{"text" 1},\n{"text": "b"}]')
    with pytest.raises(ValueError, match="z.json:2.*cannot be skipped. Mend it, or write one"):
        list(read_documents(array, bad_rows=bad_rows))
    open_quote = write("q.csv", 'text,n\na,1\n"b,2\n' + "c,3\n" * 2000)
    with pytest.raises(ValueError, match=r"q.csv:3: .*up to line 2003 nothing closes.*nor skipped"):
        list(read_documents(open_quote, bad_rows=bad_rows))
    with pytest.raises(ValueError, match="w.jsonl: none of its 2 rows can be read"):
        list(read_documents(write("w.jsonl", "1\n2\n"), bad_rows=bad_rows))


def test_reading_goes_on_behind_a_position(write):
    lines = ['{"text": "a"}', "oops", '{"text": ""}', '{"text": "b"}', "{", '{"text": "c"}']
    path = write("x.jsonl", "\n".join(lines))
    first = read_documents(path, bad_rows=BadRows("skip"))
    assert (next(first), next(first), first.position) == ("a", "b", 3)
    rest = read_documents(path, bad_rows=BadRows("skip"), start=first.position)
    assert list(rest) == ["c"] and rest.position == 4
    assert [message.split(": ")[0][-1] for message in rest.bad_rows.messages] == ["5"]


def test_a_json_array_is_read_in_bounded_memory(write, monkeypatch):
    monkeypatch.setattr(formats, "JSON_CHUNK", 1000)
    rows = [{"text": f"{number} " + "\n" * (number % 3) + "x" * 990} for number in range(3000)]
    path = write("x.json", json.dumps(rows, indent=1).replace("\\n", "\\n"))
    tracemalloc.start()
    numbers = [int(row.value["text"].split()[0]) for row in read_rows(path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers == list(range(3000))
    assert peak < 600_000, "the file has 3 MB"
    sources = places(read_rows(path))
    assert sources[:3] == ["2", "5", "8"] and sources[-1] == str(2 + 3 * 2999)


def test_values_longer_than_a_chunk_and_errors_far_in(write, monkeypatch):
    monkeypatch.setattr(formats, "JSON_CHUNK", 64)
    long = "y" * 5000
    path = write("x.json", json.dumps([{"text": long}] * 3, indent=0))
    assert list(read_documents(path)) == [long] * 3
    broken = write("y.json", '[\n' + '{"text": "a"},\n' * 50 + '{"text" "b"}]')
    with pytest.raises(ValueError, match="y.json:52: malformed JSON"):
        list(read_documents(broken))


def test_deeply_nested_json_is_refused(write):
    with pytest.raises(ValueError, match="x.jsonl:1: JSON nested too deeply"):
        list(read_rows(write("x.jsonl", '{"a": ' + "[" * 200_000 + "\n")))


def test_a_number_too_long_for_python_is_a_bad_row(write):
    lines = '{"text": "a"}\n{"text": "b", "n": ' + "7" * 5000 + '}\n{"text": "c"}\n'
    for name in ("x.jsonl", "x.json"):
        with pytest.raises(ValueError, match=rf"{name}:2: a number of more than 4,300 digits; wri"):
            list(read_documents(write(name, lines)))
        assert list(read_documents(write(name, lines), bad_rows=BadRows("skip"))) == ["a", "c"]


@needs_shared
def test_shared_latin_file(caplog):
    path = str(SHARED / "messy/spam_kaggle.csv")
    with pytest.raises(ValueError, match=r"spam_kaggle.csv:\d+: not UTF-8.*looks like cp1252"):
        list(read_rows(path))
    bad_rows = BadRows("skip")
    caplog.set_level(logging.WARNING)
    rows = list(read_rows(path, encoding="auto", bad_rows=bad_rows))
    assert len(rows) + bad_rows.count == 5572 and "read as cp1252" in caplog.text
    assert any("£" in row.value["Message"] for row in rows)
    assert all("in a column without a name" in message for message in bad_rows.messages)
