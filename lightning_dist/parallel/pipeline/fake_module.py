"""A module to trace: its own Python over parameters without memory."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_dist.compat.lightning import set_trainer, trainer_of
from lightning_dist.compat.torch import COMPILED_CALL, children_of, own_buffers, own_parameters, registries
from lightning_dist.parallel.pipeline.guards import AddGuard, GuardedInt, GuardedTrainer
from lightning_dist.parallel.pipeline.manual_optimization import IDLE, idle, show_gradients
from lightning_dist.parallel.rehearsal import is_users_object
from lightning_dist.placeholder import is_placeholder, placeholder, take_marks
from lightning_dist.precision import cast_by_autocast


class FakeModule:
    """A copy of a module whose parameters are placeholders.

    Modules are copied one by one and share what is not a module, parameter or buffer, as torch's ``replicate`` does;
    plain lists, sets and dictionaries are copied once over, so that a step which appends to one leaves the user's
    alone. Buffers are copied, since a step may change them. Metrics keep no state and answer with a number that is a
    placeholder.

    Args:
        module: not yet divided, sharded or compiled; on any device, or on meta.
        device: on which the step will run.
        dtype: in which parameters are computed that autocast would cast, where it is not their own.
    """

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.on_metric: Callable[[], None] = lambda: None
        """Called when the step uses a metric."""
        self.logged: dict[str, Any] = {}
        """What the step logged the last time, by name."""
        self.backwards = 0
        """How often the step called ``manual_backward`` the last time."""
        self._configured: list[Any] = []
        self._trainer: Any = None
        self._device, self._dtype = device, dtype
        self._cast = set() if dtype is None else {id(p) for p in cast_by_autocast(module)}
        self._parameters: dict[int, nn.Parameter] = {}
        self._modules: dict[int, nn.Module] = {}
        names = {id(p): name for name, p in reversed(list(module.named_parameters(remove_duplicate=False)))}
        self.module = self._copied(module)
        self.names = {id(standin): names[original] for original, standin in self._parameters.items()}
        """The parameter's first name, by the id of its placeholder."""
        self._rebind()

    def follow(self, module: pl.LightningModule, add_guard: AddGuard = lambda *_: None, in_step: bool = False) -> None:
        """Takes over what the module's steps may ask for: its Trainer, which parts train, and what hooks have set.

        Args:
            add_guard: is told of what the step asks of integers and the Trainer; see [Note: a path that changes].
            in_step: whether a step is what comes, and not a hook.
        """
        self.logged, self.backwards = {}, 0
        for parameter in self.module.parameters():
            parameter.grad = None
        self._take_new(module)
        trainer = trainer_of(module)
        self._trainer = None if trainer is None else GuardedTrainer(trainer, add_guard, in_step)
        set_trainer(self.module, self._trainer)
        training = {name: child.training for name, child in module.named_modules()}
        for name, child in self.module.named_modules():
            child.training = training.get(name, child.training)
        for original in module.modules():
            copied = self._modules.get(id(original))
            for key, value in vars(original).items() if copied is not None else ():
                if not _is_users(key, value):
                    continue
                is_guarded = type(value) is int and original is module
                answer = GuardedInt(partial(vars(module).__getitem__, key), add_guard) if is_guarded else value
                vars(copied)[key] = answer if is_guarded else self._renamed(_loose(value))

    def forget_trainer(self) -> None:
        self._trainer = None
        set_trainer(self.module, None)

    def _take_new(self, module: nn.Module) -> None:
        """Parts that hooks have given the module since, or taken from it."""
        there = [(o, self._modules[id(o)]) for o in module.modules() if id(o) in self._modules]
        for original, copied in there:
            for name in children_of(copied).keys() - children_of(original).keys():
                del children_of(copied)[name]
        new = [part for pair in there for part in self._new_parts(*pair)]
        if not new:
            return
        # those that were copied first may be gone, and others have their ids
        standins = dict(self.module.named_parameters(remove_duplicate=False))
        named = module.named_parameters(remove_duplicate=False)
        self._parameters = {id(p): standins[name] for name, p in named if name in standins}
        for registry, name, copy_of_it in new:
            registry[name] = copy_of_it()
        self._rebind()
        for name, standin in self.module.named_parameters():
            self.names.setdefault(id(standin), name)

    def _new_parts(self, original: nn.Module, copied: nn.Module) -> Iterator[tuple[Any, str, Callable[[], Any]]]:
        for name, child in children_of(original).items():
            if child is not None and children_of(copied).get(name) is not self._modules.get(id(child), self):
                yield children_of(copied), name, partial(self._copied, child)
        for name in own_parameters(original).keys() - own_parameters(copied).keys():
            yield own_parameters(copied), name, partial(self._standin, own_parameters(original)[name])
        for name in own_buffers(original).keys() - own_buffers(copied).keys():
            yield own_buffers(copied), name, partial(self._buffer, own_buffers(original)[name])

    def copy_of(self, module: nn.Module) -> nn.Module:
        """The copy's module for one of the user's; any other as it is."""
        return self._modules.get(id(module), module)

    def is_trained(self, name: str) -> bool:
        """Whether an optimizer will have a parameter; also where that can't be found out."""
        parameter = self.module.get_parameter(name)
        if not parameter.requires_grad:
            return False
        if not self._configured:
            try:
                self._configured = optimizers_in(self.module.configure_optimizers())  # type: ignore[operator]
            except Exception:  # it needs what is not there before the fit
                return True
        return any(p is parameter for o in self._configured for group in o.param_groups for p in group["params"])

    def _optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Those of the Trainer; before it has any, those that the copy configures."""
        there: Any = [] if self._trainer is None else self._trainer.strategy.optimizers
        if not there:
            there = self._configured = self._configured or optimizers_in(self.module.configure_optimizers())  # type: ignore[operator]
        return idle(there[0] if len(there) == 1 else there)

    def _schedulers(self) -> Any:
        configs = [] if self._trainer is None else self._trainer.strategy.lr_scheduler_configs
        there = [config.scheduler for config in configs]
        return idle(there[0] if len(there) == 1 else there or None)

    def _backward(self, *_: Any, **__: Any) -> None:
        self.backwards += 1
        show_gradients(self.module)

    def _log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.logged[name] = value

    def _copied(self, module: nn.Module) -> nn.Module:
        if id(module) in self._modules:
            return self._modules[id(module)]
        new: nn.Module = object.__new__(type(module))
        self._modules[id(module)] = new
        state = {key: _loose(value) for key, value in vars(module).items() if key != COMPILED_CALL}
        state |= registries(
            {name: self._standin(p) for name, p in own_parameters(module).items()},
            {name: self._buffer(b) for name, b in own_buffers(module).items()},
            {name: None if child is None else self._copied(child) for name, child in children_of(module).items()},
        )
        vars(new).update(state)
        if isinstance(module, (Metric, MetricCollection)):
            _silence(new, module, self)
        if isinstance(module, pl.LightningModule):
            vars(new).update(IDLE, log=self._log, print=lambda *_, **__: None, manual_backward=self._backward)
            vars(new).update(optimizers=self._optimizers, lr_schedulers=self._schedulers)
        return new

    def _standin(self, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        if id(parameter) not in self._parameters:
            fake = placeholder(parameter.detach(), self._device, self._dtype if id(parameter) in self._cast else None)
            self._parameters[id(parameter)] = standin = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            take_marks(standin, parameter)
        return self._parameters[id(parameter)]

    def _buffer(self, buffer: Tensor | None) -> Tensor | None:
        if buffer is None:
            return None
        if buffer.is_meta or is_placeholder(buffer):
            raise ValueError("a buffer has no values yet; buffers are materialised before a module is traced")
        return buffer.detach().clone().to(self._device)

    def _rebind(self) -> None:
        """Methods kept as attributes, and modules outside of the tree, belong to the copies."""
        for original in list(self._modules.values()):
            for key, value in list(vars(original).items()):
                if isinstance(value, MethodType) and id(value.__self__) in self._modules:
                    vars(original)[key] = MethodType(value.__func__, self._modules[id(value.__self__)])
                else:
                    vars(original)[key] = self._renamed(value)

    def _renamed(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self.copy_of(value)
        if type(value) in (list, tuple):
            return type(value)(map(self._renamed, value))
        if type(value) is dict:
            return {key: self._renamed(item) for key, item in value.items()}
        if is_users_object(value):
            shell = _loose(value)  # its modules are the copies
            inside = [(key, item) for key, item in vars(shell).items() if isinstance(item, nn.Module)]
            vars(shell).update({key: self.copy_of(item) for key, item in inside})
            return shell
        return value


def optimizers_in(configured: Any) -> list[Any]:
    """The optimizers in what ``configure_optimizers`` returns."""
    if isinstance(configured, torch.optim.Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return [configured["optimizer"]]
    if isinstance(configured, (list, tuple)):
        first = configured[0] if configured and isinstance(configured[0], (list, tuple)) else configured
        return [one for item in first for one in optimizers_in(item)]
    return []


def _is_users(key: str, value: Any) -> bool:
    """Whether it is an attribute that hooks set: no function, and nothing of torch's, Lightning's or ours."""
    return not key.startswith("_") and key != "training" and not callable(value) and not isinstance(value, nn.Module)


def _loose(value: Any) -> Any:
    if is_users_object(value):
        shell = object.__new__(type(value))
        vars(shell).update({key: _loose_once(item) for key, item in vars(value).items()})
        return shell
    return _loose_once(value)


def _loose_once(value: Any) -> Any:
    # among them those of hooks: what is hooked to the module later, by fully_shard say, is not the copy's
    return copy.copy(value) if type(value) in (list, dict, set, OrderedDict, defaultdict) else value


def _silence(metric: Any, original: Metric | MetricCollection, fake_module: FakeModule) -> None:
    """What a metric computes matters to no stage, and most look at values."""
    keys = list(original.keys()) if isinstance(original, MetricCollection) else None

    def number(*args: Any, **kwargs: Any) -> Any:
        fake_module.on_metric()
        value = placeholder(torch.zeros(()))
        return value if keys is None else dict.fromkeys(keys, value)

    vars(metric).update(forward=number, compute=number, update=number)
