"""Packaging of negative-cache. Settings of the tools (ruff, pytest) live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Reads `__version__` as text: importing the package would need TensorFlow to build it."""
    text = (ROOT / "negative_cache" / "version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('negative_cache/version.py has no line `__version__ = "..."`')
    return match.group(1)


def read_long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


# Keras 2, which tf.keras becomes under TF_USE_LEGACY_KERAS=1.
KERAS_2 = ["tf-keras>=2.16"]
# It imports under Keras 2 only.
TF_RECOMMENDERS = ["tensorflow-recommenders>=0.7.3", *KERAS_2]

setup(
    name="negative-cache",
    version=read_version(),
    description="Train dual encoders in TensorFlow/Keras against a very large pool of negatives.",
    long_description=read_long_description(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["negative_cache*"], exclude=["negative_cache.tests*"]),
    package_data={"negative_cache": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "absl-py",
        "numpy",
        "scipy",
        "tensorflow>=2.16",
        # tf.summary.scalar needs it, and TensorFlow does not install it since 2.21.
        "tensorboard",
    ],
    extras_require={
        "keras2": KERAS_2,
        "tfrs": TF_RECOMMENDERS,
        "demo": ["matplotlib"],
        "test": [
            *TF_RECOMMENDERS,
            "hypothesis",
            # They run the notebooks of colab/.
            "ipykernel>=6",
            "keras-rs",
            "matplotlib",
            # Bounded like ruff: a new release may find other errors in the same code.
            "mypy>=2.4,<2.5",
            "nbclient>=0.8",
            "nbformat>=5.7",
            "pytest>=8",
            "pytest-xdist",
            # Bounded, since a new minor release may format the same code differently.
            "ruff>=0.17,<0.18",
        ],
        "benchmarks": ["faiss-cpu", "matplotlib"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords="retrieval recommender two-tower dual-encoder negative-sampling tensorflow keras",
)
