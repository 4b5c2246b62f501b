"""What others do with packed models: PEFT, lm-eval, pipelines, torch.compile, processes and threads."""

import copy
import json
import os
import subprocess
import sys
import threading
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

import sparlow
from artefacts import trainer
from coded import coded_layer, save_coded
from sparlow.errors import InputError
from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.artefact.stored_form import Weight, pack_weight
from sparlow.runtime.build import NoKernelError, library
from sparlow.runtime.packed import Packed, PackedLinear

try:
    library()
except NoKernelError as problem:
    pytest.skip(str(problem), allow_module_level=True)

NEAR = 1e-5  # of the largest logit: what the order of sums in float32 changes
IDS = torch.randint(2, 97, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_coded("llama", "int4", torch.float32, tmp_path_factory.mktemp("model"))


@pytest.fixture
def packed(folder):
    return sparlow.load(folder, mode="packed")


@pytest.fixture(scope="module")
def dense(folder):
    return sparlow.load(folder, mode="dense")


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, **options).logits.float()


def near(found, right):
    return bool((found - right).abs().max() <= NEAR * right.abs().max())


def layer_of(model):
    return next(module for module in model.modules() if isinstance(module, PackedLinear))


class TestPeft:
    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft")

    @staticmethod
    def config(peft, **options):
        common = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
        return peft.LoraConfig(**common | options)

    def test_an_adapter_trains_on_a_packed_model_and_loads_in_every_mode(self, peft, packed, folder, tmp_path):
        right = logits(packed)
        stored = {name: t.clone() for name, t in packed.state_dict().items()}
        model = peft.get_peft_model(packed, self.config(peft))
        assert near(logits(model), right)  # B begins with zeros
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(3):
            losses.append(model(IDS, labels=IDS).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[2] < losses[1] < losses[0]
        model.save_pretrained(tmp_path)
        trained = logits(model)
        assert not near(trained, right)
        for mode in ("packed", "dense", "merged"):
            other = peft.PeftModel.from_pretrained(sparlow.load(folder, mode=mode), tmp_path)
            assert near(logits(other), trained)
        base = model.unload()
        assert all(torch.equal(t, stored[name]) for name, t in base.state_dict().items())
        assert near(logits(base), right)

    def test_trainer_takes_a_packed_model_with_an_adapter_and_no_other(self, peft, packed, tmp_path):
        with pytest.raises(ValueError, match="attach trainable adapters"):
            Trainer(packed, TrainingArguments(tmp_path, use_cpu=True, report_to=[]))
        model = peft.get_peft_model(packed, self.config(peft))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer(model, tmp_path, max_steps=1).train()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved
        assert all("lora_" in name for name in moved)

    def test_the_adapters_of_transformers_work_too(self, peft, packed):
        right = logits(packed)
        packed.add_adapter(self.config(peft, init_lora_weights=False))
        assert not near(logits(packed), right)
        packed.disable_adapters()
        assert near(logits(packed), right)

    @pytest.mark.parametrize("mode", ["packed", "dense"])
    def test_what_would_be_lost_is_refused(self, peft, mode, folder):
        model = peft.get_peft_model(sparlow.load(folder, mode=mode), self.config(peft))
        with pytest.raises(InputError, match=r"cannot be merged into a compressed layer. Open the model with mode="):
            model.merge_and_unload()
        for options, what in (
            ({"init_lora_weights": "pissa"}, r"'pissa' PEFT changes the compressed layer itself. Choose True"),
            ({"use_dora": True}, r"take plain LoRA only .*use_dora.*Leave the variant out"),
        ):
            with pytest.raises(InputError, match=what):
                peft.get_peft_model(sparlow.load(folder, mode=mode), self.config(peft, **options))

    def test_adapters_go_where_the_model_is_without_expanding_a_weight(self, peft, packed, monkeypatch):
        def expanded(_):
            raise AssertionError("a weight was expanded")

        monkeypatch.setattr(PackedLinear, "dequantize", expanded)
        model = peft.get_peft_model(packed.bfloat16(), self.config(peft), autocast_adapter_dtype=False)
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}  # of the file
        assert logits(model).isfinite().all()


def test_dequantize_gives_a_plain_model(folder, packed, dense):
    right = logits(dense)
    for model in (packed, sparlow.load(folder)):
        plain = model.dequantize()
        assert not [m for m in plain.modules() if isinstance(m, (PackedLinear, SparseLowRankLinear))]
        assert not hasattr(plain.config, "quantization_config")
        assert near(logits(plain), right)
    half = sparlow.load(folder, mode="packed").dequantize(torch.bfloat16)
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_whole_models_are_cast_by_to(packed):
    right = logits(packed)
    for dtype, bound in ((torch.float16, 0.02), (torch.bfloat16, 0.1), (torch.float32, 0.1)):
        model = packed.to(dtype)
        assert next(model.parameters()).dtype == model(IDS).logits.dtype == dtype
        assert (logits(model) - right).abs().max() <= bound * right.abs().max()
    for cast in (packed.half, packed.float):  # transformers' own, of anything quantised
        with pytest.raises(ValueError, match="not supported for quantized model"):
            cast()


def test_a_pipeline_answers_batches_as_the_dense_model_does(folder, dense):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token_id, tokenizer.padding_side = 1, "left"
    prompts = [tokenizer.decode(row[:length]) for row, length in zip(IDS, (6, 3), strict=True)]
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    with sparlow.mode("packed"):
        found = pipeline("text-generation", str(folder), tokenizer=tokenizer)
    assert layer_of(found.model)
    right = pipeline("text-generation", dense, tokenizer=tokenizer)
    assert found(prompts, batch_size=2, **options) == right(prompts, batch_size=2, **options)


