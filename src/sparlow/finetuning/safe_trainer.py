"""Trainer's checkpoints without pickles: tensors as safetensors, numbers as JSON, each folder whole or not there.

Trainer writes the optimiser, the schedule, the states of random generators and its arguments by ``torch.save``. The
hooks replaced here are private in transformers; a test sees that a run resumed through them ends in the same bits, and
that nothing else is written.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerState

from sparlow.errors import RunError, is_out_of_memory
from sparlow.files import read_json, sync_folder
from sparlow.finetuning.loss import is_own_loss, loss_in_pieces, needs_pieces
from sparlow.text.answers import IGNORED

STATE = "trainer_state.json"
_TENSORS, _NUMBERS = "optimizer.safetensors", "optimizer.json"
_ADAPTER = "adapter_model.safetensors"


class SafeTrainer(Trainer):
    """Trainer, but for what its checkpoints are made of and how the loss is had; for one process and one device."""

    model: Any  # PEFT's
    optimizer: Any  # there whenever a checkpoint is written or read
    lr_scheduler: Any
    _own_loss: bool | None = None  # whether it can be had in pieces; tried where that is first wanted

    def compute_loss(
        self,
        model: Any,  # noqa: ANN401 - as prepared by accelerate
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ANN401 - the same
    ) -> Any:  # noqa: ANN401 - the same
        """The model's own loss, in pieces where the logits of a batch are many."""
        inner = self.accelerator.unwrap_model(model).get_base_model()
        options = dict(inputs)
        ids, labels = options.pop("input_ids"), options.pop("labels")
        with self.accelerator.autocast():
            if not return_outputs and needs_pieces(inner, ids):
                if self._own_loss is None:
                    self._own_loss = is_own_loss(inner, ids)
                if self._own_loss:
                    learnt = (labels[:, 1:] != IGNORED).sum()
                    known = num_items_in_batch if self.model_accepts_loss_kwargs else None
                    return loss_in_pieces(inner, ids, labels, options, learnt if known is None else known)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ANN401, ARG002 - transformers' signature
        self.store_flos()
        folder = Path(str(self.args.output_dir))
        partial = folder / ".checkpoint.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self.model.save_pretrained(partial)
            tensors, numbers = _taken_apart(self.optimizer.state_dict())
            save_file(tensors | _generators(), partial / _TENSORS)
            numbers |= {"schedule": self.lr_scheduler.state_dict(), "python": random.getstate()}
            (partial / _NUMBERS).write_text(json.dumps(numbers), encoding="utf-8")
            self.state.save_to_json(str(partial / STATE))
            sync_folder(partial)
            partial.rename(folder / f"checkpoint-{self.state.global_step}")
            for older in set(folder.glob("checkpoint-*")) - {folder / f"checkpoint-{self.state.global_step}"}:
                shutil.rmtree(older)
            sync_folder(folder)
        except (OSError, SafetensorError) as problem:
            if is_out_of_memory(problem):
                raise
            raise RunError(
                f"Cannot write a checkpoint into {folder}: {problem}. Free disk space, then repeat the command."
            ) from problem

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        numbers = read_json(Path(checkpoint) / _NUMBERS)
        state = _put_together(load_file(Path(checkpoint) / _TENSORS), numbers, self.optimizer.state_dict())
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(numbers["schedule"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        version, inner, gauss = read_json(Path(checkpoint) / _NUMBERS)["python"]
        random.setstate((version, tuple(inner), gauss))
        _set_generators(load_file(Path(checkpoint) / _TENSORS))


def last_checkpoint(folder: Path) -> tuple[Path, TrainerState] | None:
    """Return the checkpoint of most steps with its state, or None."""
    found = [path for path in folder.glob("checkpoint-*") if (path / STATE).exists() and (path / _ADAPTER).exists()]
    if not found:
        return None
    path = max(found, key=lambda path: int(path.name.split("-")[1]))
    return path, TrainerState.load_from_json(str(path / STATE))


def _taken_apart(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state dict as tensors by name, and the rest as JSON holds it."""
    tensors = {f"{i}.{name}": t.cpu().contiguous() for i, part in state["state"].items() for name, t in part.items()}
    return tensors, {"param_groups": state["param_groups"]}


def _put_together(tensors: dict[str, Tensor], numbers: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """The state dict that was taken apart; JSON has made lists of what are tuples in ``fresh``, a new optimiser's."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, part = name.partition(".")
        if index.isdigit():
            state.setdefault(int(index), {})[part] = tensor
    groups = [
        {name: tuple(value) if isinstance(old.get(name), tuple) else value for name, value in group.items()}
        for group, old in zip(numbers["param_groups"], fresh["param_groups"], strict=True)
    ]
    return {"state": state, "param_groups": groups}


def _generators() -> dict[str, Tensor]:
    """The states of numpy's and torch's random generators."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global one, which others draw from
    found = {"numpy.keys": torch.from_numpy(np.asarray(keys).astype("int64")), "torch.cpu": torch.get_rng_state()}
    found["numpy.rest"] = torch.tensor([float(value) for value in rest], dtype=torch.float64)
    if torch.accelerator.is_available():
        found["torch.accelerator"] = _accelerator().get_rng_state().cpu()
    return found


def _set_generators(found: dict[str, Tensor]) -> None:
    position, has_gauss, cached = found["numpy.rest"].tolist()
    keys = found["numpy.keys"].numpy().astype("uint32")
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))  # noqa: NPY002 - see above
    torch.set_rng_state(found["torch.cpu"])
    if torch.accelerator.is_available() and "torch.accelerator" in found:
        _accelerator().set_rng_state(found["torch.accelerator"])


def _accelerator() -> Any:  # noqa: ANN401 - torch.cuda, torch.mps, …
    kind = torch.accelerator.current_accelerator()
    return getattr(torch, "cpu" if kind is None else kind.type)
