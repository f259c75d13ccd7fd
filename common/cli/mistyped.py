"""What a person has mistyped, in our words: the value as it was typed, and what was meant."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import SettingError
from .names import command_line

# What other trainers call it.
_OTHER_COMMANDS = {
    "train": "lora", "finetune": "lora", "fine-tune": "lora", "full": "sft", "inference": "generate",
    "sample": "generate", "convert": "export", "prepare": "encode", "preprocess": "encode", "check": "validate",
    "clean": "clean-cache", "estimate": "plan",
}  # fmt: skip
_OTHER_OPTIONS = {
    "--learning-rate": "--lr", "--output-dir": "--out", "--output": "--out", "--model-path": "--model",
    "--pretrained-model-name-or-path": "--model", "--lora-alpha": "--alpha", "--lora-rank": "--rank",
    "--train-epochs": "--epochs", "--num-train-epochs": "--epochs", "--train-steps": "--steps",
    "--max-train-steps": "--steps", "--train-batch-size": "--batch-size", "--lr-scheduler": "--lr-schedule",
    "--lr-warmup-steps": "--warmup", "--gradient-accumulation-steps": "--accumulate",
    "--mixed-precision": "--precision", "--checkpointing-steps": "--save-every", "--checkpointing-limit": "--keep",
    "--report-to": "--tracker", "--resume-from-checkpoint": "--resume", "--validation-steps": "--validate-every",
    "--train-resolution": "--resolution", "--caption-column": "--prompts", "--video-column": "--videos",
    "--image-column": "--images", "--data": "--shards", "--num-gpus": "--nproc", "--cfg": "--guidance",
    "--guidance-scale": "--guidance", "--lora-path": "--lora", "-v": "--version", "--mem": "--host",
    "--validation-prompt": "--validate-prompt", "--validation-prompts": "--validate-prompts",
    "--validation-images": "--validate-image", "--validation-image": "--validate-image", "--partition": "--queue",
    "--cpus-per-task": "--cpus", "--job-name": "--name", "--gpus-per-node": "--gpus", "--epsilon": "--eps",
    "--negative": "--negative-prompt",
}  # fmt: skip

# What the finetune scripts of CogVideo, the sister program or a scheduler call an option, and a command has none for.
_SHARDS = "belongs to cogprep encode{}; cogtrain takes shards: --shards out/"
_NO_LOADER = "leave it out: shards are read ahead as they need be"
_ALL_GPUS = "leave it out: all GPUs are taken; --nproc N takes N"
_VALIDATION = '--validate-prompt "..." and --validate-every N; of clips set aside, --validate-shards'
_FOUND = "leave it out: --model says it"
_CACHE = "leave it out: export HF_HOME=FOLDER names where models lie"
_TRAIN = {
    "--data-root": _SHARDS.format(""), "--resolution": _SHARDS.format(""), "--frames": _SHARDS.format(""),
    "--train-resolution": _SHARDS.format(", as --resolution"), "--caption-column": _SHARDS.format(", as --prompts"),
    "--video-column": _SHARDS.format(", as --videos"), "--image-column": _SHARDS.format(", as --images"),
    "--prompts": _SHARDS.format(""), "--videos": _SHARDS.format(""), "--images": _SHARDS.format(""),
    "--model-path": "leave it out: the model is that of the shards, of cogprep encode --model; --model, where it moved",
    "--model-name": "leave it out: the shards say it", "--model-type": "leave it out: the shards say it",
    "--training-type": "cogtrain lora or cogtrain sft", "--gpus": _ALL_GPUS, "--num-gpus": _ALL_GPUS,
    "--num-processes": _ALL_GPUS, "--pin-memory": _NO_LOADER, "--num-workers": _NO_LOADER, "--workers": _NO_LOADER,
    "--gradient-checkpointing": "leave it out: blocks are recomputed as --memory says", "--do-validation": _VALIDATION,
    "--validation-dir": "--validate-prompts FILE, a prompt in each line",
    "--gen-fps": "belongs to cogtrain generate, as --fps",
    "--enable-slicing": "leave it out", "--enable-tiling": "leave it out: cogprep encode --tiling",
    "--nccl-timeout": "leave it out", "--id-token": _SHARDS.format(""), "--tracker-name": "leave it out",
    "--lr-num-cycles": "leave it out: a cosine goes down once", "--lr-power": "leave it out",
    "--beta3": "leave it out", "--validation-prompt-separator": "leave it out: --validate-prompt for each",
    "--validation-videos": "--validate-videos N, with --validate-shards of cogprep encode --holdout",
    "--config-file": "--strategy zero2 (or another) says what an accelerate file did; --config takes TOML",
    "--use-8bit-adam": "--optimizer adamw8bit", "--cache-dir": _CACHE,
    **dict.fromkeys(("--height", "--width", "--fps", "--max-num-frames"), _SHARDS.format(", as --resolution")),
}  # fmt: skip
_TRAINED = [
    "--batch-size", "--learning-rate", "--lr-scheduler", "--lr-warmup-steps", "--train-steps", "--train-epochs",
    "--gradient-accumulation-steps", "--gradient-checkpointing", "--lora-alpha", "--target-modules", "--training-type",
    "--checkpointing-steps", "--checkpointing-limit", "--resume-from-checkpoint", "--report-to", "--do-validation",
    "--validation-prompt", "--validation-prompts", "--validation-images", "--validation-steps", "--validation-dir",
]  # fmt: skip
_ENCODE = {
    "--nproc": "--gpus N", "--num-processes": "--gpus N", "--model-type": _FOUND, "--model-name": _FOUND,
    "--fps": "leave it out: frames are taken at the model's own rate", "--enable-tiling": "--tiling on",
    "--enable-slicing": "leave it out", "--cache-dir": _CACHE,
    **dict.fromkeys(("--height", "--width", "--max-num-frames"), "--resolution, as FRAMESxHEIGHTxWIDTH: 49x480x720"),
    **dict.fromkeys(("--shards", "--lr", "--steps", "--epochs", "--rank"), "belongs to cogtrain lora"),
    **dict.fromkeys(_TRAINED, "belongs to cogtrain lora, which says what it is called here"),
}  # fmt: skip
_IN_WORDS: Mapping[str, Mapping[str, str]] = {
    "lora": _TRAIN, "sft": _TRAIN, "encode": _ENCODE, "validate": _ENCODE,
    "launch": {"--requeue": "leave it out: a job that is stopped is requeued as it is"},
}  # fmt: skip
_CLOSE = 0.75  # how like an option's name a word is at least that is taken for it


def no_such_command(program: str, word: str, known: Sequence[str]) -> SettingError:
    meant = "--" + word if word in ("help", "version") else nearest(word, known, _OTHER_COMMANDS)
    return SettingError(
        f"there is no command {word!r}",
        where=f"{program} {word}",
        fix=f"{program} {meant}" if meant else f"one of {', '.join(known)}",
    )


def given_twice(parameters: Sequence[Any], words: Sequence[str]) -> list[str]:
    """Options that are given more than once, of which the last counts; those that take several words are not meant."""
    names = [word.split("=", 1)[0] for word in itertools.takewhile(lambda word: word != "--", words)]
    single = [parameter for parameter in parameters if not getattr(parameter, "multiple", True)]
    return [
        parameter.opts[0]
        for parameter in single
        if sum(name in (*parameter.opts, *parameter.secondary_opts) for name in names if name.startswith("--")) > 1
    ]


def in_our_words(
    ctx: Any, parameters: Sequence[Any], words: Sequence[str], error: Any, prose: Collection[str] = ()
) -> SettingError:  # fmt: skip
    """What is wrong, the value that was typed, and what was meant.

    Args:
        prose: options that take a sentence, which may lack its quotes.
    """
    bare = {
        parameter.name: parameter.name.upper() for parameter in parameters if parameter.param_type_name == "argument"
    }
    help = f"{ctx.command_path} --help lists them"
    if name := getattr(error, "option_name", ""):
        options = [option for parameter in parameters for option in parameter.opts if option.startswith("--")]
        if name in options:
            return SettingError(f"{name} needs a value", where=name, fix=f"{name} VALUE")
        known = {*options, *(o for parameter in parameters for o in parameter.secondary_opts), *ctx.help_option_names}
        names = [word.split("=", 1)[0] for word in itertools.takewhile(lambda word: word != "--", words)]
        unknown = list(dict.fromkeys([name, *(word for word in names if word[:2] == "--" and word not in known)]))
        instead = {word: _meant(word, options, ctx.command_path.split()[-1]) for word in unknown}
        for word in unknown:
            if (own := word.lstrip("-")) in bare:
                instead[word] = command_line(*ctx.command_path.split(), _typed_for([word], words) or bare[own])
        if len(unknown) == 1:
            return SettingError(f"there is no option {name}", where=name, fix=instead[name] or help)
        each = [f"{word}: {told}" for word, told in instead.items() if told]
        return SettingError(
            f"there are no options {', '.join(unknown)}",
            where=ctx.command_path,
            fix="\n       ".join([*each, *[help] * (len(each) < len(unknown))]),
        )
    parameter = getattr(error, "param", None)
    if parameter is None:
        stray = re.search(r"\(([^()]*)\)$", str(error.message))
        text = f"{stray[1]!r} belongs to no option" if stray else str(error.message)
        if stray and (sentence := _without_quotes(stray[1].split()[0], words, prose)):
            return SettingError(text, where=ctx.command_path, fix=f"a sentence in quotes: {sentence}")
        there = ", ".join(f"{name} is {ctx.params[own]}" for own, name in bare.items() if ctx.params.get(own))
        if stray and there:
            fix = f"leave it out ({there}), or put it behind its option; {help}"
            return SettingError(text, where=ctx.command_path, fix=fix)
        first = next((option for parameter in parameters for option in parameter.opts if option.startswith("--")), "")
        such = f", as {first} {stray[1]}" if stray and first and words[:1] == [stray[1]] else ""
        return SettingError(text, where=ctx.command_path, fix=f"put it behind its option{such}; {help}")
    flag = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.opts[0].upper()
    takes = "".join(str(parameter.metavar or "").split())
    if takes == "number" and "integer" in str(error.message):
        takes = "a whole number"
    typed = _typed_for(parameter.opts, words)
    what = f"{flag} takes {'a number' if takes == 'number' else takes.replace('|', ', ')}" + (
        f", not {typed!r}" if typed is not None else ""
    )
    choices = takes.split("|") if "|" in takes else []
    meant = nearest(typed or "", choices, {}) or (choices[0] if choices else "NUMBER" if "number" in takes else takes)
    return SettingError(what, where=flag, fix=f"{flag} {meant}")


def _without_quotes(stray: str, words: Sequence[str], prose: Collection[str]) -> str:
    """An option with the sentence that follows it, of which ``stray`` is the second word; empty where there is none."""
    for at, (option, _, second) in enumerate(zip(words, words[1:], words[2:], strict=False), 1):
        if option in prose and second == stray:
            return f'{option} "{" ".join(itertools.takewhile(lambda word: word[:1] != "-", words[at:]))}"'
    return ""


def _typed_for(options: Sequence[str], words: Sequence[str]) -> str | None:
    """The last value given for an option."""
    found = None
    for word, after in itertools.zip_longest(words, words[1:]):
        name, equals, value = word.partition("=")
        if name in options:
            found = value if equals else after
    return found


def _meant(word: str, options: Sequence[str], command: str) -> str | None:
    """What to type instead of an option that a command does not have; None where nobody can tell."""
    told = _IN_WORDS.get(command, {}).get(word.lower().replace("_", "-"))
    return told or nearest(word, options, _OTHER_OPTIONS, _CLOSE)


def nearest(word: str, known: Sequence[str], others: Mapping[str, str], cutoff: float = 0.6) -> str | None:
    """The one of ``known`` that was meant by a word: what others call so, or the one that is written like it."""
    plain = word.lower().replace("_", "-")
    if others.get(plain) in known:
        return others[plain]
    names = {one.lstrip("-"): one for one in known}
    return next((names[one] for one in difflib.get_close_matches(plain.lstrip("-"), names, n=1, cutoff=cutoff)), None)
