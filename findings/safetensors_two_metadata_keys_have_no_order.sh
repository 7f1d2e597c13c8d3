#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors with the same metadata give other bytes in another process as soon as there are
# two metadata keys, for their order in the header is that of a hash map. Digests of such files cannot tell whether
# two are the same. With one key, or none, the bytes are always the same. Seen on Linux, Python 3.11.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$scratch"
digest() {
    "$scratch/venv/bin/python" -c '
import hashlib, json, sys, numpy, safetensors.numpy
tensors = {"a": numpy.zeros(2, numpy.float32), "b": numpy.ones(3, numpy.float32)}
print(hashlib.sha256(safetensors.numpy.save(tensors, json.loads(sys.argv[1]))).hexdigest())' "$1"
}
for metadata in '{"x": "1"}' '{"x": "1", "y": "2", "z": "3"}'; do
    for _ in $(seq 24); do digest "$metadata"; done | sort -u | wc -l | tee -a counts
done
echo "digests of 24 processes with one key and with three: $(tr '\n' ' ' < counts)"
[ "$(head -1 counts)" = 1 ] && [ "$(tail -1 counts)" -gt 1 ] || { echo "the behaviour changed"; exit 1; }
