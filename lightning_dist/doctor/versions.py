"""Versions of what is installed: within the declared bounds, and none that is known to be bad."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import torch
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from lightning_dist.doctor.devices import driver_version
from lightning_dist.doctor.results import CheckFailed, Finding

PACKAGES = ("lightning-dist", "torch", "lightning", "torchmetrics", "numpy", "transformers")
BOUNDED = ("lightning-dist", "lightning", "torch")
"""Packages whose declared bounds have to hold."""

VARIABLES = ("NCCL_", "TORCH_", "CUDA_", "GLOO_", "OMP_", "PYTORCH_", "MASTER_", "HIP_", "ROCR_")
"""Beginnings of names of environment variables that change how ranks train; their names are told, not their values."""


@dataclass(frozen=True)
class KnownBad:
    """Releases that are not to be used.

    Args:
        package: name of the distribution, or ``"NCCL"``.
        versions: which.
        reason: what is bad, and what would do.
        source: where it says so.
    """

    package: str
    versions: str
    reason: str
    source: str


_COMPROMISED = (
    "it was published by attackers and sends credentials away when it is imported: remove it, replace all credentials "
    "of this machine and install 2.6.6"
)
_ADVISORY = "https://github.com/Lightning-AI/pytorch-lightning/security/advisories/GHSA-w37p-236h-pfx3"

KNOWN_BAD = [
    KnownBad("lightning", "==2.6.2", _COMPROMISED, _ADVISORY),
    KnownBad("lightning", "==2.6.3", _COMPROMISED, _ADVISORY),
    KnownBad("pytorch-lightning", "==2.6.2", _COMPROMISED, _ADVISORY),
    KnownBad("pytorch-lightning", "==2.6.3", _COMPROMISED, _ADVISORY),
    KnownBad("NCCL", "==2.29.2", "collectives may hang: take 2.29.3", "https://github.com/pytorch/pytorch/pull/174338"),
    KnownBad(
        "NCCL",
        "<2.26.2",
        "ending a communicator may hang: take the one that torch was built with",
        "https://github.com/pytorch/pytorch/pull/149546",
    ),
]

LEAST_DRIVER = {11: "450", 12: "525", 13: "580"}
"""NVIDIA's driver, by major version of CUDA:
https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html."""


def check_versions() -> Finding:
    """Looks at what is installed; imports nothing."""
    versions = installed_versions()
    problems = [*known_bad(versions), *old_driver(versions), *out_of_bounds()]
    details = {"versions": versions, "variables that are set": variables_set(), "problems": problems}
    if problems:
        raise CheckFailed("; ".join(problems), details)
    told = ", ".join(
        f"{name} {versions[name]}" for name in ("python", "torch", "lightning", "NCCL", "driver") if name in versions
    )
    return Finding(f"{told}: within the declared bounds, none known to be bad", details)


def installed_versions() -> dict[str, str]:
    """By name; without what is not there."""
    found: dict[str, str | None] = {"python": platform.python_version(), "system": platform.system()}
    found |= {"machine": platform.machine(), "torch built": torch.__version__, "CUDA": torch.version.cuda}
    found |= {"HIP": torch.version.hip, "driver": driver_version(), "NCCL": _nccl()}
    for name in (*PACKAGES, "pytorch-lightning"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {name: version for name, version in found.items() if version}


def known_bad(versions: dict[str, str]) -> Iterator[str]:
    """A sentence for each version that is known to be bad."""
    for bad in KNOWN_BAD:
        version = _version(versions.get(bad.package))
        if version is not None and version in SpecifierSet(bad.versions, prereleases=True):
            yield f"{bad.package} {version} is installed; {bad.reason} ({bad.source})"


def old_driver(versions: dict[str, str]) -> Iterator[str]:
    """A sentence if the driver is older than CUDA needs."""
    cuda, driver = _version(versions.get("CUDA")), _version(versions.get("driver"))
    least = None if cuda is None else _version(LEAST_DRIVER.get(cuda.major))
    if driver is not None and least is not None and driver < least:
        yield (
            f"the driver is {driver}, and CUDA {cuda} of this torch needs {least} or newer: update it, or install a "
            "torch for an older CUDA"
        )


def out_of_bounds() -> Iterator[str]:
    """A sentence for each installed package that one of :data:`BOUNDED` does not declare to work with."""
    for package in BOUNDED:
        for requirement in _requirements(package):
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                yield f"{requirement.name} is missing, which {package} needs: install {requirement}"
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                yield f"{requirement.name} {version} is installed; {package} needs {requirement.specifier}"


def variables_set() -> list[str]:
    """Names of environment variables that change how ranks train."""
    return sorted(name for name in os.environ if name.startswith(VARIABLES))


def _requirements(package: str) -> Iterator[Requirement]:
    try:
        declared = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return
    for text in declared:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _nccl() -> str | None:
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available() and torch.version.cuda):
        return None
    found = torch.cuda.nccl.version()
    return ".".join(map(str, found)) if isinstance(found, tuple) else None


def _version(text: str | None) -> Version | None:
    try:
        return None if text is None else Version(text)
    except InvalidVersion:
        return None
