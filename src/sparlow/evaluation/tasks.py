"""Named tasks through lm-eval: zero-shot and few-shot accuracy of a model that is already open.

lm-eval makes the prompts, fetches the data and scores; here its tasks run one after another, and each comes out as one
figure. Tasks are loaded apart from models: a wrong name or missing data is known before a model is opened, and several
models answer the same questions. lm-eval's bars and messages are held back unless the logger ``lm_eval`` has a level.
"""

import copy
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparlow.errors import InputError
from sparlow.evaluation.task_catalogue import Catalogue
from sparlow.model.loading.objects import in_eval_mode
from sparlow.progress import Notify, Progress
from sparlow.report.differences import mean_of_tasks

PAPER = ("piqa", "hellaswag", "arc_easy", "arc_challenge", "winogrande", "rte", "openbookqa", "boolq")
FEWSHOT = {"mmlu": 5}  # as everybody reports it; lm-eval shows none where neither the task nor the user says how many
SEED = 1234  # lm-eval's own, of the choice of the examples shown


class TaskResult(TypedDict):
    """The figure of a task or of a group of tasks.

    ``metric`` is acc_norm where it exists, else acc, else the task's first; ``stderr`` is None where lm-eval gives
    none; ``samples`` counts questions; ``fewshot`` the examples before each, None if they differ within a group.
    """

    metric: str
    value: float
    stderr: float | None
    samples: int
    fewshot: int | None
    subtasks: NotRequired[dict[str, "TaskResult"]]


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, for any number of models.

    Attributes:
        items: What lm-eval calls ``Task`` and ``Group`` objects, in the order asked for.
        names: As asked for, ``paper`` as its eight.
    """

    items: tuple[Any, ...] = ()
    names: tuple[str, ...] = ()


NO_TASKS = LoadedTasks()


def load_tasks(names: Sequence[str], *, path: str | Path | None = None, fewshot: int | None = None) -> LoadedTasks:
    """Find tasks and fetch their data.

    Args:
        names: Tasks, groups or tags of lm-eval or of ``path``; ``paper`` stands for the eight of the paper.
        path: Directory with task files (.yaml); a name in it goes before the same name of lm-eval.
        fewshot: Examples shown before each question; by default as the task says, else 5 for ``mmlu`` and none for the
            rest. A task that says 0 stays there: its prompt holds examples of its own, or must not have any.

    Raises:
        InputError: The package lm-eval is missing, a name is unknown, or a task's file or data cannot be read.
    """
    wanted = list(dict.fromkeys(one for name in names for one in (PAPER if name == "paper" else (name,))))
    if not wanted:
        if path is not None or fewshot is not None:
            raise InputError("No task is named. Give --tasks, such as --tasks paper.")
        return NO_TASKS
    if fewshot is not None and fewshot < 0:
        raise InputError(f"fewshot must be at least 0, not {fewshot}.")
    items = []
    with _quiet():
        catalogue = Catalogue(path)
        catalogue.require(wanted)
        for name in wanted:
            found = catalogue.load(name)
            for task in (task for item in found for task in _leaves(item)):
                _prepare(task, fewshot, FEWSHOT.get(name, 0))
            items += found
    return LoadedTasks(tuple(items), tuple(wanted))


def measure_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: LoadedTasks,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    notify: Notify = lambda _: None,
) -> dict[str, TaskResult]:
    """Answer the questions of ``tasks`` with ``model``, on its device and in its type; nothing is copied.

    Args:
        model: Any causal language model of transformers; put in eval mode for it, and left as it was.
        tokenizer: Its tokenizer.
        tasks: See ``load_tasks``.
        limit: At most so many questions of each task, the first ones.
        batch_size: Sequences in one pass of the model, fewer where their logits would be many; a question makes as many
            as it has choices.
        notify: Told how many questions are answered, at stage "tasks".

    Returns:
        One figure a task; a group that has a figure is one entry, with its parts under ``subtasks``.

    Raises:
        InputError: The tokenizer has no end-of-text token or gives ids that the model lacks, or the model reads fewer
            tokens than a task lets it write.
    """
    from sparlow.evaluation.bounded_harness import BoundedHarness

    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}.")
    results: dict[str, TaskResult] = {}
    with _quiet(), in_eval_mode(model), _own_head(model):
        progress = _TaskProgress(tasks, limit, notify)
        untyped: Any = BoundedHarness
        _require_end(tokenizer)
        # a copy: lm-eval gives a padding token to a tokenizer without one
        lm = untyped(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size)
        for task in (task for item in tasks.items for task in _leaves(item)):
            _require_room(task, lm.max_gen_toks, lm.max_length)
        for item in tasks.items:
            metrics = {}
            for task in _leaves(item):
                with progress.watching(model, task):
                    metrics[task.task_name] = _run(lm, task, limit)
            results |= _results(item, metrics)
    return results


@contextmanager
def _own_head(model: PreTrainedModel) -> Iterator[None]:
    """Keep lm-eval from tying an output head of the model's own to the embedding because its config says so."""
    untyped: Any = model
    untyped.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del untyped.tie_weights  # the class's is there again


def average(results: Mapping[str, TaskResult]) -> float | None:
    """Mean over tasks; None if there are none, or the figure of one is no share of right answers."""
    return mean_of_tasks(results)


def _require_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError if the tokenizer has no end-of-text token: lm-eval ends answers and pads questions with it."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            "The tokenizer has no end-of-text token, which lm-eval needs for every task. Set its eos_token first."
        )


