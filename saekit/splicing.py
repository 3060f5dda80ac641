"""A dictionary in the model's forward pass: what its features make of an activation takes the activation's place.

    with saekit.splice(model, sae, steer={123: 8.0}, add_error=True):
        model.generate(...)

The model is one that TransformerLens hooks, or any torch module, such as a plain Hugging Face model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from operator import index
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from saekit.code import SparseCode
from saekit.errors import SaekitError, did_you_mean, first_line
from saekit.finite import not_finite, place_of
from saekit.positions import call_of, text_positions, token_ids
from saekit.processing import warn_of_processing
from saekit.special_tokens import special_tokens

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from saekit.sae import SparseAutoencoder

Positions: TypeAlias = Literal["text", "all"] | Tensor | Callable[[Tensor], Tensor]


@contextmanager
def splice(
    model: nn.Module,
    sae: SparseAutoencoder,
    hook: str | None = None,
    *,
    add_error: bool = False,
    steer: Mapping[int, float] | None = None,
    add: Mapping[int, float] | None = None,
    ablate: Iterable[int] = (),
    positions: Positions = "text",
) -> Iterator[Splice]:
    """Put a dictionary into a model while it is entered.

    The activation x at the hook becomes x̂, or x̂ + (x − x̂) with ``add_error``. The features f in between can be
    changed: here, or by hooks on them. On a TransformerBridge they are the hook point ``HOOK.hook_features``
    [b, t, d_sae], beside ``HOOK.hook_reconstruction`` and, with ``add_error``, ``HOOK.hook_error`` [b, t, d_in], for
    ``run_with_hooks``, ``run_with_cache`` and ``hook_dict``. On any model they are modules of the splice, for
    ``register_forward_hook``. Dense features are made for such hooks alone. On the way out all is as it was.

    Gradients reach f, and x through the encoder. The error is detached: a change of f changes the output along its
    decoder directions alone, which is the convention of attribution. Features that a hook looks at carry gradients
    wherever autograd is on, even where model and dictionary are frozen.

    Several dictionaries at several hooks are several splices, one within the other.

    Args:
        model: a TransformerBridge (``saekit.activations.load_model``) or any module.
        sae: the dictionary.
        hook: a hook point of the bridge, or the name of a module (``model.layers.1``) whose output, or the first of
            its outputs, is x [b, t, d_in]; dimensions after t (heads) are flattened. What the dictionary's metadata
            names if not given.
        add_error: whether what the dictionary misses is added: the model is as it was but for changes of f.
        steer: what to set features to, in units of their own (of the normalised activation, where the dictionary
            normalises it).
        add: what to add to features, active or not.
        ablate: features to set to zero.
        positions: where to splice. ``text``, as dictionaries are trained: all but the first position of a context, BOS
            (known by its id) and padding, as far as what the model is called with tells; later passes of a generation
            with a cache have no first position. ``all``. A mask [b, t], or what broadcasts to it, such
            as a ``ContextBatch``'s ``kept``, by which evaluations leave out separators too. A function from token ids
            [b, t] to such a mask; it also does for generation, where passes differ in length.

    Yields:
        The splice, with its modules.

    Raises:
        SaekitError: there is no such hook or feature, the dictionary does not fit the hook, a mask does not fit, or an
            activation to splice is NaN or infinite (its position is named).
    """
    hook = hook or sae.cfg.metadata.get("hook_name")
    if not hook:
        raise SaekitError("the dictionary does not name its hook point; give one")
    if isinstance(positions, str) and positions not in ("text", "all"):
        raise SaekitError(f"unknown positions '{positions}'; choose from text, all, a mask, or a function of token ids")
    warn_of_processing(sae, model, hook, stacklevel=4)
    positions = _positions(positions)
    try:
        edit = _Edit.of(sae.cfg.d_sae, steer or {}, add or {}, list(ablate))
    except (TypeError, AttributeError) as mistake:
        told = "steer and add are mappings of features to numbers, and ablate names features, by whole numbers"
        raise SaekitError(f"{told}: {first_line(mistake)}") from None
    bridged = hasattr(model, "hook_dict")
    point = _hook_point(model, hook) if bridged else _module(model, hook)
    make = type(point) if bridged else nn.Identity
    error = make() if add_error else None
    spliced = Splice(sae, hook, make(), make(), error, edit, positions, special_tokens(model).bos)
    called: Any = model.original_model if bridged else model
    with ExitStack() as undo:
        undo.callback(called.register_forward_pre_hook(spliced._read_call, with_kwargs=True).remove)
        undo.enter_context((_on_bridge if bridged else _on_module)(model, point, spliced))
        yield spliced


@dataclass(eq=False)
class Splice:
    """A dictionary that is spliced into a model.

    Attributes:
        sae, hook: the dictionary and its hook.
        features: the features pass through this module, [b, t, d_sae], after ``steer``, ``add`` and ``ablate``.
        reconstruction: x̂ [b, t, d_in] passes through it.
        error: x − x̂ [b, t, d_in] of the unchanged features, detached, passes through it; None if it is not added.
    """

    sae: SparseAutoencoder
    hook: str
    features: nn.Module
    reconstruction: nn.Module
    error: nn.Module | None
    _edit: _Edit | None
    _positions: Positions
    _bos: int | None
    _tokens: Tensor | None = None
    _text: Tensor | None = None

    def points(self) -> dict[str, Any]:
        """The modules by the names that their hook points have on a bridge."""
        points = {"hook_features": self.features, "hook_reconstruction": self.reconstruction}
        return points if self.error is None else {**points, "hook_error": self.error}

    def __call__(self, activation: Float[Tensor, "b t *d"]) -> Float[Tensor, "b t *d"]:
        """What takes the activation's place."""
        flat = activation.flatten(2) if activation.ndim > 3 else activation
        if flat.ndim < 2 or flat.shape[-1] != self.sae.cfg.d_in:
            raise SaekitError(
                f"the dictionary does not fit: it takes width {self.sae.cfg.d_in}, but '{self.hook}' has activations "
                f"of shape {list(activation.shape)}"
            )
        kept = self._kept(flat)
        whole = self._finite(flat, kept).reshape(-1, self.sae.cfg.d_in).to(self.sae.device)
        x = whole.to(self.sae.dtype)
        code = self.sae.encode_finite(x)
        f: SparseCode | Tensor = code if self._edit is None else self._edit(code)
        if _watched(self.features):
            dense = f.to_dense().reshape(*flat.shape[:-1], -1)
            if torch.is_grad_enabled() and not dense.requires_grad:
                dense.requires_grad_(True)
            f = self.features(dense).reshape(-1, self.sae.cfg.d_sae)
        x_hat = self.sae.decode(f, x)
        out: Tensor = self.reconstruction(x_hat.reshape(flat.shape))
        if self.error is not None:
            with torch.no_grad():
                error = whole - (x_hat if f is code else self.sae.decode(code, x))  # in the finer of two precisions
            out = out + self.error(error.reshape(flat.shape))
        out = out.to(activation) if kept is None else torch.where(kept[..., None], out.to(activation), flat)
        return out.reshape(activation.shape)

    def _finite(self, flat: Float[Tensor, "b t d"], kept: Bool[Tensor, "b t"] | None) -> Float[Tensor, "b t d"]:
        """The activations with zeros for those that are not finite, once it is sure that none of these is spliced."""
        bad = not_finite(flat.to(self.sae.dtype))
        if bad is None:
            return flat
        if bool((spliced := bad if kept is None else bad & kept).any()):
            raise SaekitError(
                f"the activations at '{self.hook}' have NaN or infinite numbers, in {str(self.sae.dtype)[6:]}, at "
                f"{int(spliced.sum())} positions, the first of them {place_of(spliced)}; there is nothing to splice"
            )
        return flat.masked_fill(bad[..., None], 0)

    def _read_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember what tells the positions of this pass; the cache must be asked before the pass fills it."""
        call = call_of(module, args, kwargs)
        self._tokens = token_ids(call)
        self._text = text_positions(call, self._bos) if isinstance(self._positions, str) else None

    def _kept(self, flat: Float[Tensor, "b t d"]) -> Bool[Tensor, "b t"] | None:
        """Where to splice; None: everywhere."""
        positions, mask = self._positions, self._text
        if isinstance(positions, str):
            if positions == "all" or mask is None:
                return None
        elif isinstance(positions, Tensor):
            mask = positions
        else:
            if self._tokens is None:
                raise SaekitError("positions are a function of token ids, but the model is called without any")
            mask = positions(self._tokens)
        if flat.ndim == 2:  # tokens are flattened here
            mask = mask.flatten()
        try:
            return mask.to(flat.device, torch.bool).broadcast_to(flat.shape[:-1])
        except RuntimeError:
            raise SaekitError(
                f"positions of shape {list(mask.shape)} do not fit activations at {list(flat.shape[:-1])} positions; "
                f"give a mask that does, a function of token ids, or 'all'"
            ) from None


class _Edit(NamedTuple):
    """Changes of some features: f becomes factor · f + shift.

    Attributes:
        features: [s] which, in ascending order.
        factor, shift: [s].
    """

    features: Int[Tensor, "s"]
    factor: Float[Tensor, "s"]
    shift: Float[Tensor, "s"]

    @staticmethod
    def of(width: int, steer: Mapping[int, float], add: Mapping[int, float], ablate: list[int]) -> _Edit | None:
        """What was asked for; None: nothing."""
        rows = [(index(j), 0.0, float(value)) for j, value in steer.items()]
        rows += [(index(j), 1.0, float(value)) for j, value in add.items()]
        rows += [(j, 0.0, 0.0) for j in dict.fromkeys(map(index, ablate))]
        seen: set[int] = set()
        for j, _, value in rows:
            if not 0 <= j < width:
                raise SaekitError(f"there is no feature {j}: the dictionary has features 0 to {width - 1}")
            if j in seen:
                raise SaekitError(f"feature {j} is changed twice; give it to one of steer, add and ablate")
            if not math.isfinite(value):
                raise SaekitError(f"feature {j} cannot be changed by {value}")
            seen.add(j)
        if not rows:
            return None
        features, factor, shift = zip(*sorted(rows), strict=True)
        return _Edit(torch.tensor(features), torch.tensor(factor), torch.tensor(shift))

    def __call__(self, code: SparseCode) -> SparseCode:
        """The changed code; it has a pair for each token and each of the features."""
        columns, factor, shift = (part.to(code.values.device) for part in self)
        at = torch.full((code.n_features,), -1, device=columns.device)
        at[columns] = torch.arange(len(columns), device=columns.device)
        at = at[code.features]
        hit = at >= 0
        before = code.values.new_zeros(code.n_tokens, len(columns))
        before = before.index_put((code.tokens[hit], at[hit]), code.values[hit])
        after = (before * factor.to(before) + shift.to(before)).flatten()
        rest = code.where(~hit)
        tokens = torch.arange(code.n_tokens, device=columns.device).repeat_interleave(len(columns))
        tokens, order = torch.cat([rest.tokens, tokens]).sort(stable=True)
        return replace(
            code,
            tokens=tokens,
            features=torch.cat([rest.features, columns.repeat(code.n_tokens)])[order],
            values=torch.cat([rest.values, after])[order],
        )


def _positions(given: Any) -> Positions:
    """Positions as they were asked for, a mask as a tensor.

    Raises:
        SaekitError: it is a mask of other numbers than ones and zeros.
    """
    if isinstance(given, str) or (callable(given) and not isinstance(given, Tensor)):
        return given  # type: ignore[return-value]
    mask = torch.as_tensor(given)
    if bool(((mask != 0) & (mask != 1)).any()):
        raise SaekitError("positions are a mask of ones and zeros [b, t], not numbers of positions")
    return mask


def _watched(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _hook_point(bridge: Any, hook: str) -> Any:
    from saekit.activations.model import check_hook

    check_hook(bridge, hook)
    point = bridge.hook_dict[hook]
    if hasattr(point, "hook_features"):
        raise SaekitError(f"a dictionary is spliced in at '{hook}' already")
    return point


def _module(model: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if not name or name not in modules:
        raise SaekitError(f"the model has no module '{name}'{did_you_mean(name, filter(None, modules))}")
    return modules[name]


@contextmanager
def _on_bridge(bridge: Any, point: Any, spliced: Splice) -> Iterator[None]:
    """The splice at a hook point, its own hook points known to the bridge by name."""
    point.add_hook(lambda activation, hook: spliced(activation), is_permanent=True)  # outlives the user's reset_hooks()
    handle = point.fwd_hooks[-1]
    try:
        for name, inner in spliced.points().items():
            inner.name = f"{spliced.hook}.{name}"
            bridge._hook_registry[inner.name] = inner  # whence hook_dict is made
            setattr(point, name, inner)  # by which add_hook of TransformerLens 3 finds it
        yield
    finally:
        handle.hook.remove()
        point.fwd_hooks = [other for other in point.fwd_hooks if other is not handle]
        for name in spliced.points():
            bridge._hook_registry.pop(f"{spliced.hook}.{name}", None)
            if hasattr(point, name):
                delattr(point, name)


@contextmanager
def _on_module(model: nn.Module, module: nn.Module, spliced: Splice) -> Iterator[None]:
    """The splice at a module's output, or the first of its outputs."""

    def replace_output(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return spliced(output)
        if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
            return type(output)([spliced(output[0]), *output[1:]])
        raise SaekitError(f"the module '{spliced.hook}' gives no tensor, but {type(output).__name__}")

    handle = module.register_forward_hook(replace_output)
    try:
        yield
    finally:
        handle.remove()
