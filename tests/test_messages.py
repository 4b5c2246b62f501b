"""The style of what sparlow says: a capital, what is wrong, a full stop, then what to do. See ``messages.py``."""

import re

from messages import KINDS, messages

# names, which keep their small letter at the beginning of a sentence
FIELDS = "device|dtype|fewshot|inplace=True|quantization_config|report_to|sparlow|vLLM"
BEGINS = rf"[A-Z{{]|--\w|({FIELDS}) "
# another message of ours, which has a full stop
INNER = r"\{(error|problem|FORCE|_FAULT|_LATER|MERGE|INSTEAD|advice|instead)\}$"
COMMAND = r"(Run|List all of them with): [\w-]+ [^.]*$"  # a full stop behind a command would be copied with it
TAIL = r"[:;] (give|use|choose|write|lower|raise|run|try|start|check|restore|fetch|upgrade|install|move|open|repeat) "

ALL = messages()


def offenders(kinds, wrong):
    return [f"{found.where}: {found.text}" for found in ALL if found.kind in kinds and wrong(found.text)]


def test_every_kind_of_message_is_found():
    found = {kind: sum(message.kind == kind for message in ALL) for kind in KINDS}
    assert all(found.values())
    assert found["error"] > 150
    assert found["help"] > 60


def test_a_message_begins_with_a_capital():
    assert not offenders(("error", "foreign", "warning", "help"), lambda text: not re.match(BEGINS, text))


def test_a_message_ends_with_a_full_stop():
    ends = rf"\.$|{INNER}|{COMMAND}"
    assert not offenders(("error", "warning", "help"), lambda text: not re.search(ends, text))


def test_a_colon_and_what_another_program_says_are_added_once():
    assert not offenders(("foreign",), lambda text: text.endswith((".", ":", ";")))


def test_what_to_do_is_a_sentence_of_its_own():
    assert not offenders(("error", "warning"), lambda text: re.search(TAIL, text))
