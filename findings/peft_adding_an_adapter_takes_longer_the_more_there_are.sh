#!/usr/bin/env bash
# PEFT 0.21.2: `add_adapter` walks over every adapter that is there already, in each layer, so that adding n of them takes
# time by n squared: on a base of six layers with LoRA on four of them the 125th takes seven times as long as the first,
# and 600 take two minutes. Seen with LoRA on Linux, Python 3.11. Calls are counted
# here, since times are the machine's.
#
# Expected: a further adapter, which changes no other one, costs about what the first one did.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check peft==0.21.2 torch==2.13.0 transformers==5.23.0
"$scratch/venv/bin/python" - <<'PYTHON'
import sys
import peft, torch

base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
config = peft.LoraConfig(r=2, target_modules=["0", "1"])
model = peft.get_peft_model(base, config, adapter_name="a0")

def calls_of(name):
    count = 0
    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")
    sys.setprofile(profile)
    model.add_adapter(name, config)
    sys.setprofile(None)
    return count

calls = [calls_of(f"a{number}") for number in range(1, 161)]
found = {number: calls[number - 1] for number in (1, 10, 40, 160)}
print(f"peft {peft.__version__}: calls of Python that adding the n-th adapter takes: {found}")
if not (calls[159] > 2.5 * calls[39] > 2.5 * calls[0]):
    sys.exit("the behaviour changed")
PYTHON
