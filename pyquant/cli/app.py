"""The command group and what all commands share: exit codes and error lines.

Exit codes: 0 all well; 1 a check failed, or the data is bad; 2 wrong usage; 3 profile, bench --model: no GPU.
"""

from __future__ import annotations

from pathlib import Path

import click

from .. import __version__
from .._library import TORCH_OPS
from .bench import bench
from .convert import convert
from .info import info
from .profile import profile
from .quantize import quantize
from .table import table
from .verify import verify

_PACKAGE = Path(__file__).resolve().parent.parent
_PATHS = {"cmake_prefix": _PACKAGE, "include": _PACKAGE / "include", "torch_ops": TORCH_OPS}


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, MemoryError) as error:
            # What bad data, files and devices raise; click prints the line and exits with 1.
            raise click.ClickException(str(error) or type(error).__name__) from error


def _print_path(ctx: click.Context, option: click.Parameter, given: bool) -> None:
    if given:
        click.echo(_PATHS[option.name or ""])
        ctx.exit()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="pyquant")
@click.option("--cmake-prefix", is_flag=True, is_eager=True, expose_value=False, callback=_print_path,
              help="Print the prefix for CMAKE_PREFIX_PATH and exit.")  # fmt: skip
@click.option("--include", is_flag=True, is_eager=True, expose_value=False, callback=_print_path,
              help="Print the folder of the C and C++ headers and exit.")  # fmt: skip
@click.option("--torch-ops", is_flag=True, is_eager=True, expose_value=False, callback=_print_path,
              help="Print the path of the torch operators, to load without Python, and exit.")  # fmt: skip
def main() -> None:
    """Mixed-input GEMM for PyTorch: weights in 2 to 8 bits.

    \b
    Examples:
      pyquant quantize model.safetensors model-nf4.safetensors --format nf4 --nested
      pyquant convert ./llama-bnb-4bit ./llama-pyquant
      pyquant verify model-nf4.safetensors model.safetensors --min-sqnr 18
      pyquant profile --model llama-3.1-8b --csv profile.csv
      pyquant table build profile.csv -o table.json
      pyquant info
      cmake -B build -DCMAKE_PREFIX_PATH=$(pyquant --cmake-prefix)
    """


for _command in (quantize, convert, verify, bench, profile, table, info):
    main.add_command(_command)
