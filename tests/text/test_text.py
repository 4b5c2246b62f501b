import csv
import io
import json
import logging
import os
import threading
from pydoc_data.topics import topics

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sparlow.errors import InputError
from sparlow.text import (
    CORPORA,
    beginning,
    calibration_windows,
    evaluation_windows,
    expected_windows,
    fingerprint,
    in_domain,
    same_source,
    training_windows,
)
from sparlow.text.reference import LanguageReference, split_topics

WORDS = 6_000
BOS, EOS, UNKNOWN = range(WORDS, WORDS + 3)
BUFFER = 1_000  # documents that shuffling a stream draws ahead


def word_tokenizer(*, eos=True):
    """Word n is token n, so that a window shows which words it holds; a whole text begins with BOS."""
    vocabulary = {str(word): word for word in range(WORDS)} | {"<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN}
    special = {"bos_token": "<s>", "unk_token": "<unk>"} | ({"eos_token": "</s>"} if eos else {})
    backend = Tokenizer(WordLevel(vocabulary, unk_token=special["unk_token"]))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **special)


@pytest.fixture
def words():
    return word_tokenizer()


@pytest.fixture
def letters():
    """Every byte is one token and no token is special, so that ids tell the exact text."""
    backend = Tokenizer(BPE({letter: byte for byte, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def spell(letters, windows):
    return letters.decode(windows.flatten(), clean_up_tokenization_spaces=False)


def count(first, last):
    return " ".join(map(str, range(first, last)))


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            content = "\n".join(json.dumps({"text": text}) for text in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


class Hub:
    """Stands for `datasets.load_dataset`; counts the rows that are drawn from real streamed data sets."""

    def __init__(self, **splits):
        self.splits = splits
        self.calls = []
        self.drawn = 0

    def __call__(self, path, name=None, **options):
        self.calls.append({"path": path, "name": name} | {k: v for k, v in options.items() if v is not None})
        return datasets.IterableDatasetDict(
            {
                split: datasets.IterableDataset.from_generator(self.draw, gen_kwargs={"split": split})
                for split in self.splits
            }
        )

    def draw(self, split):
        for row in self.splits[split]():
            self.drawn += 1
            yield row


@pytest.fixture
def hub(monkeypatch):
    def replace(**splits):
        stand_in = Hub(**splits)
        monkeypatch.setattr(datasets, "load_dataset", stand_in)
        return stand_in

    return replace


def many(text):
    return lambda: ({"text": text} for _ in range(50_000))


def rows(*texts, column="text"):
    return lambda: ({column: text} for text in texts)


def is_contiguous(window):
    return bool((window.diff() == 1).all())


# Calibration


@pytest.mark.parametrize("seqlen", [1, 7, 100])
def test_one_big_text_gives_windows_that_do_not_overlap(words, write, seqlen):
    text = write("big.txt", count(0, 3000))
    samples = 3000 // seqlen - 2
    windows = calibration_windows(text, words, samples=samples, seqlen=seqlen, seed=3)
    assert windows.shape == (samples, seqlen)
    assert windows.dtype == torch.int64
    ids = windows[windows != EOS]
    assert len(ids.unique()) == len(ids)
    assert sum(map(is_contiguous, windows)) >= samples - 1  # one may hold both ends of the text
    few = calibration_windows(text, words, samples=samples // 3, seqlen=seqlen, seed=3)[1:, 0].tolist()
    assert few != sorted(few)
    assert max(few) - min(few) > 1000  # from everywhere, not from the beginning


@pytest.mark.parametrize("seed", range(5))
def test_a_text_of_exactly_the_needed_length_is_enough(words, write, seed):
    windows = calibration_windows(write("exact.txt", count(0, 120)), words, samples=12, seqlen=10, seed=seed)
    assert windows.shape == (12, 10)
    assert set(range(120)) - set(windows.flatten().tolist()) <= {119}  # the joining token may push out the last


def test_too_little_text_is_refused_with_the_numbers(words, write):
    text = write("short.txt", count(0, 1234))
    with pytest.raises(InputError) as error:
        calibration_windows(text, words, samples=32, seqlen=512, seed=0)
    assert str(error.value) == (
        f"{text} holds 1,234 tokens; 32 samples of 512 need at least 16,384. "
        "Lower --samples or --seqlen, or give more text."
    )
    with pytest.raises(InputError, match="holds 118 tokens"):  # with 119, the token that joins both ends fills the gap
        calibration_windows(write("s.txt", count(0, 118)), words, samples=12, seqlen=10, seed=0)


def test_each_long_document_gives_one_window_before_any_gives_two(words, write):
    documents = [count(100 * n, 100 * n + 100) for n in range(40)] + ["5999"] * 40
    text = write("long.jsonl", documents)
    windows = calibration_windows(text, words, samples=40, seqlen=20, seed=0)
    assert all(map(is_contiguous, windows))
    visited = (windows[:, 0] // 100).tolist()
    assert sorted(visited) == list(range(40)) != visited
    offsets = windows[:, 0] % 100
    assert len(offsets.unique()) > 10
    assert offsets.max() - offsets.min() > 40
    more = calibration_windows(text, words, samples=60, seqlen=20, seed=0)
    assert torch.equal(more[:40], windows)
    assert len(more[more < 5999].unique()) == (more < 5999).sum()


def test_short_documents_are_packed_whole_and_in_visiting_order(write):
    text = write("short.jsonl", [count(5 * n, 5 * n + 5) for n in range(100)])
    windows = calibration_windows(text, word_tokenizer(), samples=6, seqlen=60, seed=0)
    for window in windows:
        pieces = [piece.split() for piece in " ".join(map(str, window.tolist())).split(str(EOS))]
        assert all(int(piece[0]) % 5 == 0 and len(piece) == 5 for piece in pieces[1:-1])
    plain = calibration_windows(text, word_tokenizer(eos=False), samples=6, seqlen=60, seed=0)
    assert EOS not in plain
    firsts = plain.view(-1, 5)[:, 0]
    assert sorted(firsts.tolist()) != firsts.tolist()
    assert torch.equal(plain.view(-1, 5), firsts[:, None] + torch.arange(5))


def test_long_and_packed_documents_together_use_every_token_once(words, write):
    documents = [count(0, 95), count(95, 99), count(99, 250), "", count(250, 300), "", "", ""]
    windows = calibration_windows(write("mixed.jsonl", documents), words, samples=6, seqlen=50, seed=1)
    ids = windows[windows != EOS]
    assert not ((windows[:, 1:] == EOS) & (windows[:, :-1] == EOS)).any()  # empty documents leave nothing
    assert len(ids.unique()) == len(ids) > 290


def test_the_seed_decides_everything(words, write):
    text = write("some.jsonl", [count(100 * n, 100 * n + 100) for n in range(20)])
    draw = [calibration_windows(text, words, samples=10, seqlen=30, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0][:, 0] // 100, draw[2][:, 0] // 100)  # other documents, or in another order
    one = write("one.txt", count(0, 500))
    assert not torch.equal(*(calibration_windows(one, words, samples=1, seqlen=30, seed=seed) for seed in (0, 1)))


def test_calibration_adds_no_special_tokens_and_evaluation_the_default_ones(words, write):
    text = write("text.txt", count(0, 300))
    assert BOS not in calibration_windows(text, words, samples=3, seqlen=100, seed=0)
    assert evaluation_windows(text, words, seqlen=100)[0, :3].tolist() == [BOS, 0, 1]


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"seqlen": 0}, {"seed": -1}])
def test_calibration_refuses_numbers_out_of_range(words, wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=f"^{name} must be at least"):
        calibration_windows("builtin", words, **({"samples": 1, "seqlen": 8, "seed": 0} | wrong))


# Evaluation


def test_a_plain_text_is_evaluated_exactly_as_it_stands(letters, write):
    content = "\ufeff one \r\n\r\n\n two\u2028 é\t\n" * 5
    windows = evaluation_windows(write("text.raw", content), letters, seqlen=5)
    whole = spell(letters, windows)
    content = content.removeprefix("\ufeff")  # the mark of the file, not of its text
    assert "\ufeff" in content
    assert content.encode().startswith(whole.encode())
    assert len(content.encode()) - windows.numel() < 5


def test_records_are_joined_by_two_line_breaks(letters, write, tmp_path):
    texts = ["one ", "", "three", "vier\n"]
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "text": texts}), tmp_path / "records.parquet")
    for path in (write("records.jsonl", texts), str(tmp_path / "records.parquet")):
        windows = evaluation_windows(path, letters, seqlen=2)
        joined = "one \n\n\n\nthree\n\nvier\n"
        assert spell(letters, windows) == joined[: len(joined) // 2 * 2]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_records_of_a_table_are_named_with_both_ends(letters, tmp_path, kind):
    texts = [f"{chr(97 + i)}" * 9 for i in range(7)]
    path = tmp_path / f"some.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif kind == "csv":
        path.write_text("\n".join(["text", *texts]))
    else:
        pq.write_table(pa.table({"text": texts}), path)

    def read(part):
        return evaluation_windows(f"{path}#{part}", letters, seqlen=9).flatten().tolist()

    def expected(first, last):
        (tmp_path / "part.txt").write_text("\n\n".join(texts[first - 1 : last]))
        return evaluation_windows(str(tmp_path / "part.txt"), letters, seqlen=9).flatten().tolist()

    assert read("3-5") == expected(3, 5)
    assert read("1-1") == expected(1, 1)
    assert read("7-7") == expected(7, 7)
    assert read("1-7") == expected(1, 7)
    for part, said in [
        ("6-8", "holds 7 records, so there is no #6-8"),
        ("0-3", "#0-3 names no records: they count from 1"),
        ("5-3", "#5-3 names no records"),
    ]:
        with pytest.raises(InputError, match=said):
            read(part)


def test_records_are_of_tables_and_a_file_of_that_name_goes_first(letters, tmp_path):
    plain, table = tmp_path / "plain.txt", tmp_path / "table.jsonl"
    plain.write_text("some text")
    table.write_text(json.dumps({"text": "z" * 20}) + "\n")
    with pytest.raises(InputError, match=r"plain\.txt is no table, so it has no records 1 to 2\. Give a table"):
        evaluation_windows(f"{plain}#1-2", letters, seqlen=4)
    (tmp_path / "table.jsonl#1-1").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        evaluation_windows(f"{table}#1-1", letters, seqlen=4)
    for part in ("#1", "#1-", "#-1", "#a-b"):
        with pytest.raises(InputError, match="There is no file"):
            evaluation_windows(f"{table}{part}", letters, seqlen=4)


def test_records_of_one_file_are_of_one_source_and_counted_by_themselves(letters, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"text": "a" * length}) + "\n" for length in (4000, 40, 40)))
    assert in_domain(f"{path}#1-1", [f"{path}#2-3"]) == [f"{path}#2-3"]
    assert expected_windows(f"{path}#2-3", 100, seqlen=8) == 10
    windows = calibration_windows(f"{path}#2-3", letters, samples=2, seqlen=30, seed=0)
    assert windows.shape == (2, 30)
    with pytest.raises(InputError, match="holds 80 tokens"):
        calibration_windows(f"{path}#2-3", letters, samples=3, seqlen=30, seed=0)


