import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from config import BATCH_SIZE, K_PERCENT, Config, changed, parse_config, without_effect


def test_defaults_are_those_of_the_exercise():
    config = parse_config([])
    assert config == Config()
    assert (config.epochs, config.seed, config.seeds, config.scope, config.skip) == (10, 0, 1, "layer", ())
    assert config.k == K_PERCENT == (0, 25, 50, 60, 70, 75, 80, 85, 90, 92.5, 95, 97.5, 99)
    assert config.inputs == ROOT / "inputs"


def test_every_setting_has_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as ending:
        parse_config(["--help"])
    assert ending.value.code == 0
    text = capsys.readouterr().out
    for name in Config.__dataclass_fields__:
        assert re.search(rf"^  --{name.replace('_', '-')}\b.*\n? +\w", text, re.MULTILINE)
    assert "(default: 0.005)" in text


def test_help_shows_any_folder(tmp_path):
    (folder := tmp_path / "50%" / "src").mkdir(parents=True)
    shutil.copy(ROOT / "src/config.py", folder)
    command = [sys.executable, "-c", "import config; config.parse_config(['--help'])"]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "50%/plots)" in re.sub(r"\s+", "", answer.stdout)


def test_k_is_sorted_each_once_and_with_the_dense_network():
    assert parse_config(["--k", "90", "50", "--k", "90", "1e1"]).k == (0, 10, 50, 90)


def test_flags_of_several_values_add_up():
    assert parse_config(["--skip", "fc1", "fc5"]).skip == parse_config(["--skip", "fc1", "--skip", "fc5"]).skip
    assert parse_config(["--keep", "weight:90", "--keep", "unit:62.5"]).keep == (("weight", 90.0), ("unit", 62.5))
    assert parse_config([]).methods == ("weight", "unit")
    assert parse_config(["--methods", "weight", "random_weight"]).methods == ("weight", "random_weight")


def test_what_says_nothing_of_the_numbers():
    assert without_effect(parse_config([])) == ["seed", "seeds"]
    assert "epochs" in without_effect(parse_config(["--model", "m.bin", "--finetune-epochs", "1"]))
    assert "precision" not in without_effect(parse_config(["--model", "m.bin", "--finetune-epochs", "1"]))
    assert "precision" in without_effect(parse_config(["--model", "m.bin"]))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", []),
        ("--seed 3 --seeds 5 --epochs 20 --k 50 --methods unit --device cpu --precision fp32 --holdout --costs", []),
        ("--unit-lasso 1 --every-k --scope global", ["unit lasso 1", "every k", "scope global"]),
        ("--skip fc1 fc2 --prune-output --finetune-epochs 3", ["finetune epochs 3", "skip fc1 fc2", "prune output"]),
        ("--weight-decay 0.00001", ["weight decay 1e-05"]),
        ("--dataset mnist --batch-size 512", []),
        ("--dataset digits --batch-size 512", ["batch size 512"]),
        ("--model m.bin --skip fc1", ["skip fc1"]),
    ],
)
def test_what_is_not_as_by_default_is_told_in_words(flags, words):
    assert changed(parse_config(flags.split())) == words


def test_what_has_no_effect_is_not_told_nor_is_a_default_that_was_filled_in():
    assert changed(Config(model=Path("m.bin"), learning_rate=1.0, batch_size=3, weight_decay=0.0)) == []
    for dataset, batch_size in BATCH_SIZE.items():
        assert changed(Config(dataset, batch_size=batch_size)) == []


REFUSED = {
    "--epochs: must be a whole number from 1": ("--epochs 0", "--epochs -1", "--epochs x", "--epochs 1.5"),
    "--batch-size: must be a whole number from 1": ("--batch-size 0",),
    "--seed: must be a whole number from 0 to": ("--seed -1", "--seed 99999999999999999999"),
    "--seeds: must be a whole number from 1": ("--seeds 0",),
    "--k: must be a number from 0 to 100": ("--k 101", "--k -1", "--k nan"),
    "--k: expected at least one": ("--k",),
    "--learning-rate: must be a number > 0": ("--learning-rate 0", "--learning-rate inf"),
    "--unit-lasso: must be a number >= 0": ("--unit-lasso -1",),
    "--finetune-epochs: must be a whole number from 0": ("--finetune-epochs -1",),
    "--dataset: invalid choice: 'cifar'": ("--dataset cifar",),
    "--precision: invalid choice: 'fp8'": ("--precision fp8",),
    "--scope: invalid choice: 'all'": ("--scope all",),
    "--skip: expected at least one": ("--skip",),
    "--methods: invalid choice: 'magic'": ("--methods magic",),
    "--keep: must be weight:K or unit:K": ("--keep neuron:50", "--keep unit"),
    "--keep: must be a number from 0 to 100": ("--keep unit:x",),
    "--keep weight:K takes one of --methods unit": ("--keep weight:90 --methods unit",),
    "--costs takes weight or unit among --methods": ("--costs --methods random_weight",),
    "--weight-decay has no effect with --model": ("--model m.bin --weight-decay 0",),
    "--seeds has no effect with --model": ("--model m.bin --seeds 3",),
    "--epochs has no effect with --model": ("--model m.bin --epochs 3",),
    "unrecognized arguments: --epoch": ("--epoch 3",),
    "--models: must be a path": ("--models=",),
    "unrecognized arguments: extra": ("extra",),
}


@pytest.mark.parametrize(("words", "flags"), [(words, each) for words, flags in REFUSED.items() for each in flags])
def test_a_bad_setting_gets_one_line_and_exit_code_2(flags, words, capsys):
    with pytest.raises(SystemExit) as ending:
        parse_config(flags.split())
    assert ending.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


def test_help_does_not_wait_for_torch():
    # Only what the interpreter imports before the flags are read: torch would take seconds.
    code = (
        "import runpy, sys; sys.argv = ['train.py', '--help']; sys.path.insert(0, 'src')\n"
        "try: runpy.run_path('src/train.py', run_name='__main__')\n"
        "except SystemExit: sys.exit('torch' in sys.modules)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "--learning-rate" in answer.stdout
