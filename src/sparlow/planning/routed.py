"""What a plan says of a mixture's experts: how many calibration tokens one sees, if all see as many."""

from collections.abc import Iterator

from sparlow.planning.workload import Workload


def notes_of_experts(work: Workload) -> Iterator[str]:
    """Yield a sentence for each kind of parameter that holds experts to which tokens are routed."""
    tokens = work.tokens
    said = {
        layer.role: (layer.share, layer.shape[1])
        for block in work.blocks
        for layer in block.compressed
        if layer.role and layer.routed
    }
    for role, (share, features) in said.items():
        own = round(share * tokens)
        yield (
            f"An expert of {role} sees {own:,} of the {tokens:,} calibration tokens ({share:.2%}) if all see as many, "
            f"{own / features:.2g} for each feature of its input. How many each one saw will be in the report."
        )
