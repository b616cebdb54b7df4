"""A record is carried exactly or rejected by file and line, whatever it is stored in and wherever the file is cut."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import records, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from vtmix import sources
from vtmix.config import validate
from vtmix.errors import RecordError
from vtmix.records import BadRecord, Turn, sample_id
from vtmix.sources import open_source, read_part

CHATS = [
    {
        "messages": [
            {"role": "system", "content": f"Answer briefly, {n}."},
            {"role": "user", "content": f"What is {n}?"},
            {"role": "assistant", "content": f"The number {n}."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
    }
    for n in range(9)
]
GOOD = b'{"prompt": "a", "response": "b"}'
CONVERSATION = (Turn("user", "a"), Turn("assistant", "b"))

# What a line says, and why it cannot be used.
BAD = {
    "not UTF-8": (b'{"prompt": "a\xff", "response": "b"}', "text is not UTF-8 (byte 0xff at column 14)"),
    "cut inside a character": (b'{"prompt": "\xc3', "text is not UTF-8 (byte 0xc3 at column 13)"),
    "lone surrogate": (
        b'{"prompt": "a", "response": "b\\ud800c"}',
        "'response' holds a lone surrogate at character 1, which UTF-8 cannot carry",
    ),
    "surrogate in a chat": (
        b'{"messages": [{"role": "assistant", "content": "\\udfff"}]}',
        "'messages[0].content' holds a lone surrogate at character 0, which UTF-8 cannot carry",
    ),
    "not JSON": (b"prompt: a", "not JSON: Expecting value (column 1)"),
    "cut off": (b'{"prompt": "a", "resp', "not JSON: Unterminated string starting at (column 17)"),
    "two records": (GOOD + GOOD, "not JSON: Extra data (column 33)"),
    "nested 100,000 deep": (b'{"prompt": ' + b"[" * 100_000, "not usable JSON: nested too deeply"),
    "a number of 5,000 digits": (
        b'{"prompt": "a", "response": "b", "id": ' + b"1" * 5000 + b"}",
        "not usable JSON: a number has too many digits",
    ),
    "a list": (b'["a", "b"]', "expected an object with fields, found a list"),
    "null": (b"null", "expected an object with fields, found null"),
    "missing field": (
        b'{"prompt": "a", "answer": "b"}',
        "no field 'response' (nor 'messages'): found 'prompt', 'answer'; name the fields in the source's settings",
    ),
    "no field": (
        b"{}",
        "no field 'prompt' and 'response' (nor 'messages'): found none; name the fields in the source's settings",
    ),
    "null field": (
        b'{"prompt": "a", "response": null}',
        "no field 'response' (nor 'messages'): found 'prompt', 'response'; name the fields in the source's settings",
    ),
    "a number for text": (b'{"prompt": "a", "response": 7}', "'response' is a number, expected text"),
    "an object for text": (b'{"prompt": {"a": 1}, "response": "b"}', "'prompt' is an object, expected text"),
    "empty text": (b'{"prompt": "a", "response": ""}', "'response' is empty"),
    "only white space": (b'{"prompt": " \\n\\u00a0", "response": "b"}', "'prompt' is empty"),
    "a string for a chat": (b'{"messages": "hello"}', "'messages' is a string, expected a list of {role, content}"),
    "an empty chat": (b'{"messages": []}', "'messages' has no assistant turn, so there is nothing to learn from"),
    "a chat without an answer": (
        b'{"messages": [{"role": "user", "content": "a"}]}',
        "'messages' has no assistant turn, so there is nothing to learn from",
    ),
    "a turn that is a string": (b'{"messages": ["a"]}', "'messages[0]' is a string, expected {role, content}"),
    "a turn of other fields": (
        b'{"messages": [{"from": "gpt", "value": "a"}]}',
        "'messages[0]' has the fields 'from', 'value', expected 'role' and 'content'",
    ),
    "an unknown role": (
        b'{"messages": [{"role": "tool", "content": "a"}]}',
        "'messages[0]' has role 'tool', expected one of system, user, assistant",
    ),
}


def configured(folder, source):
    """A configuration in a folder, with one source."""
    config = validate({"model": "none", "domains": {"law": {"train": source}}}, folder / "mixture.yaml")
    return config.domains["law"].train[0], config


def parts(folder, source):
    return open_source(*configured(folder, source)).parts


def read(folder, source):
    """Everything a source holds: conversations with where they stand, and bad records."""
    return [item for part in parts(folder, source) for item in read_part(part)]


def conversations(folder, source):
    return [item[1] for item in read(folder, source)]


def read_bytes(folder, content):
    (folder / "x.jsonl").write_bytes(content)
    return read(folder, "x.jsonl")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Hugging Face's datasets, with a cache of its own."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield datasets


@pytest.mark.parametrize("rows", [records("law", 9), CHATS], ids=["exchanges", "chats"])
def test_every_format_gives_the_same_conversations(hub, tmp_path, rows):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(tmp_path / "lines" / "train.jsonl", rows)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "tables").mkdir()
    pq.write_table(table, tmp_path / "tables" / "train.parquet")
    saved = hub.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "saved")
    hub.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "splits")
    expected = conversations(tmp_path, "rows.jsonl")
    assert len(expected) == 9
    assert all(turn.content in json.dumps(rows) for turns in expected for turn in turns)
    assert conversations(tmp_path, "rows.parquet") == expected
    for name in ("saved", "splits", "lines", "tables"):
        assert conversations(tmp_path, {"dataset": name}) == expected, name
    assert conversations(tmp_path, {"dataset": "splits", "split": "test"}) == expected[:1]


def test_a_dataset_has_one_digest_however_it_is_stored(hub, tmp_path):
    rows = records("law", 9)
    write_jsonl(tmp_path / "lines" / "train.jsonl", rows)
    hub.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    hub.Dataset.from_list(rows[:5] + rows[:4]).save_to_disk(tmp_path / "other")
    found = [
        next(iter(open_source(*configured(tmp_path, {"dataset": name})).digests.values()))
        for name in ("lines", "saved", "other")
    ]
    assert found[0] == found[1] != found[2]


def test_a_dataset_that_changes_is_read_anew(hub, tmp_path):
    hub.Dataset.from_list(records("law", 3)).save_to_disk(tmp_path / "saved")
    before = open_source(*configured(tmp_path, {"dataset": "saved"}))
    hub.Dataset.from_list(records("law", 5)).save_to_disk(tmp_path / "saved")
    after = open_source(*configured(tmp_path, {"dataset": "saved"}))
    assert before.digests != after.digests
    assert len([item for part in after.parts for item in read_part(part)]) == 5


def test_columns_beside_the_fields_are_not_decoded(hub, tmp_path):
    rows = [{**row, "picture": {"bytes": b"no picture", "path": None}} for row in records("law", 3)]
    features = hub.Features(prompt=hub.Value("string"), response=hub.Value("string"), picture=hub.Image())
    hub.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    assert len(conversations(tmp_path, {"dataset": "saved"})) == 3


def test_a_dataset_names_the_splits_it_has(hub, tmp_path):
    rows = hub.Dataset.from_list(records("law", 3))
    hub.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "splits")
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(RecordError, match=r"split 'val'\) cannot be loaded: it holds the splits 'train', 'test'"):
        read(tmp_path, {"dataset": "splits", "split": "val"})
    with pytest.raises(RecordError, match=r"split 'val'\) cannot be loaded: it holds the splits 'train'"):
        read(tmp_path, {"dataset": "saved", "split": "val"})


def test_a_dataset_that_cannot_be_loaded_is_named(hub, tmp_path):
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text('{"prompt": "a"')
    with pytest.raises(RecordError, match=r"dataset '.*lines' \(split 'train'\) cannot be loaded: "):
        read(tmp_path, {"dataset": "lines"})
    with pytest.raises(RecordError, match=r"dataset 'no/where' \(split 'train'\) cannot be loaded: "):
        read(tmp_path, {"dataset": "no/where"})


def test_field_names_are_settings_of_the_source(tmp_path):
    row = {"question": "a", "answer": "b", "prompt": "not this", "response": "nor this"}
    fields = {"prompt": "question", "response": "answer"}
    write_jsonl(tmp_path / "x.jsonl", [row])
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    assert conversations(tmp_path, {"path": "x.jsonl", **fields}) == [CONVERSATION]
    assert conversations(tmp_path, {"path": "x.parquet", **fields}) == [CONVERSATION]
    write_jsonl(tmp_path / "chat.jsonl", [{"talk": CHATS[0]["messages"]}])
    (turns,) = conversations(tmp_path, {"path": "chat.jsonl", "messages": "talk"})
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_by_file_line_and_reason(tmp_path, name):
    line, why = BAD[name]
    assert read_bytes(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD) == [
        ("x.jsonl:1", CONVERSATION),
        BadRecord("x.jsonl:2", why),
        ("x.jsonl:3", CONVERSATION),
    ]


def test_all_bad_records_are_named_together(tmp_path, monkeypatch):
    content = b"".join(GOOD + b"\n" + line + b"\n" for line, _ in BAD.values())
    expected = [BadRecord(f"x.jsonl:{2 * n}", why) for n, (_, why) in enumerate(BAD.values(), 1)]
    for part_bytes in (100, 4 << 20):
        monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
        found = read_bytes(tmp_path, content)
        assert [item for item in found if isinstance(item, BadRecord)] == expected
        assert len(found) == 2 * len(BAD)


@pytest.mark.parametrize(
    ("content", "lines"),
    {
        "no newline at the end": (GOOD + b"\n" + GOOD, [1, 2]),
        "CRLF": (GOOD + b"\r\n" + GOOD + b"\r\n", [1, 2]),
        "byte order mark": (b"\xef\xbb\xbf" + GOOD + b"\n", [1]),
        "blank lines": (b"\n" + GOOD + b"\n \r\n\n" + GOOD + b"\n\n", [2, 5]),
        "nothing but a byte order mark": (b"\xef\xbb\xbf", []),
        "nothing": (b"", []),
        "further fields": (b'{"id": 1, "prompt": "a", "response": "b", "tags": [null]}', [1]),
    }.values(),
    ids=str,
)
def test_what_is_no_part_of_a_record_changes_nothing(tmp_path, content, lines):
    assert read_bytes(tmp_path, content) == [(f"x.jsonl:{line}", CONVERSATION) for line in lines]


@pytest.mark.parametrize(
    "text", ["a\0b", "\0", "\ufeffa", "a\u2028b\x85c\r\nd", "𝕬😀e\u0301", " a ", "a" * 10_000_000], ids=lambda t: t[:9]
)
def test_text_is_carried_exactly(tmp_path, text):
    row = {"prompt": text, "response": text}
    for ascii_only in (True, False):
        (tmp_path / "x.jsonl").write_text(json.dumps(row, ensure_ascii=ascii_only), encoding="utf-8")
        assert conversations(tmp_path, "x.jsonl") == [(Turn("user", text), Turn("assistant", text))]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    assert conversations(tmp_path, "x.parquet") == [(Turn("user", text), Turn("assistant", text))]


LINES = {line: why for line, why in BAD.values() if len(line) < 200} | {
    GOOD: None,
    b"": None,
    b"  ": None,
    '{"prompt": "ä\u2028😀", "response": "b"}'.encode(): None,
}


@settings(deadline=None)
@given(
    lines=st.lists(st.sampled_from(sorted(LINES)), max_size=12),
    ends=st.sampled_from([b"\n", b"\r\n"]),
    last=st.booleans(),
    mark=st.booleans(),
    part_bytes=st.integers(1, 300),
)
def test_records_and_line_numbers_do_not_depend_on_where_a_file_is_cut(
    tmp_path_factory, lines, ends, last, mark, part_bytes
):
    content = (b"\xef\xbb\xbf" if mark else b"") + ends.join(lines) + (ends if last else b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PART_BYTES", part_bytes)
        found = read_bytes(tmp_path_factory.getbasetemp(), content)
    assert [
        (item[0].removeprefix("x.jsonl:"), item.why if isinstance(item, BadRecord) else None) for item in found
    ] == [(str(number), LINES[line]) for number, line in enumerate(lines, 1) if line.strip()]


@settings(deadline=None)
@given(rows=st.integers(1, 20), group=st.integers(1, 20), part_rows=st.integers(1, 20))
def test_rows_do_not_depend_on_row_groups_or_parts(tmp_path_factory, rows, group, part_rows):
    folder = tmp_path_factory.getbasetemp()
    table = pa.Table.from_pylist([{"prompt": f"p{n}", "response": f"r{n}"} for n in range(rows)])
    pq.write_table(table, folder / "x.parquet", row_group_size=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PART_ROWS", part_rows)
        found = read(folder, "x.parquet")
    assert found == [(f"x.parquet:{n + 1}", (Turn("user", f"p{n}"), Turn("assistant", f"r{n}"))) for n in range(rows)]


def test_parts_are_small_whatever_the_rows_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 1000)
    rows = [{"prompt": f"{n}", "response": f"{n}" * 2000} for n in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", compression="none", use_dictionary=False)
    assert all(part.stop - part.start == 1 for part in parts(tmp_path, "x.parquet"))


def test_a_bad_row_of_a_table_is_named(tmp_path):
    raw = pa.array([b"a", b"\xff", b"c", b"d"])
    prompts = pa.StringArray.from_buffers(4, *raw.buffers()[1:])
    table = pa.table({"prompt": prompts, "response": ["b", "b", None, ""]})
    pq.write_table(table, tmp_path / "x.parquet")
    assert read(tmp_path, "x.parquet") == [
        ("x.parquet:1", CONVERSATION),
        BadRecord("x.parquet:2", "text is not UTF-8 (byte 0xff at column 1)"),
        BadRecord("x.parquet:3", BAD["null field"][1]),
        BadRecord("x.parquet:4", "'response' is empty"),
    ]
    pq.write_table(pa.table({"question": ["a"], "prompt": ["a"]}), tmp_path / "y.parquet")
    (bad,) = read(tmp_path, "y.parquet")
    assert "found 'question', 'prompt'" in bad.why


def test_a_damaged_parquet_file_is_named(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"] * 9, "response": ["b"] * 9}), tmp_path / "x.parquet", compression="none")
    whole = (tmp_path / "x.parquet").read_bytes()
    for damaged in (b"", whole[:-8], whole[: len(whole) // 2], b"\0" * 60 + whole[60:]):
        (tmp_path / "x.parquet").write_bytes(damaged)
        with pytest.raises(RecordError, match=r"^x.parquet: not readable as Parquet: "):
            read(tmp_path, "x.parquet")


def test_a_glob_takes_all_its_files_in_the_order_of_their_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c/a.jsonl"):
        write_jsonl(tmp_path / "data" / name, [{"prompt": name, "response": "b"}])
    assert [item[0] for item in read(tmp_path, "data/**/*.jsonl")] == [
        "data/a.jsonl:1",
        "data/b.jsonl:1",
        "data/c/a.jsonl:1",
    ]
    write_jsonl(tmp_path / "[ab].jsonl", [{"prompt": "a", "response": "b"}])
    assert [item[0] for item in read(tmp_path, "[ab].jsonl")] == ["[ab].jsonl:1"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("data/none.jsonl", "data/none.jsonl: no such file (looked for {folder}/data/none.jsonl)"),
        ("data/*.parquet", "data/*.parquet: no such file (looked for {folder}/data/*.parquet)"),
        ("data", "data: is a folder: name its files (data/*.jsonl), or give it as `dataset`"),
        ("data/*", "{folder}/data/x.csv: expected a name ending in .jsonl or .parquet"),
    ],
)
def test_a_path_that_cannot_be_read_says_so(tmp_path, path, message):
    write_jsonl(tmp_path / "data" / "x.csv", [])
    with pytest.raises(RecordError) as error:
        read(tmp_path, path)
    assert str(error.value) == message.format(folder=tmp_path)


def test_files_are_named_as_seen_from_the_configuration(tmp_path):
    write_jsonl(tmp_path / "data" / "x.jsonl", [{}])
    source = open_source(*configured(tmp_path / "run", "../data/x.jsonl"))
    assert list(source.digests) == ["../data/x.jsonl"]
    assert next(read_part(source.parts[0])).where == "../data/x.jsonl:1"


def test_equal_content_is_one_sample_whatever_the_fields():
    assert sample_id(CONVERSATION) == sample_id((Turn("user", "a"), Turn("assistant", "b")))
    different = [
        CONVERSATION,
        (Turn("user", "b"), Turn("assistant", "a")),
        (Turn("user", "a"), Turn("assistant", "b ")),
        (Turn("system", "a"), Turn("assistant", "b")),
        (Turn("user", 'a","assistant","b'), Turn("assistant", "b")),
    ]
    assert len({sample_id(turns) for turns in different}) == len(different)
