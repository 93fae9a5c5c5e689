#!/usr/bin/env bash
# Runs the tests marked `peers`: ours against other libraries, each in an environment of its own beside .venv, because
# their dependencies exclude one another. What is missing there is taken from .venv.
#
# Usage: tools/test_peers.sh [NAME...]     names as below; without, all
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# name -> the test file, and the requirements. Those that take our pins are installed with them.
declare -A FILES=([peft]=test/policy/test_merge.py [bitsandbytes]=test/policy/test_merge.py
    [lerobot]=test/evaluate/test_lerobot_itself.py [openpi]=test/engine/test_remote_openpi.py)
declare -A WANTED=([modelopt]=nvidia-modelopt [llmcompressor]=llmcompressor==0.14.0.1 [torchao]=torchao [nncf]=nncf
    [neural-compressor]="neural-compressor-pt accelerate" [peft]=peft==0.21.2 [bitsandbytes]=bitsandbytes==0.50.2
    [lerobot]=lerobot==0.4.4 [openpi]=openpi-client==0.1.2)
UNPINNED=" llmcompressor lerobot openpi "

environment() {
    local name=$1 directory=.venv-peers/$1 options=(-c constraints.txt)
    [ ! -f "$directory/.complete" ] || return 0
    [[ "$UNPINNED" != *" $name "* ]] || options=()
    rm -rf "$directory"
    .venv/bin/python -m venv "$directory"
    local where='import sysconfig; print(sysconfig.get_path("purelib"))'
    .venv/bin/python -c "$where" >"$("$directory/bin/python" -c "$where")/beside.pth"
    # shellcheck disable=SC2086
    "$directory/bin/python" -m pip install --quiet --disable-pip-version-check "${options[@]}" ${WANTED[$name]}
    touch "$directory/.complete"
}

source tools/env.sh
names=("$@")
[ ${#names[@]} -gt 0 ] || mapfile -t names < <(printf '%s\n' "${!WANTED[@]}" | sort)
mkdir -p out/ci
failed=()
for name in "${names[@]}"; do
    [ -n "${WANTED[$name]:-}" ] || { echo "test-peers: no library '$name'; there are: ${!WANTED[*]}" >&2; exit 2; }
    echo "test-peers: $name"
    report=out/ci/peers-$name.xml
    environment "$name" &&
        ".venv-peers/$name/bin/python" -m pytest -m peers -q "${FILES[$name]:-test/compress/test_providers.py}" \
            --junitxml="$report" &&
        # A library that cannot be imported skips its tests: nothing would have been seen.
        .venv/bin/python tools/check_tests_ran.py --any "$report" || failed+=("$name")
done
[ ${#failed[@]} -eq 0 ] || { echo "test-peers: failed: ${failed[*]}" >&2; exit 1; }
