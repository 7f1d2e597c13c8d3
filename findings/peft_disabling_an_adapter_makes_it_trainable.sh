#!/usr/bin/env bash
# PEFT 0.21.2: an adapter that was opened for inference (`is_trainable=False`, the default) is frozen; after one
# `with model.disable_adapter():` its weights require gradients. The context enables the adapter again as if it were to
# be trained. Outputs are the same; memory for the graph of gradients is taken, and an optimizer over what can be
# trained would change the adapter. Seen with LoRA on Linux, Python 3.11.
#
# Expected: what can be trained is the same before and after the context.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check peft==0.21.2 torch==2.13.0 transformers==5.23.0
"$scratch/venv/bin/python" - <<'PYTHON'
import sys, tempfile
import peft, torch

def base():
    return torch.nn.Sequential(torch.nn.Linear(4, 4))

with tempfile.TemporaryDirectory() as folder:
    peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(folder)
    model = peft.PeftModel.from_pretrained(base(), folder)

def trainable():
    return sum(parameter.requires_grad for parameter in model.parameters())

before = trainable()
with model.disable_adapter():
    pass
print(f"peft {peft.__version__}: {before} tensors can be trained before, {trainable()} after disable_adapter()")
if not (before == 0 and trainable() > 0):
    sys.exit("the behaviour changed")
PYTHON
