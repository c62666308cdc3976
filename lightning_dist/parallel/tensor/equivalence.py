"""A part is what the plan took it for: seen once, before anything is trained on it.

[Note: parts are checked]
The plan recognises attention and feed-forward modules by what they are made of; what their forward does with the
numbers that it sees is its own affair. One that scales its scores by ``self.num_heads``, say, gets this rank's heads
and another scale, and no error would tell. So the first time that a kind of module runs, it runs twice more, as a
part and whole, with fixed numbers for random ones, and the outputs are compared, the tensors that it keeps, and the
gradients that reach its inputs. A module whose plain attributes change is one of another kind.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lightning_dist.compat.torch import MODULE_REGISTRIES, disable_current_modes
from lightning_dist.parallel.rehearsal import DrawsNoted, FixedNumbers, undone
from lightning_dist.parallel.tensor.draws import Drawn, DrawnByRank, drawn
from lightning_dist.parallel.tensor.region import (
    Args,
    Kwargs,
    Region,
    copy_of,
    once_each,
    overridden,
    tensors_in,
    whole,
)
from lightning_dist.parallel.tensor.shards import shard_of
from lightning_dist.parallel.tensor.stand_ins import nonzero
from lightning_dist.parallel.tensor.users_hooks import without_users_hooks
from lightning_dist.precision import rounds_products
from lightning_dist.pytree import tree_map
from lightning_dist.random_states import kept_random_states

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative difference of outputs that is taken for rounding."""

COARSE_ROUNDING = 0.05
"""The same where something is computed in 16 bits, or in 19 (TF32)."""


