"""How fast models run, side by side: each in a process of its own, in turns, and checked for what they compute.

A row is a model in a mode, computing in a type, with what computes a token behind others. Its logits are compared with
those of the same weights in float32, dense, by the model's own pass, so that no speed is reported of wrong results.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load_file

from sparlow.errors import InputError, RunError
from sparlow.machine import described, versions
from sparlow.model.loading.source import resolve_model_path
from sparlow.progress import Notify, counting
from sparlow.report.tabular import Tabular
from sparlow.runtime.options import BenchmarkOptions
from sparlow.runtime.running import is_compressed

BOUNDS = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}  # of the root mean square of logits
ROUNDED = 0.1  # the same where inputs of layers are rounded to int8
_FEW = 4  # tokens of the run before those that count


@dataclass
class Row:
    """What was measured of a model.

    Attributes:
        model: Its name.
        mode: That it was opened in; ``dense`` also for one that is not compressed.
        dtype: That it computed in.
        inputs: Of packed layers whose levels are integers: ``float``, or ``int8``; of other modes nothing.
        step: What computed a token behind others.
        compressed: Whether sparlow wrote it.
        bytes_read: Of weights, by a token.
        interpreter: Resident memory before the model was opened.
        peak: Highest resident memory of a whole generation, the interpreter's included, by the number of texts.
        first: Seconds to the first token, of each run, by the number of texts.
        prefill: Tokens of prompts a second, the same.
        decode: Tokens a second behind the first of each text, the same.
        difference: Of its logits from those of the same weights in float32, relative.
        bound: Up to which that is the same output.
    """

    model: str
    mode: str
    dtype: str
    inputs: str
    step: str
    compressed: bool
    bytes_read: int = 0
    interpreter: int = 0
    peak: dict[int, int] = field(default_factory=dict)
    first: dict[int, list[float]] = field(default_factory=dict)
    prefill: dict[int, list[float]] = field(default_factory=dict)
    decode: dict[int, list[float]] = field(default_factory=dict)
    difference: float = float("nan")
    bound: float = 0.0

    @property
    def same_output(self) -> bool:
        """Whether it computes what the weights say."""
        return self.difference <= self.bound


@dataclass(repr=False)
class Benchmark(Tabular):
    """What ``sparlow benchmark`` found.

    Attributes:
        rows: In the order of measuring.
        machine: See ``sparlow.machine``.
        versions: The same.
        settings: The options.
        notes: What was left out, and why.
    """

    rows: list[Row]
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it for JSON, medians included."""
        rows = [
            asdict(row)
            | {
                "same_output": row.same_output,
                "median": {
                    name: {str(batch): statistics.median(found) for batch, found in getattr(row, name).items()}
                    for name in ("first", "prefill", "decode")
                },
                "times_dense": {str(batch): times for batch in row.decode if (times := self.times(row, batch))},
            }
            for row in self.rows
        ]
        whole = {"machine": self.machine, "versions": self.versions, "settings": self.settings, "notes": self.notes}
        return whole | {"rows": rows}

    def facts(self) -> dict[str, str]:
        """See ``Tabular``."""
        found = {"machine": described(self.machine)} if self.machine else {}
        for row in self.rows:
            rates = (f"{statistics.median(rates):.1f} tokens/s" for rates in row.decode.values())
            wrong = "" if row.same_output else "; computes something else than its weights"
            told = (Path(row.model).name, row.mode, row.dtype, row.inputs, row.step)
            found[", ".join(filter(None, told))] = ", ".join(rates) + wrong
        return found

    def table(self) -> list[dict[str, Any]]:
        """A row a model, mode, type, step and number of texts, with medians."""
        return [
            {
                **{
                    name: getattr(row, name)
                    for name in ("model", "mode", "dtype", "inputs", "step", "bytes_read", "same_output")
                },
                "texts": batch,
                **{name: statistics.median(getattr(row, name)[batch]) for name in ("first", "prefill", "decode")},
                "peak": row.peak[batch],
            }
            for row in self.rows
            for batch in row.decode
        ]

    def times(self, row: Row, batch: int) -> float | None:
        """Return how many times the rate of the fastest dense model a row decodes; None if there is no dense one."""
        dense = [statistics.median(r.decode[batch]) for r in self.rows if not r.compressed and r.same_output]
        return statistics.median(row.decode[batch]) / max(dense) if dense else None


def spread(found: Sequence[float]) -> float:
    """Return half of what lies between the slowest and the fastest run, of the median."""
    return (max(found) - min(found)) / 2 / statistics.median(found)


