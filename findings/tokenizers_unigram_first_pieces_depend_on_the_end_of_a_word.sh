#!/usr/bin/env bash
# tokenizers 0.23.3, Unigram: the first pieces of a word depend on how long it goes on, however far that is behind
# them. With pieces of one, two and three times the same letter, whose scores make several ways equally good, a word
# of n such letters begins with another piece for another n. So a long text cannot be cut before it is tokenized
# by looking at its beginning alone, as it can for byte-level BPE. Seen on Linux, Python 3.11.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.3
cd "$scratch"
"$scratch/venv/bin/python" - <<'PYTHON'
import tokenizers
from tokenizers import Tokenizer, models

unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.5), ("aa", -2.0), ("aaa", -3.0)], unk_id=0))
bpe = Tokenizer(models.BPE({"a": 0, "aa": 1, "aaaa": 2}, [("a", "a"), ("aa", "aa")]))
first = {name: [tokenizer.encode("a" * n).tokens[0] for n in range(100, 108)]
         for name, tokenizer in {"Unigram": unigram, "BPE": bpe}.items()}
print("tokenizers", tokenizers.__version__, "first piece of 100 to 107 letters:", first)
assert len(set(first["Unigram"])) > 1 and len(set(first["BPE"])) == 1, "the behaviour changed"
PYTHON
