"""Compare methods on one model and text: one dense evaluation, a directory for each run, tables, figures and a page."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparlow.distributed import ALONE, require_one
from sparlow.errors import InputError, RunError
from sparlow.evaluation.tasks import NO_TASKS, LoadedTasks, measure_tasks
from sparlow.evaluation.texts import require_tokenizer
from sparlow.files import replacing
from sparlow.machine import free_memory, pick_device
from sparlow.model.forward.roles import kept_dense
from sparlow.model.loading.meta import meta_model
from sparlow.model.loading.source import OpenedModel, open_model, upcast_for_cpu
from sparlow.own_settings import own_settings
from sparlow.planning.feasibility import require_feasible
from sparlow.planning.plan import plan_of
from sparlow.planning.workload import Structure
from sparlow.progress import Notify, Progress, labelled
from sparlow.recipe.budgets import select
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.run_options import DEFAULT, RunOptions
from sparlow.report.compare_page import write_comparison
from sparlow.report.comparison import MATCHED, Comparison, Row
from sparlow.report.html_page import html, write_reports
from sparlow.report.records import Report
from sparlow.run.cases import OF_TEXT, folder_of
from sparlow.run.compress import memory_may_end, open_dense, windows_to_calibrate, windows_to_evaluate
from sparlow.run.job import Job
from sparlow.run.output_dir import check_folder, claimed
from sparlow.text import in_domain

if TYPE_CHECKING:
    from sparlow.evaluation.agreement import Predictions
    from sparlow.model.artefact.dtypes import StoredDtypes

REPORTS = "reports"  # the folder of those whose model was not kept
BATCH = 8  # sequences in one pass of a model that answers tasks


@own_settings()
def compare(
    model: str | Path,
    recipes: Mapping[str, Recipe],
    *,
    out: str | Path,
    options: RunOptions = DEFAULT,
    tasks: LoadedTasks = NO_TASKS,
    reports_only: bool = False,
    overwrite: bool = False,
    force: bool = False,
    notify: Notify = lambda _: None,
) -> Comparison:
    """Compress one model by every recipe, each into a directory of its own in ``out``; finished runs are reused.

    Args:
        model: Hub id, directory or .gguf file.
        recipes: By the name of the run, see ``recipes_for``; all with the same calibration text, but for the seed.
        out: Directory for the results, ``compare.json`` (rewritten after every run), the page, tables and figures.
        options: How each method runs; the dense model is measured once.
        tasks: Loaded; every model answers them.
        reports_only: Keep no model, but its report and recipe in ``out``/reports.
        overwrite: Do everything again.
        force: As of ``sparlow.compress``.
        notify: Called after every step; stages begin with the run's name, but for the dense model's.

    Returns:
        What ``compare.json`` holds; a method whose run failed is in ``failed``, and did not stop the others.

    Raises:
        InputError: Something given cannot be used, or ``out`` holds other results.
    """
    require_one("A comparison")
    out = Path(out)
    _check(recipes, out, overwrite=overwrite)
    earlier = None if overwrite else Comparison.found_in(out)
    if not force:
        require_feasible(model, {out / folder_of(name): recipe for name, recipe in recipes.items()}, options)
    runs = _Runs(model, recipes, out, options, tasks, notify)
    runs.begin(earlier)
    for name in recipes:
        if runs.reuse(name, earlier):
            continue
        runs.go(name, overwrite=overwrite)
        runs.found.write(out)
        if reports_only and name not in runs.found.failed:
            _keep_report(out, name)
    runs.found.write(out)
    write_comparison(runs.found, out)
    return runs.found


class _Runs:
    """The runs of one comparison, and what they share: the dense model, its figures and predictions, the text."""

    def __init__(
        self,
        model: str | Path,
        recipes: Mapping[str, Recipe],
        out: Path,
        options: RunOptions,
        tasks: LoadedTasks,
        notify: Notify,
    ) -> None:
        self._model, self._recipes, self._out, self._options = model, recipes, out, options
        self._tasks, self._notify = tasks, notify
        self._known: dict[str, Any] = {}  # perplexities of the dense model
        self._predictions: dict[str, Predictions] = {}  # of the dense model, too
        self._answers: list[str] = []
        self._dense_tasks: dict[str, Any] = {}
        self._opened: tuple[OpenedModel, StoredDtypes] | None = None
        self.found: Comparison

    def begin(self, earlier: Comparison | None) -> None:
        """Open the dense model, see that every recipe fits it, cut the text, and take over earlier rows."""
        first, options = next(iter(self._recipes.values())), self._options
        self._opened = opened, storage = open_dense(self._model, None, first, options)
        roles = kept_dense(opened.model, opened.decoder)
        for recipe in self._recipes.values():
            select(opened.model, opened.decoder, recipe, storage, roles)
        seeds = {recipe.seed: recipe for recipe in self._recipes.values()}
        self._windows = {seed: windows_to_calibrate(None, opened, recipe) for seed, recipe in seeds.items()}
        seqlen = options.evaluate_seqlen or first.seqlen
        self._texts = windows_to_evaluate(options.evaluate, opened, seqlen, options.limit, first.column)
        evaluation = _evaluation(first, seqlen, self._texts) | (
            {"tasks": [*self._tasks.names]} if self._tasks.items else {}
        )
        self.found = Comparison(opened.name, first.to_dict(), evaluation, _settings(self._recipes))
        self.found.take_over(earlier, self._out)
        if self._tasks.items:
            same = earlier is not None and earlier.evaluation == evaluation and earlier.model == opened.name
            known = earlier.dense.get("tasks") if same and earlier else None
            self._dense_tasks = known or self._asked("dense", str(self._model), first.dtype)

    def reuse(self, name: str, earlier: Comparison | None) -> bool:
        """Take over a row of the very same run whose model was not kept; return whether there is one."""
        if earlier is None or (self._out / folder_of(name)).exists():
            return False
        if (earlier.model, earlier.evaluation) != (self.found.model, self.found.evaluation):
            return False
        known = next((row for row in earlier.rows if row.name == name), None)
        if known is None or known.recipe != self._recipes[name].to_dict():
            return False
        self.found.rows.append(known)
        self.found.dense = earlier.dense
        return True

    def go(self, name: str, *, overwrite: bool) -> None:
        """Run one method; its row, or why there is none, goes to ``found``."""
        folder = self._out / folder_of(name)
        with claimed(folder, overwrite=overwrite, finished=True):
            report = self._report_of(name, folder, overwrite=overwrite)
        if report:
            self.found.rows.append(Row.of(name, report))
            self.found.dense = {"perplexity": report.dense["perplexity"], "bytes": report.bytes["dense"]}
            self.found.dense |= {"tasks": self._dense_tasks} if self._dense_tasks else {}
        if self._opened and self._opened[0].changes:
            self._opened = None  # what was compressed in place is freed before the next is opened
        free_memory()  # of what failed, too

    def _report_of(self, name: str, folder: Path, *, overwrite: bool) -> Report | None:
        """Run one method, and let its model answer; if that fails for a reason of its own, ``found`` says why."""
        recipe = self._recipes[name]
        try:
            with memory_may_end(self._model, recipe, self._options, ALONE, folder):
                report = self._compressed(name, folder, overwrite=overwrite)
                if self._tasks.items:
                    report.dense["tasks"] = self._dense_tasks
                    report.compressed["tasks"] = self._asked(name, str(folder), recipe.dtype)
                    write_reports(report, folder)
        except RunError as error:
            self.found.failed[name] = str(error)
            return None
        return report

    def _compressed(self, name: str, folder: Path, *, overwrite: bool) -> Report:
        """Run the job of one method, and keep what it has found of the dense model, however it ends."""
        recipe = self._recipes[name]
        self._opened = opened, storage = self._opened or open_dense(self._model, None, recipe, self._options)
        own = labelled(self._notify, before=f"{name}: ")

        def tell(step: Progress) -> None:  # the dense model is that of all runs
            (self._notify if step.stage.startswith("dense ") else own)(step)

        job = Job(opened, storage, recipe, self._windows[recipe.seed], tell, offload=self._options.offload)
        job.write_to(folder, overwrite=overwrite)
        job.known_dense |= self._known
        job.runner.predictions |= self._predictions
        job.answers.dense = self._answers
        try:
            return job.go(self._texts)
        finally:
            self._known |= job.known_dense
            self._predictions |= job.runner.predictions
            self._answers = job.answers.dense

    def _asked(self, name: str, model: str, dtype: str) -> dict[str, Any]:
        """Let a model answer the tasks."""
        device, trust = pick_device(self._options.device), self._options.trust_remote_code
        opened = open_model(model, dtype=dtype, device=device, trust_remote_code=trust)
        tokenizer = require_tokenizer(opened.tokenizer, model)
        tell = labelled(self._notify, before=f"{name}: ")
        limit = self._options.limit
        ready = upcast_for_cpu(opened.model)
        return dict(measure_tasks(ready, tokenizer, self._tasks, limit=limit, batch_size=BATCH, notify=tell))


def _check(recipes: Mapping[str, Recipe], out: Path, *, overwrite: bool) -> None:
    """Check, before anything is opened, that the recipes go together and every directory can be written."""
    first = next(iter(recipes.values()))
    if any(getattr(recipe, name) != getattr(first, name) for recipe in recipes.values() for name in OF_TEXT):
        raise InputError(f"The recipes of a comparison read different text. Give all the same {', '.join(OF_TEXT)}.")
    for name in recipes:
        check_folder(out / folder_of(name), overwrite=overwrite, finished=True)


def _settings(recipes: Mapping[str, Recipe]) -> dict[str, dict[str, Any]]:
    """What must agree between runs that stand in one table, by their names: all that is not a run's own, or varied."""
    found = {}
    for name, recipe in recipes.items():
        head, *varied = name.split(" ")
        own = {"algorithm", "options", *(word.partition("=")[0] for word in varied)}
        if recipe.found_algorithm.kind == "pruner":
            own |= {"rank", "rank_share", "compression", "allocate", "factors"}
        if head.endswith(MATCHED):
            own |= {key for key in recipe.to_dict() if key.startswith("match")}
        found[name] = {key: value for key, value in recipe.to_dict().items() if key not in own}
    return found


