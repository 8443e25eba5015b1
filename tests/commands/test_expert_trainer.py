"""ExpertTrainer: `mole train-expert` from Python leaves the same run and gives its expert."""

import pytest
from walk import SHORT, SMALL, data

import mole
from mole.experts import ExpertLibrary


def test_it_trains_an_expert_and_publishes_it(tmp_path):
    words = [*SMALL, *SHORT, *data("reverse"), f"library={tmp_path / 'lib'}", "name=reverse"]
    trainer = mole.ExpertTrainer(tmp_path / "run", *words)
    expert = trainer.train()
    assert expert.card.tasks == ("reverse",)
    assert ExpertLibrary.open(str(tmp_path / "lib")).card("reverse").content == expert.card.content
    assert (tmp_path / "run" / "config.yaml").is_file()
    with pytest.raises(FileExistsError, match="choose a new folder"):
        mole.ExpertTrainer(tmp_path / "run", *words)


def test_what_is_wrong_is_told_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="dataset"):
        mole.ExpertTrainer(tmp_path / "run", *SMALL, "adapter=lora")
    assert not (tmp_path / "run").exists()
