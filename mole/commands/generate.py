"""`mole generate`: text from an expert or a mixture, with its KV caches, and the routing of every token on request."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from rich.console import Console

from mole import backbones, data
from mole.backbones import Backbone
from mole.commands.moe_models import check_generation, on_its_backbone, open_any
from mole.config.nodes import RunConfig, chosen_datasets
from mole.config.seeds import seed_for
from mole.data.encode import text_ids
from mole.evaluation.exact_match import end_ids
from mole.mixtures import MultiExpertModel
from mole.moe import MoEModel
from mole.registry import BACKBONES, DATASETS, config_dataclass
from mole.routing.log import RoutingLog
from mole.run_folder import RunFolder, write_atomically


@config_dataclass
class Generate:
    """Which model goes on from which prompts, and how."""

    backbone: BACKBONES.union()  # type: ignore[valid-type]
    dataset: DATASETS.union() | None = None  # type: ignore[valid-type]
    datasets: dict[str, DATASETS.union()] = dataclasses.field(default_factory=dict)  # type: ignore[valid-type]
    model: str
    prompt: str | None = None
    prompts: str | None = None
    split: Literal["train", "validation", "test"] = "test"
    limit: Annotated[int, Field(ge=1)] = 3
    task: str | None = None
    chat: bool = False
    name: str = "text"
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    num_beams: Annotated[int, Field(ge=1)] = 1
    self_speculation: bool = False
    batch_size: Annotated[int, Field(ge=1)] = 16
    log: bool = False
    allow_other_backbone: bool = False
    seed: int = 0
    run: RunConfig

    def __post_init__(self):
        problems = []
        given = [self.prompt is not None, self.prompts is not None, bool(self.dataset or self.datasets)]
        if sum(given) != 1:
            problems.append(
                "prompt, prompts, dataset: give exactly one: prompt=<text>, prompts=<file> or dataset=<name>"
            )
        if not self.do_sample and (self.temperature != 1.0 or self.top_p != 1.0):
            problems.append("temperature and top_p act on sampling only: set do_sample=true")
        if self.self_speculation and self.num_beams > 1:
            problems.append("self_speculation=true is for greedy decoding and sampling: set num_beams=1")
        if self.chat and given[2]:
            problems.append("chat=true is for prompt and prompts: a dataset has its own format")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class Prompt:
    """What is given to the model; `expected` is the dataset's answer, where there is one."""

    text: str
    ids: tuple[int, ...]
    task: str | None = None
    expected: str | None = None