def test_evaluation_windows_follow_one_another_and_the_rest_is_dropped(words, write):
    text = write("text.txt", count(0, 109))  # 110 tokens with BOS
    windows = evaluation_windows(text, words, seqlen=25)
    assert windows.shape == (4, 25)
    assert windows.flatten().tolist() == [BOS, *range(99)]
    assert torch.equal(evaluation_windows(text, words, seqlen=25, limit=3), windows[:3])
    assert torch.equal(evaluation_windows(text, words, seqlen=25, limit=9), windows)


def test_a_text_shorter_than_a_window_is_refused_with_both_numbers(words, write):
    with pytest.raises(InputError, match=r"holds 1,001 tokens, one window needs 1,002"):
        evaluation_windows(write("text.txt", count(0, 1000)), words, seqlen=1002)


@pytest.mark.parametrize("wrong", [{"seqlen": 1}, {"limit": 0}])
def test_evaluation_refuses_numbers_out_of_range(words, wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=f"^{name} must be at least"):
        evaluation_windows("builtin", words, **({"seqlen": 8, "limit": 1} | wrong))


def test_long_texts_are_tokenised_without_a_warning(write, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, "transformers"):  # a test of the command line may have silenced it
            text = write("text.txt", count(0, 500))
            evaluation_windows(text, word_tokenizer(), seqlen=50)
            calibration_windows(text, word_tokenizer(), samples=3, seqlen=50, seed=0)
            assert not caplog.records
            word_tokenizer()(count(0, 500))
        assert "longer than the specified maximum" in caplog.text  # the handler would have heard it
    finally:
        logger.removeHandler(caplog.handler)


