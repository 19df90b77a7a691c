"""Published layers: what was saved comes back from the hub bit for bit, and what cannot be done says why."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from command_line import run
from hub_stand_in import READER_TOKEN, HubStandIn
from markdown_reader import tables_of
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_layers import sizes_of
from tiny import HOOK_IN, HOOK_OUT, use_hub

from mxd_lens import FaithfulnessReport, MxD, TrainingMxD, TrainingMxDConfig
from mxd_lens.architectures import ARCHITECTURES
from mxd_lens.architectures.saved import check_sae_id
from mxd_lens.pretrained.hub import BEGIN, END, push_to_hub
from mxd_lens.pretrained.machine_paths import without_machine_paths

REPO = "user/mxds"
WEIGHTS, CONFIG, SPARSITY, RUNNER = (
    "sae_weights.safetensors",
    "cfg.json",
    "sparsity.safetensors",
    "runner_cfg.json",
)
NAMES = list(ARCHITECTURES)


def random_layer(architecture: str = "mxd", seed: int = 0, **changes: Any) -> Any:
    layer_class, config_class, _, _ = ARCHITECTURES[architecture]
    widths = {"d_in": 4, "d_out": 5, "d_sae": 12, "k": 2} | sizes_of(config_class)
    metadata = SAEMetadata(model_name="gpt2", hook_name=HOOK_IN, hook_name_out=HOOK_OUT)
    layer = layer_class(config_class(**(widths | {"metadata": metadata} | changes)))
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


RUN = {
    "dataset_path": "/home/someone/my texts/news.txt",
    "training_tokens": 4096,
    "lr": 4e-3,
    "output_path": "/home/someone/secret",
    "checkpoint_path": "/home/someone/secret/checkpoints",
    "cached_activations_path": "C:\\Users\\someone\\cache",
    "resume_from_checkpoint": "latest",
    "logger": {"run_name": "see /home/someone/secret, page 2"},
    "model_kwargs": {"cache_dir": "~/models/llama"},
}


def saved_folder(folder: Path, architecture: str = "mxd", **changes: Any) -> Path:
    layer = random_layer(architecture, **changes)
    layer.save_model(folder)
    sparsity = torch.rand(layer.cfg.d_sae, generator=torch.Generator().manual_seed(9)).log10()
    save_file({"sparsity": sparsity}, folder / SPARSITY)
    (folder / RUNNER).write_text(json.dumps(RUN))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved_folder(tmp_path / "layer12")


NUMBERS = {
    field.name: 0.1 + i / 100
    for i, field in enumerate(dataclasses.fields(FaithfulnessReport))
    if field.type in (float, "float")
}
REPORT = FaithfulnessReport(
    **NUMBERS,
    largest_tokens=[{"token": "/usr", "norm": 3.0, "normalized_mse": 0.5, "share_of_squared_norm": 0.25}],
    n_tokens=1234,
    n_experts=12,
    n_parameters=99,
    model_name="/home/someone/llama",
    hook_name=HOOK_IN,
    hook_name_out=HOOK_OUT,
)


def same_weights(one: Any, other: Any) -> bool:
    return one.state_dict().keys() == other.state_dict().keys() and all(
        torch.equal(weight, other.state_dict()[name]) and weight.dtype == other.state_dict()[name].dtype
        for name, weight in one.state_dict().items()
    )


# There and back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", NAMES)
def test_a_layer_comes_back_bit_for_bit(
    hub: HubStandIn, tmp_path: Path, architecture: str, dtype: str
) -> None:
    folder = saved_folder(tmp_path / "layer12", architecture, dtype=dtype)
    saved = SAE.load_from_disk(folder)
    url = push_to_hub(folder, REPO)
    assert url == f"{hub.url}/{REPO}/commit/{hub.repositories[REPO].branches['main']}"

    ours = type(saved).from_pretrained(REPO, "layer12")
    assert type(ours) is type(saved)
    assert ours.cfg == saved.cfg
    assert ours.dtype == getattr(torch, dtype)
    assert same_weights(ours, saved)

    theirs, config, sparsity = SAE.from_pretrained_with_cfg_and_sparsity(REPO, "layer12", dtype=dtype)
    assert type(theirs) is type(saved)
    assert same_weights(theirs, saved)
    assert theirs.cfg == saved.cfg
    assert config["architecture"] == architecture
    assert torch.equal(sparsity, load_file(folder / SPARSITY)["sparsity"])
    assert same_weights(SAE.from_pretrained(REPO, "layer12", dtype=dtype), saved)

    x = torch.randn(7, 4, dtype=getattr(torch, dtype))
    assert torch.equal(ours(x), saved(x))
    assert torch.equal(theirs(x), saved(x))
    assert type(saved).from_pretrained(REPO, "layer12", dtype="float32").dtype == torch.float32
    assert SAE.from_pretrained(REPO, "layer12").dtype == torch.float32


def test_the_files_are_the_folders_files(hub: HubStandIn, folder: Path) -> None:
    push_to_hub(folder, REPO, "blocks.12/mxd")
    files = hub.files(REPO)
    for name in (WEIGHTS, SPARSITY, CONFIG):
        assert files[f"blocks.12/mxd/{name}"] == (folder / name).read_bytes()
    assert set(files) == {
        ".gitattributes",
        "README.md",
        *(f"blocks.12/mxd/{name}" for name in (WEIGHTS, SPARSITY, CONFIG, RUNNER, "README.md")),
    }
    assert MxD.from_pretrained(REPO, "blocks.12/mxd").cfg.k == 2


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_in_memory(hub: HubStandIn, training: bool) -> None:
    layer: Any = random_layer()
    if training:
        layer = TrainingMxD(TrainingMxDConfig(d_in=4, d_out=5, d_sae=12, d_hidden=3, k=2))
    push_to_hub(layer, REPO, "it", reports={"some text": REPORT})
    loaded = MxD.from_pretrained(REPO, "it")
    assert type(loaded) is MxD
    assert same_weights(loaded, layer)
    assert set(hub.files(REPO)) >= {"it/report.json", "it/README.md"}
    with pytest.raises(ValueError, match="needs a sae_id"):
        push_to_hub(layer, REPO)


def test_a_layer_is_never_there_by_half(hub: HubStandIn, folder: Path) -> None:
    push_to_hub({"a": folder, "b": folder}, REPO, reports={"a": {"t": REPORT}})
    assert hub.repositories[REPO].messages == ["initial commit", "Upload a, b"]
    hub.broken["/commit/"] = 500
    with pytest.raises(ConnectionError, match="answered 500"):
        push_to_hub(folder, REPO, "c")
    hub.broken = {"^lfs/": 503}
    with pytest.raises(ConnectionError, match=r"Error while uploading .* Nothing was committed"):
        push_to_hub(random_layer(seed=8), REPO, "c")
    assert not any(path.startswith("c/") for path in hub.files(REPO))


def test_a_branch_and_a_revision(hub: HubStandIn) -> None:
    old, new = random_layer(), random_layer(seed=1)
    first = push_to_hub(old, REPO, "it").split("/")[-1]
    push_to_hub(new, REPO, "it", revision="next")
    assert same_weights(MxD.from_pretrained(REPO, "it"), old)
    assert same_weights(MxD.from_pretrained(REPO, "it", revision="next"), new)
    push_to_hub(new, REPO, "it")
    assert same_weights(MxD.from_pretrained(REPO, "it"), new)
    assert same_weights(MxD.from_pretrained(REPO, "it", revision=first), old)
    with pytest.raises(FileNotFoundError, match=r"user/mxds has no such revision: .*never"):
        MxD.from_pretrained(REPO, "it", revision="never")


def test_config_and_weights_are_of_one_commit(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer replaced between the two downloads is not mixed with its successor."""
    from mxd_lens.architectures import saved

    old, new = random_layer(), random_layer(seed=1)
    push_to_hub(old, REPO, "it")
    download = saved.hf_hub_download

    def slow(repo_id: str, filename: str, **kwargs: Any) -> str:
        path = download(repo_id, filename, **kwargs)
        if filename.endswith(CONFIG):
            push_to_hub(new, REPO, "it")
        return path

    monkeypatch.setattr(saved, "hf_hub_download", slow)
    assert same_weights(MxD.from_pretrained(REPO, "it"), old)


