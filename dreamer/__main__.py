"""`python -m dreamer` is `dreamer`. Run as a file, it starts the package it belongs to, whatever else is nearby.

With `-m`, Python searches the working folder first: a random.py or jax.py there would be imported in place of the real
one. So the folder is taken off the path here, and comes back, at the end, only to look for a user's environment there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys


def find_this_package() -> None:
    """Makes `import dreamer` mean the package of this file, and takes the working folder off the path."""
    folder = os.path.dirname(os.path.realpath(__file__))
    if not __package__:
        place = os.path.join(folder, "__init__.py")
        spec = importlib.util.spec_from_file_location("dreamer", place, submodule_search_locations=[folder])
        assert spec is not None and spec.loader is not None
        sys.modules["dreamer"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["dreamer"])
    elif not sys.flags.safe_path:
        with contextlib.suppress(FileNotFoundError):  # a deleted working folder was never put there
            if sys.path[0] == os.getcwd():
                del sys.path[0]
    if os.path.dirname(folder) not in sys.path:
        sys.path.append(os.path.dirname(folder))  # for the worker processes of environments


if __name__ == "__main__":
    find_this_package()

    from dreamer.cli import main

    sys.exit(main())
