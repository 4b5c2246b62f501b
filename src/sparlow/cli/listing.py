"""What commands that only list something show: algorithms, recipes, forms of export, what is installed."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.markup import escape

from sparlow.cli import display
from sparlow.schema import Doc

if TYPE_CHECKING:  # help is shown without torch, which comes with these
    from sparlow.algorithms import Algorithm
    from sparlow.exporting._registry import Form
    from sparlow.recipe.named import Packaged


def show_algorithms(algorithms: "Iterable[Algorithm]") -> None:
    """Names, one line each, their options and defaults."""
    for algorithm in algorithms:
        names = ", ".join((algorithm.name, *algorithm.aliases))
        display.out.print(f"[bold]{escape(names)}[/] ({algorithm.kind}): {escape(algorithm.summary)}", highlight=False)
        for option in algorithm.options.values():
            display.out.print(
                f"    --option {option.name}={escape(option.shown_default)}  ({escape(option.choices)})",
                highlight=False,
            )


def show_recipes(found: "Iterable[Packaged]") -> None:
    """The packaged recipes: names, what they are for, and what they gave."""
    for one in found:
        display.out.print(f"[bold]{escape(one.name)}[/]", highlight=False)
        for line in (one.summary, f"gave: {one.measured}" if one.measured else "not measured"):
            display.out.print(f"    {line}", markup=False, highlight=False)


def show_env(found: Mapping[str, str]) -> None:
    """What a bug report needs of the machine and of what is installed."""
    width = max(map(len, found))
    for name, value in found.items():
        display.out.print(f"{name:<{width}}  {value}", markup=False, highlight=False)


def show_forms(forms: "Iterable[Form]") -> None:
    """The forms of ``sparlow export``: what each keeps and loses, and which programs open it."""
    for form in forms:
        display.out.print(f"[bold]{escape(form.name)}[/]: {escape(form.summary)}", highlight=False)
        rows = {"keeps": form.keeps, "loses": form.loses, "opened by": ", ".join(form.opened_by)}
        for what, text in rows.items():
            display.out.print(f"    {what + ':':<11}{text}", markup=False, highlight=False)
        for option in form.options.values():
            doc = option.note(Doc)
            display.out.print(
                f"    --option {option.name}={escape(option.shown_default)}  ({escape(option.choices)})"
                + (f"  {escape(doc.text)}" if doc else ""),
                highlight=False,
            )