class EquivalenceCheck:
    """Compares the modules of one plan with the whole ones; see [Note: parts are checked].

    Communication: for each kind of module, once: the gathering of its parameters over ``mesh``, its own collectives
    once more, and one all-reduce of a number; all of it twice for those that divide widths by their number of heads.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self._drawn: dict[Any, Drawn | None] = {}
        """What the kinds of modules drew that were seen to run; None where that can't be said."""
        self._compared: list[nn.Module] = []
        """Those that are compared just now, the outermost first."""
        self._written: dict[type, set[tuple[str, str]]] = {}
        """Plain attributes that a run of a module sets, which make it none of another kind."""
        self.own_outputs: dict[type, frozenset[int]] = {}
        """Which of the tensors that a kind of module returns, beside the first, are this rank's part."""
        self.by_width: set[type] = set()
        """Kinds of modules that divide the features of all heads by their number of heads, see ``HeadCount``: they give
        another result without."""

    def before_run(self, module: nn.Module, region: Region, args: Args, kwargs: Kwargs) -> None:
        """Compares, where no module of this kind ran yet. Compiled ones are not looked at.

        Raises:
            ValueError: on every rank of the axis, if the part gives another result than the whole, or fails where the
                whole does not.
        """
        if torch.compiler.is_compiling():
            return
        if any(module is compared for compared in self._compared):
            region.note_draws(module, Drawn.COLUMNS_LATER)  # each draw is to be in the stream that it would be in
            return
        kind = self._kind(module)
        if kind not in self._drawn:
            self._compared.append(module)
            try:
                found = self.run(module, region, args, kwargs, _has_backward(module))
            finally:
                self._compared.pop()
            self._drawn[kind] = self._drawn[self._kind(module)] = found
        region.note_draws(module, self._drawn[kind])

    def run(self, module: nn.Module, region: Region, args: Args, kwargs: Kwargs, has_backward: bool) -> Drawn | None:
        """Compares, and tells what is drawn; None for what can't be compared."""
        is_block = not region.copies_inputs and region.positions is None
        if is_block and any(isinstance(child, FSDPModule) for child in module.modules() if child is not module):
            raise ValueError(
                f"tp divides the feed-forward layers in {type(module).__name__} and compares it with the whole one, "
                "which it can't where modules inside are sharded by themselves; name it in shard_units= in their place"
            )
        if region.is_given_own(args, kwargs):
            return None  # made by another part: the whole module could not use it
        try:
            outputs, found = self._compare(module, region, args, kwargs, has_backward)
        except ValueError:
            if type(module) in self.by_width or not region.counts_heads:
                raise
            self.by_width.add(type(module))
            outputs, found = self._compare(module, region, args, kwargs, has_backward)
        # those of another shape are this rank's: of its heads, say
        self.own_outputs[type(module)] = frozenset(i for i, (w, p) in enumerate(outputs) if i and w.shape != p.shape)
        return found

    @torch.no_grad()
    def _compare(
        self, module: nn.Module, region: Region, args: Args, kwargs: Kwargs, has_backward: bool
    ) -> tuple[list[tuple[Tensor, Tensor]], Drawn]:
        """The outputs of the whole and of the part, and what is drawn; a ValueError on every rank where they are not
        the same.
        """
        device = torch.device(self.mesh.device_type)
        of_whole, of_part = DrawsNoted(), DrawsNoted()
        with without_users_hooks(module), undone(module), kept_random_states(device), nonzero(module, self.mesh):
            before = _plain_attributes(module)
            try:
                expected, part, kept = both_ways(module, region, args, kwargs, of_whole, of_part)
            except PartFailed as error:
                raise ValueError(_told(module, f"that fails: {error.__cause__}")) from error.__cause__
            written = {name for name, value in _plain_attributes(module).items() if before.get(name, before) != value}
            gradients = self._gradient_difference(module, region, args, kwargs) if has_backward else 0.0
        seen = drawn(of_whole.draws, of_part.draws, of_part.is_unknown)
        flags = map(float, (bool(kept), bool(written), *astuple(seen)))
        outputs, keeps, writes, *seen_anywhere = self._largest([self._difference(expected, part), *flags])
        refuse_differences(
            module,
            not region.copies_inputs,
            outputs,
            kept or ["tensors"] * bool(keeps),
            gradients,
            rounding_of(part[0]),
        )
        if writes:
            self._note_written(type(module), written)
        anywhere = DrawnByRank(*map(bool, seen_anywhere))
        return list(zip(expected, part, strict=False)), what_is_drawn(module, anywhere)

    def _difference(self, expected: list[Tensor], part: list[Tensor]) -> float:
        """The largest relative difference between outputs of one shape; infinite where there is none to compare."""
        if part[0].shape != expected[0].shape:  # it goes on divided
            expected = [shard_of(expected[0], Shard(expected[0].ndim - 1), self.mesh), *expected[1:]]
        if len(part) != len(expected) or part[0].shape != expected[0].shape:
            return torch.inf
        pairs = [(w, p) for w, p in zip(expected, part, strict=True) if w.shape == p.shape]
        found = [(p - w).float().norm() / w.float().norm().clamp(min=1e-12) for w, p in pairs]
        return float(torch.stack(found).max())

    def _largest(self, values: list[float]) -> list[float]:
        """Of each of some numbers the largest among the ranks."""
        largest = torch.tensor(values, device=self.mesh.device_type)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.mesh.get_group())
        return largest.tolist()

    def _note_written(self, kind: type, names: set[tuple[str, str]]) -> None:
        """By any rank: what is written may be what it was on one of them. Communication: an all-gather of names."""
        gathered: list[Any] = [None] * self.mesh.size()
        dist.all_gather_object(gathered, names, self.mesh.get_group())
        self._written.setdefault(kind, set()).update(*gathered)

    def _kind(self, module: nn.Module) -> Any:
        """Class, shapes, plain attributes, and whether a backward may follow: another flag is another forward."""
        written = self._written.get(type(module), ())
        plain = tuple((name, value) for name, value in _plain_attributes(module).items() if name not in written)
        shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
        return type(module), shapes, plain, _has_backward(module)

    @torch.enable_grad()
    def _gradient_difference(self, module: nn.Module, region: Region, args: Args, kwargs: Kwargs) -> float:
        """Between the part and the whole, of the gradients of the inputs that ask for one; else of the first,
        since another module of the kind may be given one that does: the layers below this one are frozen, say. And of
        the parameters that are not divided, frozen or not, where the module holds a part beside other things.
        """
        given_tensors = [tensor for tensor in tensors_in((args, kwargs)) if tensor.is_floating_point()]
        leaves = [tensor for tensor in given_tensors if tensor.requires_grad] or given_tensors[:1]
        if region.positions is not None or not leaves:
            return 0.0
        inputs = {id(leaf): leaf.detach().requires_grad_() for leaf in leaves}
        parameters = {} if region.copies_inputs else _whole_parameters(module)

        given = tree_map(lambda leaf: _without_cache(inputs.get(id(leaf), leaf)), (args, kwargs))
        # checkpointing of activations keeps nothing of what this saves, in the first run or in the second
        sources = [[*inputs.values()], *([parameter] for parameter in parameters.values())]
        with (
            disable_current_modes(),
            saved_tensors_hooks(_as_it_is, _as_it_is),
            FixedNumbers(),
            overridden(module, parameters),
        ):
            with whole(module):  # also what its backward computes again
                args, kwargs = _copies(given)
                whole_output = tensors_in(type(module).forward(module, *args, **kwargs))[0]
                expected = _gradients(whole_output, sources)
            output = tensors_in(region.run(module, *_copies(given)))[0]
            if output.shape != whole_output.shape:  # it goes on divided
                return 0.0
            try:
                part = _gradients(output, sources)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # checkpointing of its own computes again what is no part by then
                raise ValueError(_told(module, f"its backward fails: {_first_line(error)}")) from error
        if expected is None or part is None:
            return 0.0
        # what only rounding moves (the keys' bias), the more the longer the sum, counts as a part of all
        least = max(1e-2, 10 * rounding_of(output)) * torch.cat(expected).norm().clamp(min=1e-12)
        largest = torch.stack(
            [(p - e).norm() / e.norm().clamp(min=least) for p, e in zip(part, expected, strict=True)]
        ).max()
        return self._largest([float(largest)])[0]


