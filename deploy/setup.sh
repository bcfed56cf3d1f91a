#!/bin/sh
# Make .venv with everything Baton needs, at the versions of requirements.txt. Called by make.
set -eu
PYTHON=${PYTHON:-python3}
"$PYTHON" - <<'CHECK' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Baton needs Python 3.11 or newer; this is {sys.version.split()[0]}. Set PYTHON=/path/to/python3.11.")
CHECK
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
.venv/bin/python -m pip install -qq --disable-pip-version-check uv

# pip may know of local wheels (a CPU build of torch); uv does not read pip's setting, so pass it on.
links=${PIP_FIND_LINKS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}
torch_backend=
if [ -n "$links" ] && ls $links/torch-*cpu* >/dev/null 2>&1; then
    set -- --find-links "$links"
else
    set --
    torch_backend=auto     # the CPU build, or the CUDA build that fits the driver
fi
.venv/bin/uv pip install --quiet --python .venv/bin/python ${torch_backend:+--torch-backend=$torch_backend} "$@" \
    -r requirements.txt
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps -e .

# The CPU kernels, for this machine's processor; without a C++ compiler the slower kernels of torch serve.
.venv/bin/python -c 'from baton.kernels.native_build import build_native; build_native()' ||
    echo "The native kernels were not built; install g++ 12 or newer for more speed." >&2

# Compile what the processes of a cluster import: each of them would otherwise do it at its first start, and at every
# start where PYTHONDONTWRITEBYTECODE is set. One import costs a few seconds; Ray's own processes gain as much as ours.
env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -P -W ignore - <<'COMPILE'
import contextlib
import importlib

for module in (
    "torch",
    "ray",
    "ray.dashboard.agent",
    "ray.dashboard.dashboard",
    "ray._private.log_monitor",
    "ray._private.runtime_env.agent.runtime_env_agent",
    "ray.autoscaler._private.monitor",
    "baton.cli.bench",
    "baton.cli.demo",
    "baton.cli.up",
    "baton.decode_worker.server",
    "baton.prefill_worker.server",
    "baton.deploy.router_process",
    "baton.deploy.ray_host",
):
    with contextlib.suppress(ImportError):  # a part of another Ray, or no Ray at all
        importlib.import_module(module)
COMPILE
