"""The entry point of vLLM's plug-ins: where sparlow is installed, serving a directory needs no flag.

vLLM calls it in each of its processes, whatever model is served, and then finds the method by the ``quant_method`` of
config.json. Nothing here imports transformers, whose release is the server's choice.
"""

from sparlow.model.artefact.schemes import METHOD


def register() -> None:
    """Let vLLM know the format; called more than once, it does so once."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if METHOD in QUANTIZATION_METHODS:
        return
    from sparlow.serving.vllm_config import SparlowConfig

    register_quantization_config(METHOD)(SparlowConfig)
