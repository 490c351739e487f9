"""What a future is worth: an expression over curves of it, or a function of what is seen.

    mean(tool_z) - 0.5 * max(abs(wrist))        names of proprioception, and of a readout's quantities
    last(box_z) > 0.1
    my_rewards:upright                          module:callable

Shapes: N futures, T frames (latent ones for proprioception), S proprio dims.
"""

import ast
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidworld.errors import ConfigError
from vidworld.evaluation.policy import import_callable

OVER_FRAMES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda curve: curve.mean(-1, keepdim=True),
    "sum": lambda curve: curve.sum(-1, keepdim=True),
    "last": lambda curve: curve[..., -1:],
    "min": lambda curve: curve.amin(-1, keepdim=True),
    "max": lambda curve: curve.amax(-1, keepdim=True),
}
OF_EACH: Mapping[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "log": torch.log,
}
OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
    ast.Gt: lambda a, b: (a > b) * 1.0,
    ast.Lt: lambda a, b: (a < b) * 1.0,
    ast.GtE: lambda a, b: (a >= b) * 1.0,
    ast.LtE: lambda a, b: (a <= b) * 1.0,
}
_FUNCTION = re.compile(r"[\w.]+:[\w.]+")


class Expression:
    """A reward [N] as an expression over curves [N, T]; what still is a curve in the end is averaged.

    + - * / ** and comparisons (1 where true), abs, sqrt, exp, log, and over frames mean, sum, last, min, max.
    A name that Python would not take stands in quotes. It is read, not run: nothing else is possible.
    Raises ConfigError for what is not of it.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ConfigError("--reward", got=text, expected="an expression, or module:callable") from None
        self.names = frozenset(self._check(self._tree))

    def __call__(self, curves: Mapping[str, Tensor]) -> Tensor:
        """Rewards [N]; raises ConfigError for a name that is not among the curves."""
        for name in sorted(self.names):
            if name not in curves:
                near = difflib.get_close_matches(name, curves, n=1)
                raise ConfigError(
                    f"name {name!r} in --reward",
                    expected=", ".join(curves) or "nothing that can be rewarded",
                    fix=f"did you mean {near[0]!r}?" if near else None,
                )
        try:
            found = self._value(self._tree, curves)
        except ArithmeticError as error:
            raise ConfigError("--reward", got=self.text, expected="a number", fix=str(error)) from None
        batch = len(next(iter(curves.values())))
        value = found if isinstance(found, Tensor) else torch.tensor([[float(found)]])
        return value.mean(-1).expand(batch)

    def _check(self, node: ast.AST) -> set[str]:
        match node:
            case ast.Constant(value=str(name)) | ast.Name(id=name):
                return {name}
            case ast.Constant(value=int() | float()):
                return set()
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return self._check(left) | self._check(right)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in OPERATORS:
                return self._check(left) | self._check(right)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                return self._check(operand)
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in {
                *OVER_FRAMES,
                *OF_EACH,
            }:
                return self._check(argument)
        raise ConfigError(
            "--reward",
            got=ast.unparse(node),
            expected=f"numbers, names, + - * / ** < >, {', '.join([*OVER_FRAMES, *OF_EACH])} of one curve",
        )

    def _value(self, node: ast.AST, curves: Mapping[str, Tensor]) -> Any:
        match node:
            case ast.Constant(value=str(name)) | ast.Name(id=name):
                return curves[name]
            case ast.Constant(value=int() | float() as value):
                return float(value)
            case (
                ast.BinOp(left=left, op=op, right=right)
                | ast.Compare(left=left, ops=[op], comparators=[right])
            ):
                return OPERATORS[type(op)](self._value(left, curves), self._value(right, curves))
            case ast.UnaryOp(op=op, operand=operand):
                value = self._value(operand, curves)
                return -value if isinstance(op, ast.USub) else value
            case ast.Call(func=ast.Name(id=name), args=[argument]):
                value = torch.as_tensor(self._value(argument, curves))
                return {**OVER_FRAMES, **OF_EACH}[name](value if value.ndim else value[None, None])
        raise AssertionError(f"an unchecked node {node}")


class Function:
    """A reward by `module:callable`, called with one future as a policy sees it, with time in front.

    A dict of numpy arrays: `observation/VIEW` [T, H, W, 3], `observation/state` [T, S] in units, `actions`
    [T, A], `prompt`. It returns a number, or one a frame, of which the mean is taken.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._function = import_callable(name, "--reward")

    def __call__(self, future: Mapping[str, Any]) -> float:
        """The reward of one future; raises ConfigError for an answer that is none."""
        answer = self._function(future)
        try:
            values = np.asarray(answer, np.float64)
        except (TypeError, ValueError):
            values = np.array(np.nan)
        if values.ndim > 1 or not values.size or not np.isfinite(values).all():
            raise ConfigError(
                "answer of the reward", where=self.name, got=repr(answer)[:60], expected="finite numbers"
            )
        return float(values.mean())


def parse_reward(text: str) -> Expression | Function:
    """A reward from the command line; raises ConfigError."""
    return Function(text) if _FUNCTION.fullmatch(text.strip()) else Expression(text)
