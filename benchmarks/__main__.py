"""Run one benchmark by its name: python -m benchmarks NAME [options]."""

import importlib
import pkgutil
import sys

import benchmarks


def main() -> None:
    """Pass the options to `main` of the module (or package) that carries the name."""
    helpers = {"__main__", "rows"}
    names = sorted({m.name for m in pkgutil.iter_modules(benchmarks.__path__)} - helpers)
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        sys.exit(f"usage: python -m benchmarks NAME [options]; NAME is one of {', '.join(names)}")
    importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
