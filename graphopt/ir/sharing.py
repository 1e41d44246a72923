"""Which arguments' memory the results of an op lie in: the one table that all others read."""

from __future__ import annotations

import functools
from typing import Any

import torch

# Kernels whose results are views although their schema doesn't say so.
_UNANNOTATED = frozenset("_unsafe_view unsafe_split unsafe_split_with_sizes unsafe_chunk".split())
# Ops whose schema says "may alias": the sizes decide whether they copy.
MAYBE_VIEWS = frozenset("reshape contiguous _reshape_copy".split())


def opname(target: Any) -> str:
    """The op's name without namespace, overload and the underscore of in-place ops."""
    return target._opname.rstrip("_") if isinstance(target, torch._ops.OpOverload) else str(target)


@functools.cache
def shared_arguments(target: torch._ops.OpOverload) -> frozenset[str]:
    """Names of the arguments in whose memory a result may lie."""
    schema = target._schema
    if opname(target) in _UNANNOTATED:
        return frozenset([schema.arguments[0].name])
    infos = [result.alias_info for result in schema.returns if result.alias_info is not None]
    names = [{*info.before_set, *info.after_set} for info in infos]
    # A list of views (of `split`, `unbind`) has an annotation without a name.
    anywhere = any(not known or "*" in known for known in names)
    returned = set().union(*names)
    return frozenset(
        argument.name
        for argument in schema.arguments
        if argument.alias_info is not None
        and infos
        and (anywhere or returned & set(argument.alias_info.before_set))
    )


@functools.cache
def gives_only_aliases(target: torch._ops.OpOverload) -> bool:
    """Whether every result lies, or may lie, in the memory of an argument."""
    returns = target._schema.returns
    if opname(target) in _UNANNOTATED:
        return True
    return bool(returns) and all(result.alias_info is not None for result in returns)


@functools.cache
def gives_only_views(target: torch._ops.OpOverload) -> bool:
    """Whether every result is a view of an argument for inputs of any size, and none is written."""
    written = any(
        r.alias_info is not None and r.alias_info.is_write for r in target._schema.returns
    )
    return gives_only_aliases(target) and not written and opname(target) not in MAYBE_VIEWS
