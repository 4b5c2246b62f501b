"""The public API, word for word: whoever changes it changes this file, and says so in CHANGELOG.md."""

import inspect

import pytest

import sparlow

RUN = "evaluate=('builtin',), evaluate_seqlen=None, limit=None, device='auto', offload='auto', "
PUBLIC = {
    "benchmark": "models, *, mode=('packed',), dtype=('float32', 'bfloat16'), step=('transformers', 'kernel'), "
    "activations=('float', 'int8'), batch=1, prompt_tokens=512, tokens=64, repeats=5, threads=None, "
    "trust_remote_code=False, notify=None",
    "compare": "model, methods='usual', recipe=None, *, out, match=None, sweep=None, tasks=(), task_path=None, "
    f"reports_only=False, {RUN}"
    "overwrite=False, force=False, trust_remote_code=False, notify=None, **fields",
    "compress": f"model, recipe=None, *, calibration=None, tokenizer=None, out=None, {RUN}"
    "inplace=False, overwrite=False, force=False, trust_remote_code=False, with_loader=False, notify=None, **fields",
    "decompose": "W, H, *, pattern, rank, algorithm='3basil', damping=0.005, relative_damping=0.005, "
    "values='model', levels='auto', group=128, factors='auto', **options",
    "decomposer": "name, *, aliases={}, usual=False, by_rows=False",
    "evaluate": "model, tokenizer=None, *, evaluate=('builtin',), seqlen=2048, limit=None, column='text', "
    "tasks=(), task_path=None, "
    "fewshot=None, batch_size=8, baseline=None, device='auto', dtype='auto', trust_remote_code=False, notify=None",
    "export": "folder, out, *, form, options=None, overwrite=False, notify=None",
    "finetune": "folder, out, *, dataset='c4', steps=500, lr=0.0001, rank=None, block_size=1024, bos='auto', "
    "column='text', batch=4, "
    "accumulate=4, bf16=False, gradient_checkpointing=False, report_to='none', peft=None, evaluate=('builtin',), "
    "limit=None, device='auto', seed=0, overwrite=False, trust_remote_code=False, notify=None",
    "inspect": "folder",
    "load": "folder, *, mode=None, activations=None, step='transformers', **options",
    "mode": "name, *, activations=None",
    "open_adapter": "folder, base=None, **options",
    "plan": f"model, recipe=None, *, calibration=None, out=None, {RUN}trust_remote_code=False, timed=True, **fields",
    "pruner": "name, *, aliases={}, usual=False, by_rows=False",
    "push_to_hub": "folder, repo_id, *, private=None, token=None, revision=None, "
    "message='Upload a model compressed with sparlow'",
    "statistics": "model, recipe=None, *, calibration=None, tokenizer=None, out, device='auto', offload='auto', "
    "trust_remote_code=False, notify=None, **fields",
    "verify": "folder",
}
CLASSES = {
    "Benchmark",
    "Comparison",
    "Decomposition",
    "InputError",
    "Inspection",
    "NM",
    "Plan",
    "Progress",
    "Recipe",
    "Report",
    "RunError",
    "SparseLowRankLinear",
    "Statistics",
    "Unstructured",
    "Verification",
}


def spoken(function):
    """Names, kinds and defaults of the parameters; annotations are free to say more."""
    words = []
    starred = False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        default = "…" if callable(p.default) else repr(dict(p.default)) if p.name == "aliases" else repr(p.default)
        name = f"**{p.name}" if p.kind is p.VAR_KEYWORD else p.name
        words.append(name if p.default is p.empty else f"{name}={default}")
    return ", ".join(words)


def test_what_the_package_offers():
    assert set(sparlow.__all__) == {*PUBLIC, *CLASSES}
    assert sorted(sparlow.__all__) == sorted(set(sparlow.__all__))
    assert all(inspect.isclass(getattr(sparlow, name)) for name in CLASSES)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_parameters_and_defaults_of_each_function(name):
    assert spoken(getattr(sparlow, name)) == PUBLIC[name]
