"""Print what the named extras of pyproject.toml require, one a line: libraries get a layer of their own."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
wanted = [
    *project["dependencies"],
    *(each for extra in sys.argv[1:] for each in project["optional-dependencies"][extra]),
]
sys.stdout.write("\n".join(wanted) + "\n")
