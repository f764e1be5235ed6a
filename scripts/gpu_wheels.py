"""Collects the packages that gpu_smoke.py and gpu_benchmark.py need on a GPU machine without a network.

    python scripts/gpu_wheels.py [FOLDER]        (or: make gpu-wheels)

Run it on a machine with pip and a package index. It resolves the dependencies of pyproject.toml at the versions of
constraints.txt for Python 3.12 on Linux x86-64 with torch 2.11, leaves out what the GPU machine has (`PRESENT` and what
these packages need), and downloads the wheels of the rest. Copy the repository and FOLDER to the GPU machine and pass
`--wheels FOLDER` to the scripts: they unpack the wheels without pip. This file imports the standard library only.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTHON, TORCH = "3.12", "2.11.0"
PRESENT = ("torch", "numpy", "pyarrow", "pandas")  # on the GPU machine, with all that they need, and nvidia-*
EXTRAS = ("liger-kernel",)  # TRL is faster with it
CUDA = "cuda130"  # of torch there: bitsandbytes' wheel has a library for each release
LIMIT_MB = 60  # what can be copied to the GPU machine, less the repository
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(17, 40)), "manylinux2014_x86_64", "manylinux1_x86_64")


def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def normalized(requirement: str) -> str:
    """The package name of a requirement."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement.strip())[0]).lower()


def pip(*words: str) -> None:
    """Runs pip for the GPU machine's Python and platform."""
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"]
    platforms = [f"--platform={name}" for name in PLATFORMS]
    environment = os.environ | {"PIP_CONSTRAINT": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([sys.executable, "-m", "pip", words[0], "-q", *target, *platforms, *words[1:]], check=True,
                   env=environment)  # fmt: skip


def resolve(requirements: list[str], present: tuple[str, ...], work: Path) -> list[str]:
    """The packages that the GPU machine lacks, as NAME==VERSION: pip's resolution without `present` and its needs."""
    constraints, report = work / "constraints.txt", work / "report.json"
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    constraints.write_text("".join(line for line in pinned if normalized(line) != "torch"), encoding="utf-8")
    pip("install", "--dry-run", "--ignore-installed", f"--target={work}", f"--report={report}", "-c", str(constraints),
        *requirements)  # fmt: skip
    found = [one["metadata"] for one in json.loads(report.read_text())["install"]]
    packages = {normalized(one["name"]): one for one in found}
    there, new = set(), set(present)
    while new:
        there |= new
        needs = [need for name in new if name in packages for need in packages[name].get("requires_dist", [])]
        new = {normalized(need) for need in needs if "extra ==" not in need} - there
    return [f"{one['name']}=={one['version']}" for name, one in sorted(packages.items())
            if name not in there and not name.startswith("nvidia-")]  # fmt: skip


def slim(wheel: Path) -> None:
    """Removes the libraries for other devices from bitsandbytes' wheel: 2 MB remain of 43."""
    smaller = wheel.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as out:
        for item in source.infolist():
            if "libbitsandbytes" not in item.filename or CUDA in item.filename or "_cpu" in item.filename:
                out.writestr(item, source.read(item))
    smaller.replace(wheel)


def collect(folder: Path, present: tuple[str, ...]) -> None:
    """Downloads the wheels into a folder, and prints their sizes."""
    table = project()
    others = [line for line in table["dependencies"] if normalized(line) != "torch"]
    requirements = [*others, *table["optional-dependencies"]["quant"], *EXTRAS, f"torch=={TORCH}"]
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        wanted = resolve(requirements, present, Path(work))
    pip("download", "--no-deps", f"--dest={folder}", *wanted)
    for wheel in folder.glob("bitsandbytes-*.whl"):
        slim(wheel)
    sizes = {wheel.name: wheel.stat().st_size / 1e6 for wheel in sorted(folder.glob("*.whl"))}
    print("".join(f"{size:6.1f} MB  {name}\n" for name, size in sizes.items()), end="")
    print(f"{sum(sizes.values()):6.1f} MB  {len(sizes)} wheels in {folder}, for Python {PYTHON} and torch {TORCH}")
    if sum(sizes.values()) > LIMIT_MB:
        sys.exit(f"{folder}: more than {LIMIT_MB} MB; install the largest there and name them in --present")


def environment(work: Path, wheels: Path | None) -> dict[str, str]:
    """The environment of processes that import nesso_tune from this checkout: one GPU, no network, caches in `work`.

    The wheels are unpacked into `work`, with the metadata of nesso-tune, which a checkout lacks. An existing PYTHONPATH
    is kept, after these packages.
    """
    table, site = project(), work / "site"
    info = site / f"nesso_tune-{table['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    needs = "".join(f"Requires-Dist: {line}\n" for line in table["dependencies"])
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nesso-tune\nVersion: {table['version']}\n{needs}")
    found = sorted(wheels.glob("*.whl")) if wheels else []
    if wheels and not found:
        sys.exit(f"{wheels}: has no wheels; run scripts/gpu_wheels.py on a machine with a network and copy its folder")
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    path = [str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": gpu,
        "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false",
        "NESSO_TUNE_CACHE": str(work / "cache"), "HF_DATASETS_CACHE": str(work / "datasets"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".gpu-wheels")
    parser.add_argument("--present", nargs="*", default=[], metavar="NAME", help="more packages of the GPU machine")
    options = parser.parse_args()
    collect(options.folder.resolve(), (*PRESENT, *options.present))
