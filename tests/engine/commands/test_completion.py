"""Completion of command lines in bash."""

import contextlib
import io
import subprocess

import pytest

from engine.commands.main import main


@pytest.fixture(scope="module")
def script():
    """The script that the command prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        main(["completion", "bash"])
    return output.getvalue()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train"]),
        (["train", "digits-1"], ["digits-10"]),
        (["data", "pre"], ["prepare"]),
        (["train", "digits-40", "--bn-m"], ["--bn-momentum"]),
        (["train", "digits-40", "--print"], ["--print-config"]),
        (["train", "digits-40", "--no-fli"], ["--no-flip"]),
        (["train", "digits-40", "--device", ""], ["auto", "cpu", "cuda"]),
        (["train", "digits-40", "--k", "3", "--mode", "e"], ["eager"]),
        (["train", "digits-40", "--out", ""], []),
        (["eval", ""], []),
    ],
)
def test_words_are_completed(script, words, expected):
    asked = 'COMP_WORDS=(remixmatch "$@"); COMP_CWORD=$#; _remixmatch; printf \'%s\\n\' "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", f"{script}{asked}", "bash", *words], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == expected and done.stderr == ""


def test_other_shells_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["completion", "fish"])
    assert (ended.value.code, capsys.readouterr().err) == (2, "remixmatch: unknown shell 'fish'; choose from bash\n")
