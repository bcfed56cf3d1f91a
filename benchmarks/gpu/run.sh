#!/bin/sh
# The GPU's benchmarks, part by part: benchmarks/gpu/run.sh [--again] [--quick] [--out FOLDER] [--device cpu] PART...
#
# Parts: kernels engine transfer served peers, each at most three minutes a step; all of them without a name. A step that has
# left its figures in FOLDER is not run again, so an interrupted run goes on where it was; --again forgets them. Needs no
# network and no Ray. PYTHON names the interpreter (python3), whose torch sees the GPU. With --device cpu every part proves
# itself on tiny shapes instead. Ends with the table of all figures in FOLDER, in README.md there.
set -u

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
root=$(dirname -- "$(dirname -- "$here")")
python=${PYTHON:-python3}
out="$root/benchmarks/results/gpu"
again='' quick='' on_cpu='' parts=''
while [ $# -gt 0 ]; do
    case $1 in
        --again) again=yes ;;
        --quick) quick=--quick ;;
        --out) out=$2; shift ;;
        --device) [ "$2" = cpu ] && on_cpu=yes; shift ;;
        kernels|engine|transfer|served|peers) parts="$parts $1" ;;
        *) echo "run.sh: no part is called $1; these are: kernels engine transfer served peers" >&2; exit 2 ;;
    esac
    shift
done
[ -n "$parts" ] || parts='kernels engine transfer served peers'
mkdir -p "$out"

# The checkout is the package `baton`, whatever its folder is called.
link=$(mktemp -d)
trap 'rm -rf "$link"' EXIT
ln -s "$root" "$link/baton"
PYTHONPATH="$link${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH

failed=0
step() { # NAME SCRIPT ARGUMENTS...
    name=$1 script=$2
    shift 2
    [ -n "$again" ] && rm -f "$out/$name.json"
    if [ -s "$out/$name.json" ]; then
        echo "$name: done before"
        return
    fi
    if [ ! -f "$here/$script" ]; then
        echo "$name: there is no $script here" >&2
        failed=1
        return
    fi
    echo "$name: $script $*"
    if timeout 180 "$python" "$here/$script" "$@" $quick >"$out/$name.part" 2>"$out/$name.log"; then
        mv "$out/$name.part" "$out/$name.json"
        rm -f "$out/$name.log"
    else
        echo "$name: ended with status $?; its output is in $out/$name.log" >&2
        failed=1
    fi
}

cpu=${on_cpu:+--device cpu}
interpret=${on_cpu:+--interpret}
for part in $parts; do
    case $part in
        kernels)
            step blocks blocks_and_sampling.py $interpret
            step kernels kernels.py $interpret ;;
        engine)
            for model in llama-3.1-8b qwen3-8b llama-3.2-1b; do step "engine-$model" engine.py --model $model $cpu; done ;;
        transfer) step transfer transfer.py $cpu ;;
        served)
            models="${TMPDIR:-/tmp}/baton-gpu-models"
            for system in 1p1d mixed; do step "served-$system" served.py $system --folder "$models" $cpu; done ;;
        peers) step peers peers.py $cpu ;;
    esac
done
"$python" "$here/report.py" "$out"
exit $failed