def test_what_is_in_the_cache_needs_no_hub(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer()
    push_to_hub(layer, REPO, "it")
    MxD.from_pretrained(REPO, "it")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert same_weights(MxD.from_pretrained(REPO, "it"), layer)
    assert len(hub.requests) == asked


# Several layers, one repository


def rows_of(readme: str) -> list[str]:
    listing = readme[readme.index(BEGIN) : readme.index(END)]
    return re.findall(r"^\| \[`(.*?)`\]", listing, re.MULTILINE)


def test_layers_that_were_there_stay_listed(hub: HubStandIn) -> None:
    push_to_hub(random_layer("skip_mxd"), REPO, "b", reports={"prose": REPORT}, license="mit")
    before = hub.files(REPO)["README.md"].decode()
    push_to_hub(random_layer("topk_transcoder"), REPO, "a/1")
    after = hub.files(REPO)["README.md"].decode()
    assert rows_of(before) == ["b"]
    assert rows_of(after) == ["a/1", "b"]
    (old_row,) = re.findall(r"^\| \[`b`\].*$", before, re.MULTILINE)
    assert old_row in after
    assert f"{REPORT.normalized_mse:.3f} | {REPORT.normalized_mse_mean_gate:.3f}" in old_row
    metadata = yaml.safe_load(after.split("---\n")[1])
    assert {"mxd-lens", "mechanistic-interpretability", "skip_mxd", "topk_transcoder"} <= set(
        metadata["tags"]
    )
    assert (metadata["library_name"], metadata["license"]) == ("saelens", "mit")
    head, *rows = tables_of(after)[0]
    assert [row[0] for row in rows] == ["a/1", "b"]
    assert {len(row) for row in (head, *rows)} == {9}
    assert metadata["base_model"] == "openai-community/gpt2"


def test_layers_that_another_uploaded_are_listed_too(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface

    TopKSAE(TopKSAEConfig(d_in=4, d_sae=6, k=2)).save_model(tmp_path / "sae")
    upload_saes_to_huggingface({"their": tmp_path / "sae"}, REPO, add_default_readme=False)
    push_to_hub(folder, REPO)
    assert rows_of(hub.files(REPO)["README.md"].decode()) == ["layer12", "their"]
    assert SAE.from_pretrained(REPO, "their").cfg.d_sae == 6


def test_another_authors_readme_stays(
    hub: HubStandIn, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    api = huggingface_hub.HfApi()
    api.create_repo(REPO)
    theirs = "---\nlibrary_name: saelens\n---\n# My layers\n"
    api.upload_file(path_or_fileobj=theirs.encode(), path_in_repo="README.md", repo_id=REPO)
    push_to_hub(folder, REPO)
    assert hub.files(REPO)["README.md"].decode() == theirs
    assert "README.md of its own" in caplog.text
    assert "layer12/README.md" in hub.files(REPO)

    invited = f"{theirs}\nBefore.\n\n{BEGIN}\n{END}\n\nAfter.\n"
    api.upload_file(path_or_fileobj=invited.encode(), path_in_repo="README.md", repo_id=REPO)
    push_to_hub(folder, REPO)
    readme = hub.files(REPO)["README.md"].decode()
    assert rows_of(readme) == ["layer12"]
    assert "# My layers\n\nBefore.\n" in readme
    assert readme.endswith("\n\nAfter.\n")


def test_what_an_earlier_version_had_is_removed(hub: HubStandIn, folder: Path) -> None:
    push_to_hub(folder, REPO, reports={"one": REPORT, "the other": REPORT})
    huggingface_hub.HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="layer12/page.html", repo_id=REPO)
    push_to_hub(random_layer(), REPO, "layer12")
    kept = {path for path in hub.files(REPO) if path.startswith("layer12/")}
    assert kept == {f"layer12/{name}" for name in (WEIGHTS, CONFIG, "README.md", "page.html")}


def test_a_push_that_another_overtakes(
    hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_to_hub(folder, REPO)
    repository = hub.repositories[REPO]
    create_commit = huggingface_hub.HfApi.create_commit

    def overtaken(*args: Any, **kwargs: Any) -> Any:
        repository.commit("main", dict(repository.commits[repository.branches["main"]]), "meanwhile")
        return create_commit(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", overtaken)
    with pytest.raises(ConnectionError, match="changed meanwhile, and nothing was committed: push again"):
        push_to_hub(random_layer(), REPO, "other")


# What is uploaded


def test_a_dry_run_is_what_would_be_uploaded(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    dry = tmp_path / "dry"
    layers = {"a": folder, "b/c": random_layer("skip_mxd")}
    reports = {"a": {"prose": REPORT, "code/C++": REPORT.to_dict()}}
    assert push_to_hub(layers, REPO, reports=reports, dry_run=dry) == str(dry)
    assert not hub.requests
    push_to_hub(layers, REPO, reports=reports)
    uploaded = hub.files(REPO)
    del uploaded[".gitattributes"]
    written = {str(p.relative_to(dry)): p.read_bytes() for p in dry.rglob("*") if p.is_file()}
    assert written == uploaded
    assert {"a/report-prose.json", "a/report-code-C.json"} <= set(written)
    assert same_weights(MxD.from_pretrained(dry, "a"), SAE.load_from_disk(folder))
    with pytest.raises(FileExistsError, match="not an empty folder"):
        push_to_hub(layers, REPO, dry_run=dry)


def test_a_dry_run_needs_no_token(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    push_to_hub(folder, REPO, dry_run=tmp_path / "dry")  # the tests' environment is offline


def test_no_path_of_this_machine_is_uploaded(tmp_path: Path) -> None:
    metadata = SAEMetadata(
        model_name=str(tmp_path / "models" / "llama-of-words"),
        dataset_path=str(tmp_path / "my texts" / "news of the day.txt"),
        hook_name=HOOK_IN,
        hook_name_out=HOOK_OUT,
    )
    folder = saved_folder(tmp_path / "layer12", metadata=metadata)
    weights = load_file(folder / WEIGHTS)
    save_file({k: v.clone() for k, v in weights.items()}, folder / WEIGHTS, {"from": f"{tmp_path}/x"})
    REPORT.save(folder / "report.json")
    push_to_hub(folder, REPO, dry_run=tmp_path / "dry")
    for file in (tmp_path / "dry").rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        for leak in (str(tmp_path), "someone", "/home", "C:\\", "~/"):
            assert leak.encode() not in content, f"{leak} in {file.name}"
    published = tmp_path / "dry" / "layer12"
    config = json.loads((published / CONFIG).read_text())
    assert config["metadata"]["model_name"] == "llama-of-words"
    assert config["metadata"]["dataset_path"] == "news of the day.txt"
    runner = json.loads((published / RUNNER).read_text())
    assert not {"output_path", "checkpoint_path", "cached_activations_path"} & runner.keys()
    assert runner["dataset_path"] == "news.txt"
    assert runner["logger"] == {"run_name": "see secret, page 2"}
    assert runner["lr"] == RUN["lr"]
    report = FaithfulnessReport.load(published / "report.json")
    assert report.model_name == "llama"
    assert report.largest_tokens == REPORT.largest_tokens  # the text's own slash
    with safe_open(published / WEIGHTS, "pt") as f:
        assert f.metadata() == {"from": "x"}
    assert same_weights(MxD.from_pretrained(published), MxD.from_pretrained(folder))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/a/b c/d.txt", "d.txt"),
        ("/a/b/", "b"),
        ("~/texts/d.txt", "d.txt"),
        ("C:\\Users\\me\\d.txt", "d.txt"),
        ("\\\\server\\share\\d.txt", "d.txt"),
        ("file:///a/b/d.txt", "d.txt"),
        ("trained on /a/b/d.txt and (/c/e)", "trained on d.txt and (e)"),
        ("path=/a/b", "path=b"),
        ("user/repo", "user/repo"),
        ("https://huggingface.co/user/repo", "https://huggingface.co/user/repo"),
        ("wikitext-2 (valid, test)", "wikitext-2 (valid, test)"),
        ("and/or, 1/2, a / b", "and/or, 1/2, a / b"),
        ("nltk:brown", "nltk:brown"),
        ("relative/d.txt", "relative/d.txt"),
        ("", ""),
        ("/", "/"),
    ],
)
def test_paths(text: str, left: str) -> None:
    assert without_machine_paths(text) == left
    assert without_machine_paths({"a": [text, 3, None], "output_path": text}) == {"a": [left, 3, None]}


def test_a_release_of_saelens_directory(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It names a repository and its folders; SAELens' own way is taken, in float32."""
    from sae_lens.loading import pretrained_saes_directory
    from sae_lens.saes import sae

    known = pretrained_saes_directory.get_pretrained_saes_directory()
    lookup = pretrained_saes_directory.PretrainedSAELookup(
        "my/mxds", REPO, "gpt2", None, {"nice name": "it"}, {}, {}, {}, {}, None
    )
    for module in (pretrained_saes_directory, sae):
        monkeypatch.setattr(module, "get_pretrained_saes_directory", lambda: {**known, "my/mxds": lookup})
    layer = random_layer(dtype="bfloat16")
    push_to_hub(layer, REPO, "it")
    loaded = MxD.from_pretrained("my/mxds", "nice name")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.W_dec, layer.W_dec.float())
    with pytest.raises(ValueError, match="other not found in release my/mxds"):
        MxD.from_pretrained("my/mxds", "other")
    hub.repositories.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="has no repository my/mxds"):
        MxD.from_pretrained("my/mxds", "nice name")


def test_a_release_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="no-such not found"):
        MxD.from_pretrained("no-such", "it")


# What cannot be done


def in_a_line(error: pytest.ExceptionInfo[BaseException]) -> bool:
    return "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("sae_id", ["../x", "a/../b", "/abs", "", ".", "..", "a//b", "a\\b", "C:", "a/", " a",
                                    ".git", "a\nb", "a\0b", "x" * 201, "a*", "{a}"])  # fmt: skip
