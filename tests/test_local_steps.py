"""torch's own optimizers step over local parts: the operations of plain tensors, in the kernels that were asked for."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_dist.compat.operators import LOCAL_PART
from lightning_dist.divided import Divided, as_divided
from lightning_dist.dtensors import as_dtensor, local_part
from lightning_dist.optimizers import step_over_local_parts
from lightning_dist.optimizers.local_step import ELEMENTWISE
from lightning_dist.patches import Patches
from tests.support.models import BLOCK_PLAN, CLASSES, WIDTH, Block, wide_samples
from tests.support.parity import QUIET, trainer
from tests.support.ranks import run_on_ranks

FUSED = (optim.Adagrad, optim.Adam, optim.AdamW, optim.SGD)
OPTIONS: dict[type[Optimizer], dict[str, Any]] = {
    optim.SGD: {"momentum": 0.9, "dampening": 0.1},
    optim.RMSprop: {"momentum": 0.9, "centered": True},
    optim.AdamW: {"amsgrad": True},
}
KERNELS: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (kind, OPTIONS.get(kind, {}) | kernels)
    for kind in ELEMENTWISE
    for kernels in ({}, {"foreach": True}, {"foreach": False}, *([{"fused": True}] if kind in FUSED else []))
]


@pytest.fixture
def like() -> Iterator[list[Any]]:
    """What parameters are divided as, over a world that is not there: two meshes, both together, and none."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
        layouts = [(mesh["tp"], [Shard(0)]), (mesh["dp_shard"], [Shard(0)]), (mesh, [Shard(0), Shard(1)])]
        layouts.append((mesh["tp"], [Replicate()]))
        yield [DTensor.from_local(torch.zeros(3, 2), *layout, run_check=False) for layout in layouts] + [None]
    finally:
        dist.destroy_process_group()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that divided tensors were asked for in Python."""
    names: list[str] = []
    original = Divided.__torch_function__

    def noting(_: type, func: Any, *args: Any) -> Any:
        names.append(func.__name__)
        return original(func, *args)

    monkeypatch.setattr(Divided, "__torch_function__", classmethod(noting))
    return names


def _parameters(like: list[Any]) -> tuple[list[Any], list[nn.Parameter]]:
    """Divided ones, and plain ones of their local parts."""
    local = [torch.randn(3, 2, generator=torch.Generator().manual_seed(n)) for n in range(2 * len(like))]
    likes = like * 2
    divided = [
        nn.Parameter(part.clone()) if one is None else as_divided(nn.Parameter(as_dtensor(part.clone(), one)))
        for part, one in zip(local, likes, strict=True)
    ]
    return divided, [nn.Parameter(part.clone()) for part in local]


def _set_gradients(divided: list[Any], plain: list[nn.Parameter], seed: int) -> None:
    """Of all but one, which was not used."""
    for number, (p, own) in enumerate(zip(divided, plain, strict=True)):
        own.grad = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed + number))
        p.grad = as_divided(as_dtensor(own.grad.clone(), p)) if isinstance(p, DTensor) else own.grad.clone()
    plain[seed % len(plain)].grad = divided[seed % len(plain)].grad = None


class Operations(TorchDispatchMode):
    """What runs, and whether on divided tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.divided: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        if any(issubclass(kind, DTensor) for kind in types):
            self.divided.append(str(func))
        return func(*args, **(kwargs or {}))


def _in_groups(kind: type[Optimizer], parameters: list[Any], options: dict[str, Any]) -> Optimizer:
    groups = [{"params": parameters[:4]}, {"params": parameters[4:], "lr": 3e-2}]
    return kind(groups, **{"lr": 1e-2, **options})  # type: ignore[arg-type]


