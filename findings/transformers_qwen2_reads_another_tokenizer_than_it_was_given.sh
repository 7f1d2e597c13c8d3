#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer of a folder whose config.json says model_type "qwen2" does not use the tokenizer
# that tokenizer.json describes: it builds a Qwen2Tokenizer, with Qwen's own way of splitting text and a token more,
# over the saved vocabulary. The same folder with model_type "llama" gives the saved tokenizer. So a model of Qwen2's
# shape that was trained with a tokenizer of its own reads other ids after save and load, without an error.
# Seen on Linux, Python 3.11, with tokenizers 0.23.3.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
cd "$scratch"
HF_HUB_OFFLINE=1 "$scratch/venv/bin/python" - <<'PYTHON' 2>/dev/null
import json, pathlib
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

words = ["<pad>", "<unk>", "play", "some", "music", *"abcdefghijklmnopqrstuvwxyz"]
backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
saved = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
text, found = "play some music", {}
for kind in ("llama", "qwen2"):
    folder = pathlib.Path(kind)
    saved.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    loaded = AutoTokenizer.from_pretrained(folder)
    found[kind] = loaded(text)["input_ids"]
    print(f"{kind}: {type(loaded).__name__}, {len(loaded)} tokens, {found[kind]}")
expected = saved(text)["input_ids"]
print(f"transformers {transformers.__version__}; saved: {len(saved)} tokens, {expected}")
assert expected == [2, 3, 4] == found["llama"] and found["qwen2"] != expected, "the behaviour changed"
PYTHON