def test_sae_ids_that_lead_elsewhere(folder: Path, tmp_path: Path, sae_id: str) -> None:
    with pytest.raises(ValueError, match="sae_id must be the name of a folder") as e:
        push_to_hub(folder, REPO, sae_id, dry_run=tmp_path / "dry")
    assert in_a_line(e)
    with pytest.raises(ValueError, match="sae_id must be"):
        check_sae_id(sae_id)
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    "sae_id", ["layer12", "a/b/c", "blocks.8.ln2", "k=32, lr=1e-3 (2)", "été", "_x", "1"]
)
def test_sae_ids_that_others_may_have_chosen(hub: HubStandIn, folder: Path, sae_id: str) -> None:
    push_to_hub(folder, REPO, sae_id)
    assert MxD.from_pretrained(REPO, sae_id).cfg.k == 2
    assert SAE.from_pretrained(REPO, sae_id).cfg.k == 2
    assert rows_of(hub.files(REPO)["README.md"].decode()) == [sae_id]


@pytest.mark.parametrize("sae_id", ["README.md", "a/cfg.json", "report-x.json"])
def test_sae_ids_that_are_files(folder: Path, tmp_path: Path, sae_id: str) -> None:
    with pytest.raises(ValueError, match="is that of a file"):
        push_to_hub(folder, REPO, sae_id, dry_run=tmp_path / "dry")


