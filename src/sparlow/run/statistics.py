"""``sparlow.statistics``: every weight of a dense model with the Gram of its inputs, kept for trying solvers on them.

The directory holds a file for each block: the weights, H of each distinct input, and a sample of its tokens. H is what
``compress`` sees before any layer is compressed; in a run, blocks behind the first read what compressed ones gave. That
of an expert is of its own tokens alone, without those that ``compress`` lets it borrow.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparlow.errors import InputError, reason
from sparlow.files import human_bytes, read_json, replacing, shard_filename, write_json
from sparlow.linalg.gram import Gram, GramAccumulator
from sparlow.model.forward.attention import unfused_heads, windows_at_once
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.input_statistics import Observation
from sparlow.model.loading.objects import require_as_it_is, require_usable
from sparlow.model.loading.source import OpenedModel, as_tokenizer
from sparlow.own_settings import own_settings
from sparlow.progress import Clock, Notify, counting
from sparlow.progress.live import watched
from sparlow.recipe.recipe import Recipe, RecipeLike, as_recipe, with_calibration
from sparlow.recipe.run_options import RunOptions
from sparlow.recipe.training_plan import micro_batch
from sparlow.report.tabular import Tabular
from sparlow.run.compress import open_dense, windows_to_calibrate
from sparlow.run.passes import BlockwiseRunner
from sparlow.run.sensitivity import DenseWalk

if TYPE_CHECKING:
    from sparlow.recipe.recipe import Calibration

NAME = "statistics.json"
VERSION = 1  # of its keys
_KEYS = {"version", "model", "damping", "relative_damping", "layers"}


class Layer(NamedTuple):
    """A weight, and what it reads.

    Attributes:
        W: (out, in), in the model's type.
        gram: Of its inputs, damped as the recipe says.
    """

    W: Tensor
    gram: Gram


@dataclass(frozen=True)
class _Place:
    """Where a layer lies: its file, its shape, and the layer under whose name the statistics of its input lie."""

    file: str
    shape: tuple[int, int]
    owner: str
    tokens: int


class Statistics(Tabular, Mapping[str, Layer]):
    """Weights and Grams by the full name of the layer, each read from disk when it is asked for.

        stats = sparlow.statistics("MODEL", calibration="c4", out="stats")
        W, gram = stats["model.layers.0.mlp.down_proj"]
        sparlow.decompose(W, gram, pattern="2:4", rank=64, algorithm="mine")

    Layers that share an input share its Gram, if they are asked for one after the other.

    Args:
        folder: A directory of ``sparlow.statistics``.

    Raises:
        InputError: It is none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        data = read_json(self.folder / NAME)
        if not data.keys() >= _KEYS or data["version"] != VERSION:
            raise InputError(f"{self.folder / NAME} is not of this version of sparlow. Collect the statistics again.")
        try:
            self.model, self.damping = str(data["model"]), float(data["damping"])
            self.relative_damping = float(data["relative_damping"])
            self._places = {
                str(name): _Place(shard_filename(row["file"]), (*row["shape"],), str(row["owner"]), int(row["tokens"]))
                for name, row in data["layers"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise InputError(f"{self.folder / NAME} is damaged ({problem}). Collect the statistics again.") from None
        self._last: tuple[str, Gram] | None = None  # by the name of its owner

    def __getitem__(self, name: str) -> Layer:
        """Read a weight and its Gram."""
        place = self._places[name]
        path = self.folder / place.file
        try:
            with safe_open(path, framework="pt") as file:
                W = file.get_tensor(f"{name}.weight")
                if self._last is None or self._last[0] != place.owner:
                    self._last = None  # freed before the next is made
                    self._last = (place.owner, self._gram(file, place))
        except (OSError, SafetensorError) as problem:
            raise InputError(f"{path} cannot be read ({reason(problem)}). Collect the statistics again.") from problem
        return Layer(W, self._last[1])

    def _gram(self, file: Any, place: _Place) -> Gram:  # noqa: ANN401 - of a library without types
        if not place.tokens:  # of no tokens, every input would count as dead
            return Gram.identity(place.shape[1])
        H, sample = (file.get_tensor(f"{place.owner}.{part}") for part in ("H", "sample"))
        return Gram.damped(H, absolute=self.damping, relative=self.relative_damping, sample=sample)

    def __iter__(self) -> Iterator[str]:
        """The names of the layers, in the order of the model."""
        return iter(self._places)

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self._places)

    def facts(self) -> dict[str, str]:
        """See ``Tabular``."""
        size = sum((self.folder / file).stat().st_size for file in {place.file for place in self._places.values()})
        grams = len({place.owner for place in self._places.values()})
        return {
            "model": self.model,
            "directory": f"{self.folder}, {human_bytes(size)}",
            "layers": f"{len(self)}, with {grams} Grams",
        }

    def table(self) -> list[dict[str, Any]]:
        """A row a layer."""
        return [
            {"layer": name, "shape": place.shape, "tokens": place.tokens, "reads_as": place.owner}
            for name, place in self._places.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """What is known without reading a tensor."""
        return {"model": self.model, "folder": str(self.folder), "layers": self.table()}


@own_settings()
@torch.no_grad()
def statistics(
    model: str | Path | PreTrainedModel,
    recipe: RecipeLike | None = None,
    *,
    calibration: "Calibration | None" = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    out: str | Path,
    device: str = "auto",
    offload: str = "auto",
    trust_remote_code: bool = False,
    notify: Notify | None = None,
    **fields: Any,  # noqa: ANN401 - fields of a recipe have many types
) -> Statistics:
    """Keep every weight of a dense model with the Gram of its inputs, for trying many variants of a solver on them.

    Args:
        model: Hub id, directory, .gguf file, or a transformers model, which stays as it is.
        recipe: Says the text, its seed and the damping; of any kind that ``compress`` takes.
        calibration: Corpus, file, list of texts, or token windows (n, seqlen) int64; instead of the recipe's.
        tokenizer: Needed with a transformers model if text is used.
        out: A new directory for them; ``sparlow.Statistics(out)`` opens it again.
        device: "auto" (an accelerator if there is one), or torch's name of a device. A model object stays where it is.
        offload: Where to keep block inputs between blocks: "cpu", "disk", or "auto" for the fastest that fits.
        trust_remote_code: Let a model bring Python code of its own.
        notify: Called after every step; if left out, the run shows itself on a terminal and in a notebook.
        fields: Of the recipe, such as ``samples=64``, in the place of what it says.

    Raises:
        InputError: Something given cannot be used, or ``out`` is not empty.
    """
    require_usable(model)
    recipe = with_calibration(as_recipe(recipe, fields), calibration)
    if isinstance(model, PreTrainedModel):
        require_as_it_is(model, recipe.dtype, device)
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty. Choose another directory for the statistics.")
    options = RunOptions(device, offload, (), trust_remote_code=trust_remote_code)
    opened, _ = open_dense(model, as_tokenizer(tokenizer), recipe, options)
    windows = windows_to_calibrate(calibration, opened, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    with watched(notify) as tell:
        layers = _collected(opened, recipe, windows, offload, folder, tell)
    about = {"damping": recipe.damping, "relative_damping": recipe.relative_damping, "recipe": recipe.to_dict()}
    write_json(folder / NAME, {"version": VERSION, "model": opened.name, **about, "layers": layers})
    return Statistics(folder)


def _collected(
    opened: OpenedModel, recipe: Recipe, windows: Tensor, offload: str, folder: Path, notify: Notify
) -> dict[str, dict[str, Any]]:
    """Walk over the dense blocks and write a file for each; return the row of each layer."""
    decoder = opened.decoder
    runner = BlockwiseRunner(opened, offload, Clock(), notify)
    heads = unfused_heads(opened.model.config.get_text_config())
    recording = runner.recorded(windows, micro_batch(recipe, windows_at_once(windows.shape[1], heads), 1))
    walk = DenseWalk(decoder, runner.dense_blocks, recording, counting(notify, "statistics of blocks", len(decoder)))
    layers: dict[str, dict[str, Any]] = {}
    for through, seen in walk.observed(GramAccumulator):
        file = f"block-{through.number + 1:05d}.safetensors"
        tensors, rows = _of_block(through, seen, file)
        with replacing(folder / file) as partial:
            save_file(tensors, partial)
        layers |= rows
    return layers


def _of_block(
    through: BlockPass, seen: Observation[GramAccumulator], file: str
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return what the file of a block holds, and the row of each of its layers."""
    tensors: dict[str, Tensor] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, weight in through.weights.items():
        full, owner = through.layer_name(name), seen.owner.get(name)
        tensors[f"{full}.weight"] = weight.read().cpu().contiguous().clone()
        tokens = seen.statistics[owner].tokens if owner else 0
        reads = through.layer_name(owner or name)
        rows[full] = {"file": file, "shape": list(weight.shape), "owner": reads, "tokens": tokens}
        if owner and tokens and f"{reads}.H" not in tensors:
            tensors[f"{reads}.H"] = seen.statistics[owner].second_moment(seen.windows).cpu()
            tensors[f"{reads}.sample"] = seen.statistics[owner].sample.rows.cpu().contiguous()
    return tensors, rows
