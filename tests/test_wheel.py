"""The wheel claims our names alone and works beside a user's own models.py and serve.py."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"jaxcept", "jaxcept_kernels", "jaxcept_models", "jaxcept_serve"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_it_holds_our_packages_their_sources_and_the_shipped_model(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == PACKAGES
    for needed in ("jaxcept_models/shipped/model.safetensors", "jaxcept_models/shipped/tokenizer.json",
                   "jaxcept_kernels/native/linear.cc", "jaxcept/py.typed"):  # fmt: skip
        assert needed in names
    assert wheel.stat().st_size < 15 << 20


def test_it_imports_beside_a_users_own_models_and_serve(wheel, tmp_path):
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    project = tmp_path / "project"
    project.mkdir()
    for name in ("models.py", "serve.py", "kernels_pallas.py"):
        (project / name).write_text("MINE = True\n")
    code = (
        "import models, serve, jaxcept, jaxcept_serve.cli, jaxcept_models\n"
        "from jaxcept import LLM, AsyncLLM, SamplingParams, tool\n"
        "assert models.MINE and serve.MINE\n"
        f"assert jaxcept.__file__.startswith({str(installed)!r}), jaxcept.__file__\n"
        f"assert LLM.__module__ == 'jaxcept.llm' and list(jaxcept_models.__path__)[0].startswith({str(installed)!r})\n"
    )
    # The site folder stands before the tree that this environment may be linked to, the project before both.
    paths = f"{project}:{installed}"
    env = {"PYTHONPATH": paths, "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
