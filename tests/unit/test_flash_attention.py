"""A FlashAttention wheel is used only where its name says it works; the reason is said otherwise."""

import hashlib

import pytest
from packaging.tags import Tag

from liquid_llm.errors import StorageError, UsageError
from liquid_llm.flash_attention import Machine, obstacle, provide, this_machine

WHEEL = "flash_attn-2.8.3+cu12torch2.4cxx11abiTRUE-cp310-cp310-linux_x86_64.whl"
FITS = Machine(frozenset({Tag("cp310", "cp310", "linux_x86_64")}), "2.4.1+cu121", "12", True)


def changed(**values):
    return Machine(**{**vars(FITS), **values})


def test_a_machine_the_wheel_was_built_for_has_no_obstacle():
    assert obstacle(WHEEL, FITS) is None


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (changed(cuda=None), "no CUDA device"),
        (changed(tags=frozenset({Tag("cp312", "cp312", "linux_x86_64")})), "the wheel is for cp310"),
        (changed(torch="2.13.0"), "torch 2.4, this is 2.13"),
        (changed(cuda="13"), "CUDA 12"),
        (changed(cxx11_abi=False), "ABI"),
    ],
)
def test_what_does_not_fit_is_said(machine, words):
    assert words in (obstacle(WHEEL, machine) or "")


def test_a_wheel_without_local_version_is_taken_at_its_tags():
    assert obstacle("flash_attn-2.8.3-cp310-cp310-linux_x86_64.whl", FITS) is None


@pytest.mark.parametrize("name", ["flash_attn.zip", "numpy-2.0.0-cp310-cp310-linux_x86_64.whl"])
def test_other_files_are_refused(name):
    with pytest.raises(UsageError, match="--fa_wheel_gcs"):
        obstacle(name, FITS)


def test_nothing_is_fetched_where_it_would_not_fit(tmp_path):
    assert this_machine().cuda is None or pytest.skip("this machine has CUDA")
    assert "CUDA" in (provide(f"memory://nowhere/{WHEEL}", None, tmp_path) or "")
    assert not list(tmp_path.iterdir())


def test_a_fitting_wheel_is_fetched_checked_and_installed(tmp_path):
    source = tmp_path / "bucket" / WHEEL
    source.parent.mkdir()
    source.write_bytes(b"wheel")
    taken = []
    digest = hashlib.sha256(b"wheel").hexdigest()
    args = {"machine": FITS, "installed": lambda: False, "install": lambda path: taken.append(path.read_bytes())}
    assert provide(str(source), digest.upper(), tmp_path / "work", **args) is None
    assert taken == [b"wheel"]
    with pytest.raises(UsageError, match="hash"):
        provide(str(source), "0" * 64, tmp_path / "work", **args)
    assert taken == [b"wheel"]


def test_a_missing_wheel_and_one_pip_refuses_are_storage_errors(tmp_path):
    absent = {"machine": FITS, "installed": lambda: False}
    with pytest.raises(StorageError):
        provide(str(tmp_path / WHEEL), None, tmp_path / "work", **absent)
    (tmp_path / WHEEL).write_bytes(b"not a zip")
    with pytest.raises(StorageError, match="could not be installed"):
        provide(str(tmp_path / WHEEL), None, tmp_path / "work", **absent)


def test_a_wheel_without_a_hash_is_said_with_the_one_found_and_what_is_installed_is_what_was_hashed(tmp_path, caplog):
    source = tmp_path / WHEEL
    source.write_bytes(b"wheel")
    places = []

    def install(path):
        source.write_bytes(b"another, put there meanwhile")
        assert path.read_bytes() == b"wheel"
        places.append(path)

    assert provide(str(source), None, tmp_path / "work", machine=FITS, installed=lambda: False, install=install) is None
    assert f"installed unchecked: give --fa_wheel_sha256={hashlib.sha256(b'wheel').hexdigest()}" in caplog.text
    assert places[0].name == WHEEL
    assert not places[0].exists()