def test_a_sae_id_that_leads_elsewhere_is_not_downloaded(hub: HubStandIn) -> None:
    with pytest.raises(ValueError, match="sae_id must be"):
        MxD.from_pretrained("nobody/nothing", "../../../etc")
    assert not hub.requests


@pytest.mark.parametrize(
    "repo_id",
    ["mxds", "a/b/c", "/mxds", "user/", "user/../x", "user\\x", "", "us er/x", "x" * 60 + "/" + "y" * 60],
)
def test_repo_ids_that_are_none(folder: Path, repo_id: str) -> None:
    with pytest.raises(ValueError, match="repo_id must be a repository of the hub") as e:
        push_to_hub(folder, repo_id, dry_run=folder / "dry")
    assert str(e.value).endswith(f"got {repo_id!r}.")
    assert not (folder / "dry").exists()


@pytest.mark.parametrize(
    "revision", ["../../x", "a/../b", "/etc", "-x", "", "a//b", "a b", "..", "a\nb", "x" * 300]
)
def test_revisions_that_lead_elsewhere(hub: HubStandIn, folder: Path, revision: str) -> None:
    for use in (
        lambda: MxD.from_pretrained(REPO, "layer12", revision=revision),
        lambda: push_to_hub(folder, REPO, revision=revision),
    ):
        with pytest.raises(ValueError, match="revision must be the name of a branch"):
            use()
    assert not hub.requests


