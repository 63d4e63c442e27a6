"""Models by name: bundled, or fetched once from the Hugging Face Hub, converted and kept.

``resolve`` turns what a user types (a name, a path, ``hf://owner/repo``) into the path of a checkpoint of ours.
A published file is downloaded, verified, converted, and only the converted checkpoint is kept: from then on no
request is made, so that a machine may go offline.

Environment: ``HTSAT_CACHE`` (folder), ``HTSAT_ENDPOINT`` or ``HF_ENDPOINT`` (a mirror of the Hub),
``HTSAT_OFFLINE`` or ``HF_HUB_OFFLINE`` (1: never ask the network), ``HF_TOKEN`` (for gated repositories).
"""

import errno
import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from htsat.errors import CheckpointError, DownloadError, OutputError, UsageError, nearest
from htsat.model.checkpoint import read_config, save_checkpoint, sniff
from htsat.model.exported import SUFFIX, read_model_config

DEFAULT_ENDPOINT = "https://huggingface.co"
#: files looked for in a repository of which only the name is given, and in a folder
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

RepoType = Literal["model", "dataset"]


@dataclass(frozen=True)
class NamedModel:
    """A model that can be had by name.

    Attributes:
        name: what users type.
        description: one line for people.
        license: of the weights, as their publisher states it.
        num_classes: outputs; 0 for encoders. None: known after the download only.
        size: bytes to download, roughly; 0 if bundled.
        bundled: file among this package's assets, or None.
        repo_id: ``owner/name`` on the Hub, or None if bundled.
        repo_type: kind of repository.
        filenames: files that hold the weights; the first that exists is taken.
        revision: branch, tag or commit.
        sample_rate: Hz, where the weights themselves may not tell; None: they do.
        labels: label set of the outputs, or None: by their number.
    """

    name: str
    description: str
    license: str
    num_classes: int | None
    size: int = 0
    bundled: str | None = None
    repo_id: str | None = None
    repo_type: RepoType = "model"
    filenames: tuple[str, ...] = WEIGHT_FILES
    revision: str = "main"
    sample_rate: int | None = None
    labels: str | None = None

    @property
    def source(self) -> str:
        """Where the weights come from, for people."""
        if self.bundled is not None:
            return "bundled"
        kind = "datasets/" if self.repo_type == "dataset" else ""
        return f"hf://{kind}{self.repo_id}" + (f"/{self.filenames[0]}" if len(self.filenames) == 1 else "")


MODELS: dict[str, NamedModel] = {
    model.name: model
    for model in (
        NamedModel(
            "default",
            "ten everyday sounds and speech; comes with the package",
            license="MIT",
            num_classes=11,
            bundled="default.safetensors",
        ),
        NamedModel(
            "audioset",
            "HTS-AT trained on AudioSet as published: 527 classes, 32 kHz",
            license="see the repository",
            num_classes=527,
            size=127_000_000,
            repo_id="Jinbo-HU/PSELDNets",
            repo_type="dataset",
            filenames=("model/HTSAT-fullset-imagenet-768d-32000hz.ckpt",),
            sample_rate=32000,
            labels="audioset",
        ),
        NamedModel(
            "clap-unfused",
            "audio encoder of LAION-CLAP, 48 kHz, no classes",
            license="apache-2.0",
            num_classes=0,
            size=614_000_000,
            repo_id="laion/clap-htsat-unfused",
        ),
        NamedModel(
            "clap-fused",
            "audio encoder of LAION-CLAP trained with feature fusion, 48 kHz, no classes",
            license="apache-2.0",
            num_classes=0,
            size=615_000_000,
            repo_id="laion/clap-htsat-fused",
        ),
        NamedModel(
            "clap-general",
            "larger audio encoder of LAION-CLAP (68 M parameters), 48 kHz, no classes",
            license="apache-2.0",
            num_classes=0,
            size=776_000_000,
            repo_id="laion/larger_clap_general",
        ),
    )
}

