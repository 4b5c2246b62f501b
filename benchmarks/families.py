"""Every causal language model of the installed transformers, built tiny: what becomes of it, as docs/families.md.

    python benchmarks/families.py --out docs/families.md
    python benchmarks/families.py llama mixtral jamba

Each type is tried in a process of its own, for a foreign model may end it. A tiny model with random weights is saved,
compressed with 80 windows in two micro-batches, evaluated and opened again. A row is right if the dense perplexity
taken block by block equals that of a plain forward to 1e-5, and the logits of the opened result those of the compressed
model.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import traceback
from collections import Counter
from math import exp
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # each process brings torch for itself
    from torch import Tensor

    from sparlow.report.records import Report

SECONDS = 90  # for one type
SIZES = {  # what makes a config tiny, by the names that configs have for it
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size", "attention_hidden_size"), 32
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "kv_channels", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 128),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_n_groups", "n_groups"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 12),
    **dict.fromkeys(("lru_width",), 32),
    **dict.fromkeys(("num_kv_shared_layers", "bos_token_id"), 0),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "index_head_dim", "index_topk"), 8),
    **dict.fromkeys(("query_pre_attn_scalar",), 8),
    **dict.fromkeys(("eos_token_id",), 1),
    **dict.fromkeys(("decoder_start_token_id",), 2),
    **dict.fromkeys(("index_n_heads",), 4),
    **dict.fromkeys(("mamba_d_ssm",), 64),
}
BY_TYPE: dict[str, dict[str, Any]] = {  # what a type needs beyond that
    "bloom": {"n_head": 4},
    "mamba2": {"num_heads": 16, "head_dim": 4, "n_groups": 1, "state_size": 4},
    "falcon_h1": {"mamba_n_groups": 1, "mamba_n_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
    "opt": {"num_attention_heads": 4, "pad_token_id": 1},
}


def tiny_config(kind: str) -> Any:  # noqa: ANN401 - a foreign config
    """The default config of a type, with everything in it that has a size made small."""
    from transformers import AutoConfig

    plain = AutoConfig.for_model(kind)
    changes = {name: size for name, size in SIZES.items() if getattr(plain, name, None) is not None}
    if getattr(plain, "layer_types", None):
        kinds = list(dict.fromkeys(plain.layer_types))
        changes["layer_types"] = (kinds * 4)[:4]
    for name in ("pad_token_id", "image_token_id", "audio_token_id"):
        if isinstance(getattr(plain, name, None), int):
            changes[name] = 1
    return AutoConfig.for_model(kind, **(changes | BY_TYPE.get(kind, {})))


def build(kind: str, folder: Path) -> None:
    """Save a tiny model with random weights; raises whatever a foreign config or model raises."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    untyped: Any = AutoModelForCausalLM
    model = untyped.from_config(tiny_config(kind)).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():  # norms near one, everything else large enough to change what passes
            p.normal_(1.0 if p.ndim == 1 and bool((p == 1).all()) else 0.0, 0.1, generator=generator)
        model(torch.arange(2, 34)[None], use_cache=False)
    model.save_pretrained(folder)


def tried(kind: str) -> dict[str, Any]:
    """One row: what became of a type."""
    import torch

    import sparlow
    from sparlow.errors import InputError

    windows = torch.randint(2, 97, (80, 32), generator=torch.Generator().manual_seed(1))
    recipe = sparlow.Recipe(algorithm="magnitude", pattern="0.5", seqlen=32, samples=80)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            build(kind, folder / "dense")
        except Exception as error:  # noqa: BLE001 - a foreign config may want anything
            return {"kind": kind, "state": "not built", "why": f"{type(error).__name__}: {first_line(error)}"}
        try:
            report = sparlow.compress(folder / "dense", recipe, calibration=windows, evaluate=(), out=folder / "out")
        except InputError as error:
            return {"kind": kind, "state": "refused", "why": first_line(error)}
        return {"kind": kind, "state": "compressed", **judged(folder, windows, report)}


