"""The README of an exported model."""

from qrlora_deploy.tasks.causal_lm import CausalLM

TEXT = """# {title}

A decoder in {precision} for onnxruntime-genai and transformers.js, written by qrlora-deploy: {what}
`genai_config.json` is for the former, `config.json` and `onnx/model.onnx` for the latter. Inputs are `input_ids`,
`attention_mask` (int64, padding on either side) and `past_key_values.N.key` and `.value`; `logits [batch, 1, V]` are
those of each row's last token.

{how}
    qrlora-deploy verify --format genai .
"""

WHAT = {
    "rows": "any customer of its base in any row of a batch.",
    "drop-in": "its base as it is, and customers by ONNX Runtime's adapters, one for a whole batch.",
    "merged": "one customer folded into its base.",
}

HOW = {
    "rows": """```python
generator = og.Generator(model, parameters)
table = np.zeros((customers, {width}), np.float32)  # a row a customer; hold it, the generator does not
slots = np.array([0, 1], np.int64)                  # of each row of the batch; hold it, too
generator.set_model_input("coefficient_table", table)
generator.set_model_input("slot", slots)            # both before append_tokens
generator.append_tokens(prompts)
```
""",
    "drop-in": """```python
adapters = og.Adapters(model)
adapters.load("acme.onnx_adapter", "acme")  # qrlora-deploy export --format onnx-adapter
generator = og.Generator(model, parameters)
generator.set_active_adapter(adapters, "acme")  # without it the base answers
```
""",
    "merged": "",
}


def readme_of(variant: str, precision: str, width: int) -> str:
    """The text.

    Args:
        variant: "rows", "drop-in" or "merged".
        precision: of the graph.
        width: columns of the coefficient table.
    """
    how = HOW[variant].format(width=width)
    return TEXT.format(title=CausalLM.name, precision=precision, what=WHAT[variant], how=how)
