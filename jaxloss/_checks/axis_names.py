"""The axes of a mesh that a call names, and whether its arrays are split over them."""

from typing import Any, NamedTuple

from jax import Array
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from jaxloss._checks import messages
from jaxloss._types import Axes
from jaxloss._xla import mesh


class AxisNames(NamedTuple):
    """The mesh axes that a call names: those of the surrounding ``shard_map``, and others."""

    vocab_axes: Axes = ()  # of shard_map
    token_axes: Axes = ()
    mesh: Any = None  # of the others; None: there is none
    of_vocab: Axes = ()
    of_tokens: tuple | None = None  # what splits each leading axis of hidden; None: nobody says
    of_kernel: tuple | None = None  # likewise each axis of the kernel

    @property
    def asked(self) -> bool:
        """Whether any of the others is named."""
        return bool(self.of_vocab) or any(self.of_tokens or ()) or any(self.of_kernel or ())


def mesh_axes(function: str, name: str, x: Any) -> Axes:
    """The named axes that the surrounding ``shard_map`` is over, checked.

    Names of other axes of the mesh are dropped: functions of logits leave these axes to XLA's
    partitioner.
    """
    manual = mesh.manual_axes()
    return tuple(n for n in _names(function, name, x, mesh.of_context()) if n in manual)


def _names(function: str, name: str, x: Any, over: Any) -> Axes:
    """All names in ``x``. Refuses a name that is given twice, or that is neither an axis of the
    surrounding ``shard_map`` nor of the mesh ``over``."""
    entries = x if isinstance(x, P | tuple | list) else () if x is None else (x,)
    names = tuple(n for e in entries for n in (e if isinstance(e, tuple | list) else (e,)))
    names = tuple(n for n in names if n is not None) if isinstance(x, P) else names
    if not all(isinstance(n, str) for n in names):
        rule = f"{name} must be the name of a mesh axis, or a tuple of names"
        messages.fail(function, rule, repr(x), kind=TypeError)
    manual, others = mesh.manual_axes(), over.axis_names if over is not None else ()
    for n in names:
        if n not in manual and n not in others:
            inside = f"inside of shard_map over {manual}" if manual else "outside of shard_map"
            way_out = "" if others else "Set the mesh: jax.set_mesh(mesh)."
            if mesh.is_bound(n):
                by_hand = _by_hand(function, name, n)
                way_out = f"Of vmap or pmap: {by_hand}." if by_hand else ""
            messages.fail(
                function,
                f"{name} must name axes of the surrounding shard_map or of the mesh",
                f"{n!r}, {inside}, {f'on a mesh of {others}' if others else 'without a mesh'}",
                way_out,
            )
    if len(set(names)) != len(names):
        messages.fail(function, f"{name} must name each axis once", repr(x))
    return names


def checked(
    function: str,
    rank: int,
    *,
    token_axis_name: Any,
    vocab_axis_name: Any = None,
    kernel_spec: Any = None,
    over: Any = None,
) -> AxisNames:
    """The names that a function of ``hidden``, of this rank, and a kernel takes.

    ``over``: its argument ``mesh``.
    """
    if over is not None and not isinstance(over, Mesh | AbstractMesh):
        messages.fail(function, "mesh must be a jax.sharding.Mesh", repr(over), kind=TypeError)
    named = [x for x in (token_axis_name, vocab_axis_name, kernel_spec) if x is not None]
    if over is not None and not named:
        rule = "mesh is where axes are named"
        messages.fail(function, rule, "none", "Name the axes: token_axis_name=...")
    manual = mesh.manual_axes()
    over = mesh.of_context() if over is None or manual else over
    tokens = _names(function, "token_axis_name", token_axis_name, over)
    vocab = _names(function, "vocab_axis_name", vocab_axis_name, over)
    of_tokens = of_kernel = None
    if isinstance(token_axis_name, P):
        of_tokens = _entries(function, "token_axis_name", token_axis_name, rank)
        of_tokens = of_tokens[: rank - 1]  # one for the features says that they are gathered
        tokens = tuple(n for entry in of_tokens for n in entry)
    elif tokens and rank > 1:
        of_tokens = (tokens, *(() for _ in range(rank - 2)))
    elif _parted(tokens, manual)[1]:
        rule = "token_axis_name needs a hidden of more than one token"
        messages.fail(function, rule, "hidden of rank 1")
    for axis in vocab:
        if axis in tokens:
            rule = "vocab_axis_name and token_axis_name must differ"
            messages.fail(function, rule, f"{axis!r} in both")
    if of_tokens is not None:
        of_tokens = tuple(tuple(n for n in e if n not in manual) or None for e in of_tokens)
        of_tokens = of_tokens if any(of_tokens) or not tokens else None
    if kernel_spec is not None:
        if not isinstance(kernel_spec, P):
            rule = "kernel_spec must be a jax.sharding.PartitionSpec"
            messages.fail(function, rule, repr(kernel_spec), kind=TypeError)
        names = _names(function, "kernel_spec", kernel_spec, over)
        if any(n in manual for n in names):
            rule = "kernel_spec is for axes that the surrounding shard_map leaves out"
            messages.fail(function, rule, repr(kernel_spec), "in_specs says what it splits.")
        of_kernel = tuple(e or None for e in _entries(function, "kernel_spec", kernel_spec, 2))
    bound, of_vocab = _parted(vocab, manual)
    return AxisNames(bound, _parted(tokens, manual)[0], over, of_vocab, of_tokens, of_kernel)


