#!/usr/bin/env bash
# MLServer 1.7.1 takes any uvloop, and a fresh install brings 0.23.0, with which `mlserver start` serves nothing: its
# process for models (`parallel_workers` is 1 by default) asks for the current event loop where there is none, which
# uvloop answered by a new one up to 0.21, and ends. With uvloop 0.21.0, or `parallel_workers` 0, it serves. Seen on
# Linux, Python 3.11.
#
# Expected: what pip resolves starts.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check mlserver==1.7.1 uvloop==0.23.0
mkdir "$scratch/model"
cat >"$scratch/model/own.py" <<'PYTHON'
import mlserver

class Own(mlserver.MLModel):
    async def predict(self, payload):
        return mlserver.types.InferenceResponse(model_name=self.name, outputs=[])
PYTHON
echo '{"name": "own", "implementation": "own.Own"}' >"$scratch/model/model-settings.json"
echo '{"http_port": 18731, "grpc_port": 18732, "metrics_port": 18733, "host": "127.0.0.1"}' >"$scratch/model/settings.json"
for uvloop in 0.23.0 0.21.0; do
  "$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check "uvloop==$uvloop"
  (cd "$scratch/model" && timeout 25 "$scratch/venv/bin/mlserver" start . >"$scratch/log" 2>&1) &
  ready=no
  for _ in $(seq 100); do
    sleep 0.2
    if curl -sf http://127.0.0.1:18731/v2/models/own/ready >/dev/null; then ready=yes; break; fi
  done
  wait || true
  echo "mlserver 1.7.1, uvloop $uvloop: the model is ready: $ready; $(grep -o 'RuntimeError: There is no current event loop' "$scratch/log" | head -1)"
  if [[ $uvloop$ready != 0.23.0no && $uvloop$ready != 0.21.0yes ]]; then echo "the behaviour changed"; exit 1; fi
done
