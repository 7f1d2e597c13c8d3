"""An environment for each client: onnxruntime-genai, for one, brings an onnxruntime over that of others."""

import os
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

CLIENTS = Path(__file__).parent / "clients"

PYTHON: dict[str, tuple[str, ...]] = {
    "genai": ("onnxruntime-genai", "onnxruntime", "numpy"),
    "peft": ("peft", "transformers", "torch", "safetensors", "numpy"),
    "vllm_rules": ("safetensors", "numpy", "regex"),
}
"""Packages of each client in Python."""

NODE = "@huggingface/transformers"


def run_client(client: str, exported: Path, place: Path) -> subprocess.CompletedProcess[str]:
    """Make the environment of a client in `place`, unless it is there, and run the client on the folder `exported`."""
    if client == "transformers_js":
        return _run(["node", str(CLIENTS / "run_transformers_js.mjs"), str(exported)], _node(place / client))
    python = _python(place / client, PYTHON[client])
    further = [str(_wheel(python, place / client))] if client == "vllm_rules" else []
    return _run([str(python), str(CLIENTS / f"run_{client}.py"), str(exported), *further], place)


def _python(place: Path, packages: Sequence[str]) -> Path:
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    return python


def _wheel(python: Path, place: Path) -> Path:
    """vLLM's wheel, which is read and not installed: its packages are gigabytes."""
    found = sorted(place.glob("vllm-*.whl"))
    if not found:
        command = [str(python), "-m", "pip", "download", "-q", "--no-deps", "--dest", str(place), "vllm"]
        subprocess.run(command, check=True)
        found = sorted(place.glob("vllm-*.whl"))
    return found[0]


def _node(place: Path) -> Path:
    if not (place / "node_modules").is_dir():
        place.mkdir(parents=True, exist_ok=True)
        (place / "package.json").write_text('{"private": true}\n', encoding="utf-8")
        # What it would fetch besides is for GPUs.
        subprocess.run(["npm", "install", "--silent", "--ignore-scripts", NODE], cwd=place, check=True)
    return place


def _run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)
