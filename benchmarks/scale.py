"""What models too large for this machine would take: a model of the time, from products measured here.

    python benchmarks/scale.py [--samples 128] [--seqlen 2048] [--effort 0.5] [--device cpu] [--counts 1,8,64]
        [--shapes llama-3-8b,llama-3-70b,llama-3-405b,qwen3-235b-a22b] [--compress] [--blocks 2] [--json FILE]

Measures the throughput of a square product, a Cholesky factorisation with its inverse, and of a pass over memory,
counts what 3basil at 2:4 + rank 64 does to each layer of Llama-3-8B, 70B and 405B and of a mixture, and prints the
predicted hours on this machine and on accelerators, with the memory of each and the bytes that each sends. Layers are
divided over several as a run divides them: whole ones, and the rows of those that would keep all others waiting.
--compress also writes --blocks blocks in the first of the shapes with random
weights, compresses them (on a slow core those of the 8B take hours) and prints the measured time of one beside the
predicted one.

Assumptions, which are printed too: every layer takes STEPS·effort iterations in levels as its loop has (layers of
SmolLM2 take 56 to 84 at effort 0.5, benchmarks/results/solver_speed.json), then the refit; accelerators reach SHARE of
their peaks, TF32 in the loop's dense product and float32 in all others, and a tenth of the latter in factorisations;
what is sent passes LINKS; experts see equal shares of the text; reading, writing and everything that is not counted
are free. It is a prediction, not a measurement. The block that was measured on an H100 at effort 1 took 13 s where 31
were predicted (benchmarks/results/scale.json).
"""

import argparse
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _layers import machine, write_json
from _shapes import SHAPES, Shape, random_windows, write
from _timing import times

from sparlow import Recipe, compress
from sparlow.algorithms import find
from sparlow.algorithms._loop import level
from sparlow.algorithms.three_basil import refits
from sparlow.distributed import Processes
from sparlow.linalg.patterns import parse_pattern
from sparlow.linalg.tf32 import rounded_products
from sparlow.planning.microbenchmarks import Workspace, workspace
from sparlow.recipe.allocation import Budget
from sparlow.run.divided import ALL, who_solves

STEPS = 160  # iterations of a layer at effort 1
SHARE = 0.5  # of the peak that large products reach
RANK = 64
ONCE = 1  # factorisation with its inverse of the Gram matrix itself, for the coordinates
PASSES = 14  # over (out, in) in an iteration: reads and writes of what is not a product


@dataclass(frozen=True)
class Speed:
    """Of one machine: operations a second in products, exact and rounded, and factorisations, and bytes a second."""

    products: float
    rounded: float
    factorisations: float
    memory: float


ACCELERATORS = {  # peaks of float32, TF32 and memory, as their maker states them
    "A100 80GB": Speed(19.5e12 * SHARE, 156e12 * SHARE, 1.95e12 * SHARE, 2.0e12 * SHARE),
    "H100 SXM": Speed(67e12 * SHARE, 494e12 * SHARE, 6.7e12 * SHARE, 3.35e12 * SHARE),
}


LINKS = {8: 200e9, 64: 40e9}  # bytes a second of each accelerator: within a machine of so many, and beyond it


@dataclass
class Work:
    """Operations in products, exact and rounded, and in factorisations, and bytes read and written."""

    products: float = 0.0
    rounded: float = 0.0
    factorisations: float = 0.0
    memory: float = 0.0

    def add(self, other: "Work", times: float = 1) -> None:
        """Count other work so many times."""
        self.products += other.products * times
        self.rounded += other.rounded * times
        self.factorisations += other.factorisations * times
        self.memory += other.memory * times

    def seconds(self, speed: Speed) -> float:
        """Time on a machine, one thing after the other."""
        products = self.products / speed.products + self.rounded / speed.rounded
        return products + self.factorisations / speed.factorisations + self.memory / speed.memory


