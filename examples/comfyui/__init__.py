"""Nodes for ComfyUI that have a patchpipe service paint: copy this folder to ``custom_nodes/patchpipe``.

The key of a service that has keys is read from PATCHPIPE_API_KEY.
"""

from __future__ import annotations

import base64
import io
import json
import os
import tempfile
import time
import uuid
from collections.abc import Mapping
from typing import Any
from urllib import error, request

import numpy as np
import torch
from PIL import Image
from torch import Tensor

POLL_SECONDS = 1.0
CLIENT_SECONDS = 3600.0
_SERVICE = {
    "service": ("STRING", {"default": "http://localhost:8000"}),
    "model": ("STRING", {"default": "", "tooltip": "as the service names it; empty is its first"}),
    "prompt": ("STRING", {"multiline": True, "default": ""}),
}
_MORE = {
    "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
    "width": ("INT", {"default": 0, "min": 0, "max": 16384, "step": 16, "tooltip": "0 is the model's"}),
    "height": ("INT", {"default": 0, "min": 0, "max": 16384, "step": 16, "tooltip": "0 is the model's"}),
    "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0 is the model's"}),
    "guidance_scale": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 100.0, "tooltip": "-1 is the model's"}),
    "deadline_s": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1e6, "tooltip": "seconds; 0 leaves it to the service"}),
}
_SEED = {"seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1024, "control_after_generate": True})}


class PatchpipePicture:
    """A picture from a prompt, or from an image and a prompt."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "paint", "patchpipe"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI shows."""
        strength = ("FLOAT", {"default": 0.6, "min": 0.0, "max": 1.0, "step": 0.05, "tooltip": "with an image"})
        return {"required": {**_SERVICE, **_SEED}, "optional": {"image": ("IMAGE",), "strength": strength, **_MORE}}

    def paint(self, service: str, image: Tensor | None = None, strength: float = 0.6, **asked: Any) -> tuple[Tensor]:
        """The picture, of shape (1, height, width, 3) from 0 to 1."""
        fields = _fields(asked)
        if image is None:
            told = _call(service, "/v1/images/generations", *_json(fields))
        else:
            files = [("image", _png(one)) for one in image]
            told = _call(service, "/v1/images/edits", *_form({**fields, "strength": strength}, files))
        painted = Image.open(io.BytesIO(base64.b64decode(json.loads(told)["data"][0]["b64_json"]))).convert("RGB")
        return (torch.from_numpy(np.asarray(painted, dtype=np.float32) / 255)[None],)


class PatchpipeClip:
    """A clip from a prompt; gives the path of its file."""

    RETURN_TYPES, RETURN_NAMES, FUNCTION, CATEGORY = ("STRING",), ("path",), "paint", "patchpipe"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI shows."""
        frames = {
            "num_frames": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0 is the model's"}),
            "fps": ("FLOAT", {"default": 16.0, "min": 1.0, "max": 120.0}),
            "image": ("IMAGE", {"tooltip": "what it starts from, where the model needs a picture"}),
        }
        return {"required": {**_SERVICE, **_SEED}, "optional": {**frames, **_MORE}}

    def paint(self, service: str, image: Tensor | None = None, **asked: Any) -> tuple[str]:
        """The path of the MP4."""
        files = [] if image is None else [("input_reference", _png(image[0]))]
        clip = json.loads(_call(service, "/v1/videos", *_form(_fields(asked), files)))
        while clip["status"] in ("queued", "in_progress"):
            time.sleep(POLL_SECONDS)
            clip = json.loads(_call(service, f"/v1/videos/{clip['id']}"))
        if clip["status"] != "completed":
            raise RuntimeError(clip["error"]["message"])
        path = os.path.join(_folder(), f"patchpipe_{clip['id']}.mp4")
        with open(path, "wb") as file:
            file.write(_call(service, f"/v1/videos/{clip['id']}/content"))
        return (path,)


def _fields(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request, without those that are left to the model or the service."""
    names = {"steps": "num_inference_steps"}
    given = {names.get(name, name): value for name, value in asked.items() if name == "seed" or value not in ("", 0)}
    return {name: value for name, value in given.items() if not (name == "guidance_scale" and value < 0)}


def _json(fields: Mapping[str, Any]) -> tuple[bytes, str]:
    return json.dumps(fields).encode(), "application/json"


def _form(fields: Mapping[str, Any], files: list[tuple[str, bytes]]) -> tuple[bytes, str]:
    """A form's bytes and its type."""
    mark = uuid.uuid4().hex
    parts = [(f'name="{name}"', "", str(value).encode()) for name, value in fields.items()]
    many = "[]" if len(files) > 1 else ""
    parts += [
        (f'name="{name}{many}"; filename="image.png"', "Content-Type: image/png\r\n", data) for name, data in files
    ]
    lines = [
        f"--{mark}\r\nContent-Disposition: form-data; {head}\r\n{kind}\r\n".encode() + data + b"\r\n"
        for head, kind, data in parts
    ]
    return b"".join([*lines, f"--{mark}--\r\n".encode()]), f"multipart/form-data; boundary={mark}"


def _png(image: Tensor) -> bytes:
    """An image of shape (height, width, 3) from 0 to 1 as a file."""
    file = io.BytesIO()
    Image.fromarray((image.clamp(0, 1).cpu().numpy() * 255).round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def _call(service: str, path: str, body: bytes | None = None, kind: str = "") -> bytes:
    """What the service answers.

    Raises:
        RuntimeError: It refuses; the message says why.
    """
    headers = {"Content-Type": kind} if body is not None else {}
    if key := os.environ.get("PATCHPIPE_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    asked = request.Request(service.rstrip("/") + path, data=body, headers=headers)
    try:
        with request.urlopen(asked, timeout=CLIENT_SECONDS) as answer:
            return bytes(answer.read())
    except error.HTTPError as refused:
        raise RuntimeError(f"patchpipe: {json.loads(refused.read())['error']['message']}") from None
    except error.URLError as unreachable:
        raise RuntimeError(f"no patchpipe service answers at {service}: {unreachable.reason}") from None


def _folder() -> str:
    """ComfyUI's folder of results."""
    try:
        import folder_paths  # ComfyUI's own
    except ImportError:
        return tempfile.gettempdir()
    return str(folder_paths.get_output_directory())


NODE_CLASS_MAPPINGS = {"PatchpipePicture": PatchpipePicture, "PatchpipeClip": PatchpipeClip}
NODE_DISPLAY_NAME_MAPPINGS = {"PatchpipePicture": "patchpipe picture", "PatchpipeClip": "patchpipe clip"}