# The built-in corpus


def long_paragraphs(part):
    documents = LanguageReference(part).documents()
    paragraphs = (" ".join(paragraph.split()) for text in documents for paragraph in text.split("\n\n"))
    return [paragraph for paragraph in paragraphs if len(paragraph) > 80]


def test_the_two_parts_of_the_reference_share_no_passage():
    calibration, evaluation = long_paragraphs("calibration"), long_paragraphs("evaluation")
    assert len(evaluation) > 50
    assert not set(calibration) & set(evaluation)
    sizes = [sum(map(len, LanguageReference(part).documents())) for part in ("calibration", "evaluation")]
    assert 0.22 < sizes[1] / sum(sizes) <= 0.25
    assert sum(sizes) > 0.7 * sum(map(len, topics.values()))


def test_the_split_depends_on_names_and_not_on_their_order():
    assert split_topics(topics) == split_topics(dict(reversed(topics.items())))
    same_size = {f"{n:02}": f"{n:02} is a text like all the others" for n in range(40)}
    evaluation = split_topics(same_size)["evaluation"]
    assert len(evaluation) == 10
    renamed = split_topics({f"new {name}": text for name, text in same_size.items()})["evaluation"]
    assert set(evaluation.values()) != set(renamed.values())


def test_topics_that_repeat_others_are_left_out():
    first, second, third = ("A sentence that is long enough to be told from all the others: " + n * 40 for n in "abc")
    parts = split_topics({"part": f"Part\n\n{first}", "same": second, "whole": f"{first}\n\n{third}", "twin": second})
    assert sorted(name for part in parts.values() for name in part) == ["same", "whole"]


