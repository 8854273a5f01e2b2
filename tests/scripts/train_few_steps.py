"""Run by tests/test_wheel.py in an environment that holds only the installed wheel, from a folder outside the repository.

usage: train_few_steps.py PACKAGE_FILE...     the package's files that are not modules, relative to the package
"""
import importlib, pkgutil, sys
from importlib.resources import files
from pathlib import Path

import cbnb

package = Path(cbnb.__file__).parent
assert package.is_relative_to(sys.prefix), f"cbnb comes from {package}, not from the installed wheel"

names = [m.name for m in pkgutil.walk_packages(cbnb.__path__, "cbnb.") if not m.name.endswith("__main__")]
for name in names: importlib.import_module(name)

for name in sys.argv[1:]:
    assert files("cbnb").joinpath(name).is_file(), f"the wheel lacks {name}"

print(f"cbnb {cbnb.__version__}: {len(names)} modules, {len(sys.argv) - 1} data files")
