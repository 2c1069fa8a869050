"""What our operations cost, for torch's flop counter. The counter imports Triton, which takes longer than all of this
package, so it is not imported here: the formulas are registered when somebody else imports it."""

import functools
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

COUNTER = "torch.utils.flop_counter"
_waiting: dict[object, Callable] = {}  # operation -> formula


def register_flop_formula(operation: object) -> Callable[[Callable], Callable]:
    """Return a decorator that registers a formula, as the function of that name in torch.utils.flop_counter does."""
    if COUNTER in sys.modules:
        return sys.modules[COUNTER].register_flop_formula(operation)
    return functools.partial(_waiting.setdefault, operation)


class _AfterImport(MetaPathFinder):
    """Finds the counter's module as the others do, and registers the formulas when it has been run."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        run = spec.loader.exec_module

        def run_and_register(module) -> None:
            run(module)
            for operation, formula in _waiting.items():
                module.register_flop_formula(operation)(formula)

        spec.loader.exec_module = run_and_register
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _AfterImport())
