"""Every causal language model of the installed transformers, built tiny: what becomes of it, as docs/families.md.

    python benchmarks/families.py --out docs/families.md
    python benchmarks/families.py llama mixtral jamba

Each type is tried in a process of its own, for a foreign model may end it. A tiny model with random weights is saved,
compressed with 80 windows in two micro-batches, evaluated and opened again. A row is right if the dense perplexity
taken block by block equals that of a plain forward to 1e-5, and the logits of the opened result those of the compressed
model.
"""

import argparse
import hashlib
import json
import multiprocessing
import sys
import tempfile
import traceback
from collections import Counter
from functools import cache
from math import exp
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # each process brings torch for itself
    from torch import Tensor

    from sparlow.report.records import Report

SECONDS = 240  # for one type
SIZES = {  # what makes a config tiny, by the names that configs have for it
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "audio_vocab_size"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size", "embed_dim"), 32),
    **dict.fromkeys(("attention_hidden_size", "out_hidden_size", "projection_dim", "lru_width", "output_dim"), 32),
    **dict.fromkeys(("vision_output_dim", "hidden_size_global", "output_proj_dims", "text_hidden_size"), 32),
    **dict.fromkeys(("adapter_out_dim", "adapter_in_dim", "adapter_input_size", "downsample_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_blocks"), 4),
    **dict.fromkeys(("depth", "num_global_layers"), 2),  # of the towers of other modalities
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("swa_num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "kv_channels", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("swa_v_head_dim", "linear_head_dim", "hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "hc_lowrank"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "router_hidden_size"), 24),
    **dict.fromkeys(("intermediate_size_mlp", "ple_embed_dim"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("zero_expert_num",), 2),
    **dict.fromkeys(("n_shared_experts",), 1),
    **dict.fromkeys(("shared_experts_intermediate_size",), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 128),
    **dict.fromkeys(("num_position_embeddings", "ngram_vocab_size_base"), 64),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_n_groups", "n_groups"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 12),
    **dict.fromkeys(("num_kv_shared_layers", "bos_token_id"), 0),
    **dict.fromkeys(("index_head_dim", "index_topk", "query_pre_attn_scalar", "indexer_head_dim"), 8),
    **dict.fromkeys(("image_size", "patch_size"), 8),
    **dict.fromkeys(("eos_token_id",), 1),
    **dict.fromkeys(("decoder_start_token_id",), 2),
    **dict.fromkeys(("index_n_heads", "indexer_n_heads"), 4),
    **dict.fromkeys(("mamba_d_ssm",), 64),
}
NEEDED = (
    "head_dim",
    "num_key_value_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
)  # also where the default leaves them open
TOKENS = (
    "pad_token_id",
    "image_token_id",
    "audio_token_id",
    "video_token_id",
    "image_token_index",
    "audio_token_index",
)
LARGEST = 20_000_000  # parameters of a model that is still tiny
_ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 4}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SWA = {"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8}
_SWA |= {"swa_q_lora_rank": 16, "swa_kv_lora_rank": 16}
_DOTS = _SWA | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "head_dim": 16, "num_key_value_heads": 4}
_INDEXER = {"indexer_budget": 16, "indexer_compress_ratio": 4, "indexer_n_heads": 4, "indexer_kv_heads": 1}
_QWEN4 = _INDEXER | {"indexer_head_dim": 8, "split_ngram_parts": 2, "heads_per_ngram": 2}
BY_TYPE: dict[str, dict[str, Any]] = {  # what a type needs beyond that
    "big_bird": {"attention_type": "original_full"},  # the other is exchanged for it on short text
    "bloom": {"n_head": 4},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "dots3_note": {"text_config": _DOTS},
    "dots3_note_text": _DOTS,
    "falcon_h1": {"mamba_n_groups": 1, "mamba_n_heads": 4},
    "gemma4_assistant": {"text_config": _ASSISTANT},
    "gemma4_unified_assistant": {"text_config": _ASSISTANT},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 16, "head_dim": 4, "n_groups": 1, "state_size": 4},
    "opt": {"num_attention_heads": 4, "pad_token_id": 1},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "feed_forward_size": 48,
        "attention_head_size": 8,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "num_buckets": 4,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "hash_seed": 0,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "mamba_dt_rank": 4},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: str) -> Any:  # noqa: ANN401 - a foreign config
    """The default config of a type, with everything in it that has a size made small."""
    from transformers import AutoConfig

    values = tiny_values(AutoConfig.for_model(kind))
    for name, value in BY_TYPE.get(kind, {}).items():  # of a config within the config, what differs
        values[name] = values[name] | value if isinstance(values.get(name), dict) else value
    return AutoConfig.for_model(kind, **values)


