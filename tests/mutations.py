"""Damage to files, to headers and configs above all, and what a reader makes of it within bounds."""

import json
import signal
import sys
from contextlib import contextmanager

import pytest

from sparlow.errors import InputError

HOSTILE = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**40, 2**63, 10**18, -(2**63), 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "../x", "/etc/passwd", "a/b", "F64", "F16", "BF16", "I8", "gpt2", "cuda", "\0", "é" * 999),
    *("int3", "int8", "row", "book", "dense", "U8", "fp16"),
    *([], {}, [0], [2**40, 2**40], [0, 2**62], {"a": {}}, [[[]]], ["full_attention"] * 3),
)
SECONDS = 20  # after which a load counts as hanging
GROWTH = 2**30  # bytes by which the address space may grow

SIZES = {  # of a model that is damaged thousands of times
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


@contextmanager
def bounded():
    """Raise MemoryError where more than ``GROWTH`` is asked for, and AssertionError after ``SECONDS``."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        with open("/proc/self/statm") as pages:  # noqa: PTH123 - of the system
            size = int(pages.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + GROWTH, before[1]))

    def hangs(*_):
        raise AssertionError(f"not done after {SECONDS} s")

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutate_json(chance, value):
    """Replace, remove, rename or swap a value somewhere."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        path = chance.choice(list(places(value)) or [()])
        if not path:
            return chance.choice(HOSTILE)
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        how = chance.randrange(5)
        if how == 0:
            del parent[path[-1]]
        elif how == 1 and isinstance(parent, dict):
            parent[chance.choice([str(path[-1]) + "x", "auto_map", "num_layers", "quant_method", "a.values"])] = (
                parent.pop(path[-1])
            )
        elif how == 2:
            other = chance.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            parent[path[-1]], parent[other] = parent[other], parent[path[-1]]
        else:
            parent[path[-1]] = chance.choice(HOSTILE)
    return value


def mutate_bytes(chance, data):
    """Flip, cut, insert or remove something, where it is not the content of a tensor."""
    data, i = bytearray(data), chance.randrange(len(data))
    how = chance.randrange(4)
    if how == 0:
        data[i] ^= 1 << chance.randrange(8)
    elif how == 1:
        del data[i:]
    elif how == 2:
        data[i:i] = chance.randbytes(chance.randrange(1, 9))
    else:
        del data[i : i + chance.randrange(1, 9)]
    return bytes(data)


def mutate(chance, name, data):
    """A damaged file; of a shard the header is damaged, or the length in front of it."""
    if not name.endswith(".safetensors"):
        whole = json.loads(data)
        return mutate_bytes(chance, data) if chance.random() < 0.3 else json.dumps(mutate_json(chance, whole)).encode()
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    how = chance.random()
    if how < 0.2:
        return chance.choice((0, 1, size - 1, size + 1, 10**8, 2**62, 2**64 - 1)).to_bytes(8, "little") + header + rest
    changed = (
        mutate_bytes(chance, header) if how < 0.5 else json.dumps(mutate_json(chance, json.loads(header))).encode()
    )
    return (len(changed) if chance.random() < 0.9 else size).to_bytes(8, "little") + changed + rest


def outcome(read, folder):
    """What is read, or the InputError; any other exception goes on."""
    try:
        with bounded():
            return read(folder)
    except InputError as error:
        return error
