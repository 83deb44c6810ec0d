"""What the tasks of sound share: reading, resampling, random changes, a model's inputs."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ticktune.device import mix
from ticktune.errors import DataError

Sound = np.ndarray[Any, Any]
Convolutions = list[tuple[int, int]]
"""(kernel, stride) of each convolution that turns samples into frames."""

_ZERO_CROSSINGS = 10
_BETA = 5.0  # of the Kaiser window; both as scipy.signal.resample_poly has them
_WINDOW = 0.025  # seconds; the window of the spectrograms that models without convolutions read


def check_sounds(paths: Sequence[str], where: Callable[[int], str]) -> None:
    """Refuses files that are no sound, or hold none; reads their headers only.

    Raises:
        DataError: Naming the first such row.
    """
    for i, path in enumerate(paths):
        try:
            _header(path)
        except DataError as error:
            raise DataError(
                f"{error.problems[0].message} ({path})", where=where(i), fix=error.problems[0].fix
            ) from error


def count_samples(path: str, rate: int) -> int:
    """How many samples a sound has at a sampling rate, by its header.

    Raises:
        DataError: It is no sound.
    """
    frames, own = _header(path)
    return -(-frames * rate // own)


def read_sound(path: str, rate: int, seconds: float) -> Sound:
    """The beginning of a sound, its channels mixed, at a sampling rate: (samples,) float32.

    Args:
        path: The file.
        rate: Samples in a second.
        seconds: What is longer loses its end.

    Raises:
        DataError: It cannot be decoded, or holds a sample that is no number.
    """
    import soundfile

    _, own = _header(path)
    try:
        samples, _ = soundfile.read(path, frames=math.ceil(seconds * own), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, RuntimeError) as error:
        raise DataError(f"this sound cannot be decoded: {error}", where=path) from error
    mono = samples.mean(axis=1)
    if not len(mono) or not np.isfinite(mono).all():
        raise DataError("this sound has no samples, or some that are no numbers", where=path)
    found: Sound = resample(torch.from_numpy(mono), own, rate).numpy()[: max(1, int(seconds * rate))]
    return found


def resample(sound: Tensor, old: int, new: int) -> Tensor:
    """Changes the sampling rate by a windowed-sinc filter, which keeps frequencies from folding over.

    The same filter as ``scipy.signal.resample_poly``, written here as one convolution: neither scipy nor torchaudio
    is otherwise needed, and plain interpolation would alias.

    Args:
        sound: (samples,) float32.
        old: Its samples in a second.
        new: Those wanted.

    Returns:
        (ceil(samples x new / old),) float32.
    """
    shared = math.gcd(old, new)
    down, up = old // shared, new // shared
    if up == down:
        return sound
    kernels, left = _kernels(up, down)
    length = -(-len(sound) * up // down)
    # Each step of the convolution reads on by `down` samples and gives `up` samples.
    steps = -(-length // up)
    padded = F.pad(sound, (left, max(0, (steps - 1) * down + kernels.shape[-1] - left - len(sound))))
    return F.conv1d(padded[None, None], kernels, stride=down)[0].T.reshape(-1)[:length]


@functools.lru_cache(8)
def _kernels(up: int, down: int) -> tuple[Tensor, int]:
    """Filters (up, 1, width) float32 of the output's ``up`` phases, and how far they reach back."""
    most = max(up, down)
    half = _ZERO_CROSSINGS * most
    at = torch.arange(-half, half + 1, dtype=torch.float64)
    low_pass = torch.sinc(at / most) * torch.kaiser_window(2 * half + 1, False, _BETA, dtype=torch.float64)
    low_pass *= up / low_pass.sum()
    left = half // up
    width = left + (half + (up - 1) * down) // up + 1
    # Output `phase` lies at phase x down on the grid of both rates, input i at i x up.
    place = torch.arange(up)[:, None] * down - (torch.arange(width) - left) * up + half
    inside = (place >= 0) & (place <= 2 * half)
    kernels = torch.where(inside, low_pass[place.clamp(0, 2 * half)], 0.0)
    return kernels[:, None].float(), left


