"""Which experts' statistics are in memory at the same time."""

from collections.abc import Collection, Mapping

TOGETHER = 2 * 2**30  # bytes of the Grams of experts while they are added up
SUM = 8  # bytes of each of their numbers


def in_groups(features: Mapping[str, int], fused: Collection[str]) -> list[list[str]]:
    """Divide layers into groups whose Grams are added up at the same time.

    What is no expert is in the first. Then come the experts by number, so that those layers are together that read the
    same tokens; a group ends where one more would take it beyond ``TOGETHER``.

    Args:
        features: Of the input of each layer, by name.
        fused: What the names of layers of experts begin with, before the number of the expert.
    """
    groups = [[name for name in features if _role(name) not in fused]]
    size = 0
    experts: dict[int, list[str]] = {}
    for name in features:
        if _role(name) in fused:
            experts.setdefault(int(name.rpartition(".")[2]), []).append(name)
    for _, names in sorted(experts.items()):
        own = SUM * sum(features[name] ** 2 for name in names)
        if size and size + own > TOGETHER:
            groups.append([])
            size = 0
        groups[-1] += names
        size += own
    order = {name: i for i, name in enumerate(features)}
    return [sorted(group, key=order.__getitem__) for group in groups if group] or [[]]


def _role(name: str) -> str:
    return name.rpartition(".")[0]
