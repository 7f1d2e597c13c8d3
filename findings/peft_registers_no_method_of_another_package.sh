#!/usr/bin/env bash
# PEFT 0.21.2: `register_peft_method` is documented as the way to make a method known, and refuses every method that is
# not part of PEFT: its name must be a member of the enumeration PeftType, which cannot be extended from outside. The
# same method works whole (from_pretrained, several adapters, mixed batches, merge) once it stands in PEFT's three
# tables: PeftType, and the mappings of configs and tuners.
# Seen on Linux, Python 3.11.
#
# Expected: a new name is registered, and one that is taken is refused.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check peft==0.21.2 torch==2.13.0 transformers==5.23.0
"$scratch/venv/bin/python" - <<'PYTHON'
import sys
import peft
from peft.utils import register_peft_method

class MyConfig(peft.PeftConfig): ...
class MyModel(peft.LoraModel): ...

try:
    register_peft_method(name="mymethod", config_cls=MyConfig, model_cls=MyModel, prefix="mymethod_")
except ValueError as error:
    print(f"peft {peft.__version__}: {error}")
else:
    sys.exit("the behaviour changed: the method was registered")
PYTHON
