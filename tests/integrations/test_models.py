from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest

from swift_kernels.integrations.models import PACKAGED_MODELS, load_model

FACTOR = 3.0


@pytest.fixture(scope="module")
def smollm2_file() -> Path:
    package, _ = PACKAGED_MODELS["smollm2"].packages[0].split("==")
    files = importlib.metadata.distribution(package).files or []
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def test_files_of_one_name_and_size_are_different_models(
    tmp_path: Path, smollm2_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fine-tunes of one model in one quantisation are; the second is the first one with a larger last norm."""
    from gguf import GGUFReader

    monkeypatch.setenv("SWIFT_KERNELS_CACHE", str(tmp_path / "cache"))
    content = bytearray(smollm2_file.read_bytes())
    norm = next(tensor for tensor in GGUFReader(smollm2_file).tensors if tensor.name == "output_norm.weight")
    place = slice(int(norm.data_offset), int(norm.data_offset + norm.n_bytes))
    weights = []
    for folder in ("first", "second", "again"):
        path = tmp_path / folder / "model.gguf"
        path.parent.mkdir()
        path.write_bytes(content)
        weights.append(load_model(str(path))[0].model.norm.weight.detach())
        path.unlink()
        if folder == "first":
            content[place] = (np.frombuffer(bytes(content[place]), np.float32) * FACTOR).tobytes()
    np.testing.assert_allclose(weights[1], FACTOR * weights[0], rtol=1e-6)
    np.testing.assert_array_equal(weights[2], weights[1])
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 2
