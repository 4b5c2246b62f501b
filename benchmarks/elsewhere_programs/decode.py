"""Decodes by one program, as often as asked: ``python decode.py PROGRAM MODEL ASKED.json``; see peers.py.

PROGRAM is sparlow, llama.cpp or ctranslate2, in an environment that has it. ASKED.json holds the ids of a prompt, the
number of tokens to write behind it, and windows of tokens. Reads words, a line each: ``decode`` answers with the
seconds to the first token and the tokens a second behind it, ``perplexity`` with that of the windows; in one thread.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

Steps = Callable[[list[int], int], Iterator[int]]
Logits = Callable[[list[int]], np.ndarray]


def of_sparlow(folder: str, activations: str = "int8") -> tuple[Steps, Logits]:
    """As ``sparlow generate`` does it: packed, inputs in int8, and a step of the kernel."""
    import torch

    import sparlow

    torch.set_num_threads(1)
    model = sparlow.load(folder, mode="packed", activations=activations, step="kernel", dtype=torch.float32)

    class Clock:
        """A streamer that notes when each token came."""

        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, _: torch.Tensor) -> None:
            self.seen.append(time.perf_counter_ns())

        def end(self) -> None:
            """Nothing more comes."""

    def steps(prompt: list[int], count: int) -> Iterator[int]:
        clock, ids = Clock(), torch.tensor([prompt])
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, streamer=clock)
        yield from clock.seen[1:]  # the first is the prompt

    def logits(window: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([window])).logits[0].numpy()

    return steps, logits


def of_llama(file: str) -> tuple[Steps, Logits]:
    """By ik_llama.cpp, with its own defaults but for the thread."""
    from ik_llama_cpp import _ctypes_api as api
    from ik_llama_cpp._internals import IkContext, IkModel

    model = IkModel(file)
    context = IkContext(model, n_ctx=1024, n_threads=1)

    def put(tokens: list[int], start: int, *, every: bool) -> None:
        batch = api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, int(every or i == len(tokens) - 1)
        if context.decode(batch):
            raise SystemExit("llama.cpp could not compute the tokens")
        api.llama_batch_free(batch)

    def at(i: int) -> np.ndarray:
        return np.ctypeslib.as_array(context.get_logits(i), (model.n_vocab,))

    def steps(prompt: list[int], count: int) -> Iterator[int]:
        context.kv_cache_clear()
        put(prompt, 0, every=False)
        last = len(prompt) - 1
        for i in range(count):
            token = int(at(last).argmax())
            yield time.perf_counter_ns()
            if i < count - 1:
                put([token], len(prompt) + i, every=False)
                last = 0

    def logits(window: list[int]) -> np.ndarray:
        context.kv_cache_clear()
        put(window, 0, every=True)
        return np.stack([at(i).copy() for i in range(len(window))])

    return steps, logits


def of_ctranslate2(folder: str) -> tuple[Steps, Logits]:
    """By CTranslate2, in the type that its directory was converted to."""
    import ctranslate2

    model = ctranslate2.Generator(folder, device="cpu", intra_threads=1, inter_threads=1)
    words = json.loads((Path(folder) / "vocabulary.json").read_text("utf-8"))

    def steps(prompt: list[int], count: int) -> Iterator[int]:
        seen: list[int] = []

        def note(_: object) -> bool:
            seen.append(time.perf_counter_ns())
            return False

        model.generate_batch(
            [[words[i] for i in prompt]], max_length=count, min_length=count, include_prompt_in_result=False,
            callback=note,
        )  # fmt: skip
        yield from seen

    def logits(window: list[int]) -> np.ndarray:
        return np.asarray(model.forward_batch([[words[i] for i in window]]))[0]

    return steps, logits


PROGRAMS = {
    "sparlow": of_sparlow,
    "sparlow-float": lambda folder: of_sparlow(folder, "float"),
    "llama.cpp": of_llama,
    "ctranslate2": of_ctranslate2,
}


def perplexity(logits: Logits, windows: list[list[int]]) -> float:
    """Of windows of tokens, each without its first."""
    found: list[np.ndarray] = []
    for window in windows:
        rows = logits(window)[:-1].astype(np.float64)
        top = rows.max(1)
        whole = top + np.log(np.exp(rows - top[:, None]).sum(1))
        found.append(rows[np.arange(len(rows)), window[1:]] - whole)
    return float(np.exp(-np.concatenate(found).mean()))


def main() -> None:
    """Answer until the input ends."""
    program, model, file = sys.argv[1:]
    asked = json.loads(Path(file).read_text("utf-8"))
    steps, logits = PROGRAMS[program](model)
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "perplexity":
            print(json.dumps({"perplexity": perplexity(logits, asked["windows"])}), flush=True)
            continue
        start = time.perf_counter_ns()
        times = [*steps(asked["prompt"], asked["tokens"])]
        rate = (len(times) - 1) / (times[-1] - times[0]) * 1e9
        print(json.dumps({"first": (times[0] - start) / 1e9, "per_second": rate}), flush=True)


if __name__ == "__main__":
    main()
