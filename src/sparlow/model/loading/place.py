"""Where a model lies, by the name it is given: what is refused before torch and transformers, which take seconds."""

from pathlib import Path

from sparlow.errors import InputError, first_line
from sparlow.files import CONFIG, is_unfinished, parse_json
from sparlow.schema import meant

GGUF = ".gguf"


def require_place(name: str, *, ask: bool = True) -> Path | None:
    """Return the directory or .gguf file of a model; None for what is on the hub.

    Args:
        name: As it was typed.
        ask: Whether the hub, or its cache on this machine, has such a model.

    Raises:
        InputError: The name means none of these, there is no model in the directory, or the hub has none or is silent.
    """
    if not name.strip():  # as of a variable of the shell that is not set
        raise InputError("No model is named. Give a directory, a .gguf file or a hub id.")
    path = Path(name).expanduser()
    if path.suffix == GGUF:
        if not path.is_file():
            raise InputError(f"There is no file {path}{_hint(path, GGUF)} Check the path.")
        return path
    if path.is_dir():
        _require_model(name, path)
        return path
    if path.exists():
        raise InputError(f"{name} is neither a directory nor a .gguf file. Give one of these, or a hub id.")
    if name.count("/") > 1 or name.startswith((".", "~", "/")):  # no hub id can look so
        raise InputError(f"There is no directory {name}{_hint(path)} Check the path.")
    if ask:
        _require_on_hub(name)
    return None


def _require_model(name: str, folder: Path) -> None:
    if is_unfinished(folder):
        raise InputError(f"{name} is an unfinished run. Repeat the command that began it: it goes on from there.")
    if not (folder / CONFIG).is_file():
        files = sorted(path.name for path in folder.glob(f"*{GGUF}"))
        instead = f"a file in it, such as {folder / files[0]}" if files else "another directory"
        raise InputError(f"{name} is not a model directory: it has no config.json. Give {instead}.")
    parse_json(folder / CONFIG)  # transformers has no bounds
    if (folder / "adapter_config.json").is_file():  # it may name a base on the hub, which the user did not
        raise InputError(f"{name} holds an adapter, which would be opened with the model. Merge it, or move it away.")


def require_result(folder: Path) -> Path:
    """Return a directory that sparlow may have written; InputError if there is none, or its run is not at its end."""
    if not folder.is_dir():
        if folder.exists():
            raise InputError(f"{folder} is a file. Give a directory that sparlow wrote.")
        raise InputError(f"There is no directory {folder}{_hint(folder)} Give one that sparlow wrote.")
    if is_unfinished(folder):
        raise InputError(f"{folder} is an unfinished run. Repeat the command that began it: it goes on from there.")
    return folder


def _hint(path: Path, ending: str = "") -> str:
    """Return the end of a sentence about a path that is not there: what lies beside it and may have been meant."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    near = meant(path.name, [p.name for p in beside if p.name.endswith(ending) and (ending or p.is_dir())])
    return f"; did you mean {path.parent / near}?" if near else "."


def cannot_open(name: str) -> str:
    """Begin an error about a model that cannot be opened, with the directory that may have been meant."""
    path = Path(name)
    if path.exists() or path.suffix == GGUF:
        return f"Cannot open the model {name}"
    folders = [p.name for p in path.parent.iterdir() if (p / CONFIG).is_file()] if path.parent.is_dir() else []
    near = meant(path.name, folders)
    hint = f"; did you mean {path.parent / near}?" if near else "."
    return f"Cannot open the model {name}. There is no such directory{hint} As an id of the hub"


def _require_on_hub(name: str) -> None:
    """Ask the hub once, unless its cache has the model; transformers would ask a silent one again and again."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        if isinstance(try_to_load_from_cache(name, CONFIG), str):
            return
        get_hf_file_metadata(hf_hub_url(name, CONFIG))
    except GatedRepoError:  # which is a kind of the next, and is told better by what fetches the model
        return
    except RepositoryNotFoundError:
        why = "the hub has no model of this name, or it is private and there is no token for it. Check the name"
    except HFValidationError:
        why = "no model there can be called so. Check the path"
    except OfflineModeIsEnabled:
        why = "it is not in the hub's cache on this machine, and HF_HUB_OFFLINE forbids asking the hub"
    except HfHubHTTPError:  # another answer of the hub, which may be of no importance
        return
    except Exception as error:  # noqa: BLE001 - whatever the HTTP library of this huggingface_hub raises
        why = f"it is not in the hub's cache on this machine, and the hub cannot be reached ({first_line(error)})"
    else:
        return
    raise InputError(f"{cannot_open(name)}: {why}.")
