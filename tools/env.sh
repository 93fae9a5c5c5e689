# Source me:   source tools/env.sh
#
# The environment of this checkout: its Python, ROS 2 (the distribution that is sourced, otherwise the one in .venv),
# the package as `make setup` built it. ROS stays on this machine, on a domain of this checkout's own, unless
# ROS_DOMAIN_ID or the discovery variables are already set.

_vla_edge="$(cd "$(dirname "${BASH_SOURCE[0]:-${(%):-%x}}")/.." && pwd -P)"
_venv="$_vla_edge/.venv"

if [ ! -f "$_venv/bin/activate" ]; then
    echo "tools/env.sh: there is no $_venv yet; run 'make setup' first." >&2
    unset _vla_edge _venv
    return 1
fi

# Colcon's scripts and venv's read variables that may be unset.
case $- in *u*) _nounset=1; set +u ;; *) _nounset= ;; esac

. "$_venv/bin/activate"

# True for the environment `make setup` completes from PyPI wheels; there the environment itself is the ament prefix.
if [ -d "$_venv/share/rclpy" ]; then
    export ROS_DISTRO=jazzy ROS_VERSION=2 ROS_PYTHON_VERSION=3
    case ":${AMENT_PREFIX_PATH:-}:" in
        *":$_venv:"*) ;;
        *)
            export AMENT_PREFIX_PATH="$_venv${AMENT_PREFIX_PATH:+:$AMENT_PREFIX_PATH}"
            export CMAKE_PREFIX_PATH="$_venv${CMAKE_PREFIX_PATH:+:$CMAKE_PREFIX_PATH}"
            ;;
    esac
    # The wheels find their libraries by restarting the interpreter with this path. Set here, no process has to, and
    # one that is started with a changed environment cannot lose half of it.
    _libraries="$_venv/lib"
    for _directory in "$_venv"/lib/python3*/site-packages/ros_*.libs; do
        [ -d "$_directory" ] && _libraries="$_libraries:$_directory"
    done
    case ":${LD_LIBRARY_PATH:-}:" in
        *":$_venv/lib:"*) ;;
        *) export LD_LIBRARY_PATH="$_libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" ;;
    esac
    export _ROS_WHEELS_BOOTSTRAP_COMPLETE=1
fi

if [ -f "$_vla_edge/install/local_setup.sh" ]; then
    COLCON_CURRENT_PREFIX="$_vla_edge/install"
    . "$_vla_edge/install/local_setup.sh"
    unset COLCON_CURRENT_PREFIX
fi

# Domains 1 to 49 are dealt out by the checkout's path; the tests use 50 to 99.
if [ -z "${ROS_DOMAIN_ID:-}" ]; then
    export ROS_DOMAIN_ID=$(($(printf %s "$_vla_edge $(id -u)" | cksum | cut -d' ' -f1) % 49 + 1))
fi
if [ "${ROS_DISTRO:-}" = humble ]; then
    export ROS_LOCALHOST_ONLY="${ROS_LOCALHOST_ONLY:-1}"
elif [ -z "${ROS_LOCALHOST_ONLY:-}" ]; then
    export ROS_AUTOMATIC_DISCOVERY_RANGE="${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}"
fi

# Rendering needs no display.
export MUJOCO_GL="${MUJOCO_GL:-egl}"

[ -n "$_nounset" ] && set -u
unset _vla_edge _venv _libraries _directory _nounset
