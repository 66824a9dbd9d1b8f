"""Expert stores: an expert equals a real cut, in any order of switches, and the dense model comes back to the bit."""

from __future__ import annotations

import copy
import signal

import pytest
import torch
from cut_models import DIFFUSERS_HOSTS, dense, difference, plan_for, run
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

import genprune as gp
from genprune.cutting import plan_base
from genprune.operations import operation_tensors, replace_op
from genprune.operators import OPERATORS
from genprune.pipelines.fine_tuned import load_fine_tuned_
from genprune.pipelines.reordering import PackedParameter
from genprune.pipelines.stores import MaterialisedStore, ReorderedStore
from genprune.routers.experts import Expert

STORES = (ReorderedStore, MaterialisedStore)


def experts_for(model: nn.Module, count: int = 3) -> list[Expert]:
    return [Expert(plan_for(model, seed)) for seed in range(count)]


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


@pytest.fixture(scope="module")
def sd():
    return dense("sd")


@pytest.mark.parametrize(
    ("host", "store_of"),
    [
        *((host, ReorderedStore) for host in (*DIFFUSERS_HOSTS, "vit")),
        ("sd", MaterialisedStore),
        ("flux", MaterialisedStore),
    ],
)
def test_every_expert_equals_a_real_cut_in_any_order(host, store_of):
    model = dense(host)
    experts = experts_for(model)
    experts.append(
        Expert(
            gp.PruningPlan(
                plan_base(model),
                {
                    name: torch.zeros(s.size, dtype=torch.bool)
                    for name, s in gp.find_sites(model).items()
                    if s.kind == "heads"
                },
            )
        )
    )
    experts.append(Expert(gp.PruningPlan(plan_base(model), {})))
    before, expected = state_of(model), [gp.cut(copy.deepcopy(model), e.plan) for e in experts]
    outputs, whole = [run(small) for small in expected], run(model)
    assert difference(outputs[0], whole) > 1e-2
    store = store_of(model, experts)
    for expert in (0, 1, 0, 2, 3, 3, 1, 4, 2):
        small = store.activate(expert)
        assert type(small) is type(expected[expert])
        assert torch.equal(run(small), outputs[expert])
        assert store.active == expert
        state = expected[expert].state_dict()
        assert list(small.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())
        assert gp.applied_plan(small) == gp.applied_plan(expected[expert])
    assert store.dense() is model and store.active is None
    same_bits(model, before)
    assert torch.equal(run(model), whole)
    assert torch.equal(run(store.activate(1)), outputs[1])  # and once more after the dense model


def test_random_switches_leave_the_dense_model_as_it_was(sd):
    model = copy.deepcopy(sd)
    before, parameters = state_of(model), dict(model.named_parameters())
    store = ReorderedStore(model, experts_for(model, 4))
    source = torch.Generator().manual_seed(0)
    for choice in torch.randint(0, 5, (25,), generator=source).tolist():
        store.dense() if choice == 4 else store.activate(choice)
    same_bits(store.dense(), before)
    assert all(parameters[name] is value for name, value in model.named_parameters())


@pytest.mark.parametrize("shape", [(7,), (7, 5), (7, 5, 3, 3)])
def test_packing_is_an_index_and_back(shape):
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(shape))
    before, packed = layer.weight.detach().clone(), PackedParameter(layer, "weight")
    packed.take()
    assert layer.weight.is_meta
    source = torch.Generator().manual_seed(0)
    for step in range(30):
        rows = torch.rand(7, generator=source) < 0.5 if step % 3 else None
        columns = torch.rand(5, generator=source) < 0.5 if step % 2 and len(shape) > 1 else None
        kept = packed.arrange(rows, columns)
        expected = before if rows is None else before[rows]
        expected = expected if columns is None else expected[:, columns]
        assert torch.equal(kept, expected)
        assert kept.is_contiguous()
    packed.give_back()
    assert torch.equal(layer.weight, before)


def test_weights_exist_once(sd):
    """Every tensor of the active expert lies in the dense model's memory."""
    model = copy.deepcopy(sd)
    places = {p.untyped_storage().data_ptr() for p in model.parameters()}
    store = ReorderedStore(model, experts_for(model, 8))
    for expert in range(8):
        small = store.activate(expert)
        for name, value in small.named_parameters():
            assert value.untyped_storage().data_ptr() in places or value.numel() == 0, name
    held = sum(not p.is_meta for k in store._skeletons for p in k.model.parameters())
    assert held == len(list(small.parameters()))


