"""From documents to token ids: the tokenizer's identity, and what becomes of documents that are too long."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from actcache.errors import DocumentError, DocumentTooLongError, ModelError, RecipeError
from actcache.format.arguments import is_whole, truth, whole
from actcache.format.keys import Document, ModelWindows, NormalDocument, Windows, document_key, normal_form
from actcache.format.passages import Passages, cut, ranks_of
from actcache.format.recipe import canonical_json
from actcache.io.cached import cached_property
from actcache.models.documents import document_keys

TooLong = Literal["refuse", "truncate", "windows"] | Windows | ModelWindows | Passages

#: Words that tell whether a tokenizer keeps given words apart.
_PROBES = (("a", "b"), ("A", "B"), ("1", "2"), ("é", "ü"), ("return", "it"))
#: What a fast tokenizer says of itself, hashed as it comes -> its digest, for which all of it is read and sorted.
_digests: dict[bytes, str] = {}
_NO_LIMIT = 1_000_000  # transformers gives tokenizers without a limit one of 10**30


@dataclass(frozen=True)
class Encoded:
    """One document, or one window of it, as the model takes it. All arrays have one element per token."""

    token_ids: NDArray[np.int32]
    type_ids: NDArray[np.int8]
    spans: NDArray[np.int32] | None = None  # [tokens, 2] characters [start, end) within its text (or word)
    word_ids: NDArray[np.int32] | None = None  # -1 for special tokens

    @property
    def length(self) -> int:
        """Rows that the model makes of it."""
        return len(self.token_ids)


@dataclass(frozen=True, eq=False)
class Passage:
    """One passage of a document: a document of its own, of the token ids that the model is given for it.

    Its own tokens are ``token_ids[begin:end]``; those around them are special tokens and, where asked, neighbours.
    """

    what = "a passage"  # not a field

    token_ids: NDArray[np.int32]  # [tokens]
    begin: int
    end: int
    first: int  # position of its first own token among the document's, without special tokens
    spans: NDArray[np.int32]  # [tokens, 2] characters [start, end) within the document's text (or word)
    word_ids: NDArray[np.int32]  # [tokens] words of the document; -1 for special tokens

    @cached_property
    def _key(self) -> bytes:
        return document_key(self.token_ids)

    def key(self) -> bytes:
        """Return its key, that of a document of these token ids."""
        return self._key

    @property
    def own(self) -> int:
        """How many tokens are its own."""
        return self.end - self.begin


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of all that decides a tokenizer's token ids: 64 hexadecimal digits.

    It is the same after any kind of call: truncation and padding, which a fast tokenizer keeps as state, are left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = {
        "truncation_side": tokenizer.truncation_side,
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
        "type_ids": "token_type_ids" in tokenizer.model_input_names,  # whether a pair's second text has others
    }
    if backend is None:
        return _digest_of(_slow_state(tokenizer), settings)
    text = backend.to_str()
    quick = hashlib.blake2b(f"{canonical_json(settings)} {text}".encode(), digest_size=32).digest()
    if quick not in _digests:
        _digests[quick] = _digest_of(json.loads(text), settings)
    return _digests[quick]


def token_ids_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of what decides which token ids a text has: 64 hexadecimal digits.

    Unlike ``tokenizer_digest`` it leaves out where texts are cut and which type ids they get, in which the tokenizers
    of two models (BERT's and DistilBERT's) may differ that have the same ids for every text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = {"split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False))}
    return _digest_of(_slow_state(tokenizer) if backend is None else json.loads(backend.to_str()), settings)


def _digest_of(state: dict[str, Any], settings: dict[str, Any]) -> str:
    kept = {name: value for name, value in state.items() if name not in ("truncation", "padding")}
    text = canonical_json({"state": kept, **settings})
    return hashlib.blake2b(text.encode(), digest_size=32, person=b"actcache/tokens").hexdigest()


def _copy_of(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a deep copy. A vocabulary, which holds texts and numbers only, is copied at once and not word by word."""
    vocabularies = {
        id(value): dict(value)
        for value in vars(tokenizer).values()
        if type(value) is dict and {*map(type, value)} == {str} and {*map(type, value.values())} == {int}
    }
    return copy.deepcopy(tokenizer, vocabularies)


