"""Recording: floating tensors go to the meta device, and what would have filled them goes on the tape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_dist.compat.operators import INDEX_PUT, READS_A_NUMBER, TRUNC_NORMAL, DisableTorchFunction, arguments_of
from lightning_dist.compat.torch import TorchDispatchMode
from lightning_dist.initialization.install import RecordedInit
from lightning_dist.initialization.tape import CannotDefer, Constant, Draw, Slot, Step, Tape, keep_host_random_state
from lightning_dist.pytree import tree_leaves, tree_map
from lightning_dist.random_states import default_generator

_EMPTY = {"empty", "empty_strided", "empty_permuted", "empty_like", "new_empty", "new_empty_strided"}
_FILLED = {"zeros", "ones", "full"}
_REPLACING = {"normal_", "uniform_", "random_", "exponential_", "log_normal_", "cauchy_", "geometric_"}
_REPLACING |= {"fill_", "zero_", "copy_"}
"""In-place operations after which nothing is left of the earlier values."""

_DEVICE = Tensor.device.__get__
_IS_META = Tensor.is_meta.__get__  # type: ignore[attr-defined]
_READERS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.__reduce_ex__)
"""Methods that get at the memory of a tensor without an operation that the dispatcher sees."""


@contextmanager
def record_initialization() -> Iterator[RecordedInit]:
    """Builds what is inside on the meta device and records how it would have been filled.

    Floating tensors that are created empty, constant or random have no memory. Integer ones and those computed
    from a range or from Python numbers stay real, so that models can read them. No random number is drawn: the
    generators are afterwards as they were before.

    Example::

        with record_initialization() as recorded:
            model = build()
        recorded.bind(model)
        fully_shard(model)
        recorded.materialize(model)

    Raises:
        CannotDefer: the model reads a value that is not there yet (``.item()``, ``bool``, ``.numpy()``, ...) or
            does something with it that the meta device has no shape for. The generators of torch, Python and
            NumPy are then as before, so that the caller may build plainly.
    """
    tape = Tape()
    put_back = keep_host_random_state()
    on_cuda = torch.cuda.default_generators if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    for generator in (torch.default_generator, *on_cuda):  # that Python code may seed while a model is built
        tape.stream(generator)
    original = getattr(nn.init, TRUNC_NORMAL)
    recorder = _Recorder(tape)
    setattr(nn.init, TRUNC_NORMAL, _recorded_whole(tape, original))
    try:
        with _ActAsReal(tape), recorder:
            yield RecordedInit(tape, put_back)
    except CannotDefer:
        put_back()
        raise
    finally:
        setattr(nn.init, TRUNC_NORMAL, original)
        for stream in tape.streams:
            stream.finish()


class _ActAsReal(TorchFunctionMode):
    """Lets Python code see a deferred tensor as the real one that it stands for.

    ``nn.init`` (torch 2.15) silently does nothing for a tensor that says ``is_meta``, and
    ``torch.zeros(..., device=weight.device)`` would ask for the meta device.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (_DEVICE, _IS_META):
            number = self._tape.find(args[0]) if _IS_META(args[0]) else None
            if number is not None and self._tape.storages[number].is_known:
                return self._tape.storages[number].device if func == _DEVICE else False
        elif func in _READERS and _IS_META(args[0]):
            raise CannotDefer(f"it reads values of a deferred tensor with Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Sends creation of floating tensors to the meta device and writes down each operation on a deferred tensor."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with DisableTorchFunction():
            tensors = _tensors((args, kwargs))
            if any(tensor.is_meta for tensor in tensors):
                return self._defer(func, args, kwargs, tensors)
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "meta":
                if func.overloadpacket.__name__ == "scalar_tensor":
                    # A Python number that torch wraps for an operation on a deferred tensor, as in w[mask] = 0
                    return func(*args, **{**kwargs, "device": torch.device("cpu")})
                return func(*args, **kwargs)
            if _is_random(func) and _written(func, args, kwargs):
                raise CannotDefer(
                    f"{func} draws random numbers into a tensor that was computed from values or is an integer one"
                )
            if _is_random(func) or _creates_floats(func, args, kwargs, tensors):
                return self._defer(func, args, kwargs, tensors)
            return func(*args, **kwargs)

    def _defer(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        if func is getattr(torch.ops.aten, READS_A_NUMBER).default:
            raise CannotDefer("it reads the value of a deferred tensor (.item(), bool(), float() or int())")
        tape = self._tape
        written = _written(func, args, kwargs)
        if any(not tensor.is_meta for tensor in written):
            raise CannotDefer(f"{func} writes values of a deferred tensor into one that is there already")
        device = _device_of(tape, kwargs, tensors)
        noted = tree_map(lambda leaf: _note(tape, leaf, device), (args, kwargs))
        written_slots = [tape.slot(tensor) for tensor in written]
        result = _run_on_meta(func, args, kwargs)
        outputs = {}
        for place, output in enumerate(tree_leaves(result)):
            if isinstance(output, Tensor) and tape.find(output) is None:
                tape.add(output, device)
                outputs[place] = tape.slot(output)
        # a view needs no step: slots know their place in the storage; nor does memory, which comes with its values
        if (outputs or written) and func.overloadpacket.__name__ not in _EMPTY:
            replaces = func.overloadpacket.__name__ in _REPLACING
            tape.steps.append(_step(tape, func, noted, written_slots, outputs, device, replaces, _is_random(func)))
        return result


def _recorded_whole(tape: Tape, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``nn.init.trunc_normal_`` draws until all values are in range, so that only the call can be written down."""

    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with DisableTorchFunction():
            if not tensor.is_meta:
                return original(tensor, *args, **kwargs)
            slot = tape.slot(tensor)
            device = tape.storages[slot.storage].device
            tape.steps.append(_step(tape, original, ((slot, *args), kwargs), [slot], {}, device, True, True))
            return tensor

    return call


def _step(
    tape: Tape,
    function: Callable[..., Any],
    call: tuple[tuple[Any, ...], dict[str, Any]],
    written: list[Slot],
    outputs: dict[int, Slot],
    device: torch.device,
    replaces: bool,
    is_random: bool,
) -> Step:
    """The step of a function; ``replaces``: what it writes to, whatever it was."""
    made = {slot.storage for slot in outputs.values()}
    filled = {slot.storage for slot in written if replaces and tape.covers(slot)}
    slots = [leaf for leaf in tree_leaves(call) if isinstance(leaf, Slot) and not (replaces and leaf in written)]
    partial = {slot.storage for slot in written} - filled
    draw = None
    if is_random:
        if device.type == "meta":
            raise CannotDefer("it draws random numbers into a tensor that was made on the meta device explicitly")
        generators = (leaf for leaf in tree_leaves(call) if isinstance(leaf, torch.Generator))
        stream = tape.stream(next(generators, None) or default_generator(device))
        jump = stream.find_jump()
        draw = Draw(stream, stream.mark(), jump)
    return Step(
        function,
        *call,
        outputs,
        reads=frozenset({slot.storage for slot in slots} | partial),
        writes=frozenset({slot.storage for slot in written} | made),
        fills=frozenset(filled | made),
        ignores_values=replaces and bool(written),
        draw=draw,
        default_dtype=torch.get_default_dtype(),
    )


def _run_on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """Shapes of the results; real operands take part as meta tensors."""
    if func.overloadpacket.__name__ in INDEX_PUT:
        return args[0]  # a mask among the indices has no shape to infer, and none is needed

    def on_meta(leaf: Any) -> Any:
        return leaf.to("meta") if isinstance(leaf, Tensor) and leaf.dim() and not leaf.is_meta else leaf

    meta_args, meta_kwargs = tree_map(on_meta, (args, dict(kwargs)))
    names = {argument.name for argument in arguments_of(func)}
    tensors = _tensors((meta_args, meta_kwargs))
    if "device" in names and (meta_kwargs.get("device") is not None or not tensors):
        meta_kwargs["device"] = torch.device("meta")
    meta_kwargs.pop("pin_memory", None)
    if isinstance(meta_kwargs.get("generator"), torch.Generator):
        meta_kwargs["generator"] = None
    if not any(tensor.is_meta for tensor in tensors) and "device" not in names:
        raise CannotDefer(f"{func} has no way to the meta device")
    try:
        return func(*meta_args, **meta_kwargs)
    except Exception as error:
        raise CannotDefer(f"{func} has no result without values ({type(error).__name__}: {error})") from error


def _note(tape: Tape, leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, Tensor):
        return tape.slot(leaf) if leaf.is_meta else Constant(leaf.detach().clone())
    if isinstance(leaf, torch.device) and leaf.type == "meta":
        return device
    return leaf


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _device_of(tape: Tape, kwargs: dict[str, Any], tensors: list[Tensor]) -> torch.device:
    """Where plain building would have put the result."""
    asked = kwargs.get("device")
    if asked is not None and torch.device(asked).type != "meta":
        device = torch.device(asked)
        if device.type != "cpu" and device.index is None:
            device = torch.device(device.type, torch.get_device_module(device).current_device())
        return device
    first = min(tensors, key=lambda tensor: not tensor.dim(), default=None)
    if first is None:
        return torch.device("cpu")
    return tape.storages[tape.slot(first).storage].device if first.is_meta else first.device


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation changes in place, by its schema."""
    found: list[Any] = []
    for place, argument in enumerate(arguments_of(func)):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return _tensors(found)


def _creates_floats(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> bool:
    name = func.overloadpacket.__name__
    if func.namespace != "aten" or name not in _EMPTY | _FILLED or kwargs.get("out") is not None:
        return False
    if name in _FILLED and (not args or not len(args[0])):
        return False  # a number in a tensor's clothes: models read those
    dtype = kwargs.get("dtype") or (tensors[0].dtype if tensors else None)
    if dtype is None and name == "full":
        return isinstance(args[1], float)
    dtype = dtype or torch.get_default_dtype()
    return dtype.is_floating_point or dtype.is_complex


def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags
