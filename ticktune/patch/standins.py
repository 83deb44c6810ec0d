"""Modules that stand in the place of a model's layers for one forward pass, and the frozen layers below all that train.

The model itself is as it was between two passes: names of parameters, hooks and classes do not change.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ticktune.errors import PatchError, RecipeError, first_line
from ticktune.patch.attach import attachment_of

Context = Callable[[], AbstractContextManager[Any]]
"""Gives what a layer runs in."""

BACKEND = "inductor"
"""What layers are compiled by."""


class StandIn(nn.Module):
    """Stands in the place of a layer; attributes that the model reads from it are the layer's own.

    Args:
        layer: What it stands for.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple: a submodule would give the layer's parameters a second name

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)


def without_cache(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a layer without the cache that hands keys and values from one call of a model to the next.

    Training makes one call, and a layer that runs twice would write there twice.
    """

    def kept(value: Any) -> Any:
        return None if hasattr(value, "get_seq_length") else value

    named = {name: kept(value) for name, value in kwargs.items()}
    return [kept(value) for value in args], named | ({"use_cache": False} if "use_cache" in named else {})


class Checkpointed(StandIn):
    """Runs its layer without keeping what the backward pass needs, and runs it again when that is needed.

    Args:
        layer: What it stands for.
        again: Gives what the second run stands in, as the first one did.
    """

    def __init__(self, layer: nn.Module, again: Context = nullcontext) -> None:
        super().__init__(layer)
        self._again = again

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns; dropout draws the same numbers in both runs."""
        values, named = without_cache(args, kwargs)
        return checkpoint(self._layer[0], *values, use_reentrant=False, context_fn=self._contexts, **named)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), self._again()


class Compiled(StandIn):
    """Runs its layer as torch compiles it, for any length and number of rows; layers of one kind share one graph.

    Args:
        layer: What it stands for.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self._run = (torch.compile(layer, dynamic=True, backend=BACKEND),)  # as the layer: no submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns.

        Raises:
            RecipeError: It cannot be compiled.
        """
        values, named = without_cache(args, kwargs)
        # A tick is two hooks, at which torch does not look by default when it chooses a graph: a layer with a tick
        # would run the graph of one without, and the tick would not be trained (torch 2.13, _dynamo/config.py).
        with (
            compiling(f"a {type(self._layer[0]).__name__}"),
            torch._dynamo.config.patch(skip_nnmodule_hook_guards=False),
        ):
            return self._run[0](*values, **named)


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Says which key asked for it where torch cannot compile something.

    Raises:
        RecipeError: It cannot.
    """
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException  # takes a second

        if not isinstance(error, TorchDynamoException):
            raise
        raise RecipeError(
            f"{what} cannot be compiled: {first_line(error)}",
            where="training.compile",
            fix="set training.compile: false",
        ) from error


class Passed(StandIn):
    """Computes nothing: hands on its input, or the hidden states that it was given.

    Args:
        layer: What it stands for.
        entries: How many entries the tuple has that the layer returns; 0: it returns its hidden states alone.
        states: What it hands on instead of its input, ``(batch, seq, hidden)``.
    """

    def __init__(self, layer: nn.Module, entries: int, states: Tensor | None = None) -> None:
        super().__init__(layer)
        self.entries = entries
        self.states = states

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states, as the layer returns them; nothing stands beside them."""
        states = self.states
        if states is None:
            states = args[0] if args else kwargs["hidden_states"]
        return (states, *[None] * (self.entries - 1)) if self.entries else states


Place = tuple[nn.Module, str, nn.Module]
"""A module that holds a layer, the layer's name in it, and the layer."""


def places_of(model: nn.Module, layers: Sequence[nn.Module]) -> list[Place]:
    """Returns every place where some layers stand in a model."""
    wanted = set(layers)
    return [(owner, name, c) for owner in model.modules() for name, c in owner._modules.items() if c in wanted]


@contextmanager
def standing_in(places: Sequence[Place], stand_ins: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Puts modules in the place of layers, and the layers back at the end.

    Args:
        places: From :func:`places_of`.
        stand_ins: Layer -> what stands in its places.
    """
    try:
        for owner, name, layer in places:
            owner._modules[name] = stand_ins[layer]
        yield
    finally:
        for owner, name, layer in places:
            owner._modules[name] = layer


class Prefix:
    """The layers of a model below the lowest one with a trained tensor; their result does not change in training.

    Args:
        model: With ticks.
        layers: The layers, in order.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self._places = places_of(model, layers)
        self._entries = 0

    def states(self, run: Callable[[], Any]) -> Tensor:
        """Runs the model up to the end of the prefix.

        Args:
            run: Calls the model.

        Returns:
            The hidden states that the lowest trained layer receives, ``(batch, seq, hidden)``.

        Raises:
            PatchError: A layer returns no hidden states, or the model does not call it.
        """
        handle = self.layers[-1].register_forward_hook(_stop)
        try:
            run()
        except _Reached as reached:
            output = reached.output
        else:
            raise PatchError("the model does not call its layers one after the other")
        finally:
            handle.remove()
        self._entries = len(output) if isinstance(output, tuple) else 0
        states = output[0] if self._entries else output
        if not isinstance(states, Tensor):
            raise PatchError(f"its layers return a {type(states).__name__}, expected hidden states")
        return states

    @contextmanager
    def replaced(self, states: Tensor) -> Iterator[None]:
        """Within it a forward pass begins with these hidden states; the prefix is not computed.

        Args:
            states: What :meth:`states` gave for the rows of the batch.
        """
        stand_ins: dict[nn.Module, nn.Module] = {layer: Passed(layer, self._entries) for layer in self.layers}
        stand_ins[self.layers[-1]] = Passed(self.layers[-1], self._entries, states)
        with standing_in(self._places, stand_ins):
            yield


def find_prefix(model: nn.Module) -> Prefix:
    """Finds the frozen layers below the lowest one with a trained tensor.

    Args:
        model: With ticks.

    Raises:
        PatchError: There are none, or the model has several stacks.
    """
    record = attachment_of(model)
    if len(record.layout.layers) != 1:
        raise PatchError(f"the model has several stacks of layers ({', '.join(record.layout.layers)})")
    [layers] = record.layout.layers.values()
    if len({id(layer) for layer in layers}) < len(layers) or record.plan.unshare:
        raise PatchError("its layers share one block")
    below = [key for key in record.plan.norms if key.endswith(".norm.embedding")]
    if below:
        raise PatchError(
            "the norm of the embeddings is trained", fix="set norms.layers: same, with ticks.layers: last:N"
        )
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    lowest = trained.index(True) if any(trained) else len(layers)
    if lowest == 0:
        raise PatchError("the lowest layer is trained", fix="set ticks.layers: last:N, and norms.layers: same")
    return Prefix(model, layers[:lowest])


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Returns the layers of all stacks, each once, in order."""
    stacks = attachment_of(model).layout.layers.values()
    return list(dict.fromkeys(layer for layers in stacks for layer in layers))


class _Reached(Exception):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _stop(layer: nn.Module, args: Any, output: Any) -> None:
    raise _Reached(output)
