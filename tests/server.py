"""vLLM's loader in small, restated from vLLM 0.32: the classes that a plug-in derives from, and how weights reach them.

Kept from there: which layer asks the config for a method, and with which name (models give their embedding none); that
queries, keys and values, and gate and up, are one layer, whose tensors are renamed and carry the number of their part
as an attribute; that a fused layer hands this to ``weight_loader`` and any other does not; that tied heads are tied
before weights come; that rows of a vocabulary are filled up to a multiple of 64.
"""

import json
import sys
from types import ModuleType

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional

METHODS, CONFIGS = [], {}
BASE = "vllm.model_executor.layers"


def register_quantization_config(name):
    def register(cls):
        assert issubclass(cls, QuantizationConfig)
        assert name not in METHODS
        METHODS.append(name)
        CONFIGS[name] = cls
        return cls

    return register


class QuantizationConfig:
    def __init__(self):
        self.packed_modules_mapping = {}


class QuantizeMethodBase:
    def tie_weights(self, layer, embed_tokens):
        layer.weight = embed_tokens.weight
        return layer

    def process_weights_after_loading(self, layer):  # noqa: ARG002 - for methods that need it
        return


class LinearMethodBase(QuantizeMethodBase):
    pass


def plain(parameter, loaded):
    assert parameter.shape == loaded.shape
    parameter.data.copy_(loaded)


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer, columns, rows, *sizes, params_dtype, weight_loader):
        assert sizes == (columns, sum(rows))
        layer.weight = nn.Parameter(torch.zeros(sum(rows), columns, dtype=params_dtype), requires_grad=False)
        layer.weight.weight_loader = weight_loader

    def apply(self, layer, x, bias=None):
        return functional.linear(x, layer.weight, bias)


class UnquantizedEmbeddingMethod(UnquantizedLinearMethod):
    def embedding(self, layer, ids):
        return functional.embedding(ids, layer.weight)


