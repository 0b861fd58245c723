"""Packaging of remixmatch-engine."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read as text, because importing the package needs its dependencies.
(VERSION,) = re.findall(r'^__version__ = "(.+?)"', (ROOT / "engine" / "__init__.py").read_text("utf-8"), re.MULTILINE)

setup(
    name="remixmatch-engine",
    version=VERSION,
    description="Complete, fast PyTorch implementation of ReMixMatch for semi-supervised image classification",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    # kernels has no __init__.py, because it would overwrite that of Hugging Face's package of the same name.
    packages=["kernels", *find_packages(include=["engine*", "pipelines*", "bench*"])],
    package_data={
        "engine": ["py.typed"],
        "pipelines": ["py.typed"],
        "bench": ["py.typed", "results/count.jsonl"],
        "engine.report": ["templates/*"],
    },
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["semi-supervised learning", "ReMixMatch", "CTAugment", "PyTorch", "Triton", "DALI"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11,<3.14",
    install_requires=[
        "torch>=2.11",
        "triton>=3.6",
        "torchvision>=0.26",
        "nvidia-dali-cuda130>=2.1",
        "numpy>=2.0",
        "pillow>=11",
        "scikit-learn>=1.6",
        "threadpoolctl>=3.5",
        "tyro>=0.9",
        "pyyaml>=6",
        "rich>=13",
        "tensorboard>=2.18",
        "safetensors>=0.5",
        "matplotlib>=3.9",
    ],
    extras_require={
        "timm": ["timm>=1.0"],
        "wandb": ["wandb>=0.31"],
        "trackio": ["trackio>=0.43"],
        "onnx": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"],
        "slurm": ["submitit>=1.5"],
        "report": ["altair>=6.0", "vl-convert-python>=1.8", "jinja2>=3.1"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "latex2mathml>=3.77"],
        "dev": [
            "timm>=1.0",
            "submitit>=1.5",
            "altair>=6.0",
            "vl-convert-python>=1.8",
            "jinja2>=3.1",
            "playwright>=1.50",  # drives the system's browser; downloads none
            "axe-playwright-python>=0.1.4",
            "onnx>=1.17",
            "onnxscript>=0.5",
            "onnxruntime>=1.20",
            "scikit-image>=0.25",  # for its sample photographs
            "wandb>=0.31",  # not trackio, which requires an older pillow than the tested one
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
            "codespell>=2.3",
            "mypy>=1.13",
            "setuptools>=77",
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6",
            "latex2mathml>=3.77",
        ],
    },
    entry_points={"console_scripts": ["remixmatch=engine.commands.main:main"]},
)
