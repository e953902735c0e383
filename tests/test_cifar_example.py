"""The vision example on the real network and real images, at its quick size."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "examples" / "cifar_resnet20.py"
SPEC = importlib.util.spec_from_file_location("cifar_resnet20", PATH)
example = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(example)


@pytest.mark.slow
@pytest.mark.skipif(not example.ASSETS.is_dir(), reason="needs the shared assets")
def test_the_quick_comparison_learns_and_keeps_what_its_table_says(capsys):
    table = example.main(["--quick"])
    printed = capsys.readouterr().out
    assert table["pre-trained"][1] > 75  # the network and its normalisation are right
    for name, (learned, kept) in table.items():
        assert f"{kept:.1f}" in printed
        if name != "pre-trained":
            assert learned > 60
            assert kept > 60


def test_missing_assets_are_named(tmp_path):
    with pytest.raises(
        SystemExit, match=r"holds no cifar10_resnet20\.safetensors: pass .*--assets"
    ):
        example.main(["--assets", str(tmp_path)])
