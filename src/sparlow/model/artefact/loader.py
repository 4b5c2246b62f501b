"""The file by which a directory opens where nobody has imported sparlow, under ``trust_remote_code=True``.

transformers runs it when it is told to trust the directory; it looks at the imports first, and where sparlow is missing
its message says which package to install.
"""

from pathlib import Path
from typing import Any

from sparlow.files import replacing

_MODULE = "modeling_sparlow"
LOADER = f"{_MODULE}.py"
_CODE = """import sparlow  # teaches transformers the format of this directory
from transformers import {name} as _Model
class {name}(_Model): pass  # what is registered as remote code is this class, not that of transformers
"""


def write_loader(folder: Path, name: str) -> dict[str, str]:
    """Write the file for a model class of transformers; return ``auto_map`` of config.json.

    Args:
        folder: Of the model.
        name: Of the class.
    """
    with replacing(folder / LOADER) as partial:
        partial.write_text(_CODE.format(name=name), "utf-8")
    return {"AutoModelForCausalLM": f"{_MODULE}.{name}"}


def forget_loader(config: Any) -> None:  # noqa: ANN401 - of any model
    """Take the mention of the file out of an opened model's config, which may be saved to where the file is not."""
    found = getattr(config, "auto_map", None)
    if isinstance(found, dict) and all(str(place).startswith(f"{_MODULE}.") for place in found.values()):
        del config.auto_map


def remote_code_left(config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of config.json without the mention of the file."""
    found = config.get("auto_map")
    if isinstance(found, dict) and all(str(place).startswith(f"{_MODULE}.") for place in found.values()):
        return {key: value for key, value in config.items() if key != "auto_map"}
    return dict(config)