def _evaluation(recipe: Recipe, seqlen: int, texts: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``compare.json`` says of the texts that perplexity is measured on."""
    return {
        "seqlen": seqlen,
        "windows": {name: len(windows) for name, windows in texts.items()},
        "in_domain": in_domain(recipe.calibration, texts),
    }


def _keep_report(out: Path, name: str) -> None:
    """Move report and recipe of a finished run to the others, and remove its model; the page says how to repeat it."""
    folder, kept = out / folder_of(name), out / REPORTS
    kept.mkdir(exist_ok=True)
    page = html(Report.from_file(folder / "report.json"), folder.name, recipe=f"{REPORTS}/{folder.name}.toml")
    with replacing(kept / f"{folder.name}.html") as partial:
        partial.write_text(page, encoding="utf-8")
    (folder / "recipe.toml").replace(kept / f"{folder.name}.toml")
    (folder / "report.json").replace(kept / f"{folder.name}.json")
    shutil.rmtree(folder)


@dataclass(frozen=True)
class Foreseen:
    """What a comparison will cost.

    Attributes:
        seconds: Of each run, by its name; less where results are there already.
        bytes: Of all models that are kept.
    """

    seconds: dict[str, float]
    bytes: int


def foresee(
    model: str | Path,
    recipes: Mapping[str, Recipe],
    *,
    out: str | Path,
    options: RunOptions = DEFAULT,
    notify: Notify = lambda _: None,
) -> Foreseen:
    """Predict what ``compare`` will take for the runs that are not there yet, trying each method on small layers.

    Raises:
        InputError: As of ``sparlow.plan``.
    """
    earlier = Comparison.found_in(Path(out))
    known = {row.name: row.recipe for row in earlier.rows} if earlier else {}
    new = {name: recipe for name, recipe in recipes.items() if known.get(name) != recipe.to_dict()}
    spent: dict[str, tuple[float, int]] = {}  # by recipe, whatever the seed
    structures: dict[str, Structure] = {}  # by the type of the weights
    seconds, size = {}, 0
    for done, (name, recipe) in enumerate(new.items(), 1):
        like = str(recipe.changed(seed=0).to_dict())
        if like not in spent:
            if recipe.dtype not in structures:
                trust = options.trust_remote_code
                structures[recipe.dtype] = Structure(
                    meta_model(str(model), dtype=recipe.dtype, trust_remote_code=trust)
                )
            found = plan_of(str(model), structures[recipe.dtype], recipe, options)
            spent[like] = found.seconds["total"], found.bytes["compressed"]
        seconds[name] = spent[like][0]
        size += spent[like][1]
        notify(Progress("estimate", done, len(new)))
    return Foreseen(seconds, size)