def _whole_parameters(module: nn.Module) -> dict[str, Tensor]:
    """What stands for the parameters of a module that each rank has whole, but those that it uses on its part."""
    regions = [(name, region) for name, child in module.named_modules() if (region := Region.of(child)) is not None]
    partial = {f"{name}.{below}".strip(".") for name, region in regions for below in region.partial}
    return {
        name: parameter.detach().requires_grad_()
        for name, parameter in module.named_parameters()
        if name not in partial and not isinstance(parameter, DTensor) and parameter.is_floating_point()
    }


def refuse_differences(
    module: nn.Module, is_block: bool, outputs: float, kept: list[str], gradients: float, rounding: float
) -> None:
    """Raises a ValueError for what a comparison of a part with the whole found."""
    if not outputs <= rounding:
        what = f"gives another result than the whole module (relative difference {outputs:.1e}): its forward"
        raise ValueError(_told(module, f"that {what} does something with its sizes that tp does not know"))
    if kept:
        raise ValueError(_told(module, f"its forward keeps {', '.join(kept)}, of which it would keep this rank's part"))
    if not gradients <= 10 * rounding and is_block:
        raise ValueError(
            f"tp divides the feed-forward layers in {type(module).__name__}, and that sends another gradient to its "
            f"input or its other parameters than the whole module (relative difference {gradients:.1e}): it uses one "
            "between those layers. Name the layers that may be divided in tensor_plan=, and leave these out"
        )
    if not gradients <= 10 * rounding:
        raise ValueError(
            f"tp runs {type(module).__name__} on each rank's heads or columns, and that sends another gradient to "
            f"its input than the whole module (relative difference {gradients:.1e}): its forward uses the input "
            "beside its divided layers too, in a residual connection of its own. Name its layers in tensor_plan= "
            '(the first "colwise", the last "rowwise"), and they are divided one by one'
        )


def what_is_drawn(module: nn.Module, found: DrawnByRank) -> Drawn:
    """What a module draws by what any rank found, see [Note: draws of a part].

    Raises:
        ValueError: no stream would do.
    """
    if found.elsewhere:
        what = "for these, which all ranks would have alike: after its last divided layer, or from its own generator"
        raise ValueError(_told(module, f"it draws random numbers {what}"))
    if found.columns and found.alike:
        what = "for these, and, between its divided layers, for all of them, of which each rank would have others"
        raise ValueError(_told(module, f"it draws random numbers {what}"))
    if found.columns:
        return Drawn.COLUMNS_LATER if found.before or found.again else Drawn.COLUMNS
    if found.alike or found.before:
        return Drawn.WHOLE
    return Drawn.UNKNOWN if found.is_unknown else Drawn.NOTHING


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _told(module: nn.Module, what: str) -> str:
    return (
        f"tp runs {type(module).__name__} on each rank's heads or columns, and {what}. Name the layers that may be "
        "divided in tensor_plan=, and leave these out"
    )


def _gradients(output: Tensor, sources: list[list[Tensor]]) -> list[Tensor] | None:
    """The gradients of a weighted sum of the output's elements with respect to some tensors: a vector for each list."""
    if not output.requires_grad:
        return None
    weights = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view(output.shape)
    leaves = [leaf for source in sources for leaf in source]
    found = iter(torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True))
    return [torch.cat([_vector(next(found), leaf) for leaf in source]) for source in sources]


