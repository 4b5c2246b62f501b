"""Teaches transformers to open compressed models, at once or as soon as it is imported, and costs nothing until then.

``hf_quantizer`` registers when it is imported, and needs transformers. A finder on ``sys.meta_path`` waits for the
module that holds the list of quantizers, lets the others find and run it, imports ``hf_quantizer``, and removes itself.
Other packages are waited for in the same way, see ``when_imported``.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

LIST = "transformers.quantizers.auto"
MODELS = "transformers.modeling_utils"
OURS = ("sparlow.model.artefact.hf_quantizer", "sparlow.runtime.opening", "sparlow.runtime.adapters")


def register() -> None:
    """Register the quantizer now if the list of quantizers is there, otherwise when it comes."""
    when_imported(LIST, _import_ours)
    when_imported(MODELS, _keep_cards)


def when_imported(name: str, then: Callable[[], None]) -> None:
    """Call a function now if a module is there, otherwise right after it has been run; once, however often asked."""
    if name in sys.modules:
        then()
    elif not any(isinstance(finder, _Waiting) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(name, then))


def _keep_cards() -> None:
    from sparlow.model.artefact.card import install

    install()


def _import_ours() -> None:
    """Warn if a changed transformers cannot be taught the format; all that needs no transformers still works."""
    try:
        for name in OURS:
            importlib.import_module(name)
    except ImportError as error:
        warnings.warn(
            f"sparlow cannot teach this version of transformers to open compressed models ({error}). Install a version "
            "that sparlow supports, see its requirements.",
            RuntimeWarning,
            stacklevel=2,
        )


class _Waiting(MetaPathFinder):
    """Finds no module by itself, but makes a loader call a function right after a module has been run."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenOurs(spec.loader, self)
        return spec


class _ThenOurs(Loader):
    """Runs a module as its own loader does, then removes the finder and calls what waited."""

    def __init__(self, loader: Loader, finder: _Waiting) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # nobody else is to meet this one
        module.__loader__ = self._loader
        if self._finder in sys.meta_path:  # another thread may have removed it
            sys.meta_path.remove(self._finder)
        self._finder.then()
