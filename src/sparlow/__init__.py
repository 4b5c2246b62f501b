"""Compress pretrained language models in one shot into sparse plus low-rank form: every linear W becomes S + U V.

    import sparlow
    report = sparlow.compress("meta-llama/Llama-3.2-1B", sparlow.Recipe(pattern="2:4", rank=64), out="llama-2to4")
    model = sparlow.load("llama-2to4")   # or, after this import, AutoModelForCausalLM.from_pretrained("llama-2to4")

Importing the package teaches transformers to open the directories it writes.
"""

from sparlow.algorithms import Decomposition, decompose, decomposer, pruner
from sparlow.compression import compress
from sparlow.errors import InputError, RunError
from sparlow.estimate import Plan, plan
from sparlow.evaluation import evaluate
from sparlow.finetuning import finetune
from sparlow.linalg.patterns import NM, Unstructured
from sparlow.model.checkpoint import load
from sparlow.model.layers import SparseLowRankLinear
from sparlow.progress import Progress
from sparlow.recipe import Recipe
from sparlow.report import Report, own_version

__version__ = own_version()
__all__ = [
    "NM",
    "Decomposition",
    "InputError",
    "Plan",
    "Progress",
    "Recipe",
    "Report",
    "RunError",
    "SparseLowRankLinear",
    "Unstructured",
    "compress",
    "decompose",
    "decomposer",
    "evaluate",
    "finetune",
    "load",
    "plan",
    "pruner",
]
