"""Logits of every position of token windows: ``python llama_logits.py GGUF IDS.npy OUT.npy [ADAPTER]``.

Runs in an environment of its own that has ik-llama-cpp-python and numpy, see elsewhere.py.
"""

import ctypes
import sys

import numpy as np
from ik_llama_cpp import _ctypes_api as api
from ik_llama_cpp._internals import IkContext, IkModel


def unfused() -> api.llama_context_params:
    """The default parameters without the fused product of gate and up, which would leave an adapter out."""
    found = DEFAULTS()
    found.fused_up_gate = found.fused_moe_up_gate = False
    return found


DEFAULTS = api.llama_context_default_params
api.llama_context_default_params = unfused


def with_adapter(model: IkModel, context: IkContext, path: str) -> None:
    """Put an adapter on a context, with the factor 1 of the user; llama.cpp's own scale comes on top."""
    init, put = api._lib.llama_lora_adapter_init, api._lib.llama_lora_adapter_set  # noqa: SLF001 - not bound there
    init.restype, init.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]
    put.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float]
    adapter = init(model.model, path.encode())
    if not adapter or put(context.ctx, adapter, 1.0):
        raise SystemExit("the adapter was not taken")


def logits(model: IkModel, context: IkContext, tokens: np.ndarray) -> np.ndarray:
    """(tokens, vocabulary) of one window."""
    context.kv_cache_clear()
    batch = api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
        batch.seq_id[i][0] = 0
    if context.decode(batch):
        raise SystemExit("llama.cpp could not compute the window")
    rows = (np.ctypeslib.as_array(context.get_logits(i), (model.n_vocab,)).copy() for i in range(len(tokens)))
    found = np.stack([*rows])
    api.llama_batch_free(batch)
    return found


if __name__ == "__main__":
    file, ids, out, *adapters = sys.argv[1:]
    windows = np.load(ids)
    opened = IkModel(file)
    running = IkContext(opened, n_ctx=max(256, windows.shape[1]), n_threads=1, flash_attn=False)
    for one in adapters:
        with_adapter(opened, running, one)
    np.save(out, np.stack([logits(opened, running, row) for row in windows]))
