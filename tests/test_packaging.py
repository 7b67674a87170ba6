"""One copy of every module: in a checkout, in the sdist, in the wheel, under one name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("passes", "codegen", "cost_model")  # top-level folders, imported as fxcompress.<name>


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=inherited | env, capture_output=True, text=True)


def build(source: Path, out: Path, *options: str) -> None:
    done = run(sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(out), cwd=source)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def names(wheel: Path) -> list[str]:
    return [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]


def modules(root: Path) -> list[str]:
    """Every .py file the wheel must hold, by its name in the wheel."""
    places = {"fxcompress": root / "fxcompress"} | {f"fxcompress/{name}": root / name for name in LINKED}
    found = [(name, place, file.relative_to(place)) for name, place in places.items() for file in place.rglob("*.py")]
    # Below a link a file is met a second time: count it at its real place.
    return [f"{name}/{file.as_posix()}" for name, place, file in found if not (place / file.parts[0]).is_symlink()]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files git tracks or would add, links as links."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout: " + listed.stderr.strip())
    copy = tmp_path_factory.mktemp("tree")
    for name in filter(None, listed.stdout.split("\0")):
        if os.path.lexists(ROOT / name):  # tracked, and not deleted since
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build(tree, out, "--wheel")
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel_of_sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    build(tree, out)  # without options: the sdist, then the wheel from the sdist unpacked
    assert len(list(out.glob("*.tar.gz"))) == 1
    return next(out.glob("*.whl"))


def test_wheel_holds_each_module_once_and_nothing_else(tree: Path, wheel: Path) -> None:
    metadata = wheel.name.split("-py3")[0] + ".dist-info/"
    held = [name for name in names(wheel) if not name.startswith(metadata)]
    tables = [f"fxcompress/codegen/triton/configs/{file.name}" for file in tree.glob("codegen/triton/configs/*.json")]
    assert len(tables) == 2
    profiles = [f"fxcompress/cost_model/profiles/{file.name}" for file in tree.glob("cost_model/profiles/*.json")]
    assert profiles
    assert Counter(held) == Counter([*modules(tree), *tables, *profiles, "fxcompress/py.typed"])


def test_wheel_of_sdist_is_the_same(wheel: Path, wheel_of_sdist: Path) -> None:
    a, b = zipfile.ZipFile(wheel), zipfile.ZipFile(wheel_of_sdist)
    assert sorted(names(wheel)) == sorted(names(wheel_of_sdist))
    assert [name for name in names(wheel) if not name.endswith("/RECORD") and a.read(name) != b.read(name)] == []


def test_wheel_imports_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import fxcompress.passes as p\n"
        "from fxcompress.passes.low_rank import LowRank\n"
        "named = {rewrite.__name__: rewrite for rewrite in p.REWRITES}\n"
        "assert LowRank is named['LowRank']\n"
        "print(p.__file__)"
    )
    done = run(sys.executable, "-c", program, cwd=elsewhere, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == site / "fxcompress" / "passes" / "__init__.py"


@pytest.mark.parametrize("name", LINKED)
def test_bare_import_names_the_right_one(name: str) -> None:
    done = run(sys.executable, "-c", f"import {name}", cwd=ROOT)
    assert done.returncode != 0
    assert f"ImportError: import fxcompress.{name}, not {name}" in done.stderr


def test_packages_listed_are_the_folders() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted({str(Path(file).parent).replace(os.sep, ".") for file in modules(ROOT)})


def test_links_are_relative_and_stay_inside(tree: Path) -> None:
    links = {path.relative_to(tree).as_posix(): path for path in tree.rglob("*") if path.is_symlink()}
    assert {name: os.readlink(path) for name, path in links.items() if name.startswith("fxcompress/")} == {
        f"fxcompress/{name}": f"../{name}" for name in LINKED
    }
    for path in links.values():
        assert not Path(os.readlink(path)).is_absolute()
        assert path.resolve(strict=True).is_relative_to(tree.resolve())