def test_no_token(hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="needs a Hugging Face token: run hf auth login") as e:
        push_to_hub(folder, REPO)
    assert in_a_line(e)
    assert not hub.requests


@pytest.mark.parametrize(
    ("token", "message"),
    [(READER_TOKEN, "no right to do this to user/mxds"), ("hf_unknown", "does not know this token")],
)
@pytest.mark.parametrize("exists", [False, True])
def test_tokens_that_may_not(hub: HubStandIn, folder: Path, token: str, message: str, exists: bool) -> None:
    if exists:
        push_to_hub(folder, REPO)
    before = {name: dict(made.commits) for name, made in hub.repositories.items()}
    with pytest.raises(PermissionError, match=message) as e:
        push_to_hub(folder, REPO, "new", token=token)
    assert in_a_line(e)
    assert e.value.__cause__ is not None
    assert bool(before) == exists
    assert {name: dict(made.commits) for name, made in hub.repositories.items()} == before


def test_private(hub: HubStandIn, folder: Path) -> None:
    push_to_hub(folder, REPO, private=True)
    assert hub.repositories[REPO].private
    assert MxD.from_pretrained(REPO, "layer12").cfg.k == 2
    push_to_hub(folder, "user/public")
    with pytest.raises(ValueError, match="user/public is public, and private was asked for"):
        push_to_hub(random_layer(), "user/public", "secret", private=True)
    assert not any(path.startswith("secret") for path in hub.files("user/public"))