@pytest.mark.slow
def test_lm_eval_opens_and_scores_it(folder):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    asked = [("token token", " token"), ("a", " b c d"), ("a b c d e f g", " h")]
    rows = [instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
    written = [instance("generate_until", {}, ("a b", {"until": ["z"], "max_gen_toks": 5}), 0)]
    found = []
    for how in ("packed", "dense"):
        with sparlow.mode(how):
            lm = huggingface.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)
        assert any(isinstance(m, PackedLinear) for m in lm.model.modules()) == (how == "packed")
        found.append(([x for x, _ in lm.loglikelihood(rows)], lm.generate_until(written)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == found[1][1]


def test_a_whole_model_compiles_without_a_break(packed, dense):
    right = logits(packed)
    torch.compiler.reset()
    told = torch._dynamo.explain(lambda ids: packed(ids, use_cache=False).logits)(IDS)
    assert told.graph_break_count == 0
    operators = [node for graph in told.graphs for node in graph.graph.nodes if "packed_linear" in str(node.target)]
    assert len(operators) == len(compressed_layers(dense))
    with torch.no_grad():
        compiled = torch.compile(packed, backend="eager", fullgraph=True)
        assert torch.equal(compiled(IDS, use_cache=False).logits, right)


@pytest.mark.slow
def test_a_whole_model_compiled_by_inductor_gives_the_same(packed):
    right = logits(packed)
    torch.compiler.reset()
    compiled = torch.compile(packed)
    assert near(logits(compiled, use_cache=False), right)
    assert near(logits(compiled, IDS[:, :3], use_cache=False), logits(packed, IDS[:, :3]))  # another shape


class Products(torch.utils.data.Dataset):
    """Products of a packed layer, made where they are asked for."""

    def __init__(self, layer, x):
        self.layer, self.x = layer, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        torch.set_num_threads(2)  # a worker begins with one
        return self.layer(self.x[i])


def test_what_is_sent_to_another_process_leaves_the_layer_alone(packed):
    """Torch moves what it sends to shared memory, and frees the memory where it was."""
    layer, right = layer_of(packed), logits(packed)
    for sent in (layer, layer.state_dict(), packed):
        before = {part: t.data_ptr() for part, t in layer.packed.parts.items()}
        ForkingPickler.dumps(sent)
        assert {part: t.data_ptr() for part, t in layer.packed.parts.items()} == before
        other = copy.deepcopy(packed)
        assert torch.equal(logits(packed), right)
        assert torch.equal(logits(other), right)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_workers_of_a_data_loader_have_packed_layers():
    whole = coded_layer((1024, 512), "int4", pattern="2:4", dtype=torch.float32)
    packed = pack_weight(Weight(whole.S, whole.U, whole.V), whole.stored)
    layer = PackedLinear(Packed(packed.tensors, (1024, 512), packed.grid, torch.float32, None))
    x = torch.randn(6, layer.in_features)
    right = torch.stack([layer(row) for row in x])  # by threads that a fork does not take along
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(torch.stack([layer(row) for row in x]), right)
        loader = torch.utils.data.DataLoader(
            Products(layer, x), batch_size=3, num_workers=2, multiprocessing_context="fork", timeout=120
        )
        assert torch.equal(torch.cat(list(loader)), right)
        assert torch.equal(torch.stack([layer(row) for row in x]), right)
    finally:
        torch.set_num_threads(before)


def test_threads_of_python_share_a_model_while_the_number_of_threads_changes(packed):
    right = [logits(packed, IDS[i : i + 1]) for i in range(2)]
    before, wrong, done = torch.get_num_threads(), [], threading.Event()

    def many(i):
        torch.set_num_threads(1 + i)
        wrong.extend(i for _ in range(10) if not near(logits(packed, IDS[i : i + 1]), right[i]))

    def restless():
        k = 0
        while not done.wait(0.001):
            k += 1
            torch.set_num_threads(1 + k % 3)

    threads = [threading.Thread(target=many, args=(i % 2,)) for i in range(4)]
    changes = threading.Thread(target=restless)
    changes.start()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        done.set()
        changes.join()
        torch.set_num_threads(before)
    assert wrong == []


PROGRAM = """
import json, sys
import sparlow
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
kinds = sorted({type(m).__name__ for m in model.modules() if "Packed" in type(m).__name__})
with torch.no_grad():
    print(json.dumps([kinds, model(torch.tensor([[5, 6, 7]])).logits[0, -1].tolist()]))
"""


@pytest.mark.slow
def test_a_program_that_only_imports_sparlow_is_told_by_the_environment(folder, dense):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "SPARLOW_MODE": "packed"}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    ended = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    kinds, found = json.loads(ended.stdout)
    assert kinds == ["PackedLinear"]
    assert near(torch.tensor(found), logits(dense, torch.tensor([[5, 6, 7]]))[0, -1])
    environment["SPARLOW_MODE"] = "pakced"
    ended = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0
    assert ended.stderr.rstrip().endswith(
        "InputError: There is no mode 'pakced'; did you mean 'packed'? Choose one of: dense, packed, merged, auto."
    )


def test_it_is_opened_by_its_class_and_saved_for_those_that_only_read_tensors(folder, packed, tmp_path):
    torch.save(packed.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    with sparlow.mode("packed"):
        other = AutoModelForCausalLM.from_pretrained(folder)
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(packed))
