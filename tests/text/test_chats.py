"""Chats: which records are chats, and which of their tokens are answers."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from families import tiny_tokenizer
from sparlow.errors import InputError
from sparlow.text import calibration_windows, chat_column, training_chats
from sparlow.text.answers import IGNORED, tokens_of
from sparlow.text.chats import Chat

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# reasoning is written for the last answer only, as in many templates
FORGETFUL = (
    "{% for m in messages %}[{{ m['role'] }}]{% if loop.last and m['role'] == 'assistant' %}<think>{% endif %}"
    "{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('A user speaks first') }}{% endif %}" + PLAIN


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


TURNS = messages(("system", "be brief"), ("user", "1+1?"), ("assistant", "2"), ("user", "2+2?"), ("assistant", "four"))


def tokenizer(template):
    found = tiny_tokenizer()
    found.chat_template = template
    return found


def answers(template, turns, tools=None):
    """The text of each run of tokens that are answers."""
    own = tokenizer(template)
    ids, said = tokens_of(Chat(turns, tools, "here"), own)
    assert own.decode(ids) == own.apply_chat_template(turns, tokenize=False)
    marked = "".join(
        own.decode([token]) if one else "\0" for token, one in zip(ids.tolist(), said.tolist(), strict=True)
    )
    return [run for run in marked.split("\0") if run]


@pytest.mark.parametrize(("template", "end"), [(PLAIN, "</s>\n"), (MARKED, "</s>")])
def test_answers_are_what_the_template_says_or_what_it_writes_for_them(template, end):
    assert answers(template, TURNS) == ["2" + end, "four" + end]
    assert answers(template, messages(("user", "x"), ("assistant", ""))) == [end]
    assert not len(tokens_of(Chat(messages(("user", "x")), None, "here"), tokenizer(template))[0])  # nothing to learn


def test_marks_are_followed_where_a_template_could_not_be_split():
    assert answers(MARKED, messages(("assistant", "hello"), ("user", "hi"))) == ["hello</s>"]
    with pytest.raises(InputError, match=r"^here: the tokenizer's chat template does not show where .* 1 begins"):
        answers(PLAIN, messages(("assistant", "hello"), ("user", "hi")))


def test_a_template_that_writes_earlier_answers_in_another_way_is_refused():
    assert answers(FORGETFUL, TURNS[:3]) == ["<think>2</s>"]
    with pytest.raises(InputError, match=r"message 3 begins and ends\. Mark answers .* or give chats of one question"):
        answers(FORGETFUL, TURNS)


def test_a_chat_that_the_template_refuses_is_refused_with_its_reason():
    with pytest.raises(InputError, match=r"^here: the tokenizer's chat template refuses the chat: A user spe"):
        answers(STRICT, TURNS)


def test_tools_are_given_to_the_template():
    with_tools = "{% for t in tools or [] %}({{ t['name'] }}){% endfor %}" + PLAIN
    own = tokenizer(with_tools)
    ids, _ = tokens_of(Chat(TURNS, [{"name": "add"}], "here"), own)
    assert own.decode(ids).startswith("(add)[system]")


def test_a_token_that_an_answer_shares_belongs_to_it():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = "[]:?2aeinrsutx"
    vocabulary = {token: i for i, token in enumerate(["</s>", *letters, "]2"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("]", "2")]))
    special = {"eos_token": "</s>"}
    own = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    own.chat_template = PLAIN.replace("\n", "")
    ids, said = tokens_of(Chat(messages(("user", "x?"), ("assistant", "2")), None, "here"), own)
    assert [own.convert_ids_to_tokens(i) for i in ids[said].tolist()] == ["]2", "</s>"]


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_chats_are_known_by_the_first_record(tmp_path):
    rows = messages(("user", "q"), ("assistant", "a"))
    chat = jsonl(tmp_path / "chat.jsonl", {"messages": rows})
    assert chat_column(chat) == "messages"
    assert chat_column(jsonl(tmp_path / "own.jsonl", {"talk": rows, "text": "t"}), "talk") == "talk"
    assert chat_column(jsonl(tmp_path / "both.jsonl", {"messages": rows, "text": "t"})) is None
    assert chat_column(jsonl(tmp_path / "ids.jsonl", {"messages": [1, 2]})) is None
    assert chat_column(jsonl(tmp_path / "empty.jsonl")) is None
    (tmp_path / "plain.txt").write_text("text")
    assert chat_column(str(tmp_path / "plain.txt")) is None
    assert chat_column("c4") is None  # and nothing is fetched
    with pytest.raises(InputError, match="holds list, not text"):
        calibration_windows(chat, tiny_tokenizer(), samples=1, seqlen=2, seed=0, column="messages")


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "hub"])
def test_every_kind_of_table_gives_the_same_chats(kind, tmp_path, monkeypatch):
    records = [{"messages": TURNS}, {"messages": messages(("user", "x"), ("assistant", "y"))}]
    name = str(tmp_path / f"chats.{kind}")
    if kind == "jsonl":
        jsonl(tmp_path / "chats.jsonl", *records)
    elif kind == "json":
        (tmp_path / "chats.json").write_text(json.dumps(records))
    elif kind == "parquet":
        records[1]["messages"][0]["tool_calls"] = None  # which a table adds to every message once one has it
        pq.write_table(pa.Table.from_pylist(records), name)
    else:
        import datasets

        name, stream = "owner/chats", datasets.Dataset.from_list(records).to_iterable_dataset()
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {"train": stream})
    assert chat_column(name) == "messages"
    found = training_chats(name, "messages", tokenizer(PLAIN), samples=5, seqlen=99, seed=0)
    own = tiny_tokenizer()
    said = sorted(own.decode(ids[labels != IGNORED]) for ids, labels in zip(found.ids, found.labels, strict=True))
    assert said == ["2</s>\nfour</s>\n", "y</s>\n"]
    assert (found.cut, found.left_out) == (0, 0)


def test_long_chats_are_cut_and_those_without_an_answer_left_out_and_counted(tmp_path):
    asked, long = messages(("user", "why?")), messages(("user", "x"), ("assistant", "y" * 40))
    late = messages(("user", "x" * 40), ("assistant", "y"))
    name = jsonl(tmp_path / "c.jsonl", *({"messages": rows} for rows in (asked, long, late, [])))
    found = training_chats(name, "messages", tokenizer(PLAIN), samples=9, seqlen=30, seed=3)
    assert [len(ids) for ids in found.ids] == [30]
    assert (found.labels[0] != IGNORED).sum() == 30 - len("[user]x_\n[assistant]")
    assert (found.cut, found.left_out) == (2, 3)
    with pytest.raises(InputError, match=r"No chat of .* has an answer"):
        training_chats(
            jsonl(tmp_path / "q.jsonl", {"messages": asked}), "messages", tokenizer(PLAIN), samples=1, seqlen=9, seed=0
        )


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": "hello"}, "line 1: the field 'messages' holds str, not a list of messages"),
        ({"messages": ["hello"]}, "line 1, message 1 has no role"),
        ({"messages": [{"from": "human", "value": "q"}]}, 'message 1 has no role. Write messages as {"role"'),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "message 1 has a weight"),
        ({"messages": [], "tools": "[]"}, "the field 'tools' holds str. Make it a list"),
        ({"other": []}, "there is no field 'messages', only: other"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_place(record, said, tmp_path):
    name = jsonl(tmp_path / "c.jsonl", record)
    with pytest.raises(InputError) as error:
        training_chats(name, "messages", tokenizer(PLAIN), samples=1, seqlen=9, seed=0)
    assert said in str(error.value)


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(InputError, match="has no chat template"):
        tokens_of(Chat(TURNS, None, "here"), tiny_tokenizer())
