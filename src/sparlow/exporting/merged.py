"""``merged``: a plain dense model, S + U V rounded once."""

from pathlib import Path

from torch import Tensor

from sparlow.exporting._registry import Exported, Writer, form
from sparlow.exporting.directory import VLLM, checkpoint_names, write_plain
from sparlow.exporting.stored import Layer, Stored
from sparlow.progress import Notify


@form(
    "merged",
    keeps="the function, rounded once to the model's type",
    loses="the small size: as large as the model was before compression",
    opened_by=("transformers", "vLLM", "SGLang", "llama.cpp's converter", "Ollama", "MLX", "OpenVINO"),
)
def merged(stored: Stored) -> Writer:
    """One plain weight S + U V a layer, for whatever opens the dense model."""
    names = checkpoint_names(stored)

    def whole(layer: Layer) -> dict[str, Tensor]:
        return {"weight": layer.as_stored(layer.merged())}

    def write(folder: Path, notify: Notify) -> Exported:
        shards = write_plain(stored, folder, whole, names, notify)
        found = Exported("merged", folder)
        size = sum(shard.bytes for shard in shards) / 1e6
        found.notes.append(f"The weights take {size:,.1f} MB, as many as before compression.")
        found.commands = [
            'transformers: AutoModelForCausalLM.from_pretrained("OUT")',
            f"vLLM: {VLLM} OUT",
            "SGLang: python -m sglang.launch_server --model-path OUT",
            "MLX: mlx_lm.generate --model OUT --prompt Hello",
        ]
        return found

    return Writer(write, sum(stored.dense_bytes.values()))