@pytest.mark.parametrize("token", ["", READER_TOKEN])
def test_a_repository_one_may_not_see(
    hub: HubStandIn, folder: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_to_hub(folder, REPO, private=True)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(FileNotFoundError, match=r"has no repository user/mxds, or it is private") as e:
        MxD.from_pretrained(REPO, "layer12")
    assert in_a_line(e)
    assert isinstance(e.value.__cause__, huggingface_hub.errors.RepositoryNotFoundError)


def test_layers_that_are_not_there(hub: HubStandIn, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no repository user/mxds") as e:
        MxD.from_pretrained(REPO, "layer12")
    assert in_a_line(e)
    push_to_hub({"b": folder, "a/1": folder}, REPO)
    with pytest.raises(
        FileNotFoundError, match=r"user/mxds has no layer 'layer12'\. Its layers: a/1; b\."
    ) as e:
        MxD.from_pretrained(REPO, "layer12")
    assert in_a_line(e)
    huggingface_hub.HfApi().create_repo("user/empty")
    with pytest.raises(FileNotFoundError, match="There is no layer in it"):
        MxD.from_pretrained("user/empty", "layer12")


def test_a_hub_that_cannot_be_reached(hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9")  # where nothing listens
    for attempt in (
        lambda: MxD.from_pretrained(REPO, "layer12"),
        lambda: push_to_hub(folder, REPO),
    ):
        with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9 cannot be reached") as e:
            attempt()
        assert in_a_line(e)
        assert e.value.__cause__ is not None


def test_offline(hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for attempt in (
        lambda: MxD.from_pretrained(REPO, "layer12"),
        lambda: MxD.from_pretrained(REPO, "layer12", force_download=True),
        lambda: push_to_hub(folder, REPO),
    ):
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set") as e:
            attempt()
        assert in_a_line(e)
    assert not hub.requests


def test_a_hub_that_fails(hub: HubStandIn, folder: Path) -> None:
    push_to_hub(folder, REPO)
    hub.broken["resolve"] = 500
    with pytest.raises(ConnectionError) as e:
        MxD.from_pretrained(REPO, "layer12")
    assert in_a_line(e)


def test_a_hostile_layer_of_the_hub_is_refused(hub: HubStandIn, folder: Path) -> None:
    push_to_hub(folder, REPO)
    repository = hub.repositories[REPO]
    files = dict(repository.commits[repository.branches["main"]])
    files[f"layer12/{WEIGHTS}"] = b"\x80\x04 a pickle"
    repository.commit("main", files, "worse")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        MxD.from_pretrained(REPO, "layer12")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_folder_without(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {name}"):
        push_to_hub(folder, REPO, dry_run=tmp_path / "dry")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, SPARSITY, RUNNER, "report.json"])
def test_a_folder_with_a_broken_file(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).write_bytes(b"broken")
    with pytest.raises(ValueError, match=re.escape(name)):
        push_to_hub(folder, REPO, dry_run=tmp_path / "dry")
    assert not (tmp_path / "dry").exists()


def test_layers_of_others(tmp_path: Path) -> None:
    sae = TopKSAE(TopKSAEConfig(d_in=4, d_sae=6, k=2))
    sae.save_model(tmp_path / "sae")
    with pytest.raises(ValueError, match="upload_saes_to_huggingface"):
        push_to_hub(sae, REPO, "x", dry_run=tmp_path / "dry")
    with pytest.raises(ValueError, match="TopKSAE"):
        push_to_hub(tmp_path / "sae", REPO, dry_run=tmp_path / "dry")
    with pytest.raises(ValueError, match="no layers to publish"):
        push_to_hub({}, REPO, dry_run=tmp_path / "dry")
    with pytest.raises(ValueError, match="reports, but no layers: 'b'"):
        push_to_hub({"a": random_layer()}, REPO, reports={"b": {}}, dry_run=tmp_path / "dry")


def test_reports_that_are_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the report of `evaluate`: normalized_mse, "):
        push_to_hub(folder, REPO, reports={"prose": {"loss": 3}}, dry_run=tmp_path / "dry")


# The command


def test_the_command(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    REPORT.save(folder / "report.json")
    result = run("push", folder, REPO, "--license", "mit")
    assert f"{hub.url}/{REPO}/commit/" in result.output
    assert FaithfulnessReport.load(folder / "report.json").l0 == REPORT.l0
    assert b"0.100" in hub.files(REPO)["layer12/README.md"]
    assert "layer12/report.json" in hub.files(REPO)
    other = shutil.copy(folder / "report.json", tmp_path / "brown.json")
    options = ["--sae-id", "x", "--report", other, "--dry-run", tmp_path / "dry", "--private"]
    assert "Nothing was uploaded" in run("push", folder, REPO, *options).output
    assert "### On brown: 1,234 tokens" in (tmp_path / "dry" / "x" / "README.md").read_text()
    assert "layer12" not in (tmp_path / "dry" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["../x"], "sae_id must be"),
        (["ok", "--report", __file__], "test_hub.py is not a report (JSONDecodeError"),
    ],
)
def test_the_commands_mistakes(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    sae_id, *more = arguments
    options = ["--sae-id", sae_id, *more, "--dry-run", tmp_path / "dry"]
    result = run("push", folder, REPO, *options, code=1)
    assert message in result.output
    assert "Traceback" not in result.output
