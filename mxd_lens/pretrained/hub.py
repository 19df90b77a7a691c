"""Publishing layers on the Hugging Face hub, where `from_pretrained(user/repo, sae_id)` finds them."""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError
from sae_lens import logger
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.saes.sae import TrainingSAE
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from mxd_lens.architectures.base import PairedTranscoder
from mxd_lens.architectures.saved import check_revision, check_sae_id, hub_errors, layers_among, read_json
from mxd_lens.models import hub_name
from mxd_lens.pretrained.machine_paths import without_machine_paths
from mxd_lens.pretrained.model_card import (
    Report,
    code,
    front_matter,
    model_card,
    numbers,
    plain,
    quoted,
    report_numbers,
    table,
    training_settings,
)
from mxd_lens.pretrained.registry import REPORT_FILENAME

README = "README.md"
OWN_FILES = re.compile(
    "|".join(
        re.escape(name)
        for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RUNNER_CFG_FILENAME, README)
    )
    + r"|report(-.*)?\.json"
)
"""What a layer's folder in a repository has from here; other files in it are left alone."""

BEGIN, END = "<!-- layers of mxd_lens -->", "<!-- end of layers -->"
LISTING = re.compile(f"{BEGIN}.*?{END}", re.DOTALL)
"""The part of a repository's README.md that is written anew; the rest is its author's."""

Layer = PairedTranscoder | str | Path
Files = dict[str, bytes | Path]
"""What is uploaded, by its path: the content, or a file that has it."""


