"""How many windows pass through a block at a time: fewer where attention holds a number for every pair of tokens."""

from transformers import PretrainedConfig

TOKENS_AT_ONCE = 2048  # that pass through a model or a block at a time; twice as many take a tenth longer on a CPU
SCORES_AT_ONCE = 2**24  # of attention without a fused kernel: 64 MB in float32, and a few copies of them
FUSED = ("sdpa", "flash", "flex")  # how the names of attention kernels begin that never hold all scores


def unfused_heads(config: PretrainedConfig) -> int:
    """Heads whose attention scores, (seqlen, seqlen) each, are all in memory at once; 0 with a fused kernel.

    Args:
        config: Of the text model.
    """
    kernel = str(getattr(config, "_attn_implementation", None) or FUSED[0]).rpartition("|")[2]
    return 0 if kernel.startswith(FUSED) else int(getattr(config, "num_attention_heads", None) or 0)


def windows_at_once(seqlen: int, heads: int) -> int:
    """Return how many windows of ``seqlen`` tokens may pass through a block together, one at least.

    Args:
        seqlen: Tokens in a window.
        heads: See ``unfused_heads``.
    """
    windows = TOKENS_AT_ONCE // seqlen
    return max(min(windows, SCORES_AT_ONCE // (heads * seqlen**2)) if heads else windows, 1)
