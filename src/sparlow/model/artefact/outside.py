"""The embedding and the output head of a model, which stay ordinary modules where they are stored in codes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparlow.errors import InputError
from sparlow.model.artefact.layers import SparseLowRankLinear
from sparlow.model.artefact.opening import InFile
from sparlow.model.artefact.packing import stored_form
from sparlow.model.artefact.schemes import DENSE, StoredLayer
from sparlow.model.artefact.shards import Header, check_parts
from sparlow.model.artefact.stored_form import StoredForm, is_flat, take_packed
from sparlow.model.forward.compressible import weight_of

if TYPE_CHECKING:  # transformers imports this file while it is on its way in: see registration.py
    from transformers import PreTrainedModel

EMBEDDING, HEAD = "embedding", "output head"


@dataclass(frozen=True)
class Outside:
    """The embedding or the head of a model.

    Attributes:
        name: Of the module.
        module: It.
        what: ``EMBEDDING`` or ``HEAD``.
    """

    name: str
    module: nn.Module
    what: str

    @property
    def weight(self) -> nn.Parameter:
        """Its weight (vocabulary, features).

        Raises:
            InputError: It has none that could be quantised.
        """
        W = self.module._parameters.get("weight")  # noqa: SLF001 - attributes of modules have no type
        plain = isinstance(self.module, nn.Embedding) or weight_of(self.module, "", self.module) is not None
        if W is None or W.ndim != 2 or not W.is_floating_point() or not plain or self._transposed:  # noqa: PLR2004
            raise InputError(
                f"The {self.what} {self.name} of a {type(self.module).__name__} cannot be quantised. Leave it as it is."
            )
        return W

    @property
    def shape(self) -> tuple[int, int]:
        """(vocabulary, features)."""
        rows, columns = self.weight.shape
        return rows, columns

    @property
    def _transposed(self) -> bool:
        found = None if isinstance(self.module, nn.Embedding) else weight_of(self.module, "", self.module)
        return found is not None and found.transposed


def outside_modules(model: "PreTrainedModel") -> dict[str, Outside]:
    """Return the embedding and the head of a model, as far as it has them, by what they are."""
    untyped: Any = model  # transformers does not annotate these methods
    found = {EMBEDDING: untyped.get_input_embeddings(), HEAD: untyped.get_output_embeddings()}
    names = {id(module): name for name, module in model.named_modules()}
    return {
        what: Outside(names[id(module)], module, what)
        for what, module in found.items()
        if module is not None and id(module) in names and not isinstance(module, SparseLowRankLinear)
    }


def are_tied(model: "PreTrainedModel") -> bool:
    """Whether the embedding and the head of a model are one tensor, or will be where its weights are not there yet."""
    found = outside_modules(model)
    if len(found) < 2:  # noqa: PLR2004 - both
        return False
    tied = {frozenset(pair) for pair in (model.all_tied_weights_keys or {}).items()}
    one, other = found[EMBEDDING], found[HEAD]
    return one.weight is other.weight or {f"{one.name}.weight", f"{other.name}.weight"} in tied


def check_outside(outside: Outside, parts: Mapping[str, Header], record: StoredLayer) -> None:
    """Check that a file's tensors are those of an embedding or a head in codes.

    Raises:
        InputError: They are not.
    """
    scheme = record.scheme
    if scheme.pattern != DENSE or scheme.rank or not scheme.grid or scheme.transposed:
        raise InputError(f"{outside.name} is the {outside.what}, which cannot be stored in this way. Restore the file.")
    bias = getattr(outside.module, "bias", None) is not None
    check_parts(outside.name, parts, record, shape=outside.shape, bias=bias)


def ends_in_file(
    model: "PreTrainedModel",
    ends: Mapping[str, Outside],
    records: Mapping[str, StoredLayer],
    parts: Mapping[str, Mapping[str, Header]],
) -> dict[str, InFile]:
    """Return the embedding and the head in codes, by the names of their records.

    One that is tied lies where the other does. Where the two are tied and only one is on record, there are none.
    """
    tied = (model.all_tied_weights_keys or {}).items()
    ties = {one.removesuffix(".weight"): other.removesuffix(".weight") for one, other in tied}
    names = {end.name: name for name, end in ends.items()}
    found = {}
    for name, end in ends.items():
        others = {ties.get(end.name), *(one for one, other in ties.items() if other == end.name)} - {None}
        stored = name if name in parts else next((names[o] for o in others if names.get(o) in parts), None)
        if stored and others <= names.keys():
            found[name] = InFile(end.name, stored, records[name], parts[stored])
    return found


def mark(module: nn.Module, form: StoredForm) -> None:
    """Remember how a module's weight is packed, and let it take the packed form from a state dict."""
    if stored_form(module) is None:
        module.register_load_state_dict_pre_hook(_take)
    vars(module)["stored"] = form


def _take(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Put the decoded weight in the place of the packed one, which is what Trainer finds in a checkpoint."""
    form = stored_form(module)
    if form is not None and is_flat(state.get(f"{prefix}weight")):
        W: Tensor = module.weight  # type: ignore[assignment]  # it has a form
        weight, found = take_packed(state, prefix, (W.shape[0], W.shape[1]), form.grid, form.dtype or W.dtype)
        state[f"{prefix}weight"] = weight.S
        vars(module)["stored"] = found