def _assert_same(optimizer: Optimizer, other: Optimizer) -> None:
    """Bit for bit; states are divided as their parameters, under the same names."""
    pairs = zip(optimizer.param_groups, other.param_groups, strict=True)
    for p, own in [pair for one, two in pairs for pair in zip(one["params"], two["params"], strict=True)]:
        torch.testing.assert_close(local_part(p), own.detach(), rtol=0, atol=0)
        assert (p in optimizer.state) == (own in other.state)
        states, expected = optimizer.state.get(p, {}), other.state.get(own, {})
        assert list(states) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(local_part(states[name]), value, rtol=0, atol=0)
            assert type(states[name]) is (Divided if isinstance(p, DTensor) and value.ndim else Tensor)
            if isinstance(states[name], DTensor):
                assert (states[name].shape, states[name].placements) == (p.shape, p.placements)
                assert states[name].device_mesh == p.device_mesh


@pytest.mark.parametrize(("kind", "options"), KERNELS)
def test_a_step_is_that_of_the_local_parts_on_all_meshes_at_once(
    kind: Any, options: Any, like: list[Any], asked: list[str]
) -> None:
    divided, plain = _parameters(like)
    optimizer, other = _in_groups(kind, divided, options), _in_groups(kind, plain, options)
    step_over_local_parts(optimizer, Patches())
    # torch's own fused SGD can't begin with a parameter after others (2.14)
    last = 300 if kind is optim.SGD and "fused" in options else 303
    for seed in (0, 100, 200, last):
        _set_gradients(divided, plain, seed)
        with Operations() as own:
            other.step()
        asked.clear()
        with Operations() as ours:
            optimizer.step()
        assert not asked
        assert not ours.divided
        if seed == last:  # the first makes the parts
            assert ours.names == own.names
        _assert_same(optimizer, other)
    assert all(p.grad is None or isinstance(p.grad, DTensor) == isinstance(p, DTensor) for p in divided)


def _change(number: int, optimizer: Any, parameters: list[Any]) -> None:
    """One thing between two steps that are else alike."""
    group = optimizer.param_groups[1]
    if number == 3:
        group["lr"] = 0.5
        group.update({"momentum": 0.5} if "momentum" in group else {})
    elif number == 4:
        group["weight_decay"] = 0.1
    elif number == 5:
        parameters[6].requires_grad_(False).grad = None
    elif number == 6:
        optimizer.load_state_dict(optimizer.state_dict())
    elif number == 7:
        own = optimizer.state[parameters[3]]
        own.update({name: value * 2 for name, value in own.items() if value is not None and value.ndim})
    elif number == 8 and not group.get("fused"):  # torch's own SGD can't begin with some anew (2.14)
        optimizer.state.pop(parameters[1], None)
    elif number == 9:
        parameters[6].requires_grad_(True)
        parameters.append(parameters[6])
        optimizer.param_groups[1]["params"].pop(2)
        optimizer.add_param_group({"params": [parameters[6]], "lr": 0.3})


@pytest.mark.parametrize(("kind", "options"), KERNELS)
def test_what_changes_between_steps_that_are_alike_is_in_the_next_one(kind: Any, options: Any, like: list[Any]) -> None:
    """Rates, other settings, a frozen parameter, loaded, replaced and dropped states, and groups."""
    divided, plain = _parameters(like)
    optimizer, other = _in_groups(kind, divided, options), _in_groups(kind, plain, options)
    step_over_local_parts(optimizer, Patches())
    # torch's own fused SGD can't begin with a parameter after others (2.14)
    for number in range(9 if kind is optim.SGD and "fused" in options else 12):
        _change(number, optimizer, divided)
        _change(number, other, plain)
        _set_gradients(divided, plain, 100 + 10 * number)  # of all but the first
        if 5 <= number < 9:
            divided[6].grad = plain[6].grad = None
        optimizer.step()
        other.step()
        _assert_same(optimizer, other)


def test_parameters_are_asked_once_for_what_a_step_is_made_of(like: list[Any], monkeypatch: Any) -> None:
    calls: list[int] = []
    collect = optim.AdamW._init_group
    monkeypatch.setattr(
        optim.AdamW, "_init_group", lambda self, *lists: calls.append(len(calls)) or collect(self, *lists)
    )
    divided, plain = _parameters(like)
    optimizer = _in_groups(optim.AdamW, divided, {})
    step_over_local_parts(optimizer, Patches())
    schedule = OneCycleLR(optimizer, 0.1, total_steps=9)  # changes rates and averages
    counts = []
    for number in range(4):
        _set_gradients(divided, plain, 10 * number)
        gradients = [weakref.ref(LOCAL_PART(p.grad)) for p in divided if isinstance(p.grad, DTensor)]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        counts.append(len(calls))
        assert not any(gradient() is not None for gradient in gradients)
    assert counts == [2, 4, 4, 4]  # the first makes the states