def _require_room(task: Any, usual: int, context: int) -> None:  # noqa: ANN401 - Task
    """Raise InputError if a task lets the model write as many tokens as it reads, so that no question fits."""
    if task.get_config("output_type") != "generate_until":
        return
    kwargs = task.get_config("generation_kwargs") or {}
    wanted = kwargs.get("max_gen_toks") or kwargs.get("max_new_tokens") or usual
    if wanted >= context:
        raise InputError(
            f"The task {task.task_name!r} lets the model write {wanted} tokens, and the model reads at most {context}, "
            "the question included. Leave the task out, or lower max_gen_toks in a task file of yours (--task-path)."
        )


def _require_known(model: PreTrainedModel, given: Mapping[str, Any], first: tuple[Any, ...]) -> None:
    """Raise InputError if a question holds token ids that the model's embedding lacks."""
    ids = given.get("input_ids", first[0] if first else None)
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if ids is not None and int(ids.max()) >= rows:
        raise InputError(
            f"A question holds token id {int(ids.max())}, and the model's embedding has {rows} rows. Use the tokenizer "
            "that belongs to the model."
        )


def _leaves(item: Any) -> list[Any]:  # noqa: ANN401 - Task or Group, of a library imported only here
    """The tasks of a group, or the task itself."""
    leaves: list[Any] = item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]
    return leaves


def _prepare(task: Any, fewshot: int | None, custom: int) -> None:  # noqa: ANN401 - Task
    """Refuse what cannot be run here, and set the number of examples by lm-eval's rule."""
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"The task {task.task_name!r} runs code that the model writes, which sparlow does not do. Leave it out."
        )
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"The task {task.task_name!r} needs more than text. Leave it out.")
    own = task.get_config("num_fewshot")
    if own is None:
        task.set_config("num_fewshot", custom if fewshot is None else fewshot)
    elif own > 0 and fewshot is not None:
        task.set_config("num_fewshot", fewshot)


def _run(lm: Any, task: Any, limit: int | None) -> Mapping[str, Any]:  # noqa: ANN401 - HFLM, Task
    """All metrics of one task, as "acc,none" and "acc_stderr,none"."""
    from lm_eval.evaluator import evaluate

    task.set_fewshot_seed(seed=SEED)  # each model is shown the same examples
    alone = {"tasks": {task.task_name: task}, "groups": {}, "group_map": {}}
    untyped: Any = evaluate
    found: Mapping[str, Any] = untyped(lm=lm, task_dict=alone, limit=limit, log_samples=False)["results"]
    metrics: Mapping[str, Any] = found[task.task_name]
    return metrics


def _results(item: Any, metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, TaskResult]:  # noqa: ANN401 - Task or Group
    """The entry of a task or of a group; those of its parts where a group has no figure."""
    shots = {task.get_config("num_fewshot") for task in _leaves(item)}
    fewshot = shots.pop() if len(shots) == 1 else None
    if not hasattr(item, "get_all_tasks"):
        return {item.task_name: _result(metrics[item.task_name], fewshot)}
    parts: dict[str, TaskResult] = {}
    for child in item:
        parts |= _results(child, metrics)
    whole = item.aggregate(metrics)
    return {item.name: {**_result(whole, fewshot), "subtasks": parts}} if _keys(whole) else parts


def _result(metrics: Mapping[str, Any], fewshot: int | None) -> TaskResult:
    keys = _keys(metrics)
    key = next((key for name in ("acc_norm", "acc") for key in keys if key.partition(",")[0] == name), keys[0])
    metric, _, filtered = key.partition(",")
    stderr = metrics.get(f"{metric}_stderr,{filtered}", "N/A")
    return {
        "metric": metric if filtered == "none" else key,
        "value": float(metrics[key]),
        "stderr": None if stderr == "N/A" else float(stderr),
        "samples": int(metrics["sample_len"]),
        "fewshot": fewshot,
    }


def _keys(metrics: Mapping[str, Any]) -> list[str]:
    """The names of values among what lm-eval says of a task: "metric,filter"."""
    return [key for key in metrics if "," in key and "_stderr," not in key]


class _TaskProgress:
    """Notifies of how many questions are answered, by counting the rows that pass through the model."""

    def __init__(self, tasks: LoadedTasks, limit: int | None, notify: Notify) -> None:
        leaves = [task for item in tasks.items for task in _leaves(item)]
        sizes = [len(task.eval_docs) for task in leaves]
        self._sizes = {id(task): min(size, limit or size) for task, size in zip(leaves, sizes, strict=True)}
        self._done, self._notify = 0, notify

    @contextmanager
    def watching(self, model: PreTrainedModel, task: Any) -> Iterator[None]:  # noqa: ANN401 - Task
        """Count what is done inside for one task."""
        size, rows = self._sizes[id(task)], 0

        def count(_module: object, _given: object, output: Any) -> None:  # noqa: ANN401 - a ModelOutput
            nonlocal rows
            rows += len(output.logits)  # more than the requests where answers are generated, fewer where some agree
            self._tell(min(size * rows // len(task.instances), size - 1))

        def check(_module: object, first: tuple[Any, ...], given: dict[str, Any]) -> None:
            _require_known(model, given, first)

        hooks = model.register_forward_pre_hook(check, with_kwargs=True), model.register_forward_hook(count)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._done += size
        self._tell(0)

    def _tell(self, more: int) -> None:
        self._notify(Progress("tasks", self._done + more, sum(self._sizes.values())))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back lm-eval's bars, messages and prints, unless the logger "lm_eval" was given a level."""
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    if logger.level != logging.NOTSET:
        yield
        return
    create = tqdm.__init__

    def hidden(bar: Any, *given: Any, **options: Any) -> None:  # noqa: ANN401 - as tqdm's
        create(bar, *given, **{**options, "disable": True})

    # lm-eval has no switch for its bars, and tqdm none that works after it was imported
    tqdm.__init__ = hidden
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(logging.NOTSET)
        tqdm.__init__ = create