#: hf://[datasets/]owner/repo[/file][@revision]
_HF = re.compile(
    r"hf://(?P<dataset>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[\w./-]+))?$"
)


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    endpoint: str | None = None,
    offline: bool | None = None,
    progress: bool | None = None,
) -> Path:
    """Return the path of a checkpoint of ours, fetching and converting it first if need be.

    Args:
        name_or_path: a key of ``MODELS``; ``hf://owner/repo``, with ``/file`` and ``@revision`` if wanted
            (``hf://datasets/owner/repo/file`` for a dataset repository); or a checkpoint, an exported file, or a
            folder with a ``model.safetensors`` of ours in it.
        cache_dir: where models are kept. Default: ``HTSAT_CACHE``, else the user's cache folder.
        endpoint: address of the Hub. Default: ``HTSAT_ENDPOINT``, ``HF_ENDPOINT``, else huggingface.co.
        offline: never ask the network. Default: ``HTSAT_OFFLINE`` or ``HF_HUB_OFFLINE``.
        progress: show a progress bar on stderr. Default: if stderr is a terminal.

    Raises:
        CheckpointError: a local file that is missing or no checkpoint of ours, or a download that cannot be converted.
        DownloadError: no network, no such repository or file, no access, or a download that fails its verification.
        OutputError: the cache cannot be written.
        UsageError: unknown name.
    """
    text = os.fspath(name_or_path)
    if text in MODELS:
        model = MODELS[text]
        if model.bundled is not None:
            return _bundled(model)
        key = model.name
    elif text.startswith("hf://"):
        model = _from_address(text)
        # Readable, and distinct where two addresses would read the same.
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        key = re.sub(r"[^\w.-]+", "--", text.removeprefix("hf://")) + f"-{digest}"
    else:
        return _local(Path(text), text)

    root = Path(cache_dir) if cache_dir is not None else default_cache()
    target = _kept(root, key)
    if _intact(target):
        return target
    if offline is None:
        offline = any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in _OFFLINE)
    if offline:
        raise DownloadError(
            f"model {text!r} is not in {root} and the network is switched off ({' or '.join(_OFFLINE)}); "
            f"run once with it, or {_by_hand(model)}"
        )
    endpoint = (
        endpoint or os.environ.get("HTSAT_ENDPOINT") or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT
    ).rstrip("/")
    with _locked(root, key):
        if not _intact(target):  # another process may have brought it meanwhile
            target.unlink(missing_ok=True)
            _fetch(model, text, target, root, endpoint, sys.stderr.isatty() if progress is None else progress)
    return target


_OFFLINE = ("HTSAT_OFFLINE", "HF_HUB_OFFLINE")


def list_models(*, cache_dir: str | os.PathLike[str] | None = None) -> list[dict[str, Any]]:
    """Return a row per named model, for display: nothing is fetched.

    Keys: ``name``, ``classes`` (number, or ``""`` if known only once the model is here), ``size`` (text), ``state``
    (``bundled``, ``ready``: fetched and converted before, ``download``, or ``missing``: not in this installation),
    ``description``, ``license``, ``source``.
    """
    root = Path(cache_dir) if cache_dir is not None else default_cache()
    rows = []
    for model in MODELS.values():
        path = _bundled_path(model) if model.bundled is not None else _kept(root, model.name)
        here = _intact(path)
        absent, present = ("missing", "bundled") if model.bundled is not None else ("download", "ready")
        classes = len(read_config(path).labels) if here else model.num_classes
        size = path.stat().st_size if here else model.size
        rows.append(
            {
                "name": model.name,
                "classes": "" if classes is None else classes,
                "size": f"{max(1, round(size / 1e6))} MB" if size else "",
                "state": present if here else absent,
                "description": model.description,
                "license": model.license,
                "source": model.source,
            }
        )
    return rows


def _kept(root: Path, key: str) -> Path:
    return root / "models" / f"{key}.safetensors"


def default_cache() -> Path:
    """Return the folder where models are kept: ``HTSAT_CACHE``, else ``htsat`` in the user's cache folder."""
    if given := os.environ.get("HTSAT_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "htsat"


# ---------------------------------------------------------------- local files


def _bundled_path(model: NamedModel) -> Path:
    return Path(__file__).parents[1] / "assets" / str(model.bundled)


def bundled_export(name_or_path: str | os.PathLike[str]) -> Path | None:
    """Return the exported file of a bundled model, which runs without torch; None for every other model."""
    model = MODELS.get(os.fspath(name_or_path))
    if model is None or model.bundled is None:
        return None
    path = _bundled_path(model).with_suffix(SUFFIX)
    return path if path.is_file() else None


def _bundled(model: NamedModel) -> Path:
    path = _bundled_path(model)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: this installation lacks the model {model.name!r}; "
            "reinstall htsat, or choose another of `htsat models`"
        )
    return path


