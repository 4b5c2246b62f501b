"""Laws of transformer matching: the support stays, the loss falls, the same seed gives the same bits."""

import copy
from dataclasses import replace

import pytest
import torch

import sparlow
from families import linears, save_tiny, tiny
from samples import few_of
from sparlow.errors import RunError
from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.capture import capture_block_inputs
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.input_statistics import collect_statistics
from sparlow.model.training import block_matching
from sparlow.model.training.block_matching import BlockOutputs, match
from sparlow.model.training.loop import MicroBatches, TrainingPlan
from sparlow.model.training.packed_layer import Packed, packed, round_through
from sparlow.recipe.recipe import MATCH_PRESETS, Recipe
from sparlow.recipe.training_plan import PRESETS, Training, training_of
from sparlow.run.output_dir import NAME
from sparlow.run.verify import verify_artefact

WINDOWS = torch.randint(2, 97, (10, 16), generator=torch.Generator().manual_seed(1))
PLAN = TrainingPlan(epochs=6, lr=2e-3, low_rank_lr=2e-3, batch=4, patience=0)
HIGH = replace(PLAN, lr=3.0, low_rank_lr=3.0)
PLAIN = BlockOutputs(relative=False, from_dense=True)


class Nothing:
    def __init__(self, *_):
        pass

    def add(self, _):
        pass


def problem(family="llama", rank=2, seed=0):
    """A compressed block, its calls, inputs and the dense block's outputs."""
    model = tiny(family)
    blocks = Decoder.of(model).blocks
    recording = capture_block_inputs(model, WINDOWS, micro_batch=4, apart=2)
    outputs = ActivationStore("cpu")
    collect_statistics(BlockPass(blocks[0], recording.calls[0], recording.hidden), Nothing, outputs)
    draw = torch.Generator().manual_seed(seed)
    for name, linear in linears(blocks[0]).items():
        W = linear.weight.detach()
        keep = torch.rand(W.shape, generator=draw) < 0.5
        U, V = torch.randn(len(W), rank, generator=draw) * 0.01, torch.randn(rank, W.shape[1], generator=draw) * 0.01
        blocks[0].set_submodule(name, SparseLowRankLinear(W * keep, U, V, linear.bias))
    return blocks[0], recording.calls[0], recording.hidden, outputs


def supports(block):
    return {name: layer.S != 0 for name, layer in compressed_layers(block).items()}


def loss_of(block, calls, inputs, targets, *, relative=False, first=0):
    """The loss from its definition, every token of every window alike."""
    errors, sizes = [], []
    with torch.no_grad():
        for i, (x, target) in enumerate(zip(inputs, targets, strict=True), first):
            call = calls.at(i, "cpu")
            y = block(x, *call.args, **call.kwargs)
            y = y[0] if isinstance(y, tuple) else y
            errors.append((y - target).square().sum(-1).flatten())
            sizes.append(target.square().sum(-1).flatten())
    if relative:
        return (torch.cat(errors) / torch.cat(sizes)).mean().item()
    return (torch.cat(errors).sum() / torch.cat(sizes).sum()).item()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "bloom"])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_loss_falls_and_the_support_stays(family, rank):
    block, calls, inputs, targets = problem(family, rank)
    before, kept = loss_of(block, calls, inputs, targets), supports(block)
    found = match(BlockPass(block, calls, inputs), MicroBatches(inputs, targets), PLAIN, PLAN)
    assert found.loss_before == pytest.approx(before, rel=1e-4)
    assert found.loss_after == pytest.approx(loss_of(block, calls, inputs, targets), rel=1e-4)
    assert found.loss_after < 0.9 * before
    assert found.epochs == 6
    for name, mask in supports(block).items():
        assert torch.equal(mask, kept[name])
    assert all(layer.rank == rank for layer in compressed_layers(block).values())


