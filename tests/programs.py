"""``python tests/programs.py --against COMMIT``: whether the compiled programs are still the same.

Some 170 public calls are compiled for a CPU, for eight CPU devices and, as far as their jaxpr, for
a GPU and a TPU with kernels. Of each program a digest is compared with that of another commit, and
the bytes of temporary memory. What only moves code changes no digest: then it has changed no digit,
and no time on the device.

A digest is a hash of the program's dataflow: of each instruction its opcode, type, attributes and
operands, with constants whole and without names, metadata or order. The CPU's programs hold no
branch for another platform, and no kernel: those of the kernels' backends are compared as jaxprs.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
from chips import kernels_of
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxlib import _hlo

import jaxloss

# Digests


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) (?:\([^\n]*\) -> [^\n]*)?\{$", re.MULTILINE)
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_NAME = re.compile(r"%[\w.-]+")


def _opened(text: str) -> tuple[str, str, str]:
    """(type and opcode, operands, attributes) of ``f32[2]{0} add(%a, %b), metadata={...}``."""
    depth, start = 0, None
    for found in re.finditer(r"[()]|[\w-]+\(", text):
        piece = found.group()
        if piece == ")":
            depth -= 1
            if depth == 0 and start is not None:
                return text[:start], text[start + 1 : found.start()], text[found.end() :]
        else:
            # A tuple's type is in brackets too; an opcode's follow its name.
            if depth == 0 and len(piece) > 1:
                start = found.end() - 1
            depth += 1
    raise ValueError(text)


def dataflow_digest(text: str) -> str:
    """Of a module as XLA prints it. Names, order and metadata do not count."""
    bodies, entry = {}, None
    for block in re.split(r"\n\n+", text):
        lines = block.strip("\n").split("\n")
        head = _HEAD.match(lines[0])
        if head:
            bodies[head.group(1)] = lines[1:]
            entry = head.group(1) if lines[0].startswith("ENTRY") else entry

    of_computation: dict[str, str] = {}

    def computation(name: str) -> str:
        if name not in of_computation:
            of_computation[name] = _computation_digest(bodies[name], computation)
        return of_computation[name]

    assert entry is not None
    return computation(entry)


def _computation_digest(lines: list[str], computation) -> str:
    digests: dict[str, str] = {}
    root, effects = "", []
    for line in lines:
        found = _LINE.match(line)
        if not found:
            continue
        is_root, name, rest = found.groups()
        kind, operands, attributes = _opened(rest)
        if kind.endswith(("constant", "parameter", "iota")):
            given = operands
        else:
            given = _NAME.sub(lambda m: digests[m.group()[1:]], operands)
        attributes = re.sub(
            r"(, )?(metadata|frontend_attributes|control-predecessors)=\{[^}]*\}", "", attributes
        )
        attributes = _NAME.sub(lambda m: computation(m.group()[1:]), attributes)
        attributes = re.sub(r"channel_id=\d+", "", attributes)
        digests[name] = _hash(kind, given, attributes)
        if "side_effect" in attributes:
            effects.append(digests[name])
        root = digests[name] if is_root else root
    return _hash(root, *sorted(effects))


def compiled(function, *args) -> tuple[str, int]:
    """(digest, temporary bytes). LLVM's own work comes after, and takes longest."""
    options = {"xla_backend_optimization_level": 0}
    program = jax.jit(function, compiler_options=options).lower(*args).compile()
    printed = _hlo.HloPrintOptions()
    printed.print_large_constants, printed.print_metadata = True, False
    module = program.runtime_executable().hlo_modules()[0].to_string(printed)
    return dataflow_digest(module), program.memory_analysis().temp_size_in_bytes


def traced(function, *args) -> tuple[str, int]:
    """(digest of the jaxpr, 0): where the device is not there."""
    text = str(jax.make_jaxpr(function)(*args))
    text = re.sub(r"0x[0-9a-f]+|\bid=\d+|[\w/.-]+\.py:\d+", "", text)
    return _hash(text), 0


# Calls

N, C, D, K = 64, 300, 16, 3
SHAPES = {
    "x": (N, C), "t": (N, C), "q": (N, C), "h": (N, D), "g": (N, D), "k": (D, C), "j": (D, C),
    "b": (C,), "w": (C,), "s": (N,),
}  # fmt: skip


def arrays(dtype):
    """Shapes and dtypes of every operand by its letter."""
    own = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in SHAPES.items()}
    for name in ("w", "s"):
        own[name] = jax.ShapeDtypeStruct(SHAPES[name], jnp.float32)
    return own | {
        "y": jax.ShapeDtypeStruct((N,), jnp.int32),
        "i": jax.ShapeDtypeStruct((N, K), jnp.int32),
        "p": jax.ShapeDtypeStruct((N, K), jnp.float32),
        "m": jax.ShapeDtypeStruct((N, C), bool),
        "o": jax.ShapeDtypeStruct((N,), bool),
    }


def scalar(out):
    """The sum of what is floating in a tree."""
    leaves = [jnp.sum(v) for v in jax.tree.leaves(out) if jnp.issubdtype(v.dtype, jnp.floating)]
    return sum(v.astype(jnp.float32) for v in leaves)


