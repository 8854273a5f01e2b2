"""Everything about the package is in settings.ini (nbdev reads it too); this file only hands it to
setuptools."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser()
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
NAMES = ("pictures", "hf", "agentdojo", "inspect", "real")
extras = {name: cfg[f"{name}_requirements"].split() for name in NAMES}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras | {"dev": cfg["dev_requirements"].split() + sum(extras.values(), [])},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "papermill.engine": cfg["papermill_engines"].split(),
        "inspect_ai": cfg["inspect_entry_points"].split(),
    },
    # "" makes an editable install an entry on sys.path. Without it setuptools installs an import hook, which
    # comes after sys.path: a folder that is
    # named as the package, such as a clone seen from its parent, would be imported in its place, as an empty
    # namespace package.
    package_dir={"": "."},
    packages=find_packages(include=["cbnb", "cbnb.*"]),
    package_data={"": ["*.js", "*.css", "tinyagent_model/*"]},
    zip_safe=False,
)