def test_a_step_that_failed_leaves_no_lists(like: list[Any]) -> None:
    divided, plain = _parameters(like)
    optimizer = _in_groups(optim.AdamW, divided, {})
    step_over_local_parts(optimizer, Patches())
    _set_gradients(divided, plain, 0)
    optimizer.step()
    last = divided[-2]  # in the second group
    average = optimizer.state[last].pop("exp_avg")
    for _ in range(2):
        with pytest.raises(KeyError, match="exp_avg"):
            optimizer.step()
    optimizer.state[last]["exp_avg"] = average
    before = local_part(last).clone()
    optimizer.step()
    assert not torch.equal(local_part(last), before)


def test_a_step_counts_as_a_write(like: list[Any]) -> None:
    """As in one process, where a graph of before the step can't be gone back through after it."""
    divided, plain = _parameters(like)
    optimizer = optim.SGD(divided, 0.1)
    step_over_local_parts(optimizer, Patches())
    _set_gradients(divided, plain, 0)
    before = [p._version for p in divided]
    optimizer.step()
    assert [p._version > version for p, version in zip(divided, before, strict=True)] == [False] + [True] * 9


def test_zero_grad_asks_no_divided_tensor_in_python(like: list[Any], asked: list[str]) -> None:
    divided, plain = _parameters(like)
    optimizer = optim.AdamW(divided)
    step_over_local_parts(optimizer, Patches())
    _set_gradients(divided, plain, 0)
    asked.clear()
    optimizer.zero_grad()
    assert not asked
    assert all(p.grad is None for p in divided)
    assert len(asked) == 8  # it counts


def test_states_that_were_loaded_or_replaced_are_those_of_the_next_step(like: list[Any]) -> None:
    divided, plain = _parameters(like)
    optimizer, other = _in_groups(optim.AdamW, divided, {}), _in_groups(optim.AdamW, plain, {})
    step_over_local_parts(optimizer, Patches())
    for seed in (1, 101, 201, 301):
        _set_gradients(divided, plain, seed)
        optimizer.step()
        other.step()
        if seed == 1:
            optimizer.load_state_dict(optimizer.state_dict())
        elif seed == 101:
            for state in (*optimizer.state.values(), *other.state.values()):
                state["exp_avg"] = state["exp_avg"] * 2
        elif seed == 201:
            for one, parameters in ((optimizer, divided), (other, plain)):
                one.param_groups[0]["params"] = parameters[:2]
                one.add_param_group({"params": parameters[2:4], "lr": 0.5})
    _assert_same(optimizer, other)


def test_hooks_closures_and_schedulers_see_the_whole_and_are_as_before(like: list[Any], asked: list[str]) -> None:
    (first, *_), _ = _parameters(like)
    seen: list[Any] = []

    def look(*_: Any) -> None:
        states = optimizer.state.get(first, {})
        seen.append([optimizer.param_groups[0]["params"][0] is first, *(type(value) for value in states.values())])

    optimizer = optim.Adam([first], lr=0.1)
    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(look)
    LambdaLR(optimizer, lambda step: 0.5)
    before, hooks = dict(vars(optimizer)), len(optimizer._optimizer_step_post_hooks)
    with Patches() as patches:
        step_over_local_parts(optimizer, patches)
        later = LambdaLR(optimizer, lambda step: 0.5)

        def closure() -> float:
            look()
            first.grad = as_divided(as_dtensor(torch.ones(3, 2), first))
            return 2.5

        assert optimizer.step(closure) == 2.5
        assert not {name for name in asked if "add" in name or "mul" in name}  # it was over local parts
        later.step()  # warns where it was not told of the step, which is an error in these tests
    assert seen == [[True], [True], [True, Tensor, Divided, Divided]]
    assert {name: value for name, value in vars(optimizer).items() if name != "_opt_called"} == before
    assert len(optimizer._optimizer_step_post_hooks) == hooks