def _parted(names: Axes, manual: Axes) -> tuple[Axes, Axes]:
    """(those that are manual, the others)."""
    return tuple(n for n in names if n in manual), tuple(n for n in names if n not in manual)


def _entries(function: str, name: str, spec: P, rank: int) -> tuple:
    """The names of each axis."""
    if len(spec) > rank:
        rule = f"{name} must have at most {rank} entries, one an axis"
        messages.fail(function, rule, repr(spec))
    entries = (() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec)
    return (*entries, *(() for _ in range(rank - len(spec))))


def check_split(
    function: str,
    name: str,
    split_array: Array,
    of_tokens: dict[str, Any],
    *,
    vocab_axes: Axes = (),
    token_axes: Axes = (),
) -> None:
    """The types must say what the names say: gradients are sums over what the types leave out."""
    way_out = "Split it in in_specs."
    for axis in vocab_axes:
        if axis in token_axes:
            rule = "vocab_axis_name and token_axis_name must differ"
            messages.fail(function, rule, f"{axis!r} in both")
        if axis not in mesh.varies_over(split_array):
            _check_types(function, "vocab_axis_name", axis)
            rule = f"{name} must be split over vocab_axis_name"
            messages.fail(function, rule, f"{name} the same on all devices along {axis!r}", way_out)
        for other, x in of_tokens.items():
            if axis in mesh.varies_over(x):
                rule = f"{other} must be the same on all devices along vocab_axis_name"
                messages.fail(function, rule, f"{other} that varies over {axis!r}")
    arrays = (split_array, *of_tokens.values())
    names = [other for other, x in of_tokens.items() if x is not None]
    given = mesh.varies_over(arrays)
    for axis in token_axes:
        if axis not in given:
            _check_types(function, "token_axis_name", axis)
            messages.fail(
                function,
                "the tokens must be split over token_axis_name",
                f"{', '.join((name, *names))} the same on all devices along {axis!r}",
                way_out,
            )


def check_pairs_split(function: str, x: Array, y: Array, token_axes: Axes) -> None:
    """Each device must have its own rows of both: types say what gradients are sums over."""
    for axis in token_axes:
        for name, v in (("x", x), ("y", y)):
            if axis not in mesh.varies_over(v):
                _check_types(function, "token_axis_name", axis)
                rule = f"{name} must be split over token_axis_name"
                got = f"{name} the same on all devices along {axis!r}"
                messages.fail(function, rule, got, "Split it in in_specs.")


def _check_types(function: str, name: str, axis: str) -> None:
    """Refuses where no type says what is split over the axis, so that nothing is known of it."""
    if not mesh.is_typed(axis):
        rule = f"{name} needs types that say what is split over {axis!r}"
        got = "none, as inside of jax.pmap and of shard_map with check_vma=False"
        ways = ("For that keep shard_map's check_vma=True", _by_hand(function, name, axis))
        messages.fail(function, rule, got, f"{', or '.join(filter(None, ways))}.")


def _by_hand(function: str, name: str, axis: str) -> str:
    """What takes the place of ``token_axis_name``; nothing does of ``vocab_axis_name``."""
    if name != "token_axis_name":
        return ""
    if function in ("metric_sums", "total_weight"):
        return f"leave {name} out and write jax.lax.psum({function}(...), {axis!r})"
    divisor = "the tokens' weights" if "divergence" in function else "total_weight(...)"
    return (
        f"leave {name} out: take reduction='sum', divide it by jax.lax.psum of {divisor} over "
        f"{axis!r}, differentiate that, and jax.lax.psum the loss and its gradients"
    )
