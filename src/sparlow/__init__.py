"""Compress pretrained language models in one shot into sparse plus low-rank form: every linear W becomes S + U V.

    import sparlow
    report = sparlow.compress("meta-llama/Llama-3.2-1B", sparlow.Recipe(pattern="16:32", rank=64), out="llama-16to32")
    model = sparlow.load("llama-16to32")   # or, after this import, AutoModelForCausalLM.from_pretrained("llama-16to32")

Importing the package teaches transformers to open the directories it writes. It takes no time by itself: each name is
imported from its place when it is first used.
"""

from typing import TYPE_CHECKING

from sparlow.model.artefact.registration import register as _register

if TYPE_CHECKING:
    from sparlow.algorithms import Decomposition, decompose, decomposer, pruner
    from sparlow.errors import InputError, RunError
    from sparlow.evaluation.perplexity import evaluate
    from sparlow.exporting.adapter import open_adapter
    from sparlow.exporting.export import export
    from sparlow.exporting.hub import push_to_hub
    from sparlow.finetuning.finetune import finetune
    from sparlow.linalg.patterns import NM, Unstructured
    from sparlow.model.artefact.layers import SparseLowRankLinear
    from sparlow.planning.plan import Plan, plan
    from sparlow.progress import Progress
    from sparlow.recipe.recipe import Recipe
    from sparlow.report.comparison import Comparison
    from sparlow.report.records import Report
    from sparlow.run.benchmarking import benchmark
    from sparlow.run.compress import compress
    from sparlow.run.inspection import Inspection, Verification, inspect, verify
    from sparlow.run.methods import compare
    from sparlow.run.statistics import Statistics, statistics
    from sparlow.runtime.benchmark import Benchmark
    from sparlow.runtime.modes import load, mode

    __version__: str

__all__ = [
    "NM",
    "Benchmark",
    "Comparison",
    "Decomposition",
    "InputError",
    "Inspection",
    "Plan",
    "Progress",
    "Recipe",
    "Report",
    "RunError",
    "SparseLowRankLinear",
    "Statistics",
    "Unstructured",
    "Verification",
    "benchmark",
    "compare",
    "compress",
    "decompose",
    "decomposer",
    "evaluate",
    "export",
    "finetune",
    "inspect",
    "load",
    "mode",
    "open_adapter",
    "plan",
    "pruner",
    "push_to_hub",
    "statistics",
    "verify",
]

_MODULES = {
    "sparlow.algorithms": ("Decomposition", "decompose", "decomposer", "pruner"),
    "sparlow.errors": ("InputError", "RunError"),
    "sparlow.evaluation.perplexity": ("evaluate",),
    "sparlow.exporting.adapter": ("open_adapter",),
    "sparlow.exporting.export": ("export",),
    "sparlow.exporting.hub": ("push_to_hub",),
    "sparlow.finetuning.finetune": ("finetune",),
    "sparlow.linalg.patterns": ("NM", "Unstructured"),
    "sparlow.model.artefact.layers": ("SparseLowRankLinear",),
    "sparlow.planning.plan": ("Plan", "plan"),
    "sparlow.progress": ("Progress",),
    "sparlow.recipe.recipe": ("Recipe",),
    "sparlow.report.comparison": ("Comparison",),
    "sparlow.report.records": ("Report",),
    "sparlow.run.benchmarking": ("benchmark",),
    "sparlow.run.compress": ("compress",),
    "sparlow.run.inspection": ("Inspection", "Verification", "inspect", "verify"),
    "sparlow.run.methods": ("compare",),
    "sparlow.run.statistics": ("Statistics", "statistics"),
    "sparlow.runtime.benchmark": ("Benchmark",),
    "sparlow.runtime.modes": ("load", "mode"),
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        from sparlow.version import own_version

        found: object = own_version()
    else:
        module = next((module for module, names in _MODULES.items() if name in names), None)
        if module is None:
            raise AttributeError(f"module 'sparlow' has no attribute {name!r}")
        from importlib import import_module

        found = getattr(import_module(module), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


_register()
