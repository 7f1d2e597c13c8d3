"""PEFT: LoRA folders; transformers: the merged folder. Both by `generate`, on a batch padded on the left.

python run_peft.py FOLDER
"""

from typing import Any

import torch
from expected import Expected, here
from peft import PeftModel
from transformers import AutoModelForCausalLM


def answer(expected: Expected, model: Any) -> list[list[int]]:
    """Greedy tokens of each row."""
    longest = max(map(len, expected.prompts))
    gaps = [longest - len(prompt) for prompt in expected.prompts]
    pairs = list(zip(gaps, expected.prompts, strict=True))
    ids = torch.tensor([[expected.padding] * gap + prompt for gap, prompt in pairs])
    mask = torch.tensor([[0] * gap + [1] * len(prompt) for gap, prompt in pairs])
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=expected.steps,
        do_sample=False,
        pad_token_id=expected.padding,
    )
    return [row[longest:].tolist() for row in found]


if __name__ == "__main__":
    held = here()
    base = AutoModelForCausalLM.from_pretrained(held.base, dtype=torch.float32, trust_remote_code=False).eval()
    first, *others = held.names[1:]
    adapted = PeftModel.from_pretrained(base, str(held.folder / f"{first}-peft"), adapter_name=first).eval()
    for name in others:
        adapted.load_adapter(str(held.folder / f"{name}-peft"), adapter_name=name)
    for name in held.names[1:]:
        adapted.set_adapter(name)
        for prompt, tokens in enumerate(answer(held, adapted)):
            held.compare("--format peft in PEFT", name, prompt, tokens)
    with adapted.disable_adapter():
        for prompt, tokens in enumerate(answer(held, adapted)):
            held.compare("--format peft in PEFT", "base", prompt, tokens)
    whole = AutoModelForCausalLM.from_pretrained(
        held.folder / "acme-merged", dtype=torch.float32, trust_remote_code=False
    ).eval()
    for prompt, tokens in enumerate(answer(held, whole)):
        held.compare("merge, in transformers", "acme", prompt, tokens)
    held.report("peft", "transformers", "torch")
