"""What ``import sparlow`` brings, and what it does not: tried in processes of their own."""

import os
import subprocess
import sys

import pytest

import sparlow
from families import save_tiny
from samples import few_of
from sparlow.recipe.recipe import Recipe

REGISTERED = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as found; assert 'sparlow' in found; "
NO_FINDER = "assert not [f for f in sys.meta_path if getattr(f, 'name', '') == 'transformers.quantizers.auto']; "


LOOKED_FOR = """
import importlib.util, sparlow
importlib.reload(sparlow)
importlib.util.find_spec('transformers.quantizers.auto')
from transformers.quantizers import HfQuantizer
"""


def run(program, *arguments):
    """Run a program in a new interpreter; what it printed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", f"import sys; {program}", *map(str, arguments)]
    ended = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    import torch

    place = tmp_path_factory.mktemp("place")
    save_tiny("llama", place / "model")
    windows = torch.randint(2, 97, (4, 16), generator=torch.Generator().manual_seed(1))
    sparlow.compress(
        place / "model", Recipe(algorithm="magnitude"), calibration=windows, out=place / "out", evaluate=()
    )
    return place / "out"


SPARLOW_FIRST, QUANTIZERS_FIRST = "import sparlow, transformers; ", "import transformers.quantizers.auto, sparlow; "
ORDERS = (SPARLOW_FIRST, "import transformers, sparlow; ", QUANTIZERS_FIRST, LOOKED_FOR)


@pytest.mark.slow
@pytest.mark.parametrize("imports", few_of(ORDERS, SPARLOW_FIRST, QUANTIZERS_FIRST))
def test_from_pretrained_opens_a_compressed_model_whatever_is_imported_first(imports, compressed):
    opened = "from transformers import AutoModelForCausalLM; m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
    density = "print(float((m.model.layers[0].mlp.up_proj.S != 0).float().mean()))"
    assert run(imports + REGISTERED + NO_FINDER + opened + density, compressed) == "0.5\n"


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["import peft, sparlow; ", "import sparlow, peft; "])
def test_peft_is_taught_whatever_is_imported_first(imports):
    pytest.importorskip("peft")
    known = "print(sorted(layer.__name__ for layer in peft.LoraConfig()._custom_modules))"
    assert run(imports + known) == "['PackedLinear', 'SparseLowRankLinear']\n"


BLOCKED = """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('transformers', 'datasets', 'accelerate', 'safetensors', 'huggingface_hub'):
            raise ImportError(f'{name} is blocked')
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.slow
def test_one_matrix_needs_no_transformers():
    program = """
import torch, sparlow
W, X = torch.randn(8, 16), torch.randn(64, 16)
found = sparlow.decompose(W, 2 * X.T @ X, pattern=sparlow.NM(2, 4), rank=2)
print(tuple(found.U.shape), int((found.S != 0).sum()))
"""
    assert run(BLOCKED + program) == "(8, 2) 64\n"


@pytest.mark.slow
def test_looking_into_a_result_needs_no_transformers(compressed):
    program = (
        BLOCKED.replace("'safetensors', ", "")
        + """
import sparlow
print(len(sparlow.inspect(sys.argv[1]).layers), len(sparlow.verify(sys.argv[1]).problems))
"""
    )
    assert run(program, compressed).split()[1] == "0"


def test_importing_alone_brings_neither_torch_nor_transformers():
    heavy = "[m for m in ('torch', 'transformers', 'datasets', 'numpy', 'typer', 'rich') if m in sys.modules]"
    assert run(f"import sparlow; sparlow.InputError; print({heavy})") == "[]\n"
    recipe = "from sparlow.recipe.recipe import Recipe"
    assert run(f"{recipe}; print({heavy})") == "[]\n"


@pytest.mark.slow
def test_a_transformers_that_has_changed_is_told_of_and_stops_nothing():
    program = """
import warnings, sparlow
sys.modules['sparlow.model.artefact.hf_quantizer'] = None  # what makes its import an ImportError
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter('always')
    import transformers.quantizers.auto
assert any('cannot teach this version of transformers' in str(w.message) for w in told)
"""
    run(program)


def test_every_public_name_is_there():
    assert set(sparlow.__all__) <= set(dir(sparlow))
    for name in sparlow.__all__:
        assert getattr(sparlow, name).__module__.startswith("sparlow")
    assert set(sparlow.__all__) == {name for names in sparlow._MODULES.values() for name in names}
    found = {}
    exec("from sparlow import *", found)  # noqa: S102 - the statement is what is tried
    assert set(sparlow.__all__) <= found.keys()
    assert found["compress"].__name__ == "compress"
    with pytest.raises(AttributeError, match="has no attribute 'compres'"):
        _ = sparlow.compres
    with pytest.raises(ImportError, match="compres"):
        exec("from sparlow import compres")  # noqa: S102 - the statement is what is tried