def test_every_parameter_takes_part():
    block, calls, inputs, targets = problem("gpt_neox")
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    match(BlockPass(block, calls, inputs), MicroBatches(inputs, targets), PLAIN, PLAN)
    assert [name for name, p in block.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("relative", [False, True])
def test_held_out_windows_judge_and_are_not_trained_on(relative):
    block, calls, inputs, targets = problem()
    objective = replace(PLAIN, relative=relative)
    held = (calls, inputs[-1:], targets[-1:])
    before = loss_of(block, *held, relative=relative, first=len(inputs) - 1)
    found = match(BlockPass(block, calls, inputs), MicroBatches(inputs, targets, held_out=1), objective, PLAN)
    assert found.loss_before == pytest.approx(before, rel=1e-4)
    assert found.loss_after == pytest.approx(loss_of(block, *held, relative=relative, first=len(inputs) - 1), rel=1e-4)
    other, *_ = problem()
    spoilt = [*targets[:-1], targets[-1] + 0.5]  # decides which epoch is best, nothing else
    data = MicroBatches(inputs, spoilt, held_out=1)
    match(BlockPass(other, calls, inputs), data, objective, replace(PLAN, epochs=1))
    again, *_ = problem()
    match(
        BlockPass(again, calls, inputs), MicroBatches(inputs, targets, held_out=1), objective, replace(PLAN, epochs=1)
    )
    assert any(torch.equal(a, b) for a, b in zip(other.parameters(), again.parameters(), strict=True))


def test_the_best_epoch_is_kept_if_training_only_harms():
    block, calls, inputs, targets = problem()
    before = copy.deepcopy(block.state_dict())
    found = match(BlockPass(block, calls, inputs), MicroBatches(inputs, targets), PLAIN, replace(HIGH, epochs=3))
    assert found.loss_after == found.loss_before
    for name, value in block.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_training_stops_when_nothing_is_gained():
    block, calls, inputs, targets = problem()
    found = match(
        BlockPass(block, calls, inputs),
        MicroBatches(inputs, targets, held_out=1),
        PLAIN,
        replace(HIGH, epochs=9, patience=2),
    )
    assert found.epochs == 2


def test_the_same_seed_gives_the_same_bits():
    results = []
    for seed in (5, 5, 6):
        block, calls, inputs, targets = problem()
        match(BlockPass(block, calls, inputs), MicroBatches(inputs, targets), PLAIN, PLAN, seed=seed)
        results.append(torch.cat([p.detach().flatten() for p in block.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_plain_loss_counts_every_error_alike_however_large_the_targets_of_its_micro_batch_are():
    """As the paper's sum over all tokens does; a micro-batch was divided by the size of its own targets."""
    block, calls, inputs, targets = problem()
    targets = [target * factor for target, factor in zip(targets, (1, 30, 1, 1), strict=False)]
    through, data = BlockPass(block, calls, inputs), MicroBatches(inputs, targets)
    loss, per_error = block_matching._loss(through, PLAIN, data), []
    with torch.no_grad():
        for i, (x, target) in enumerate(zip(inputs, targets, strict=True)):
            call = calls.at(i, "cpu")
            y = block(x, *call.args, **call.kwargs)
            error = ((y[0] if isinstance(y, tuple) else y) - target).square().sum()
            per_error.append(loss(i, x, target).item() * len(x) / error.item())
    assert per_error == pytest.approx([per_error[0]] * len(per_error), rel=1e-4)


def leaves(root):
    return {name: value.clone() for name, value in root.state_dict().items()}


@pytest.mark.parametrize("preset", few_of(["blocks", "paper", "logits"], "blocks", "logits"))
def test_training_leaves_routers_and_ignored_layers_as_they_are(preset, tmp_path):
    save_tiny("mixtral", tmp_path / "model")
    recipe = Recipe(algorithm="wanda", ignore=("k_proj",), match=True, match_preset=preset, match_lr=1e-2)
    report = sparlow.compress(tmp_path / "model", recipe, calibration=WINDOWS, evaluate=(), out=tmp_path / "out")
    dense, trained = leaves(tiny("mixtral")), leaves(sparlow.load(tmp_path / "out"))
    moved = {}
    for row in report.not_compressed:
        own = [name for name in dense if name.rpartition(".")[0] == row["name"]]
        moved[row["name"]] = any(not torch.equal(dense[name], trained[name]) for name in own)
    assert moved == {row["name"]: row["trained"] for row in report.not_compressed}
    still = {name.rpartition(".")[2] for name, was in moved.items() if not was}
    assert {"gate", "k_proj", "embed_tokens", "lm_head", "norm"} <= still
    assert {name.rpartition(".")[2] for name, was in moved.items() if was} == {
        "input_layernorm",
        "post_attention_layernorm",
    }


@pytest.mark.parametrize(
    ("family", "vectors"),
    few_of(
        [("mamba2", "A_log D dt_bias"), ("gpt_oss", "sinks"), ("gemma4_moe", "scale per_expert_scale layer_scalar")],
        ("mamba2", "A_log D dt_bias"),
    ),
)
def test_matching_leaves_vectors_that_are_no_norms_as_they_are(family, vectors, tmp_path):
    model = save_tiny(family, tmp_path / "model")
    recipe = Recipe(algorithm="magnitude", pattern="0.5", match=True, match_preset="blocks", match_lr=1e-2)
    report = sparlow.compress(tmp_path / "model", recipe, calibration=WINDOWS, evaluate=(), out=tmp_path / "out")
    dense, trained = leaves(model), leaves(sparlow.load(tmp_path / "out"))
    names = [name for name in dense if name.rpartition(".")[2] in vectors.split()]
    assert names
    assert [name for name in names if not torch.equal(dense[name], trained[name])] == []
    for row in report.not_compressed:  # the report says what happened
        own = [name for name in dense.keys() & trained.keys() if name.rpartition(".")[0] == row["name"]]
        assert row["trained"] == any(not torch.equal(dense[name], trained[name]) for name in own), row
    assert any(row["trained"] for row in report.not_compressed)


def test_a_block_without_anything_to_train_is_measured_and_left_alone():
    block, calls, inputs, targets = problem()
    for name in compressed_layers(block):
        block.set_submodule(name, linears(Decoder.of(tiny("llama")).blocks[0])[name])
    for name in ("input_layernorm", "post_attention_layernorm"):
        block.set_submodule(name, torch.nn.Identity())
    before = leaves(block)
    found = match(BlockPass(block, calls, inputs), MicroBatches(inputs, targets), PLAIN, PLAN)
    assert (found.loss_before, found.epochs) == (found.loss_after, 0)
    assert found.loss_before == pytest.approx(loss_of(block, calls, inputs, targets), rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@pytest.mark.parametrize("relative", [False, True])
def test_micro_batches_add_up_to_a_step(relative):
    """A batch of 8 in two micro-batches of 4 is the step of one of 8."""
    blocks = []
    for size in (4, 8):
        model = tiny("llama")
        recording = capture_block_inputs(model, WINDOWS[:8], micro_batch=size)
        block, _, _, _ = problem()
        dense = Decoder.of(tiny("llama")).blocks[0]
        targets = ActivationStore("cpu")
        collect_statistics(BlockPass(dense, recording.calls[0], recording.hidden), Nothing, targets)
        plan, objective = replace(PLAN, batch=8, epochs=1), replace(PLAIN, relative=relative)
        match(
            BlockPass(block, recording.calls[0], recording.hidden),
            MicroBatches(recording.hidden, targets),
            objective,
            plan,
        )
        blocks.append(block)
    for a, b in zip(blocks[0].parameters(), blocks[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_a_loss_that_is_not_finite_stops_the_run():
    block, calls, inputs, targets = problem()
    targets = [target * torch.inf for target in targets]
    with pytest.raises(RunError, match=r"model.layers.3: matching cannot begin: the loss is not finite at step 1"):
        match(BlockPass(block, calls, inputs, "model.layers.3"), MicroBatches(inputs, targets), PLAIN, PLAN)
    assert len(compressed_layers(block)) == 7  # the block is whole again


def test_the_block_is_as_it_was_but_for_its_numbers():
    block, calls, inputs, targets = problem()
    block.train()
    for p in block.parameters():
        p.requires_grad_(requires_grad=False)
    names = [name for name, _ in block.named_parameters()]
    match(BlockPass(block, calls, inputs), MicroBatches(inputs, targets), PLAIN, replace(PLAN, epochs=1))
    assert [name for name, _ in block.named_parameters()] == names
    assert all(not p.requires_grad and p.grad is None for p in block.parameters())
    assert block.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_keeps_the_support(dtype):
    block, *_ = problem()
    (layer, *_) = compressed_layers(block).values()
    with torch.no_grad():
        layer.S[layer.S != 0] *= 1e-12 if dtype is torch.float16 else 1e-30
    kept = layer.S != 0
    round_through(block, dtype)
    assert torch.equal(layer.S != 0, kept)
    assert all(torch.equal(p, p.to(dtype).float()) for p in block.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["unpacked", "rounded"])
def test_a_value_that_underflows_keeps_its_sign_and_becomes_no_larger_than_a_weight(dtype, way):
    block, *_ = problem()
    (layer, *_) = compressed_layers(block).values()
    signs = layer.S.sign()
    with torch.no_grad():
        layer.S.copy_(signs * (1e-8 if dtype is torch.float16 else 1e-44))
    if way == "unpacked":
        whole = Packed(layer)
        layer.S.data = layer.S.data.to(dtype)
        whole.unpack_into(layer)
    else:
        round_through(block, dtype)
    assert torch.equal(layer.S.float().sign(), signs)
    assert layer.S.abs().max().item() <= 2.0**-24  # the smallest subnormal of float16; its smallest normal is 6e-5


def test_how_long_the_columns_of_u_are_does_not_matter():
    ends = []
    for length in (1.0, 512.0):
        block, calls, inputs, targets = problem()
        with torch.no_grad():
            for layer in compressed_layers(block).values():
                layer.U.mul_(length)
                layer.V.div_(length)
        found = match(BlockPass(block, calls, inputs), MicroBatches(inputs, targets), PLAIN, PLAN)
        layers = compressed_layers(block).values()
        ends.append((found.loss_after, [(layer.U / length, layer.V * length) for layer in layers]))
    assert ends[0][0] == ends[1][0]
    for (U, V), (longer, shorter) in zip(ends[0][1], ends[1][1], strict=True):
        assert torch.equal(U, longer)
        assert torch.equal(V, shorter)


# In a run


def run(folder, out, **changes):
    recipe = Recipe(
        rank=2,
        options={"effort": 0.1, "max_steps": 5},
        match=True,
        match_preset="blocks",
        match_epochs=2,
        match_lr=1e-3,
    )
    options = {"calibration": WINDOWS, "evaluate": (), "out": out, "force": True}
    return sparlow.compress(folder, recipe.changed(**changes), **options)


@pytest.mark.parametrize("algorithm", few_of(["magnitude", "wanda", "3basil"], "3basil"))
def test_matching_leaves_every_support_as_the_method_found_it(algorithm, tmp_path):
    save_tiny("llama", tmp_path / "model")
    changes = {"algorithm": algorithm} | ({} if algorithm == "3basil" else {"rank": None, "options": {}})
    with_match = run(tmp_path / "model", tmp_path / "with", **changes)
    without = run(tmp_path / "model", tmp_path / "without", match=False, **changes)
    first = [
        {n: m.S != 0 for n, m in compressed_layers(sparlow.load(tmp_path / d)).items()} for d in ("with", "without")
    ]
    for name in [name for name in first[0] if ".0." in name]:  # later blocks saw other inputs
        assert torch.equal(first[0][name], first[1][name])
    assert verify_artefact(tmp_path / "with") == []
    assert [row["block"] for row in with_match.matching] == [0, 1, 2]
    assert without.matching == []
    assert all(row["loss_after"] <= row["loss_before"] for row in with_match.matching)
    assert with_match.seconds["matching"] > 0


def leaving(model):
    """What leaves each block, all windows together."""
    found = []
    hooks = [
        block.register_forward_hook(lambda _m, _x, y: found.append(y[0] if isinstance(y, tuple) else y))
        for block in Decoder.of(model).blocks
    ]
    with torch.no_grad():
        model(WINDOWS)
    for hook in hooks:
        hook.remove()
    return found


def test_a_block_makes_up_for_those_before_it(tmp_path):
    save_tiny("llama", tmp_path / "model")
    nearly_still = {"algorithm": "wanda", "rank": None, "options": {}, "match_epochs": 1, "match_lr": 1e-12}
    report = run(tmp_path / "model", tmp_path / "out", **nearly_still)
    dense, compressed = leaving(tiny("llama")), leaving(sparlow.load(tmp_path / "out"))
    for row, x, y in zip(report.matching, dense, compressed, strict=True):
        relative = (x - y).square().sum(-1) / x.square().sum(-1)
        assert row["loss_before"] == pytest.approx(relative.mean().item(), rel=1e-2)  # norms have moved a little
    own = run(tmp_path / "model", tmp_path / "own", match_preset="paper", **nearly_still)
    assert own.matching[2]["loss_before"] < 0.8 * report.matching[2]["loss_before"]


def test_a_step_takes_as_many_windows_as_it_says(tmp_path, monkeypatch):
    sizes = set()

    def spy(through, *args, **options):
        sizes.update(len(x) for x in through.hidden)
        return match(through, *args, **options)

    monkeypatch.setattr("sparlow.run.recovery.match", spy)
    save_tiny("llama", tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", match_batch=4)
    assert sizes == {4, 2}  # ten windows


@pytest.mark.parametrize(
    ("dtype", "preset"),
    few_of(
        [(torch.float32, "blocks"), (torch.bfloat16, "blocks"), (torch.float32, "paper")], (torch.bfloat16, "blocks")
    ),
)
def test_a_matched_run_that_was_stopped_ends_in_the_same_bits(dtype, preset, tmp_path):
    save_tiny("llama", tmp_path / "model", dtype=dtype)
    whole = run(tmp_path / "model", tmp_path / "whole", match_preset=preset)

    def stop(step):
        if step.stage == "blocks" and step.done == 1:
            raise KeyboardInterrupt

    recipe = Recipe.from_file(tmp_path / "whole" / "recipe.toml")
    with pytest.raises(KeyboardInterrupt):
        sparlow.compress(
            tmp_path / "model", recipe, calibration=WINDOWS, evaluate=(), out=tmp_path / "out", notify=stop
        )
    report = run(tmp_path / "model", tmp_path / "out", match_preset=preset)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()
    assert [{**row, "seconds": 0} for row in report.matching] == [{**row, "seconds": 0} for row in whole.matching]
    assert (tmp_path / "out" / NAME).exists()


def test_the_paper_preset_is_the_published_one():
    schedule = TrainingPlan(epochs=20, lr=2e-5, low_rank_lr=2e-5, batch=8, patience=0)
    assert PRESETS["paper"] == Training(BlockOutputs(relative=False, from_dense=False), schedule)


def test_every_preset_that_a_recipe_may_name_is_there():
    assert tuple(PRESETS) == MATCH_PRESETS


def test_another_learning_rate_leaves_the_low_rank_part_its_share_of_it():
    for preset, share in {"logits": 0.25, "blocks": 1.0, "paper": 1.0}.items():
        plan = training_of(Recipe(match=True, match_preset=preset, match_lr=3e-3)).plan
        assert (plan.lr, plan.low_rank_lr) == (3e-3, share * 3e-3)
    assert training_of(Recipe()) is None


def test_the_low_rank_part_has_a_rate_of_its_own():
    whole = dict.fromkeys(("S", "U", "V", "norm"), True)
    for still, plan in {
        ("U", "V"): replace(PLAN, low_rank_lr=0.0),
        ("S", "norm"): replace(PLAN, lr=0.0),
    }.items():
        block, calls, inputs, targets = problem()
        before = {name: p.detach().clone() for name, p in block.named_parameters()}
        match(BlockPass(block, calls, inputs), MicroBatches(inputs, targets), PLAIN, plan)
        moved = dict.fromkeys(whole, False)
        for name, p in block.named_parameters():
            part = name.rpartition(".")[2] if name.rpartition(".")[2] in whole else "norm"
            moved[part] |= not torch.equal(p, before[name])
        assert moved == whole | dict.fromkeys(still, False)


def test_half_precision_is_widened_while_it_is_trained():
    block = problem("opt")[0].to(torch.bfloat16)  # it has biases
    types = {name: p.dtype for name, p in block.named_parameters()}
    norms = {name: p.detach().clone() for name, p in block.named_parameters() if "norm" in name}
    with packed(block):
        assert {p.dtype for p in block.parameters()} == {torch.float32}
        for name in norms:
            for _ in range(4):  # each of which bfloat16 would lose
                block.get_parameter(name).data += 1e-3
    assert {name: p.dtype for name, p in block.named_parameters()} == types
    for name, before in norms.items():
        assert (block.get_parameter(name) != before).float().mean() > 0.5