def push_to_hub(
    layers: Layer | Mapping[str, Layer],
    repo_id: str,
    sae_id: str | None = None,
    *,
    reports: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    private: bool = False,
    revision: str = "main",
    token: str | None = None,
    dry_run: str | Path | None = None,
) -> str:
    """Uploads layers to a repository of the hub, all in one commit: it never holds half a layer.

    A layer becomes the folder `sae_id`: cfg.json, sae_weights.safetensors, what its folder has of
    sparsity.safetensors and runner_cfg.json, its reports, and a README.md about it; what an earlier version
    of the layer had beside that is removed. The repository's README.md lists its layers. Where another
    author wrote one, only what it has between `<!-- layers of mxd_lens -->` and `<!-- end of layers -->` is
    changed. Paths of this machine are not uploaded: see `without_machine_paths`.

    Args:
        layers: a layer or its folder; or several, by their sae_ids.
        repo_id: the repository, `user/repo`; it is created if there is none.
        sae_id: the layer's folder in the repository. None: the name of the local folder.
        reports: what `evaluate` measured (a `FaithfulnessReport`, its `to_dict` or its file), by the text's
            name; of several layers, by sae_id and then by text. None: a folder's own report.json, if any.
        base_model: the language model's repository. None: if the layer's metadata tells it.
        license: an identifier of the hub, such as "mit".
        private: whether a repository that is created is private.
        revision: the branch to commit to; it is created if there is none.
        token: of the hub. None: the one of `hf auth login` or HF_TOKEN.
        dry_run: write what would be uploaded into this folder, new or empty, and touch no network. What the
            repository has already is then not known, nor listed.

    Returns:
        The commit's address; of a dry run, its folder.

    Raises:
        ValueError: `repo_id` or `sae_id` cannot be a name, a folder holds no valid layer, a report is none,
            or a private repository is wanted and there is a public one.
        FileNotFoundError: a folder lacks cfg.json or its weights.
        FileExistsError: the folder for the dry run is not empty.
        PermissionError: there is no token, or it may not write to the repository.
        ConnectionError: the hub cannot be reached, refuses, or the repository changed meanwhile.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo_id, re.ASCII) or len(repo_id) > 96:
        raise ValueError(f"repo_id must be a repository of the hub, 'user/repo', got {repo_id!r}.")
    if not isinstance(layers, Mapping):
        if sae_id is None:
            if isinstance(layers, PairedTranscoder):
                raise ValueError("A layer in memory needs a sae_id: its folder in the repository.")
            sae_id = Path(layers).resolve().name
        layers, reports = {sae_id: layers}, {sae_id: reports or {}}
    if not layers:
        raise ValueError("There are no layers to publish.")
    check_revision(revision)
    for name in layers:
        check_sae_id(name)
        if OWN_FILES.fullmatch(PurePosixPath(name).name):
            raise ValueError(f"sae_id must be the name of a folder, and {name!r} is that of a file.")
    reports = reports or {}
    if unknown := reports.keys() - layers.keys():
        raise ValueError(f"There are reports, but no layers: {', '.join(map(repr, sorted(unknown)))}.")
    if dry_run is None and not (token or get_token()):
        raise PermissionError(
            "Publishing needs a Hugging Face token: run hf auth login, set HF_TOKEN, or pass token. A dry "
            "run needs none."
        )
    with ExitStack() as temporary_folders:
        published = []
        for name, layer in layers.items():
            folder = Path(temporary_folders.enter_context(TemporaryDirectory()))
            if isinstance(layer, str | Path):
                folder = Path(layer).expanduser()
            else:
                save(layer, folder)
            published.append(
                PublishedLayer.read(folder, repo_id, name, reports.get(name) or {}, base_model, license)
            )
        if dry_run is not None:
            files = {path: content for layer in published for path, content in layer.files.items()}
            files[README] = repository_card(repo_id, published, license).encode()
            write(files, Path(dry_run).expanduser())
            return str(dry_run)
        with hub_errors(repo_id):
            return commit(HfApi(token=token), repo_id, published, license, private, revision)


def save(layer: Any, folder: Path) -> None:
    if not isinstance(layer, PairedTranscoder):
        raise ValueError(
            f"Expected a layer of this package or the folder of one, got {type(layer).__name__}. "
            "SAELens' upload_saes_to_huggingface publishes its own SAEs."
        )
    if isinstance(layer, TrainingSAE):
        layer.save_inference_model(folder)
    else:
        layer.save_model(folder)


@dataclass
class PublishedLayer:
    """A layer as it is published."""

    sae_id: str
    sae: PairedTranscoder
    base_model: str | None
    reports: dict[str, Report]
    files: Files

    @classmethod
    def read(
        cls,
        folder: Path,
        repo_id: str,
        sae_id: str,
        reports: Mapping[str, Report | str | Path],
        base_model: str | None,
        license: str | None,
    ) -> "PublishedLayer":
        """Reads a layer's folder.

        Raises:
            FileNotFoundError, ValueError: it holds no valid layer, or another file in it is none.
        """
        sae = PairedTranscoder.load_from_disk(folder)
        files: Files = {
            SAE_CFG_FILENAME: publishable_json(folder / SAE_CFG_FILENAME),
            SAE_WEIGHTS_FILENAME: publishable_tensors(folder / SAE_WEIGHTS_FILENAME),
        }
        training = None
        if (folder / RUNNER_CFG_FILENAME).is_file():
            files[RUNNER_CFG_FILENAME] = publishable_json(folder / RUNNER_CFG_FILENAME)
            training = training_settings(read_json(folder / RUNNER_CFG_FILENAME))
        if (folder / SPARSITY_FILENAME).is_file():
            files[SPARSITY_FILENAME] = publishable_tensors(folder / SPARSITY_FILENAME)
        if not reports and (folder / REPORT_FILENAME).is_file():
            reports = {"held-out text": folder / REPORT_FILENAME}
        judged = {
            text: read_json(Path(report), "a report") if isinstance(report, str | Path) else report
            for text, report in reports.items()
        }
        for name, report in zip(report_names(judged), judged.values(), strict=True):
            files[name] = publishable_report(report)
        base_model = base_model or hub_name(without_machine_paths(sae.cfg.metadata.model_name or ""))
        card = model_card(
            sae,
            judged,
            release=repo_id,
            sae_id=sae_id,
            training=training,
            base_model=base_model,
            license=license,
        )
        files[README] = card.encode()
        in_repository = {f"{sae_id}/{name}": content for name, content in files.items()}
        return cls(sae_id, sae, base_model, judged, in_repository)

    @property
    def row(self) -> str:
        """The layer's row in the repository's list."""
        cfg = self.sae.cfg
        found = next((report_numbers(report) for report in self.reports.values()), None)
        measured = ("normalized_mse", "normalized_mse_mean_gate", "feature_share")
        return row(
            self.sae_id,
            self.sae.title.removeprefix("A "),
            plain(without_machine_paths(cfg.metadata.model_name or "")),
            code(cfg.metadata.hook_name_out),
            f"{cfg.d_sae:,}",
            "" if cfg.k is None else f"{cfg.k:,}",
            *(numbers(found, *measured) if found else [""] * len(measured)),
        )


COLUMNS = (
    "layer",
    "",
    "language model",
    "writes",
    "d_sae",
    "k",
    "normalised MSE",
    "mean gate",
    "feature share",
)


def row(sae_id: str, *cells: str) -> str:
    """A row of the repository's list; of a layer that is not from here, its name alone."""
    padding = [""] * (len(COLUMNS) - 1 - len(cells))
    return " | ".join([f"[`{sae_id}`]({quote(sae_id)}/)", *cells, *padding])


