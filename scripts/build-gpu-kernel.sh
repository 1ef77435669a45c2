#!/usr/bin/env bash
# Compiles src/gpu/cuda/kernel.cu to the PTX that is embedded into the library. Needed only after a change of the kernel.
#
# The compiler is NVRTC of CUDA 12.0, from PyPI: the PTX is the same whoever builds it, drivers from 525 on take it, and every
# GPU from Volta (compute_70) on. `build-gpu-kernel.sh --check` says whether the committed PTX is what it would make.
set -euo pipefail
cd "$(dirname "$0")/.."

version=12.0.76
source=src/gpu/cuda/kernel.cu
ptx=src/gpu/cuda/kernel.ptx
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m pip download -q --no-deps --only-binary=:all: -d "$work" "nvidia-cuda-nvrtc-cu12==$version"
python3 -m zipfile -e "$work"/nvidia_cuda_nvrtc_cu12-*.whl "$work/wheel"

python3 - "$work/wheel/nvidia/cuda_nvrtc/lib" "$source" "$work/kernel.ptx" <<'PYTHON'
import ctypes, hashlib, pathlib, sys

folder, source, target = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
ctypes.CDLL(str(next(folder.glob("libnvrtc-builtins.so*"))), mode=ctypes.RTLD_GLOBAL)
nvrtc = ctypes.CDLL(str(next(folder.glob("libnvrtc.so*"))))
text = source.read_bytes()


def text_of(length_of, get, program):
    length = ctypes.c_size_t()
    length_of(program, ctypes.byref(length))
    buffer = ctypes.create_string_buffer(length.value)
    get(program, buffer)
    return buffer.value.decode()


program = ctypes.c_void_p()
options = [b"--gpu-architecture=compute_70", b"--std=c++17"]
assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"kernel.cu", 0, None, None) == 0
status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
log = text_of(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
if log.strip():
    print(log, file=sys.stderr)
if status != 0:
    sys.exit("the kernel does not compile")
ptx = text_of(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
digests = [hashlib.sha256(one).hexdigest() for one in (text, ptx.encode())]
head = f"// Made by scripts/build-gpu-kernel.sh of kernel.cu, sha256 {digests[0]}, of which came {digests[1]}"
target.write_text(f"{head}\n{ptx}")
PYTHON

if [ "${1:-}" = --check ]; then
    cmp "$work/kernel.ptx" "$ptx" || { echo "kernel.ptx is not what kernel.cu compiles to: run $0" >&2; exit 1; }
    echo "kernel.ptx is what kernel.cu compiles to"
else
    cp "$work/kernel.ptx" "$ptx"
    echo "$ptx: $(wc -l <"$ptx") lines"
fi
