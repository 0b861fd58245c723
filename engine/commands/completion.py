"""`remixmatch completion bash`: print a script that completes commands, presets, flags and their values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import tyro

from engine.commands.data import SUBCOMMANDS
from engine.commands.options import train_flags
from engine.commands.parsing import parse
from engine.config.presets import PRESETS
from engine.config.values import allowed, choices
from engine.errors import unknown

# COMP_WORDS are the words of the command line, and COMP_CWORD is the number of the one to complete. Without a match,
# bash completes names of files.
SCRIPT = """\
_remixmatch() {{
  local words=
  case "$COMP_CWORD:${{COMP_WORDS[1]}}" in
    1:*) words="{commands}" ;;
    2:train|2:profile|2:ablate) words="{presets}" ;;
    2:data) words="{data}" ;;
    *:train)
      case "${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
        *) words="{flags}" ;;
      esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _remixmatch remixmatch
"""


@dataclass
class CompletionOptions:
    """Print a script that completes command lines. Add to ~/.bashrc: eval "$(remixmatch completion bash)"."""

    shell: tyro.conf.Positional[str]
    """The shell: bash."""


def main(argv: list[str]) -> None:
    """Run `remixmatch completion`.

    Raises:
        UserError: The shell is not bash.
    """
    options: CompletionOptions = parse(CompletionOptions, "completion", argv)
    if options.shell != "bash":
        raise unknown("shell", options.shell, ["bash"])
    from engine.commands.main import COMMANDS

    flags = train_flags()
    # Without words, bash completes the names of files.
    valued = {
        flag: choices(hint) for flag, hint in flags.items() if choices(hint) or (hint and allowed(hint) == "a path")
    }
    values = [f'        {flag}) words="{" ".join(map(str, each))}" ;;' for flag, each in valued.items()]
    lists: dict[str, Iterable[str]] = dict(commands=COMMANDS, presets=PRESETS, data=SUBCOMMANDS, flags=flags)
    print(SCRIPT.format(values="\n".join(values), **{name: " ".join(each) for name, each in lists.items()}), end="")
