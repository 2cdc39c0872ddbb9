"""``transformer``: trains the transformer and both text encoders together, with rectified flow."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor

from .captions import Caption, CaptionMix
from .console import CONSOLE, Meter, Running
from .dataset import Pictures
from .ema import Average
from .latents import Shuffle, encode, normalise
from .model import Painter, painter_of
from .muon import Muon
from .stages import Stage, find_stage
from .text import Tokens

CHECKPOINT = "checkpoint.pt"


def flow_loss(painter: Painter, latents: Tensor, s: Tensor, noise: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
    """Mean squared error of the predicted flow, one number per picture."""
    level = s[:, None, None, None]
    with torch.autocast(latents.device.type, torch.bfloat16):
        flow = painter((1 - level) * latents + level * noise, s, clip_ids, t5_ids)
    return (flow.float() - (noise - latents)).square().mean(dim=(1, 2, 3))


@dataclass
class TrainingSet:
    """Captions with their latents: per picture size, shape (variants, pictures, 16, side / 8, side / 8)."""

    captions: list[Caption]
    latents: dict[int, Tensor]

    @classmethod
    def encode(cls, pipe: FluxPipeline, pictures: dict[int, Pictures], variants: int) -> TrainingSet:
        """Encode the seen core pictures of each size; variants beyond the first are moved a little."""
        latents: dict[int, Tensor] = {}
        captions: list[Caption] = []
        for size, part in pictures.items():
            seen = part.pick(core=True, held_out=False)
            seeds = [None, *range(1, variants)]
            batch = 64 * 128**2 // size**2
            stacks = [encode(pipe.vae, seen.pixels, batch, jitter=seed) for seed in seeds]
            latents[size] = normalise(pipe.vae, torch.stack(stacks))
            captions = seen.captions
        return cls(captions, latents)


@dataclass
class Settings:
    """What a run is told.

    Args:
        stages: The schedule.
        minutes: Wall-clock time of the whole schedule.
        device: Where to train.
        out: Folder for the checkpoint.
        save_every: Minutes between checkpoints.
        seed: Seed of everything random.
        compile: Whether to compile the blocks.
        mix: How captions are said.
    """

    stages: tuple[Stage, ...]
    minutes: float
    device: torch.device
    out: Path
    save_every: float = 5.0
    seed: int = 0
    compile: bool = False
    mix: CaptionMix = field(default_factory=CaptionMix)


class Trainer:
    """The training loop with its state: weights, their average, optimisers, clock."""

    def __init__(self, pipe: FluxPipeline, data: TrainingSet, settings: Settings) -> None:
        self.settings, self.data = settings, data
        self.painter = painter_of(pipe).to(settings.device).train()
        self.tokens = Tokens(pipe.tokenizer, pipe.tokenizer_2, settings.device)
        self.average = Average(self.painter)
        self.optimizers = self._make_optimizers()
        self.rng = random.Random(settings.seed)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.noise = torch.Generator(settings.device).manual_seed(settings.seed)
        self.shuffle = Shuffle(len(data.captions), self.rng)
        self.spent = 0.0  # seconds of the schedule, over all restarts
        self.step = self.stage_step = self.stage_index = self.pictures = 0
        if settings.device.type == "cpu":  # the fused kernel's backward is slow at so few tokens
            with attention_backend("native"):  # what follows also sets the process's default: give that back
                self.painter.transformer.set_attention_backend("_native_math")
        if settings.compile:
            self.painter.transformer.compile_repeated_blocks()

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        matrices = list(self.painter.matrices())
        text = list(self.painter.text_parameters())
        taken = {id(p) for p in matrices + text}
        rest = [p for p in self.painter.parameters() if id(p) not in taken]
        groups = [{"params": rest}, {"params": text, "text": True}]
        adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
        return [Muon(matrices, lr=1e-3), adamw]

    def run(self) -> None:
        """Train until the clock is up, saving on the way; an interrupt saves too and is raised again."""
        total, offset = self.settings.minutes * 60, self.spent
        loss, saved = Running(), self.spent
        with Meter("transformer", total, spent=offset) as meter:
            try:
                while (spent := offset + meter.seconds) < total:
                    self.spent = spent
                    stage, rate = self._enter(spent / total)
                    loss.add(self.train_step(stage, rate))
                    meter.update(spent, self._figures(stage, rate, loss, meter.seconds))
                    if spent - saved > self.settings.save_every * 60:
                        self.save()
                        saved = spent
                self.spent = total
            finally:
                self.save()
        CONSOLE.print(f"{self.step} steps, {self.pictures} pictures seen")

    def _enter(self, part: float) -> tuple[Stage, float]:
        index, progress = find_stage(self.settings.stages, part)
        if index != self.stage_index:
            self.stage_index, self.stage_step = index, 0
        stage = self.settings.stages[index]
        return stage, stage.rate(progress, self.stage_step)

    def _figures(self, stage: Stage, rate: float, loss: Running, seconds: float) -> str:
        speed = self.step / max(seconds, 1e-9)
        return f"{stage.name}  step {self.step}  loss {loss.mean:.4f}  rate {rate:.3f}  {speed:.2f} steps/s"

    def train_step(self, stage: Stage, rate: float) -> float:
        """One step on one batch; return its loss."""
        length = stage.draw_text(self.rng)
        size = self._draw_size(stage)
        count = min(stage.batch if size == 128 else stage.large_batch, length.batch or stage.batch)
        latents, captions = self._draw(size, count)
        s = stage.noise.draw(count, self.generator).to(latents.device)
        noise = torch.randn(latents.shape, generator=self.noise, device=latents.device)
        ids = self.tokens(captions, length.tokens)
        loss = flow_loss(self.painter, latents, s, noise, *ids).mean()
        loss.backward()
        self._update(stage, rate)
        self.pictures += count
        return loss.item()

    def _draw_size(self, stage: Stage) -> int:
        return 256 if self.rng.random() < stage.large else 128

    def _draw(self, size: int, count: int) -> tuple[Tensor, list[str]]:
        rows = self.shuffle.take(count)
        latents = self.data.latents[size]
        variants = [self.rng.randrange(len(latents)) for _ in rows]
        captions = [self.settings.mix.draw(self.data.captions[row], self.rng) for row in rows]
        return latents[variants, rows], captions

    def _update(self, stage: Stage, rate: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.painter.parameters(), 1.0)
        muon, adamw = self.optimizers
        for group in muon.param_groups:
            group["lr"] = stage.muon * rate
        for group in adamw.param_groups:
            group["lr"] = stage.adamw * rate * (stage.text_scale if group.get("text") else 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update(min(stage.ema, (1 + self.step) / (10 + self.step)))
        self.step += 1
        self.stage_step += 1

    def save(self) -> None:
        """Write the checkpoint; a crash in between leaves the old one whole."""
        state: dict[str, Any] = {name: getattr(self, name) for name in _COUNTERS}
        state |= {
            "weights": [param.detach() for param in self.painter.parameters()],
            "average": self.average.values,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "left": self.shuffle.left,
            "random": (self.rng.getstate(), self.generator.get_state(), self.noise.get_state()),
        }
        partial = self.settings.out / f"{CHECKPOINT}.part"
        torch.save(state, partial)
        partial.replace(self.settings.out / CHECKPOINT)

    def restore(self, file: Path) -> None:
        """Go on from a checkpoint of the same model and schedule."""
        state = torch.load(file, map_location=self.settings.device, weights_only=True)
        with torch.no_grad():
            torch._foreach_copy_(list(self.painter.parameters()), state["weights"])
        self.average.load(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.shuffle.left = state["left"]
        python, generator, noise = state["random"]
        self.rng.setstate(python)
        self.generator.set_state(generator.cpu())
        self.noise.set_state(noise.cpu())
        for name in _COUNTERS:
            setattr(self, name, state[name])


_COUNTERS = ("spent", "step", "stage_step", "stage_index", "pictures")
