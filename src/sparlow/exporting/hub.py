"""``sparlow.push_to_hub``: a finished directory, its model card included, to a repository on the hub."""

from pathlib import Path

from sparlow.errors import InputError, RunError, first_line
from sparlow.files import CONFIG, RECORD, read_json

_OURS_ONLY = (".*", "*.partial", "checkpoint-*")  # what no reader needs


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload a model compressed with sparlow",
) -> str:
    """Upload a finished directory as it is, so that checksums hold there, with its model card README.md.

    Args:
        folder: A finished directory of ``compress`` or ``finetune``.
        repo_id: OWNER/NAME; made if it is not there.
        private: Whether a new repository is private; the owner's default if left out.
        token: Of the hub; that of ``hf auth login`` if left out.
        revision: Branch to upload to.
        message: Of the commit.

    Returns:
        The address of the commit.

    Raises:
        InputError: The directory is not finished, or none of sparlow's.
        RunError: The hub refused it, or cannot be reached.
    """
    folder = Path(folder)
    whole = (folder / CONFIG).is_file() and (folder / RECORD).is_file()
    if not whole or not read_json(folder / RECORD).get("finished"):
        raise InputError(f"{folder} is not a finished result of sparlow. Finish its run first.")
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        found = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            ignore_patterns=list(_OURS_ONLY),
        )
    except Exception as error:  # the hub's client, HTTP and the file system share no base class
        raise RunError(f"{folder} could not be uploaded to {repo_id} ({first_line(error).rstrip('.')}).") from error
    return str(found)