def test_only_the_model_asked_for_last_runs(sd):
    store = ReorderedStore(copy.deepcopy(sd), experts_for(sd))
    first = store.activate(0)
    second = store.activate(1)
    for idle in (first, store.model):
        with pytest.raises(gp.GenpruneError, match="not the active one.*expected the model that.*store.activate"):
            run(idle)
        with pytest.raises(gp.GenpruneError, match="not the active one"):
            idle.state_dict()
    assert all(p.is_meta for p in first.parameters())
    run(second)
    store.dense()
    with pytest.raises(gp.GenpruneError, match="not the active one"):
        run(second)


def test_switches_are_counted_and_an_unknown_expert_is_refused(sd):
    for store_of in STORES:
        store = store_of(copy.deepcopy(sd), experts_for(sd))
        for expert in (0, 0, 1, 1, 0):
            store.activate(expert)
        assert store.switches == 3
        for wrong in (3, -1, True, "0"):
            with pytest.raises(gp.GenpruneError, match="is not there; expected a number from 0 to 2"):
                store.activate(wrong)
        assert store.active == 0


def test_plans_are_checked_before_anything_changes(sd):
    model, other = copy.deepcopy(sd), dense("sdxl")
    before = state_of(model)
    for store_of in STORES:
        with pytest.raises(gp.PlanMismatch, match="another configuration|no site"):
            store_of(model, [Expert(plan_for(sd)), Expert(plan_for(other))])
        with pytest.raises(gp.GenpruneError, match="0 experts; expected"):
            store_of(model, [])
    handle = gp.attach_gates(model, plan_for(model))
    with pytest.raises(gp.PlanMismatch, match="gates are attached"):
        ReorderedStore(model, experts_for(sd))
    handle.remove()
    same_bits(model, before)


def plan_with_operator(model: nn.Module) -> gp.PruningPlan:
    path = next(name for name, module in model.named_modules() if name.endswith("ff.net.2"))
    operator = OPERATORS["low_rank"].from_weights(model.get_submodule(path), {"rank": 2})
    op = replace_op(path, "low_rank", {"rank": 2})
    return gp.PruningPlan(plan_base(model), {}, ops=(op,), tensors=operation_tensors(path, operator))


def test_operators_need_the_other_store(sd):
    plan = plan_with_operator(sd)
    expected = run(gp.cut(copy.deepcopy(sd), plan))
    with pytest.raises(gp.PlanMismatch, match="expert 1 replaces 1 operators.*Use MaterialisedStore"):
        ReorderedStore(copy.deepcopy(sd), [Expert(plan_for(sd)), Expert(plan)])
    store = MaterialisedStore(copy.deepcopy(sd), [Expert(plan_for(sd)), Expert(plan)])
    assert torch.equal(run(store.activate(1)), expected)


def test_resident_copies(sd):
    store = MaterialisedStore(copy.deepcopy(sd), experts_for(sd), resident=2)
    first, second = store.activate(0), store.activate(1)
    assert store.activate(0) is first and store.activate(1) is second
    store.activate(2)
    assert store.activate(1) is second and store.activate(0) is not first
    with pytest.raises(gp.GenpruneError, match="resident=0; expected"):
        MaterialisedStore(copy.deepcopy(sd), experts_for(sd), resident=0)


@pytest.mark.parametrize("store_of", STORES)
def test_the_model_moves_between_switches(sd, store_of):
    model = copy.deepcopy(sd)
    store = store_of(model, experts_for(sd))
    store.activate(0)
    store.dense().to(torch.float64)
    small = store.activate(1)
    assert {p.dtype for p in small.parameters()} == {torch.float64}
    expected = gp.cut(copy.deepcopy(sd).to(torch.float64), plan_for(sd, 1))
    assert {n: v.dtype for n, v in small.state_dict().items()} == {
        n: v.dtype for n, v in expected.state_dict().items()
    }
    same_bits(small, state_of(expected))


@pytest.mark.parametrize("host", ["sd", "sd3"])  # the second has buffers
def test_a_copy_is_its_own(host):
    model = dense(host)
    before, cuts = state_of(model), [state_of(gp.cut(copy.deepcopy(model), plan_for(model, seed))) for seed in (0, 1)]
    for store_of in STORES:
        store = store_of(model, experts_for(model))
        active = store.activate(0)
        own = store.copy(1)
        assert store.active == 0
        same_bits(own, cuts[1])
        with torch.no_grad():
            for tensor in (*own.parameters(), *own.buffers()):
                tensor.zero_()
        same_bits(active, cuts[0])
        same_bits(store.dense(), before)


