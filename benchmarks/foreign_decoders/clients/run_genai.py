"""onnxruntime-genai: a customer in each row, customers by adapters, and one folded in.

python run_genai.py FOLDER
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime_genai as og
from expected import Expected, here


def answer(expected: Expected, model: Any, prompts: list[list[int]], set_up: Callable[[Any], None]) -> list[list[int]]:
    """Greedy tokens of each row of one batch of prompts of different lengths."""
    longest = max(map(len, prompts))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(batch_size=len(prompts), max_length=longest + expected.steps, do_sample=False)
    generator = og.Generator(model, parameters)
    set_up(generator)
    padded = [prompt + [expected.padding] * (longest - len(prompt)) for prompt in prompts]
    generator.append_tokens(np.array(padded, np.int32))
    found = []
    while len(found) < expected.steps and not generator.is_done():
        generator.generate_next_token()
        found.append(np.array(generator.get_next_tokens()))
    return np.stack(found, axis=1).tolist()  # type: ignore[no-any-return]


def rows(expected: Expected) -> None:
    """Every customer with every prompt, in one batch."""
    model = og.Model(str(expected.folder / "rows"))
    # Both are held until the last token: the generator keeps their addresses alone.
    table = np.load(expected.folder / "table.npy")
    pairs = [(slot, prompt) for slot in range(len(expected.names)) for prompt in range(len(expected.prompts))]
    slots = np.array([slot for slot, _ in pairs], np.int64)

    def customers(generator: Any) -> None:
        generator.set_model_input("coefficient_table", table)
        generator.set_model_input("slot", slots)

    found = answer(expected, model, [expected.prompts[prompt] for _, prompt in pairs], customers)
    for (slot, prompt), tokens in zip(pairs, found, strict=True):
        expected.compare("rows: a customer in each row", expected.names[slot], prompt, tokens)
    tokenizer = og.Tokenizer(model)
    for text, prompt in zip(expected.texts, expected.prompts, strict=True):
        same = tokenizer.encode(text).tolist() == prompt
        expected.note("the tokenizer", "" if same else f"{text!r} has other tokens")


def drop_in(expected: Expected) -> None:
    """The base, and a customer at a time."""
    model = og.Model(str(expected.folder / "drop-in"))
    adapters = og.Adapters(model)
    for name in expected.names[1:]:
        adapters.load(str(expected.folder / f"{name}.onnx_adapter"), name)
    for name in expected.names:

        def choose(generator: Any, name: str = name) -> None:
            if name in expected.names[1:]:
                generator.set_active_adapter(adapters, name)

        for prompt, tokens in enumerate(answer(expected, model, expected.prompts, choose)):
            expected.compare("drop-in: a customer a batch, by adapters", name, prompt, tokens)


def merged(expected: Expected) -> None:
    """One customer folded in; a prompt in two pieces, too."""
    model = og.Model(str(expected.folder / "merged"))
    for prompt, tokens in enumerate(answer(expected, model, expected.prompts, lambda generator: None)):
        expected.compare("merged", "acme", prompt, tokens)


if __name__ == "__main__":
    held = here()
    rows(held)
    drop_in(held)
    merged(held)
    held.report("onnxruntime-genai", "onnxruntime")
