"""What a program consists of, and what it takes: equations, products, memory, messages."""

import re
from math import prod

import jax


def jit_quickly(f):
    """``jax.jit``, whose LLVM does not optimise: for what is compiled once and run once on a few
    numbers, and judged by no more than its values. A third of the time goes."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def temporary_mib(f, args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes / 2**20


def moved_sizes(text):
    """The sizes of what a compiled program's devices send each other, but for sums."""
    moved = r"= \S+?\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)(?:-start)?\("
    return [prod(int(n) for n in dims.split(",") if n) for dims in re.findall(moved, text)]


def equations(f, *args):
    """Every equation in the program of ``f``, loop bodies once."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn
            for value in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    return walk(jax.make_jaxpr(f)(*args).jaxpr)


def products(f, *args):
    return sum(eqn.primitive.name == "dot_general" for eqn in equations(f, *args))
