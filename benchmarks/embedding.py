"""What an embedding and head in few bits cost: perplexity with them as stored, and with the dense model's own.

    python benchmarks/embedding.py RESULT --model DENSE --text wikitext2_test.raw [--seqlen 1024] [--limit 24]

Prints both, and the difference of the losses over the same windows with its standard error, in nats a token.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

import sparlow
from sparlow.model.loading.source import open_model


@torch.no_grad()
def losses(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Return the mean loss of each window (windows, tokens) in nats a token."""
    found = [nn.functional.cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:]) for row in windows]
    return torch.stack(found)


def with_own(model: PreTrainedModel, dense: PreTrainedModel) -> PreTrainedModel:
    """Put the dense model's embedding and head into a compressed one."""
    model.set_input_embeddings(dense.get_input_embeddings())
    model.set_output_embeddings(dense.get_output_embeddings())
    return model


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=24)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.result)
    tokens = torch.tensor(tokenizer(given.text.read_text("utf-8")).input_ids)
    windows = tokens[: given.limit * given.seqlen].view(-1, given.seqlen)
    model = sparlow.load(given.result, mode="dense", dtype=torch.float32).eval()
    stored = losses(model, windows)
    own = losses(with_own(model, open_model(given.model, dtype="float32").model.eval()), windows)
    off = stored - own
    as_stored, dense = stored.mean().exp(), own.mean().exp()
    print(f"perplexity with the embedding as stored {as_stored:.2f}, as in the dense model {dense:.2f}")
    print(f"difference of losses {off.mean():+.4f} ± {off.std() / len(off) ** 0.5:.4f}")


if __name__ == "__main__":
    main()
