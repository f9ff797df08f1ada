"""Code that a scenario names by its file runs on a node only if the node's operator allowed that very file.

Nothing is downloaded: the operator puts a copy into a folder of the node and names its digest. So a server that was
taken over can start plug-ins that are there, and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trellis import scenario
from trellis.errors import PluginError, TrellisError
from trellis.scenario import Scenario
from trellis.wire.nodes import digest


class Consent:
    """Makes scenarios refer to the operator's copies of plug-in files.

    Args:
        allowed: digests of files, ``sha256:`` and 64 hexadecimal digits.
        folder: where the copies are, by file name.

    Raises:
        TrellisError: a digest is not one, or there are digests and no folder.
    """

    def __init__(self, allowed: Sequence[str] = (), folder: Path | None = None) -> None:
        for each in allowed:
            name, _, rest = each.partition(":")
            if name != "sha256" or len(rest) != 64 or set(rest) - set("0123456789abcdef"):
                raise TrellisError("usage", f"--allow-code is {each!r}; it is like sha256:9f86d0… (`sha256sum FILE`)")
        if allowed and folder is None:
            raise TrellisError("usage", "--allow-code needs --code with the folder that holds the files")
        self.allowed, self.folder = set(allowed), folder

    def __call__(self, given: Scenario) -> Scenario:
        """Return the scenario with every plug-in file replaced by the operator's copy.

        Raises:
            PluginError: it names a file that is not allowed here.
        """
        raw = scenario.plain(given)
        raw["base"] = str(self.folder.resolve()) if self.folder else ""
        for key in scenario.COMPONENTS.values():
            self._replace(raw[key], key)
        return scenario.validated(Scenario, raw)

    def _replace(self, component: dict[str, object], key: str) -> None:
        """Replace the file that a component names, and those of components inside its parameters."""
        name = component.get("name")
        if isinstance(name, str) and ".py:" in name:
            file, _, cls = name.partition(":")
            component["name"] = f"{self._copy(Path(file).name, name, key)}:{cls}"
        for value in list(component.values()):
            if isinstance(value, dict):
                self._replace(value, key)

    def _copy(self, file: str, name: str, key: str) -> str:
        path = self.folder / file if self.folder else None
        if path is not None and path.is_file() and digest(path.read_bytes()) in self.allowed:
            return file
        why = "it has no copy of it" if path is None or not path.is_file() else "the copy's digest is not on its list"
        raise PluginError(
            "code-not-allowed",
            f"{key} is {name!r}, code in a file; this node was not allowed to run it: {why}. Its operator can allow"
            " it with --code FOLDER --allow-code sha256:…",
        )