def test_rules_under_headings_are_removed(letters):
    text = spell(letters, evaluation_windows("builtin", letters, seqlen=64))
    assert not any(rule in text for rule in ("\n****", "\n====", "\n+----", "\n   |===="))
    assert "\n| " in text  # the tables themselves stay


def test_the_reference_is_enough_for_a_small_calibration(words):
    # Words, of which every tokenizer makes at least one token each.
    assert calibration_windows("builtin", words, samples=48, seqlen=512, seed=0).shape == (48, 512)
    assert len(evaluation_windows("builtin", words, seqlen=512)) >= 16


# Local files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": "b"\n', r"line 3: not JSON \(.*delimiter"),
        (b'{"text": "\xff"}\n', "line 1: not JSON"),
        (b'["a"]\n', "line 1: not an object"),
        (b'{"title": "a", "body": "b"}\n', "line 1: there is no field 'text', only: title, body"),
        (b'{"text": "a"}\n{"text": 3}', "line 2: the field 'text' holds int, not text"),
    ],
)
def test_errors_in_jsonl_name_the_line(words, write, content, message):
    path = write("broken.jsonl", content)
    with pytest.raises(InputError, match=message) as error:
        evaluation_windows(path, words, seqlen=2)
    assert str(error.value).startswith(f"{path}, ")


def test_errors_in_parquet_name_columns_and_rows(words, write, tmp_path):
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"title": ["a"], "body": ["b"]}), path)
    with pytest.raises(InputError, match="there is no field 'text', only: title, body"):
        evaluation_windows(str(path), words, seqlen=2)
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(InputError, match="row 2: the field 'text' holds NoneType"):
        evaluation_windows(str(path), words, seqlen=2)
    with pytest.raises(InputError, match="is not a parquet file"):
        evaluation_windows(write("no.parquet", b"no parquet at all"), words, seqlen=2)


def test_text_that_is_not_utf8_is_refused(words, write):
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8 text \(byte 3\)"):
        evaluation_windows(write("latin.txt", b"caf\xe9"), words, seqlen=2)


def test_a_parquet_file_that_unpacks_to_far_more_than_it_takes_is_refused(words, tmp_path):
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": ["a " * 2**20] * 64}), path, compression="zstd")
    assert path.stat().st_size < 2**20
    with pytest.raises(InputError, match="unpacks to more than"):
        evaluation_windows(str(path), words, seqlen=2)


