"""What tests of directories share: bits of models, changes to files, and processes without sparlow."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments


def bits(state):
    return {name: t.contiguous().view(torch.uint8) if t.numel() else t for name, t in state.items()}


def assert_same_bits(one, other):
    one, other = bits(one.state_dict()), bits(other.state_dict())
    assert one.keys() == other.keys()
    assert all(torch.equal(t, other[name]) for name, t in one.items())


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def trainer(model, folder, **options):
    text = torch.randint(2, 97, (8, 12), generator=torch.Generator().manual_seed(2))
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_steps=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in text])


def spoil(path, change):
    with safe_open(path, "pt") as shard:
        metadata = shard.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


STRANGER = """
import sys, transformers
transformers.utils.logging.set_verbosity_error()
how, folder = sys.argv[1:]
try:
    if how == "pipeline":
        found = transformers.pipeline("text-generation", folder)
    elif how == "body":
        found = transformers.AutoModel.from_pretrained(folder)
    else:
        found = transformers.AutoModelForCausalLM.from_pretrained(folder)
except Exception as error:
    print(type(error).__name__, str(error).replace(chr(10), " "))
else:
    print("OPENED", found)
assert "sparlow" not in sys.modules
"""
