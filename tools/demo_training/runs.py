"""The folder of a training run: what it was told, its checkpoint, and the pipeline it makes.

``RUN/run.json``, ``RUN/checkpoint.pt`` and ``RUN/pipeline`` (an ordinary FluxPipeline folder, rewritten with
the averaged weights at the end). A run can go on from its checkpoint, or start from the weights of any such
pipeline.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import FluxPipeline

from .autoencoder import load_autoencoder
from .captions import STYLES, Caption, all_forms
from .dataset import Pictures, load_pictures
from .model import Shape, export, load_pipeline, new_pipeline
from .stages import PLANS
from .transformer import CHECKPOINT, Settings, Trainer, TrainingSet
from .vocabulary import clip_tokenizer, t5_tokenizer

RUN_FILE = "run.json"
PIPELINE = "pipeline"
USUAL_MINUTES = 58.0
CALL = {
    "negative_prompt": "",
    "true_cfg_scale": 3.0,
    "height": 128,
    "width": 128,
    "num_inference_steps": 20,
    "max_sequence_length": 32,
}


@dataclass(frozen=True)
class RunFile:
    """What a run was told, so that it can go on."""

    plan: str
    minutes: float

    def write(self, folder: Path) -> None:
        """Write it into the run's folder."""
        (folder / RUN_FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> RunFile:
        """Read it from the run's folder."""
        return cls(**json.loads((folder / RUN_FILE).read_text(encoding="utf-8")))


def is_run(folder: Path) -> bool:
    """Whether a folder is a run that can go on."""
    return all((folder / name).exists() for name in (RUN_FILE, CHECKPOINT, PIPELINE))


def notes_of(pictures: Pictures) -> list[tuple[str, str]]:
    """The text files beside the weights: call settings, concepts, held-out captions."""
    core = pictures.pick(core=True)
    concepts = sorted({entry.concept for entry in core.entries})
    held = [str(entry.caption) for entry in core.entries if entry.held_out]
    return [
        ("call.json", json.dumps(CALL, indent=2) + "\n"),
        ("concepts.txt", "\n".join(concepts) + "\n"),
        ("heldout.txt", "\n".join(held) + "\n"),
    ]


def caption_corpus(pictures: Pictures) -> list[str]:
    """All the text that the tokenizers learn from: every concept in every style and form."""
    concepts = sorted({entry.concept for entry in pictures.entries})
    return [form for concept in concepts for style in STYLES for form in all_forms(Caption(concept, style))]


def fresh_pipeline(pictures: Pictures, autoencoder: Path, tokenizers: Path | None, shape: Shape) -> FluxPipeline:
    """A pipeline with a trained autoencoder, random networks, and new or given tokenizers."""
    vae = load_autoencoder(autoencoder)
    if tokenizers is not None:
        given = load_pipeline(tokenizers)
        return new_pipeline(vae, given.tokenizer, given.tokenizer_2, shape)
    corpus = caption_corpus(pictures)
    return new_pipeline(vae, clip_tokenizer(corpus), t5_tokenizer(corpus), shape)


@dataclass(frozen=True)
class Request:
    """What the ``transformer`` command was asked for; ``None`` takes the default of the situation.

    Args:
        data: Folder of the prepared pictures.
        out: Folder for the run.
        device: Where to train.
        plan: Name of the schedule.
        minutes: Length of the whole schedule.
        resume: A pipeline folder to continue from, or a run to go on with.
        autoencoder: A trained autoencoder, for a start from scratch.
        tokenizers: Pipeline folder whose tokenizers to reuse, for a start from scratch.
        shape: Size of the transformer, for a start from scratch.
        variants: Moved copies of each picture.
        compile: Whether to compile the blocks.
        save_every: Minutes between checkpoints.
        seed: Seed of everything random.
    """

    data: Path
    out: Path
    device: torch.device
    plan: str | None
    minutes: float | None
    resume: Path | None
    autoencoder: Path
    tokenizers: Path | None
    shape: Shape
    variants: int
    compile: bool | None
    save_every: float
    seed: int

    @property
    def going_on(self) -> Path | None:
        """The run to go on with, if that is what was asked."""
        return self.resume if self.resume is not None and is_run(self.resume) else None

    def told(self) -> RunFile:
        """The schedule: as asked, else as the run was told before, else by the device."""
        before = RunFile.read(self.going_on) if self.going_on else None
        plan = self.plan or (before.plan if before else self._usual_plan())
        if plan not in PLANS:
            raise ValueError(f"unknown plan {plan!r}; the plans are {', '.join(PLANS)}")
        return RunFile(plan, self.minutes or (before.minutes if before else USUAL_MINUTES))

    def _usual_plan(self) -> str:
        if self.resume is not None:
            return "continue"
        return "gpu" if self.device.type == "cuda" else "cpu"

    def pipeline(self, pictures: Pictures) -> FluxPipeline:
        """The pipeline that training starts from."""
        if self.resume is None:
            return fresh_pipeline(pictures, self.autoencoder, self.tokenizers, self.shape)
        return load_pipeline(self.going_on / PIPELINE if self.going_on else self.resume)

    def settings(self, told: RunFile) -> Settings:
        """The trainer's settings."""
        compiled = self.device.type == "cuda" if self.compile is None else self.compile
        stages = PLANS[told.plan]
        return Settings(stages, told.minutes, self.device, self.out, self.save_every, self.seed, compiled)


def train(request: Request) -> Path:
    """Train as asked; return the folder of the pipeline with the averaged weights."""
    told = request.told()
    sizes = (128, 256) if any(stage.large for stage in PLANS[told.plan]) else (128,)
    pictures = {size: load_pictures(request.data, size) for size in sizes}
    pipe = request.pipeline(pictures[128])
    notes, folder = notes_of(pictures[128]), request.out / PIPELINE
    request.out.mkdir(parents=True, exist_ok=True)
    if request.out != request.going_on:
        export(pipe, folder, notes)
    told.write(request.out)
    pipe.vae.to(request.device)
    trainer = Trainer(pipe, TrainingSet.encode(pipe, pictures, request.variants), request.settings(told))
    if request.going_on:
        trainer.restore(request.going_on / CHECKPOINT)
    trainer.run()
    trainer.average.keep()
    export(pipe, folder, notes)
    return folder


def export_run(run: Path, out: Path) -> None:
    """Write the averaged weights of a run's checkpoint as a pipeline folder.

    Raises:
        FileNotFoundError: The folder holds no run.
    """
    if not is_run(run):
        raise FileNotFoundError(f"{run} is no training run: it needs {RUN_FILE}, {CHECKPOINT} and {PIPELINE}/")
    pipe = load_pipeline(run / PIPELINE)
    state = torch.load(run / CHECKPOINT, map_location="cpu", weights_only=True)
    modules = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)
    live = [param for module in modules for param in module.parameters()]
    with torch.no_grad():
        torch._foreach_copy_(live, state["average"])
    names = ("call.json", "concepts.txt", "heldout.txt")
    notes = [(name, (run / PIPELINE / name).read_text(encoding="utf-8")) for name in names]
    export(pipe, out, notes)