def test_an_exception_in_a_step_leaves_the_optimizer_as_it_was(like: list[Any]) -> None:
    divided, plain = _parameters(like)
    optimizer = optim.Adam(divided)
    step_over_local_parts(optimizer, Patches())
    _set_gradients(divided, plain, 0)
    optimizer.step()
    optimizer.state[divided[-1]]["exp_avg"] = torch.zeros(7)  # of which no step can be made
    before = optimizer.param_groups, optimizer.state
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()
    assert all(one is other for one, other in zip((optimizer.param_groups, optimizer.state), before, strict=True))
    assert all(p in optimizer.state for p in divided[1:])

    def failing() -> None:
        raise KeyError("closure")

    with pytest.raises(KeyError):
        optimizer.step(failing)
    assert optimizer.param_groups is before[0]


def test_a_scaler_s_verdict_reaches_a_fused_step(like: list[Any]) -> None:
    divided, plain = _parameters(like)
    optimizer: Any = optim.AdamW(divided, fused=True)
    step_over_local_parts(optimizer, Patches())
    _set_gradients(divided, plain, 0)
    before = [local_part(p).clone() for p in divided]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(local_part(p), value) for p, value in zip(divided, before, strict=True))


class Watching(optim.AdamW):
    """Its own step, around torch's."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"]]
        return super().step(closure)


class Centred(optim.AdamW):
    """Looks at what torch's step collects."""

    def _init_group(self, group: Any, parameters: list[Any], *lists: Any) -> Any:
        result = super()._init_group(group, parameters, *lists)
        self.shapes = [tuple(p.shape) for p in parameters]
        return result


