"""Finished reports made by hand, usual and odd ones, for tests of pages."""

import math
from dataclasses import replace

from sparlow.recipe.recipe import Recipe
from sparlow.report.records import Agreement, LayerRecord, Report

KINDS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
PROMPTS = {
    "The capital of France is": (
        "Paris. It is the largest city in France and one of",
        "Paris, the largest",
        " and the",
    ),
    "Once upon a time": (", there was a little girl named Lily. She", " loved to play in the", " lived in a big house"),
    "The three laws of thermodynamics are": ("", "the conservation of energy,", "the law of the law of the law"),
}


def layer(block, name="mlp.up_proj", **changes):
    record = LayerRecord(
        block,
        name,
        shape=(48, 32),
        pattern="2:4",
        density=0.5,
        rank=4,
        relative_error=0.01 * (block + 1),
        iterations=50,
        seconds=1.25,
        damping=0.0,
    )
    return replace(record, **changes)


def layers(blocks, kinds=KINDS):
    """A record for every layer, with errors that grow with depth and traces that fall."""
    return [
        layer(
            block,
            name,
            shape=shape,
            pattern="16:32",
            rank=16,
            tokens=8192,
            relative_error=0.004 * (1 + i) * (1 + block / 8) * (1 + 0.3 * math.sin(3 * block + i)),
            relative_error_per_token=0.01 * (1 + i),
            trace=tuple((10 * (step + 1), 0.6 ** (step + i / 4)) for step in range(12)),
        )
        for block in range(blocks)
        for i, (name, shape) in enumerate(kinds.items())
    ]


def report(**changes):
    """A run of 30 blocks with all that a report can hold."""
    whole = Report(
        recipe=Recipe(pattern="16:32", rank=16, match=True, options={"effort": 0.5}).to_dict(),
        versions={"sparlow": "0.2.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        machine={"system": "Linux", "cpu": "AMD EPYC 9654", "cores": 2, "threads": 2, "memory": 8 * 10**9},
        model="/home/somebody/models/SmolLM2-135M.gguf",
        dense={"perplexity": {"builtin": 13.742, "novel": 26.98}, "perplexity_stderr": {"builtin": 0.3, "novel": 0.6}},
        compressed={
            "perplexity": {"builtin": 18.1415, "novel": 31.4159},
            "perplexity_stderr": {"builtin": 0.4, "novel": 0.8},
        },
        agreement={
            "builtin": Agreement(0.18, 0.004, 0.78, 0.2776, 0.0061),
            "novel": Agreement(0.16, 0.003, 0.79, 0.152, 0.0053),
        },
        in_domain=["builtin"],
        bytes={
            "dense": 269_000_000,
            "compressed": 181_500_000,
            "linears_dense": 212_000_000,
            "linears_compressed": 124_500_000,
        },
        values={"linears_dense": 106_000_000, "linears_compressed": 58_000_000},
        parameters={"model": 134_500_000, "blocks": 106_200_000, "compressed": 106_168_320},
        bits_per_weight=9.38,
        bits_per_parameter=10.79,
        share_compressed=0.9997,
        seconds={
            "total": 1542.2628410040152,
            "walk": 84.2,
            "statistics": 132.7,
            "solve": 811.4,
            "matching": 402.1,
            "save": 9.1,
            "evaluate": 88.0,
        },
        peak_memory={"rss": 2_400_000_000, "device": 0},
        layers=layers(30),
        distillation={
            "loss_before": 0.31,
            "loss_after": 0.19,
            "epochs": 8,
            "seconds": 400.0,
            "losses": [0.27, 0.24, 0.22, 0.211, 0.203, 0.197, 0.192, 0.19],
            "unmoved": 0.1,
        },
        not_compressed=[
            {"name": "model.embed_tokens", "parameters": 28_311_552, "why": "embedding"},
            {"name": "model.norm", "parameters": 576, "why": "norm"},
            {"name": "model.layers.0.input_layernorm", "parameters": 576, "why": "norm", "trained": True},
        ],
        counts={"layers": 210, "unsettled": 3},
        warnings=[
            "builtin is in-domain: it comes from the same source as the calibration text, so its figures flatter.",
            "model.layers.3.mlp.down_proj: The solver had not settled after 120 iterations.",
        ],
        notes=["At 4.5 bits a weight the whole file would take 92.3 MB, at 3.5 bits 79.1 MB."],
        answers={
            "rows": [
                {"prompt": prompt, "dense": same + dense, "compressed": same + compressed}
                for prompt, (same, dense, compressed) in PROMPTS.items()
            ],
            "why": "",
        },
        date="2026-11-28",
    )
    return replace(whole, **changes)
