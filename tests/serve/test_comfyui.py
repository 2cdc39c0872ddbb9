"""ComfyUI's nodes against the real service, as ComfyUI calls them."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.serve.test_serve import Running, clips, running  # noqa: F401  (fixtures)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    file = Path(__file__).resolve().parents[2] / "examples" / "comfyui" / "__init__.py"
    spec = importlib.util.spec_from_file_location("patchpipe_nodes", file)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def usual(node: Any) -> dict[str, Any]:
    """What ComfyUI passes where nobody has changed anything; images are left out."""
    told = node.INPUT_TYPES()
    fields = {**told["required"], **told["optional"]}
    return {name: kind[1]["default"] for name, kind in fields.items() if kind[0] != "IMAGE"}


@pytest.mark.extra
def test_pictures_and_clips_come_from_the_service(
    nodes: ModuleType,
    running: Running,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nodes, "_folder", lambda: str(tmp_path))
    picture, clip = nodes.NODE_CLASS_MAPPINGS["PatchpipePicture"](), nodes.NODE_CLASS_MAPPINGS["PatchpipeClip"]()
    given = {**usual(picture), "service": running.address, "prompt": "owl", "width": 64, "height": 64, "steps": 2}
    [image] = picture.paint(**given)
    assert image.shape == (1, 64, 64, 3)
    assert 0 <= image.min() < image.max() <= 1
    assert torch.equal(picture.paint(**given)[0], image)  # by its seed
    [edited] = picture.paint(**given, image=image)
    assert edited.shape == image.shape
    assert not torch.equal(edited, image)
    asked = {**usual(clip), "service": running.address, "model": "wan", "prompt": "waves", "num_frames": 5, "steps": 2}
    [path] = clip.paint(**asked)
    assert Path(path).parent == tmp_path
    assert b"ftyp" in Path(path).read_bytes()[:16]
    with pytest.raises(RuntimeError, match="nobody"):
        picture.paint(**{**given, "model": "nobody"})
    with pytest.raises(RuntimeError, match="no patchpipe service answers"):
        picture.paint(**{**given, "service": "http://127.0.0.1:9"})


def test_every_input_is_taken(nodes: ModuleType) -> None:
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        assert callable(getattr(node, node.FUNCTION))
        assert set(inspect.signature(node.paint).parameters) <= {"self", *usual(node), "image", "asked"}