MODES = {
    "value": lambda f: f,
    "gradient": lambda f: jax.value_and_grad(lambda *args: scalar(f(*args))),
    "gradients": lambda f: jax.grad(lambda *args: scalar(f(*args)), (0, 1)),
    "forward": lambda f: lambda x, *rest: jax.jvp(lambda x: f(x, *rest), (x,), (jnp.cos(x),)),
    "second": lambda f: (
        lambda x, *rest: jax.jvp(
            jax.grad(lambda x: scalar(f(x, *rest))), (x,), (jnp.cos(x),)
        )
    ),
    "vmap": lambda f: lambda *args: jax.vmap(f)(
        *(jnp.stack([a, a[::-1]]) for a in args)
    ),
}  # fmt: skip


def of(function, letters, **options):
    """``function(first, second, rest by name, **options)`` of operands by their letters."""
    names = {"w": "weight", "s": "sample_weight", "m": "where", "b": "bias", "o": "where"}

    def call(*args):
        positional = [a for letter, a in zip(letters, args, strict=True) if letter not in names]
        by_name = {names[n]: a for n, a in zip(letters, args, strict=True) if n in names}
        return function(*positional, **by_name, **options)

    return call, letters


def with_top_k(function, letters, rest, **options):
    """``of`` a function of top-k labels, whose indices and probabilities are ``i`` and ``p``."""

    def of_parts(*args, **named):
        *before, index, probabilities = args
        labels = jaxloss.TopKLabels(index, probabilities, rest=rest)
        return function(*before, labels, **named)

    return of(of_parts, letters, **options)


def _calls():
    ce, linear = jaxloss.cross_entropy, jaxloss.linear_cross_entropy
    every = {"label_smoothing": 0.1, "z_loss": 1e-3, "logit_softcap": 20.0}
    logits = {
        "plain": of(ce, "xy"),
        "none": of(ce, "xy", reduction="none"),
        "sum": of(ce, "xy", reduction="sum"),
        "weight": of(ce, "xyws"),
        "where": of(ce, "xym"),
        "options": of(ce, "xyw", **every),
        "options, where": of(ce, "xywm", **every),
        "statistics": of(ce, "xy", return_stats=True),
        "probabilities": of(ce, "xq"),
        "probabilities, options": of(ce, "xqwm", **every),
        **{
            f"top k, {rest}": with_top_k(ce, "xip", rest)
            for rest in ("drop", "uniform", "bucket")
        },
        "top k, options": with_top_k(ce, "xipwm", "uniform", **every),
        "log_softmax": of(jaxloss.log_softmax, "x"),
        "log_softmax, where": of(jaxloss.log_softmax, "xm"),
        "two steps": of(lambda x, y: jaxloss.nll_loss(jaxloss.log_softmax(x), y), "xy"),
        "token_stats": of(jaxloss.token_stats, "xy", temperature=0.7),
        "focal": of(jaxloss.focal_loss, "xyw"),
        "sigmoid": of(jaxloss.sigmoid_cross_entropy, "xq"),
        "sigmoid focal": of(jaxloss.sigmoid_focal_loss, "xq"),
        **{
            name: of(jaxloss.kl_divergence, "xt", divergence=name, temperature=2.0)
            for name in ("forward", "reverse", "jensen_shannon")
        },
    }  # fmt: skip
    products = {
        f"linear, {name}{', blocks' if blocks else ''}": make(
            implementation="vocab_blocks" if blocks else "token_chunks", chunk_size=24
        )
        for name, make in {
            "plain": partial(of, linear, "hky"),
            "none": partial(of, linear, "hky", reduction="none"),
            "weight, bias": partial(of, linear, "hkywsb"),
            "options": partial(of, linear, "hkywm", return_stats=True, **every),
            "probabilities": partial(of, linear, "hkq"),
            "top k": partial(with_top_k, linear, "hkip", "uniform"),
        }.items()
        for blocks in (False, True)
    } | {
        "linear, bucket": with_top_k(linear, "hkip", "bucket", chunk_size=24),
        "linear, default": of(linear, "hky"),
        "linear statistics": of(jaxloss.linear_token_stats, "hky", chunk_size=24),
        "linear own": of(
            lambda h, k, y: jaxloss.linear_loss(
                partial(jaxloss.focal_loss, reduction="none"), h, k, y, chunk_size=24
            ),
            "hky",
        ),
        "linear divergence": of(
            jaxloss.linear_kl_divergence, "hkgj", divergence="jensen_shannon", chunk_size=24
        ),
    }
    dtypes = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    for (name, (call, letters)), mode in product(logits.items(), ("value", "gradient")):
        for dtype in dtypes:
            yield f"{name}, {mode}, {dtype}", compiled, call, letters, mode, dtypes[dtype]
    for name in ("plain", "options", "probabilities", "log_softmax", "focal", "forward"):
        call, letters = logits[name]
        for mode in ("forward", "second", "vmap"):
            yield f"{name}, {mode}", compiled, call, letters, mode, jnp.float32
    for name, (call, letters) in products.items():
        for mode, dtype in (("value", "bfloat16"), ("gradients", "float32")):
            yield f"{name}, {mode}, {dtype}", compiled, call, letters, mode, dtypes[dtype]
    for name in ("linear, plain", "linear, plain, blocks", "linear divergence"):
        call, letters = products[name]
        for mode in ("forward", "second"):
            yield f"{name}, {mode}", compiled, call, letters, mode, jnp.float32