def repository_card(
    repo_id: str,
    published: list[PublishedLayer],
    license: str | None = None,
    known: Iterable[str] = (),
    readme: str | None = None,
) -> str:
    """The README.md of a repository.

    Args:
        repo_id: the repository.
        published: the layers that are new in it.
        license: of a repository that had no README.md.
        known: the sae_ids of the layers that it has.
        readme: the README.md that it has; only its list of layers, and its tags, are changed.
    """
    listed = LISTING.search(readme or "")
    rows = {sae_id: row(sae_id) for sae_id in known}
    for line in listed[0].splitlines() if listed else []:
        if (found := re.match(r"\| (\[`([^`]+)`\].*) \|$", line)) and found[2] in rows:
            rows[found[2]] = found[1]
    rows |= {layer.sae_id: layer.row for layer in published}
    listing = f"{BEGIN}\n\n{table(COLUMNS, [[rows[sae_id]] for sae_id in sorted(rows)])}\n\n{END}"
    architectures = list(dict.fromkeys(layer.sae.cfg.architecture() for layer in published))
    if readme is not None and listed:
        card = ModelCard(LISTING.sub(lambda _: listing, readme, count=1), ignore_metadata_errors=True)
        card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *architectures]))
        return str(card)
    models = {layer.base_model for layer in published}
    example = published[0]
    return (
        "\n\n".join(
            [
                front_matter(architectures, models.pop() if len(models) == 1 else None, license),
                f"# {repo_id.split('/')[1]}",
                "Layers that stand in for MLPs of a language model, made with mxd_lens, in SAELens' format. "
                "An error says little about experts unless the error that is left with their mean (mean "
                "gate) stands beside it: each layer's page has both.",
                listing,
                "```python\n"
                "import mxd_lens\n"
                "from sae_lens import SAE\n\n"
                f"layer = SAE.from_pretrained({quoted(repo_id)}, {quoted(example.sae_id)})\n"
                "```",
            ]
        )
        + "\n"
    )


def write(files: Files, folder: Path) -> None:
    """Writes the files below `folder`. Raises FileExistsError where it is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder: a dry run needs one of its own.")
    for path, content in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, file)
        else:
            file.write_bytes(content)


def commit(
    api: HfApi,
    repo_id: str,
    published: list[PublishedLayer],
    license: str | None,
    private: bool,
    revision: str,
) -> str:
    """Commits the layers, and returns the commit's address."""
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} is public, and private was asked for: make it private first.")
    if revision != "main":
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    head = api.model_info(repo_id, revision=revision).sha
    there = api.list_repo_files(repo_id, revision=head)
    readme = None
    if README in there:
        readme = Path(api.hf_hub_download(repo_id, README, revision=head)).read_text(encoding="utf-8")
    files = {path: content for layer in published for path, content in layer.files.items()}
    if readme is None or LISTING.search(readme):
        files[README] = repository_card(repo_id, published, license, layers_among(there), readme).encode()
    else:
        logger.warning(
            "%s has a README.md of its own: it stays as it is. To have its layers listed, write %s and %s "
            "in it.",
            repo_id,
            BEGIN,
            END,
        )
    folders = {layer.sae_id for layer in published}
    stale = [
        path
        for path in there
        if path not in files
        and str(PurePosixPath(path).parent) in folders
        and OWN_FILES.fullmatch(PurePosixPath(path).name)
    ]
    try:
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(path, content) for path, content in files.items()]
            + [CommitOperationDelete(path, is_folder=False) for path in stale],
            commit_message=f"Upload {', '.join(sorted(folders))}",
            revision=revision,
            parent_commit=head,
        ).commit_url
    except HfHubHTTPError as e:
        if e.response.status_code == 412:
            raise ConnectionError(
                f"{repo_id} changed meanwhile, and nothing was committed: push again."
            ) from e
        raise
    except RuntimeError as e:
        raise ConnectionError(f"{e} Nothing was committed ({e.__cause__}).") from e


# What of a file is published


def publishable_json(file: Path) -> bytes | Path:
    """A JSON file without machine paths: the file itself, where it has none."""
    config = read_json(file)
    cleaned = without_machine_paths(config)
    return file if cleaned == config else json.dumps(cleaned, indent=1).encode()


def publishable_tensors(file: Path) -> bytes | Path:
    """A safetensors file without machine paths in its metadata: the file itself, where it has none."""
    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata()
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file} is truncated or not a safetensors file ({e}).") from e
    cleaned = without_machine_paths(metadata)
    return file if cleaned == metadata else to_safetensors(load_file(file), cleaned)


def publishable_report(report: Report) -> bytes:
    """A report as `FaithfulnessReport.load` reads it; its tokens are text, and stay as they are."""
    found = report_numbers(report)
    cleaned = without_machine_paths(dict(found)) | {"largest_tokens": found.get("largest_tokens", [])}
    return (json.dumps(cleaned, indent=1) + "\n").encode()


def report_names(reports: Mapping[str, Report]) -> list[str]:
    """The files' names of the reports, in their order."""
    if len(reports) < 2:
        return [REPORT_FILENAME] * len(reports)
    names: list[str] = []
    for text in reports:
        name = re.sub(r"[^\w.-]+", "-", without_machine_paths(text), flags=re.ASCII).strip("-.") or "text"
        while f"report-{name}.json" in names:
            name += "-"
        names.append(f"report-{name}.json")
    return names
