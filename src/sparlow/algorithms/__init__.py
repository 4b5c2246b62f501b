"""One paper, one file, one pure function. Importing this package registers every file in it.

To add an algorithm, write one file with one function under ``@pruner`` or ``@decomposer``: it appears in the command
line, the recipe's schema, the docs, the benchmarks and the contract tests. A file of your own is given with
``--plugin FILE.py``; an installed package names its module under the entry point ``sparlow.algorithms``.
"""

from importlib import import_module
from pkgutil import iter_modules

from sparlow.algorithms._plugins import load_installed, load_plugin, revision_of
from sparlow.algorithms._registry import (
    Algorithm,
    Count,
    Positive,
    Pruner,
    algorithms,
    decomposer,
    find,
    pruner,
    usual,
    variants,
)
from sparlow.algorithms._results import Decomposition, Pruned, SolveStats
from sparlow.algorithms._solve import REVISION, check_budget, decompose, solve
from sparlow.schema import Option

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
load_installed()

__all__ = [
    "REVISION",
    "Algorithm",
    "Count",
    "Decomposition",
    "Option",
    "Positive",
    "Pruned",
    "Pruner",
    "SolveStats",
    "algorithms",
    "check_budget",
    "decompose",
    "decomposer",
    "find",
    "load_plugin",
    "pruner",
    "revision_of",
    "solve",
    "usual",
    "variants",
]
