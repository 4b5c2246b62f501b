"""Compress a model from the hub, a directory or a .gguf file, and read the report.

python examples/compress_a_model.py HuggingFaceTB/SmolLM2-135M smollm2-2to4
"""

import argparse
import sys

import sparlow


def main(model: str, out: str) -> None:
    """Compress ``model`` to 16:32 + rank 16 with text that needs no network."""
    recipe = sparlow.Recipe(rank=16, calibration="builtin", samples=32, seqlen=512)
    report = sparlow.compress(model, recipe, out=out, notify=show)
    for corpus, dense in report.dense["perplexity"].items():
        print(f"{corpus}: {dense:.2f} dense, {report.compressed['perplexity'][corpus]:.2f} compressed")
    worst = max(report.layers, key=lambda layer: layer.relative_error)
    print(f"{report.bits_per_weight:.2f} bits a weight; hardest layer: block {worst.block}, {worst.name}")


def show(step: sparlow.Progress) -> None:
    """Print a line a block."""
    if step.stage == "blocks" and step.layer is None:
        print(f"block {step.done} of {step.total}", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Compress a model to 16:32 + rank 16, with text that needs no network."
    )
    parser.add_argument("model", help="hub id, directory or .gguf file")
    parser.add_argument("out", help="directory for the result")
    main(**vars(parser.parse_args()))
