"""`mole generate`: text from an expert or a mixture, with its KV caches, and the routing of every token if asked for."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from rich.console import Console

from mole import backbones, mixtures
from mole.backbones import Backbone
from mole.config import RunConfig, seed_for
from mole.data.encode import text_ids
from mole.evaluation.exact_match import end_ids
from mole.mixtures import MultiExpertModel
from mole.registry import BACKBONES, config_dataclass
from mole.routing.log import RoutingLog
from mole.run_folder import RunFolder, write_atomically


@config_dataclass
class Generate:
    """Which model goes on from which prompts, and how."""

    backbone: BACKBONES.union()  # type: ignore[valid-type]
    model: str
    prompt: str | None = None
    prompts: str | None = None
    task: str | None = None
    chat: bool = False
    name: str = "text"
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    num_beams: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 16
    log: bool = False
    allow_other_backbone: bool = False
    seed: int = 0
    run: RunConfig

    def __post_init__(self):
        problems = []
        if (self.prompt is None) == (self.prompts is None):
            problems.append("prompt, prompts: give one of the two: prompt=<text> or prompts=<file>")
        if not self.do_sample and (self.temperature != 1.0 or self.top_p != 1.0):
            problems.append("temperature and top_p act on sampling only: set do_sample=true")
        if self.log and self.num_beams > 1:
            problems.append("log=true with num_beams above 1: beams change places, their routing cannot be told apart")
        if problems:
            raise ValueError("\n".join(problems))


def run(config: Generate) -> None:
    """Prints each continuation; writes generations.jsonl, and scalings/ with `log`."""
    run = RunFolder(config.run.folder)
    texts = _prompts(config)
    backbone = backbones.load(config.backbone)
    model = mixtures.open_model(config.model, backbone, allow_other_backbone=config.allow_other_backbone)
    log = RoutingLog(model.sites, model.expert_names)
    if config.log:
        log.end_ids = tuple(dict.fromkeys([*end_ids(model, backbone.tokenizer), backbone.tokenizer.pad_token_id]))
        model.listeners.append(log)
    run.update(status="running")
    torch.manual_seed(seed_for("generation", config.seed))
    rows = list(_generated(config, model, backbone, texts))
    write_atomically(run.generations, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if config.log:
        log.flush(run.scalings / "log", decode=partial(_texts, backbone.tokenizer))


def _prompts(config: Generate) -> list[str]:
    if config.prompt is not None:
        return [config.prompt]
    assert config.prompts is not None
    path = Path(config.prompts)
    if not path.is_file():
        raise ValueError(f"prompts={path}: there is no such file")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"prompts={path}: the file is empty")
    if path.suffix != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{path}:{number}: not an object with "prompt"') from None
    return found


def _generated(
    config: Generate, model: MultiExpertModel, backbone: Backbone, texts: list[str]
) -> Iterator[dict[str, Any]]:
    """One row per prompt, printed as it comes."""
    tokenizer, console = backbone.tokenizer, Console(highlight=False)
    options: dict[str, Any] = {"do_sample": config.do_sample, "num_beams": config.num_beams}
    if config.do_sample:
        options |= {"temperature": config.temperature, "top_p": config.top_p}
    for start in range(0, len(texts), config.batch_size):
        prompts = texts[start : start + config.batch_size]
        ids, mask = _encoded(config, backbone, prompts)
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            task_names=None if config.task is None else [config.task] * len(prompts),
            max_new_tokens=config.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=end_ids(model, tokenizer),
            **options,
        )
        for prompt, row in zip(prompts, output[:, ids.shape[1] :].tolist(), strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            console.print(prompt, style="dim", end="", markup=False, soft_wrap=True)
            console.print(text, markup=False, soft_wrap=True)
            yield {"prompt": prompt, "completion": text}


def _encoded(config: Generate, backbone: Backbone, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded on the left, and their mask. Raises ValueError for one that leaves no room in the context."""
    tokenizer = backbone.tokenizer
    if config.chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("chat=true: this backbone's tokenizer has no chat template")
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        rows = [
            list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"])
            for turn in turns
        ]
    else:
        rows = [text_ids(tokenizer, prompt) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise ValueError("an empty prompt, and the tokenizer has no beginning-of-sequence token to start from")
        room = backbone.context_length
        if room is not None and len(row) + config.max_new_tokens > room:
            raise ValueError(
                f"the prompt {prompt[:40]!r} has {len(row)} tokens; with max_new_tokens={config.max_new_tokens} that is "
                f"more than the backbone's context of {room}"
            )
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return ids, mask


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token by itself."""
    return [tokenizer.decode([token]) for token in ids]
