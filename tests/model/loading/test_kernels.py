"""A config may name code that transformers would fetch from the hub and run: only where the user trusts it."""

import json

import pytest

import sparlow
from command_line import run_and_fail
from families import save_tiny
from sparlow.errors import InputError
from sparlow.model.loading.source import open_model

KERNELS = [
    {"attn_implementation": "somebody/kernel"},
    {"attn_implementation": "flash_attention_2"},
    {"attn_implementation": {"": "sdpa", "text_config": "somebody/kernel@v1:function"}},
    {"_attn_implementation": "paged|somebody/kernel"},
    {"experts_implementation": "somebody/kernel"},
    {"text_config": {"attn_implementation": "somebody/kernel"}},
]


@pytest.mark.parametrize("change", KERNELS)
def test_a_config_that_names_a_kernel_of_the_hub_is_refused(change, tmp_path, capsys):
    save_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    for opening in (open_model, lambda name: open_model(name, streamed=True), sparlow.load, sparlow.plan):
        with pytest.raises(InputError, match=r"native code\. Remove it from config\.json, or add --trust-remote-code"):
            opening(str(tmp_path))
    said = run_and_fail(capsys, "evaluate", tmp_path)
    assert "_implementation" in said


def test_plain_implementations_are_opened(tmp_path):
    save_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for plain in ("eager", "sdpa"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": plain}))
        assert open_model(str(tmp_path)).model.config._attn_implementation == plain


def test_a_trusted_config_reaches_transformers(tmp_path):
    save_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": "somebody/kernel"}))
    with pytest.raises(InputError, match="Cannot open the model"):  # in its own words: kernels, or no network
        open_model(str(tmp_path), trust_remote_code=True)
