"""onnxruntime-genai: a customer in each row, customers by adapters, and one folded in. Needs nothing of this project.

    python genai.py FOLDER
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

FOLDER = Path(sys.argv[1])
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
NAMES, PROMPTS = EXPECTED["names"], EXPECTED["prompts"]
STEPS = len(EXPECTED["answers"]["base"][0]["tokens"])


def answers(model, prompts, set_up):
    """Greedy tokens of each row of one batch; an end of text does not end it."""
    longest = max(map(len, prompts))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(
        batch_size=len(prompts), max_length=longest + STEPS, min_length=longest + STEPS, do_sample=False
    )
    generator = og.Generator(model, parameters)
    held = set_up(generator)
    padding = json.loads((FOLDER / "rows/genai_config.json").read_text())["model"]["pad_token_id"]
    generator.append_tokens(np.array([one + [padding] * (longest - len(one)) for one in prompts], np.int32))
    found = []
    for _ in range(STEPS):
        generator.generate_next_token()
        found.append(np.array(generator.get_next_tokens()))
    del held
    return np.stack(found, axis=1).tolist()


def agreement(found, name, prompt):
    """Equal tokens from the first one on, of those that are clearly the likeliest up to the end of the text."""
    expected = EXPECTED["answers"][name][prompt]
    ends = {2, EXPECTED.get("end")}
    sure = expected["sure"]
    for place, token in enumerate(expected["tokens"][:sure]):
        if token in ends:
            sure = place + 1
            break
    return found[:sure] == expected["tokens"][:sure], found[:sure], expected["tokens"][:sure]


def main():
    table = np.load(FOLDER / "table.npy")
    model = og.Model(str(FOLDER / "rows"))
    pairs = [(name, prompt) for name in range(len(NAMES)) for prompt in range(len(PROMPTS))]
    slots = np.array([name for name, _ in pairs], np.int64)

    def rows(generator):
        generator.set_model_input("coefficient_table", table)
        generator.set_model_input("slot", slots)

    found = answers(model, [PROMPTS[prompt] for _, prompt in pairs], rows)
    for (name, prompt), tokens in zip(pairs, found):
        print("rows", NAMES[name], prompt, agreement(tokens, NAMES[name], prompt))
    tokenizer = og.Tokenizer(model)
    print(tokenizer.decode(found[3]), tokenizer.encode(EXPECTED["texts"][0]), PROMPTS[0])
    del model
    model = og.Model(str(FOLDER / "drop-in"))
    adapters = og.Adapters(model)
    for name in NAMES[1:]:
        adapters.load(str(FOLDER / f"{name}.onnx_adapter"), name)
    for name in NAMES:
        found = answers(model, PROMPTS, lambda g: None if name == "base" else g.set_active_adapter(adapters, name))
        for prompt, tokens in enumerate(found):
            print("drop-in", name, prompt, agreement(tokens, name, prompt))
    del adapters, model
    model = og.Model(str(FOLDER / "merged"))
    for prompt, tokens in enumerate(answers(model, PROMPTS, lambda g: None)):
        print("merged", prompt, agreement(tokens, "acme", prompt))


main()