class LinearBase(nn.Module):
    """Divided among ``tp`` processes as ColumnParallelLinear is: each has a part of the rows."""

    def __init__(self, columns, sizes, config, prefix, *, bias=False, tp=1):
        super().__init__()
        self.sizes, self.prefix = sizes, prefix
        self.quant_method = config.get_quant_method(self, prefix)
        own, options = [size // tp for size in sizes], {"weight_loader": self.load}
        options["params_dtype"] = torch.get_default_dtype()
        self.quant_method.create_weights(self, columns, own, columns, sum(sizes), **options)
        self.bias = nn.Parameter(torch.zeros(sum(own)), requires_grad=False) if bias else None
        if bias:
            self.bias.weight_loader = self.load

    def load(self, parameter, loaded, shard_id=None):
        which = {"q": 0, "k": 1, "v": 2}.get(shard_id, shard_id)
        start = sum(self.sizes[:which]) if which else 0
        plain(parameter[start : start + (sum(self.sizes) if which is None else self.sizes[which])], loaded)

    def forward(self, x):
        return self.quant_method.apply(self, x, self.bias)


class Fused(LinearBase):
    """QKVParallelLinear and MergedColumnParallelLinear, which take their tensors themselves."""

    def load_weights(self, weights):
        for name, loaded in weights:
            parameter = getattr(self, name, self)
            parameter.weight_loader(parameter, loaded, getattr(loaded, "shard_id", None))


class VocabParallelEmbedding(nn.Module):
    def __init__(self, rows, columns, config, prefix=""):
        super().__init__()
        self.num_embeddings = self.org_vocab_size = rows
        self.embedding_dim, filled_up = columns, -(-rows // 64) * 64
        self.quant_method = config.get_quant_method(self, prefix) or UnquantizedEmbeddingMethod()
        options = {"params_dtype": torch.get_default_dtype(), "weight_loader": self.load}
        self.quant_method.create_weights(self, columns, [filled_up], columns, filled_up, **options)

    def load(self, parameter, loaded):
        assert loaded.shape[0] == self.org_vocab_size
        plain(parameter[: len(loaded)], loaded)

    def forward(self, ids):
        return self.quant_method.embedding(self, ids.long())


class ParallelLMHead(VocabParallelEmbedding):
    def forward(self, _):
        raise AssertionError("the sampler calls the method")


class RoutedExperts(nn.Module):
    pass


MODULES = {
    f"{BASE}.quantization": {
        "QUANTIZATION_METHODS": METHODS,
        "register_quantization_config": register_quantization_config,
    },
    f"{BASE}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
    f"{BASE}.linear": {
        "LinearBase": LinearBase,
        "LinearMethodBase": LinearMethodBase,
        "UnquantizedLinearMethod": UnquantizedLinearMethod,
    },
    f"{BASE}.vocab_parallel_embedding": {
        "ParallelLMHead": ParallelLMHead,
        "VocabParallelEmbedding": VocabParallelEmbedding,
    },
}


def install(monkeypatch):
    """Let ``import vllm`` find what is above; forget our modules that were imported against another."""
    for name in ("vllm", "vllm.model_executor", BASE):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, content in MODULES.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("sparlow.serving.vllm_config", "sparlow.serving.vllm_methods"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    METHODS.clear()
    CONFIGS.clear()


STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Llama(nn.Module):
    """The weights of a Llama or Qwen2 as vLLM's classes hold them, without what computes between them."""

    def __init__(self, config, quantization, *, tp=1):
        super().__init__()
        quantization.packed_modules_mapping.update(PACKED)
        wide = config["hidden_size"]
        head = wide // config["num_attention_heads"]
        keys, bias = head * config["num_key_value_heads"], config["model_type"] == "qwen2"
        self.model = nn.Module()
        self.model.embed_tokens = VocabParallelEmbedding(config["vocab_size"], wide, quantization)
        self.model.layers = nn.ModuleList()
        for i in range(config["num_hidden_layers"]):
            block, at = nn.Module(), f"model.layers.{i}"
            block.self_attn, block.mlp = nn.Module(), nn.Module()
            block.self_attn.qkv_proj = Fused(
                wide, [wide, keys, keys], quantization, f"{at}.self_attn.qkv_proj", bias=bias, tp=tp
            )
            block.self_attn.o_proj = LinearBase(wide, [wide], quantization, f"{at}.self_attn.o_proj")
            inner = config["intermediate_size"]
            block.mlp.gate_up_proj = Fused(wide, [inner, inner], quantization, f"{at}.mlp.gate_up_proj")
            block.mlp.down_proj = LinearBase(inner, [wide], quantization, f"{at}.mlp.down_proj")
            if "num_local_experts" in config:  # Mixtral
                quantization.get_quant_method(RoutedExperts(), f"{at}.block_sparse_moe.experts")
            self.model.layers.append(block)
        self.lm_head = ParallelLMHead(config["vocab_size"], wide, quantization, "lm_head")
        if config["tie_word_embeddings"]:
            self.lm_head = self.lm_head.quant_method.tie_weights(self.lm_head, self.model.embed_tokens)

    def load_weights(self, weights):
        for name, loaded in weights:
            self._load(name, loaded)

    def _load(self, name, loaded):
        for part, (fused, number) in STACKED.items():
            if part in name:
                name = name.replace(part, fused, 1)
                loaded.shard_id = number
        place, _, last = name.rpartition(".")
        if "norm" in place:
            return
        module = self.get_submodule(place)
        if hasattr(module, "load_weights"):
            module.load_weights([(last, loaded)])
        elif last in dict(module.named_parameters(recurse=False)):
            parameter = getattr(module, last)
            getattr(parameter, "weight_loader", plain)(parameter, loaded)
        else:
            raise ValueError(f"There is no module or parameter named {name!r} in Llama.")


def tensors(folder):
    """What the files of a directory hold, one after the other."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            yield from ((name, shard.get_tensor(name)) for name in shard.keys())  # noqa: SIM118 - no dict


def serve(folder, *, tp=1, weights=None, device=None):
    """Open a directory as ``vllm serve`` does; return the model."""
    config = json.loads((folder / "config.json").read_text())
    method = config["quantization_config"]["quant_method"]
    quantization = CONFIGS[method].from_config(config["quantization_config"])
    with torch.device(device or "cpu"):
        model = Llama(config, quantization, tp=tp)
    model.load_weights(tensors(folder) if weights is None else weights)
    for module in model.modules():
        if isinstance(getattr(module, "quant_method", None), QuantizeMethodBase):
            module.quant_method.process_weights_after_loading(module)
    return model
