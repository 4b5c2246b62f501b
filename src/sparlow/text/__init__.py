"""Named corpora, seeded: text becomes windows of token ids.

A *corpus* is named by one string:

* `builtin`, `novel` (for evaluation only), `c4`, `wikitext2` or `ptb` (`CORPORA` says what each is);
* the path of a local file, in UTF-8. It is a table (`.csv` and `.tsv` with a line of names, `.jsonl` and `.ndjson` with
  one object a line, `.json`, `.parquet`), of which one column is read, `text` if no other is named, and a record is one
  document; or it is plain text (`.txt`, `.md`, no ending and some others), which is one document as it stands, without
  the byte order mark. The same text serves calibration and evaluation: give two files where that matters. A file called
  `c4` is reached as `./c4`. `c4.jsonl#601-800` stands for these records of a table, both ends included, unless there is
  a file of that very name;
* a data set on the hub: `owner/name`, or `owner/name:config`. The same column is read, of the split `train` for
  calibration and of `test`, else `validation`, for evaluation (the first 10,000 documents).

Fine-tuning also reads chats: records that hold a list of messages, in the field `messages` if there is no text (`chats`
says what they look like, `answers` which tokens of them are learnt).

Half a surrogate pair, which JSON may hold, is read as U+FFFD, the character that stands for what cannot be read.

Calibration (`calibration_windows`) follows one rule for every corpus:

1. Documents are visited in seeded order (streamed ones through a seeded shuffle buffer) until `samples` of them had at
   least `seqlen` tokens; each of these gives one window, at a seeded offset. C4 is read no further than this.
2. Where the long documents run out, the rest comes, in seeded order, from what was visited: the further windows of the
   long documents, which lie end to end with their first, and windows cut from the pack. The pack is all that is left,
   short documents and the ends of long ones, joined in visiting order by the tokenizer's end-of-text token, if any.

No two windows overlap, and any text of at least `samples · seqlen` tokens is enough (`training_windows` takes fewer
windows where there is less). After 200 visits a sample the search for long documents ends as soon as what was visited
suffices. Every window begins with the token ids `begin`, and has so much less text: these are what `beginning` finds
that the tokenizer puts before a text by itself, such as BOS.

Evaluation (`evaluation_windows`) joins the documents, tokenises the text as it stands with the tokenizer's default
special tokens, and cuts windows of `seqlen` tokens without overlap; the rest is dropped. This is the published
protocol: the first window alone begins with BOS, if any does. With `begin` every window does. `wikitext2` is the test
split joined by two line breaks, `ptb` the test split joined by spaces, `c4` the first 1100 documents of the first
validation file joined by spaces and cut to 256 windows; everything else is joined by two line breaks.
"""

from sparlow.text.answers import training_chats
from sparlow.text.beginning import WITH_BOS, beginning
from sparlow.text.chats import chat_column
from sparlow.text.corpora import CORPORA, in_domain, in_domain_warning, same_source
from sparlow.text.windows import (
    calibration_windows,
    evaluation_windows,
    expected_windows,
    fingerprint,
    training_windows,
)

__all__ = [
    "CORPORA",
    "WITH_BOS",
    "beginning",
    "calibration_windows",
    "chat_column",
    "evaluation_windows",
    "expected_windows",
    "fingerprint",
    "in_domain",
    "in_domain_warning",
    "same_source",
    "training_chats",
    "training_windows",
]
