"""`kvrelay models`: the models that are known by name, and how to have one before it is served."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from control_plane.commands.view import StartView
from model_runtime.catalog import default_cache_dir, known_models, pull

models = typer.Typer(help="List known models, or fetch one.")


@models.command("list")
def list_models() -> None:
    """Show the models that are known by name, and which of them are here."""
    table = Table("name", "here", "size", "license", "what it is", box=None)
    for model in known_models():
        here = (default_cache_dir() / model.name / model.file).is_file()
        size = f"{model.nbytes / 1e6:.0f} MB"
        table.add_row(model.name, "yes" if here else "no", size, model.license, model.description)
    Console(width=140).print(table)


@models.command("pull")
def pull_model(name: Annotated[str, typer.Argument(help="A name that `kvrelay models list` shows.")]) -> None:
    """Fetch a known model unless it is here already; prints where its file lies."""
    with StartView() as view:
        path = pull(name, progress=view.progress)
    print(path)
