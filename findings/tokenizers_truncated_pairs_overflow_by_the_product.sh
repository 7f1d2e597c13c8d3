#!/usr/bin/env bash
# tokenizers 0.23.3: encoding a pair of texts with truncation makes the overflowing parts of both texts in all
# combinations, whether or not they are asked for. Their number, and with it time and memory, grows with the product
# of both lengths; for a single text it grows with the length. So a bound of 16 tokens does not bound the work.
# The sizes here are small on purpose. Seen on Linux, Python 3.11.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.3
cd "$scratch"
"$scratch/venv/bin/python" - <<'PYTHON'
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers

tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.enable_truncation(16)
single, pair = [], []
for words in (80, 160, 320):
    single.append(len(tokenizer.encode("a " * words).overflowing))
    pair.append(len(tokenizer.encode("a " * words, "b " * words).overflowing))
print("tokenizers", tokenizers.__version__, "overflowing parts at 80, 160 and 320 words")
print("single text:", single)
print("pair:       ", pair)
# Twice the words: about twice as many parts of a single text, about four times as many of a pair.
assert all(1.8 < later / earlier < 2.4 for earlier, later in zip(single, single[1:])), "the behaviour changed"
assert all(3.4 < later / earlier < 5.0 for earlier, later in zip(pair, pair[1:])), "the behaviour changed"
PYTHON
