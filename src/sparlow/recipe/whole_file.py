"""The whole file: what ``--size`` says in bytes, and in how many bits the embedding and the output head are stored."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from sparlow.errors import InputError
from sparlow.files import human_bytes
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.recipe.bits import Layer
from sparlow.recipe.recipe import AUTO, KEEP_ENDS, Recipe
from sparlow.recipe.sizes import parse_size

FEW_BITS = 9.0  # of a compressed weight, below which the embedding and the head are stored in int8
TOO_FEW_BITS = 2.2  # that a size leaves to a compressed weight, below which they are stored in int4
ENTRY = 100  # bytes that the header of a file takes for a tensor beside its name, at most
PARTS, PART = 8, 12  # tensors of a compressed layer, and characters that they add to its name, at most


@dataclass(frozen=True)
class Ends:
    """How the embedding and the output head are stored.

    Attributes:
        embedding: ``keep``, ``int8`` or ``int4``.
        head: The same; of a model that ties the two, what the embedding is.
        saved: Bytes of the file that this saves.
    """

    embedding: str = KEEP_ENDS
    head: str = KEEP_ENDS
    saved: int = 0

    def __str__(self) -> str:
        """One phrase for a sentence."""
        if self.embedding == self.head:
            what = "as they are" if self.head == KEEP_ENDS else f"in {self.head}"
            return f"embedding and output head {what}"
        said = (
            f"{what} {'as it is' if kind == KEEP_ENDS else f'in {kind}'}"
            for what, kind in (("embedding", self.embedding), ("output head", self.head))
        )
        return ", ".join(said)


AS_IT_IS = Ends()


def ends_of(model: PreTrainedModel, recipe: Recipe, storage: StoredDtypes, auto: str) -> Ends:
    """Return how the embedding and the head are stored where ``auto`` stands for a kind.

    Args:
        model: It may be on the meta device.
        recipe: What is asked for.
        storage: The types of the result.
        auto: ``keep``, ``int8`` or ``int4``; what cannot be stored so stays as it is.

    Raises:
        InputError: What is asked for is not possible.
    """
    kinds = [recipe.embedding, recipe.head]
    if auto == KEEP_ENDS and all(kind in (AUTO, KEEP_ENDS) for kind in kinds):
        return AS_IT_IS
    from sparlow.model.artefact.embedding import saved_bytes
    from sparlow.model.artefact.outside import EMBEDDING, HEAD, outside_modules

    there = outside_modules(model)
    tied = EMBEDDING in there and HEAD in there and there[EMBEDDING].module.weight is there[HEAD].module.weight
    given = [kind for kind in kinds if kind != AUTO]
    if tied and len(given) == 1:
        kinds = given * 2
    for i, what in enumerate((EMBEDDING, HEAD)):
        if kinds[i] == AUTO:
            kinds[i] = auto if what in there and _can_be_rounded(there[what]) else KEEP_ENDS
    embedding, head = kinds
    return Ends(embedding, head, saved_bytes(model, embedding, head, storage=storage))


def _can_be_rounded(outside: object) -> bool:
    try:
        _ = outside.weight  # type: ignore[attr-defined]  # of ``outside.Outside``
    except InputError:
        return False
    return True


def ends_for(model: PreTrainedModel, recipe: Recipe, storage: StoredDtypes, bits: float) -> Ends:
    """Return how the embedding and the head are stored beside weights of so many bits."""
    return ends_of(model, recipe, storage, "int8" if bits < FEW_BITS else KEEP_ENDS)


def bits_within(
    size: str, layers: Mapping[str, Layer], model: PreTrainedModel, recipe: Recipe, storage: StoredDtypes
) -> tuple[float, Ends]:
    """Return the bits that a size of the whole file leaves to a compressed weight, and how the ends are stored then.

    The embedding and the head stay as they are where that leaves 9 bits or more; else they are stored in int8, and in
    int4 where int8 would leave fewer than 2.2.

    Args:
        size: As typed: ``300MB``, or ``35%`` of the dense model.
        layers: That are compressed, by their full names.
        model: It may be on the meta device.
        recipe: Says how the ends are stored, if not ``auto``.
        storage: The types of the result.

    Raises:
        InputError: It is no size, or leaves nothing.
    """
    dense = storage.bytes_of(model)
    target = parse_size(size, dense)
    weights = sum(layer.weights for layer in layers.values())
    compressed = sum(layer.weights * layer.size + layer.bias for layer in layers.values())
    rest = dense - compressed + _headers(model, layers)
    bits, ends = 0.0, AS_IT_IS
    for kind, least in ((KEEP_ENDS, FEW_BITS), ("int8", TOO_FEW_BITS), ("int4", 0.0)):
        ends = ends_of(model, recipe, storage, kind)
        bits = 8 * (target - rest + ends.saved) / weights
        if bits >= least:
            break
    if bits <= 0:
        raise InputError(
            f"--size {size} is {human_bytes(target)}, and what is not compressed takes "
            f"{human_bytes(rest - ends.saved)} by itself ({ends}). Ask for more."
        )
    return bits, ends


def _headers(model: PreTrainedModel, layers: Mapping[str, Layer]) -> int:
    """Bytes of all shards' headers, at most."""
    own = sum(len(name) + ENTRY for name, _ in model.named_parameters())
    return own + sum(PARTS * (len(name) + PART + ENTRY) for name in layers)
