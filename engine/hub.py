"""A model's name -> the local folder that holds it: a folder as it is, `org/name` or `org/name@revision` by way of the hub.

The package huggingface_hub keeps the cache and reads HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. What is decided
here: which files, of which commit, who of several ranks fetches them, and what a failure means to the user.
"""

import fcntl
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ENVIRONMENT, SECURITY, EngineError, extra, rank_in_launch

NAME = re.compile(r"\w+([.-]\w+)*/\w+([.-]\w+)*(@\w+([./-]\w+)*)?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")

FILES = ("config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "chat_template.jinja")
WEIGHTS = ("*.safetensors", "model.safetensors.index.json")
LEFT_OUT = ("*/*", "consolidated*")  # folders; and the same weights once more, in the layout of their maker
PICKLES = (".bin", ".pth", ".pt")
HEAD_START_S = 1.0


@dataclass(frozen=True)
class Base:
    """What was found. `name` is for others to find it again, without revision; `commit` is the hub's, None for a folder."""

    folder: Path
    name: str
    commit: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.commit}" if self.commit else self.name

    def check_same(self, commits: list[str]) -> None:
        """`commits` are those that all ranks found, "" for a folder. A push to the hub may come between two of them."""
        if len(set(commits)) > 1:
            found = ", ".join(sorted({commit or "a folder" for commit in commits}))
            raise EngineError("HUB-RANKS", f"{self.name}: ranks found different models: {found}; write model.path={self.name}@COMMIT with one of them")


def is_name(text: str) -> bool:
    """Whether `text` is to be looked for on the hub. What exists here always wins."""
    return bool(NAME.fullmatch(text)) and not Path(text).exists()


def resolve(asked: str, weights: bool = True, commit: str | None = None) -> Base:
    """The folder of a model, fetched first where it has to be.

    Args:
        asked: a folder, which is given back as it is, or a name on the hub.
        weights: whether they are needed; without them a repository's config and tokenizer are fetched alone.
        commit: the one to take in place of the newest.

    Raises:
        EngineError: the name is not found or may not be read, nothing is cached and the hub cannot be reached, the
            repository has no safetensors.
    """
    if not is_name(asked):
        return Base(Path(asked), str(Path(asked)))
    repository = Repository(asked, weights, commit)
    try:
        folder = repository.find()
    except EngineError:
        repository.let_first_go()
        raise
    return Base(folder, repository.name, folder.name)


