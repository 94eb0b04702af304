"""What the site has beside docs/*.md: pages of files outside of docs/, the reference, notebooks; and links to them.

The Markdown of docs/ is written for readers of the repository, where README.md is one folder up and a link to a source
file opens it. Here such links lead to pages that are made of these files, so that the site is whole without a network.
"""

import json
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from sepjax.command.settings import config_flags, flag_lines, flags_of
from sepjax.config import Config
from sepjax.config.checks import type_name
from sepjax.programs import COMMANDS, program

ROOT = Path(__file__).parents[2]
_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_LANGUAGES = {".py": "python", ".toml": "toml", ".arm": "text", "": "text", ".cff": "yaml"}
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")

_MEMBERS = {
    "generation": (
        "Generation",
        "Load a model, and generate with it ([how to](../generation.md)).",
        (
            "sepjax.loading.load", "sepjax.generation.api.generate", "sepjax.generation.api.stream",
            "sepjax.generation.engine.Generator", "sepjax.generation.sampling.Sampling",
            "sepjax.generation.batch.Generation", "sepjax.generation.stream.Stream",
            "sepjax.generation.row.StreamEvent", "sepjax.generation.row.CacheUse",
            "sepjax.generation.slots.Slots", "sepjax.generation.slot_request.SlotRequest",
            "sepjax.generation.cache.view.CacheView",
        ),
    ),
    "attention": (
        "The op and its layout",
        "What [a library](../library.md) needs. The letters of shapes are those of `sepjax.array_typing`.",
        (
            "sepjax.attention.op.separator_attention", "sepjax.attention.dense.dense_attention",
            "sepjax.layout.build_layout", "sepjax.layout.SeparatorLayout", "sepjax.layout.LayoutError",
            "sepjax.separators.separator_table", "sepjax.array_typing",
        ),
    ),
    "training": (
        "Models and training",
        "What `train.py` is put together from.",
        (
            "sepjax.model.transformer", "sepjax.data.tokenizer.Tokenizer", "sepjax.data.batch.Batch",
            "sepjax.training.step", "sepjax.sharding.make_mesh", "sepjax.run.checkpoint.Checkpointer",
        ),
    ),
}  # fmt: skip


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made."""
    made = {target: _outside(ROOT / source, PurePosixPath(target)) for source, target in _PAGES.items()}
    made |= {f"reference/{name}.md": _reference(*about) for name, about in _MEMBERS.items()}
    made |= {"reference/commands.md": _commands(), "reference/config.md": _config()}
    for path in sorted((ROOT / "docs").glob("notebooks/*.ipynb")):
        made[f"notebooks/{path.stem}.md"] = _notebook(path)
    sources = [ROOT / name for name in _PAGES] + sorted((ROOT / "docs").glob("*.md"))
    linked = {x for source in sources for link in _links(source) if (x := _source(source, link)) is not None}
    made |= {_source_page(path): _listing(path) for path in linked}
    for name, text in sorted(made.items()):
        where = InclusionLevel.NOT_IN_NAV if name.startswith("source/") else InclusionLevel.UNDEFINED
        files.append(File.generated(config, name, content=text, inclusion=where))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that lead out of docs/ into links to pages."""
    path = ROOT / "docs" / page.file.src_uri
    return _outside(path, PurePosixPath(page.file.src_uri)) if path.is_file() else markdown


def _links(path: Path) -> list[str]:
    return [link for link in _LINK.findall(path.read_text()) if ":" not in link]


def _source(page: Path, link: str) -> Path | None:
    """The file or folder outside of docs/ that a link of a page means, if it is none that has a page anyhow."""
    found = (page.parent / link).resolve()
    if not found.exists() or found.is_relative_to(ROOT / "docs") or str(found.relative_to(ROOT)) in _PAGES:
        return None
    return found


def _source_page(path: Path) -> str:
    return f"source/{path.relative_to(ROOT)}.md"


def _outside(path: Path, target: PurePosixPath) -> str:
    """The Markdown of a page, with links as they are from `target` on, a page of the site."""

    def mended(match: re.Match[str]) -> str:
        link = match[1]
        found = (path.parent / link).resolve()
        if ":" in link or not found.exists():
            return link
        if (source := _source(path, link)) is not None:
            to = _source_page(source)
        else:
            name = str(found.relative_to(ROOT))
            to = _PAGES.get(name) or name.removeprefix("docs/").replace(".ipynb", ".md")
        return "../" * (len(target.parts) - 1) + to

    return _LINK.sub(mended, path.read_text())


def _listing(path: Path) -> str:
    name = path.relative_to(ROOT)
    if path.is_dir():
        inside = "\n".join(f"- `{x.name}`" for x in sorted(path.iterdir()) if not x.name.startswith(("_", ".")))
        return f"# {name}/\n\n{inside}\n"
    return f"# {name}\n\n````{_LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n````\n"


def _reference(title: str, about: str, members: tuple[str, ...]) -> str:
    return f"# {title}\n\n{about}\n\n" + "\n".join(f"::: {member}\n" for member in members)


def _commands() -> str:
    parts = [
        "# Commands",
        "",
        "What `--help` says of each; [the settings of a run](config.md) are flags of commands with `--config`, too.",
    ]
    for name in COMMANDS:
        module = program(name)
        flags = [flag for flag in flags_of(module.Settings) if flag.kind is not Config]  # those are a page of their own
        about = [(module.__doc__ or "").strip(), "", *flag_lines(flags)]
        parts += ["", f"## sepjax {name}", "", "````text", *about, "````"]
    return "\n".join(parts)


def _config() -> str:
    parts = ["# Settings of a run", "", "Every field of a config, which is also a flag: `--config.model.num_layers=6`."]
    section = ""
    for path, flag in config_flags():
        _, head, *_ = path.split(".")
        if head != section:
            section = head
            parts += ["", f"## {head}", "", "| flag | type | default | meaning |", "|---|---|---|---|"]
        meaning = flag.meaning.replace("][", "]\\[")  # which would be a link
        cells = (f"`--{path}`", f"`{type_name(flag.kind)}`", f"`{flag.default!r}`", meaning)
        parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts)


def _notebook(path: Path) -> str:
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts)
