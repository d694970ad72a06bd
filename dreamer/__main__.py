"""`python -m dreamer` is `dreamer`. Run as a file, it is the program that this file belongs to, whatever lies around.

Python puts the working folder before everything else for `-m`: a random.py or jax.py there would be imported in place
of the real one. So it leaves the path here, and comes back, last, only with an environment of the user's that is looked
for there.
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
        with contextlib.suppress(FileNotFoundError):  # a working folder that is gone was never put there
            if sys.path[0] == os.getcwd():
                del sys.path[0]
    if os.path.dirname(folder) not in sys.path:
        sys.path.append(os.path.dirname(folder))  # for the processes of environments


if __name__ == "__main__":
    find_this_package()

    from dreamer.cli import main

    sys.exit(main())
