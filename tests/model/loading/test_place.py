"""What the hub's answers make of a name that is no directory."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from sparlow.errors import InputError
from sparlow.model.loading.place import require_place


def answer(kind):
    """An answer of the hub, without the response that belongs to it."""
    return kind.__new__(kind)


@pytest.fixture
def hub(monkeypatch):
    """Let the hub answer by raising an error, or by one that is None."""

    def answers(error):
        asked = []

        def metadata(url, **_):
            asked.append(url)
            if error is not None:
                raise error

        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
        return asked

    return answers


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (answer(errors.RepositoryNotFoundError), "the hub has no model of this name"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE forbids asking"),
        (ConnectionError("Name or service not known\nmore"), "cannot be reached (Name or service not known)."),
    ],
)
def test_a_model_that_is_not_to_be_had_is_refused_after_one_question(error, said, hub):
    asked = hub(error)
    with pytest.raises(InputError, match=r"Cannot open the model nobody/nothing\. There is no such dir") as told:
        require_place("nobody/nothing")
    assert said in str(told.value)
    assert asked == ["https://huggingface.co/nobody/nothing/resolve/main/config.json"]


@pytest.mark.parametrize(
    "error",
    [
        None,
        answer(errors.GatedRepoError),
        answer(errors.RemoteEntryNotFoundError),
        answer(errors.HfHubHTTPError),
    ],
)
def test_what_else_the_hub_says_is_left_to_what_fetches_the_model(error, hub):
    asked = hub(error)
    require_place("nobody/nothing")
    assert len(asked) == 1


def test_a_name_that_no_model_can_have_asks_nobody(hub):
    asked = hub(None)
    with pytest.raises(InputError, match="no model there can be called so"):
        require_place("my model")
    assert asked == []


def test_what_the_cache_holds_asks_nobody(hub, monkeypatch):
    asked = hub(ConnectionError("no network"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    require_place("owner/name")
    assert asked == []
