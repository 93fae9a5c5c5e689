#!/usr/bin/env bash
# Runs the tests marked `peers`: ours against other libraries, each in an environment of its own beside .venv.
#
# Usage: tools/test_peers.sh [NAME...]     as tools/peer_environment.sh lists them; without, all that have tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The test files of each; without one it has no tests.
declare -A FILES=([peft]=test/policy/test_merge.py [bitsandbytes]="test/policy/test_merge.py test/policy/test_packed.py"
    [lerobot]=test/evaluate/test_lerobot_itself.py [ruckig]=test/control/test_limits_peer.py
    [pinocchio]=test/control/test_gravity.py [dask]=test/evaluate/test_suite.py [openpi]=test/engine/test_remote_openpi.py
    [executorch]=test/engine/test_executorch.py [litert]=test/engine/test_litert.py [mlx]=test/engine/test_mlx.py
    [coreml]=test/engine/test_coreml.py [edge_llm]=test/engine/test_edge_llm.py [mlx_lm]=test/engine/test_llama_directory.py
    [llama_cpp]=test/engine/test_llama_cpp.py [tensorly]=test/compress/test_factor_peer.py
    [metaworld]="test/sim/test_metaworld.py test/evaluate/test_metaworld_rig.py"
    [tensorrt]="test/engine/test_tensorrt_rtx.py test/engine/test_tensorrt_runtime.py test/engine/test_plan.py test/engine/test_build.py")
for provider in modelopt llmcompressor torchao nncf neural-compressor; do
    FILES[$provider]=test/compress/test_providers.py
done
FILES[llmcompressor]+=" test/policy/test_packed.py test/engine/test_packed_layers.py test/engine/test_llama_directory.py"
FILES[modelopt]+=" test/engine/test_packed_layers.py"

source tools/env.sh
names=("$@")
[ ${#names[@]} -gt 0 ] || mapfile -t names < <(printf '%s\n' "${!FILES[@]}" | sort)
mkdir -p out/ci
failed=()
for name in "${names[@]}"; do
    [ -n "${FILES[$name]:-}" ] || { echo "test-peers: no library '$name'; there are: ${!FILES[*]}" >&2; exit 2; }
    echo "test-peers: $name"
    report=out/ci/peers-$name.xml
    python=$(tools/peer_environment.sh "$name") &&
        # shellcheck disable=SC2086
        "$python" -m pytest -m peers -q ${FILES[$name]} --junitxml="$report" &&
        # A library that cannot be imported skips its tests: nothing would have been seen.
        .venv/bin/python tools/check_tests_ran.py --any "$report" || failed+=("$name")
done
[ ${#failed[@]} -eq 0 ] || { echo "test-peers: failed: ${failed[*]}" >&2; exit 1; }
