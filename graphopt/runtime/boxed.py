"""Graph modules that own their arguments: a value dies at its last use, inputs included.

This is the seam between a planned graph and what runs it: a graph module goes in, a callable that
takes one list (and empties it) comes out. Another code generator takes its place by `compiler`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.graph import CodeGen

BoxedCallable = Callable[[list[Any]], tuple[Any, ...]]


class BoxedCodeGen(CodeGen):
    """Generates `forward(self, args)`, which clears the list `args` after unpacking it."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_: Any) -> str:
        """The function head; the body is FX's own, which drops values after their last use."""
        names = [v.split(":")[0].split("=")[0].strip() for v in free_vars if v != "self"]
        head = f"def {self._func_name}(self, args){maybe_return_annotation}:"
        if not names:
            return head
        return f"{head}\n    {', '.join(names)}, = args\n    args.clear()"


def run_boxed(module: fx.GraphModule) -> BoxedCallable:
    """The default compiler: FX's generated Python."""
    module.graph.set_codegen(BoxedCodeGen())
    module.recompile()
    # `forward`, not the module: profilers and FLOP counters hook module calls.
    return module.forward