def _local(path: Path, text: str) -> Path:
    if path.is_dir():
        path = path / WEIGHT_FILES[0]
    if not path.exists() and not (path.suffix or os.sep in text or "/" in text):
        raise UsageError(
            f"unknown model {text!r}{nearest(text, MODELS)}; `htsat models` lists the names, "
            "or give the path of a checkpoint or hf://owner/repo"
        )
    read_model_config(path)  # names what is wrong, and for published weights how to convert them
    return path


def _intact(path: Path) -> bool:
    """Say whether a kept checkpoint is there and whole; a damaged one is fetched again."""
    try:
        read_config(path)
    except CheckpointError:
        return False
    return True


# ---------------------------------------------------------------- the Hub


def _from_address(text: str) -> NamedModel:
    match = _HF.match(text)
    if match is None:
        raise UsageError(
            f"{text!r} is no address of a model; "
            "expected hf://owner/repo or hf://owner/repo/file, with @revision if wanted"
        )
    return NamedModel(
        text,
        "",
        license="see the repository",
        num_classes=None,
        repo_id=match["repo"],
        repo_type="dataset" if match["dataset"] else "model",
        filenames=(match["file"],) if match["file"] else WEIGHT_FILES,
        revision=match["revision"] or "main",
    )


@dataclass(frozen=True)
class _Remote:
    """A file on the Hub, as its headers describe it."""

    filename: str
    url: str
    commit: str
    etag: str
    size: int | None


def _by_hand(model: NamedModel) -> str:
    """Say how to get a model without this program."""
    kind = "datasets/" if model.repo_type == "dataset" else ""
    address = f"{DEFAULT_ENDPOINT}/{kind}{model.repo_id}/resolve/{model.revision}/{model.filenames[0]}"
    return f"download {address} elsewhere and `htsat convert` it"


def _fetch(model: NamedModel, text: str, target: Path, root: Path, endpoint: str, progress: bool) -> None:
    """Download, verify and convert a model to ``target``."""
    remote, headers = _look_up(model, text, endpoint)
    digest = hashlib.sha256(f"{remote.url} {remote.etag}".encode()).hexdigest()[:16]
    partial = root / "downloads" / f"{digest}.incomplete"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(root, error) from None
    _download(model, text, remote, headers, partial, progress)
    sha256 = _verify(text, remote, partial)

    if sniff(partial) == "checkpoint":
        read_config(partial)
        try:
            partial.replace(target)
        except OSError as error:
            raise _unwritable(target, error) from None
        return
    from htsat.model.convert import convert

    # The converter goes by what a file holds, but its messages should speak of the file as published.
    named = partial.with_name(f"{digest}-{Path(remote.filename).name}")
    partial.replace(named)
    try:
        network, config, _ = convert(named, sample_rate=model.sample_rate, labels=model.labels)
        source = {
            "source": f"{endpoint}/{model.repo_id}",
            "file": remote.filename,
            "revision": remote.commit,
            "sha256": sha256,
            "license": model.license,
        }
        save_checkpoint(target, network, replace(config, provenance=config.provenance | source))
    except CheckpointError as error:
        raise CheckpointError(
            f"model {text!r}: {error}; to convert it with other settings, {_by_hand(model)}"
        ) from None
    finally:
        named.unlink(missing_ok=True)