def _vector(gradient: Tensor | None, leaf: Tensor) -> Tensor:
    return (torch.zeros_like(leaf) if gradient is None else gradient).flatten().double()


def _as_it_is(value: Any) -> Any:
    return value


def _copies(given: tuple[Args, Kwargs]) -> tuple[Args, Kwargs]:
    """Arguments that a forward may write to, as a residual in place does."""
    return tree_map(once_each(copy_of), given)


def _has_backward(module: nn.Module) -> bool:
    """Whether one may follow its forward; the first pass of a module that trains may be one without."""
    return module.training or torch.is_grad_enabled()


def _plain_attributes(module: nn.Module) -> dict[tuple[str, str], Any]:
    """Numbers and words of a module and those below it, by their names."""
    return {
        (name, key): value
        for name, child in module.named_modules()
        for key, value in vars(child).items()
        if isinstance(value, (bool, str, type(None))) or (isinstance(value, (int, float)) and value == value)
    }


class PartFailed(Exception):
    """A part raised where the whole module did not; its cause says what."""


@torch.no_grad()
def both_ways(
    module: nn.Module,
    region: Region,
    args: Args,
    kwargs: Kwargs,
    around_whole: AbstractContextManager[Any] | None = None,
    around_part: AbstractContextManager[Any] | None = None,
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """The outputs of a region's module that runs whole, and on this rank's part, without randomness.

    Args:
        module, region, args, kwargs: what runs, and on what.
        around_whole, around_part: what is entered while each runs.

    Returns:
        The tensors that it returns, whole and in part, and names of attributes that it set to tensors that differ.

    Raises:
        PartFailed: the part raised.

    Communication: gathers the module's parameters over the axis, and the module's own collectives.
    """
    given = tree_map(_without_cache, (args, kwargs))
    copied = _copies if region.positions is None else _as_it_is  # which are known by where they lie
    before = _tensor_attributes(module)
    with disable_current_modes(), FixedNumbers():  # selective checkpointing would keep what this computes
        with whole(module), around_whole or nullcontext():
            whole_args, whole_kwargs = region.whole_arguments(*copied(given))
            expected = tensors_in(type(module).forward(module, *whole_args, **whole_kwargs))
        kept = _tensor_attributes(module)
        with around_part or nullcontext():
            try:
                first, *others = tensors_in(region.run(module, *copied(given)))
            except Exception as error:
                if isinstance(error, ValueError) and str(error).startswith("tp "):
                    raise  # a part inside of it
                raise PartFailed from error
            part = [region.whole_output(first), *others]
    return expected, part, _differing(before, kept, _tensor_attributes(module))


def _tensor_attributes(module: nn.Module) -> dict[str, Any]:
    """Tensors that modules in it have as attributes, and those in lists and dictionaries there, by name."""
    found: dict[str, Any] = {}
    for name, child in module.named_modules():
        for key, value in vars(child).items():
            if key not in MODULE_REGISTRIES and (tensors := tensors_in(value)):
                found[f"{name}.{key}".strip(".")] = tensors
    return found


def _differing(before: dict[str, Any], of_whole: dict[str, Any], of_part: dict[str, Any]) -> list[str]:
    """Attributes that both ways set, to other values."""
    found = []
    for name, mine in of_part.items():
        theirs, were = of_whole.get(name, []), [*map(id, before.get(name, []))]
        if [*map(id, mine)] == were and [*map(id, theirs)] == were:
            continue
        mine = mine[max(len(mine) - len(theirs), 0) :]
        if len(mine) != len(theirs) or not all(map(_is_close, mine, theirs)):
            found.append(name)
    return found


def _is_close(mine: Tensor, theirs: Tensor) -> bool:
    if mine.shape != theirs.shape:
        return False
    difference = float((mine.double() - theirs.double()).norm())
    return difference <= rounding_of(mine) * max(float(theirs.double().norm()), 1e-6)


def rounding_of(output: Tensor) -> float:
    """The relative difference from this output that is taken for rounding."""
    in_double = output.dtype == torch.float64 and not torch.is_autocast_enabled(output.device.type)
    if rounds_products(output.device.type) and not in_double:
        return COARSE_ROUNDING
    return ROUNDING.get(output.dtype, COARSE_ROUNDING)


def _without_cache(value: Any) -> Any:
    """None for a cache of keys and values (transformers), which a run would write to."""
    return None if hasattr(value, "get_seq_length") else value