def tiny_values(plain: Any) -> dict[str, Any]:  # noqa: ANN401 - a foreign config
    """What to give to the class of a config so that it is tiny, the configs within it included."""
    held = vars(plain)
    given = {plain.attribute_map.get(name, name): size for name, size in SIZES.items()}
    changes = {name: n for name, n in given.items() if held.get(name) is not None or (name in held and name in NEEDED)}
    if held.get("kv_lora_rank"):  # keys are as many as queries
        changes |= {name: 4 for name in ("num_key_value_heads",) if name in held}
    depths = {held.get(name) for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")}
    for name, value in held.items():
        if name in changes or name.startswith("_"):
            continue
        if isinstance(value, list) and len(value) in depths:  # of every layer its kind
            changes[name] = (list(dict.fromkeys(value)) * 4)[:4]
        elif hasattr(value, "attribute_map"):
            whole = {key: part for key, part in value.to_dict().items() if key != "per_layer_config"}
            changes[name] = whole | tiny_values(value)
            if "num_hidden_layers" in changes[name] and not name.startswith("text"):  # a tower is not as deep
                changes[name]["num_hidden_layers"] = 2
    if "is_decoder" in held:  # the same class reads in both directions otherwise
        changes["is_decoder"] = True
    return changes | {name: 1 for name in TOKENS if isinstance(held.get(name), int)}


def require_tiny(config: Any) -> None:  # noqa: ANN401 - a foreign config
    """Stop before a model takes the memory of a whole one."""
    import torch
    from transformers import AutoModelForCausalLM

    untyped: Any = AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(p.numel() for p in untyped.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters with the sizes that make other types tiny")


def build(kind: str, folder: Path) -> None:
    """Save a tiny model with random weights; raises whatever a foreign config or model raises."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    untyped: Any = AutoModelForCausalLM
    config = tiny_config(kind)
    require_tiny(config)
    model = untyped.from_config(config).float().eval()
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
            return {"kind": kind, "state": "not built", "why": f"{type(error).__name__}: {first_words(error)}"}
        try:
            report = sparlow.compress(folder / "dense", recipe, calibration=windows, evaluate=(), out=folder / "out")
        except InputError as error:
            return {"kind": kind, "state": "refused", "why": first_words(error).replace(str(folder), "the folder")}
        found = judged(folder, windows, report)
        return {"kind": kind, "state": "compressed" if found["right"] else "wrong", **found}


def first_words(error: Exception) -> str:
    """What an exception says, its beginning, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def judged(folder: Path, windows: "Tensor", report: "Report") -> dict[str, Any]:
    """Compare with plain forwards: perplexity block by block, and the result opened twice."""
    import torch

    import sparlow
    from sparlow.model.loading.source import open_model
    from sparlow.progress import Clock
    from sparlow.run.passes import BlockwiseRunner

    opened = open_model(str(folder / "dense"), streamed=True)
    runner = BlockwiseRunner(opened, "auto", Clock(), lambda _: None)
    found = runner.measure("dense perplexity", windows, opened.weights).perplexity.value
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
        if opened.decoder.holds(row["name"]) and row["why"] != "norm or bias":
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
        row = {"kind": kind, "state": "failed", "why": f"{type(error).__name__}: {first_words(error)}"}
    to.send(row)


@cache
def state_of_the_code() -> str:
    """A digest of everything of sparlow's, and of this script, that decides a row."""
    import transformers

    import sparlow

    files = [Path(__file__), *sorted(Path(sparlow.__file__).parent.rglob("*.py"))]
    digest = hashlib.sha256(transformers.__version__.encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def kept_row(keep: Path | None, kind: str) -> dict[str, Any] | None:
    """The row of a type in a file of rows, if the code that made it is the code that is here."""
    lines = keep.read_text(encoding="utf-8").splitlines() if keep and keep.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return next((row for row in rows if row["kind"] == kind and row["by"] == state_of_the_code()), None)


def page(rows: list[dict[str, Any]]) -> str:
    """docs/families.md."""
    import transformers

    states = Counter(row["state"] for row in rows)
    whole = [row for row in rows if row["state"] in ("compressed", "wrong")]
    lines = [
        "# Families",
        "",
        f"Every model type that `AutoModelForCausalLM` of transformers {transformers.__version__} knows, built tiny",
        "with random weights and tried by `python benchmarks/families.py`. *Dense* compares the perplexity measured",
        "block by block with a plain forward's, *reload* the logits of the result, opened again, with those of the",
        "model compressed in memory. *Compressed* is the share of the decoder blocks' parameters.",
        "",
        (
            f"{len(rows)} types: {len(whole)} compressed ({states['wrong']} of them wrong), "
            f"{states['refused']} refused, {states['failed']} failed, {states['not built']} not built tiny."
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
    parser.add_argument("--keep", type=Path, help="file of rows: those that the same code made are taken")
    args = parser.parse_args()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    import sparlow.run.compress  # noqa: F401 - once, before processes are forked

    rows = []
    for kind in args.kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        row = kept_row(args.keep, kind) or in_own_process(kind) | {"by": state_of_the_code()}
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
        if args.keep:
            with args.keep.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    text = page(rows)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