def _slow_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    def matters(name: str, value: object) -> bool:
        paths = name == "name_or_path" or name.endswith("_file")
        return not paths and name not in ("padding_side", "model_max_length") and isinstance(value, str | int | float)

    return {
        "class": type(tokenizer).__name__,
        "vocabulary": tokenizer.get_vocab(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "arguments": {name: value for name, value in tokenizer.init_kwargs.items() if matters(name, value)},
    }


class DocumentEncoder:
    """Turns documents into token ids under one length policy. Holds its own copy of the tokenizer; not thread-safe.

    Args:
        max_length: tokens that a document may have, special tokens included; None for no limit.
        too_long: ``"refuse"`` raises; ``"truncate"`` cuts, every kind of document on the tokenizer's
            ``truncation_side``; and ``Windows`` makes several entries of every document (one of a short one), from its
            beginning on, whatever that side is. A pair's second text is what windows cut; its first text stands in
            each. ``"windows"`` are such of ``max_length`` tokens that share none. ``Passages`` makes several entries of
            a longer document, and refuses pairs.
        special_tokens: whether the tokenizer adds its special tokens. Documents of token ids are taken as they are.
        vocabulary: token ids that the model knows are below this; None for what the tokenizer has.
        extras: of ``spans``, ``word_ids``, ``type_ids``, what is wanted of entries beside the token ids; only fast
            tokenizers know the first two.

    Raises:
        ModelError: the tokenizer knows no tokens but special ones.
        RecipeError: the lengths leave no room for a token, or the tokenizer cannot do what is asked.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        too_long: TooLong = "refuse",
        special_tokens: bool = True,
        *,
        vocabulary: int | None = None,
        extras: Sequence[str] = (),
    ) -> None:
        special_tokens = truth("special_tokens", special_tokens)
        if max_length is not None:
            max_length = whole("max_length", max_length, 1)
        too_long = ModelWindows() if too_long == "windows" else too_long
        if isinstance(too_long, ModelWindows):
            if max_length is None:
                raise RecipeError("this model takes documents of any length: windows need a max_length")
            too_long = too_long.of(max_length)
        self.windows = windows = too_long if isinstance(too_long, Windows) else None  # by which documents are cut
        self.passages = too_long if isinstance(too_long, Passages) else None
        if self.passages:
            if max_length is not None and self.passages.max_length > max_length:
                raise RecipeError(
                    f"passages of {self.passages.max_length} tokens are longer than the {max_length} possible: give "
                    "shorter ones"
                )
        elif windows:
            if max_length is not None and windows.max_length > max_length:
                raise RecipeError(f"windows of {windows.max_length} tokens are longer than the {max_length} possible")
            max_length = windows.max_length
        elif too_long not in ("refuse", "truncate"):
            raise RecipeError(
                f"too_long {too_long!r} is not 'refuse', 'truncate', 'windows', actcache.windows(max_length, stride) "
                "or actcache.passages(max_length)"
            )
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            # what transformers makes of a folder without a tokenizer's files; every word would be the unknown one
            raise ModelError(
                f"the {type(tokenizer).__name__} knows {len(tokenizer)} special tokens and no others: the model's "
                "folder lacks the tokenizer's files; save the tokenizer there, or load it from where it is"
            )
        self.tokenizer = _copy_of(tokenizer)  # calls change a fast tokenizer's truncation and padding
        self.tokenizer.model_max_length = int(1e30)  # or it warns of documents that this class is about to handle
        if windows:
            self.tokenizer.truncation_side = "right"  # windows lose nothing; with "left" they came in reverse order
        self.max_length, self.too_long, self.special_tokens = max_length, too_long, special_tokens
        self.vocabulary = len(tokenizer) if vocabulary is None else vocabulary
        self.extras = tuple(extras)
        self._added = [
            self.tokenizer.num_special_tokens_to_add(pair) if special_tokens else 0 for pair in (False, True)
        ]
        stride = windows.stride if windows else 0
        if max_length is not None and max_length - self._added[0] <= stride:
            raise RecipeError(
                f"max_length {max_length} leaves no room: {self._added[0]} are special tokens"
                + (f" and {stride} are stride" if stride else "")
            )
        if not self.tokenizer.is_fast and ({"spans", "word_ids"} & {*extras} or windows or self.passages):
            raise RecipeError(
                f"{type(tokenizer).__name__} is slow and knows no windows, passages, spans or word ids: load the fast "
                "tokenizer"
            )
        if self.passages:
            if {"spans", "word_ids"} & {*extras}:
                raise RecipeError(
                    "a passage is shared by documents in which it stands at other places, so spans and word_ids are "
                    "not stored with it: recycler.passages(texts) tells them"
                )
            self._limits = self.passages.limits(self._added[0])
            self._around = self._special_tokens_around()

    has_token_ids = True
    chunk = 2048  #: documents that are looked up, tokenized and sorted by length at a time

    def digest(self) -> str:
        """Return the digest of what decides the token ids."""
        return tokenizer_digest(self.tokenizer)

    def keys(self, documents: Sequence[Document], first: int = 0) -> list[bytes]:
        """Return the documents' keys; a ``DocumentError`` names the position, from ``first``, of one that has none."""
        return document_keys(documents, first)

    @cached_property
    def truncating(self) -> DocumentEncoder:
        """An encoder that differs in that it truncates whatever is too long, and makes no extras."""
        other = copy.copy(self)  # with the same tokenizer: to copy that takes as long as hundreds of documents
        other.too_long, other.windows, other.passages, other.extras = "truncate", None, None, ()
        return other

    def cut(self, documents: Sequence[Document], positions: Sequence[int] | None = None) -> list[list[Passage]]:
        """Return each document's passages, in the order of the documents; see ``actcache.format.passages``.

        Passages are returned as they are.

        Args:
            positions: as of ``encode``.

        Raises:
            DocumentError: see ``encode``; or a document is a pair of texts.
        """
        names = range(len(documents)) if positions is None else positions
        result: list[list[Passage]] = [[one] if isinstance(one, Passage) else [] for one in documents]
        others = [i for i, passages in enumerate(result) if not passages]
        whole = self._whole.encode([documents[i] for i in others], [names[i] for i in others])
        for i, (tokens,) in zip(others, whole, strict=True):
            normal = normal_form(documents[i])
            if isinstance(normal, tuple):
                raise DocumentError(
                    f"document {names[i]} is a pair of texts, which are read together and not in passages: give "
                    "each text as a document of its own, or cut by actcache.windows(max_length, stride)"
                )
            result[i] = self._cut(normal, tokens)
        return result

    def _cut(self, document: NormalDocument, tokens: Encoded) -> list[Passage]:
        assert self.passages is not None
        assert tokens.spans is not None
        assert tokens.word_ids is not None
        text, words = document if isinstance(document, str) else None, document if isinstance(document, list) else None
        ranks = ranks_of(text, tokens.spans, tokens.word_ids, self.passages.by, words)
        bounds = cut(tokens.token_ids, ranks, *self._limits).tolist()
        before, after = self._around if not isinstance(document, np.ndarray) else (_NO_IDS, _NO_IDS)
        result = []
        for begin, end in itertools.pairwise(bounds):
            left = max(0, begin - self.passages.context)
            some = slice(left, end + self.passages.context)
            ids = np.concatenate([before, tokens.token_ids[some], after])
            spans, words_of = np.zeros((len(ids), 2), np.int32), np.full(len(ids), -1, np.int32)
            inner = slice(len(before), len(ids) - len(after))
            spans[inner], words_of[inner] = tokens.spans[some], tokens.word_ids[some]
            first = len(before) + begin - left
            result.append(Passage(ids, first, first + end - begin, begin, spans, words_of))
        return result

    @property
    def around(self) -> tuple[int, int]:
        """How many special tokens stand before, and after, a text's own, where documents are cut into passages."""
        before, after = self._around
        return len(before), len(after)

    @cached_property
    def _whole(self) -> DocumentEncoder:
        """An encoder that neither cuts nor refuses what is long, and adds no special tokens."""
        other = copy.copy(self)
        other.too_long, other.passages, other.max_length = "refuse", None, None
        other.special_tokens, other.extras = False, ("spans", "word_ids")
        return other

    def _special_tokens_around(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the special tokens that stand before, and after, a text's own."""
        own, whole = (self.tokenizer("a", add_special_tokens=special) for special in (False, self.special_tokens))
        inner, ids = own["input_ids"], whole["input_ids"]
        for i in range(len(ids) - len(inner) + 1):
            if ids[i : i + len(inner)] == inner and not any(whole.get("token_type_ids", ())):
                return np.array(ids[:i], np.int32), np.array(ids[i + len(inner) :], np.int32)
        raise RecipeError(
            f"{type(self.tokenizer).__name__} changes a text's tokens, or their types, where it adds special tokens: "
            "passages would be other inputs than texts. Take special_tokens=False, or windows"
        )

    def encode(self, documents: Sequence[Document], positions: Sequence[int] | None = None) -> list[list[Encoded]]:
        """Return each document's windows, in the order of the documents; one, where the policy is not ``Windows``.

        Args:
            positions: of the documents in the caller's own sequence, for errors; 0, 1, ... by default.

        Raises:
            DocumentError: a document is none, makes no tokens, or holds ids outside the vocabulary; it is words, and
                the tokenizer would run them together.
            DocumentTooLongError: a document is too long and the policy is to refuse.
        """
        names = range(len(documents)) if positions is None else positions
        if self.passages or any(isinstance(document, Passage) for document in documents):
            return [[self._of_passage(one) for one in passages] for passages in self.cut(documents, names)]
        given, documents = documents, _normal_forms(documents, names)
        kinds: dict[str, list[int]] = {}
        for i, document in enumerate(documents):
            kinds.setdefault(_KINDS.get(type(document), "ids"), []).append(i)
        result: list[list[Encoded]] = [[] for _ in documents]
        for kind, members in kinds.items():
            encode = self._encode_ids if kind == "ids" else self._encode_texts
            encoded = encode([documents[i] for i in members], kind, [names[i] for i in members])
            for i, windows in zip(members, encoded, strict=True):
                result[i] = windows
        for document, windows, name in zip(given, result, names, strict=True):
            self._check(windows, document, name)
        return result

    def _encode_texts(self, documents: list[Any], kind: str, positions: Sequence[int]) -> list[list[Encoded]]:
        if kind == "words" and self._joined_words is not None:
            first, second = self._joined_words
            raise DocumentError(
                f"document {positions[0]} is words, and this {type(self.tokenizer).__name__} would run them together: "
                f"the words {first!r}, {second!r} get other tokens than the text '{first} {second}'. Load it with "
                "add_prefix_space=True, or, where that changes nothing, give the document as one text"
            )
        cut: dict[str, Any] = {}
        if self.windows:
            cut = {"truncation": True, "return_overflowing_tokens": True, "stride": self.windows.stride}
            if kind == "pair":
                self._check_first_texts(documents, positions, self.windows)
                cut["truncation"] = "only_second"
        elif self.too_long == "truncate" and self.max_length is not None:
            cut = {"truncation": True}
        if cut:
            cut["max_length"] = self.max_length
        if "spans" in self.extras:
            cut["return_offsets_mapping"] = True
        firsts, seconds = [list(part) for part in zip(*documents, strict=True)] if kind == "pair" else (documents, None)
        batch = self.tokenizer(
            firsts,
            seconds,
            add_special_tokens=self.special_tokens,
            is_split_into_words=kind == "words",
            return_attention_mask=False,
            **cut,
        )
        owners = batch.get("overflow_to_sample_mapping", range(len(documents)))
        result: list[list[Encoded]] = [[] for _ in documents]
        for i, owner in enumerate(owners):
            result[owner].append(self._encoded(batch, i))
        return result

    @cached_property
    def _joined_words(self) -> tuple[str, str] | None:
        """Two words that get other tokens as words than in a text with a space between; None where none do.

        A byte-level tokenizer without ``add_prefix_space``, and a SentencePiece one that puts no mark before a word,
        know a word by the space before it. Given words have none: all but the first would get the tokens of the inside
        of a word. This is found out by running the tokenizer, for no table of tokenizers is complete.
        """

        def tokens(document: str | list[str]) -> list[int]:
            split = isinstance(document, list)
            ids: list[int] = self.tokenizer(document, add_special_tokens=False, is_split_into_words=split)["input_ids"]
            return ids

        return next((pair for pair in _PROBES if tokens([*pair]) != tokens(" ".join(pair))), None)

    def _encoded(self, batch: Any, i: int) -> Encoded:
        ids = np.array(batch["input_ids"][i], np.int32)
        types = batch.get("token_type_ids")
        return Encoded(
            ids,
            np.zeros(len(ids), np.int8) if types is None else np.array(types[i], np.int8),
            np.array(batch["offset_mapping"][i], np.int32).reshape(-1, 2) if "spans" in self.extras else None,
            np.array([-1 if word is None else word for word in batch.word_ids(i)], np.int32)
            if "word_ids" in self.extras
            else None,
        )

    def _encode_ids(self, documents: list[Any], kind: str, positions: Sequence[int]) -> list[list[Encoded]]:
        result = []
        for ids, position in zip(documents, positions, strict=True):
            windows = [ids]
            if self.windows:
                length, stride = self.windows.max_length, self.windows.stride
                windows = [ids[i : i + length] for i in range(0, max(1, len(ids) - stride), length - stride)]
            elif self.too_long == "truncate" and self.max_length is not None:
                left = self.tokenizer.truncation_side == "left"
                windows = [ids[-self.max_length :] if left else ids[: self.max_length]]
            result.append([self._plain(window, position) for window in windows])
        return result

    def _of_passage(self, passage: Passage) -> Encoded:
        return Encoded(passage.token_ids, np.zeros(len(passage.token_ids), np.int8))

    def _plain(self, ids: NDArray[np.integer], position: int) -> Encoded:
        if len(ids) and ids.max() >= self.vocabulary:  # before they are cut down to 32 bits
            raise self._outside(ids, position)
        return Encoded(
            ids.astype(np.int32),
            np.zeros(len(ids), np.int8),
            np.zeros((len(ids), 2), np.int32) if "spans" in self.extras else None,
            np.full(len(ids), -1, np.int32) if "word_ids" in self.extras else None,
        )

    def _check(self, windows: list[Encoded], document: Document, position: int) -> None:
        longest = max((len(window.token_ids) for window in windows), default=0)
        if longest == 0:
            raise DocumentError(f"document {position} ({document!r:.60}) makes no tokens; leave it out")
        if self.max_length is not None and longest > self.max_length:
            raise DocumentTooLongError(
                f"document {position} ({document!r:.60}...) has {longest} tokens, more than {self.max_length}: give "
                'too_long="truncate" or too_long="windows", or leave it out'
            )
        for window in windows:
            if window.token_ids.max() >= self.vocabulary:
                raise self._outside(window.token_ids, position)

    def _outside(self, ids: NDArray[np.integer], position: int) -> DocumentError:
        return DocumentError(
            f"document {position} holds token id {ids.max()}, and the model's vocabulary is 0..{self.vocabulary - 1}: "
            "is it the tokenizer of another model?"
        )

    def _check_first_texts(self, documents: list[tuple[str, str]], positions: Sequence[int], windows: Windows) -> None:
        # Only the second text is cut; the tokenizers' own check of this is a panic.
        room = windows.max_length - self._added[1] - windows.stride
        ids = self.tokenizer([first for first, _ in documents], add_special_tokens=False)["input_ids"]
        for document, position, tokens in zip(documents, positions, ids, strict=True):
            if len(tokens) >= room:
                raise DocumentTooLongError(
                    f"the first text of document {position} ({document[0]!r:.60}...) has {len(tokens)} tokens and "
                    "stands in every window, which leaves no room for the second: give longer windows"
                )


_NO_IDS = np.empty(0, np.int32)
_KINDS: dict[type[Any], str] = {str: "text", tuple: "pair", list: "words"}


def _normal_forms(documents: Sequence[Document], positions: Sequence[int]) -> list[Any]:
    normal = []
    for document, position in zip(documents, positions, strict=True):
        try:
            normal.append(normal_form(document))
        except DocumentError as error:
            raise DocumentError(f"document {position}: {error}") from None
    return normal


def check_max_length(max_length: int | None, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> int | None:
    """Return a document's largest length; by default what tokenizer and model allow, None where neither has a limit.

    Raises:
        RecipeError: ``max_length`` is more than the model has ``positions`` for, or no whole number of 1 or more.
    """
    if max_length is None:
        limit = tokenizer.model_max_length
        limits = [limit] if limit is not None and limit < _NO_LIMIT else []
        return min([*limits, *([] if positions is None else [positions])], default=None)
    if not is_whole(max_length) or max_length < 1:
        raise RecipeError(f"max_length is a whole number of tokens, not {max_length!r:.80}")
    if positions is not None and max_length > positions:
        raise RecipeError(f"max_length {max_length} is more than the {positions} tokens that the model takes")
    return int(max_length)