class Repository:
    """A model on the hub and its part of the local cache, where each commit has a folder."""

    def __init__(self, asked: str, weights: bool, commit: str | None) -> None:
        self.hub = extra("huggingface_hub", f"{asked} is no folder here; fetching it from the hub")
        self.asked, self.weights, self.is_first = asked, weights, rank_in_launch() == 0
        self.name, _, revision = asked.partition("@")
        self.revision = commit or revision or "main"
        self.patterns = {"allow_patterns": [*FILES, *(WEIGHTS if weights else ())], "ignore_patterns": list(LEFT_OUT)}

    def find(self) -> Path:
        """The folder of the commit that `revision` means: by the hub's word, by the cache's where the hub is out of reach."""
        from huggingface_hub import constants

        if COMMIT.fullmatch(self.revision) and (names := self.listing(self.revision)) and (folder := self.whole(self.revision, names)):
            return folder
        try:
            info = self.hub.HfApi().model_info(self.name, revision=self.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception as error:  # of the package, of its HTTP client, of JSON that is none
            return self.without_hub(error)
        names = [file.rfilename for file in info.siblings or ()]
        folder = self.whole(info.sha, names) or self.fetch(info.sha, names)
        self.remember(folder)
        return folder

    def without_hub(self, error: Exception) -> Path:
        """The cached folder after the hub gave `error` in place of an answer; no other commit stands in for a refusal."""
        from huggingface_hub import constants

        if refusal := self.refusal(error):
            raise refusal from error
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the hub cannot be reached ({_one_line(error)})"
        if (folder := self.cached(self.revision)) is None:
            raise EngineError("ENVIRONMENT-HUB", f"{self.asked}: is no folder here, the cache in {constants.HF_HUB_CACHE} has no whole copy, and {offline}; "
                              "start once with a connection, or name a folder", ENVIRONMENT) from error
        if (unlisted := self.listing(folder.name) is None) or not constants.HF_HUB_OFFLINE:
            doubt = ", filled by another tool, so whether files are missing is not known" if unlisted else ""
            self.say(f"WARNING {self.asked}: {offline}; using commit {folder.name} from the cache{doubt}")
        return folder

    # ---- The cache ---------------------------------------------------------------------------------------------------

    def cached(self, revision: str) -> Path | None:
        """Its folder, without any call; None where it is missing or known to lack files."""
        from huggingface_hub import errors

        try:
            return Path(self.hub.snapshot_download(self.name, revision=revision, local_files_only=True, **self.patterns))
        except errors.LocalEntryNotFoundError:
            return None

    def listing(self, commit: str) -> list[str] | None:
        """The commit's files on the hub, as far as the cache knows. Without it nobody can tell a whole folder from a part."""
        from huggingface_hub import errors

        try:
            return [file.path for file in self.hub.get_cached_repo_tree(self.name, revision=commit)]
        except errors.CachedRepoTreeNotFoundError:
            return None

    def whole(self, commit: str, names: list[str]) -> Path | None:
        """The commit's folder if it has all that is wanted of `names`, its files on the hub."""
        from huggingface_hub import utils

        self.check([name for name in names if "/" not in name])
        folder, wanted = self.cached(commit), utils.filter_repo_objects(names, **self.patterns)
        return folder if folder and all((folder / name).is_file() for name in wanted) else None

    def fetch(self, commit: str, names: list[str]) -> Path:
        """Downloads what the cache lacks. One process of a node does, the others wait and make no request.

        The package's locks are for single files: its files would come once as well, but in as many turns as there are
        ranks, each asking about every file, with nobody to show the progress of the whole.
        """
        from huggingface_hub import constants, utils

        self.let_first_go()
        place = Path(constants.HF_HUB_CACHE) / ".locks" / f"models--{self.name.replace('/', '--')}"
        try:
            place.mkdir(parents=True, exist_ok=True)
            with (place / "engine.lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self.say(f"{self.asked}: another process of this node is fetching it; waiting")
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if folder := self.whole(commit, names):
                    return folder
                if not (self.is_first and sys.stderr.isatty()):
                    utils.disable_progress_bars()
                self.hub.snapshot_download(self.name, revision=commit, **self.patterns)
                if folder := self.whole(commit, names):  # the package gives an old part of it where it lost the hub at once
                    return folder
                raise ConnectionError("files are missing")
        except Exception as error:  # of the package, of HTTP and Xet clients, of the disk
            raise self.refusal(error) or EngineError("ENVIRONMENT-FETCH", f"{self.asked}: not fetched whole: {_one_line(error)}; start again, files that are "
                                                     f"whole are kept (cache: {constants.HF_HUB_CACHE}, HF_HOME moves it)", ENVIRONMENT) from error

    def remember(self, folder: Path) -> None:
        """Notes the revision's commit where the cache keeps it, once its folder is whole: without the hub this one is taken."""
        reference = folder.parent.parent / "refs" / self.revision
        if COMMIT.fullmatch(self.revision) or (reference.is_file() and reference.read_text(encoding="utf-8") == folder.name):
            return
        with suppress(OSError):  # a cache that others fill is only read
            reference.parent.mkdir(parents=True, exist_ok=True)
            building = reference.with_name(f"{reference.name}.{os.getpid()}.tmp")
            building.write_text(folder.name, encoding="utf-8")
            os.replace(building, reference)

    # ---- What is refused, and what is said ---------------------------------------------------------------------------

    def check(self, names: list[str]) -> None:
        """Raises EngineError where the repository's files, `names`, are no model that can be read here."""
        if "config.json" not in names:
            what = "is an adapter, no model: name its base" if "adapter_config.json" in names else "has no config.json: expected Hugging Face layout"
            raise EngineError("HUB-MODEL", f"{self.asked}: the repository on the hub {what}")
        if not self.weights or any(name.endswith(".safetensors") and not name.startswith("consolidated") for name in names):
            return
        if pickled := [name for name in names if name.endswith(PICKLES)]:
            way = f"AutoModelForCausalLM.from_pretrained('{self.name}').save_pretrained('FOLDER'), AutoTokenizer likewise, then name FOLDER"
            raise EngineError("HUB-PICKLE", f"{self.asked}: the weights on the hub are pickles alone ({pickled[0]}), which can run code when read and are "
                              f"never fetched; where you trust them, convert them with transformers: {way}", SECURITY)
        raise EngineError("HUB-WEIGHTS", f"{self.asked}: has no *.safetensors on the hub; name a repository that has, fetch a .gguf and convert it with "
                          "engine.convert, or train from scratch with model.init=random")

    def refusal(self, error: Exception) -> EngineError | None:
        """What an answer of the hub means to the user; None where it is no answer but a failure."""
        from huggingface_hub import constants, errors

        status, page = getattr(getattr(error, "response", None), "status_code", None), f"{constants.ENDPOINT}/{self.name}"
        if isinstance(error, errors.GatedRepoError):
            return EngineError("HUB-GATED", f"{self.asked}: its owner asks for consent; accept the licence at {page}, then `hf auth login`", ENVIRONMENT)
        if isinstance(error, errors.RevisionNotFoundError):
            return EngineError("HUB-REVISION", f"{self.asked}: has no revision {self.revision}; name a branch, a tag or a commit of {page}")
        if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            return EngineError("HUB-REPOSITORY", f"{self.asked}: is no folder here, and {constants.ENDPOINT} shows you no such model; check the name, or "
                               "`hf auth login` if it is private")
        if status == 401:
            return EngineError("HUB-TOKEN", f"{self.asked}: {constants.ENDPOINT} does not know your token; `hf auth login` for a new one", ENVIRONMENT)
        if status == 403:
            return EngineError("HUB-FORBIDDEN", f"{self.asked}: your token may not read it; accept the licence at {page} if it has one, or `hf auth login` "
                               "with a token that may", ENVIRONMENT)
        return None

    def let_first_go(self) -> None:
        """Rank 0 shows progress, so it should be the one that fetches; and the launcher ends all ranks once it has said what is wrong."""
        if not self.is_first:
            time.sleep(HEAD_START_S)

    def say(self, text: str) -> None:
        if self.is_first:
            print(text, file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
