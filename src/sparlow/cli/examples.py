"""Two examples for each command, as its help shows them."""

EXAMPLES: dict[str, tuple[str, str]] = {
    "compress": (
        "sparlow compress meta-llama/Llama-3.2-1B --out OUT --bits 4.5",
        "sparlow compress MODEL --out OUT --recipe 3basil-16to32-r64",
    ),
    "plan": (
        "sparlow plan MODEL --bits 4.5",
        "sparlow plan MODEL --pattern 2:4 --rank 64 --no-time",
    ),
    "compare": (
        "sparlow compare MODEL --out OUT --algorithms wanda,3basil",
        "sparlow compare MODEL --out OUT --algorithms 3basil --match both",
    ),
    "evaluate": (
        "sparlow evaluate OUT --baseline MODEL --evaluate wikitext2",
        "sparlow evaluate OUT --tasks paper --limit 200",
    ),
    "finetune": (
        "sparlow finetune OUT --out OUT-TUNED --dataset c4 --steps 500",
        "sparlow finetune OUT --out OUT-TUNED --dataset chats.jsonl --peft ADAPTER",
    ),
    "inspect": ("sparlow inspect OUT --verify", "sparlow inspect OUT --json -"),
    "generate": (
        'sparlow generate OUT --prompt "The capital of France is"',
        'sparlow generate OUT --prompt "Who are you?" --chat --max-tokens 64',
    ),
    "export": (
        "sparlow export --list",
        "sparlow export OUT --out MERGED --as merged",
    ),
    "benchmark": (
        "sparlow benchmark OUT MODEL",
        "sparlow benchmark OUT --mode packed,merged --threads 4",
    ),
    "algorithms": ("sparlow algorithms", "sparlow algorithms --plugin mine.py"),
    "recipes": ("sparlow recipes", "sparlow recipes --json -"),
    "env": ("sparlow env", "sparlow env --json env.json"),
    "demo": ("sparlow demo", "sparlow demo --out DEMO --overwrite"),
}


def epilog(command: str) -> str:
    """Return what stands below the options of a command: blank lines are what keeps lines apart."""
    return "\n\n".join(["[bold]Examples[/]", *(f"  {line}" for line in EXAMPLES.get(command, ()))])
