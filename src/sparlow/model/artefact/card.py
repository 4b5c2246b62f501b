"""The model card, README.md, goes along when a compressed model is saved again by transformers."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparlow.files import replacing
from sparlow.model.artefact.schemes import METHOD

if TYPE_CHECKING:  # transformers is on its way in when this is imported
    from transformers import PreTrainedModel

CARD = "README.md"
MARK = "<!-- Written by sparlow, which replaces it with the result. Remove this line to keep what you write. -->"
_LARGEST = 1_000_000  # bytes


def install() -> None:
    """Let ``save_pretrained`` write the card of a compressed model beside its weights."""
    from transformers import PreTrainedModel

    original: Any = PreTrainedModel.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - transformers'
        found = original(self, save_directory, *args, **kwargs)
        if getattr(self, "quantization_method", None) == METHOD:
            _put(self, Path(save_directory))
        return found

    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]  # where transformers has no hook


def write_card(text: str, folder: Path) -> bool:
    """Write a card, unless there is one that somebody has made his own; return whether it was written."""
    if (folder / CARD).exists() and MARK not in read_card(folder):
        return False
    with replacing(folder / CARD) as partial:
        partial.write_text(text, encoding="utf-8")
    return True


def read_card(folder: Path) -> str:
    """Return the card of a directory; empty if there is none that can be read."""
    path = folder / CARD
    try:
        return path.read_text("utf-8") if path.is_file() and path.stat().st_size <= _LARGEST else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _put(model: "PreTrainedModel", folder: Path) -> None:
    """Write the card of a model: that of its compression in memory, or of the directory that it was opened from."""
    origin = model.config.name_or_path
    text = getattr(getattr(model, "hf_quantizer", None), "card", "") or (read_card(Path(origin)) if origin else "")
    if text and folder.is_dir() and not (folder / CARD).exists():
        write_card(text, folder)