def test_an_interrupt_waits_and_a_failure_leaves_whole_layers(sd, monkeypatch):
    model = copy.deepcopy(sd)
    before, store = state_of(model), ReorderedStore(model, experts_for(sd))
    store.activate(0)
    calls = []
    arrange = PackedParameter.arrange

    def interrupted(self, rows, columns):
        calls.append(self)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return arrange(self, rows, columns)

    monkeypatch.setattr(PackedParameter, "arrange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.activate(1)
    assert store.active == 1 and len(calls) > 5
    monkeypatch.undo()
    assert torch.equal(run(store.activate(1)), run(gp.cut(copy.deepcopy(sd), plan_for(sd, 1))))

    write = PackedParameter._write

    def failing(self, flat, dense, rows, columns):
        write(self, flat, dense, rows, columns)
        if calls.append(self) or len(calls) == 9:
            raise MemoryError("no room")

    calls.clear()
    monkeypatch.setattr(PackedParameter, "_write", failing)
    with pytest.raises(MemoryError):
        store.activate(2)
    monkeypatch.undo()
    assert store.active is None
    for skeleton in store._skeletons:
        with pytest.raises(gp.GenpruneError, match="not the active one"):
            run(skeleton.model)
    assert torch.equal(run(store.activate(2)), run(gp.cut(copy.deepcopy(sd), plan_for(sd, 2))))
    same_bits(store.dense(), before)


# ---- fine-tuned experts ---------------------------------------------------------------------------------------------


def fine_tuned(model: nn.Module, folder, seed: int, kind: str) -> Expert:
    """An expert with some random tensors of its own, or with a random LoRA that diffusers wrote."""
    plan = plan_for(model, seed)
    small = gp.cut(copy.deepcopy(model), plan)
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    if kind == "weights":
        names = [name for name, p in small.named_parameters() if p.numel()][::2]
        path = folder / "weights.safetensors"
        save_file({name: torch.randn_like(small.get_parameter(name)) * 0.1 for name in names}, path)
        return Expert(plan, weights=path)
    from genprune.recovery.lora_training import ADAPTER, attach_lora, save_lora

    attach_lora(small, rank=2, seed=seed)
    for name, parameter in small.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    assert get_peft_model_state_dict(small, adapter_name=ADAPTER)
    save_lora(small, folder)
    return Expert(plan, lora=folder / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("kind", ["weights", "lora"])
@pytest.mark.parametrize("host", ["sd", "sd3"])
def test_fine_tuned_experts(host, kind, tmp_path):
    model = dense(host)
    experts = [Expert(plan_for(model, 0)), *(fine_tuned(model, tmp_path / str(k), k, kind) for k in (1, 2))]
    before = state_of(model)
    for store_of in STORES:
        store = store_of(model, experts)
        for expert in (1, 0, 2, 1):
            plain = gp.cut(copy.deepcopy(store.dense()), experts[expert].plan)
            expected = copy.deepcopy(plain)
            load_fine_tuned_(expected, experts[expert])
            found = run(store.activate(expert))
            assert (
                difference(found, run(expected)) < 1e-5
            )  # a LoRA beside its layer rounds otherwise than a merged one
            assert (difference(found, run(plain)) > 1e-2) == (expert != 0)
        assert difference(run(store.copy(1)), found) < 1e-5
        same_bits(store.dense(), before)


def test_a_merged_lora_is_what_the_host_runs(tmp_path):
    model = dense("sd")
    expert = fine_tuned(model, tmp_path / "e", 1, "lora")
    hosted = gp.cut(copy.deepcopy(model), expert.plan)
    hosted.load_lora_adapter(expert.lora.parent, prefix=None, weight_name=expert.lora.name)
    assert difference(run(ReorderedStore(model, [expert]).activate(0)), run(hosted)) < 1e-5


def test_files_of_other_experts_are_refused(tmp_path):
    model = dense("sd")
    for kind, words in (("weights", "fine-tuned after this cut"), ("lora", "trained on this expert after the cut")):
        other = fine_tuned(model, tmp_path / kind, 1, kind)
        wrong = Expert(plan_for(model, 2), **{kind: getattr(other, kind)})
        (tmp_path / f"{kind}.safetensors").write_bytes(b"{}")
        damaged = Expert(plan_for(model, 1), **{kind: tmp_path / f"{kind}.safetensors"})
        for store_of in STORES:
            with pytest.raises(gp.PlanMismatch, match=words):
                store_of(model, [wrong])
            with pytest.raises(gp.PlanMismatch, match="cannot be read"):
                store_of(model, [damaged])