def test_a_parquet_file_that_is_damaged_inside(words, tmp_path):
    path = tmp_path / "damaged.parquet"
    pq.write_table(pa.table({"text": [f"number {i}" for i in range(999)]}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[20:400] = bytes(380)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"damaged.parquet (is not a parquet file|cannot be read)"):
        evaluation_windows(str(path), words, seqlen=2)


@pytest.mark.parametrize("name", ["missing.txt", "a/b/c", "data/train.jsonl", "./x", "/no/such", "data/x.parquet"])
def test_a_missing_file_is_called_a_file(words, hub, name):
    stand_in = hub()
    with pytest.raises(InputError, match="There is no file"):
        evaluation_windows(name, words, seqlen=2)
    assert not stand_in.calls


def test_a_directory_is_refused(words, tmp_path):
    with pytest.raises(InputError, match="is a directory"):
        calibration_windows(str(tmp_path), words, samples=1, seqlen=2, seed=0)


@pytest.mark.parametrize(("name", "meant"), [("wikitext", "wikitext2"), ("C4", "c4"), ("bultin", "builtin")])
def test_an_unknown_corpus_is_answered_with_the_nearest(words, name, meant):
    with pytest.raises(InputError, match=f"There is no corpus '{name}'. Did you mean '{meant}'?"):
        evaluation_windows(name, words, seqlen=2)


def test_an_unknown_corpus_is_answered_with_the_list(words):
    with pytest.raises(InputError) as error:
        evaluation_windows("qqqq", words, seqlen=2)
    assert all(name in str(error.value) for name in [*CORPORA, "owner/name:config"])
    assert "Did you mean" not in str(error.value)


RECORDS = [" one, two ", "drei \n\n 'vier'", 'fünf "6"', ""]


def as_table(kind, texts, column="text"):
    if kind in ("csv", "tsv"):
        file = io.StringIO(newline="")
        table = csv.writer(file, delimiter="," if kind == "csv" else "\t")
        table.writerows([["id", column], *enumerate(texts)])
        return file.getvalue()
    records = [{"url": "http://x", column: text} for text in texts]
    if kind == "json":
        return json.dumps(records, indent=1)
    return "\n".join(map(json.dumps, records)) + "\n"


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "ndjson", "CSV"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("column", ["text", "body"])
def test_tables_are_not_read_as_raw_text(letters, write, kind, mark, column):
    path = write(f"table.{kind}", mark + as_table(kind.lower(), RECORDS, column))
    joined = "\n\n".join(RECORDS)
    windows = evaluation_windows(path, letters, seqlen=len(joined.encode()), column=column)
    assert spell(letters, windows) == joined
    whole = "".join(RECORDS).encode()
    calibrated = calibration_windows(path, letters, samples=1, seqlen=len(whole), seed=0, column=column)
    assert sorted(spell(letters, calibrated).encode()) == sorted(whole)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_one_record_a_line_may_also_be_called_json(letters, write, end):
    path = write("lines.json", end.join(json.dumps({"text": text}) for text in RECORDS) + end)
    joined = "\n\n".join(RECORDS)
    assert spell(letters, evaluation_windows(path, letters, seqlen=len(joined.encode()))) == joined
    one = write("one.json", json.dumps({"text": "one of many lines"}, indent=2))
    assert spell(letters, evaluation_windows(one, letters, seqlen=17)) == "one of many lines"


def test_a_long_field_of_a_csv_file_is_read_whole(letters, write):
    path = write("long.csv", as_table("csv", ["a" * 200_000, "b"]))
    assert evaluation_windows(path, letters, seqlen=200_003).shape == (1, 200_003)
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "line 1: there is no field 'text', only: none"),
        ("a.csv", "id,body\n1,a\n", "only: id, body. Choose one with --column"),
        ("a.csv", "id,text\n1,a\n2\n", "line 3: the field 'text' holds NoneType"),
        ("a.csv", "id,text\n1,one, two\n", "line 2: there are more fields than names"),
        ("a.csv", 'text\n"never closed\n', "not a table of fields separated by ','"),
        ("a.tsv", 'text\n"a" b\n', "not a table of fields"),
        ("a.csv", b"text\ncaf\xe9\n", "a.csv is not UTF-8 text"),
        ("a.json", '[{"text": "a"}, {"text": null}]', "record 2: the field 'text' holds NoneType"),
        ("a.json", '["a"]', "record 1: not an object"),
        ("a.json", '{"text": ["a", "b"]}', "the field 'text' holds list"),
        ("a.json", '[{"text": "a"}', "a.json: not JSON"),
        ("a.json", "[" * 200_000, "nested too deeply"),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 200_000, "line 2: not JSON that can be read .it is nested too deeply"),
        ("a.jsonl", '{"text": "a"}\n' + "9" * 5_000, "line 2: not JSON"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "line 1: not JSON in UTF-8. Convert it"),
        ("a.ndjson", '{"text": "a"}\n'.encode("utf-16-le"), "line 1: not JSON in UTF-8. Convert it"),
        ("a.txt", "a text".encode("utf-16"), "a.txt is not UTF-8 text .it seems to be UTF-16"),
        ("a.txt", "a text".encode("utf-16-be"), "a.txt is not UTF-8 text .it seems to be UTF-16"),
        ("a.jsonl.gz", b"\x1f\x8b", "a.jsonl.gz is compressed. Decompress it first"),
        ("a.zst", b"", "a.zst is compressed. Decompress it first"),
        ("a.pdf", b"%PDF", "unknown ending .pdf. Give a table"),
    ],
)
def test_files_that_are_no_text_are_refused_in_one_sentence(letters, write, name, content, message):
    path = write(name, content)
    with pytest.raises(InputError, match=message) as error:
        calibration_windows(path, letters, samples=1, seqlen=2, seed=0)
    assert path in str(error.value)
    assert len(str(error.value)) < 400 + len(path)