def run(config: Generate) -> None:
    """Prints each continuation; writes generations.jsonl, and scalings/ with `log`."""
    run, config = RunFolder(config.run.folder), on_its_backbone(config)
    texts = _texts_of(config)
    backbone = backbones.load(config.backbone)
    model = open_any(config.model, backbone, allow_other_backbone=config.allow_other_backbone)
    prompts = _checked(
        _of_texts(config, backbone, texts) if texts else _of_datasets(config, backbone), config, backbone
    )
    check_generation(model, self_speculation=config.self_speculation, log=config.log, num_beams=config.num_beams)
    if isinstance(model, MultiExpertModel):
        _check_tasks(model, [prompt.task for prompt in prompts])
    log = RoutingLog(model.sites, model.expert_names)
    if config.log:
        log.end_ids = tuple(dict.fromkeys([*end_ids(model, backbone.tokenizer), backbone.tokenizer.pad_token_id]))
        model.listeners.append(log)
    run.update(status="running")
    torch.manual_seed(seed_for("generation", config.seed))
    rows = list(_generated(config, model, backbone, prompts))
    write_atomically(run.generations, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if config.log:
        log.flush(run.scalings / "log", decode=partial(_texts, backbone.tokenizer))


def _texts_of(config: Generate) -> list[str]:
    """The prompts given as text; none if they come from a dataset. Raises ValueError for a file that has none."""
    if config.prompt is not None:
        return [config.prompt]
    if config.prompts is None:
        return []
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


def _of_texts(config: Generate, backbone: Backbone, texts: list[str]) -> list[Prompt]:
    tokenizer = backbone.tokenizer
    if not config.chat:
        return [Prompt(text, tuple(text_ids(tokenizer, text)), config.task) for text in texts]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat=true: this backbone's tokenizer has no chat template")
    turns = [[{"role": "user", "content": text}] for text in texts]
    encoded = [
        tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"] for turn in turns
    ]
    return [Prompt(text, tuple(ids), config.task) for text, ids in zip(texts, encoded, strict=True)]


def _of_datasets(config: Generate, backbone: Backbone) -> list[Prompt]:
    datasets = data.load_many(
        chosen_datasets(config), backbone.tokenizer, seed=config.seed, context_length=backbone.context_length
    )
    found = []
    for name, splits in datasets.items():
        samples = getattr(splits, config.split)
        if not samples:
            raise ValueError(f"dataset {name} has no {config.split} split: choose another split")
        found += [Prompt(s.prompt, s.prompt_ids, config.task or s.task, s.completion) for s in samples[: config.limit]]
    return found


def _checked(prompts: list[Prompt], config: Generate, backbone: Backbone) -> list[Prompt]:
    """The prompts, each with something to start from and room to go on. Raises ValueError, naming one that has not."""
    room = backbone.context_length
    for prompt in prompts:
        if not prompt.ids:
            raise ValueError("an empty prompt, and the tokenizer has no beginning-of-sequence token to start from")
        if room is not None and len(prompt.ids) + config.max_new_tokens > room:
            raise ValueError(
                f"the prompt {prompt.text[:40]!r} has {len(prompt.ids)} tokens: with max_new_tokens="
                f"{config.max_new_tokens} that is more than the backbone's context of {room}; lower max_new_tokens"
            )
    return prompts


def _check_tasks(model: MultiExpertModel, tasks: list[str | None]) -> None:
    """Raises ValueError if the model's router goes by tasks, and a prompt is of none that it can route."""
    for router in model.routers().values():
        known = ", ".join(dict.fromkeys(getattr(router, "tasks", sum(model.shape.expert_tasks, ()))))
        if "task_names" in router.needs and None in tasks:
            raise ValueError(
                f"this mixture's router={model.router_config.name} goes by the task of each prompt: give task=<one>"
                + (f" (known: {known})" if known else "")
            )
        try:
            router.check_tasks([task for task in tasks if task is not None], training=False)
        except ValueError as error:
            raise ValueError(f"{error} when the mixture is built; here give task=<one> (known: {known})") from None


def _generated(
    config: Generate, model: MultiExpertModel | MoEModel, backbone: Backbone, prompts: list[Prompt]
) -> Iterator[dict[str, Any]]:
    """One row per prompt, printed as it comes."""
    tokenizer, console = backbone.tokenizer, Console(highlight=False)
    options: dict[str, Any] = {
        "do_sample": config.do_sample,
        "num_beams": config.num_beams,
        "self_speculation": config.self_speculation,
    }
    if config.do_sample:
        options |= {"temperature": config.temperature, "top_p": config.top_p}
    for start in range(0, len(prompts), config.batch_size):
        chosen = prompts[start : start + config.batch_size]
        ids, mask = _left_padded(chosen, tokenizer.pad_token_id or 0)
        tasks = [prompt.task for prompt in chosen]
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            task_names=None if None in tasks else tasks,
            texts=[prompt.text for prompt in chosen],
            max_new_tokens=config.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=end_ids(model, tokenizer),
            **options,
        )
        for prompt, row in zip(chosen, output[:, ids.shape[1] :].tolist(), strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            console.print(prompt.text, style="dim", end="", markup=False, soft_wrap=True)
            console.print(text, markup=False, soft_wrap=True)
            known = {"task": prompt.task, "expected": prompt.expected}
            yield {"prompt": prompt.text, "completion": text, **{k: v for k, v in known.items() if v is not None}}


def _left_padded(prompts: list[Prompt], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, [B, T] each."""
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, width - len(prompt.ids) :] = 1
    return ids, mask


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token by itself."""
    return [tokenizer.decode([token]) for token in ids]