def _on_a_mesh():
    """Programs of eight devices: explicit axes, and names inside of shard_map."""
    of_axes = {"x": P("d", "v"), "y": P("d"), "h": P("d"), "k": P(None, "v"), "w": P(), "s": P("d")}
    explicit = jax.make_mesh((2, 4), ("d", "v"), axis_types=(AxisType.Explicit,) * 2)
    named = jax.make_mesh((2, 4), ("d", "v"), axis_types=(AxisType.Auto,) * 2)
    names = {"token_axis_name": "d", "vocab_axis_name": "v"}
    losses = {
        "logits": (jaxloss.cross_entropy, "xyws"),
        "chunks": (partial(jaxloss.linear_cross_entropy, chunk_size=8), "hkys"),
        "blocks": (
            partial(jaxloss.linear_cross_entropy, implementation="vocab_blocks", chunk_size=24),
            "hkys",
        ),
        "stored": (
            partial(
                jaxloss.linear_cross_entropy, implementation="stored_exponentials", chunk_size=8
            ),
            "hkys",
        ),
    }
    for name, (loss, letters) in losses.items():
        call, _ = of(loss, letters)
        yield f"{name}, explicit", explicit, MODES["gradient"](call), letters, of_axes
        local, _ = of(partial(loss, **names), letters)
        specs = tuple(of_axes[letter] for letter in letters)
        mapped = jax.shard_map(local, mesh=named, in_specs=specs, out_specs=P())
        yield f"{name}, shard_map", named, MODES["gradient"](mapped), letters, of_axes


def _with_kernels():
    """Large enough for each backend's kernels."""
    x = jax.ShapeDtypeStruct((2**13, 2**12), jnp.bfloat16)
    h, k = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2**13, 512), (512, 2**12)))
    y = jax.ShapeDtypeStruct((2**13,), jnp.int32)
    linear = jaxloss.linear_cross_entropy
    for backend in ("gpu", "tpu"):
        for name, call, args in (
            ("mean", jaxloss.cross_entropy, (x, y)),
            ("none", partial(jaxloss.cross_entropy, reduction="none"), (x, y)),
            ("linear", linear, (h, k, y)),
            ("blocks", partial(linear, implementation="vocab_blocks"), (h, k, y)),
            ("stored", partial(linear, implementation="stored_exponentials"), (h, k, y)),
        ):
            for mode in ("value", "gradient", "second"):
                yield f"{name}, {mode}, {backend}", backend, MODES[mode](call), args


def digests(only: str = "") -> dict[str, tuple[str, int]]:
    out = {}
    real = jax.device_count
    jax.device_count = lambda *_: 1  # the forms of one device, on the first of eight
    for name, digest, call, letters, mode, dtype in _calls():
        if only in name:
            args = [arrays(dtype)[letter] for letter in letters]
            out[name] = digest(MODES[mode](call), *args)
    for name, backend, call, args in _with_kernels():
        if only in name:
            with kernels_of(backend):
                out[name] = traced(call, *args)
    jax.device_count = real
    jax.clear_caches()
    for name, mesh, call, letters, specs in _on_a_mesh():
        if only in name:
            with jax.set_mesh(mesh):
                given = [(arrays(jnp.float32)[letter], specs[letter]) for letter in letters]
                args = [
                    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))
                    for x, spec in given
                ]
                out[name] = compiled(call, *args)
    return out


def _of_commit(commit: str, only: str) -> dict:
    """The digests that this file gives of the package as it was."""
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        git = ("git", "-C", str(root), "worktree")
        subprocess.run([*git, "add", "--quiet", "--detach", folder, commit], check=True)
        try:
            environment = {**os.environ, "PYTHONPATH": folder}
            program = [sys.executable, __file__, "--print", "--only", only]
            run = subprocess.run(program, env=environment, check=True, stdout=subprocess.PIPE)
            return json.loads(run.stdout)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", default="HEAD", help="a commit (default HEAD)")
    parser.add_argument("--only", default="", help="the calls whose names contain this")
    parser.add_argument("--print", action="store_true", help="the digests alone, as JSON")
    args = parser.parse_args()
    # Read when JAX first looks for devices.
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    jax.config.update("jax_platforms", "cpu")
    if args.print:
        print(json.dumps(digests(args.only)))
        return
    before = _of_commit(args.against, args.only)
    after = {name: list(pair) for name, pair in digests(args.only).items()}
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    for name in changed:
        (old, held), (new, holds) = (d.get(name, ("none", 0)) for d in (before, after))
        print(f"{name}: {old} -> {new}, {held} -> {holds} bytes")
    print(f"{len(after) - len(changed)} of {len(after)} programs are equal to {args.against}'s")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