class _Process:
    """A worker, see ``benchmark_worker``."""

    def __init__(self, errors: IO[str]) -> None:
        command = [sys.executable, "-m", "sparlow.runtime.benchmark_worker"]
        self._errors = errors
        self._process = subprocess.Popen(  # noqa: S603 - ourselves
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )

    def ask(self, what: str, **request: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever JSON takes
        """Return the answer to a request.

        Raises:
            InputError: The request cannot be met.
            RunError: The process ended, or failed.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        line = ""
        if stdin is not None and stdout is not None:
            try:
                stdin.write(json.dumps({"do": what, **request}) + "\n")
                stdin.flush()
                line = stdout.readline()
            except BrokenPipeError:
                line = ""
        if not line:
            raise RunError(f"A process of the benchmark ended ({self._last_words()}). Measure fewer models at once.")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise (InputError if found["input"] else RunError)(found["error"])
        return found

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1].strip().rstrip(".") if lines else f"exit {code}"

    def end(self) -> None:
        """End it, and wait for that."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


@contextmanager
def _process() -> Iterator[_Process]:
    with tempfile.TemporaryFile("w+") as errors:
        found = _Process(errors)
        try:
            yield found
        finally:
            found.end()


def benchmark(models: Sequence[str], options: BenchmarkOptions, notify: Notify) -> Benchmark:
    """Measure models side by side.

    Args:
        models: Directories, hub ids or .gguf files, compressed or not.
        options: What of them.
        notify: Called as it goes.

    Raises:
        InputError: There is no such model.
        RunError: A process ended, as when memory is short.
    """
    found = Benchmark([], {}, versions(), asdict(options) | {"models": [*models]}, [])
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        workers: list[tuple[_Process, Row]] = []
        for i, name in enumerate(models):
            for variant in _variants(name, options):
                mode = variant.mode
                reference = Path(folder) / f"{i}{'-packed' if mode == 'packed' else ''}.safetensors"
                if not reference.exists():
                    _write_reference(name, mode, options, reference)
                worker = stack.enter_context(_process())
                for row in _opened(worker, variant, options, found):
                    _check(worker, row, reference, Path(folder) / "logits.safetensors")
                    workers.append((worker, row))
                    found.rows.append(row)
        _take_turns(workers, options, notify)
    return found


def _variants(name: str, options: BenchmarkOptions) -> Iterator[Row]:
    """Yield rows of a model without their step: of each mode and type, and of packed ones each type of inputs."""
    compressed = is_compressed(resolve_model_path(name), trust=options.trust_remote_code)
    for mode, dtype in product(options.mode if compressed else ("dense",), options.dtype):
        for inputs in options.activations if mode == "packed" else ("",):
            yield Row(name, mode, dtype, inputs, "", compressed)


def _opened(worker: _Process, row: Row, options: BenchmarkOptions, found: Benchmark) -> Iterator[Row]:
    """Open a model in a process; yield its rows, none if inputs are to be rounded and no layer can have them so."""
    asked = {"mode": row.mode if row.compressed else None, "dtype": row.dtype, "activations": row.inputs or None}
    said = worker.ask(
        "open", name=row.model, threads=options.threads, trust_remote_code=options.trust_remote_code, **asked
    )
    found.machine = said["machine"]
    if row.inputs == "int8" and not said["rounds"]:
        found.notes.append(f"{row.model}, {row.dtype}: no layer has levels that are integers; inputs stay floats.")
        return
    for step in options.step:
        if step == "kernel" and said["no_step"]:
            note = f"{row.model}, {row.mode}, {row.dtype}: the kernel has no step for it: {said['no_step']}."
            found.notes += [note] if note not in found.notes else []
            continue
        bound = ROUNDED if row.inputs == "int8" else BOUNDS[row.dtype]
        measured = {"bytes_read": said["bytes_read"], "interpreter": said["interpreter"], "bound": bound}
        yield replace(row, step=step, peak={}, first={}, prefill={}, decode={}, **measured)


def _write_reference(name: str, mode: str, options: BenchmarkOptions, file: Path) -> None:
    """Write what a mode should compute: layers that stay packed do not round decoded numbers, others do."""
    with _process() as worker:
        compressed = is_compressed(resolve_model_path(name), trust=options.trust_remote_code)
        opened = "packed" if mode == "packed" else "dense"
        worker.ask(
            "open", name=name, threads=options.threads, mode=opened if compressed else None, dtype="float32",
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
        worker.ask("reference", file=str(file))


def _check(worker: _Process, row: Row, reference: Path, file: Path) -> None:
    """Compare the logits of a row with what they should be."""
    worker.ask("logits", step=row.step, file=str(file))
    right, own = load_file(reference)["logits"], load_file(file)["logits"]
    row.difference = float((own - right).square().mean().sqrt() / right.square().mean().sqrt())


def _take_turns(workers: Sequence[tuple[_Process, Row]], options: BenchmarkOptions, notify: Notify) -> None:
    advance = counting(notify, "turns", options.repeats)
    for worker, row in workers:
        worker.ask("run", step=row.step, batch=1, prompt=options.prompt_tokens, tokens=_FEW)
    for _ in range(options.repeats):
        for worker, row in workers:
            for batch in options.batches:
                said = worker.ask(
                    "run", step=row.step, batch=batch, prompt=options.prompt_tokens, tokens=options.tokens
                )
                for name in ("first", "prefill", "decode"):
                    getattr(row, name).setdefault(batch, []).append(said[name])
                row.peak[batch] = max(row.peak.get(batch, 0), said["peak"])
        advance(1)
