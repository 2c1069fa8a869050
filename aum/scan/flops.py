"""What our operations cost, for torch's flop counter. The counter imports Triton, which takes longer than all of this
package, so that it is not imported here: the formulas are registered once somebody else imports it."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

COUNTER = "torch.utils.flop_counter"
_formulas: dict[object, Callable] = {}


def register_flop_formula(operation: object) -> Callable[[Callable], Callable]:
    """Return a decorator that registers a formula, as the function of that name in torch.utils.flop_counter does."""

    def register(formula: Callable) -> Callable:
        _formulas[operation] = formula
        if COUNTER in sys.modules:
            _register_all(sys.modules[COUNTER])
        return formula

    return register


def _register_all(counter: ModuleType) -> None:
    for operation, formula in _formulas.items():
        if operation not in counter.flop_registry:
            counter.register_flop_formula(operation)(formula)


class _AfterImport(MetaPathFinder):
    """Finds the counter's module as the others do, and registers the formulas when it has been run."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register_all(module)

        spec.loader.exec_module = run_and_register
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _AfterImport())