def change_sound(sound: Sound, augment: Mapping[str, float], seed: int | None, row: int) -> Sound:
    """A random change of one sound: noise is added, then a piece is silenced.

    Args:
        sound: (samples,) float32.
        augment: Strengths; see :class:`ticktune.recipe.schema.Augment`.
        seed: Of what is random; None: nothing changes.
        row: Number of the example, so that each has its own change.
    """
    noise, silence = augment.get("noise", 0.0), augment.get("time_mask", 0.0)
    if seed is None or not (noise or silence):
        return sound
    rng = np.random.default_rng(mix(seed, row))
    strength, share, place = rng.random(3)
    loudness = float(np.sqrt(np.mean(np.square(sound, dtype=np.float64))))
    changed: Sound = sound + np.float32(noise * strength * loudness) * rng.standard_normal(len(sound), np.float32)
    piece = round(silence * share * len(sound))
    start = round(place * (len(sound) - piece))
    changed[start : start + piece] = 0.0
    return changed


def sound_inputs(extractor: Any, sounds: Sequence[Sound], shortest: int, *, whole: bool = False) -> dict[str, Tensor]:
    """What a model takes of sounds.

    Args:
        extractor: The base's feature extractor.
        sounds: Each (samples,) float32 at its sampling rate.
        shortest: Samples that the model needs; shorter sounds end with silence.
        whole: Whether all are padded to the extractor's own length, not to the longest.

    Returns:
        ``input_values`` or ``input_features``, the batch first, float32; ``attention_mask`` int64 where the model
        was trained with one.

    Raises:
        DataError: The extractor gives no such tensor.
    """
    padded = [np.pad(sound, (0, max(0, shortest - len(sound)))) for sound in sounds]
    # The mask is always asked for: without it, the extractor's mean and variance would count the padding.
    found = extractor(
        padded,
        sampling_rate=extractor.sampling_rate,
        padding="max_length" if whole else True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    inputs = {name: found[name].float() for name in ("input_values", "input_features") if name in found}
    if len(inputs) != 1:
        raise DataError("the base's feature extractor gives neither input_values nor input_features")
    if "attention_mask" in found and getattr(extractor, "return_attention_mask", False):
        inputs["attention_mask"] = found["attention_mask"].long()
    return inputs


def convolutions_of(config: Any) -> Convolutions:
    """The convolutions by which a model of waveforms makes frames; empty for a model of spectrograms."""
    pairs = list(zip(getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ()), strict=True))
    if getattr(config, "add_adapter", False):
        pairs += [(1, config.adapter_stride)] * config.num_adapter_layers
    return [(int(kernel), int(stride)) for kernel, stride in pairs]


def frames_of(samples: Tensor, convolutions: Convolutions) -> Tensor:
    """How many frames sounds of these lengths become, int64."""
    for kernel, stride in convolutions:
        samples = torch.div(samples - kernel, stride, rounding_mode="floor") + 1
    return samples


def shortest_of(convolutions: Convolutions, rate: int) -> int:
    """Samples of the shortest sound that becomes a frame."""
    if not convolutions:
        return math.ceil(_WINDOW * rate)
    samples = 1
    for kernel, stride in reversed(convolutions):
        samples = (samples - 1) * stride + kernel
    return samples


def unmasked(config: Any) -> dict[str, Any]:
    """Config entries that turn off a base's own masking of frames.

    It draws from a generator that no seed of a run reaches, and refuses sounds shorter than its masks;
    ``data.augment.time_mask`` does the same, seeded.
    """
    return {"apply_spec_augment": False} if getattr(config, "apply_spec_augment", False) else {}


def _header(path: str) -> tuple[int, int]:
    """Samples of each channel, and samples in a second."""
    import soundfile

    try:
        info = soundfile.info(path)
    except (soundfile.SoundFileError, OSError, RuntimeError) as error:
        reason = getattr(error, "error_string", None) or str(error)
        raise DataError(
            f"this is no sound that can be read: {reason}", where=path, fix="use wav, flac, ogg or mp3 files"
        ) from error
    if info.frames < 1 or info.samplerate < 1:
        raise DataError("this sound is empty", where=path, fix="remove the row")
    return int(info.frames), int(info.samplerate)
