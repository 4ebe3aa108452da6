"""Package metadata, read from settings.ini so that nbdev and pip share one place."""

import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
STATUS = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
LICENSES = {"apache2": "Apache-2.0"}

parser = ConfigParser(delimiters=["="])  # ":" may stand inside a value
parser.read(ROOT / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

extras = {key.removeprefix("extra_"): shlex.split(settings[key]) for key in settings if key.startswith("extra_")}
extras["dev"] = shlex.split(settings["dev_requirements"])
readme = ROOT / "README.md"


class BuildWithNotebooks(build_py):
    """Puts run notebooks and configurations into the wheel (vlm_itl/shipped); an editable install uses the clone's."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source in [*sorted(ROOT.glob("nbs/run_*.ipynb")), *sorted(ROOT.glob("configs/*.yaml"))]:
            target = Path(self.build_lib, settings["lib_name"], "shipped", source.parent.name, source.name)
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target), preserve_mode=False)


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else settings["description"],
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    license=LICENSES[settings["license"]],
    keywords=settings["keywords"].split(),
    classifiers=[
        f"Development Status :: {STATUS[settings['status']]}",
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        "Programming Language :: Python :: 3",
    ],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=[settings["lib_name"], f"{settings['lib_name']}.*"]),
    include_package_data=True,
    cmdclass={"build_py": BuildWithNotebooks},
    install_requires=shlex.split(settings["requirements"]),
    extras_require=extras,
    entry_points={
        "console_scripts": shlex.split(settings["console_scripts"]),
        "nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
