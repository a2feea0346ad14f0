"""Packaging of pointfuse. Metadata stands in pyproject.toml; this file adds what needs Python to say."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The one place that states the version is the package itself; reading the text avoids importing torch."""
    text = (ROOT / "python/pointfuse/_version.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "([^"]+)"', text)
    if found is None:
        raise RuntimeError('python/pointfuse/_version.py must hold a line __version__ = "X.Y.Z"')
    return found.group(1)


setup(
    version=version(),
    package_dir={"": "python"},
    packages=find_packages("python"),
    package_data={"pointfuse": ["py.typed"]},
)