def _look_up(model: NamedModel, text: str, endpoint: str) -> tuple[_Remote, dict[str, str]]:
    """Ask the Hub for a file's commit, checksum and size; also return the headers to ask for its content."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    repo = str(model.repo_id)
    headers = build_hf_headers(library_name="htsat")
    headers["user-agent"] = "htsat"  # the library would tell the versions of what is installed here
    for filename in model.filenames:
        try:
            url = hf_hub_url(repo, filename, repo_type=model.repo_type, revision=model.revision, endpoint=endpoint)
            found = get_hf_file_metadata(url, headers=headers, timeout=10, endpoint=endpoint)
        except RevisionNotFoundError:
            raise DownloadError(
                f"model {text!r}: {repo} has no revision {model.revision!r}; leave @{model.revision} out or correct it"
            ) from None
        except GatedRepoError:
            raise DownloadError(
                f"model {text!r}: {endpoint}/{repo} asks for agreement to its terms; agree there, then set HF_TOKEN"
            ) from None
        except RepositoryNotFoundError:
            raise DownloadError(
                f"model {text!r}: {endpoint} has no {model.repo_type} repository {repo}, or it is private; "
                "check the name, or set HF_TOKEN"
            ) from None
        except EntryNotFoundError:
            continue
        except HFValidationError as error:
            raise UsageError(f"model {text!r}: {error}") from None
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status in (401, 403):
                raise DownloadError(
                    f"model {text!r}: {endpoint} refuses access to {repo} ({status}); check the name, or set HF_TOKEN"
                ) from None
            raise DownloadError(
                f"model {text!r}: {endpoint} answered with an error ({status}); try again later, or {_by_hand(model)}"
            ) from None
        except Exception as error:
            # Whichever HTTP library the Hub's client uses: refused, no name service, time-out, certificate.
            raise DownloadError(
                f"model {text!r}: {endpoint} cannot be reached ({type(error).__name__}); "
                f"check the network, or {_by_hand(model)}"
            ) from error
        if found.commit_hash is None or found.etag is None:
            raise DownloadError(
                f"model {text!r}: {endpoint} does not answer like the Hugging Face Hub; "
                "check HTSAT_ENDPOINT and HF_ENDPOINT"
            )
        pinned = hf_hub_url(repo, filename, repo_type=model.repo_type, revision=found.commit_hash, endpoint=endpoint)
        return _Remote(filename, pinned, found.commit_hash, found.etag, found.size), headers
    raise DownloadError(
        f"model {text!r}: {endpoint}/{repo} has no file {' or '.join(model.filenames)}; "
        "name the file of weights: hf://owner/repo/file"
    )


def _download(
    model: NamedModel, text: str, remote: _Remote, headers: dict[str, str], partial: Path, progress: bool
) -> None:
    """Bring the rest of a file to ``partial``: what an interrupted attempt left there is not asked for again."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get

    try:
        with open(partial, "ab") as file, _bars(progress):
            have = file.tell()
            if remote.size is not None and have > remote.size:
                file.truncate(have := 0)
            if remote.size is None or have < remote.size:
                http_get(remote.url, file, resume_size=have, headers=headers, expected_size=remote.size)
    except HfHubHTTPError as error:
        raise _interrupted(model, text, remote, partial) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG):
            raise OutputError(
                f"{partial}: cannot be written: {error.strerror}; free some space, or set HTSAT_CACHE to another folder"
            ) from None
        raise _interrupted(model, text, remote, partial) from error
    except Exception as error:
        # Whichever HTTP library the Hub's client uses; what has arrived stays for the next attempt.
        raise _interrupted(model, text, remote, partial) from error


def _interrupted(model: NamedModel, text: str, remote: _Remote, partial: Path) -> DownloadError:
    have = partial.stat().st_size if partial.exists() else 0
    total = f" of {remote.size:,}" if remote.size is not None else ""
    return DownloadError(
        f"model {text!r}: the download from {urlsplit(remote.url).netloc} broke off after {have:,}{total} bytes; "
        f"try again to resume it, or {_by_hand(model)}"
    )


def _verify(text: str, remote: _Remote, partial: Path) -> str:
    """Compare a download with the size and checksum the Hub announced, and return its SHA-256.

    The checksum is the SHA-256 of the content for large files and git's SHA-1 for small ones.
    """
    size = partial.stat().st_size
    sha256 = hashlib.sha256()
    git = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False) if len(remote.etag) == 40 else None
    with open(partial, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            if git is not None:
                git.update(block)
    # A mirror may send checksums of its own kind; then the size has to do.
    known = {40: git.hexdigest() if git else "", 64: sha256.hexdigest()}.get(len(remote.etag), remote.etag)
    if known != remote.etag or (remote.size is not None and size != remote.size):
        partial.unlink()
        raise DownloadError(
            f"model {text!r}: what {urlsplit(remote.url).netloc} sent is not the published file "
            "(its checksum differs) and was deleted; try again, or check the proxy or mirror in between"
        )
    return sha256.hexdigest()


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Show or hide the progress bar and retry notices of the Hub's client, and leave its settings as they were."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown:
        yield
        return
    logger = logging.getLogger("huggingface_hub")
    level, hidden = logger.level, are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not hidden:
            enable_progress_bars()


@contextmanager
def _locked(root: Path, key: str) -> Iterator[None]:
    """Let one process at a time fetch a model; the others wait and find it there."""
    from filelock import FileLock

    lock = FileLock(root / "locks" / f"{key}.lock")
    try:
        (root / "locks").mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise _unwritable(root, error) from None
    try:
        yield
    finally:
        lock.release()


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path}: the cache cannot be written: {error.strerror or error}; set HTSAT_CACHE to another folder"
    )
