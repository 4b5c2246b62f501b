"""The report of a run as it grows: before the first block, with every block, and at the end."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from torch import nn

from sparlow.distributed import Processes
from sparlow.machine import peak_memory
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.artefact.layers import compressed_layers
from sparlow.model.forward.compressible import fused_of
from sparlow.model.forward.decoder import Decoder, not_compressed
from sparlow.model.loading.source import OpenedModel
from sparlow.progress import Clock
from sparlow.recipe.recipe import KEEP_ENDS, Recipe
from sparlow.recipe.whole_file import Ends
from sparlow.report.records import LayerRecord, Report
from sparlow.run.recovery import Recovery
from sparlow.text import in_domain, in_domain_warning

_SHOWN = 8  # experts in a sentence
_KIND = re.compile(r"\d[\d.e+-]*\b")  # a number, in which the sentences of several experts may differ


def begun(recipe: Recipe, opened: OpenedModel, storage: StoredDtypes, warnings: Iterable[str]) -> Report:
    """Return the report of a run before its first block: what it starts from, and what is known to be amiss."""
    report = Report(recipe=recipe.to_dict(), model=opened.name, warnings=[*warnings])
    report.bytes = {"dense": storage.bytes_of(opened.model), "linears_dense": 0, "linears_compressed": 0}
    report.parameters = {
        "model": sum(p.numel() for p in opened.model.parameters()),
        "blocks": sum(p.numel() for p in opened.decoder.blocks.parameters()),
    }
    return report


def tell_in_domain(report: Report, calibration: str, evaluation: Iterable[str]) -> None:
    """Note which texts that perplexity is measured on come from the calibration text's source."""
    names = [name for name in in_domain(calibration, evaluation) if name not in report.in_domain]
    report.in_domain += names
    report.warnings += in_domain_warning("calibration", names)


def dense_bytes(storage: StoredDtypes, decoder: Decoder, i: int) -> dict[str, int]:
    """Bytes of the dense layers of block i as stored, by name."""
    weights = decoder.weights(i)
    return {name: storage.bytes_of_weight(weight, decoder.layer_name(i, name)) for name, weight in weights.items()}


def add_block(
    report: Report,
    storage: StoredDtypes,
    decoder: Decoder,
    i: int,
    layers: list[LayerRecord],
    matching: list[dict[str, Any]],
    dense: Mapping[str, int],
) -> None:
    """Add block i, which is finished; ``dense`` is what ``dense_bytes`` said before it was begun."""
    sparse = compressed_layers(decoder.blocks[i]).items()
    packed = (storage.packed_bytes(layer, decoder.layer_name(i, name)) for name, layer in sparse)
    report.bytes["linears_compressed"] += sum(packed)
    report.bytes["linears_dense"] += sum(dense[layer.name] for layer in layers)
    report.layers += layers
    report.experts += tokens_of_experts(decoder.blocks[i], i, layers)
    report.matching += matching


def tokens_of_experts(block: nn.Module, i: int, layers: Iterable[LayerRecord]) -> list[dict[str, Any]]:
    """Return how many tokens of the calibration text each expert of a block saw, and which share of them all.

    Args:
        block: Compressed.
        i: Its number.
        layers: Its records.
    """
    seen = {layer.name: layer.tokens for layer in layers}
    found = []
    for name, fused in fused_of(block).items():
        own = [seen.get(f"{name}.{number}") for number in range(len(fused))]  # None of one that stays dense
        total = max(sum(tokens or 0 for tokens in own), 1)
        found.append(
            {
                "block": i,
                "name": name,
                "experts": len(fused),
                "tokens": own,
                "shares": [None if tokens is None else round(tokens / total, 6) for tokens in own],
                "unreached": [number for number, tokens in enumerate(own) if tokens == 0],
            }
        )
    return found


def _warnings(report: Report, decoder: Decoder) -> Iterator[str]:
    """Yield what the layers warn of; what is true of several experts of a block is said once."""
    count = {(row["block"], row["name"]): row["experts"] for row in report.experts}
    alike: dict[tuple[str, str, int], list[str]] = {}
    for layer in report.layers:
        role, _, number = layer.name.rpartition(".")
        experts = count.get((layer.block, role), 0)
        name = decoder.layer_name(layer.block, role if experts else layer.name)
        for warning in layer.warnings:
            alike.setdefault((name, _KIND.sub("…", warning) if experts else warning, experts), []).append(number)
    for (name, warning, experts), numbers in alike.items():
        some = ", ".join(numbers[:_SHOWN]) + (", …" if len(numbers) > _SHOWN else "")
        yield f"{name}, {len(numbers)} of {experts} experts ({some}): {warning}" if experts else f"{name}: {warning}"


def complete(
    report: Report,
    opened: OpenedModel,
    recovery: Recovery,
    stays_dense: Mapping[str, str],
    ends: Ends,
    clock: Clock,
    processes: Processes,
) -> None:
    """Fill in the totals over all layers, the seconds, and the peak memory."""
    decoder = opened.decoder
    report.add_up()
    report.seconds, report.peak_memory = clock.seconds, peak_memory()
    report.date = datetime.now(UTC).date().isoformat()
    if processes.size > 1:
        sent = round(processes.sent / len(decoder))
        report.processes = {"count": processes.size, "bytes_per_block": sent}
    names = {layer: decoder.layer_name(layer.block, layer.name) for layer in report.layers}
    report.warnings += _warnings(report, decoder)
    report.warnings += recovery.undone([*report.matching, report.distillation])
    trained_in = decoder if recovery.training else None
    rows = not_compressed(opened.model, names.values(), stays_dense, trained_in)
    report.not_compressed = [asdict(row) | _stored_in(row.why, ends) for row in rows]


def _stored_in(why: str, ends: Ends) -> dict[str, str]:
    """Return how a module that is not compressed is stored, if in fewer bits, by the reason that it is not."""
    kinds = (("embedding", ends.embedding), ("output head", ends.head))
    found = [kind for what, kind in kinds if why.startswith(what) and kind != KEEP_ENDS]
    return {"stored": found[0]} if found else {}