def test_half_a_surrogate_pair_is_read_as_the_replacement_character(letters, write):
    path = write("c.jsonl", '{"text": "a\\ud83d b"}')
    assert spell(letters, evaluation_windows(path, letters, seqlen=6)) == "a\ufffd b"


def test_a_byte_order_mark_is_no_token(letters, write):
    with_mark, without = (
        calibration_windows(write(name, mark + b"one text"), letters, samples=1, seqlen=8, seed=0)
        for name, mark in (("with.txt", b"\xef\xbb\xbf"), ("without.txt", b""))
    )
    assert torch.equal(with_mark, without)


def test_a_pipe_that_was_read_says_that_it_can_be_read_once(letters, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for content in (b"some text", b""):
        thread = threading.Thread(target=pipe.write_bytes, args=(content,))
        thread.start()
        if content:
            assert evaluation_windows(str(pipe), letters, seqlen=9).shape == (1, 9)
        else:
            with pytest.raises(InputError, match=r"A pipe can be read only once\. Give a file"):
                evaluation_windows(str(pipe), letters, seqlen=9)
        thread.join()


# Beginning of sequence


def test_windows_begin_with_what_the_tokenizer_puts_before_a_text(words, write):
    text = write("text.txt", count(0, 300))
    begin = beginning(words, "auto")
    assert begin == (BOS,)
    for draw in (calibration_windows, training_windows):
        windows = draw(text, words, samples=9, seqlen=20, seed=0, begin=begin)
        assert windows.shape == (9, 20)
        assert (windows[:, 0] == BOS).all()
        assert (windows[:, 1:] < BOS).sum() >= 9 * 19 - 1
        assert BOS not in windows[:, 1:]
    windows = evaluation_windows(text, words, seqlen=20, begin=begin)
    assert windows.shape == (300 // 19, 20)
    assert (windows[:, 0] == BOS).all()
    assert windows[:, 1:].flatten().tolist() == list(range(300 // 19 * 19))


def test_the_ways_to_begin_a_window(words, letters):
    assert beginning(words, "never") == ()
    assert beginning(words, "always") == (BOS,)
    plain = word_tokenizer()
    plain.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    assert beginning(plain, "auto") == ()  # it ends a text with a token, and begins it with none
    assert beginning(plain, "always") == (BOS,)
    two = word_tokenizer()
    both = [("<s>", BOS), ("</s>", EOS)]
    two.backend_tokenizer.post_processor = TemplateProcessing(single="</s> <s> $A", special_tokens=both)
    assert beginning(two, "auto") == (EOS, BOS)
    assert beginning(letters, "auto") == ()
    with pytest.raises(InputError, match=r"no beginning-of-text token\. Give --bos auto or never"):
        beginning(letters, "always")


def test_a_window_must_hold_more_than_its_beginning(words, write):
    text = write("text.txt", count(0, 300))
    with pytest.raises(InputError, match="seqlen must be at least 2, not 1"):
        calibration_windows(text, words, samples=1, seqlen=1, seed=0, begin=(BOS,))


# Prose of another source


def test_the_novel_is_prose_of_another_source_than_the_reference(letters):
    windows = evaluation_windows("novel", letters, seqlen=64)
    assert 60_000 < windows.numel() < 100_000
    text = spell(letters, windows)
    assert text.startswith("Chapter 1\n\nSir Walter Elliot, of Kellynch Hall")
    assert not any(text[i : i + 60] in topic for i in range(0, 6_000, 60) for topic in topics.values())
    with pytest.raises(InputError, match=r"'novel' is there to measure on\. Take other text, such as: builtin, c4"):
        calibration_windows("novel", letters, samples=1, seqlen=2, seed=0)


def test_which_corpora_share_a_source(write, tmp_path):
    text, other = write("a.txt", "a"), write("b.txt", "b")
    (tmp_path / "link.txt").symlink_to(text)
    for pair in [
        ("builtin", "builtin"),
        ("wikitext2", "Salesforce/wikitext:wikitext-103-raw-v1"),
        (text, str(tmp_path / "link.txt")),
    ]:
        assert same_source(*pair), pair
    for pair in [("builtin", "novel"), ("c4", "wikitext2"), (text, other), ("self", "builtin"), ("windows", "windows")]:
        assert not same_source(*pair), pair


# The hub


def test_c4_is_read_no_further_than_needed(words, hub):
    stand_in = hub(train=lambda: ({"text": count(n % 100, n % 100 + 80)} for n in range(50_000)))
    windows = calibration_windows("c4", words, samples=8, seqlen=64, seed=0)
    assert windows.shape == (8, 64)
    assert all(map(is_contiguous, windows))
    assert stand_in.drawn <= BUFFER + 16
    (call,) = stand_in.calls
    files = {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert call == {"path": "allenai/c4", "name": None, "data_files": files, "streaming": True}


def test_streams_are_shuffled_by_the_seed(words, hub):
    hub(train=lambda: ({"text": count(n, n + 30)} for n in range(2000)))
    draw = [calibration_windows("c4", words, samples=8, seqlen=30, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert len(draw[0][:, 0].unique()) == 8
    assert draw[0][:, 0].max() > 100


def test_a_stream_of_short_documents_is_packed_and_left(words, hub):
    stand_in = hub(train=many("1 2 3"))
    assert calibration_windows("someone/short", words, samples=2, seqlen=500, seed=0).shape == (2, 500)
    assert stand_in.drawn <= BUFFER + 2 * 200 + 8


def test_a_stream_of_nothing_ends(words, hub):
    stand_in = hub(train=many(""))
    with pytest.raises(InputError, match=r"someone/nothing holds no text\. Give another one"):
        calibration_windows("someone/nothing", words, samples=2, seqlen=500, seed=0)
    assert stand_in.drawn <= BUFFER + 2 * 500 + 8


def test_c4_is_evaluated_on_1100_documents_joined_by_spaces_and_256_windows(letters, hub):
    stand_in = hub(validation=lambda: ({"text": f"{n:03}\n"} for n in range(5_000)))
    windows = evaluation_windows("c4", letters, seqlen=20)
    text = spell(letters, windows)
    assert text.startswith("000\n 001\n 002\n")
    assert windows.shape == (256, 20)  # of the 1100 · 5 + 100 - 1 characters, 5120
    assert len(evaluation_windows("c4", letters, seqlen=23)) == (1100 * 5 + 100 - 1) // 23
    assert stand_in.drawn == 2 * 1100
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert stand_in.calls[0] == {"path": "allenai/c4", "name": None, "data_files": files, "streaming": True}


def test_wikitext2_is_one_text_joined_by_two_line_breaks(letters, hub):
    lines = [" = Title = \n", "", " A sentence . \n"]
    stand_in = hub(train=rows(*lines), validation=rows("no"), test=rows(*lines[::-1]))
    text = spell(letters, evaluation_windows("wikitext2", letters, seqlen=2))
    assert text == (" A sentence . \n" + "\n\n" + "\n\n" + " = Title = \n")[: len(text)]
    assert len(text) > 28
    whole = calibration_windows("wikitext2", letters, samples=1, seqlen=31, seed=0)
    assert spell(letters, whole[0]) == " = Title = \n" + "\n\n" + "\n\n" + " A sentence . \n"
    call = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "streaming": True}
    assert stand_in.calls == [call, call]


def test_ptb_is_one_text_joined_by_spaces(letters, hub):
    stand_in = hub(
        test=rows("the <unk> fell", "n shares", column="sentence"), train=rows("a b", "c", column="sentence")
    )
    text = spell(letters, evaluation_windows("ptb", letters, seqlen=23))
    assert text == "the <unk> fell n shares"
    whole = calibration_windows("ptb", letters, samples=1, seqlen=5, seed=0)
    assert spell(letters, whole[0]) == "a b c"
    assert [call["revision"] for call in stand_in.calls] == ["refs/convert/parquet"] * 2
    assert [call["data_files"] for call in stand_in.calls] == [
        {"test": "penn_treebank/test/0000.parquet"},
        {"train": "penn_treebank/train/0000.parquet"},
    ]


def test_any_data_set_of_the_hub_is_read_by_its_id(letters, hub):
    stand_in = hub(train=rows("train"), validation=rows("valid", "ation"))
    windows = calibration_windows("me/my.data-set", letters, samples=1, seqlen=5, seed=0)
    assert spell(letters, windows) == "train"
    windows = evaluation_windows("me/my.data-set:de.1", letters, seqlen=12)
    assert spell(letters, windows[0]) == "valid\n\nation"
    assert [(call["path"], call["name"]) for call in stand_in.calls] == [
        ("me/my.data-set", None),
        ("me/my.data-set", "de.1"),
    ]


def test_a_large_evaluation_split_of_the_hub_is_not_read_whole(words, hub):
    stand_in = hub(test=many("1 2"))
    assert evaluation_windows("someone/large", words, seqlen=100).shape == (200, 100)
    assert stand_in.drawn == 10_000


def test_a_data_set_without_the_split_or_column_says_what_it_has(words, hub):
    hub(train=rows("1", column="content"), dev=rows("2"))
    with pytest.raises(InputError, match=r"has no split test or validation\. It has: train, dev"):
        evaluation_windows("me/mine", words, seqlen=2)
    with pytest.raises(InputError, match="'me/mine': there is no field 'text', only: content"):
        calibration_windows("me/mine", words, samples=1, seqlen=2, seed=0)


def breaks_off():
    yield {"text": "1"}
    raise OSError("connection reset")


def test_a_failing_hub_is_an_input_error_that_names_the_way_out(words, hub, monkeypatch):
    hub(test=breaks_off)
    with pytest.raises(InputError, match=r"'me/mine' could not be read from the hub \(OSError: connection reset\)"):
        evaluation_windows("me/mine", words, seqlen=2)

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'allenai/c4' on the Hub (OfflineModeIsEnabled)\n" + "more " * 200)

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        InputError, match=r"\(ConnectionError: Couldn't .*Enabled\) more .* …\)\. .* or give a local \.txt"
    ) as error:
        calibration_windows("c4", words, samples=1, seqlen=2, seed=0)
    assert isinstance(error.value.__cause__, ConnectionError)
    assert len(str(error.value)) < 400


# Fingerprint


def test_equal_windows_and_no_others_have_equal_fingerprints():
    windows = torch.arange(24).view(4, 6)
    assert len(fingerprint(windows)) == 64
    assert fingerprint(windows) == fingerprint(windows.clone())
    assert fingerprint(windows) == fingerprint(windows.T.contiguous().T)
    different = [windows.view(6, 4), windows.flip(0), windows[:3], windows + (windows == 5)]
    assert len({fingerprint(each) for each in [windows, *different]}) == 5
