"""``sparlow.benchmark``: how fast models run on the CPU, side by side."""

from collections.abc import Sequence
from pathlib import Path

from sparlow.progress import Notify
from sparlow.progress.live import watched
from sparlow.recipe.run_options import listed
from sparlow.runtime.benchmark import Benchmark
from sparlow.runtime.benchmark import benchmark as measure
from sparlow.runtime.options import BenchmarkOptions


def benchmark(
    models: str | Path | Sequence[str | Path],
    *,
    mode: str | Sequence[str] = BenchmarkOptions.mode,
    dtype: str | Sequence[str] = BenchmarkOptions.dtype,
    step: str | Sequence[str] = BenchmarkOptions.step,
    activations: str | Sequence[str] = BenchmarkOptions.activations,
    batch: int | Sequence[int] = 1,
    prompt_tokens: int = BenchmarkOptions.prompt_tokens,
    tokens: int = BenchmarkOptions.tokens,
    repeats: int = BenchmarkOptions.repeats,
    threads: int | None = BenchmarkOptions.threads,
    trust_remote_code: bool = BenchmarkOptions.trust_remote_code,
    notify: Notify | None = None,
) -> Benchmark:
    """Measure how fast models run on the CPU, in turns, each in a process of its own; what they compute is checked.

    Args:
        models: Directories, hub ids or .gguf files, compressed or not.
        mode: Of compressed models: "packed", "merged", "dense".
        dtype: Of what is not packed: "float32", "bfloat16", "float16".
        step: What computes the tokens behind the prompt: "kernel", "transformers".
        activations: Of packed layers whose levels are integers: "float", or "int8", which rounds their inputs.
        batch: Texts that are written at once.
        prompt_tokens: Tokens of each prompt, drawn at random.
        tokens: Tokens that are written behind it.
        repeats: Runs of each, in turns; the median counts.
        threads: Of torch and of the kernel; torch's own number if left out.
        trust_remote_code: Let models bring Python code of their own.
        notify: Called as it goes; if left out, it shows itself on a terminal and in a notebook.

    Raises:
        InputError: There is no such model, or no such mode, type or step.
        RunError: A process ended, as when memory is short.
    """
    options = BenchmarkOptions(
        mode=listed(mode),
        dtype=listed(dtype),
        step=listed(step),
        activations=listed(activations),
        batch=tuple(map(str, [batch] if isinstance(batch, int) else batch)),
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        repeats=repeats,
        threads=threads,
        trust_remote_code=trust_remote_code,
    )
    names = [str(name) for name in ([models] if isinstance(models, str | Path) else models)]
    with watched(notify) as tell:
        return measure(names, options, tell)