def first_line(error: Exception) -> str:
    """The first line of what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def judged(folder: Path, windows: "Tensor", report: "Report") -> dict[str, Any]:
    """Compare with plain forwards: perplexity block by block, and the result opened twice."""
    import torch

    import sparlow
    from sparlow.evaluation.perplexity import perplexity_by_blocks
    from sparlow.model.forward.capture import capture_block_inputs
    from sparlow.model.loading.source import open_model

    opened = open_model(str(folder / "dense"), streamed=True)
    with opened.weights.outside_blocks(), opened.weights.block(0):
        recording = capture_block_inputs(opened.model, windows, micro_batch=64)
    found = perplexity_by_blocks(opened.model, recording, opened.weights).value
    whole = open_model(str(folder / "dense")).model
    with torch.no_grad():
        losses = []
        for ids in windows.split(16):
            logits = whole(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            losses.append(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none"))
        plain = exp(torch.cat(losses).double().mean().item())
        in_memory = whole
        recipe = sparlow.Recipe.from_dict(report.recipe)
        sparlow.compress(in_memory, recipe, calibration=windows, evaluate=(), inplace=True)
        expected = in_memory(windows[:2], use_cache=False).logits
        again = sparlow.load(folder / "out")
        difference = (again(windows[:2], use_cache=False).logits - expected).abs().max() / expected.abs().max()
    kept: Counter[str] = Counter()
    for row in report.not_compressed:
        if (
            report.parameters
            and row["why"] not in ("output head", "embedding", "norm or bias")
            and "tied" not in row["why"]
        ):
            kept[f"{row['name'].split('.')[-1]}: {row['why']}"] += row["parameters"]
    return {
        "perplexity": found,
        "plain": plain,
        "reload": float(difference),
        "share": report.share_compressed,
        "dense": dict(kept.most_common(4)),
        "right": abs(found / plain - 1) < 1e-5 and float(difference) < 1e-5,  # of float32
    }


def in_own_process(kind: str) -> dict[str, Any]:
    """Try one type in a process of its own, which has all imports already."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(kind, there))
    process.start()
    there.close()
    row: dict[str, Any] = {"kind": kind, "state": "not built", "why": f"not done after {SECONDS} s"}
    if here.poll(SECONDS):
        try:
            row = here.recv()
        except EOFError:
            row = {"kind": kind, "state": "failed", "why": "the process ended by itself"}
    process.kill()
    process.join()
    return row


def send(kind: str, to: Connection) -> None:
    """Try one type and send its row."""
    try:
        row = tried(kind)
    except Exception as error:  # noqa: BLE001 - what went wrong is a row too
        traceback.print_exc()
        row = {"kind": kind, "state": "failed", "why": f"{type(error).__name__}: {first_line(error)}"}
    to.send(row)


def page(rows: list[dict[str, Any]]) -> str:
    """docs/families.md."""
    import transformers

    states = Counter(row["state"] for row in rows)
    whole = [row for row in rows if row["state"] == "compressed"]
    wrong = [row for row in whole if not row["right"]]
    lines = [
        "# Families",
        "",
        f"Every model type that `AutoModelForCausalLM` of transformers {transformers.__version__} knows, built tiny",
        "with random weights and tried by `python benchmarks/families.py`. *Dense* compares the perplexity measured",
        "block by block with a plain forward's, *reload* the logits of the result, opened again, with those of the",
        "model compressed in memory. *Compressed* is the share of the decoder blocks' parameters.",
        "",
        (
            f"{len(rows)} types: {len(whole)} compressed ({len(wrong)} of them wrong), {states['refused']} refused, "
            f"{states['failed']} failed, {states['not built']} not built tiny."
        ),
        "",
        "| type | compressed | dense | reload | what stays dense in the blocks beside norms and biases |",
        "|---|---|---|---|---|",
    ]
    for row in whole:
        same = f"{abs(row['perplexity'] / row['plain'] - 1):.0e}"
        dense = "; ".join(row["dense"]) or "–"
        mark = "" if row["right"] else " **wrong**"
        lines.append(f"| {row['kind']}{mark} | {row['share']:.0%} | {same} | {row['reload']:.0e} | {dense} |")
    for state, title in (("refused", "Refused"), ("failed", "Failed"), ("not built", "Not built")):
        lines += ["", f"## {title}", "", "| type | why |", "|---|---|"]
        lines += [f"| {row['kind']} | {row['why'].replace('|', '/')} |" for row in rows if row["state"] == state]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try the types given, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types; all of AutoModelForCausalLM if left out")
    parser.add_argument("--out", type=Path, help="where the page is written; printed if left out")
    args = parser.parse_args()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    import sparlow.run.compress  # noqa: F401 - once, before processes are forked

    rows = []
    for kind in args.kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows.append(in_own_process(kind))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    text = page(rows)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
