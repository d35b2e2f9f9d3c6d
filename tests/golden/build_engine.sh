#!/bin/sh
# Builds model.engine from model.onnx on the device, with the trtexec that is there.
set -eu
wanted='TensorRT 10.16 (jetson-orin-nano)'

fail() {
    printf '%s\n' "$2" >&2
    exit "$1"
}

# JetPack and NVIDIA's packages keep trtexec outside PATH. A relative path is the caller's.
trtexec=$(command -v "${TRTEXEC:-trtexec}") || trtexec=${TRTEXEC:-/usr/src/tensorrt/bin/trtexec}
case $trtexec in
    /*) ;;
    *) trtexec=$PWD/$trtexec ;;
esac
case $0 in
    */*) CDPATH='' cd -- "${0%/*}/" ;;
esac
if [ ! -f "$trtexec" ] || [ ! -x "$trtexec" ]; then
    fail 3 "trtexec was not found. Install TensorRT's tools, or set TRTEXEC to its path."
fi

if [ ! -f model.onnx ]; then
    fail 6 "model.onnx is not beside this script. Copy the whole bundle to the device."
fi
if command -v sha256sum >/dev/null; then
    digest=$(sha256sum <model.onnx)
    if [ "${digest%% *}" != 97ff8a35544dcf40ad84047074439dd6aa3a0be469ea578a1b1c017d939ec61c ]; then
        fail 6 "model.onnx is not the file that this bundle was made with. Copy the bundle again."
    fi
fi

# trtexec greets with [TensorRT v8201] for 8.2.1 and, since 10, with [TensorRT v100300] for 10.3.0.
found=$("$trtexec" --help 2>&1 | sed -n 's/.*\[TensorRT v\([0-9.]*\)\].*/\1/p' | sed 1q)
case $found in
    *.*) major=${found%%.*} ;;
    ??????*) major=${found%????} ;;
    ????*) major=${found%???} ;;
    *) major= ;;
esac
if [ -n "$major" ] && [ "$major" != 10 ]; then
    fail 2 "trtexec is of TensorRT $major here, but the bundle was made for $wanted. Install TensorRT 10, or build the bundle again for a target file whose options.tensorrt is the version here."
fi

# A cache of timings that is cut short would spoil the next build.
trap 'rm -f model.engine.partial model.engine.timing' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
status=0
"$trtexec" --onnx=model.onnx --saveEngine=model.engine.partial --stronglyTyped --noTF32 --memPoolSize=workspace:1024 --skipInference --timingCacheFile=model.engine.timing || status=$?
if [ "$status" -ne 0 ]; then
    fail "$status" "trtexec failed with exit status $status, and no engine was written. Its last lines say why; 137 means that memory ran out: end other programs or add swap space."
fi
if [ ! -s model.engine.partial ]; then
    fail 7 "trtexec ended well, but wrote no engine. See what it printed."
fi
rm -f model.engine.json
mv -f model.engine.partial model.engine
trap - EXIT