def solve(out: int, features: int, effort: float, count: int = 1) -> Work:
    """3basil on one layer: iterations, levels of ρ, refits, the final error; 4 bytes a number.

    Of several processes that divide its rows, what each has to do: they find the inverses at the next levels for each
    other, but each factorises what depends on the Gram matrix alone, and makes all of U orthonormal.
    """
    rows, steps = -(-out // count), STEPS * effort
    dense = 2.0 * rows * features**2  # operations of (out, in) times (in, in)
    # what U is made of, V of it, and U V; then V times a matrix (in, in), and two Cholesky QR of all rows of U
    skinny = 3 * 2.0 * rows * features * RANK + 2.0 * RANK * features**2 + 2 * 4.0 * out * RANK**2
    levels = steps / level(effort)  # each of which costs a factorisation and an inverse
    alternations, refit_steps = refits(effort)
    return Work(
        products=steps * skinny + alternations * ((refit_steps + 1) * dense + skinny) + 2 * dense,
        rounded=steps * dense,
        # n³/3 for the factor, 2n³/3 for the inverse
        factorisations=(ONCE + -(-levels // count)) * features**3,
        memory=steps * PASSES * 4.0 * rows * features,
    )


def passes(shape: Shape, tokens: int) -> Work:
    """Two passes of a block over the tokens (dense with statistics, compressed), and Gram matrices."""
    share = shape.passed / shape.experts
    weights = sum(
        out * features * (share if "experts" in name else 1.0) for name, (out, features) in shape.linears.items()
    )
    found = Work(products=2 * 2.0 * tokens * weights, memory=4 * 4.0 * tokens * shape.hidden)
    found.products += sum(2.0 * tokens * seen * features**2 for features, seen in shape.inputs)
    return found


def one_block(shape: Shape, tokens: int, effort: float) -> Work:
    """Passes and solves."""
    block = passes(shape, tokens)
    for out, features in shape.linears.values():
        block.add(solve(out, features, effort))
    return block


@dataclass(frozen=True)
class Sized:
    """A layer of which nothing but the shape is known."""

    shape: tuple[int, int]


def divided(shape: Shape, count: int) -> dict[str, int]:
    """Which of so many processes solves each layer of a block, as a run divides them."""
    owner = {name: _input_of(name) for name in shape.linears}
    layers: Any = {name: (Sized(layer), Budget(parse_pattern("2:4"), RANK)) for name, layer in shape.linears.items()}
    return who_solves(Processes(0, count), layers, owner, by_rows=find("3basil")[0].by_rows)


def _input_of(name: str) -> str:
    """What a layer reads, by the name of the first that reads it."""
    place, _, last = name.rpartition(".")
    first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    return f"{place}.{first.get(last, last)}"


@dataclass(frozen=True)
class Share:
    """What one of several accelerators has to do: hours, its memory at its fullest, and bytes that it sends."""

    hours: float
    memory: float
    sent: float


def shared(shape: Shape, count: int, speed: Speed, space: Workspace, args: argparse.Namespace) -> Share:
    """What the busiest of so many accelerators has to do, solves divided as a run divides them."""
    own_tokens = -(-args.samples // count) * args.seqlen  # a window is not divided
    load, sent, stored, ahead = [0.0] * count, 0.0, 0.0, 0.0
    for name, who in divided(shape, count).items():
        out, features = shape.linears[name]
        if who == ALL:
            own = solve(out, features, args.effort, count).seconds(speed)
            load = [seconds + own for seconds in load]
            steps = STEPS * args.effort
            sent += 4.0 * (steps / level(args.effort) * features**2 + steps * RANK * (out + features))
            sent += 4.0 * out * (features + RANK)  # the rows of S and U, of which each has some, at the end
            ahead = max(ahead, 4.0 * features**2)  # an inverse for a ρ to come
        else:
            load[who] += solve(out, features, args.effort).seconds(speed)
            stored += out * features * 9 / 8 + 2 * RANK * (out + features)
    grams = sum(8.0 * features**2 for features, _ in shape.inputs)
    sent = shape.blocks * (sent + grams + stored / count) if count > 1 else 0.0
    link = next((rate for most, rate in LINKS.items() if count <= most), min(LINKS.values()))
    seconds = shape.blocks * (max(load) + passes(shape, own_tokens).seconds(speed)) + sent / link
    weights = sum(2.0 * out * features for out, features in shape.linears.values())
    at_once = args.seqlen * (4 * shape.inner * shape.passed + 4 * shape.hidden) * 2.0
    solving = ahead + max(space.bytes(layer) for layer in shape.linears.values())
    memory = weights + max(grams + at_once, solving)
    return Share(seconds / 3600, memory, sent)


def here(device: str, side: int) -> Speed:
    """Measure this machine with matrices (side, side); on the CPU, on the threads that torch has.

    Of several times the least counts: what else runs on the machine only adds to it.
    """
    A, out = torch.randn(side, side, device=device), torch.empty(side, side, device=device)
    G = A @ A.T / side + torch.eye(side, device=device)
    product = min(times(lambda: torch.mm(A, A, out=out), device))
    with rounded_products(A.device):
        rounded = min(times(lambda: torch.mm(A, A, out=out), device))
    inverse = min(times(lambda: torch.cholesky_inverse(torch.linalg.cholesky(G)), device))
    add = min(times(lambda: torch.add(A, A, out=out), device))
    return Speed(2 * side**3 / product, 2 * side**3 / rounded, side**3 / inverse, 3 * 4 * side**2 / add)


def compressed(shape: Shape, args: argparse.Namespace) -> float:
    """Seconds a block of a real run on random weights, without saving and measuring."""
    with tempfile.TemporaryDirectory() as scratch:
        write(shape, args.blocks, Path(scratch) / "dense")
        windows = random_windows(shape.vocabulary, args.samples, args.seqlen)
        recipe = Recipe(pattern="2:4", rank=RANK, options={"effort": args.effort})
        folder = Path(scratch) / "out"
        report = compress(
            Path(scratch) / "dense", recipe, calibration=windows, evaluate=(), out=folder, device=args.device
        )
    return sum(report.seconds[part] for part in ("walk", "statistics", "solve")) / args.blocks


def main() -> None:
    """Measure, predict and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--effort", type=float, default=0.5)
    parser.add_argument("--shapes", default="llama-3-8b,llama-3-70b,llama-3-405b,qwen3-235b-a22b")
    parser.add_argument("--counts", default="1,8,64", help="accelerators that share a run")
    parser.add_argument("--device", default="cpu", help="where this machine is measured")
    parser.add_argument("--compress", action="store_true", help="blocks of the first of the shapes")
    parser.add_argument("--blocks", type=int, default=2, help="how many of them")
    parser.add_argument("--side", type=int, default=2048, help="of the matrices measured here")
    parser.add_argument("--json", type=Path, dest="json_file")
    args = parser.parse_args()
    speeds = {"this machine": here(args.device, args.side), **ACCELERATORS}
    for name, speed in speeds.items():
        print(f"{name}: " + ", ".join(f"{part} {value / 1e9:,.0f} G/s" for part, value in asdict(speed).items()))
    print(f"assumed: {STEPS}·effort iterations a layer; accelerators at {SHARE:.0%} of their peaks (TF32 in the loop's")
    print("dense product), a tenth of float32's in factorisations; otherwise passes over memory alone. A prediction.")
    recipe = Recipe(pattern="2:4", rank=RANK, options={"effort": args.effort})
    space = workspace(recipe, ((4096, 4096), Budget(parse_pattern("2:4"), RANK)), torch.bfloat16)
    found: dict[str, Any] = {}
    for name in args.shapes.split(","):
        work = Work()
        work.add(one_block(SHAPES[name], args.samples * args.seqlen, args.effort), SHAPES[name].blocks)
        hours = {where: work.seconds(speed) / 3600 for where, speed in speeds.items()}
        found[name] = {"work": asdict(work), "hours": hours, "shared": {}}
        print(f"{name}: " + ", ".join(f"{where} {value:,.1f} h" for where, value in hours.items()))
        for where, speed in ACCELERATORS.items():
            for count in map(int, args.counts.split(",")):
                share = shared(SHAPES[name], count, speed, space, args)
                found[name]["shared"][f"{count} {where}"] = asdict(share)
                print(
                    f"  {count} x {where}: {share.hours:,.2f} h, {share.memory / 1e9:,.0f} GB each, "
                    f"{share.sent / 1e9:,.0f} GB sent by each"
                )
    if args.compress:
        shape = SHAPES[args.shapes.split(",")[0]]
        predicted = one_block(shape, args.samples * args.seqlen, args.effort).seconds(speeds["this machine"])
        measured = compressed(shape, args)
        found["block"] = {"predicted": predicted, "measured": measured}
        print(f"a block here: predicted {predicted:.0f} s, measured {measured:.0f} s")
    if args.json_file:
        speed_rows = {name: asdict(speed) for name, speed in speeds.items()}
        write_json(args.json_file, {"machine": machine(), "arguments": vars(args), "speeds": speed_rows, **found})


if __name__ == "__main__":
    main()