@pytest.mark.parametrize("kernels", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("kind", [Watching, Centred])
def test_code_of_the_user_s_sees_wholes_with_the_kernels_that_were_asked_for(
    kind: Any, kernels: Any, like: list[Any]
) -> None:
    divided, plain = _parameters(like)
    optimizer, other = kind(divided, **kernels), kind(plain, **kernels)
    step_over_local_parts(optimizer, Patches())
    for _ in range(2):
        _set_gradients(divided, plain, 9)  # the last has none, which Centred does not see
        optimizer.step()
        other.step()
    _assert_same(optimizer, other)
    assert optimizer.shapes[:4] == [tuple(p.shape) for p in divided[:4]]
    assert kernels.items() <= optimizer.param_groups[0].items()


@pytest.mark.parametrize("kernels", [{}, {"foreach": True}, {"fused": True}])
def test_what_is_laid_out_otherwise_is_stepped_over_as_divided_tensors(kernels: Any, like: list[Any]) -> None:
    """States that the user made whole."""
    divided, plain = _parameters(like[:1])
    optimizer, other = optim.SGD(divided, 0.1, momentum=0.9, **kernels), optim.SGD(plain, 0.1, momentum=0.9, **kernels)
    step_over_local_parts(optimizer, Patches())
    for p, own in zip(divided, plain, strict=True):
        optimizer.state[p]["momentum_buffer"] = torch.ones(p.shape)
        other.state[own]["momentum_buffer"] = torch.ones(3, 2)
        own.grad = torch.ones(3, 2)
        p.grad = as_divided(as_dtensor(torch.ones(3, 2), p))
    optimizer.step()
    other.step()
    for p, own in zip(divided, plain, strict=True):
        torch.testing.assert_close(local_part(p), own.detach(), rtol=0, atol=0)


def test_a_gradient_that_is_divided_otherwise_is_not_taken_for_a_local_part(
    like: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, *_), _ = _parameters(like)
    optimizer = optim.SGD([first], 0.1)
    step_over_local_parts(optimizer, Patches())
    first.grad = DTensor.from_local(torch.ones(6, 2), first.device_mesh, [Replicate()], run_check=False)
    local: list[bool] = []
    stepping = sys.modules["torch.optim.sgd"]
    monkeypatch.setattr(stepping, "sgd", lambda params, *args, **kwargs: local.append(type(params[0]) is Tensor))
    optimizer.step()
    first.grad = as_divided(as_dtensor(torch.ones(3, 2), first))
    optimizer.step()
    assert local == [False, True]


def test_a_differentiable_step_is_refused_as_in_one_process(like: list[Any]) -> None:
    divided, plain = _parameters(like[:1])
    for parameters in (divided, plain):
        optimizer = optim.SGD(parameters, 0.1, differentiable=True)
        step_over_local_parts(optimizer, Patches())
        _set_gradients(divided, plain, 0)
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            optimizer.step()


COMMON = (optim.Adam, optim.AdamW, optim.SGD, optim.RMSprop, optim.Adagrad, optim.Adamax, optim.NAdam, optim.RAdam)
ASKED = [(kind, own) for kind, own in KERNELS if kind in COMMON and (own.get("foreach") or own.get("fused"))]
ASKED += [(optim.SGD, {"momentum": 0.9, "nesterov": True})]


class ByMany(L.LightningModule):
    """A network for each optimizer with each kind of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.nets = nn.ModuleList(nn.Sequential(Block(), nn.Linear(WIDTH, CLASSES)) for _ in ASKED).double()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for net, optimizer in zip(self.nets, self.optimizers(), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(net(x), y))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        pairs = zip(self.nets, ASKED, strict=True)
        self.made = [kind(net.parameters(), **{"lr": 1e-2, **options}) for net, (kind, options) in pairs]
        self.as_made = [_settings(optimizer) for optimizer in self.made]
        return self.made


def _settings(optimizer: Optimizer) -> Any:
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    return groups, set(vars(optimizer)), len(optimizer._optimizer_step_post_hooks)


def _leg(layout: str | None, epochs: int, start: Path | None, end: Path) -> bool:
    """Goes on until the end of an epoch; whether the optimizers are given back as they were made."""
    L.seed_everything(1, verbose=False)
    module = ByMany()
    strategy = {"tensor_plan": BLOCK_PLAN if layout == "tp=2" else None, "checkpoint_format": "single"}
    arguments = {"max_epochs": epochs, "strategy": strategy}
    fitting = L.Trainer(**QUIET, max_epochs=epochs) if layout is None else trainer(layout, **arguments)
    ranks = 2 if layout == "dp_shard=2" else 1
    fitting.fit(module, DataLoader(wide_samples(), batch_size=16 // ranks), ckpt_path=start)
    fitting.save_checkpoint(end)
    return [_settings(optimizer) for optimizer in module.made] == module.as_made


def test_each_goes_on_from_the_checkpoints_of_each_layout_as_in_one_process(tmp_path: Path) -> None:
    """With every kind of kernels; what an optimizer was made with is in the checkpoint as the user gave it."""
    assert _leg(None, 1, None, tmp_path / "1")
    assert run_on_ranks(2, _leg, "tp=2", 2, tmp_path / "1", tmp_path / "2") == [True, True]
    assert run_on_ranks(2, _leg, "dp_shard=2", 3, tmp_path / "2", tmp_path / "3") == [True, True]
    assert _leg(None, 4, tmp_path / "3", tmp_path / "4")
    for epochs in (2, 3, 4):  # interrupted too, as torch loads NAdam's products in another dtype than it makes them in
        assert _leg(None, epochs, tmp_path / ("1" if epochs == 2 else f"one{epochs - 1}"), tmp_path / f"one{epochs}")
    found, expected = (torch.load(tmp_path / name) for name in ("4", "one4"))
    for name in ("state_dict", "optimizer_states"):
        _assert_rounded(found[name], expected[name])


def _assert_rounded(found: Any, expected: Any) -> None:
    """Of the same structure, and each tensor within rounding of float64 over some steps."""
    if isinstance(expected, Tensor):
        assert (found - expected).norm() <= 1e-10 * expected.norm()
    elif isinstance(expected, (dict, list)):
        assert len(found) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            _assert_rounded(found[key], expected[key])
    else:
        assert found == expected
