"""Compress pretrained language models in one shot into sparse plus low-rank form: every linear W becomes S + U V.

    import sparlow
    report = sparlow.compress("meta-llama/Llama-3.2-1B", sparlow.Recipe(pattern="16:32", rank=64), out="llama-16to32")
    model = sparlow.load("llama-16to32")   # or, after this import, AutoModelForCausalLM.from_pretrained("llama-16to32")

Importing the package teaches transformers to open the directories it writes.
"""

from sparlow.algorithms import Decomposition, decompose, decomposer, pruner
from sparlow.errors import InputError, RunError
from sparlow.evaluation.perplexity import evaluate
from sparlow.finetuning.finetune import finetune
from sparlow.linalg.patterns import NM, Unstructured
from sparlow.machine import own_version
from sparlow.model.artefact.checkpoint import load
from sparlow.model.artefact.layers import SparseLowRankLinear
from sparlow.planning.plan import Plan, plan
from sparlow.progress import Progress
from sparlow.recipe.recipe import Recipe
from sparlow.report.records import Report
from sparlow.run.compress import compress

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
