"""Packages as `pip install` leaves them, as far as entry points go: no network, no environment of their own."""

import tomllib
from pathlib import Path

EXAMPLE = Path(__file__).parent / "example_package"


def install(folder: Path, name: str, points: dict[str, str], group: str = "qrlora_deploy.exporters") -> None:
    """Write the `dist-info` of a package that registers entry points into a folder of `sys.path`."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{point} = {value}" for point, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")


def install_example(folder: Path) -> None:
    """The example package: its module and what its pyproject.toml registers."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text("utf-8"))["project"]
    ((group, points),) = project["entry-points"].items()
    install(folder, project["name"], points, group)
    for module in EXAMPLE.glob("*.py"):
        (folder / module.name).write_text(module.read_text("utf-8"))
